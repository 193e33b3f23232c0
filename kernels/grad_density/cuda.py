"""The kernels of csrc/grad_density*.cu over tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..c_arguments import array, stream, type_of
from ..cuda_library import check, library
from . import reference

STATISTICS = {"grad_l1": 0, "grad_l2sq": 1, "grad_linf": 2}
ALONG = {None: 0, "row": 1}
VARIANTS = {"fastest": 0, "portable": 80, "hopper": 90}
MAX_PROJECTIONS = 3


def grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    statistic: str = "grad_l1",
    along: str | None = None,
    variant: str = "fastest",
) -> list[torch.Tensor]:
    """`reference.grad_density` by csrc/: x (T, K), each dy (T, N_p), cu_seqlens (B+1,) int32 or int64.

    Returns P float64 tensors, (B,) or (B, N_p) for along="row". bf16, fp16 or fp32, any strides that are not negative.
    variant: "portable" or "hopper" instead of the library's choice.
    """
    if len(dys) > MAX_PROJECTIONS:
        parts = [dys[i : i + MAX_PROJECTIONS] for i in range(0, len(dys), MAX_PROJECTIONS)]
        return [out for part in parts for out in grad_density(x, part, cu_seqlens, statistic, along, variant)]
    cu_seqlens = cu_seqlens.contiguous()
    samples = cu_seqlens.shape[0] - 1
    outs = reference.empty_statistics(x, dys, samples, along)
    if samples == 0 or x.shape[1] == 0 or any(dy.shape[1] == 0 for dy in dys):
        if len(dys) > 1:  # what is left of them, one by one
            return [grad_density(x, [dy], cu_seqlens, statistic, along, variant)[0] for dy in dys]
        return [out.zero_() for out in outs]
    sizes = array(ctypes.c_int64, [dy.shape[1] for dy in dys])
    with torch.cuda.device(x.device):
        count = library().kunbr_grad_density_workspace(x.shape[1], len(dys), sizes, samples, ALONG[along])
        workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
        check(
            library().kunbr_grad_density(
                *(x.data_ptr(), array(ctypes.c_int64, x.stride()), x.shape[0], x.shape[1], len(dys)),
                array(ctypes.c_void_p, [dy.data_ptr() for dy in dys]),
                array(ctypes.c_int64, [stride for dy in dys for stride in dy.stride()]),
                *(sizes, type_of(x), cu_seqlens.data_ptr(), type_of(cu_seqlens), samples),
                *(STATISTICS[statistic], ALONG[along]),
                array(ctypes.c_void_p, [out.data_ptr() for out in outs]),
                *(workspace.data_ptr(), count, VARIANTS[variant], stream()),
            )
        )
    return outs
