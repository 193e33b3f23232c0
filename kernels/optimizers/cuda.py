"""The kernels of csrc/optimizer.cu over tensors."""

from __future__ import annotations

import torch

from ..c_arguments import stream, type_of
from ..cuda_library import check, library
from .reference import check_flag


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
    """`reference.lion_` by csrc/optimizer.cu, with its arguments: contiguous tensors in bf16, fp16 or fp32."""
    values = lr, beta1, beta2, weight_decay, *_seed(seed), step & 0xFFFFFFFF
    _update("lion", [param, grad, momentum], half, bad, values)


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
    """`reference.adamw_` by csrc/optimizer.cu; all else as in `lion_`. Both moments have one dtype."""
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise TypeError(f"exp_avg is {exp_avg.dtype} and exp_avg_sq {exp_avg_sq.dtype}: give both one dtype")
    values = step, lr, beta1, beta2, eps, weight_decay, *_seed(seed)
    _update("adamw", [param, grad, exp_avg, exp_avg_sq], half, bad, values)


def _update(
    name: str, tensors: list[torch.Tensor], half: torch.Tensor | None, bad: torch.Tensor | None, values: tuple
) -> None:
    param, size = tensors[0], tensors[0].numel()
    for tensor in (*tensors, *([] if half is None else [half])):
        if tensor.numel() != size or not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(
                f"{name}: got {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device} beside "
                f"{tuple(param.shape)} on {param.device}: give contiguous tensors of one size and device"
            )
    pointers: list = []
    for number, tensor in enumerate(tensors):
        pointers += [tensor.data_ptr(), type_of(tensor)]
        if number == 2 and name == "adamw":  # one type for both moments
            pointers.pop()
    pointers += [None, 0] if half is None else [half.data_ptr(), type_of(half)]
    flag = None if bad is None else check_flag(bad, param).data_ptr()
    with torch.cuda.device(param.device):
        check(getattr(library(), f"kunbr_{name}")(*pointers, size, *values, flag, stream()))


def _seed(seed: int | None) -> tuple[int, int]:
    return (0, 0) if seed is None else (1, seed & 0xFFFFFFFFFFFFFFFF)
