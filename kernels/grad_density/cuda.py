"""The kernels of csrc/grad_density*.cu over tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..c_arguments import array, stream, type_of
from ..cuda_library import check, library
from . import reference

STATISTICS = {"grad_l1": 1, "grad_l2sq": 2, "grad_linf": 4}  # in the order of the library's planes
ALONG = {None: 0, "row": 1, "column": 2}
VARIANTS = {"fastest": 0, "portable": 80, "hopper": 90}
MAX_PROJECTIONS = 3


def grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    statistics: Sequence[str] = ("grad_l1",),
    along: str | None = None,
    variant: str = "fastest",
) -> list[torch.Tensor]:
    """`reference.grad_density` by csrc/: x (T, K), each dy (T, N_p), cu_seqlens (B+1,) int32 or int64.

    Returns P float64 tensors, (S, B), (S, B, N_p) for along="row" or (S, B, K) for "column". bf16, fp16 or fp32, any
    strides that are not negative. variant: "portable" or "hopper" instead of the library's choice.
    """
    if len(dys) > MAX_PROJECTIONS:
        parts = [dys[i : i + MAX_PROJECTIONS] for i in range(0, len(dys), MAX_PROJECTIONS)]
        return [out for part in parts for out in grad_density(x, part, cu_seqlens, statistics, along, variant)]
    cu_seqlens = cu_seqlens.contiguous()
    samples = cu_seqlens.shape[0] - 1
    outs = reference.empty_statistics(x, dys, samples, len(statistics), along)
    if samples == 0 or x.shape[1] == 0 or any(dy.shape[1] == 0 for dy in dys):
        if len(dys) > 1:  # what is left of them, one by one
            return [grad_density(x, [dy], cu_seqlens, statistics, along, variant)[0] for dy in dys]
        return [out.zero_() for out in outs]
    mask = sum(STATISTICS[name] for name in set(statistics))
    sizes = array(ctypes.c_int64, [dy.shape[1] for dy in dys])
    shape = (x.shape[1], len(dys), sizes, samples, mask, ALONG[along])
    with torch.cuda.device(x.device):
        count = library().kunbr_grad_density_workspace(*shape)
        workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
        # a plane for each statistic, in the library's order
        check(
            library().kunbr_grad_density(
                *(x.data_ptr(), array(ctypes.c_int64, x.stride()), x.shape[0], x.shape[1], len(dys)),
                array(ctypes.c_void_p, [dy.data_ptr() for dy in dys]),
                array(ctypes.c_int64, [stride for dy in dys for stride in dy.stride()]),
                *(sizes, type_of(x), cu_seqlens.data_ptr(), type_of(cu_seqlens), samples, mask, ALONG[along]),
                array(ctypes.c_void_p, [out.data_ptr() for out in outs]),
                *(workspace.data_ptr(), count, VARIANTS[variant], stream()),
            )
        )
    planes = [name for name in STATISTICS if name in statistics]
    if tuple(planes) == tuple(statistics):
        return outs
    return [out[[planes.index(name) for name in statistics]] for out in outs]


def grad_alignment(
    x: torch.Tensor,
    dy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    other_x: torch.Tensor,
    other_dy: torch.Tensor,
    other_cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """`reference.grad_alignment` by csrc/: (3, B) float64, rows dot, l2sq, other_l2sq of the pairs by index."""
    samples, (K, N) = cu_seqlens.shape[0] - 1, (x.shape[1], dy.shape[1])
    out = x.new_empty((3, samples), dtype=torch.float64)
    if samples == 0 or K == 0 or N == 0:
        return out.zero_()
    cu_seqlens = cu_seqlens.contiguous()
    other_cu_seqlens = other_cu_seqlens.to(cu_seqlens.dtype).contiguous()
    pointers: list = []
    for a, b, ends in ((x, dy, cu_seqlens), (other_x, other_dy, other_cu_seqlens)):
        for tensor in (a, b):
            pointers += [tensor.data_ptr(), array(ctypes.c_int64, tensor.stride())]
        pointers += [ends.data_ptr(), a.shape[0]]
    with torch.cuda.device(x.device):
        count = library().kunbr_grad_alignment_workspace(K, N, samples)
        workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
        kinds = (type_of(x), type_of(cu_seqlens))
        rest = (out.data_ptr(), workspace.data_ptr(), count, stream())
        check(library().kunbr_grad_alignment(*pointers, K, N, *kinds, samples, *rest))
    return out
