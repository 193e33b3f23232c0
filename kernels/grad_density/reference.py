"""Statistics of each sample's weight gradient in plain torch: the truth for the kernels, and the path on a CPU.

One sample's weight gradient of y = x @ W.T is dW_i = dY_i^T X_i, (N, K). Products are summed in fp32 (fp64 for fp64
inputs); on CUDA fp32 products follow torch.backends.cuda.matmul.allow_tf32, which is off unless someone set it.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x.
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
    statistic: str = "grad_l1",
    along: str | None = None,
    tile_bytes: int | None = None,
) -> list[torch.Tensor]:
    """A statistic of each sample's weight gradient, for P projections of one x, never more than a tile of dW in memory.

        dw = dys[p][sample].T @ x[sample]                    # (N_p, K), sample i's own rows
        grad_l1 = dw.abs().sum()    grad_l2sq = dw.square().sum()    grad_linf = dw.abs().max()

    x (T, K), dys: P tensors (T, N_p), lengths: B ints whose sum is T. Returns P float64 tensors: (B,), or with
    along="row" (B, N_p), each output row's own statistic (over K). An empty sample gives 0; a NaN shows in its own
    sample only. 2*T*N*K FLOPs in products; T*(N+K) elements read. Squares are taken in the product's dtype: in fp32,
    entries of dW under 1e-19 in size count as 0 in grad_l2sq.
    """
    dim = {None: (0, 1), "row": 1}[along]
    outs = [out.zero_() for out in empty_statistics(x, dys, len(lengths), along)]
    for i, sample in enumerate(_slices(lengths)):
        x_i = _operand(x[sample])
        for dy, out in zip(dys, outs):
            for rows, _, tile in weight_gradient_tiles(x_i, _operand(dy[sample]), tile_bytes):
                _add_tile(tile, dim, statistic, out[i] if along is None else out[i, rows])
            tile = None  # or it lives until the next sample has its own
    return outs


def empty_statistics(
    x: torch.Tensor, dys: Sequence[torch.Tensor], num_samples: int, along: str | None
) -> list[torch.Tensor]:
    """What `grad_density` returns, uninitialised."""
    sizes = ({None: (), "row": dy.shape[1:]}[along] for dy in dys)
    return [x.new_empty((num_samples, *size), dtype=torch.float64) for size in sizes]


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


def _add_tile(tile: torch.Tensor, dim: int | tuple[int, int], statistic: str, total: torch.Tensor) -> None:
    """Adds a tile's statistic along `dim` to `total`. In place: the tile becomes its absolute value or its square."""
    if statistic == "grad_l1":
        total += tile.abs_().sum(dim)  # summed pairwise; linalg.vector_norm is slower and loses digits
    elif statistic == "grad_l2sq":
        total += tile.square_().sum(dim)
    else:
        torch.maximum(total, tile.abs_().amax(dim).double(), out=total)


@torch.no_grad()
def gram_l2sq(x: torch.Tensor, dys: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
    """`grad_density(x, dys, lengths, "grad_l2sq")`, P tensors (B,), by way of |dW_i|^2 = <X_i X_i^T, dY_i dY_i^T>.

    At most 2*B*L^2*(K + sum of N_p) FLOPs, L the longest sample: cheaper than dW where L < N*K/(N+K). Samples are
    padded in chunks of GRAM_CHUNK elements (or one sample).
    """
    outs = [x.new_zeros(len(lengths), dtype=torch.float64) for _ in dys]
    width = x.shape[1] + max(dy.shape[1] for dy in dys)
    for first, last in _chunks(lengths, width):
        x_gram = _gram(_padded(x, lengths, first, last))
        for dy, out in zip(dys, outs):
            out[first:last] = _dot(x_gram, _gram(_padded(dy, lengths, first, last)))
    return outs


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


def _gram(a: torch.Tensor) -> torch.Tensor:
    """(B, L, K) -> (B, L, L)"""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, a.mT, out_dtype=torch.float32)
    return torch.bmm(a, a.mT)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b).sum((1, 2))  # its terms have both signs and cancel: in fp64
