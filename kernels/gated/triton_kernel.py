"""Gated activations, forward and backward: y = act(gate) * up, with act = SiLU (SwiGLU) or GELU (GeGLU).

    silu(g)      = g * s(g)                                    s(g) = 1 / (1 + exp(-g))
    gelu_tanh(g) = g * s(2 * c * (g + a * g^3))                c = sqrt(2 / pi), a = 0.044715; s(2z) = (1 + tanh(z)) / 2
    gelu_none(g) = g * Phi(g)                                  Phi(g) = 0.5 * (1 + erf(g / sqrt(2)))
    dgate = dy * up * act'(gate)        dup = dy * act(gate)

Index letters: R rows (all leading dimensions), N columns. Never in memory: act(gate), which the backward computes
again, and dy * up. The backward may write dgate over gate and dup over up: a program loads its elements before it
stores any, and no other program touches them.

Bytes for n = R*N elements of e bytes: forward 3*n*e, backward 5*n*e (3*n*e for dup alone, 4*n*e for dgate alone);
about 10 FLOPs an element forward and 20 backward, so memory-bound: 0.3 FLOPs a byte of what an H200 could do.
Precision: every input is widened to fp32, all arithmetic is fp32, each result is rounded once.
Deterministic: no sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..launch import Call
from ..tiles import cdiv, next_power_of_2

# 8 elements a thread with 4 warps: one 16-byte access a tensor in half precision, two in fp32. A multiprocessor's 2048
# threads then have 64 KiB (forward) on their way, where 4.8 TB/s at 700 ns of latency ask for 25 KiB.
BLOCK = 1024
NUM_WARPS = 4

# ---------------------------------------------------------------- inside a program


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in fp32; what is not used costs nothing."""
    if ACTIVATION == "gelu_none":
        p = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * p, p + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        z, dz = g, 1.0
        if ACTIVATION == "gelu_tanh":
            z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        s = 1.0 / (1.0 + tl.exp(-z))
        return g * s, s + g * s * (1.0 - s) * dz


@triton.jit
def _columns(N, blocks, BLOCK: tl.constexpr):
    """(row, columns, which of them exist) of this program; int64: one row may be all of a tensor."""
    row = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), columns, columns < N


# ---------------------------------------------------------------- the kernels


@triton.jit
def gated_kernel(gate, up, y, N, blocks, stride_gr, stride_gn, stride_ur, stride_un, stride_yr, stride_yn,
                 ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: BLOCK columns of one row."""
    row, columns, inside = _columns(N, blocks, BLOCK)
    g = tl.load(gate + row * stride_gr + columns * stride_gn, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_ur + columns * stride_un, mask=inside, other=0.0).to(tl.float32)
    a, _ = _activation(g, ACTIVATION)
    tl.store(y + row * stride_yr + columns * stride_yn, (a * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(dy, gate, up, dgate, dup, N, blocks, stride_yr, stride_yn, stride_gr, stride_gn, stride_ur,
                          stride_un, stride_dgr, stride_dgn, stride_dur, stride_dun, ACTIVATION: tl.constexpr,
                          COMPUTE_DGATE: tl.constexpr, COMPUTE_DUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: BLOCK columns of one row. dgate may be gate and dup may be up."""
    row, columns, inside = _columns(N, blocks, BLOCK)
    d = tl.load(dy + row * stride_yr + columns * stride_yn, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gr + columns * stride_gn, mask=inside, other=0.0).to(tl.float32)
    a, slope = _activation(g, ACTIVATION)
    if COMPUTE_DGATE:
        u = tl.load(up + row * stride_ur + columns * stride_un, mask=inside, other=0.0).to(tl.float32)
        into = dgate + row * stride_dgr + columns * stride_dgn
        tl.store(into, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
    if COMPUTE_DUP:
        tl.store(dup + row * stride_dur + columns * stride_dun, (d * a).to(dup.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- launchers


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as (R, N), copied if its strides require it; as one row if all are contiguous, so that blocks are full."""
    shape = tensors[0].shape
    flat = all(x.is_contiguous() for x in tensors)
    return [x.reshape((1, x.numel()) if flat else (math.prod(shape[:-1]), shape[-1])) for x in tensors]


def _launch(kernel, tensors: dict[str, torch.Tensor], strides: str, constexprs: dict) -> Call:
    """`tensors`: each (R, N). `strides`: the letters that their stride arguments go by, in order."""
    R, N = next(iter(tensors.values())).shape
    block = min(BLOCK, next_power_of_2(max(N, 1)))
    blocks = cdiv(N, block)
    arguments = dict(tensors, N=N, blocks=blocks)
    for letters, x in zip(strides.split(), tensors.values()):
        arguments |= {f"stride_{letters}r": x.stride(0), f"stride_{letters}n": x.stride(1)}
    return Call(kernel, (R * blocks,), arguments, constexprs | {"BLOCK": block}, NUM_WARPS, num_stages=1)


def call_forward(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, activation: str) -> Call:
    """The launch that writes y."""
    gate, up, y = _rows(gate, up, y)
    return _launch(gated_kernel, dict(gate=gate, up=up, y=y), "g u y", dict(ACTIVATION=activation))


def call_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    activation: str,
) -> Call:
    """What is None is not computed. dgate and dup must be viewable as rows: they are written through the view."""
    wanted = {"COMPUTE_DGATE": dgate is not None, "COMPUTE_DUP": dup is not None}
    # an argument that is not there is never touched: gate again
    names = ("dy", "gate", "up", "dgate", "dup")
    rows = _rows(*(gate if x is None else x for x in (dy, gate, up, dgate, dup)))
    return _launch(gated_backward_kernel, dict(zip(names, rows)), "y g u dg du", dict(ACTIVATION=activation) | wanted)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`reference.gated` by the kernel: bf16, fp16 or fp32, any strides."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    call_forward(gate, up, y, activation).launch()
    return y


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    """`reference.gated_backward` by the kernel: those of (dgate, dup) that are needed."""
    made = [torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(need_gate + need_up)]
    dgate = made[0] if need_gate else None
    dup = made[-1] if need_up else None
    if made:
        call_backward(dy, gate, up, dgate, dup, activation).launch()
    return made


def packed_backward(dy: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Both gradients in one tensor (..., 2*N), dgate in the first half."""
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    call_backward(dy, *gate_up.chunk(2, -1), *out.chunk(2, -1), activation).launch()
    return out


def backward_(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """`reference.gated_backward_` by the kernel: dgate over gate, dup over up, which must be viewable as (R, N)."""
    for x in (gate, up):
        x.view(math.prod(x.shape[:-1]), x.shape[-1])  # raises where a copy would be written to and lost
    call_backward(dy, gate, up, gate, up, activation).launch()


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, False: no matrix products) for every activation, set of gradients and layout in bf16; fp16, which
    differs in its conversions, and fp32, with an odd shape, once each way."""

    def tensor(rows, columns, dtype):
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    for activation in ("silu", "gelu_tanh", "gelu_none"):
        for name, dtype, (R, N) in (
            ("bf16", torch.bfloat16, (512, 14336)),
            ("fp16", torch.float16, (512, 14336)),
            ("fp32", torch.float32, (63, 123)),
        ):
            gate, up, dy = (tensor(R, N, dtype) for _ in range(3))
            packed = tensor(R, 2 * N, dtype).chunk(2, -1)
            label = f"gated {activation} {name} {R}x{N}"
            yield f"{label} forward", call_forward(gate, up, dy, activation), False
            yield f"{label} backward", call_backward(dy, gate, up, gate, up, activation), False
            if name == "bf16":
                yield f"{label} forward packed", call_forward(*packed, dy, activation), False
                yield f"{label} backward packed", call_backward(dy, *packed, *packed, activation), False
                yield f"{label} backward of gate", call_backward(dy, gate, up, gate, None, activation), False
                yield f"{label} backward of up", call_backward(dy, gate, None, None, up, activation), False
