"""The plain-torch form of every operation: the truth that kernels are tested against, and the path on a CPU.

Index letters: B samples, T tokens, R labelled rows, D hidden size, N out features, K in features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# ---------------------------------------------------------------- gradient density

# Bytes of one tile of dW. A tile that fits a core's second-level cache is read back from there for its norm.
DENSITY_TILE_BYTES = 1 << 20


def weight_gradient_tiles(
    x: torch.Tensor, dy: torch.Tensor, tile_bytes: int = DENSITY_TILE_BYTES
) -> Iterator[torch.Tensor]:
    """Row tiles of `dy.T @ x`, (N, K), for one sample: x (T, K), dy (T, N). The buffer is used again for each tile."""
    rows = max(1, tile_bytes // (x.shape[1] * x.element_size()))
    buffer = torch.empty(min(rows, dy.shape[1]), x.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, dy.shape[1], rows):
        part = dy[:, start : start + rows]
        yield torch.mm(part.t(), x, out=buffer[: part.shape[1]])


def grad_l1(x: torch.Tensor, dy: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """L1 norm of each sample's weight gradient of `y = x @ W.T`, never more than one tile of dW in memory.

    Returns (B,) float64, entry i = `(dy_i.T @ x_i).abs().sum()` over sample i's own rows (absolute value after the
    sum over tokens). x (T, K), dy (T, N), packed; `lengths`: B ints whose sum is T. Products in fp32 for half
    precision inputs, else in the input's dtype. 2*T*N*K FLOPs, T*(N+K) elements read.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x, dy = x.float(), dy.float()
    out = torch.zeros(len(lengths), dtype=torch.float64, device=x.device)
    start = 0
    for i, length in enumerate(lengths):
        if length:
            sample = slice(start, start + length)
            for tile in weight_gradient_tiles(x[sample], dy[sample]):
                out[i] += tile.abs_().sum()  # summed pairwise; linalg.vector_norm is slower and loses digits
        start += length
    return out


# ---------------------------------------------------------------- head and loss

# Elements of one chunk of logits, (rows, V).
LOGITS_CHUNK = 1 << 23


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
    nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
    rows = max(1, LOGITS_CHUNK // weight.shape[0])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        x = hidden[part]
        logits = torch.nn.functional.linear(x, weight, bias).to(wide)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits = torch.tanh_(logits.div_(softcap)).mul_(softcap)
        log_z = torch.logsumexp(logits, 1)
        target = targets[part, None]
        nll[part] = log_z - logits.gather(1, target).squeeze(1)
        if not (need_hidden or need_weight or need_bias):
            continue
        w = row_weights[part].to(wide)
        if nll_cap is not None:  # clamp(max=cap) has no slope beyond the cap
            w = torch.where(nll[part] < nll_cap[part], w, 0.0)
        slope = None if softcap is None else (1 - (logits / softcap) ** 2)
        d_logits = torch.exp_(logits.sub_(log_z[:, None]))
        d_logits.scatter_add_(1, target, torch.full_like(d_logits[:, :1], -1.0))
        d_logits *= w[:, None] if scale == 1.0 else (w * scale)[:, None]
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
) -> None:
    """One Lion step in place (arXiv 2302.06675, algorithm 2): all tensors of one shape.

    param -= lr * (sign(beta1 * momentum + (1 - beta1) * grad) + weight_decay * param)
    momentum = beta2 * momentum + (1 - beta2) * grad
    """
    update = torch.lerp(momentum, grad.to(momentum.dtype), 1 - beta1).sign_()
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.add_(update.to(param.dtype), alpha=-lr)
    momentum.lerp_(grad.to(momentum.dtype), 1 - beta2)
