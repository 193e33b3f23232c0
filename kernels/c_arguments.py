"""Tensors as arguments of the library of csrc/."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

# kunbr.h's constants
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}


def type_of(tensor: torch.Tensor) -> int:
    """kunbr.h's number for the tensor's dtype."""
    if tensor.dtype not in TYPES:
        raise TypeError(f'impl="cuda" does not serve {tensor.dtype}: use impl="torch" or "auto"')
    return TYPES[tensor.dtype]


def stream() -> int:
    """torch's current one."""
    return torch.cuda.current_stream().cuda_stream


def array(kind, values: Sequence) -> ctypes.Array:
    """`values` in host memory."""
    return (kind * len(values))(*values)
