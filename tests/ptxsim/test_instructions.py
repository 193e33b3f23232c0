"""What single instructions give, where it is not plain: the PTX manual's rules for NaN, widths, signs and rounding."""

import ctypes

import numpy as np
import pytest
import torch

from ptxsim import Fault, Global, Kernel, Machine, pack, values

KERNEL = """
.visible .entry kernel(.param .u64 in, .param .u64 out)
.reqntid 32
{{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<9>;
  .reg .f32 %f<9>;
  .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [in];
  ld.param.b64 %rd2, [out];
  ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
  ld.global.v2.b64 {{%rd3, %rd4}}, [%rd1];
  mov.b32 %f1, %r1;
  mov.b32 %f2, %r2;
  mov.b32 %f3, %r3;
  {body}
  st.global.b32 [%rd2], %r1;
  ret;
}}
"""
NAN, INF = float("nan"), float("inf")


def bits(value):
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value & 0xFFFFFFFF


def run(body, *inputs):
    """The bits that `body` leaves in %r1; inputs are in %r1, %r2, ... and %f1, %f2, ..."""
    x = np.array([bits(v) for v in inputs] + [0] * (4 - len(inputs)), np.uint32)
    out, memory = np.zeros(1, np.uint32), Global()
    addresses = [memory.add(a.view(np.uint8)) for a in (x, out)]
    kernel = Kernel(KERNEL.format(body=body))
    Machine(kernel).launch(1, pack(kernel, addresses), memory)
    return int(out[0])


@pytest.mark.parametrize(
    "op, inputs, expected",
    [
        ("shl.b32 %r1, %r1, %r2", (3, 31), 1 << 31),
        ("shl.b32 %r1, %r1, %r2", (3, 32), 0),
        ("shr.u32 %r1, %r1, %r2", (-1, 40), 0),
        ("shr.s32 %r1, %r1, %r2", (-5, 1), -3),
        ("shr.s32 %r1, %r1, %r2", (-5, 40), -1),
        ("div.s32 %r1, %r1, %r2", (-7, 2), -3),
        ("rem.s32 %r1, %r1, %r2", (-7, 2), -1),
        ("div.u32 %r1, %r1, %r2", (-7, 2), 0x7FFFFFFC),
        ("mul.hi.u32 %r1, %r1, %r2", (-1, -1), -2),
        ("mul.hi.s32 %r1, %r1, %r2", (-1, 5), -1),
        ("mul.lo.s32 %r1, %r1, %r2", (1 << 20, 1 << 13), 0),
        ("mad.lo.s32 %r1, %r1, %r2, %r3", (-3, 5, 7), -8),
        ("mul.wide.s32 %rd5, %r1, %r2; shr.s64 %rd5, %rd5, 32; cvt.u32.u64 %r1, %rd5", (-3, 5), -1),
        ("mad.wide.u32 %rd5, %r1, %r2, %rd3; cvt.u32.u64 %r1, %rd5", (3, 5), 18),
        ("bfe.u32 %r1, %r1, %r2, %r3", (0b1011000, 3, 3), 0b011),
        ("bfe.s32 %r1, %r1, %r2, %r3", (0b1111000, 3, 3), -1),
        ("bfe.s32 %r1, %r1, %r2, %r3", (-1, 3, 0), 0),
        ("bfe.u32 %r1, %r1, %r2, %r3", (-1, 40, 8), 0),
        ("min.s32 %r1, %r1, %r2", (-1, 1), -1),
        ("min.u32 %r1, %r1, %r2", (-1, 1), 1),
        ("max.f32 %r1, %f1, %f2", (NAN, 1.0), bits(1.0)),
        ("max.NaN.f32 %r1, %f1, %f2", (NAN, 1.0), bits(NAN)),
        ("cvt.rzi.s32.f32 %r1, %f1", (-2.75,), -2),
        ("cvt.rni.s32.f32 %r1, %f1", (2.5,), 2),
        ("cvt.rzi.s32.f32 %r1, %f1", (1e20,), 2**31 - 1),
        ("cvt.rzi.s32.f32 %r1, %f1", (NAN,), 0),
        ("cvt.rn.bf16x2.f32 %r1, %f1, %f2", (2.0, 1.0), 0x40003F80),
        ("cvt.rn.f32.s32 %r1, %r1", (-16777217,), bits(-16777216.0)),
        ("abs.f32 %r1, %f1", (-0.0,), 0),
        ("neg.s32 %r1, %r1", (5,), -5),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r1, {%h2, %h1}", (0x12345678,), 0x56781234),
        ("cvt.s64.s32 %rd5, %r1; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r1, %rd5", (-1,), -1),
        ("add.bf16x2 %r1, %r1, %r2", (0x3F804000, 0x3F803F80), 0x40004040),
        ("not.b32 %r1, %r1", (0,), -1),
    ],
)
def test_results(op, inputs, expected):
    assert run(op + ";", *inputs) == bits(expected)


@pytest.mark.parametrize(
    "compare, a, b, expected",
    [("lt", 1.0, NAN, 0), ("ltu", 1.0, NAN, 1), ("ne", 1.0, NAN, 0), ("neu", 1.0, NAN, 1), ("eq", NAN, NAN, 0)]
    + [("num", 1.0, 2.0, 1), ("num", NAN, 2.0, 0), ("nan", NAN, 2.0, 1), ("ge", INF, INF, 1), ("equ", NAN, 1.0, 1)],
)
def test_comparisons(compare, a, b, expected):
    assert run(f"setp.{compare}.f32 %p1|%p2, %f1, %f2; selp.b32 %r1, 1, 0, %p1;", a, b) == expected
    assert run(f"setp.{compare}.f32 %p1|%p2, %f1, %f2; selp.b32 %r1, 1, 0, %p2;", a, b) == 1 - expected


def test_guards_and_signed_comparisons():
    assert run("setp.lt.s32 %p1, %r1, %r2; @%p1 mov.b32 %r1, 7;", -1, 1) == 7
    assert run("setp.lt.u32 %p1, %r1, %r2; @%p1 mov.b32 %r1, 7;", -1, 1) == bits(-1)
    assert run("setp.lo.u32 %p1, %r1, %r2; @!%p1 mov.b32 %r1, 7;", -1, 1) == 7


def test_fma_rounds_once():
    """As the C library's, for products and sums that cancel, too."""
    libm = ctypes.CDLL("libm.so.6").fmaf
    libm.restype, libm.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = np.random.default_rng(0).normal(size=(3, 3000)).astype(np.float32)
    c[::2] = -(a * b)[::2] * (1 + np.float32(2**-23))
    expected = np.array([libm(*map(float, numbers)) for numbers in zip(a, b, c)], np.float32)
    assert np.array_equal(values.fma(a, b, c), expected)
    assert (values.fma(a, b, c) != a * b + c).any()
    assert run("fma.rn.f32 %r1, %f1, %f2, %f3;", float(a[0]), float(b[0]), float(c[0])) == bits(float(expected[0]))


@pytest.mark.parametrize("type_, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_are_torchs(type_, dtype):
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    x[:8] = [0.0, -0.0, INF, -INF, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 6e-8]  # ties, the largest, the smallest
    half = torch.from_numpy(x).to(dtype)
    ours = values.encode(x, type_)
    assert np.array_equal(ours.view(np.int16), half.view(torch.int16).numpy())
    assert np.array_equal(values.decode(ours, type_), half.float().numpy())
    assert np.isnan(values.decode(values.encode(np.array([NAN], np.float32), type_), type_)).all()


def test_what_is_not_known_is_a_fault_only_where_it_is_run():
    assert run("setp.ne.s32 %p1, %r1, %r1; @%p1 tcgen05.ld.sync %r1;", 5) == 5
    with pytest.raises(Fault, match="not an instruction that is known"):
        run("tcgen05.ld.sync %r1;", 5)
