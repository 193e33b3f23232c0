"""Statistics of each sample's weight gradient in plain torch: the truth for the kernels, and the path on a CPU.

One sample's weight gradient of y = x @ W.T is dW_i = dY_i^T X_i, (N, K). Products are summed in fp32 (fp64 for fp64
inputs); on CUDA fp32 products follow torch.backends.cuda.matmul.allow_tf32, which is off unless someone set it.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x, S statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

STATISTICS = ("grad_l1", "grad_l2sq", "grad_linf")

# Bytes of one tile of dW. On a CPU a tile is written and read back within the last-level cache, and matrix products
# are still efficient: with tiles of 2048 x 512 in fp32 grad_l1 takes 0.7 to 1.15 times the bare product's time (two
# Zen cores). On a GPU launches cost more than memory.
TILE_BYTES_CPU = 4 << 20
TILE_BYTES_GPU = 64 << 20
# Elements of one chunk of padded samples in the Gram form.
GRAM_CHUNK = 1 << 24


@torch.no_grad()
def grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    lengths: Sequence[int],
    statistics: Sequence[str] = ("grad_l1",),
    along: str | None = None,
    tile_bytes: int | None = None,
) -> list[torch.Tensor]:
    """Statistics of each sample's weight gradient, for P projections of one x, never more than a tile of dW in memory.

        dw = dys[p][sample].T @ x[sample]                    # (N_p, K), sample i's own rows
        grad_l1 = dw.abs().sum()    grad_l2sq = dw.square().sum()    grad_linf = dw.abs().max()

    x (T, K), dys: P tensors (T, N_p), lengths: B ints whose sum is T. Returns P float64 tensors: (S, B) in the order
    of `statistics`; with along="row" (S, B, N_p), each output row's own statistic (over K); with along="column"
    (S, B, K), each input column's (over N_p). An empty sample gives 0; a NaN shows in its own sample only.
    2*T*N*K FLOPs in products; T*(N+K) elements read. The statistics share the product. Squares are taken in the
    product's dtype: in fp32, entries of dW under 1e-19 in size count as 0 in grad_l2sq.
    """
    dim = {None: (0, 1), "row": 1, "column": 0}[along]
    outs = [out.zero_() for out in empty_statistics(x, dys, len(lengths), len(statistics), along)]
    for i, sample in enumerate(_slices(lengths)):
        x_i = _operand(x[sample])
        for dy, out in zip(dys, outs):
            for rows, columns, tile in weight_gradient_tiles(x_i, _operand(dy[sample]), tile_bytes):
                into = out[:, i] if along is None else out[:, i, rows if along == "row" else columns]
                _add_tile(tile, dim, dict(zip(statistics, into)))
            tile = None  # or it lives until the next sample has its own
    return outs


def empty_statistics(
    x: torch.Tensor, dys: Sequence[torch.Tensor], num_samples: int, num_statistics: int, along: str | None
) -> list[torch.Tensor]:
    """What `grad_density` returns, uninitialised."""
    sizes = ({None: (), "row": dy.shape[1:], "column": x.shape[1:]}[along] for dy in dys)
    return [x.new_empty((num_statistics, num_samples, *size), dtype=torch.float64) for size in sizes]


@torch.no_grad()
def grad_alignment(
    x: torch.Tensor,
    dy: torch.Tensor,
    lengths: Sequence[int],
    other_x: torch.Tensor,
    other_dy: torch.Tensor,
    other_lengths: Sequence[int],
    tile_bytes: int | None = None,
) -> torch.Tensor:
    """Inner products of two packed batches' weight gradients, sample i of the one with sample i of the other.

    Returns (3, B) float64: `(dw * other_dw).sum()`, `dw.square().sum()`, `other_dw.square().sum()`, with dw as in
    `grad_density`. x (T, K), dy (T, N), other_x (T', K), other_dy (T', N). 2*(T+T')*N*K FLOPs in products, three
    tiles in memory.
    """
    out = x.new_zeros((3, len(lengths)), dtype=torch.float64)
    for i, (sample, other) in enumerate(zip(_slices(lengths), _slices(other_lengths))):
        tiles = weight_gradient_tiles(_operand(x[sample]), _operand(dy[sample]), tile_bytes)
        other_tiles = weight_gradient_tiles(_operand(other_x[other]), _operand(other_dy[other]), tile_bytes)
        for (_, _, a), (_, _, b) in zip(tiles, other_tiles):
            out[0, i] += (a * b).sum()
            out[1, i] += a.square_().sum()
            out[2, i] += b.square_().sum()
    return out


def weight_gradient_tiles(
    x: torch.Tensor, dy: torch.Tensor, tile_bytes: int | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, tile): the tiles of `dy.T @ x`, (N, K), for one sample: x (T, K), dy (T, N).

    Tiles are contiguous, all of dW or about four times as tall as wide, in one buffer that is used again for each: a
    caller may overwrite its tile. fp32 for half precision.
    """
    if tile_bytes is None:
        tile_bytes = TILE_BYTES_CPU if x.device.type == "cpu" else TILE_BYTES_GPU
    dtype = torch.promote_types(x.dtype, torch.float32)
    elements = max(1, tile_bytes // dtype.itemsize)
    whole = x.shape[1] * dy.shape[1] <= elements
    columns = _even_step(x.shape[1], x.shape[1] if whole else max(1, math.isqrt(elements) // 2))
    rows = _even_step(dy.shape[1], elements // columns)
    buffer = torch.empty(rows * columns, dtype=dtype, device=x.device)
    for k in range(0, x.shape[1], columns):
        x_k = x[:, k : k + columns]
        for n in range(0, dy.shape[1], rows):
            dy_n = dy[:, n : n + rows]
            tile = buffer[: dy_n.shape[1] * x_k.shape[1]].view(dy_n.shape[1], x_k.shape[1])
            if x.dtype == dtype:
                torch.mm(dy_n.t(), x_k, out=tile)
            else:
                torch.mm(dy_n.t(), x_k, out_dtype=dtype, out=tile)
            yield slice(n, n + rows), slice(k, k + columns), tile


def _add_tile(tile: torch.Tensor, dim: int | tuple[int, int], sums: dict[str, torch.Tensor]) -> None:
    """Adds a tile's statistics along `dim` to `sums`. In place: the tile becomes its absolute value, then its square."""
    if "grad_l1" in sums or "grad_linf" in sums:
        tile.abs_()
    if "grad_l1" in sums:
        sums["grad_l1"] += tile.sum(dim)  # summed pairwise; linalg.vector_norm is slower and loses digits
    if "grad_linf" in sums:
        torch.maximum(sums["grad_linf"], tile.amax(dim).double(), out=sums["grad_linf"])
    if "grad_l2sq" in sums:
        sums["grad_l2sq"] += tile.square_().sum(dim)


@torch.no_grad()
def gram_l2sq(x: torch.Tensor, dys: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
    """`grad_density(x, dys, lengths, ("grad_l2sq",))`, P tensors (1, B), by way of |dW_i|^2 = <X_i X_i^T, dY_i dY_i^T>.

    At most 2*B*L^2*(K + sum of N_p) FLOPs, L the longest sample: cheaper than dW where L < N*K/(N+K). Samples are
    padded in chunks of GRAM_CHUNK elements (or one sample).
    """
    outs = [x.new_zeros((1, len(lengths)), dtype=torch.float64) for _ in dys]
    width = x.shape[1] + max(dy.shape[1] for dy in dys)
    for first, last in _chunks(lengths, width):
        x_gram = _gram(_padded(x, lengths, first, last))
        for dy, out in zip(dys, outs):
            out[0, first:last] = _dot(x_gram, _gram(_padded(dy, lengths, first, last)))
    return outs


@torch.no_grad()
def gram_alignment(
    x: torch.Tensor,
    dy: torch.Tensor,
    lengths: Sequence[int],
    other_x: torch.Tensor,
    other_dy: torch.Tensor,
    other_lengths: Sequence[int],
) -> torch.Tensor:
    """`grad_alignment` by way of <dW_i, dW'_i> = <X_i X'_i^T, dY_i dY'_i^T>, at most 2*B*(L^2 + L'^2 + L*L')*(K+N) FLOPs."""
    out = x.new_zeros((3, len(lengths)), dtype=torch.float64)
    longest = [max(pair) for pair in zip(lengths, other_lengths)]
    for first, last in _chunks(longest, 2 * (x.shape[1] + dy.shape[1])):
        a, b = _padded(x, lengths, first, last), _padded(dy, lengths, first, last)
        other_a, other_b = _padded(other_x, other_lengths, first, last), _padded(other_dy, other_lengths, first, last)
        out[0, first:last] = _dot(_gram(a, other_a), _gram(b, other_b))
        out[1, first:last] = _dot(_gram(a), _gram(b))
        out[2, first:last] = _dot(_gram(other_a), _gram(other_b))
    return out


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    for end, length in zip(itertools.accumulate(lengths), lengths):
        yield slice(end - length, end)


def _even_step(size: int, most: int) -> int:
    """The step of at most `most` that cuts `size` into as few, and as even, pieces as can be."""
    return -(-size // -(-size // most)) if size else 1


def _operand(x: torch.Tensor) -> torch.Tensor:
    """One sample's rows as a matrix product takes them: a GPU sums half precision in fp32, a CPU needs fp32 inputs."""
    return x if x.device.type == "cuda" else x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(lengths: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of samples that padded to their longest are at most GRAM_CHUNK elements."""
    first, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > first and (i + 1 - first) * longest * (width + longest) > GRAM_CHUNK:
            yield first, i
            first, longest = i, length
    if first < len(lengths):
        yield first, len(lengths)


def _padded(x: torch.Tensor, lengths: Sequence[int], first: int, last: int) -> torch.Tensor:
    """(last - first, L, K): samples `first` to `last`, zeros after each one's end."""
    start = sum(lengths[:first])
    rows, lengths = x[start : start + sum(lengths[first:last])], list(lengths[first:last])
    if min(lengths) == max(lengths):  # nothing to pad, nothing to copy
        return _operand(rows).unflatten(0, (len(lengths), -1))
    parts = rows.split(lengths)
    return _operand(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))


def _gram(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """(B, L, K), (B, L', K) -> (B, L, L')"""
    b = a if b is None else b
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return torch.bmm(a, b.mT)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b).sum((1, 2))  # its terms have both signs and cancel: in fp64
