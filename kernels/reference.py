"""The plain-torch form of every operation: the truth that kernels are tested against, and the path on a CPU.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x, S statistics,
R labelled rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

# ---------------------------------------------------------------- gradient density
#
# One sample's weight gradient of y = x @ W.T is dW_i = dY_i^T X_i, (N, K). Products are summed in fp32 (fp64 for fp64
# inputs); on CUDA fp32 products follow torch.backends.cuda.matmul.allow_tf32, which is off unless someone set it.

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


# ---------------------------------------------------------------- RMSNorm and LayerNorm
#
# x, residual and h (..., D), weight and bias (D,). Computed in fp32, in fp64 for fp64 inputs (transformers' own modules
# round those to fp32). h = x + residual is rounded to its dtype before its statistics are taken, as unfused code does.

CASTS = ("llama", "gemma")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast: str = "llama",
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, h and rstd (..., 1), with h = x + residual (x itself without one):

    rstd = rsqrt(h.pow(2).mean(-1, keepdim=True) + eps);  x_hat = h * rstd            # fp32
    cast="llama": y = (offset + weight) * x_hat.to(h.dtype), in torch's promotion of both
    cast="gemma": y = (x_hat * (offset + weight.float())).to(h.dtype)
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    x_hat = h.to(wide)
    rstd = torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = x_hat * rstd
    if cast == "gemma":
        return (x_hat * _offset(weight.to(wide), offset)).to(h.dtype), h, rstd
    return _offset(weight, offset) * x_hat.to(h.dtype), h, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    compute_dx: bool,
    compute_dw: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx in h's dtype, dw in fp32 (fp64); `dh` is the gradient that reaches h by itself; weight is read for dx alone.

    g = dy * (offset + weight);  x_hat = h * rstd
    dx = dh + rstd * (g - x_hat * (g * x_hat).mean(-1));  dw = sum over rows of dy * x_hat
    Both casts have this gradient: what rounding to a narrow dtype does has none.
    """
    wide = _wide(h)
    dy, x_hat = dy.to(wide), h.to(wide) * rstd
    dw = (dy * x_hat).reshape(-1, dy.shape[-1]).sum(0) if compute_dw else None
    if not compute_dx:
        return None, dw
    g = dy * _offset(weight.to(wide), offset)
    mean = (g * x_hat).mean(-1, keepdim=True)
    dx = g.sub_(x_hat.mul_(mean)).mul_(rstd)
    return (dx if dh is None else dx.add_(dh)).to(h.dtype), dw


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, h, mean and rstd (both (..., 1)), with h = x + residual (x itself without one):

    mean = h.mean(-1);  rstd = rsqrt((h - mean).pow(2).mean(-1) + eps)                  # fp32
    y = ((h - mean) * rstd * weight + bias).to(out_dtype or h.dtype)
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    mean = h.mean(-1, keepdim=True, dtype=wide)
    x_hat = h.to(wide) - mean
    rstd = torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    y = x_hat.mul_(rstd).mul_(weight.to(wide))
    if bias is not None:
        y.add_(bias)
    return y.to(out_dtype or h.dtype), h, mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    compute_dx: bool,
    compute_dw: bool,
    compute_db: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx in h's dtype, dw and db in fp32 (fp64). weight is read for dx alone; for db alone nothing but dy is.

    g = dy * weight;  x_hat = (h - mean) * rstd
    dx = dh + rstd * (g - g.mean(-1) - x_hat * (g * x_hat).mean(-1))
    dw = sum over rows of dy * x_hat;  db = sum over rows of dy
    """
    wide = _wide(dy)
    dy = dy.to(wide)
    db = dy.reshape(-1, dy.shape[-1]).sum(0) if compute_db else None
    if not (compute_dx or compute_dw):
        return None, None, db
    x_hat = (h.to(wide) - mean).mul_(rstd)
    dw = (dy * x_hat).reshape(-1, dy.shape[-1]).sum(0) if compute_dw else None
    if not compute_dx:
        return None, dw, db
    g = dy * weight.to(wide)
    g_mean, product_mean = g.mean(-1, keepdim=True), (g * x_hat).mean(-1, keepdim=True)
    dx = g.sub_(g_mean).sub_(x_hat.mul_(product_mean)).mul_(rstd)
    return (dx if dh is None else dx.add_(dh)).to(h.dtype), dw, db


def _wide(x: torch.Tensor) -> torch.dtype:
    """What statistics and sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _offset(weight: torch.Tensor, offset: float) -> torch.Tensor:
    return weight if offset == 0 else offset + weight


# ---------------------------------------------------------------- head and loss

# Elements of one chunk of logits, (rows, V). In `linear_loss` a chunk is one tensor, and each chunk reads the head's weight
# twice: 682 rows for a vocabulary of 49152, 261 for 128256. Elsewhere a chunk is several tensors.
HEAD_CHUNK = 1 << 25
LOGITS_CHUNK = 1 << 23


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """`softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, (R, V), in fp32 (fp64) from the product on."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits *= scale
    return logits if softcap is None else torch.tanh_(logits.div_(softcap)).mul_(softcap)


def linear_loss(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The head and a weighted negative log-likelihood in one pass over row chunks: no (R, V) tensor in memory.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)
        nll    = cross_entropy(logits, targets, reduction="none")
        loss   = (row_weights * nll.clamp(max=nll_cap)).sum()

    hidden (R, D), weight (V, D), targets (R,) int64, row_weights (R,) of any sign, nll_cap (R,) or None.
    Returns (loss, nll (R,), d loss/d hidden, d loss/d weight, d loss/d bias); gradients not asked for are None.
    Logits and softmax in fp32 (fp64 for fp64 inputs).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll_cap = None if nll_cap is None else nll_cap.to(wide)
    nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
    rows = max(1, HEAD_CHUNK // weight.shape[0])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        x = hidden[part]
        logits = head_logits(x, weight, bias, scale, softcap)
        target, largest = targets[part, None], logits.amax(1, keepdim=True)
        of_target = logits.gather(1, target)
        slope = None if softcap is None else (1 - (logits / softcap) ** 2)
        exp = logits.sub_(largest).exp_()  # in place, and read once for the sum: a chunk is larger than a cache
        total = exp.sum(1, keepdim=True)
        nll[part] = (total.log() + largest - of_target).squeeze(1)
        if not (need_hidden or need_weight or need_bias):
            continue
        w = row_weights[part].to(wide)
        if nll_cap is not None:  # clamp(max=cap) has no slope beyond the cap
            w = torch.where(nll[part] < nll_cap[part], w, 0.0)
        w = (w if scale == 1.0 else w * scale)[:, None]
        d_logits = exp.mul_(w / total)
        d_logits.scatter_add_(1, target, -w)
        if slope is not None:
            d_logits *= slope
        narrow = d_logits.to(hidden.dtype)
        if need_hidden:
            torch.mm(narrow, weight, out=d_hidden[part])
        if need_weight:
            d_weight.addmm_(narrow.t().to(wide), x.to(wide))
        if need_bias:
            d_bias += d_logits.sum(0)
    capped = nll if nll_cap is None else nll.minimum(nll_cap)
    loss = (row_weights.to(wide) * capped).sum()
    return (
        loss,
        nll,
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(bias.dtype),
    )


# ---------------------------------------------------------------- optimiser


def lion_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    half: torch.Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
) -> None:
    """One Lion step in place (arXiv 2302.06675, algorithm 2): all tensors of one shape.

    param -= lr * (sign(beta1 * momentum + (1 - beta1) * grad) + weight_decay * param)
    momentum = beta2 * momentum + (1 - beta2) * grad

    half: becomes a copy of param in its own dtype. seed: param, bf16, is computed in fp32 and stored by `to_bf16`.
    """
    grad = grad.to(momentum.dtype)
    update = torch.lerp(momentum, grad, 1 - beta1).sign_()
    wide = param if seed is None else param.float()
    if weight_decay:
        wide.mul_(1 - lr * weight_decay)
    wide.add_(update.to(wide.dtype), alpha=-lr)
    momentum.lerp_(grad, 1 - beta2)
    _store_weights(param, wide, half, seed, step)


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    half: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One AdamW step in place (arXiv 1711.05101, as torch.optim.AdamW): all tensors of one shape, step from 1.

    param -= lr * weight_decay * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    param -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    half, seed: as in `lion_`.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    wide = param if seed is None else param.float()
    if weight_decay:
        wide.mul_(1 - lr * weight_decay)
    wide.add_((exp_avg / denominator).to(wide.dtype), alpha=-lr / (1 - beta1**step))
    _store_weights(param, wide, half, seed, step)


def _store_weights(
    param: torch.Tensor, wide: torch.Tensor, half: torch.Tensor | None, seed: int | None, step: int
) -> None:
    if seed is not None:
        param.copy_(to_bf16(wide, random_bits(wide.numel(), seed, step, wide.device).view(wide.shape)))
    if half is not None:
        half.copy_(param)


def to_bf16(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Stochastic rounding of fp32 x: to one of its two neighbours in bf16 by `bits` (random int32), on average x.

    16 random bits are added below bf16's last place, and what is below it is cut off.
    """
    up = ((x.view(torch.int32) + (bits & 0xFFFF)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, up).bfloat16()  # the bits of NaN could overflow to a number


def random_bits(count: int, seed: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,) int32: at place i word i % 4 of Philox 4x32-10 with key `seed` and counter (i // 4, step).

    64-bit seed, 32-bit step. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    quad = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    low = 0xFFFFFFFF
    counter = [quad & low, quad >> 32, torch.full_like(quad, step & low), torch.zeros_like(quad)]
    key = [seed & low, seed >> 32 & low]

    def product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The high and low words of a * b, in two halves, so that int64 holds each."""
        upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & low

    for _ in range(10):
        (high0, low0), (high1, low1) = product(counter[0], 0xD2511F53), product(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    words = torch.stack(counter, 1).flatten()[:count]
    return (words - ((words >> 31) << 32)).to(torch.int32)


# ---------------------------------------------------------------- gated activations
#
# y = act(gate) * up. In the inputs' dtype, each operation rounded as a model's own MLP rounds it: the same bits.

GATED_ACTIVATIONS = ("silu", "gelu_tanh", "gelu_none")


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate) * up`, all of one shape and dtype."""
    return _activated(gate, activation).mul_(up)


def gated_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    need_gate: bool = True,
    need_up: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dgate, dup) = (dy * up * act'(gate), dy * act(gate)); None for the one not asked for. `up` serves dgate alone."""
    dgate = _activation_backward(dy * up, gate, activation) if need_gate else None
    dup = _activated(gate, activation).mul_(dy) if need_up else None
    return dgate, dup


def gated_backward_(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """Writes dgate over gate and dup over up: one temporary of their size."""
    dup = _activated(gate, activation).mul_(dy)
    _activation_backward(up.mul_(dy), gate, activation, out=gate)
    up.copy_(dup)


def _activated(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate=activation.removeprefix("gelu_"))


def _activation_backward(
    dy: torch.Tensor, gate: torch.Tensor, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    if activation == "silu":
        run, options = torch.ops.aten.silu_backward, {}
    else:
        run, options = torch.ops.aten.gelu_backward, {"approximate": activation.removeprefix("gelu_")}
    return run(dy, gate, **options) if out is None else run.grad_input(dy, gate, **options, grad_input=out)


# ---------------------------------------------------------------- rotary embedding


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, H, T, d) with the first r of each d rotated, half-split; cos, sin (B or 1, T, r).

        y[i]       = x[i] * cos[i] - x[i + r/2] * sin[i]                  0 <= i < r/2
        y[i + r/2] = x[i + r/2] * cos[i + r/2] + x[i] * sin[i + r/2]

    transposed: the transpose of that map (the backward); `out`: where to write, x itself for in place, else a new
    (B, T, H, d) tensor seen as (B, H, T, d), the layout of a projection's output. In the dtype that x and cos promote
    to, each operation rounded as transformers' apply_rotary_pos_emb rounds it, then cast to x's.
    """
    r = cos.shape[-1]
    half = r // 2
    if out is None:
        out = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    a, b = x[..., :half], x[..., half:r]
    (cos_a, cos_b), (sin_a, sin_b) = (t[:, None].split(half, -1) for t in (cos, sin))
    if transposed:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    out[..., :half] = first
    out[..., half:r] = second
    if out is not x and r < x.shape[-1]:
        out[..., r:] = x[..., r:]
    return out
