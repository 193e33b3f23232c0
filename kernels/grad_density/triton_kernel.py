"""A statistic of each sample's weight gradient, with no weight gradient in memory.

A linear layer y = x @ W.T, samples packed one after the other (sample i: tokens cu_seqlens[i] to cu_seqlens[i+1]):

    dW_i[n, k] = sum over the tokens t of sample i of dy[t, n] * x[t, k]
    grad_l1[i] = sum |dW_i[n, k]|      grad_l2sq[i] = sum dW_i[n, k]^2      grad_linf[i] = max |dW_i[n, k]|

with the sum over all of (n, k), or over k for each output row n.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x.
Never in memory: dW_i. A program holds one (BN, BK) tile of it in registers and keeps what the tile adds to each row.

A program walks along K with BN rows of one sample's dW: descriptors are made once, and tile after tile is summed. Two
ways, chosen by the sample's length as the kernel runs:
  fits    up to SHORT tokens (32, 64, 128, or 0: none). dy's (tokens, BN) tile stays on the chip; each step loads only
          x, BN FLOPs for each byte. The token block is 32, 64 or 128, whichever the sample fits.
  long    a step loads BT tokens of both. One loop goes over (tile, token block), so that the first blocks of the next
          tile are loaded under the products and sums of this one. Programs are ordered in groups of GROUP tiles along
          N, so that the panels of dy and x in use stay in the L2 cache.
SHORT is what the caller says of the longest sample. It sets what shared memory a program takes; a sample that is longer
goes the long way, so a wrong SHORT costs time, never a value.

FLOPs: 2*T*N*K, and B*N*K additions for the statistic. Bytes from DRAM: T*(N+K) elements, once, as long as one
sample's x and dy fit the L2 cache. At T=128, 14336 x 4096 in bf16 that is 15 GFLOP and 4.7 MB.
Precision: products of bf16 and fp16 are exact in fp32 and summed in fp32; fp32 inputs are multiplied in full fp32
(not TF32) on the CUDA cores. A program's sums are fp32; the programs' sums are added in float64.
Deterministic: each program writes its own partial sums; a second pass adds them in a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .. import tiles as config
from ..launch import INTERPRETED, Call, dot
from . import reference
from .kinds import triton_kind

MAX_PROJECTIONS = 3  # of one launch (q, k, v); more are launched in turn

# ---------------------------------------------------------------- inside a program


@triton.jit
def _descriptor(base, num_rows, num_cols, stride_row, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Of one sample's rows alone: what lies beyond them reads as zero, so no neighbour leaks in."""
    if TMA:
        rows = tl.maximum(num_rows, 1)
        return tl.make_tensor_descriptor(base, [rows, num_cols], [stride_row, 1], [ROWS, COLS])
    else:
        return base


@triton.jit
def _load(source, row, num_rows, stride_row, col, num_cols, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """A (ROWS, COLS) block of one sample, zero outside of its num_rows and num_cols. `source`: see _descriptor."""
    if TMA:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
        return tl.load(source + offsets, mask=inside, other=0.0)


@triton.jit
def _load_transposed(source, row, num_rows, stride_row, col, num_cols, stride_col, ROWS: tl.constexpr,
                     COLS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The block of `_load`, (COLS, ROWS). Asked for in that shape, it is copied in the background on sm_80 too."""
    if TMA:
        return tl.trans(source.load([row, col]))
    else:
        return _load(source, col, num_cols, stride_col, row, num_rows, stride_row, COLS, ROWS, False)


@triton.jit
def _magnitude(x):
    if INTERPRETED:
        return tl.abs(x)
    else:  # tl.abs is an integer AND, at half the rate of an addition; this becomes a modifier of the addition
        return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _itself(x):
    """x, as a value of its own for the compiler."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _nothing(BN: tl.constexpr, STATISTIC: tl.constexpr):
    """What `_add_tile` adds to."""
    return tl.zeros((BN,), tl.int32 if STATISTIC == "grad_linf" else tl.float32)


@triton.jit
def _add_tile(acc, total, STATISTIC: tl.constexpr):
    """Adds the (BN, BK) tile `acc` of dW to its rows' statistic; a running maximum holds the floats' bits."""
    if STATISTIC == "grad_l1":
        total += tl.sum(_magnitude(acc), 1)
    elif STATISTIC == "grad_l2sq":
        total += tl.sum(acc * acc, 1)
    else:
        # as integers: the order of non-negative floats, with NaN on top, where a float maximum would drop it
        total = tl.maximum(total, tl.max(tl.abs(acc).to(tl.int32, bitcast=True), 1))
    return total


@triton.jit
def _walk_fitting(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
                  BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
                  STATISTIC: tl.constexpr, TMA: tl.constexpr, TMEM: tl.constexpr):  # fmt: skip
    """The statistic of BN rows of one sample's dW, over tiles `first` to `last` along K; at most BT tokens.

    A sum under an `if` is scheduled behind the next load; outside of one, the load would wait for the sum. So all tiles
    but the last are summed under `step < steps - 1`. Were `acc` itself carried on from there, PTX would copy it before
    the product has written it.
    """
    total = _nothing(BN, STATISTIC)
    from_x = _descriptor(x, length, K, stride_xt, BT, BK, TMA)
    from_dy = _descriptor(dy, length, N, stride_yt, BT, BN, TMA)
    dy_t = _load_transposed(from_dy, 0, length, stride_yt, n, N, stride_yn, BT, BN, TMA)
    steps = last - first
    acc = tl.zeros((BN, BK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        xb = _load(from_x, 0, length, stride_xt, (first + step) * BK, K, stride_xk, BT, BK, TMA)
        acc = dot(dy_t, xb, tl.zeros((BN, BK), tl.float32))
        if step < steps - 1:
            total = _add_tile(acc, total, STATISTIC)
            acc = acc if TMEM else _itself(acc)
    return _add_tile(acc, total, STATISTIC)


@triton.jit
def _walk_long(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
               BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
               STATISTIC: tl.constexpr, TMA: tl.constexpr, TMEM: tl.constexpr):  # fmt: skip
    """As `_walk_fitting`, of any length, BT tokens a step: (row, k) goes through a tile's tokens, then to the next."""
    total = _nothing(BN, STATISTIC)
    from_x = _descriptor(x, length, K, stride_xt, BT, BK, TMA)
    from_dy = _descriptor(dy, length, N, stride_yt, BT, BN, TMA)
    # Zeros for the next tile. In tensor memory constants become a flag of the product. Into registers constants go by
    # two moves each (Triton 3.6 and 3.7 on sm_90); zeros that the compiler takes for a value go by one.
    zeros = tl.full((BN, BK), 0.0 if TMEM else tl.minimum(length, 0).to(tl.float32), tl.float32)
    acc = zeros
    row, k = 0, first * BK
    for _ in tl.range(0, (last - first) * tl.cdiv(length, BT), num_stages=STAGES):
        xb = _load(from_x, row, length, stride_xt, k, K, stride_xk, BT, BK, TMA)
        dy_t = _load_transposed(from_dy, row, length, stride_yt, n, N, stride_yn, BT, BN, TMA)
        acc = dot(dy_t, xb, acc)
        complete = row + BT >= length
        row = tl.where(complete, 0, row + BT)
        k = tl.where(complete, k + BK, k)
        if complete:
            total = _add_tile(acc, total, STATISTIC)
            acc = zeros
    return total


@triton.jit
def _place(index, n_tiles, k_strips, group):
    """(tile along N, strip along K) of a program of one sample: `group` tiles along N take turns at each strip."""
    group_first = index // (group * k_strips) * group
    group_size = tl.minimum(group, n_tiles - group_first)
    index = index % (group * k_strips)
    return group_first + index % group_size, index // group_size


# ---------------------------------------------------------------- the kernels


@triton.jit
def grad_density_kernel(x, dy0, dy1, dy2, cu_seqlens, out, K, N0, N1, N2, k_tiles, strips, strip_tiles, group,
                        stride_xt, stride_xk, stride_0t, stride_0n, stride_1t, stride_1n, stride_2t, stride_2n,
                        P: tl.constexpr, STATISTIC: tl.constexpr, ROWS: tl.constexpr,
                        BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SHORT: tl.constexpr,
                        STAGES: tl.constexpr, LONG_STAGES: tl.constexpr, TMA: tl.constexpr,
                        TMEM: tl.constexpr):  # fmt: skip
    """One program: one sample, BN output rows of one projection, `strip_tiles` tiles along K.

    out: (B, strips, n_tiles), or (B, strips, sum of N) with ROWS. n_tiles counts the tiles of all projections, one
    projection after the other.
    """
    tiles0 = tl.cdiv(N0, BN)
    tiles1 = tl.cdiv(N1, BN) if P > 1 else 0
    tiles2 = tl.cdiv(N2, BN) if P > 2 else 0
    n_tiles = tiles0 + tiles1 + tiles2
    sample = tl.program_id(0) // (n_tiles * strips)
    n_tile, strip = _place(tl.program_id(0) % (n_tiles * strips), n_tiles, strips, group)

    # the projection that this tile belongs to, and where its rows are among all projections' rows
    dy, N, stride_yt, stride_yn, tile, rows_before = dy0, N0, stride_0t, stride_0n, n_tile, 0
    total = N0
    if P > 1:
        total += N1
        if n_tile >= tiles0:
            dy, N, stride_yt, stride_yn, tile, rows_before = dy1, N1, stride_1t, stride_1n, n_tile - tiles0, N0
    if P > 2:
        total += N2
        if n_tile >= tiles0 + tiles1:
            dy, N, stride_yt, stride_yn = dy2, N2, stride_2t, stride_2n
            tile, rows_before = n_tile - tiles0 - tiles1, N0 + N1
    n = tile * BN

    start = tl.load(cu_seqlens + sample).to(tl.int64)
    length = (tl.load(cu_seqlens + sample + 1).to(tl.int64) - start).to(tl.int32)
    first = strip * strip_tiles
    last = tl.minimum(first + strip_tiles, k_tiles)
    if TMA:
        # A descriptor has one row at least. For an empty sample it is the batch's first, which may be read, and the
        # walk has no tiles.
        start = tl.where(length > 0, start, 0)
        last = tl.where(length > 0, last, first)
    x += start * stride_xt
    dy += start * stride_yt
    sample = sample.to(tl.int64)

    if SHORT >= 32 and length <= 32:  # as many stages as there is room for with SHORT tokens
        value = _walk_fitting(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
                              BN, BK, 32, min(4, STAGES * SHORT // 32), STATISTIC, TMA, TMEM)  # fmt: skip
    elif SHORT >= 64 and length <= 64:
        value = _walk_fitting(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
                              BN, BK, 64, min(4, STAGES * SHORT // 64), STATISTIC, TMA, TMEM)  # fmt: skip
    elif SHORT >= 128 and length <= 128:
        value = _walk_fitting(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
                              BN, BK, 128, STAGES, STATISTIC, TMA, TMEM)  # fmt: skip
    else:
        value = _walk_long(x, dy, length, K, N, n, first, last, stride_xt, stride_xk, stride_yt, stride_yn,
                           BN, BK, BT, LONG_STAGES, STATISTIC, TMA, TMEM)  # fmt: skip

    if not ROWS:
        value = tl.max(value, 0) if STATISTIC == "grad_linf" else tl.sum(value, 0)
    if STATISTIC == "grad_linf":
        value = value.to(tl.float32, bitcast=True)
    if ROWS:
        rows = n + tl.arange(0, BN)
        tl.store(out + (sample * strips + strip) * total + rows_before + rows, value, mask=rows < N)
    else:
        tl.store(out + (sample * strips + strip) * n_tiles + n_tile, value)


# ---------------------------------------------------------------- launchers


def _strips(k_tiles: int, programs: int, processors: int, tile_clocks: float) -> tuple[int, int]:
    """(strips along K, tiles in each). One strip makes `programs`; more end more evenly, but each program's start costs
    START_CLOCKS. Of the halvings of K the one that ends first, if each multiprocessor ran one program at a time."""
    tiles, best = k_tiles, None
    while True:
        strips = config.cdiv(k_tiles, tiles)
        clocks = config.cdiv(programs * strips, processors) * (config.START_CLOCKS + tiles * tile_clocks)
        if best is None or clocks < best[0]:
            best = clocks, strips, tiles
        if tiles == 1:
            return best[1:]
        tiles = config.cdiv(tiles, 2)


def call_grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    statistic: str,
    along: str | None,
    tile: config.Tile,
    processors: int,
) -> Call:
    """The launch for at most MAX_PROJECTIONS projections; its argument `out` is the buffer of partial sums."""
    num_samples, (_, K) = len(cu_seqlens) - 1, x.shape
    sizes = [dy.shape[1] for dy in dys]
    n_tiles = sum(config.cdiv(n, tile.BN) for n in sizes)
    k_tiles = config.cdiv(K, tile.BK)
    tokens = max(32, x.shape[0] / max(1, num_samples))
    strips, strip_tiles = _strips(k_tiles, num_samples * n_tiles, processors, tile.clocks(tokens))
    width = {None: n_tiles, "row": sum(sizes)}[along]
    out = torch.empty((num_samples, strips, width), dtype=torch.float32, device=x.device)
    arguments = dict(x=x, cu_seqlens=cu_seqlens, out=out, K=K, k_tiles=k_tiles, strips=strips, strip_tiles=strip_tiles)
    arguments |= dict(group=min(tile.group or n_tiles, n_tiles), stride_xt=x.stride(0), stride_xk=x.stride(1))
    for p in range(MAX_PROJECTIONS):  # those that are not there are never read: the last one again
        dy = dys[min(p, len(dys) - 1)]
        arguments |= {f"dy{p}": dy, f"N{p}": dy.shape[1], f"stride_{p}t": dy.stride(0), f"stride_{p}n": dy.stride(1)}
    constexprs = dict(P=len(dys), STATISTIC=statistic, ROWS=along == "row", BN=tile.BN, BK=tile.BK, BT=tile.BT)
    constexprs |= dict(SHORT=tile.short, STAGES=tile.num_stages, LONG_STAGES=tile.long_stages, TMA=tile.tma)
    # a tile of another GPU generation may be asked for
    constexprs |= dict(TMEM=tile.tmem and config.architecture(x.device) >= 100)
    grid = (num_samples * n_tiles * strips,)
    return Call(grad_density_kernel, grid, arguments, constexprs, tile.num_warps, tile.num_stages, scratch=tile.tma)


def launch(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    statistic: str = "grad_l1",
    along: str | None = None,
    tile: config.Tile | None = None,
    max_seqlen: int | None = None,
) -> list[torch.Tensor]:
    """`reference.grad_density` by the kernel: x (T, K), each dy (T, N_p), cu_seqlens (B+1,) int32 or int64.

    Returns P float64 tensors, (B,) or (B, N_p) for along="row". bf16, fp16 or fp32, any strides. `tile`: instead of the
    table's choice. max_seqlen: tokens of the longest sample, for the choice of a tile; None or a wrong one costs time.
    """
    if len(dys) > MAX_PROJECTIONS:
        parts = [dys[i : i + MAX_PROJECTIONS] for i in range(0, len(dys), MAX_PROJECTIONS)]
        return [out for part in parts for out in launch(x, part, cu_seqlens, statistic, along, tile, max_seqlen)]
    if x.shape[0] == 0:  # no row that a descriptor could name
        return [out.zero_() for out in reference.empty_statistics(x, dys, len(cu_seqlens) - 1, along)]
    processors = config.processors(x.device)

    def run(tile: config.Tile) -> Call:
        call = call_grad_density(x, dys, cu_seqlens, statistic, along, tile, processors)
        call.launch()
        return call

    if tile is None:
        samples = len(cu_seqlens) - 1
        sizes = tuple(dy.shape[1] for dy in dys)
        key = (x.dtype, x.shape[1], sizes, round(x.shape[0] / max(1, samples) / 32), samples, statistic, along)
        tile = config.choose(x.device, table_kind(x, dys, samples, max_seqlen), key, run)
    partial = run(tile).arguments["out"]
    dims = (1, 2) if along is None else (1,)
    out, before = [], 0
    for dy in dys:
        step = dy.shape[1] if along == "row" else config.cdiv(dy.shape[1], tile.BN)
        part = partial[..., before : before + step]
        before += step
        out.append(part.amax(dims).double() if statistic == "grad_linf" else part.sum(dims, dtype=torch.float64))
    return out


def table_kind(x: torch.Tensor, dys: Sequence[torch.Tensor], samples: int, max_seqlen: int | None) -> str:
    """The table's kind of launch."""
    kind = triton_kind(x, all(map(config.aligned, (x, *dys))), samples)
    if kind == "short" and max_seqlen is not None and max_seqlen <= 64:
        return "short 32" if max_seqlen <= 32 else "short 64"
    return kind


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, whether it multiplies on the matrix units) for every tile of the table and every kind of launch:
    each statistic, 1 to 3 projections, both dtypes, shapes that divide evenly and that do not."""

    def tensors(tokens, K, sizes, dtype):
        x, *dys = (torch.empty(tokens, n, dtype=dtype, device="meta") for n in (K, *sizes))
        return x, dys, torch.empty(9, dtype=torch.int32, device="meta")

    even, odd = (512, 4096, 14336), (510, 575, 1537)
    for (entry, kind), tiles in config.TABLE.items():
        if entry != architecture:
            continue
        half = not kind.endswith("fp32")
        first = torch.bfloat16 if half else torch.float32
        shapes = (even, odd) if kind in ("any", "fp32") else (even,)
        for tile, (T, K, N) in itertools.product(tiles, shapes):
            launches = [
                ("l1", "grad_l1", None, 2, first),
                ("l2sq", "grad_l2sq", None, 3, first),
                ("linf by row", "grad_linf", "row", 1, first),
                ("l1 by row", "grad_l1", "row", 3, first),
            ]
            if half:  # bf16 and fp16 differ in one bit of an instruction: once is enough
                launches.append(("l1 fp16", "grad_l1", None, 1, torch.float16))
            for name, statistic, along, projections, dtype in launches:
                x, dys, cu = tensors(T, K, (N,) * projections, dtype)
                call = call_grad_density(x, dys, cu, statistic, along, tile, processors=132)
                yield f"grad_density {name} {kind} K={K} {tile}", call, half
