"""Attribution: how much single weights have to do with the forget set, and masks of the weights that may change.

g_f and g_r are the mean gradients of the forget and of the retain set, of each sample's mean NLL. They are gradients of
the NLL itself: unlearning by gradient ascent moves a weight along +g_f, keeping what is to be kept moves it along -g_r.

    grad            |g_f|: SalUn's saliency (arXiv 2310.12508)
    fisher          E_samples g^2, the diagonal of the Fisher information, of the forget set. With a retain set divided
                    by the retain set's (0 / 0 is 0): Selective Synaptic Dampening's choice (arXiv 2308.07707)
    wagle           |(w - g_r / mu) * g_f| (WAGLE, arXiv 2410.17509); mask: the top `ratio` of all weights together
    sure            the L2 norm of g_f's row, for each output neuron; |g_f| for a weight of a vector (SURE, arXiv
                    2410.16454); mask: the top `ratio` of all rows together
    memflex         mean|g_f| of each matrix where cos(g_f, g_r) < max_cosine, else 0; mask: the matrices above
                    `threshold`, whole (MemFlex, arXiv 2407.01920)
    sign_agreement  -sign(g_f) * sign(g_r), 1 where ascent on the forget set goes down on the retain set too; mask:
                    those (MUDMAN's disruption masking, arXiv 2506.12484, whose unlearning gradient is -g_f here)

A matrix of stacked experts is one matrix for each expert.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.density.layer_kinds import How, Watched, norm_of
from kunbr_fast.density.passes import Measurement, PassSettings, checked_samples, inner_product
from kunbr_fast.density.sums import check_values
from kunbr_fast.density.watch import MODULES, watch_list
from kunbr_fast.keywords import named_by, taken
from kunbr_fast.model import compat
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.weights import Weights

METHODS = ("grad", "fisher", "wagle", "sure", "memflex", "sign_agreement")
COMPARING = ("wagle", "memflex", "sign_agreement")  # need a retain set
# What the published code takes. WAGLE's configurations have ratios from 0.4 to 0.95; MemFlex' threshold is for LoRA.
RULES = {
    "wagle": {"ratio": 0.8},
    "sure": {"ratio": 0.1},
    "memflex": {"threshold": 6e-4},
    "sign_agreement": {"threshold": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Scores of single weights, by parameter name ("model.layers.3.mlp.up_proj.weight").

    scores: fp32 (fp64 for fp64 models), each broadcasting to its parameter's shape: of that shape, or with ones where a
    whole row (sure) or matrix (memflex) has one score. shapes: of the parameters. On the model's device.
    """

    method: str
    scores: dict[str, torch.Tensor]
    shapes: dict[str, torch.Size]

    def mask(self, *, ratio: float | None = None, threshold: float | None = None) -> dict[str, torch.Tensor]:
        """bool tensors of the parameters' shapes, True where a weight may change (`reinserted(mask=...)` takes them).

        ratio: the round(ratio * n) highest of all n scores together, those of a row counted once (`top_ratio`).
        threshold: scores above it. Without either, the method's published rule; grad and fisher have none.
        """
        if ratio is not None and threshold is not None:
            raise ValueError(f"ratio={ratio} and threshold={threshold}: give one of them")
        if ratio is None and threshold is None:
            if self.method not in RULES:
                raise ValueError(f"{self.method} has no rule of its own: give ratio=... or threshold=...")
            rule = RULES[self.method]
            ratio, threshold = rule.get("ratio"), rule.get("threshold")
        if ratio is not None:
            chosen = top_ratio(self.scores, ratio)
        else:
            chosen = {name: scores > threshold for name, scores in self.scores.items()}
        return {name: mask.expand(self.shapes[name]).contiguous() for name, mask in chosen.items()}


@dataclasses.dataclass(frozen=True)
class AttributionSettings(PassSettings):
    """mu: WAGLE's, an estimate of the retain loss' curvature. Its code sums gradients over batches where this takes
    means, so its mu (1e-6 in the published configurations) over n batches is mu / n here. max_cosine: MemFlex'."""

    mu: float = 1e-6
    max_cosine: float = 0.92

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ValueError(f"mu={self.mu}: expected above 0")


@named_by(AttributionSettings)
def attribute(
    model: nn.Module | Decoder,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    method: str = "wagle",
    modules: str = "mlp",
    *,
    blocks: Sequence[range] | None = None,
    **settings: Any,
) -> Attribution:
    """Scores of the weights by `method`, of METHODS; the module's docstring has formulas and sources.

        masks = kf.attribute(model, forget, retain, "wagle", blocks=[range(2, 4)]).mask(ratio=0.8)
        with kf.reinserted(model, unlearned, range(2, 4), lr=2e-7, mask=masks) as training: ...

    forget, retain: samples as `knowledge_density` takes them; wagle, memflex and sign_agreement need retain, fisher
    can have it, grad and sure take none. modules: as there (WAGLE is published for `all`). blocks: only the weights of
    these layers; those below them run without gradients. settings: the fields of `AttributionSettings` and
    `PassSettings`.

    Equivalent: `mean over s of loss(model, s)`, backward, and the formula on each parameter's `.grad`.

    Memory: one fp32 gradient of the chosen weights for forget, in whose place the scores come, and one for retain where
    that does not fit one batch of `batch_tokens`. Leaves no gradient, hook or changed flag behind.
    Errors: as `knowledge_density`, and ValueError for a retain set that is missing or has no use.
    """
    for name, value, known in (("method", method, METHODS), ("modules", modules, MODULES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if retain is None and method in COMPARING:
        raise ValueError(f"method={method!r} compares with a retain set: give retain=samples to keep")
    if retain is not None and method in ("grad", "sure"):
        raise ValueError(f"method={method!r} takes no retain set: leave it out")
    how = taken(AttributionSettings, settings, "attribute")
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    forget = checked_samples(decoder, forget, "forget sample")
    retain = None if retain is None else checked_samples(decoder, retain, "retain sample")
    watched, stored = watch_list(decoder, modules), decoder.weights
    if blocks is not None:
        layers = {layer for block in blocks for layer in check_block(block, decoder.num_layers)}
        watched = [item for item in watched if item.layer in layers]
        if not watched:
            raise ValueError(f"blocks={list(blocks)}: these layers have no parameters of modules={modules!r}")
    weights = {f"{item.path}.{name}": _Weight(item, name, stored) for item in watched for name in item.parameters}
    found: dict[str, torch.Tensor] = {}  # g_f (or its square), then the scores
    left = set(weights)  # without scores

    def mean(path: str, gradient: torch.Tensor, count: int) -> torch.Tensor:
        check_values(decoder, {path: float(torch.linalg.vector_norm(gradient, torch.inf))})
        return weights[path].in_shape(gradient.div_(count))

    def on_forget(path: str, gradient: torch.Tensor) -> None:
        found[path] = mean(path, gradient, len(forget))
        if retain is None:
            found[path] = weights[path].score(method, found[path], None, how)

    def on_retain(path: str, gradient: torch.Tensor) -> None:
        found[path] = weights[path].score(method, found[path], mean(path, gradient, len(retain)), how)
        left.discard(path)

    measurement = Measurement(decoder, watched, How("grad_l2sq", how.impl), how)
    with measurement.ready(len(forget) + len(retain or ()), "attribution"):
        measurement.gradients(forget, on_forget, squared=method == "fisher")
        for path in weights.keys() - found.keys():  # not reached by the forget set
            on_forget(path, weights[path].zeros())
        if retain is not None:
            measurement.gradients(retain, on_retain, squared=method == "fisher")
            for path in sorted(left):
                on_retain(path, weights[path].zeros())
    scores = {path: found.pop(path) for path in weights}  # in the model's order
    return Attribution(method, scores, {path: weight.parameter.shape for path, weight in weights.items()})


class _Weight:
    """A parameter and the meaning of its dimensions."""

    def __init__(self, item: Watched, name: str, stored: Weights):
        self.parameter = getattr(item.module, name).detach()  # of a streamed model a placeholder
        self._value = functools.partial(stored.__getitem__, f"{item.path}.{name}")
        self._transposed = isinstance(item.module, compat.Conv1D) or getattr(item.module, "is_transposed", False)
        is_matrix = self.parameter.dim() > 1 and not name.endswith("bias")
        self._inputs = (-2 if self._transposed else -1) if is_matrix else None  # the dimension that is summed over
        self._number = item.experts or 1

    def in_shape(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient of `Measurement.gradients` in the parameter's shape."""
        if self._transposed and gradient.dim() == 3:
            gradient = gradient.mT
        return gradient.reshape(self.parameter.shape).contiguous()

    def zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.parameter, dtype=torch.promote_types(self.parameter.dtype, torch.float32))

    def score(
        self, method: str, forget: torch.Tensor, retain: torch.Tensor | None, how: AttributionSettings
    ) -> torch.Tensor:
        """The module docstring's formulas. forget, retain: mean gradients (fisher: mean squares), written over."""
        if method == "grad":
            return forget.abs_()
        if method == "fisher":
            return forget if retain is None else torch.where(forget == 0, 0.0, forget.div_(retain))
        if method == "wagle":
            value = self._value().to(retain.device)
            return retain.div_(-how.mu).add_(value).mul_(forget).abs_()
        if method == "sure" and self._inputs is None:
            return forget.abs_()
        if method == "sure":
            return torch.linalg.vector_norm(forget, dim=self._inputs, keepdim=True)
        if method == "memflex":
            a, b = forget.reshape(self._number, -1), retain.reshape(self._number, -1)
            norms = (inner_product(a, a) * inner_product(b, b)).sqrt()
            cosine = torch.where(norms > 0, inner_product(a, b) / norms, 0.0)
            size = torch.where(cosine < how.max_cosine, norm_of(a, "grad_l1") / a.shape[1], 0.0)
            return size.to(forget.dtype).reshape(-1, *[1] * (forget.dim() - 1))
        return forget.sign_().mul_(retain.sign_()).neg_().add_(0.0)  # the last for -0.0


@torch.no_grad()
def top_ratio(scores: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
    """bool tensors of the scores' shapes: True for the round(ratio * n) highest of all n scores together.

    Of equal scores at the limit those of earlier tensors, and then of lower (row-major) index, come first, so that the
    same scores give the same mask everywhere. Nothing is sorted or joined: a bisection over the values' bit patterns
    counts each tensor about 32 times. ValueError for a ratio outside 0 to 1, a NaN or a negative score.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio}: expected 0 to 1, the part of the scores that is chosen")
    dtypes = {tensor.dtype for tensor in scores.values()}
    if dtypes != {torch.float32} and dtypes != {torch.float64}:
        raise TypeError(
            f"scores of {', '.join(map(str, dtypes)) or 'no tensors'}: expected float32, or float64, in all"
        )
    for name, tensor in scores.items():
        if not bool((tensor >= 0).all()):
            raise ValueError(f"{name}: a score is NaN or below 0; what goes by the sign has a threshold, not a ratio")
    wanted = round(ratio * sum(tensor.numel() for tensor in scores.values()))
    if wanted == 0:
        return {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in scores.items()}
    dtype = dtypes.pop()
    bits = torch.int32 if dtype == torch.float32 else torch.int64  # the order of floats that are not negative

    def value(pattern: int) -> float:
        return torch.tensor(pattern, dtype=bits).view(dtype).item()

    low, high = 0, torch.tensor(math.inf, dtype=dtype).view(bits).item()
    while low < high:  # the largest value that at least `wanted` scores reach
        middle = (low + high + 1) // 2
        number = sum((tensor >= value(middle)).sum() for tensor in scores.values())
        low, high = (middle, high) if int(number) >= wanted else (low, middle - 1)
    limit = value(low)
    left = wanted - int(sum((tensor > limit).sum() for tensor in scores.values()))
    out = {}
    for name, tensor in scores.items():
        equal = (tensor == limit).contiguous()
        number = int(equal.sum())
        if number > left:
            equal &= (equal.flatten().cumsum(0) <= left).view(equal.shape)
        left -= min(number, left)
        out[name] = equal.logical_or_(tensor > limit)
    return out
