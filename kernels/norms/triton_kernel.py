"""RMSNorm and LayerNorm with the residual add before them, forward and backward: one read and one write of each row.

    h = x + residual                          (rounded to h's dtype; x itself without a residual)
    mean = sum_d h / D (LayerNorm, CENTER)    rstd = rsqrt(sum_d (h - mean)^2 / D + eps)
    x_hat = (h - mean) * rstd                 y = x_hat * (offset + weight) + bias

    g = dy * (offset + weight)                dx = dh + rstd * (g - mean_d(g) - x_hat * mean_d(g * x_hat))
    dw[d] = sum over rows of dy * x_hat       db[d] = sum over rows of dy

with mean = 0, no mean_d(g) and no bias in RMSNorm; dh is the gradient that reaches h by itself, None without one.

Index letters: R rows (all leading dimensions), D width. Never in memory: x_hat, g, and without COMPUTE_DW any sum over
rows. A program holds BR whole rows in registers, so x is read once for the statistics and the result.

Bytes, for R*D elements of E bytes: forward 2*E (read x, write y; with a residual also read it and write h: 4*E);
backward 3*E (read dy and h, write dx; with dh 4*E). With dw also 4*D for each program, written and read once: 4.3 MB on
132 multiprocessors from D=1024 on. About 10 FLOPs an element: the memory is what limits it on any GPU.
Precision: everything in fp32 between the loads and the stores; the roundings of the unfused modules are those of h, of
LLAMA's x_hat (to h's dtype, before the weight), and of y. A program's dw is fp32, and so is the sum over programs.
Deterministic: each program writes its own partial dw; a second pass adds them in a fixed order.
Addresses: up to three leading dimensions, each with its own stride, so that a head's slice or a transposed view is
read and written where it lies.
Source: Zhang and Sennrich, arXiv 1910.07467; Ba et al., arXiv 1607.06450.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .. import tiles as config
from ..launch import Call
from ..rounding import narrow
from ..tiles import cdiv
from .reference import empty_as

MAX_LEADING = 3  # leading dimensions of any strides

# ---------------------------------------------------------------- the kernels


@triton.jit
def _starts(rows, n1, n2, stride_0, stride_1, stride_2):
    """(BR, 1) int64: where each row begins, rows counted through (n0, n1, n2)."""
    offsets = (rows // (n1 * n2)).to(tl.int64) * stride_0
    offsets += (rows // n2 % n1).to(tl.int64) * stride_1 + (rows % n2).to(tl.int64) * stride_2
    return offsets[:, None]


@triton.jit
def norm_forward_kernel(x, residual, weight, bias, h, y, mean, rstd, num_rows, n1, n2, D, eps, offset,
                        stride_x0, stride_x1, stride_x2, stride_r0, stride_r1, stride_r2,
                        stride_y0, stride_y1, stride_y2,
                        RESIDUAL: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr, LLAMA: tl.constexpr,
                        BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One program: BR rows. Without RESIDUAL h is x, and is not written. y and h lie alike; mean, rstd (R,)."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BD)[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)
    starts = _starts(rows, n1, n2, stride_x0, stride_x1, stride_x2)
    a = tl.load(x + starts + cols, mask=inside, other=0.0).to(tl.float32)
    out = _starts(rows, n1, n2, stride_y0, stride_y1, stride_y2)
    if RESIDUAL:
        starts = _starts(rows, n1, n2, stride_r0, stride_r1, stride_r2)
        a += tl.load(residual + starts + cols, mask=inside, other=0.0).to(tl.float32)
        added = narrow(a, h.dtype.element_ty)
        tl.store(h + out + cols, added, mask=inside)
        a = added.to(tl.float32)
    if CENTER:
        center = tl.sum(a, 1) / D
        tl.store(mean + rows, center, mask=rows < num_rows)
        a = tl.where(inside, a - center[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)
    tl.store(rstd + rows, scale, mask=rows < num_rows)
    a = a * scale[:, None]
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32) + offset
    if LLAMA:
        a = narrow(a, h.dtype.element_ty).to(tl.float32)
        w = narrow(w, weight.dtype.element_ty).to(tl.float32)
    a = a * w
    if BIAS:
        a += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y + out + cols, narrow(a, y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(dy, dh, h, weight, mean, rstd, dx, dw, db, num_rows, n1, n2, D, blocks, offset,
                         stride_y0, stride_y1, stride_y2, stride_g0, stride_g1, stride_g2,
                         stride_h0, stride_h1, stride_h2, stride_x0, stride_x1, stride_x2,
                         DH: tl.constexpr, CENTER: tl.constexpr,
                         COMPUTE_DX: tl.constexpr, COMPUTE_DW: tl.constexpr, COMPUTE_DB: tl.constexpr,
                         BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One program: `blocks` blocks of BR rows, one after the other. dw, db (programs, D): this program's own sums."""
    cols = tl.arange(0, BD)[None, :]
    if COMPUTE_DX:
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32) + offset
    if COMPUTE_DW:
        dw_sum = tl.zeros((BR, BD), tl.float32)
    if COMPUTE_DB:
        db_sum = tl.zeros((BR, BD), tl.float32)
    first = tl.program_id(0) * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(num_rows, BR))):
        rows = block * BR + tl.arange(0, BR)
        inside = (rows < num_rows)[:, None] & (cols < D)
        starts = _starts(rows, n1, n2, stride_y0, stride_y1, stride_y2)
        g = tl.load(dy + starts + cols, mask=inside, other=0.0).to(tl.float32)
        if COMPUTE_DB:
            db_sum += g
        if COMPUTE_DX or COMPUTE_DW:
            starts = _starts(rows, n1, n2, stride_h0, stride_h1, stride_h2)
            x_hat = tl.load(h + starts + cols, mask=inside, other=0.0).to(tl.float32)
            if CENTER:
                x_hat -= tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None]
            scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
            x_hat *= scale
        if COMPUTE_DW:
            dw_sum += g * x_hat
        if COMPUTE_DX:
            g *= w  # zero beyond D, where dy is
            d = g - x_hat * (tl.sum(g * x_hat, 1) / D)[:, None]
            if CENTER:
                d -= (tl.sum(g, 1) / D)[:, None]
            d *= scale
            if DH:
                starts = _starts(rows, n1, n2, stride_g0, stride_g1, stride_g2)
                d += tl.load(dh + starts + cols, mask=inside, other=0.0).to(tl.float32)
            starts = _starts(rows, n1, n2, stride_x0, stride_x1, stride_x2)
            tl.store(dx + starts + cols, narrow(d, dx.dtype.element_ty), mask=inside)
    place = tl.program_id(0).to(tl.int64) * D + tl.arange(0, BD)
    if COMPUTE_DW:
        tl.store(dw + place, tl.sum(dw_sum, 0), mask=tl.arange(0, BD) < D)
    if COMPUTE_DB:
        tl.store(db + place, tl.sum(db_sum, 0), mask=tl.arange(0, BD) < D)


# ---------------------------------------------------------------- launchers


def _layout(**tensors: torch.Tensor) -> tuple[int, dict[str, int]]:
    """(R, the kernel's sizes and strides) of tensors of one shape; dimensions that all of them can merge are merged."""
    shape = next(iter(tensors.values())).shape
    return _layout_of(shape, tuple(tensors), tuple([t.stride() for t in tensors.values()]))


@functools.lru_cache(1024)  # a model has few shapes, and a launch should cost little
def _layout_of(
    shape: torch.Size, names: tuple[str, ...], of_each: tuple[tuple[int, ...], ...]
) -> tuple[int, dict[str, int]]:
    dims: list[tuple[int, list[int]]] = []  # size, each tensor's stride
    for d, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        strides = [stride[d] for stride in of_each]
        if dims and dims[-1][1] == [size * stride for stride in strides]:
            dims[-1] = dims[-1][0] * size, strides
        else:
            dims.append((size, strides))
    if len(dims) > MAX_LEADING:
        raise ValueError(f"shape {tuple(shape)}: at most {MAX_LEADING} leading dimensions of unrelated strides")
    dims = [(1, [0] * len(names))] * (MAX_LEADING - len(dims)) + dims
    found = {f"stride_{name}{d}": dims[d][1][i] for i, name in enumerate(names) for d in range(MAX_LEADING)}
    return shape[:-1].numel(), found | dict(n1=dims[1][0], n2=dims[2][0])


def call_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    llama: bool,
    out_dtype: torch.dtype,
) -> Call:
    """The launch; its arguments h, y, mean and rstd are the results (h is x without a residual, mean unset in RMSNorm).

    Rows of x and residual have stride 1.
    """
    h = x if residual is None else empty_as(x, torch.promote_types(x.dtype, residual.dtype))
    y = empty_as(x, out_dtype)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else rstd
    rows, layout = _layout(x=x, r=x if residual is None else residual, y=y)
    block = config.row_block(x.shape[-1])
    # what is not there is never read: another tensor in its place
    arguments = dict(x=x, residual=x if residual is None else residual, weight=weight)
    arguments |= dict(bias=weight if bias is None else bias, h=h, y=y, mean=mean, rstd=rstd)
    arguments |= dict(num_rows=rows, D=x.shape[-1], eps=eps, offset=offset) | layout
    constexprs = dict(RESIDUAL=residual is not None, BIAS=bias is not None, CENTER=center, LLAMA=llama)
    constexprs |= dict(BR=block.BR, BD=block.BD)
    return Call(norm_forward_kernel, (cdiv(rows, block.BR),), arguments, constexprs, block.num_warps, 1)


def call_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    offset: float,
    compute_dx: bool,
    compute_dw: bool,
    compute_db: bool,
    processors: int,
) -> Call:
    """The launch; its arguments dx, dw and db (programs, D) are the results, where they are asked for.

    Inputs that no requested gradient needs may be None.
    """
    dy = _whole_rows(dy)
    dh = None if dh is None or not compute_dx else _whole_rows(dh)
    D = dy.shape[-1]
    block = config.row_block(D)
    dx = empty_as(h, h.dtype) if compute_dx else dy
    rows, layout = _layout(y=dy, g=dy if dh is None else dh, h=dy if h is None else h, x=dx)
    row_blocks = cdiv(rows, block.BR)
    resident = processors * max(1, config.NORM_SUM_WARPS // block.num_warps)
    programs = min(row_blocks, resident) if compute_dw or compute_db else row_blocks
    blocks = cdiv(row_blocks, max(1, programs))
    programs = cdiv(row_blocks, blocks) if row_blocks else 0
    dw, db = (
        torch.empty((programs, D), dtype=torch.float32, device=dy.device) if asked else dy
        for asked in (compute_dw, compute_db)
    )
    # what is not there is never read: another tensor in its place
    arguments = dict(dy=dy, dh=dy if dh is None else dh, h=dy if h is None else h)
    arguments |= {k: dy if v is None else v for k, v in dict(weight=weight, mean=mean, rstd=rstd).items()}
    arguments |= dict(dx=dx, dw=dw, db=db, num_rows=rows, D=D, blocks=blocks, offset=offset) | layout
    constexprs = dict(DH=dh is not None, CENTER=mean is not None, COMPUTE_DX=compute_dx, COMPUTE_DW=compute_dw)
    constexprs |= dict(COMPUTE_DB=compute_db, BR=block.BR, BD=block.BD)
    return Call(norm_backward_kernel, (programs,), arguments, constexprs, block.num_warps, 1)


def _whole_rows(t: torch.Tensor) -> torch.Tensor:
    """A gradient as it comes: that of a sum is one number with strides of zero."""
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(x, residual, weight, bias, eps, offset, center, llama, out_dtype) -> list[torch.Tensor]:
    """[y, rstd], then mean if `center`, then h if there is a residual: `reference.norm` by the kernel."""
    call = call_forward(x, residual, weight, bias, eps, offset, center, llama, out_dtype)
    call.launch()
    names = ["y", "rstd", *["mean"] * center, *["h"] * (residual is not None)]
    return [call.arguments[name] for name in names]


def backward(
    dy, dh, h, weight, mean, rstd, offset, compute_dx: bool, compute_dw: bool, compute_db: bool
) -> list[torch.Tensor]:
    """Those asked for of dx (h's dtype), dw and db (fp32, (D,)): `reference.norm_backward` by the kernel."""
    processors = config.processors(dy.device)
    call = call_backward(dy, dh, h, weight, mean, rstd, offset, compute_dx, compute_dw, compute_db, processors)
    call.launch()
    sums = (call.arguments[name].sum(0) for name, asked in (("dw", compute_dw), ("db", compute_db)) if asked)
    return [*[call.arguments["dx"]] * compute_dx, *sums]


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, False: no matrix products) for bf16 and fp32, the widths of models, of a head, and an odd one.

    fp16 differs from bf16 in one bit of an instruction.
    """

    def empty(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launches(x, weight, added):
        """name -> launch, `added` for a residual and an own gradient of h."""
        residual, dh = (x, x) if added else (None, None)
        rstd = empty((*x.shape[:-1], 1), torch.float32)
        for name, bias, center in (("llama", None, False), ("gemma", None, False), ("layer", weight, True)):
            dtype = torch.result_type(x, weight) if name == "llama" else x.dtype
            yield f"{name} forward", call_forward(x, residual, weight, bias, 1e-6, 0.0, center, name == "llama", dtype)
        dy = empty(x.shape, torch.result_type(x, weight))
        for name, mean, asked in (("rms", None, ("dx", "dx dw", "dw")), ("layer", rstd, ("dx", "dx dw db", "db"))):
            for what in asked:
                compute = (grad in what.split() for grad in ("dx", "dw", "db"))
                yield f"{name} {what}", call_backward(dy, dh, x, weight, mean, rstd, 0.0, *compute, processors=132)

    widest = empty((4096, config.MAX_NORM_WIDTH))
    most = ("llama forward", "rms dx dw", "layer dx dw db")  # the others do less
    for x, dtype, added, wanted in (
        (empty((4096, 4096)), torch.bfloat16, True, None),
        (empty((4096, 575)), torch.bfloat16, True, most),
        (widest, torch.bfloat16, True, most),
        (widest.float(), torch.float32, True, most),
        (empty((4096, 2048)), torch.float32, True, most),
        (empty((8, 512, 32, 128)).transpose(1, 2), torch.bfloat16, False, (*most, "rms dx")),
    ):
        D = x.shape[-1]
        label = f"{'+residual ' * added}{str(x.dtype)[6:]} weight {str(dtype)[6:]} D={D} {config.row_block(D)}"
        for name, call in launches(x, empty((D,), dtype), added):
            if wanted is None or name in wanted:
                yield f"norm {name} {label}", call, False
