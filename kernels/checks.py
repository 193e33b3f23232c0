"""Checks of arguments that several operations share."""

from collections.abc import Sequence

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    """ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(str(k) for k in known)}")


def floating(name: str, tensor: torch.Tensor) -> None:
    """TypeError unless the tensor's dtype is one of DTYPES."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}")


def same_kind(name: str, tensor: torch.Tensor, x_name: str, x: torch.Tensor) -> None:
    """TypeError, ValueError unless `tensor` has x's dtype and device."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype} and {x_name} is {x.dtype}: cast one to the other's dtype")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and {x_name} on {x.device}: move one to the other's device")


def apart(*tensors: torch.Tensor) -> bool:
    """Whether no two share a storage. (Parts of one product, or one tensor twice, do.)"""
    return len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)
