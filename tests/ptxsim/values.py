"""Bits in registers <-> the numbers that an instruction's type says they are."""

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UNSIGNED_OF_BYTES = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
UNSIGNED = {"u8": U8, "u16": U16, "u32": U32, "u64": U64, "b8": U8, "b16": U16, "b32": U32, "b64": U64}
FLOAT = {"f32": np.float32, "f64": np.float64}
HALF = ("bf16", "f16")
# the dtype of a register of each type: PTX has none of 8 bits
REGISTER = {"pred": np.dtype(bool)}
REGISTER |= {k: np.dtype(UNSIGNED_OF_BYTES[max(2, int(k[1:]) // 8)]) for k in (*SIGNED, *UNSIGNED, *FLOAT, "f16")}
REGISTER |= {"bf16": np.dtype(U16)}


class Fault(Exception):
    """What a GPU would do wrong, or might."""


def num_bytes(type_):
    """Of one value in memory: 4 for "f32"."""
    return int(type_.lstrip("busf")) // 8


def is_float(type_):
    return type_ in FLOAT or type_ in HALF


def to_bf16(x):
    """fp32 -> the bits of the nearest bf16, ties to even; one NaN."""
    b = np.ascontiguousarray(x, np.float32).view(U32)
    return np.where(x != x, U16(0x7FFF), ((b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)).astype(U16))


def to_fp16(x):
    return np.where(x != x, U16(0x7FFF), np.ascontiguousarray(x, np.float32).astype(np.float16).view(U16))


def decode(bits, type_):
    """The numbers that registers' bits stand for. Halves become fp32."""
    if type_ in FLOAT:
        return bits.view(FLOAT[type_])
    if type_ == "bf16":
        return (bits.astype(U32) << U32(16)).view(np.float32)
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type_ in SIGNED:
        return bits.astype(UNSIGNED["u" + type_[1:]]).view(SIGNED[type_])
    return bits if bits.dtype == bool else bits.astype(UNSIGNED[type_])


def encode(x, type_):
    """The bits that a register of this type holds for the numbers x."""
    if type_ == "bf16":
        return to_bf16(x)
    if type_ == "f16":
        return to_fp16(x)
    if type_ in FLOAT:
        return np.ascontiguousarray(x, FLOAT[type_]).view(REGISTER[type_])
    if type_ in SIGNED:
        x = x.astype(SIGNED[type_]).view(UNSIGNED["u" + type_[1:]])
    return x.astype(REGISTER[type_])


def fma(a, b, c):
    """a * b + c of fp32, rounded once: the product is exact in fp64, and the sum there is rounded to odd."""
    p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    inexact = np.isfinite(s) & (error != 0) & ((s.view(U64) & U64(1)) == 0)
    return np.where(inexact, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s).astype(np.float32)
