"""Kinds of layers: from a layer's input and the gradient of its output to statistics of its weights' gradients.

Index letters: B segments (samples), R rows, N out features, K in features, E experts (1 for a plain layer),
M tiles of output rows that a matrix has, m those that are sampled.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from kunbr_fast.density.experts import is_experts, out_features
from kunbr_fast.density.taps import Part
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.model import compat

TILE = 16  # output rows of a weight that are sampled together


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The sampled output rows of a matrix (of each expert's matrix), in tiles of 16; the last one may be shorter."""

    count: int  # M
    rows: torch.Tensor  # (E, m, 16) int64; where a tile is shorter its places repeat the last row
    inside: torch.Tensor  # (E, m, 16) bool, False at those places

    @classmethod
    def choose(
        cls, out_features: int, experts: int, fraction: float, generator: torch.Generator, device: torch.device
    ) -> Tiles:
        """round(fraction * M) tiles without replacement, 2 at least (1 where M is 1)."""
        count = -(-out_features // TILE)
        number = min(count, max(2, round(fraction * count)))
        chosen = torch.stack([torch.randperm(count, generator=generator)[:number].sort()[0] for _ in range(experts)])
        rows = (chosen[:, :, None] * TILE + torch.arange(TILE)).to(device)
        return cls(count, rows.clamp(max=out_features - 1), rows < out_features)

    @property
    def scale(self) -> float:
        return self.count / self.rows.shape[1]

    def take(self, part: Part) -> torch.Tensor:
        """The sampled columns of the part's dy: (R, m * 16), in each row those of the row's own expert."""
        if len(self.rows) == 1:
            return part.dy.index_select(1, self.rows.flatten())
        lengths = part.segments.cu_seqlens.diff().view(len(self.rows), -1).sum(1)
        return part.dy.gather(1, self.rows.flatten(1).repeat_interleave(lengths, 0, output_size=len(part.dy)))

    def totals(self, by_row: torch.Tensor) -> torch.Tensor:
        """(E, B, m * 16), a statistic of each sampled row, to (E, m, B), that of each tile."""
        by_row = by_row.unflatten(2, self.rows.shape[1:])
        return torch.where(self.inside[:, None], by_row, 0.0).sum(3).transpose(1, 2)

    def variance(self, totals: torch.Tensor) -> torch.Tensor:
        """(E, m) totals -> (E,), the variance of scale * totals.sum(1): sampling without replacement, M of m tiles."""
        number = totals.shape[1]
        if number == self.count:
            return torch.zeros(len(totals), dtype=torch.float64)
        return totals.var(1) * (self.count**2 * (1 - number / self.count) / number)


@dataclasses.dataclass(frozen=True)
class How:
    """statistic: one that the kernels know (grad_l1, grad_l2sq, grad_linf); tiles: by weight path, if sampled."""

    statistic: str
    impl: str = "auto"
    tiles: Mapping[str, Tiles] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """values(parts, how): for each part {parameter: (E, B) float64}, each sample's statistic of its gradient, or
    (E, m, B), each sampled tile's; the parts share x. gradient(part, how): {parameter: (E, ...)}, the gradient summed
    over all rows (its layout does not matter; sampled rows (E, m * 16, K)). out_features(module): {weight: N} for the
    weights that can be sampled. shares_input: parts with the same input are measured in one call.
    """

    matches: Callable[[nn.Module], bool]
    values: Callable[[list[Part], How], list[dict[str, torch.Tensor]]]
    gradient: Callable[[Part, How], dict[str, torch.Tensor]]
    out_features: Callable[[nn.Module], dict[str, int]] = lambda module: {}
    shares_input: bool = False


@dataclasses.dataclass(frozen=True)
class Watched:
    """A module, and those of its own parameters that count."""

    module: nn.Module
    kind: LayerKind
    path: str
    layer: int
    parameters: tuple[str, ...]
    experts: int | None = None

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """{each parameter's path: the names of its matrices}: "path.weight", or for experts "path.weight[0]", ..."""
        paths = [f"{self.path}.{parameter}" for parameter in self.parameters]
        return {p: [p] if self.experts is None else [f"{p}[{e}]" for e in range(self.experts)] for p in paths}


def norm_of(x: torch.Tensor, statistic: str) -> torch.Tensor:
    """(..., n) -> (...) float64: the statistic over the last dimension. A sum has no temporary as large as x."""
    out = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    for part in x.split(1 << 16, -1):
        if statistic == "grad_l1":
            out += part.abs().sum(-1, dtype=torch.float64)
        elif statistic == "grad_l2sq":
            out += part.double().square().sum(-1)
        else:
            out = torch.maximum(out, part.abs().amax(-1).double())
    return out


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------- matrix products: plain layers and experts


def _product_values(parts: list[Part], how: How) -> list[dict[str, torch.Tensor]]:
    segments = parts[0].segments
    tiles = [how.tiles.get(f"{part.item.path}.{part.names[0]}") for part in parts]
    found = operators.grad_density(
        parts[0].x,
        [part.dy if tile is None else tile.take(part) for part, tile in zip(parts, tiles)],
        segments.cu_seqlens,
        max_seqlen=segments.longest,
        statistic=how.statistic,
        along="row" if how.tiles else None,
        impl=how.impl,
    )
    out = []
    for part, tile, values in zip(parts, tiles, found):
        weight, bias = part.names
        by_expert = values.unflatten(0, (part.item.experts or 1, -1))
        of = {weight: by_expert if tile is None else tile.totals(by_expert)}
        if bias in part.item.parameters:
            sums = torch.stack([rows.sum(0, dtype=_wide(rows)) for rows in part.dy.split(segments.lengths)])
            of[bias] = norm_of(sums, how.statistic).unflatten(0, (part.item.experts or 1, -1))
        out.append(of)
    return out


def _product_gradient(part: Part, how: How) -> dict[str, torch.Tensor]:
    weight, bias = part.names
    tile = how.tiles.get(f"{part.item.path}.{weight}")
    lengths, wide = part.segments.lengths, _wide(part.x)  # one segment for each expert
    dy = part.dy if tile is None else tile.take(part)
    pairs = zip(dy.split(lengths), part.x.split(lengths))
    out = {weight: torch.stack([a.t().to(wide) @ b.to(wide) for a, b in pairs])}
    if bias in part.item.parameters:
        out[bias] = torch.stack([rows.sum(0, dtype=wide) for rows in part.dy.split(lengths)])
    return out


# ---------------------------------------------------------------- small modules: norms and routers


class _Unhooked(nn.Module):
    """A module without its hooks: those have had their say when it ran."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.module.forward(x)


def _small_gradient(part: Part, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """By autograd through the module alone, on some of its rows: for modules with little to compute."""
    module = part.item.module
    names, parameters = zip(*module.named_parameters(recurse=False))
    with torch.enable_grad():
        copies = {name: p.detach().requires_grad_() for name, p in zip(names, parameters)}
        inside = {f"module.{name}": copy for name, copy in copies.items()}
        outputs = torch.func.functional_call(_Unhooked(module), inside, (part.x[rows],))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(outputs[place], dy) for place, dy in zip(part.places, part.dys) if dy is not None]
        pairs = [(y, dy[rows].reshape(y.shape)) for y, dy in pairs if y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            list(copies.values()),
            [dy for _, dy in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return {name: grad.flatten()[None] for name, grad in zip(names, grads)}


def _small_values(parts: list[Part], how: How) -> list[dict[str, torch.Tensor]]:
    out = []
    for part in parts:
        ends = itertools.accumulate(part.segments.lengths, initial=0)
        grads = [_small_gradient(part, slice(a, b)) for a, b in itertools.pairwise(ends)]
        out.append({name: torch.stack([norm_of(g[name], how.statistic) for g in grads], 1) for name in grads[0]})
    return out


def _is_product(linear: nn.Module) -> bool:
    """Whether a linear layer of a class of its own (Falcon's), or with a forward put into it (Accelerate's, or one that
    adds something), has the gradients of its product, on two rows."""
    own = dict(linear.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or weight.dim() != 2 or own.keys() - {"weight", "bias"}:
        return False
    sizes = weight.shape if isinstance(linear, compat.Conv1D) else reversed(weight.shape)
    x, dy = (torch.linspace(-0.5, 1, 2 * n, dtype=weight.dtype, device=weight.device).view(1, 2, n) for n in sizes)
    expected = {"weight": (x.mT @ dy if isinstance(linear, compat.Conv1D) else dy.mT @ x)[0], "bias": dy[0].sum(0)}
    with torch.enable_grad():
        copies = {name: p.detach().requires_grad_() for name, p in own.items()}
        inside = {f"module.{name}": copy for name, copy in copies.items()}
        try:
            y = torch.func.functional_call(_Unhooked(linear), inside, (x,))
            if not isinstance(y, torch.Tensor):  # a router
                return False
            grads = torch.autograd.grad(y, list(copies.values()), dy, allow_unused=True)
        except (RuntimeError, TypeError, ValueError):  # it takes something else
            return False
    limit = 0.01 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return all(
        grad is not None and bool((grad - expected[name]).norm() <= limit * expected[name].norm())
        for name, grad in zip(copies, grads)
    )


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    by_head = hasattr(module, "num_heads")  # xLSTM's: it takes the heads apart, and not rows
    return type(module).__name__.endswith("Norm") and not by_head and bool(own) and all(p.dim() == 1 for p in own)


def _is_router(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "Router" in type(module).__name__ and weight is not None and weight.dim() == 2


def _is_linear(module: nn.Module) -> bool:
    plain = type(module) in (nn.Linear, compat.Conv1D) and "forward" not in module.__dict__
    return plain or (isinstance(module, (nn.Linear, compat.Conv1D)) and _is_product(module))


def _autograd_gradient(part: Part, how: How) -> dict[str, torch.Tensor]:
    return {part.names[0]: part.dy.reshape(part.item.experts or 1, -1)}


def _autograd_values(parts: list[Part], how: How) -> list[dict[str, torch.Tensor]]:
    return [{n: norm_of(g, how.statistic)[:, None] for n, g in _autograd_gradient(p, how).items()} for p in parts]


LAYER_KINDS: dict[str, LayerKind] = {
    "linear": LayerKind(
        _is_linear,
        _product_values,
        _product_gradient,
        lambda m: {"weight": m.weight.shape[1 if isinstance(m, compat.Conv1D) else 0]},
        shares_input=True,
    ),
    "norm": LayerKind(_is_norm, _small_values, lambda part, how: _small_gradient(part)),
    "router": LayerKind(_is_router, _small_values, lambda part, how: _small_gradient(part)),
    "experts": LayerKind(is_experts, _product_values, _product_gradient, out_features),
}

# All else: autograd makes each parameter's gradient, which stands in its part's `dys`. A batch has one sample then.
BY_AUTOGRAD = LayerKind(lambda module: True, _autograd_values, _autograd_gradient)
