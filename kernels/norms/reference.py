"""RMSNorm and LayerNorm in plain torch: the truth for the kernels, and the path on a CPU.

x, residual and h (..., D), weight and bias (D,). Computed in fp32, in fp64 for fp64 inputs (transformers' own modules
round those to fp32). h = x + residual is rounded to its dtype before its statistics are taken, as unfused code does.
"""

from __future__ import annotations

import torch

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
