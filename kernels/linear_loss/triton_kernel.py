"""The language-model head and a weighted negative log-likelihood in one pass over chunks of labelled rows.

    z[r, v]  = softcap * tanh(scale * (hidden @ weight.T + bias)[r, v] / softcap)       (no softcap: scale * ...)
    nll[r]   = log(sum over v of exp(z[r, v])) - z[r, target[r]]
    loss     = sum over r of w[r] * min(nll[r], cap[r])
    d loss / d logits[r, v] = slope[r] * scale * (1 - (z / softcap)^2) * (exp(z - lse[r]) - [v == target[r]])
    slope[r] = w[r] * [nll[r] < cap[r]];   lse[r] = log(sum over v of exp(z[r, v]))

Index letters: R labelled rows, D hidden size, V vocabulary.
Never in memory: an (R, V) tensor. cuBLAS computes a chunk's logits; the kernel reads them twice and writes their
gradient over them; cuBLAS turns that into d_hidden (and d_weight, d_bias). One buffer serves all chunks. The host reads
nothing back.

FLOPs: 2*R*D*V for the logits and as many for each of d_hidden and d_weight. Bytes, beyond the products' own: three
times R*V elements (two reads and a write; one read without gradients). At R=1024, V=128256, D=4096 in bf16 the two
products are 2.2 TFLOP, 2.7 ms at 790 TFLOP/s, and 0.8 GB take 0.2 ms at 4.3 TB/s.
Precision: logits and their gradient have hidden's dtype, as with `nn.Linear`; products are summed in fp32; all between
is fp32. Rows' terms are added in float64, d_weight over several chunks and d_bias in fp32.
Deterministic: a row belongs to one program, and rows are added in a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..launch import Call
from ..rounding import narrow
from ..tiles import cdiv, next_power_of_2

# Bytes of one chunk's logits, however large V is. At V=128256 in bf16: 1046 rows, so each pass over the weights (D*V
# elements) does 1046 FLOPs a byte, where the GPU needs 184 to be bound by arithmetic (H200: 790 TFLOP/s, 4.3 TB/s).
CHUNK_BYTES = 256 << 20
# Bytes of a row that a program holds at a time: two 16-byte accesses for each of 512 threads. Few programs with many
# threads, so that part of the rows at work (two on a multiprocessor, 68 MB at V=128256; an H200's L2 cache holds 50) is
# still in L2 for the second read. Half of that with a softcap, or tanh needs more than 64 registers a thread.
BLOCK_BYTES = 16 << 10
NUM_WARPS = 16
# Rows of a chunk, if there are several chunks: whole tiles of the matrix product.
TILE_ROWS = 128
# Rows of the buffer begin at multiples of this many elements, whatever V is, for 16-byte accesses.
PAD = 64

# ---------------------------------------------------------------- inside a program


@triton.jit
def _tanh(x):
    """fp32 tanh within a few units in the last place: the series where 1 - exp(-2|x|) would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = size * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    y = tl.where(size < 0.25, series, large)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _logits(x, scale, softcap, SOFTCAP: tl.constexpr):
    """(z, z / softcap) of raw logits x, where `scale` is the head's over softcap; without a softcap both are z."""
    z = x.to(tl.float32) * scale
    t = z
    if SOFTCAP:
        t = _tanh(z)
        z = t * softcap
    return z, t


@triton.jit
def _tile(logits, start, V, padded, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(columns, z, z / softcap) of BLOCK columns of a row. MASKED: they reach beyond V, and z is -inf there."""
    cols = start + tl.arange(0, BLOCK)
    if MASKED:
        z, t = _logits(tl.load(logits + cols, mask=cols < padded, other=0.0), scale, softcap, SOFTCAP)
        z = tl.where(cols < V, z, float("-inf"))
        t = tl.where(cols < V, t, 0.0)  # the gradient behind a row becomes 0: some products on a CPU read it
    else:
        z, t = _logits(tl.load(logits + cols), scale, softcap, SOFTCAP)
    return cols, z, t


@triton.jit
def _add(z, highest, total):
    """A tile's z into a running maximum and, for each place of the tile, a sum of exp(z - maximum)."""
    higher = tl.maximum(highest, tl.max(z, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
    return higher, total * tl.exp(highest - base) + tl.exp(z - base)


@triton.jit
def _differentiate(logits, start, V, padded, scale, softcap, lse, target, slope, SOFTCAP: tl.constexpr,
                   MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A tile of logits becomes its gradient."""
    cols, z, t = _tile(logits, start, V, padded, scale, softcap, SOFTCAP, MASKED, BLOCK)
    d = (tl.exp(z - lse) - tl.where(cols == target, 1.0, 0.0)) * slope
    if SOFTCAP:
        d *= 1.0 - t * t
    d = narrow(d, logits.dtype.element_ty)
    if MASKED:
        tl.store(logits + cols, d, mask=cols < padded)
    else:
        tl.store(logits + cols, d)


# ---------------------------------------------------------------- the kernel


@triton.jit
def linear_loss_kernel(logits, targets, row_weights, nll_cap, nll, terms, V, padded, stride_row, scale, softcap,
                       slope_scale, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: one row. logits (rows, stride_row): read, and with GRADIENT overwritten with d loss/d logits.

    `padded`, V or more and a multiple of PAD, is how far a row may be touched: masks by it keep accesses 16 bytes wide,
    which masks by an odd V would not. What lies between V and `padded` is ignored, whatever it holds.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    target = tl.load(targets + row)
    # a target outside the vocabulary makes NaN: no address beyond the row, and no wait for the host to raise
    inside = (target >= 0) & (target < V)
    # read before the row is overwritten: the reductions below hold all threads until each has it
    picked, picked_t = _logits(tl.load(logits + target, mask=inside, other=float("nan")), scale, softcap, SOFTCAP)

    whole = V // BLOCK * BLOCK  # columns in whole tiles: nothing is masked there
    highest = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, whole, BLOCK):
        cols, z, t = _tile(logits, start, V, padded, scale, softcap, SOFTCAP, False, BLOCK)
        highest, total = _add(z, highest, total)
    if whole < V:
        cols, z, t = _tile(logits, whole, V, padded, scale, softcap, SOFTCAP, True, BLOCK)
        highest, total = _add(z, highest, total)
    lse = highest + tl.log(tl.sum(total, 0))

    loss = lse - picked
    weight = tl.load(row_weights + row).to(tl.float32)
    term, slope = loss, weight
    if nll_cap is not None:
        cap = tl.load(nll_cap + row).to(tl.float32)
        term = tl.where(loss > cap, cap, loss)  # NaN stays, where a minimum would drop it
        slope = tl.where(loss < cap, weight, 0.0)  # clamp(max=cap) has no slope beyond the cap
    tl.store(nll + row, loss)
    tl.store(terms + row, weight * term)

    if GRADIENT:
        slope *= slope_scale
        for start in range(0, whole, BLOCK):
            _differentiate(logits, start, V, padded, scale, softcap, lse, target, slope, SOFTCAP, False, BLOCK)
        if whole < V:
            _differentiate(logits, whole, V, padded, scale, softcap, lse, target, slope, SOFTCAP, True, BLOCK)


# ---------------------------------------------------------------- launchers


def call_linear_loss(
    logits: torch.Tensor,
    vocabulary: int,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    nll_cap: torch.Tensor | None,
    nll: torch.Tensor,
    terms: torch.Tensor,
    scale: float,
    softcap: float | None,
    gradient: bool,
    block: int | None = None,
) -> Call:
    """The launch for a chunk: logits (rows, padded V), contiguous; the others (rows,), contiguous.

    nll becomes the rows' negative log-likelihood, terms w * min(nll, cap), logits with `gradient` d loss/d logits.
    """
    arguments = dict(logits=logits, targets=targets, row_weights=row_weights, nll=nll, terms=terms, V=vocabulary)
    arguments |= dict(padded=logits.shape[1], stride_row=logits.stride(0))
    cap = 1.0 if softcap is None else float(softcap)
    arguments |= dict(scale=scale / cap, softcap=cap, slope_scale=float(scale))
    constexprs = dict(SOFTCAP=softcap is not None, GRADIENT=gradient)
    most = BLOCK_BYTES // logits.element_size() // (1 if softcap is None else 2)
    constexprs |= dict(BLOCK=block or min(most, next_power_of_2(vocabulary)))
    (constexprs if nll_cap is None else arguments)["nll_cap"] = nll_cap
    return Call(linear_loss_kernel, (logits.shape[0],), arguments, constexprs, NUM_WARPS, 1)


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk: as few chunks as fit `chunk_bytes`, of about equal size, in whole tiles of the product."""
    most = max(1, chunk_bytes // row_bytes)
    if rows <= most:
        return max(1, rows)
    even = cdiv(rows, cdiv(rows, most))
    return min(most, cdiv(even, TILE_ROWS) * TILE_ROWS)


@torch.no_grad()
def launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    nll_cap: torch.Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = False,
    need_bias: bool = False,
    chunk_bytes: int | None = None,
    block: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`reference.linear_loss` by the kernel: (loss, nll (R,), d_hidden, d_weight, d_bias), those not asked for None.

    bf16, fp16 or fp32, any strides. A target outside [0, V) makes its row's nll, gradient and the loss NaN.
    chunk_bytes, block: instead of CHUNK_BYTES and of BLOCK_BYTES' number of elements.
    """
    (R, _), V = hidden.shape, weight.shape[0]
    gradient = need_hidden or need_weight or need_bias
    nll = torch.empty(R, dtype=torch.float32, device=hidden.device)
    terms = torch.empty_like(nll)
    padded = cdiv(V, PAD) * PAD
    rows = chunk_rows(R, padded * hidden.element_size(), chunk_bytes or CHUNK_BYTES)
    buffer = torch.empty((rows, padded), dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    # of one chunk, the product itself; of several, their sum in fp32
    d_weight = torch.zeros_like(weight, dtype=None if R <= rows else torch.float32) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
    targets, row_weights = targets.contiguous(), row_weights.contiguous()
    nll_cap = None if nll_cap is None else nll_cap.contiguous()
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        x = hidden[part]
        whole = buffer[: len(x)]
        logits = whole[:, :V]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        cap = None if nll_cap is None else nll_cap[part]
        per_row = targets[part], row_weights[part], cap, nll[part], terms[part]
        call_linear_loss(whole, V, *per_row, scale, softcap, gradient, block).launch()
        if need_hidden:
            torch.mm(logits, weight, out=d_hidden[part])
        if need_weight and R <= rows:
            torch.mm(logits.t(), x, out=d_weight)
        elif need_weight:
            _add_product(d_weight, logits.t(), x)
        if need_bias:
            d_bias += logits.sum(0, dtype=torch.float32)
    loss = terms.sum(dtype=torch.float64).float()
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None else d_bias.to(bias.dtype)
    return loss, nll, d_hidden, d_weight, d_bias


def _add_product(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """acc += a @ b, where acc is fp32 and a and b may be half precision. (Only CUDA's product adds that to fp32.)"""
    if a.dtype == acc.dtype:
        acc.addmm_(a, b)
    elif acc.device.type == "cuda":
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    else:
        acc.addmm_(a.float(), b.float())


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, False: the matrix products are the library's): each dtype, with and without each option."""
    for dtype, V in itertools.product((torch.bfloat16, torch.float16, torch.float32), (128256, 50257)):
        logits = torch.empty(64, cdiv(V, PAD) * PAD, dtype=dtype, device="meta")
        row = torch.empty(64, dtype=torch.float32, device="meta")
        per_row = torch.empty(64, dtype=torch.int64, device="meta"), row.double(), row.double(), row, row
        for name, softcap, capped, gradient in (
            ("no gradient", None, False, False),
            ("gradient", None, False, True),
            ("gradient cap softcap", 30.0, True, True),
        ):
            tensors = per_row if capped else (*per_row[:2], None, *per_row[3:])
            call = call_linear_loss(logits, V, *tensors, 1.0, softcap, gradient)
            yield f"linear_loss {str(dtype)[6:]} V={V} {name}", call, False
