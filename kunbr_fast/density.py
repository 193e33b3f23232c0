"""Knowledge density: how much each layer's weights would move for the forget set.

    K_l = mean over samples of || dL(sample)/dW_l ||_1          (reduction="sample", the paper's)
    K_l = || mean over samples of dL(sample)/dW_l ||_1          (reduction="mean", the norm of the mean gradient)

where L(sample) is the mean NLL over the sample's labelled tokens. Nothing is updated. For the first form no weight
gradient is ever held: a linear layer's gradient for one sample is dY_i^T X_i, formed a tile at a time from the
layer's input and the gradient of its output, inside the backward pass. Samples are packed, and each one's loss stands
alone in the sum, so one backward pass serves all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from kunbr_fast import losses
from kunbr_fast.atomic import write_json
from kunbr_fast.data import PackedBatch, as_samples, check_labels, pack
from kunbr_fast.decoder import Decoder, check_finite
from kunbr_fast.dispatch import resolve
from kunbr_fast.kernels import reference
from kunbr_fast.schedule import token_batches
from kunbr_fast.training import frozen

MODULES = ("mlp", "attention", "norms", "all")
STATISTICS = ("grad_l1",)
REDUCTIONS = ("sample", "mean")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


# ---------------------------------------------------------------- result


@dataclasses.dataclass(frozen=True)
class Density:
    """Knowledge density of each layer, un-normalised.

    per_layer: float64 (H,), the expected L1 norm of the gradient (nats per unit of weight, summed over weights);
    per_module: the same by parameter path, such as "model.layers.3.mlp.up_proj.weight"; num_weights: (H,) int64,
    how many weights each entry sums over; num_samples: how many samples the expectation is over.
    """

    per_layer: torch.Tensor
    per_module: dict[str, float]
    num_weights: torch.Tensor
    num_samples: int
    modules: str = "mlp"
    statistic: str = "grad_l1"
    reduction: str = "sample"

    @property
    def normalized(self) -> torch.Tensor:
        """(H,) float64 that sums to 1: `per_layer / per_layer.sum()`."""
        total = self.per_layer.sum()
        if not total > 0:
            raise ValueError("every layer's density is zero: the loss does not depend on these weights")
        return self.per_layer / total

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Density:
        values = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        values["per_layer"] = torch.tensor(values["per_layer"], dtype=torch.float64)
        values["num_weights"] = torch.tensor(values["num_weights"], dtype=torch.int64)
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Floats survive the round trip exactly."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Density:
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a density file written by Density.save ({error})") from error


# ---------------------------------------------------------------- registry of layer kinds
#
# A kind turns one module's input x (T, K) and output gradient dy (T, N) into the gradients of its own parameters.
# `norms(module, x, dy, lengths)` gives {parameter: (B,) float64}, each sample's L1 norm; `gradient(module, x, dy)`
# gives {parameter: gradient of the sum over all rows}.


@dataclasses.dataclass(frozen=True)
class LayerKind:
    matches: Callable[[nn.Module], bool]
    norms: Callable[[nn.Module, torch.Tensor, torch.Tensor, list[int]], dict[str, torch.Tensor]]
    gradient: Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def _linear_norms(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    out = {"weight": reference.grad_l1(x, dy, lengths)}  # the L1 norm does not know a transposed weight (Conv1D)
    if module.bias is not None:
        out["bias"] = torch.stack([part.sum(0, dtype=_wide(dy)).abs().sum().double() for part in dy.split(lengths)])
    return out


def _linear_gradient(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    dw = dy.t().to(_wide(dy)) @ x.to(_wide(x))
    out = {"weight": dw.t() if isinstance(module, Conv1D) else dw}
    if module.bias is not None:
        out["bias"] = dy.sum(0, dtype=_wide(dy))
    return out


def _small_gradient(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """By autograd through the module alone: for modules with a few vectors of parameters, such as norms."""
    names, parameters = zip(*module.named_parameters(recurse=False))
    with torch.enable_grad():
        copies = {name: p.detach().requires_grad_() for name, p in zip(names, parameters)}
        out = torch.func.functional_call(module, copies, (x,))
        grads = torch.autograd.grad(out, list(copies.values()), dy)
    return dict(zip(names, grads))


def _small_norms(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    heads = len(x) // sum(lengths)  # a norm of queries or keys has a row for each head of each token
    rows = [length * heads for length in lengths]
    parts = [_small_gradient(module, a, b) for a, b in zip(x.split(rows), dy.split(rows))]
    return {name: torch.stack([part[name].abs().sum(dtype=torch.float64) for part in parts]) for name in parts[0]}


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return type(module).__name__.endswith("Norm") and bool(own) and all(p.dim() == 1 for p in own)


# A subclass of nn.Linear may compute something else (LoRA, 4-bit weights): only the exact types are known.
LAYER_KINDS: dict[str, LayerKind] = {
    "linear": LayerKind(lambda m: type(m) in (nn.Linear, Conv1D), _linear_norms, _linear_gradient),
    "norm": LayerKind(_is_norm, _small_norms, _small_gradient),
}


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------- which parameters


@dataclasses.dataclass(frozen=True)
class _Watched:
    module: nn.Module
    kind: LayerKind
    path: str
    layer: int
    parameters: tuple[str, ...]  # of this module, the ones that count


def _wanted(modules: str, inner_path: str, parameter: nn.Parameter) -> bool:
    """Whether `modules` names the parameter at `inner_path` (relative to its layer)."""
    if modules == "all":
        return True
    if parameter.dim() < 2:
        return modules == "norms" and not inner_path.endswith("bias")
    attention = inner_path.split(".")[0] in _ATTENTION_NAMES
    return attention if modules == "attention" else modules == "mlp" and not attention


def _watch_list(decoder: Decoder, modules: str) -> list[_Watched]:
    uses: dict[int, list[str]] = {}
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    watched = []
    for index, layer in enumerate(decoder.layers):
        for inner, module in layer.named_modules():
            own = {
                name: p
                for name, p in module.named_parameters(recurse=False)
                if _wanted(modules, f"{inner}.{name}".lstrip("."), p)
            }
            if not own:
                continue
            path = f"{decoder.layer_path(index)}.{inner}".rstrip(".")
            for name, parameter in own.items():
                if len(uses[id(parameter)]) > 1:
                    others = ", ".join(n for n in uses[id(parameter)] if n != f"{path}.{name}")
                    raise ValueError(f"{path}.{name} is tied to {others}: its gradient belongs to more than one layer")
            kind = next((k for k in LAYER_KINDS.values() if k.matches(module)), None)
            if kind is None:
                raise ValueError(
                    f"{path}: {type(module).__name__} is of no known kind (known: {', '.join(LAYER_KINDS)}); "
                    "add it to kunbr_fast.density.LAYER_KINDS or choose other modules"
                )
            watched.append(_Watched(module, kind, path, index, tuple(own)))
    if not watched:
        raise ValueError(f"{decoder.name}: no layer has parameters of modules={modules!r}")
    return watched


# ---------------------------------------------------------------- the measurement


def knowledge_density(
    model: nn.Module | Decoder,
    samples: Iterable[Any],
    modules: str = "mlp",
    statistic: str = "grad_l1",
    reduction: str = "sample",
    *,
    batch_tokens: int = 2048,
    impl: str = "auto",
    progress: bool = False,
) -> Density:
    """Knowledge density of every layer for `samples` (usually the forget set).

    samples: `{"input_ids": (T,), "labels": (T,)}` mappings, or padded Hugging Face batches (taken apart by their
    attention mask; a batch-mean loss plays no part: each sample's own mean NLL is differentiated).
    modules: `mlp` (weight matrices of the layer outside attention), `attention` (those within), `norms` (norm
    weights), or `all` (every parameter of the layer, biases too).
    reduction: `sample`, the mean over samples of each one's L1 norm (memory does not grow with the number of
    samples); `mean`, the L1 norm of the mean gradient (holds one fp32 gradient of the chosen weights).
    batch_tokens: tokens of one packed forward and backward pass.

    Equivalent, at H forward and backward passes' price for one sample at a time:
        for s in samples: loss(model, s).backward(); K += model.layers[l].weight.grad.abs().sum(); zero_grad()

    Leaves no gradient, hook or changed flag behind. Errors: ValueError with the module path for a module of no known
    kind, a tied weight, a sample without a labelled token, or a gradient that is not finite.
    """
    for name, value, known in (
        ("modules", modules, MODULES),
        ("statistic", statistic, STATISTICS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    for operation in ("grad_density", "linear_loss"):
        resolve(operation, impl, decoder.device)
    samples = as_samples(samples)
    check_labels(samples)
    watched = _watch_list(decoder, modules)
    totals: dict[str, torch.Tensor] = {}
    batches = token_batches([len(s["input_ids"]) for s in samples], batch_tokens)
    with (
        frozen(decoder.model),
        tqdm(total=len(samples), desc="knowledge density", unit="sample", leave=False, disable=not progress) as bar,
    ):
        for indices in batches:
            batch = pack([samples[i] for i in indices]).to(decoder.device)
            _measure(decoder, batch, watched, reduction, totals)
            bar.update(len(indices))
    return _collect(decoder, watched, totals, len(samples), modules, statistic, reduction)


def _heads_first(x: torch.Tensor, num_tokens: int) -> bool:
    """Whether x is (1, heads, T, d) rather than (1, T, heads, d)."""
    if x.shape[1] == x.shape[2]:
        # with T heads the shape does not tell: projections write token after token, so tokens lie further apart
        return x.stride(2) > x.stride(1)
    return x.shape[2] == num_tokens


def _token_rows(x: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """(1, T, D), (1, T, heads, d) or (1, heads, T, d) to rows, sample after sample."""
    return (x.transpose(1, 2) if heads_first else x).flatten(0, -2)


def _measure(
    decoder: Decoder, batch: PackedBatch, watched: list[_Watched], reduction: str, totals: dict[str, torch.Tensor]
) -> None:
    """Adds one packed batch to `totals`, by parameter path."""

    def on_forward(item: _Watched) -> Callable:
        seen = []

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if seen:
                raise ValueError(f"{item.path} runs twice in one forward pass: its gradient is not one product")
            seen.append(True)
            across = args[0].dim() == 4 and _heads_first(args[0], batch.num_tokens)
            x = _token_rows(args[0].detach(), across)

            def on_backward(dy: torch.Tensor) -> None:
                dy = _token_rows(dy, across)
                if reduction == "sample":
                    found = item.kind.norms(module, x, dy, batch.lengths)
                    found = {name: value.sum() for name, value in found.items()}
                else:
                    found = item.kind.gradient(module, x, dy)
                for name in item.parameters:
                    path = f"{item.path}.{name}"
                    totals[path] = totals[path].add_(found[name]) if path in totals else found[name]

            output.register_hook(on_backward)

        return hook

    with torch.no_grad():
        embedded = decoder.embed(batch)
    hooks = [item.module.register_forward_hook(on_forward(item)) for item in watched]
    try:
        hidden = decoder.run(batch, 0, None, embedded.requires_grad_())
    finally:  # before the backward pass, in which small modules run again
        for hook in hooks:
            hook.remove()
    rows = losses.likelihood(batch, reduction="sum")
    loss, _ = losses.linear_loss(decoder.final(hidden[batch.rows]), decoder.head, batch.targets, rows.weight)
    loss.backward(inputs=[embedded])


def _collect(
    decoder: Decoder,
    watched: list[_Watched],
    totals: dict[str, torch.Tensor],
    num_samples: int,
    modules: str,
    statistic: str,
    reduction: str,
) -> Density:
    per_layer = torch.zeros(decoder.num_layers, dtype=torch.float64)
    num_weights = torch.zeros(decoder.num_layers, dtype=torch.int64)
    per_module = {}
    for item in watched:
        for name in item.parameters:
            path = f"{item.path}.{name}"
            total = totals.get(path, torch.zeros(()))  # a module that never ran has no gradient
            value = float(total.abs().sum(dtype=torch.float64)) / num_samples
            if not value < float("inf"):
                check_finite(decoder.model)
                raise ValueError(f"{path}: its gradient is not finite although all weights are: try a wider dtype")
            per_module[path] = value
            per_layer[item.layer] += value
            num_weights[item.layer] += getattr(item.module, name).numel()
    return Density(per_layer, per_module, num_weights, num_samples, modules, statistic, reduction)
