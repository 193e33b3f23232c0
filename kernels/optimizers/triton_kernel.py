"""Lion and AdamW in place over one vector: the active block's flat buffer, in one launch.

    Lion   p -= lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)
           m  = beta2 * m + (1 - beta2) * g                                            arXiv 2302.06675, algorithm 2
    AdamW  m  = beta1 * m + (1 - beta1) * g
           v  = beta2 * v + (1 - beta2) * g^2
           p -= lr * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p)     arXiv 1711.05101

Each element is read and written once. Bytes an element for Lion: bf16 gradient 2, fp32 momentum 4 + 4, fp32 weight
4 + 4, its bf16 copy 2, so 20; AdamW has a second moment, 28. At 4.3 TB/s that is 4.7 and 6.5 ms for 10^9 weights. All
else torch would pass over memory for (the gradient in fp32, the update, the copy to bf16) stays in registers.
Precision: arithmetic in fp32 whatever is stored; one rounding for each stored value. AdamW's bias corrections are
computed by the host in float64, from a step count that it keeps.

Stochastic rounding of bf16 weights, on request: what is stored is one of a value's two neighbours, and the value on
average, so updates far below bf16's last place add up. Random bits are a function of seed, step and place alone
(`reference.random_bits`): the same in any launch, and in torch.

bad, on request: one int32 that becomes 1 where a stored value is not finite, and is never cleared. Each element's lane
stores it under a mask that is all False in a healthy step: no byte more, and no sum over a program. All that store it
store the same, so the order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..launch import Call
from ..rounding import narrow, narrow_stochastically, random_bits
from ..tiles import cdiv
from .reference import check_flag

# Eight elements for each of 128 threads: one 16-byte access in bf16, two in fp32.
BLOCK = 1024
NUM_WARPS = 4

# ---------------------------------------------------------------- inside a program


@triton.jit
def _load(source, places, left, MASKED: tl.constexpr):
    """fp32. Only the last program masks: masks by a size that is no multiple of 8 would make all accesses narrow."""
    if MASKED:
        return tl.load(source + places, mask=places < left, other=0.0).to(tl.float32)
    else:
        return tl.load(source + places).to(tl.float32)


@triton.jit
def _store(target, places, values, left, MASKED: tl.constexpr):
    """Stores, and returns 0 for a finite value as it is stored, NaN for another."""
    stored = narrow(values, target.dtype.element_ty)
    if MASKED:
        tl.store(target + places, stored, mask=places < left)
    else:
        tl.store(target + places, stored)
    wide = stored.to(tl.float32)
    return wide - wide


@triton.jit
def _report(bad, rest, places, left, MASKED: tl.constexpr):
    """rest: the sum of what `_store` returned."""
    if bad is not None:
        wrong = rest != rest
        if MASKED:
            wrong &= places < left
        tl.store(bad + places * 0, 1, mask=wrong)


@triton.jit
def _write(param, half, p, first, places, left, seed, step, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    if STOCHASTIC:
        p = narrow_stochastically(p, random_bits(first, seed, step, BLOCK))
    rest = _store(param + first, places, p, left, MASKED)
    if half is not None:  # which is not finite where the parameter is not
        rest = _store(half + first, places, p, left, MASKED)
    return rest


@triton.jit
def _lion_block(param, grad, momentum, half, bad, first, size, lr, beta1, rest1, beta2, rest2, weight_decay, seed, step,
                STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    places = tl.arange(0, BLOCK)
    left = (size - first).to(tl.int32)  # of the last program, which masks
    g = _load(grad + first, places, left, MASKED)
    m = _load(momentum + first, places, left, MASKED)
    p = _load(param + first, places, left, MASKED)
    c = beta1 * m + rest1 * g
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))  # of zero: zero; of NaN: NaN
    rest = _store(momentum + first, places, beta2 * m + rest2 * g, left, MASKED)
    p -= lr * (sign + weight_decay * p)
    rest += _write(param, half, p, first, places, left, seed, step, STOCHASTIC, MASKED, BLOCK)
    _report(bad, rest, places, left, MASKED)


@triton.jit
def _adamw_block(param, grad, exp_avg, exp_avg_sq, half, bad, first, size, decay, step_size, beta1, rest1, beta2, rest2,
                 inverse_root, eps, seed, step, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    places = tl.arange(0, BLOCK)
    left = (size - first).to(tl.int32)  # of the last program, which masks
    g = _load(grad + first, places, left, MASKED)
    m = _load(exp_avg + first, places, left, MASKED)
    v = _load(exp_avg_sq + first, places, left, MASKED)
    p = _load(param + first, places, left, MASKED)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    rest = _store(exp_avg + first, places, m, left, MASKED)
    rest += _store(exp_avg_sq + first, places, v, left, MASKED)
    p -= step_size * (m / (tl.sqrt(v) * inverse_root + eps)) + decay * p
    rest += _write(param, half, p, first, places, left, seed, step, STOCHASTIC, MASKED, BLOCK)
    _report(bad, rest, places, left, MASKED)


# ---------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["seed", "step"])
def lion_kernel(param, grad, momentum, half, bad, size, lr, beta1, rest1, beta2, rest2, weight_decay, seed, step,
                STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: BLOCK elements."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first + BLOCK <= size:
        _lion_block(param, grad, momentum, half, bad, first, size, lr, beta1, rest1, beta2, rest2, weight_decay, seed,
                    step, STOCHASTIC, False, BLOCK)  # fmt: skip
    else:
        _lion_block(param, grad, momentum, half, bad, first, size, lr, beta1, rest1, beta2, rest2, weight_decay, seed,
                    step, STOCHASTIC, True, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(param, grad, exp_avg, exp_avg_sq, half, bad, size, decay, step_size, beta1, rest1, beta2, rest2,
                 inverse_root, eps, seed, step, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: BLOCK elements."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first + BLOCK <= size:
        _adamw_block(param, grad, exp_avg, exp_avg_sq, half, bad, first, size, decay, step_size, beta1, rest1, beta2,
                     rest2, inverse_root, eps, seed, step, STOCHASTIC, False, BLOCK)  # fmt: skip
    else:
        _adamw_block(param, grad, exp_avg, exp_avg_sq, half, bad, first, size, decay, step_size, beta1, rest1, beta2,
                     rest2, inverse_root, eps, seed, step, STOCHASTIC, True, BLOCK)  # fmt: skip


# ---------------------------------------------------------------- launchers


def _call(kernel, vectors, half, bad, numbers, seed, step) -> Call:
    param = vectors["param"]
    arguments = dict(vectors, size=param.numel(), seed=seed or 0, step=step, **numbers)
    constexprs = dict(STOCHASTIC=seed is not None, BLOCK=BLOCK)
    (constexprs if half is None else arguments)["half"] = half
    (constexprs if bad is None else arguments)["bad"] = bad if bad is None else check_flag(bad, param)
    # no fma: which products are contracted depends on the loads' width, and so would the last bits on the alignment
    grid = (cdiv(param.numel(), BLOCK),)
    return Call(kernel, grid, arguments, constexprs, NUM_WARPS, 1, fma=False)


def call_lion(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    half: torch.Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    bad: torch.Tensor | None = None,
) -> Call:
    """The launch of `lion_`: contiguous tensors of one size."""
    numbers = dict(lr=float(lr), beta1=float(beta1), rest1=1.0 - beta1, beta2=float(beta2), rest2=1.0 - beta2)
    numbers |= dict(weight_decay=float(weight_decay))
    return _call(lion_kernel, dict(param=param, grad=grad, momentum=momentum), half, bad, numbers, seed, step)


def lion_(*arguments, **options) -> None:
    """`reference.lion_` by the kernel, with its arguments: contiguous tensors in bf16, fp16 or fp32, each its own."""
    call_lion(*arguments, **options).launch()


def call_adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    half: torch.Tensor | None = None,
    seed: int | None = None,
    bad: torch.Tensor | None = None,
) -> Call:
    """The launch of `adamw_`: contiguous tensors of one size."""
    numbers = dict(decay=float(lr * weight_decay), step_size=lr / (1.0 - beta1**step))
    numbers |= dict(beta1=float(beta1), rest1=1.0 - beta1, beta2=float(beta2), rest2=1.0 - beta2)
    numbers |= dict(inverse_root=1.0 / math.sqrt(1.0 - beta2**step), eps=float(eps))
    vectors = dict(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return _call(adamw_kernel, vectors, half, bad, numbers, seed, step)


def adamw_(*arguments, **options) -> None:
    """`reference.adamw_` by the kernel, with its arguments: contiguous tensors in bf16, fp16 or fp32, each its own."""
    call_adamw(*arguments, **options).launch()


# ---------------------------------------------------------------- what is compiled ahead of time


def aot_calls(architecture: int) -> Iterator[tuple[str, Call, bool]]:
    """(label, launch, False: no matrix products) for what a block is trained with, at sizes even and odd."""
    half, full = torch.bfloat16, torch.float32
    for size in (1 << 20, (1 << 32) + 5):
        for name, dtype, gradient, state, copy, seed in (
            ("fp32", full, full, full, None, None),
            ("fp32 and its bf16 copy", full, half, full, half, None),
            ("bf16", half, half, half, None, None),
            ("bf16 rounded stochastically", half, half, full, None, 12345),
        ):
            flag = torch.empty(1, dtype=torch.int32, device="meta")
            p, g, m, v, c = (
                None if dtype is None else torch.empty(size, dtype=dtype, device="meta")
                for dtype in (dtype, gradient, state, state, copy)
            )
            for bad, says in ((None, ""), (flag, ", checked")):  # training checks; `kernels` alone need not
                label = f"{name}{says} size={size}"
                yield f"lion {label}", call_lion(p, g, m, 1e-4, 0.9, 0.99, 0.1, c, seed, 7, bad), False
                yield f"adamw {label}", call_adamw(p, g, m, v, 7, 1e-4, 0.9, 0.999, 1e-8, 0.1, c, seed, bad), False
