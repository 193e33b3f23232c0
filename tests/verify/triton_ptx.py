"""Launches of the Triton kernels for sentryward: compiled ahead of time, with the arguments that a launch has.

Tensors are on the meta device; one tensor given twice is one object in memory. Integers are constants of a launch, and
so are the values of `cu_seqlens`, which say how far the kernel loops: it is given as a list.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
from launches import Launch
from triton.backends.compiler import GPUTarget

from kunbr_fast.kernels import aot
from kunbr_fast.kernels import tiles as config
from kunbr_fast.kernels.gated import triton_kernel as gated
from kunbr_fast.kernels.grad_density import triton_kernel as grad_density
from kunbr_fast.kernels.launch import Call
from kunbr_fast.kernels.linear_loss import triton_kernel as linear_loss
from kunbr_fast.kernels.norms import triton_kernel as norms
from kunbr_fast.kernels.optimizers import triton_kernel as optimizers
from kunbr_fast.kernels.rotary import triton_kernel as rotary

BF16, FP32 = torch.bfloat16, torch.float32
_SCALARS = {"i32": "u32", "i64": "u64", "fp32": "f32"}  # as the compiler declares them


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ptx_of(call: Call, architecture: int) -> tuple[str, int]:
    """The kernel's PTX and bytes of shared memory."""
    options = dict(target=GPUTarget("cuda", architecture, 32), options=call.options)
    compiled = triton.compile(aot.source(call), **options)
    return compiled.asm["ptx"], compiled.metadata.shared


def describe(call: Call, architecture: int, offsets: Sequence[int]) -> tuple[str, dict]:
    """(PTX, sentryward's description of the launch). offsets: the values of cu_seqlens."""
    ptx, shared = ptx_of(call, architecture)
    signature = aot.source(call).signature
    names = [name for name in call.kernel.arg_names if signature[name] != "constexpr"]
    entry = call.kernel.__name__
    objects, declarations, arguments, arrays = {}, [], [], []
    for place, name in enumerate(names):
        parameter, value = f"{entry}_param_{place}", call.arguments[name]
        if name == "cu_seqlens":
            arrays.append({"parameter": parameter, "shapes": [list(offsets)]})
        elif isinstance(value, torch.Tensor):
            object_name = objects.setdefault(id(value), name)
            declarations.append(dict(parameter=parameter, offset=0, type="pointer", space="global", object=object_name))
        else:
            arguments.append(dict(parameter=parameter, offset=0, type=_SCALARS[signature[name]], value=value))
    grid = [*call.grid, 1, 1][:3]
    launch = {"grid_dim": grid, "block_dim": [32 * call.num_warps, 1, 1], "dynamic_shared_bytes": shared}
    described = dict(schema="spverify.kernel-input/v1", entry=entry, launch=launch, declarations=declarations)
    return ptx, described | dict(arguments=arguments, shape_arrays=arrays)


def density(lengths: Sequence[int], K: int, N: int, kind: str, along: str | None, architecture: int) -> Call:
    dtype = FP32 if kind == "fp32" else BF16
    x, dy = empty(sum(lengths), K, dtype=dtype), empty(sum(lengths), N, dtype=dtype)
    cu_seqlens = empty(len(lengths) + 1, dtype=torch.int32)
    tile = config.TABLE[architecture, kind][0]
    return grad_density.call_grad_density(x, [dy], cu_seqlens, "grad_l1", along, tile, 1)


def elementwise() -> Iterator[tuple[str, Call]]:
    """Kernels whose threads do not meet, and norms."""
    fp32, bf16 = empty(1500, dtype=FP32), empty(1500)
    numbers = (7, 1e-4, 0.9, 0.999, 1e-8, 0.1)
    yield "adamw fp32, 1500", optimizers.call_adamw(fp32, bf16, *(empty(1500, dtype=FP32) for _ in range(2)), *numbers)
    call = optimizers.call_adamw(bf16, empty(1500), *(empty(1500, dtype=FP32) for _ in range(2)), *numbers, None, 5)
    yield "adamw bf16, rounded stochastically, 1500", call
    yield (
        "lion fp32, 1500",
        optimizers.call_lion(fp32, bf16, empty(1500, dtype=FP32), 1e-4, 0.9, 0.99, 0.1, None, None, 7),
    )
    for rows, columns in ((5, 300), (1, 3)):
        dy, gate, up = (empty(rows, columns) for _ in range(3))
        yield f"swiglu {rows}x{columns}", gated.call_forward(gate, up, dy, "silu")
        yield f"swiglu backward in place {rows}x{columns}", gated.call_backward(dy, gate, up, gate, up, "silu")
    xs, ys = ([empty(1, 20, heads, 64).transpose(1, 2) for heads in (4, 2)] for _ in range(2))
    yield "rotary 20 tokens, 4 and 2 heads", rotary.call_rotate(xs, ys, empty(1, 20, 64), empty(1, 20, 64), False)
    yield "rotary in place", rotary.call_rotate(xs, xs, empty(1, 20, 64), empty(1, 20, 64), True)
    x, weight, one = empty(6, 512), empty(512), empty(6, 1, dtype=FP32)
    yield (
        "rmsnorm 6x512 with residual",
        norms.call_forward(x, empty(6, 512), weight, None, 1e-6, 0.0, False, True, BF16),
    )
    gradients = (0.0, True, False, False)
    yield "rmsnorm backward", norms.call_backward(empty(6, 512), None, x, weight, None, one, *gradients, processors=1)
    mean, all_of_them = empty(6, 1, dtype=FP32), (0.0, True, True, True)
    yield (
        "layernorm backward",
        norms.call_backward(empty(6, 512), None, x, weight, mean, one, *all_of_them, processors=1),
    )


BEYOND_LOSS = "how far it goes depends on the targets, which are data"
BEYOND_WGMMA = "products of Triton's layouts: wgmma.py knows csrc's"


def launches() -> Iterator[Launch]:
    def one(label: str, architecture: int, call: Call, offsets: Sequence[int] = (), beyond: str = "") -> Launch:
        what = functools.partial(describe, call, architecture, offsets)
        return Launch("triton", label, f"sm_{architecture}", what, copies=True, beyond=beyond)

    for architecture, (label, call) in itertools.product((80, 90), elementwise()):
        yield one(label, architecture, call)
    row = [empty(3, dtype=dtype) for dtype in (torch.int64, torch.float64, torch.float64, FP32, FP32)]
    call = linear_loss.call_linear_loss(empty(3, 2048), 2000, *row, 1.0, None, True)
    yield one("linear_loss 3x2000", 80, call, beyond=BEYOND_LOSS)
    for kind, K, N, along in (
        ("fp32", 32, 64, None),
        ("fp32", 32, 64, "row"),
        ("any", 33, 40, None),
        ("any", 33, 40, "row"),
        ("short", 128, 64, None),
        ("short", 128, 64, "row"),
        ("long", 128, 128, None),
    ):
        lengths = (5, 70) if kind == "long" else (5, 20)
        call = density(lengths, K, N, kind, along, 80)
        label = f"density {kind}{' by row' if along else ''}, {'+'.join(map(str, lengths))} tokens, {N}x{K}"
        yield one(label, 80, call, list(itertools.accumulate(lengths, initial=0)))
    call = density((5, 20), 128, 128, "short", None, 90)
    yield one("density short, 5+20 tokens, 128x128", 90, call, (0, 5, 25), BEYOND_WGMMA)
