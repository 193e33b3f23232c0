"""fp32 values to what they are stored as: to nearest, or stochastically to bf16. For use inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x.to(dtype)`, x fp32, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts bits off instead
        bits = x.to(tl.int32, bitcast=True)
        even = ((bits + (0x7FFF + ((bits >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, even, x)
    return x.to(dtype)


@triton.jit
def narrow_stochastically(x, bits):
    """x, fp32, as one of its two neighbours in bf16, and on average over random int32 `bits` as x. Still in fp32.

    16 random bits are added below bf16's last place, and what is below it is cut off.
    """
    up = (x.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -65536
    return tl.where(x == x, up.to(tl.float32, bitcast=True), x)  # the bits of NaN could overflow to a number


@triton.jit
def random_bits(first, seed, step, BLOCK: tl.constexpr):
    """Random int32 for the BLOCK places from `first`, int64 and a multiple of 4. See `reference.random_bits`."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, low * 0 + step, low * 0)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.int32, bitcast=True)
