"""Rotary position embedding of queries and keys in one launch, in place or not, and its transpose (the backward).

For x (B, H, T, d), cos and sin (B or 1, T, r), r <= d, half-split (feature i is paired with i + r/2, 0 <= i < r/2):

    y[i] = x[i] * cos[i] - x[i+r/2] * sin[i]            y[i+r/2] = x[i+r/2] * cos[i+r/2] + x[i] * sin[i+r/2]
    transposed: dx[i] = dy[i] * cos[i] + dy[i+r/2] * sin[i+r/2]    dx[i+r/2] = dy[i+r/2] * cos[i+r/2] - dy[i] * sin[i]

and features r to d unchanged. The backward is the transpose, not the inverse: cos and sin may carry a factor (YaRN).

Index letters: B batch, H heads (of q and of k: grouped), T tokens, d features a head, r of them rotated.
Never in memory: rotate_half(x) and the two products.

Bytes for n = B*T*d*(Hq + Hkv) elements of e bytes: 2*n*e (in place 2*n*e*r/d), and cos and sin once a block of heads,
from the L2 cache; 3 FLOPs an element: memory-bound.
Precision: inputs are widened to fp32, all arithmetic is fp32, each result is rounded once.
Deterministic: no sums but the two terms. In place: a program loads its elements before it stores any, and no other
program touches them.
Source: arXiv 2104.09864; conventions of transformers' apply_rotary_pos_emb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ..launch import Call
from ..tiles import cdiv, next_power_of_2
from . import reference

# Elements of one half of a program's heads: 8 a thread with 4 warps, a 16-byte access in half precision. For d = 128,
# 16 heads of one token share the cos and sin that the program loads.
TILE = 1024
NUM_WARPS = 4


# ---------------------------------------------------------------- inside a program


@triton.jit
def _rotate(x, y, first, H, d, b, t, half, cos_a, sin_a, cos_b, sin_b, stride_xb, stride_xh, stride_xt, stride_xd,
            stride_yb, stride_yh, stride_yt, stride_yd, TRANSPOSED: tl.constexpr, COPY: tl.constexpr,
            BH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Heads `first` to first + BH of token (b, t). cos_a, ...: (1, BR), of the first and the second half of r."""
    heads = (first + tl.arange(0, BH))[:, None]
    features = tl.arange(0, BR)[None, :]
    mask = (heads < H) & (features < half)
    x += b * stride_xb + t * stride_xt + heads.to(tl.int64) * stride_xh
    y += b * stride_yb + t * stride_yt + heads.to(tl.int64) * stride_yh
    early = features.to(tl.int64)
    late = early + half
    xa = tl.load(x + early * stride_xd, mask=mask, other=0.0).to(tl.float32)
    xb = tl.load(x + late * stride_xd, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        ya, yb = xa * cos_a + xb * sin_b, xb * cos_b - xa * sin_a
    else:
        ya, yb = xa * cos_a - xb * sin_a, xb * cos_b + xa * sin_b
    tl.store(y + early * stride_yd, ya.to(y.dtype.element_ty), mask=mask)
    tl.store(y + late * stride_yd, yb.to(y.dtype.element_ty), mask=mask)
    if COPY:
        rest = 2 * half + tl.arange(0, BC)[None, :].to(tl.int64)
        mask = (heads < H) & (rest < d)
        tl.store(y + rest * stride_yd, tl.load(x + rest * stride_xd, mask=mask), mask=mask)


# ---------------------------------------------------------------- the kernel


@triton.jit
def rotary_kernel(x0, y0, x1, y1, cos, sin, T, H0, H1, half, d, blocks0, blocks, stride_x0b, stride_x0h, stride_x0t,
                  stride_x0d, stride_y0b, stride_y0h, stride_y0t, stride_y0d, stride_x1b, stride_x1h, stride_x1t,
                  stride_x1d, stride_y1b, stride_y1h, stride_y1t, stride_y1d, stride_cb, stride_ct, stride_cr,
                  TRANSPOSED: tl.constexpr, COPY: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
                  BC: tl.constexpr):  # fmt: skip
    """One program: BH heads of one token, of the first tensor (blocks0 blocks of heads) or the second. y may be x."""
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    features = tl.arange(0, BR)[None, :]
    inside = features < half
    early = b * stride_cb + t * stride_ct + features.to(tl.int64) * stride_cr
    late = b * stride_cb + t * stride_ct + (features.to(tl.int64) + half) * stride_cr
    cos_a = tl.load(cos + early, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + early, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + late, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + late, mask=inside, other=0.0).to(tl.float32)
    # two branches, not one with chosen strides: those of one tensor may be constants where the other's are not
    if block < blocks0:
        _rotate(x0, y0, block * BH, H0, d, b, t, half, cos_a, sin_a, cos_b, sin_b, stride_x0b, stride_x0h, stride_x0t,
                stride_x0d, stride_y0b, stride_y0h, stride_y0t, stride_y0d, TRANSPOSED, COPY, BH, BR, BC)  # fmt: skip
    else:
        _rotate(x1, y1, (block - blocks0) * BH, H1, d, b, t, half, cos_a, sin_a, cos_b, sin_b, stride_x1b, stride_x1h,
                stride_x1t, stride_x1d, stride_y1b, stride_y1h, stride_y1t, stride_y1d,
                TRANSPOSED, COPY, BH, BR, BC)  # fmt: skip


# ---------------------------------------------------------------- launchers


def call_rotate(
    xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> Call:
    """The launch that rotates each x (B, H, T, d) into its y: one tensor or two, which differ in H alone."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    B, _, T, d = xs[0].shape
    r = cos.shape[-1]
    BR = next_power_of_2(max(r // 2, 1))
    BH = min(max(1, TILE // BR), next_power_of_2(max(1, *(x.shape[1] for x in xs))))
    counts = [cdiv(x.shape[1], BH) for x in xs]
    arguments = dict(cos=cos, sin=sin, T=T, half=r // 2, d=d, blocks0=counts[0], blocks=sum(counts))
    for p in range(2):  # a second tensor that is not there has no programs: the first one again
        x, y = xs[min(p, len(xs) - 1)], ys[min(p, len(xs) - 1)]
        arguments |= {f"x{p}": x, f"y{p}": y, f"H{p}": x.shape[1]}
        for name, tensor in ((f"x{p}", x), (f"y{p}", y)):
            arguments |= {f"stride_{name}{letter}": stride for letter, stride in zip("bhtd", tensor.stride())}
    arguments |= dict(
        stride_cb=cos.stride(0) if cos.shape[0] > 1 else 0, stride_ct=cos.stride(1), stride_cr=cos.stride(2)
    )
    copy = r < d and any(x is not y for x, y in zip(xs, ys))
    constexprs = dict(TRANSPOSED=transposed, COPY=copy, BH=BH, BR=BR, BC=next_power_of_2(max(d - r, 1)))
    return Call(rotary_kernel, (B * T * sum(counts),), arguments, constexprs, NUM_WARPS, num_stages=1)


def rotate(xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, transposed: bool) -> list[torch.Tensor]:
    """`reference.rotary` of one tensor or two by the kernel: new tensors."""
    ys = [reference.empty(x) for x in xs]
    call_rotate(xs, ys, cos, sin, transposed).launch()
    return ys


def rotate_(xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`reference.rotary(x, cos, sin, out=x)` of one tensor or two by the kernel."""
    call_rotate(xs, xs, cos, sin, False).launch()


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, False: no matrix products): full and partial rotation, grouped heads, in place and not, one and
    two tensors in bf16; fp16 with fp32 cos and sin, and fp32, once each way."""

    def tensor(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    half, single = torch.bfloat16, torch.float32
    for name, dtype, table, (T, Hq, Hkv, d, r) in (
        ("bf16", half, half, (512, 32, 8, 128, 128)),  # Llama-3
        ("bf16", half, half, (512, 24, 8, 128, 96)),  # Phi-4-mini's share
        ("fp16", torch.float16, single, (512, 32, 8, 128, 128)),
        ("fp32", single, single, (63, 3, 1, 123, 62)),
    ):
        xs, ys = ([tensor(2, T, H, d, dtype=dtype).transpose(1, 2) for H in (Hq, Hkv)] for _ in range(2))
        cos = tensor(1, T, r, dtype=table)
        label = f"rotary {name} T={T} heads {Hq}/{Hkv} d={d} r={r}"
        yield f"{label} forward", call_rotate(xs, ys, cos, cos, False), False
        yield f"{label} backward", call_rotate(xs, ys, cos, cos, True), False
        if name == "bf16":
            yield f"{label} in place", call_rotate(xs, xs, cos, cos, False), False
            yield f"{label} backward of one", call_rotate(xs[:1], ys[:1], cos, cos, True), False
