"""The head and a weighted negative log-likelihood in plain torch: the truth for the kernel, and the path on a CPU.

Index letters: R labelled rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

# Elements of one chunk of logits, (rows, V). In `linear_loss` a chunk is one tensor, and each chunk reads the head's
# weight twice: 682 rows for a vocabulary of 49152, 261 for 128256. Elsewhere a chunk is several tensors.
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
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None else d_bias.to(bias.dtype)
    return loss, nll, d_hidden, d_weight, d_bias
