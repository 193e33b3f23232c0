"""Rotary position embedding in plain torch: the truth for the kernels, and the path on a CPU."""

from __future__ import annotations

import torch


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, H, T, d) with the first r of each d rotated, half-split; cos, sin (B or 1, T, r).

        y[i]       = x[i] * cos[i] - x[i + r/2] * sin[i]                  0 <= i < r/2
        y[i + r/2] = x[i + r/2] * cos[i + r/2] + x[i] * sin[i + r/2]

    transposed: the transpose of that map (the backward); `out`: where to write, x itself for in place, else `empty(x)`.
    In the dtype that x and cos promote
    to, each operation rounded as transformers' apply_rotary_pos_emb rounds it, then cast to x's.
    """
    r = cos.shape[-1]
    half = r // 2
    if out is None:
        out = empty(x)
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


def empty(x: torch.Tensor) -> torch.Tensor:
    """Of x's shape (B, H, T, d), uninitialised; in memory (B, T, H, d), the layout of a projection's output."""
    B, H, T, d = x.shape
    return x.new_empty((B, T, H, d)).transpose(1, 2)
