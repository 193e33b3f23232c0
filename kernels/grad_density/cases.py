"""What the proof of gradient density runs: each way through the kernels, and the shapes that are timed.

Sizes are mean tokens of a sample. Results are named by statistic and projection: "grad_l1 0".
"""

from __future__ import annotations

import functools
import itertools

import torch

from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op

HALF = ("bf16", "fp16")
# 1, 32, 64, 128, 129 and 600 tokens and none: each branch of the kernels, by the mean that chooses one
SHORT = (1, 1, 1, 32, 0, 64, 128, 129, 600)
LONG = (600, 1, 0, 129, 513, 64)
BRIEF = (1, 32, 0, 7, 32, 16, 31, 3, 24, 32, 9, 20)
MIDDLE = (64, 33, 0, 64, 17, 1, 63, 48, 34, 64, 5, 40)
ALIGNED, ODD = (392, (136, 24, 8)), (63, (123, 1, 40))  # K, and N of each projection
# As at the size of a model: programs that walk through more tiles than have room at a time, or take a second item, and
# more than one group of tiles along N, of which the last is smaller. Of few tiles a GPU gives each program one.
DEEP, WIDE = (1608, (136, 24, 8)), (648, (1112, 24, 8))
WIDE_ODD, WIDE_FP32 = (647, (1111, 1, 40)), (392, (600, 24, 8))
MODEL = (4096, 14336)  # Llama-3-8B's up
TIMED_TOKENS = 2048


def kinds(operation: str) -> list[Kind]:
    found = []
    for along, suffix in ((None, ""), ("row", " by row")):
        at = functools.partial(_shapes, along)
        triton = functools.partial(_kind, "triton", along)
        cuda = functools.partial(_kind, "cuda", along)
        short = [(SHORT, DEEP), (BRIEF, WIDE), (MIDDLE, WIDE)]
        found += [
            triton("short" + suffix, HALF, short, at((32, 64, 128))),
            triton("long" + suffix, HALF, [(LONG, ALIGNED), (LONG, WIDE)], at((256, 512, 2048))),
            triton("any" + suffix, HALF, [(SHORT, ODD), (BRIEF, WIDE_ODD)], at((32, 128, 512), odd=True)),
            triton("fp32" + suffix, ("fp32",), [(SHORT, ODD), (BRIEF, WIDE_FP32)], at((32, 128, 512))),
            cuda("hopper" + suffix, HALF, [*short, (LONG, WIDE)], at((32, 64, 128, 512, 2048), "hopper")),
            cuda("portable" + suffix, (*HALF, "fp32"), [(SHORT, ODD), (LONG, WIDE)], at((32, 128, 512), "portable")),
        ]  # fmt: skip
    return found


# ---------------------------------------------------------------- cases


def _kind(impl, along, name, dtypes, batches, shapes) -> Kind:
    variant = name.partition(" ")[0]
    cases = [_case(variant, along, "grad_l1", lengths, K, sizes) for lengths, (K, sizes) in batches]
    lengths, (K, sizes) = batches[0]
    cases.append(_case(variant, along, "grad_l1", lengths[:-1], K, sizes[:2], torch.int64))
    cases += [_case(variant, along, name, batches[-1][0], K, sizes[:1]) for name in ("grad_l2sq", "grad_linf")]
    why_not = _not_hopper if variant == "hopper" else lambda device: None
    # it comes after a layer's backward pass: an H100 took 0.5 ms at 32 tokens where a launch from idle took 0.9
    how = dict(graphs=False, host_ahead=True)
    return Kind("grad_density", impl, cases, shapes, name, dtypes, why_not, **how)


def _not_hopper(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return None
    return "needs compute capability 9.0"


def _case(variant, along, statistic, lengths, K, sizes, index=torch.int32) -> Case:
    names = [f"{statistic} {p}" for p in range(len(sizes))]

    def draw(dtype):
        generator = torch.Generator().manual_seed(0)
        x, *dys = (torch.randn(sum(lengths), n, generator=generator).to(dtype) for n in (K, *sizes))
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=index)
        return {"x": x, "cu_seqlens": cu_seqlens, **{f"dy{p}": dy for p, dy in enumerate(dys)}}

    def run(impl, inputs):
        return dict(zip(names, _run(impl, variant, inputs, len(sizes), max(lengths), statistic, along)))

    def floors(inputs, truth):
        dys = [inputs[f"dy{p}"] for p in range(len(sizes))]
        return dict(zip(names, floors_of(inputs["x"], dys, lengths, statistic, along)))

    which = next(i for i, length in enumerate(lengths) if length > 1)
    at = sum(lengths[:which])
    others = [i for i in range(len(lengths)) if i != which]
    stranger = Stranger("x", slice(at, at + lengths[which]), dict.fromkeys(names, others))
    label = f"{statistic}, {'|'.join(map(str, lengths))} tokens, K={K}, N={'|'.join(map(str, sizes))}"
    return Case(label, draw, run, floors, stranger=stranger)


def _run(impl, variant, inputs: Tensors, projections, longest, statistic, along) -> list[torch.Tensor]:
    x, cu_seqlens, dys = inputs["x"], inputs["cu_seqlens"], [inputs[f"dy{p}"] for p in range(projections)]
    if impl == "cuda":
        from . import cuda

        return cuda.grad_density(x, dys, cu_seqlens, statistic, along, variant)
    options = dict(max_seqlen=longest, statistic=statistic, along=along, form="direct")
    return op.grad_density(x, dys, cu_seqlens, impl=impl, **options)


def floors_of(x, dys, lengths, statistic, along) -> list[torch.Tensor]:
    """Rounding of fp32 sums of T terms, then of the sums over a tile. Rounding errors are independent of each other, so
    they grow as the root of the terms' number."""
    found, dims = [], (2,) if along == "row" else (1, 2)
    floor = 2 * EPS * max(lengths) ** 0.5
    for dy in dys:
        parts = list(zip(x.double().split(lengths), dy.double().split(lengths)))
        dw = torch.stack([dy.T @ x for x, dy in parts]).abs()
        size = torch.stack([dy.abs().T @ x.abs() for x, dy in parts])
        terms = {"grad_l1": size, "grad_l2sq": 2 * dw * size, "grad_linf": size}[statistic]
        truth = {"grad_l1": dw, "grad_l2sq": dw.square(), "grad_linf": dw}[statistic]
        join = torch.amax if statistic == "grad_linf" else torch.sum
        found.append(floor * join(terms, dims) + 4 * EPS * join(truth, dims))
    return found


# ---------------------------------------------------------------- what is timed


def _shapes(along, tokens, variant="fastest", odd=False) -> list[Shape]:
    return [_shape(along, T, variant, odd) for T in tokens]


def _shape(along, T, variant, odd) -> Shape:
    samples = TIMED_TOKENS // T

    def draw(device, dtype):
        x, dy = (torch.randn(TIMED_TOKENS, n, device=device).to(dtype) for n in MODEL)
        if odd:
            x, dy = (torch.nn.functional.pad(t, (0, 1))[:, :-1] for t in (x, dy))
        return {"x": x, "dy0": dy, "cu_seqlens": torch.arange(samples + 1, dtype=torch.int32, device=device) * T}

    return Shape(T, draw, lambda impl, inputs: _run(impl, variant, inputs, 1, T, "grad_l1", along))
