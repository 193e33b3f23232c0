"""The kernels of csrc/optimizer.cu over tensors."""

from __future__ import annotations

import torch

from ..c_arguments import address, stream, type_of
from ..cuda_library import check, library


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
    summary: torch.Tensor | None = None,
) -> None:
    """`reference.lion_` by csrc/optimizer.cu, with its arguments: contiguous tensors in bf16, fp16 or fp32.

    summary: becomes the sum of grad^2 and the number of its elements that are not finite, (2,) float64 on the device,
    from the same pass.
    """
    values = (lr, beta1, beta2, weight_decay, *_seed(seed), step & 0xFFFFFFFF)
    _update("lion", [param, grad, momentum], param, half, (), values, summary)


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
    summary: torch.Tensor | None = None,
) -> None:
    """`reference.adamw_` by csrc/optimizer.cu; all else as in `lion_`. Both moments have one dtype."""
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise TypeError(f"exp_avg is {exp_avg.dtype} and exp_avg_sq {exp_avg_sq.dtype}: give both one dtype")
    values = (lr, beta1, beta2, eps, weight_decay, *_seed(seed))
    _update("adamw", [param, grad, exp_avg, exp_avg_sq], param, half, (step,), values, summary)


def _update(name, tensors, param, half, first_values, values, summary) -> None:
    size = param.numel()
    for tensor in (*tensors, *([] if half is None else [half])):
        if tensor.numel() != size or not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(
                f"{name}: got {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device} beside "
                f"{tuple(param.shape)} on {param.device}: give contiguous tensors of one size and device"
            )
    if summary is not None and (summary.dtype, summary.numel()) != (torch.float64, 2):
        raise TypeError(f"summary is {summary.dtype}, {tuple(summary.shape)}: expected (2,) float64")
    pointers: list = []
    for number, tensor in enumerate(tensors):
        pointers += [tensor.data_ptr()] if number == 2 and name == "adamw" else _vector(tensor)
    pointers += [None, 0] if half is None else _vector(half)
    count = 0 if summary is None else library().kunbr_summary_workspace(size)
    with torch.cuda.device(param.device):
        workspace = torch.empty(count, dtype=torch.uint8, device=param.device) if count else None
        run = getattr(library(), f"kunbr_{name}")
        check(run(*pointers, size, *first_values, *values, address(summary), address(workspace), count, stream()))


def _seed(seed: int | None) -> tuple[int, int]:
    return (0, 0) if seed is None else (1, seed & 0xFFFFFFFFFFFFFFFF)


def _vector(tensor: torch.Tensor) -> list[int]:
    return [tensor.data_ptr(), type_of(tensor)]
