"""Whether numbers are finite."""

from __future__ import annotations

import torch
from torch import nn

from kunbr_fast.files.tensors import is_absent


def check_finite(model: nn.Module, whose: str = "") -> None:
    """ValueError with the path of the first weight that holds NaN or infinity; `whose` goes before it."""
    for name, parameter in model.named_parameters():
        if is_absent(parameter):  # of a streamed model
            continue
        bad = int((~parameter.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"{whose}{name}: {bad} of {parameter.numel()} values are NaN or infinite: "
                "this checkpoint is damaged or its training diverged; load another one"
            )


def finite(*tensors: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, as a tensor (no wait for the device). Judged by the largest of each: unlike a
    sum of squares it cannot overflow."""
    return torch.stack([torch.linalg.vector_norm(t.detach(), torch.inf) for t in tensors]).isfinite().all()
