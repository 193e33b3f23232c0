"""RMSNorm and LayerNorm in plain torch: the truth for the kernels, and the path on a CPU.

x, residual and h (..., D), weight and bias (D,). Computed in fp32, in fp64 for fp64 inputs (transformers' own modules
round those to fp32). h = x + residual is rounded to its dtype before its statistics are taken, as unfused code does.
"""

from __future__ import annotations

import torch


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    llama: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y, h, mean (None without `center`) and rstd, both (..., 1), with h = x + residual (x itself without one):

    mean = h.mean(-1) with `center`, else 0                                             # all in fp32
    rstd = rsqrt((h - mean).pow(2).mean(-1) + eps);  x_hat = (h - mean) * rstd
    y = (x_hat * (offset + weight.float()) + bias).to(out_dtype)
    llama: y = (offset + weight) * x_hat.to(h.dtype), in torch's promotion of both: out_dtype
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    x_hat, mean = h.to(wide), None
    if center:
        mean = h.mean(-1, keepdim=True, dtype=wide)
        x_hat = x_hat - mean
    rstd = torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = x_hat * rstd
    if llama:
        return _offset(weight, offset) * x_hat.to(h.dtype), h, mean, rstd
    y = x_hat.mul_(_offset(weight.to(wide), offset))
    if bias is not None:
        y.add_(bias)
    return y.to(out_dtype), h, mean, rstd


def norm_backward(
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
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx in h's dtype, dw and db in fp32 (fp64). Weight is read for dx alone; for db alone nothing but dy is.

    g = dy * (offset + weight);  x_hat = (h - mean) * rstd
    dx = dh + rstd * (g - g.mean(-1) - x_hat * (g * x_hat).mean(-1))        # without a mean no g.mean(-1)
    dw = sum over rows of dy * x_hat;  db = sum over rows of dy
    dh is the gradient that reaches h by itself. What rounding to a narrow dtype does has no gradient.
    """
    wide = _wide(dy)
    dy = dy.to(wide)
    db = dy.reshape(-1, dy.shape[-1]).sum(0) if compute_db else None
    if not (compute_dx or compute_dw):
        return None, None, db
    x_hat = (h.to(wide) if mean is None else h.to(wide) - mean) * rstd
    dw = (dy * x_hat).reshape(-1, dy.shape[-1]).sum(0) if compute_dw else None
    if not compute_dx:
        return None, dw, db
    g = dy * _offset(weight.to(wide), offset)
    product_mean = (g * x_hat).mean(-1, keepdim=True)
    if mean is not None:
        g.sub_(g.mean(-1, keepdim=True))
    dx = g.sub_(x_hat.mul_(product_mean)).mul_(rstd)
    return (dx if dh is None else dx.add_(dh)).to(h.dtype), dw, db


def empty_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, of x's shape and, where x's rows lie whole (stride 1) and dense, x's order of dimensions."""
    out = torch.empty_like(x, dtype=dtype)
    return out if out.stride(-1) == 1 else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _wide(x: torch.Tensor) -> torch.dtype:
    """What statistics and sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _offset(weight: torch.Tensor, offset: float) -> torch.Tensor:
    return weight if offset == 0 else offset + weight
