"""Density as a loop over samples through the model's own forward, and what a measurement may not change."""

import torch
from reference_procedure import padded_loss

from kunbr_fast.model.decoder import Decoder

ATTENTION = ("self_attn.", "attn.", "attention.")


def wanted(modules, name, parameter):
    """The documented meaning of `modules`, on a name relative to its layer."""
    attention, matrix = name.startswith(ATTENTION), parameter.dim() >= 2 and not name.endswith("bias")
    return {
        "all": True,
        "mlp": matrix and not attention,
        "attention": matrix and attention,
        "norms": not matrix and name.endswith("weight"),
    }[modules]


def sample_gradients(model, samples):
    """[{parameter path: gradient}], one sample at a time through the model's own forward."""
    out = []
    for sample in samples:
        model.zero_grad()
        padded_loss(model, [sample]).backward()
        out.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    return out


STATISTIC = {
    "grad_l1": lambda g: g.abs().sum(),
    "grad_l2": lambda g: g.square().sum().sqrt(),
    "grad_l2sq": lambda g: g.square().sum(),
    "grad_linf": lambda g: g.abs().max(),
    "grad_mean_abs": lambda g: g.abs().mean(),
}


def loop(model, samples, modules, reduction, statistic="grad_l1", gradients=None):
    """({parameter path: density}, [density of each layer], layers' prefix), from a loop over samples."""
    gradients = gradients or sample_gradients(model, samples)
    if reduction == "mean":
        gradients = [{name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}]
    prefix = Decoder(model).layer_path(0)[:-1]
    per_module, per_layer = {}, [0.0] * model.config.num_hidden_layers
    for sample in gradients:
        together = {}
        for name, gradient in sample.items():
            layer, _, inner = name.removeprefix(prefix).partition(".")
            if not name.startswith(prefix) or not wanted(modules, inner, gradient):
                continue
            together.setdefault(int(layer), []).append(gradient.flatten())
            parts = {name: gradient}
            if ".experts." in name:
                parts = {f"{name}[{e}]": part for e, part in enumerate(gradient)}
            for path, part in parts.items():
                per_module[path] = per_module.get(path, 0.0) + float(STATISTIC[statistic](part)) / len(gradients)
        for layer, parts in together.items():
            per_layer[layer] += float(STATISTIC[statistic](torch.cat(parts))) / len(gradients)
    return per_module, per_layer, prefix


def mean_of(gradients):
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}


def trace(model):
    return (
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        [(p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone().sum())) for p in model.parameters()],
        [(p.data_ptr(), p._version) for p in model.parameters()],
        model.config._attn_implementation,
    )
