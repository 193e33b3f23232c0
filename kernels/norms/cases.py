"""What the proof of RMSNorm and LayerNorm runs. Sizes are elements of x; a call is a forward and its backward."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import torch

from .. import tiles
from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op

NORM_EPS = 1e-5
RMS = {"llama": dict(cast="llama"), "gemma": dict(cast="gemma", offset=1.0), "olmo": dict(cast="gemma")}
TIMED_ROWS, TIMED_WIDTH = (512, 2048, 8192), 4096


def kinds(operation: str) -> list[Kind]:
    names = ("llama", "gemma", "olmo") if operation == "rms_norm" else ("layer", "layer without bias")
    cases = [
        _case(names[0], (2, 5, 63), True),
        _case(names[-1], (2, 5, 63), False),
        _case(names[0], (70, 1024), True, trained=()),  # a cover layer's
        _case(names[1], (3, 2048), False, trained=("x",), scale=1e-3),  # small enough that eps counts
        _case(names[0], (2, 3, 4, 128), False),  # of queries and keys, whose rows do not follow one another
        _one_program(_case(names[0], (5, 8190), False)),
    ]
    shapes = [_shape(names[0], rows) for rows in TIMED_ROWS]
    return [Kind(operation, "triton", cases, shapes)]


def _case(
    kind: str, shape: tuple[int, ...], residual: bool, trained: tuple[str, ...] | None = None, scale: float = 1.0
) -> Case:
    """trained: those of x, residual, weight and bias whose gradient is asked for; None: of all, (): as of x. scale: of
    x."""
    asked = ("x", "residual") if trained == () else trained

    def draw(dtype):
        generator = torch.Generator().manual_seed(0)
        sizes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:], "dy": shape, "dh": shape}
        left_out = set() if residual else {"residual", "dh"}
        left_out |= set() if kind == "layer" else {"bias"}
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        drawn["x"] *= scale
        return {name: t.to(dtype) for name, t in drawn.items() if name not in left_out}

    def run(impl, inputs):
        if len(shape) == 4:  # (B, T, H, D) seen as (B, H, T, D), as a model does
            inputs = inputs | {"x": inputs["x"].transpose(1, 2), "dy": inputs["dy"].transpose(1, 2)}
        return _results(kind, impl, inputs, asked)

    kept = {name: slice(1, None) for name in ("y", "h", "dx", "dresidual")}
    names = {"y"} | ({"h"} if residual else set())
    names |= {f"d{name}" for name in ("x", *["residual"] * residual) if asked is None or name in asked}
    stranger = Stranger("x", 0, {name: index for name, index in kept.items() if name in names})
    with_residual = ", residual" * residual
    of = "" if asked is None else f", gradients of {' and '.join(asked)}"
    return Case(f"{kind}, {'x'.join(map(str, shape))}{with_residual}{of}", draw, run,
                lambda inputs, truth: floors(kind, inputs, truth, len(shape) == 4), stranger=stranger)  # fmt: skip


def _one_program(case: Case) -> Case:
    """On a multiprocessor alone, so that one program sums over all rows, as with more rows than a GPU has programs."""

    def run(impl, inputs):
        with mock.patch.object(tiles, "processors", lambda device: 1):
            return case.run(impl, inputs)

    return dataclasses.replace(case, name=f"{case.name}, one program", run=run)


def _results(kind: str, impl: str, inputs: Tensors, asked) -> Tensors:
    given = {name: t.detach() for name, t in inputs.items() if name not in ("dy", "dh")}
    for name, t in given.items():
        given[name] = t.requires_grad_(asked is None or name in asked)
    x, weight, residual, bias = given["x"], given["weight"], given.get("residual"), given.get("bias")
    if kind in RMS:
        out = op.rms_norm(x, weight, NORM_EPS, residual=residual, impl=impl, **RMS[kind])
    else:
        out = op.layer_norm(x, weight, bias, NORM_EPS, residual=residual, impl=impl)
    out = dict(zip(("y", "h"), out if residual is not None else (out,)))
    wanted = {name: t for name, t in given.items() if t.requires_grad}
    grads = [inputs[f"d{name}"] for name in out]
    found = torch.autograd.grad(list(out.values()), list(wanted.values()), grads)
    return out | dict(zip((f"d{name}" for name in wanted), found))


def magnitudes(kind: str, inputs: Tensors) -> Tensors:
    """For each result the size of what is added up in it, in fp64: what a relative rounding error is relative to."""
    given = {name: t.detach().double() for name, t in inputs.items()}
    x, w = given["x"], given["weight"]
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    h = x + given.get("residual", 0.0)
    center = h.mean(-1, keepdim=True) if kind.startswith("layer") else zero
    rstd = ((h - center).pow(2).mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    x_hat, w = (h.abs() + center.abs()) * rstd, w.abs() + (kind == "gemma")
    dy, dh = given["dy"].abs(), given["dh"].abs() if "residual" in given else zero
    g = dy * w
    dx = dh + rstd * (
        g + x_hat * (g * x_hat).mean(-1, keepdim=True) + (g.mean(-1, keepdim=True) if center.dim() else 0)
    )
    rows = tuple(range(x.dim() - 1))
    found = dict(y=x_hat * w + given.get("bias", zero).abs(), h=h.abs(), dx=dx, dresidual=dx)
    return found | dict(dweight=(dy * x_hat).sum(rows), dbias=dy.sum(rows))


def floors(kind: str, inputs: Tensors, truth: Tensors, transposed: bool = False) -> Tensors:
    """Each result goes through up to four roundings to its dtype (h; x_hat, twice in a product; itself), half an eps
    each, and through sums in fp32, of D terms in a row and of R over rows, whose roundings are independent and grow as
    the root of their number."""
    if transposed:
        inputs = inputs | {name: inputs[name].transpose(1, 2) for name in ("x", "dy")}
    x = inputs["x"]
    floor = 2 * torch.finfo(x.dtype).eps + 2 * EPS * math.sqrt(x.shape[-1] + x.shape[:-1].numel())
    smallest = torch.finfo(x.dtype).smallest_normal  # what is below it has fewer bits
    sizes = magnitudes(kind, inputs)
    return {name: floor * sizes[name] + smallest for name in truth}


def _shape(kind: str, rows: int) -> Shape:
    def draw(device, dtype):
        sizes = {"x": (rows, TIMED_WIDTH), "weight": (TIMED_WIDTH,), "dy": (rows, TIMED_WIDTH)}
        sizes |= {"bias": (TIMED_WIDTH,)} if kind == "layer" else {}
        return {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}

    return Shape(rows * TIMED_WIDTH, draw, lambda impl, inputs: _results(kind, impl, inputs, ("x",)))
