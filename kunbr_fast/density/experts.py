"""Mixtures of experts whose weights are stacked in 3-D parameters, as transformers 5 has them.

During a measurement these modules run `experts_forward`, through transformers' experts interface. It sorts rows by
expert and, within an expert, by token and hence by sample. So one expert's rows of one sample are one segment: E * B
segments, most of them short, some empty.

Index letters: E experts, B samples, T tokens, S = T * top_k rows (one for each token and expert), D, I sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.density.taps import Part, Segments, Taps
from kunbr_fast.model import compat
from kunbr_fast.model.decoder import Decoder

IMPLEMENTATION = "kunbr_density"
_FLAGS = ("has_bias", "is_transposed")
_LATER_FLAGS = {"has_gate": True, "has_post_expert_norm": False}  # since 5.4 and 5.20; without the flag it is so
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

# What is measured, by module; empty outside of `watched`. The interface hands over the module alone.
_watching: dict[nn.Module, tuple[Taps, Any, torch.Tensor]] = {}


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` made it, and each of its own parameters is known."""
    known = {*_WEIGHTS, *(f"{name}_bias" for name in _WEIGHTS)}
    own = dict(module.named_parameters(recurse=False))
    return all(hasattr(module, flag) for flag in _FLAGS) and bool(own) and own.keys() <= known


def holds_experts(path: str, module: nn.Module) -> bool:
    """Whether the modules below it run on the rows of experts: within stacked experts, and where each is a module."""
    return is_experts(module) or path.rpartition(".")[2] == "experts"


def number_of(module: nn.Module) -> int | None:
    """How many experts its parameters have, one beside the other in their first dimension; None: they have none."""
    number, own = getattr(module, "num_experts", None), list(module.parameters(recurse=False))
    stacked = number is not None and any(p.dim() == 3 for p in own) and all(len(p) == number for p in own)
    return number if stacked else None


def _flag(module: nn.Module, name: str) -> bool:
    return getattr(module, name, _LATER_FLAGS[name])


def out_features(module: nn.Module) -> dict[str, int]:
    """{weight: N}, of each expert."""
    return {
        name: parameter.shape[2 if module.is_transposed else 1]
        for name, parameter in module.named_parameters(recurse=False)
        if name in _WEIGHTS
    }


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states (T, D), top_k_index and top_k_weights (T, top_k) -> (T, D), as the module's own forward."""
    taps, item, sample = _watching.get(module, (None, None, torch.zeros_like(top_k_index[:, 0])))
    num_samples = 1 if taps is None else len(taps.segments.lengths)
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    token = order // top_k_index.shape[1]
    counts = torch.bincount(chosen * num_samples + sample[token], minlength=module.num_experts * num_samples)
    lengths = counts.tolist()
    segments = Segments(lengths, F.pad(counts.cumsum(0), (1, 0)))
    rows = [sum(lengths[e * num_samples : (e + 1) * num_samples]) for e in range(module.num_experts)]

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = getattr(module, name).detach(), getattr(module, f"{name}_bias", None)  # its gradient is tapped
        bias = None if bias is None else bias.detach()
        parts = [
            F.linear(part, weight[e].t() if module.is_transposed else weight[e], None if bias is None else bias[e])
            for e, part in enumerate(x.split(rows))
            if len(part)
        ]
        y = torch.cat(parts)
        if taps is None or not y.requires_grad:
            return y
        return taps.tap(Part(item, segments, (name, f"{name}_bias")), x, [y], sorted_rows=True)[0]

    if taps is not None:
        taps.enter(item)
    gated = _flag(module, "has_gate")
    y = product(hidden_states[token], "gate_up_proj" if gated else "up_proj")
    y = product(module._apply_gate(y) if gated else module.act_fn(y), "down_proj")
    if _flag(module, "has_post_expert_norm"):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def _of_interface(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """For a module that is not watched its own forward: others of its config are, or nothing is known of it."""
    ours = module in _watching
    return (
        experts_forward(module, *args, **kwargs) if ours else type(module).forward.__wrapped__(module, *args, **kwargs)
    )


@contextlib.contextmanager
def watched(items: Sequence[Any], taps: Taps) -> Iterator[None]:
    """Inside, the experts modules of `items` run `experts_forward`, and their products are tapped."""
    before = [(item.module.config, item.module.config._experts_implementation) for item in items]
    whole = len(taps.segments.lengths) == 1
    sample = torch.zeros_like(taps.places.sample) if whole else taps.places.sample
    if items:
        compat.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _of_interface)
    try:
        for item in items:
            item.module.config._experts_implementation = IMPLEMENTATION
            _watching[item.module] = (taps, item, sample)
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
        for item in items:
            _watching.pop(item.module, None)


@torch.no_grad()
def check(decoder: Decoder, items: Sequence[Any]) -> dict[str, str]:
    """{path: why} of those whose own forward differs from `experts_forward` by more than rounding, on the decoder's
    probe samples. ValueError with the module's path where experts are spread over processes.
    """
    paths = {item.module: item.path for item in items}
    others: dict[str, str] = {}

    def compare(module: nn.Module, args: tuple, kwargs: dict, theirs: torch.Tensor) -> None:
        ours = experts_forward(module, *args, **kwargs)
        error, size = float((ours - theirs).double().norm()), float(theirs.double().norm())
        if not error <= decoder.rounding * size:
            others[paths[module]] = (
                f"{paths[module]}: {type(module).__name__} does something to its experts that kunbr_fast does not "
                f"know: its output differs from ours by {error:.1e} (of {size:.1e})"
            )

    for item in items:
        if getattr(item.module, "_is_expert_parallel", False):
            raise ValueError(f"{item.path}: its experts are spread over processes: load the model in one process")
    hooks = [item.module.register_forward_hook(compare, with_kwargs=True) for item in items]
    try:
        if items:
            decoder.logits(decoder.probe)
    finally:
        for hook in hooks:
            hook.remove()
    return others
