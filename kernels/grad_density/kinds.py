"""Which kind of launch each implementation takes for given tensors: what was proven is proven of one kind."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .. import tiles


def kinds_of_launch(x: torch.Tensor, dys: Sequence[torch.Tensor], samples: int, along: str | None) -> dict[str, str]:
    """{implementation: the kind of its launch} for x (T, K) and each dy (T, N_p) on a CUDA device."""
    aligned = all(map(tiles.aligned, (x, *dys)))
    suffix = " by row" * (along == "row")
    triton = triton_kind(x, aligned, samples)
    hopper = _is_hopper(x.device) and x.dtype != torch.float32 and aligned and x.shape[0] > 0
    return {"triton": triton + suffix, "cuda": ("hopper" if hopper else "portable") + suffix}


def triton_kind(x: torch.Tensor, aligned: bool, samples: int) -> str:
    """The entry of tiles.py's table; of "short", where the longest sample is known, there is one for each room."""
    if x.dtype == torch.float32:
        return "fp32"
    if not aligned:
        return "any"
    return "short" if x.shape[0] <= tiles.SHORT_MEAN_TOKENS * max(1, samples) else "long"


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
