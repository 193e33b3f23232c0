"""Lion and AdamW in plain torch: the truth for the kernels, and the path on a CPU."""

from __future__ import annotations

import math

import torch


def lion_(
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
) -> None:
    """One Lion step in place (arXiv 2302.06675, algorithm 2): all tensors of one shape.

    param -= lr * (sign(beta1 * momentum + (1 - beta1) * grad) + weight_decay * param)
    momentum = beta2 * momentum + (1 - beta2) * grad

    half: becomes a copy of param in its own dtype. seed: param, bf16, is computed in fp32 and stored by `to_bf16`.
    bad: (1,) int32, becomes 1 where a value of param, half or the state is not finite; it is never cleared.
    """
    grad = grad.to(momentum.dtype)
    update = torch.lerp(momentum, grad, 1 - beta1).sign_()
    wide = param if seed is None else param.float()
    if weight_decay:
        wide.mul_(1 - lr * weight_decay)
    _add(wide, update, -lr)
    momentum.lerp_(grad, 1 - beta2)
    _store_weights(param, wide, half, seed, step)
    if bad is not None:
        note_not_finite(bad, param if half is None else half, momentum)


def adamw_(
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
) -> None:
    """One AdamW step in place (arXiv 1711.05101, as torch.optim.AdamW): all tensors of one shape, step from 1.

    param -= lr * weight_decay * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    param -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    half, seed, bad: as in `lion_`.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    wide = param if seed is None else param.float()
    if weight_decay:
        wide.mul_(1 - lr * weight_decay)
    _add(wide, exp_avg / denominator, -lr / (1 - beta1**step))
    _store_weights(param, wide, half, seed, step)
    if bad is not None:  # an exp_avg that is not finite makes param so too; an infinite exp_avg_sq does not
        note_not_finite(bad, param if half is None else half, exp_avg_sq)


def _add(wide: torch.Tensor, update: torch.Tensor, factor: float) -> None:
    if abs(factor) <= torch.finfo(wide.dtype).max:
        wide.add_(update.to(wide.dtype), alpha=factor)
    else:  # torch takes no such alpha; what overflows becomes infinite
        wide.copy_(wide.double() + update.double() * factor)


def _store_weights(
    param: torch.Tensor, wide: torch.Tensor, half: torch.Tensor | None, seed: int | None, step: int
) -> None:
    if seed is not None:
        param.copy_(to_bf16(wide, random_bits(wide.numel(), seed, step, wide.device).view(wide.shape)))
    if half is not None:
        half.copy_(param)


def note_not_finite(bad: torch.Tensor, *tensors: torch.Tensor) -> None:
    """bad, (1,) int32, becomes 1 where a value is not finite. One reading pass; waits for no device."""
    for tensor in tensors:
        if tensor.numel() and not sum_is_finite(tensor):
            low, high = torch.aminmax(tensor)
            bad.masked_fill_((low - low) + (high - high) != 0, 1)


def sum_is_finite(tensor: torch.Tensor) -> bool:
    """On a CPU, whether a sum, torch's fastest pass, shows that all values are finite. False tells nothing: a sum of
    finite values may overflow, and elsewhere the host would wait for it."""
    return tensor.device.type == "cpu" and math.isfinite(tensor.sum())


def check_flag(bad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """`bad`; ValueError if a kernel could not write it."""
    if bad.dtype != torch.int32 or bad.numel() != 1 or bad.device != param.device:
        raise ValueError(
            f"bad: got {bad.dtype} {tuple(bad.shape)} on {bad.device}, expected one int32 on {param.device}: give "
            "torch.zeros(1, dtype=torch.int32, device=param.device)"
        )
    return bad


def to_bf16(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Stochastic rounding of fp32 x: to one of its two neighbours in bf16 by `bits` (random int32), on average x.

    16 random bits are added below bf16's last place, and what is below it is cut off.
    """
    up = ((x.view(torch.int32) + (bits & 0xFFFF)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, up).bfloat16()  # the bits of NaN could overflow to a number


def random_bits(count: int, seed: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,) int32: at place i word i % 4 of Philox 4x32-10 with key `seed` and counter (i // 4, step).

    64-bit seed, 32-bit step. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    quad = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    low = 0xFFFFFFFF
    counter = [quad & low, quad >> 32, torch.full_like(quad, step & low), torch.zeros_like(quad)]
    key = [seed & low, seed >> 32 & low]

    def product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The high and low words of a * b, in two halves, so that int64 holds each."""
        upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & low

    for _ in range(10):
        (high0, low0), (high1, low1) = product(counter[0], 0xD2511F53), product(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    words = torch.stack(counter, 1).flatten()[:count]
    return (words - ((words >> 31) << 32)).to(torch.int32)
