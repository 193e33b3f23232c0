"""The CUDA kernels of csrc/ (`impl="cuda"`): the library loaded by ctypes, and its functions over tensors.

The library has a plain C interface (csrc/kunbr.h) and knows nothing of torch or Python: pointers, sizes, strides in
elements and torch's current stream go in, and a code comes back, which becomes an exception here. No GPU has run these
kernels yet, so `impl="auto"` passes them by.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from kunbr_fast.kernels import reference
from kunbr_fast.kernels.dispatch import Unavailable

ABI_VERSION = 1
PATH = Path(__file__).with_name("libkunbr_cuda.so")
HOW_TO_BUILD = (
    "in a checkout with nvcc 12.4 or newer on the path run `python csrc/build.py`, or install from source there"
)

# kunbr.h's constants
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}
OLD_GPU, CUDA, INSUFFICIENT_DRIVER = 9, 1000, 1035


class LibraryError(RuntimeError):
    """A function of the library refused or failed. `code`: kunbr.h's, or 1000 + CUDA's own."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------- the library

_VECTOR = (ctypes.c_void_p, ctypes.c_int)  # a pointer and a type
_NUMBER, _SIZE, _POINTER = ctypes.c_double, ctypes.c_int64, ctypes.c_void_p
_SIZES, _POINTERS = ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p)  # arrays in host memory
_ROUNDING = (ctypes.c_int, ctypes.c_uint64)  # stochastic, seed
_SCRATCH = (_POINTER, _POINTER, _SIZE, _POINTER)  # summary, workspace, its bytes, stream
_SIGNATURES = {
    "abi_version": (ctypes.c_int, ()),
    "source_hash": (ctypes.c_char_p, ()),
    "build": (ctypes.c_char_p, ()),
    "message": (ctypes.c_char_p, (ctypes.c_int,)),
    "detail": (ctypes.c_char_p, ()),
    "device": (ctypes.c_int, (ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
    "summary_workspace": (_SIZE, (_SIZE,)),
    "lion": (
        ctypes.c_int,
        (*_VECTOR * 4, _SIZE, *(_NUMBER,) * 4, *_ROUNDING, ctypes.c_uint32, *_SCRATCH),
    ),
    "grad_density_workspace": (_SIZE, (_SIZE, ctypes.c_int, _SIZES, _SIZE, ctypes.c_int, ctypes.c_int)),
    "grad_density": (
        ctypes.c_int,
        (*(_POINTER, _SIZES, _SIZE, _SIZE), ctypes.c_int, *(_POINTERS, _SIZES, _SIZES), ctypes.c_int, *_VECTOR)
        + (_SIZE, ctypes.c_int, ctypes.c_int, _POINTERS, _POINTER, _SIZE, ctypes.c_int, _POINTER),
    ),
    "grad_alignment_workspace": (_SIZE, (_SIZE, _SIZE, _SIZE)),
    "grad_alignment": (
        ctypes.c_int,
        (*(_POINTER, _SIZES, _POINTER, _SIZES, _POINTER, _SIZE) * 2, _SIZE, _SIZE, ctypes.c_int, ctypes.c_int, _SIZE)
        + (_POINTER, _POINTER, _SIZE, _POINTER),
    ),
    "adamw": (
        ctypes.c_int,
        (*_VECTOR * 2, _POINTER, *_VECTOR, *_VECTOR, _SIZE, ctypes.c_uint32, *(_NUMBER,) * 5, *_ROUNDING, *_SCRATCH),
    ),
}


def open_library(path: Path | str) -> ctypes.CDLL:
    """The library at `path`, its functions typed; OSError where it cannot be loaded or has another interface."""
    library = ctypes.CDLL(os.fspath(path))
    found = library.kunbr_abi_version()
    if found != ABI_VERSION:
        raise OSError(f"{path} has interface {found} and this Python code {ABI_VERSION}: {HOW_TO_BUILD}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"kunbr_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not PATH.is_file():
        return f"csrc/ is not built: {HOW_TO_BUILD}"
    try:
        return open_library(PATH)
    except OSError as error:
        return f"the library of csrc/ does not load: {error}"


def library() -> ctypes.CDLL:
    """The library; `dispatch.Unavailable` with the reason where there is none."""
    found = _load()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def description() -> str:
    """One line: what the library was built with and for, or why there is none."""
    found = _load()
    return found if isinstance(found, str) else found.kunbr_build().decode()


def check(code: int) -> None:
    """LibraryError where a function returned anything but 0."""
    if code:
        detail, meaning = (text.decode() for text in (library().kunbr_detail(), library().kunbr_message(code)))
        raise LibraryError(code, f"{detail or 'CUDA library'}: {meaning} (code {code})")


@functools.cache
def _device(index: int) -> str | None:
    """Why the library cannot run on the CUDA device of that index, None if it can."""
    capability = ctypes.c_int()
    code = library().kunbr_device(index, ctypes.byref(capability))
    if code == 0:
        return None
    if code == OLD_GPU:
        return f"needs compute capability 8.0 or newer, this is {capability.value / 10}"
    reason = library().kunbr_message(code).decode()
    return reason if code < CUDA else f"{reason} (CUDA error {code - CUDA})"


def why_not(device: torch.device) -> str | None:
    """Why the library cannot run on tensors of `device`, None if it can."""
    if device.type != "cuda":
        return "needs a CUDA device"
    found = _load()
    if isinstance(found, str):
        return found
    if not torch.cuda.is_available():
        # what the driver says: CUDA error 35 where there is none
        return f"needs a CUDA device, torch sees none; {_device(0) or 'the library sees one'}"
    return _device(torch.cuda.current_device() if device.index is None else device.index)


# ---------------------------------------------------------------- statistics of weight gradients

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
    sizes = _array(ctypes.c_int64, [dy.shape[1] for dy in dys])
    shape = (x.shape[1], len(dys), sizes, samples, mask, ALONG[along])
    with torch.cuda.device(x.device):
        count = library().kunbr_grad_density_workspace(*shape)
        workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
        # a plane for each statistic, in the library's order
        check(
            library().kunbr_grad_density(
                *(x.data_ptr(), _array(ctypes.c_int64, x.stride()), x.shape[0], x.shape[1], len(dys)),
                _array(ctypes.c_void_p, [dy.data_ptr() for dy in dys]),
                _array(ctypes.c_int64, [stride for dy in dys for stride in dy.stride()]),
                *(sizes, type_of(x), cu_seqlens.data_ptr(), type_of(cu_seqlens), samples, mask, ALONG[along]),
                _array(ctypes.c_void_p, [out.data_ptr() for out in outs]),
                *(workspace.data_ptr(), count, VARIANTS[variant], _stream()),
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
            pointers += [tensor.data_ptr(), _array(ctypes.c_int64, tensor.stride())]
        pointers += [ends.data_ptr(), a.shape[0]]
    with torch.cuda.device(x.device):
        count = library().kunbr_grad_alignment_workspace(K, N, samples)
        workspace = torch.empty(count, dtype=torch.uint8, device=x.device)
        kinds = (type_of(x), type_of(cu_seqlens))
        rest = (out.data_ptr(), workspace.data_ptr(), count, _stream())
        check(library().kunbr_grad_alignment(*pointers, K, N, *kinds, samples, *rest))
    return out


# ---------------------------------------------------------------- optimisers


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
        check(run(*pointers, size, *first_values, *values, _address(summary), _address(workspace), count, _stream()))


def _seed(seed: int | None) -> tuple[int, int]:
    return (0, 0) if seed is None else (1, seed & 0xFFFFFFFFFFFFFFFF)


def _vector(tensor: torch.Tensor) -> list[int]:
    return [tensor.data_ptr(), type_of(tensor)]


def type_of(tensor: torch.Tensor) -> int:
    """kunbr.h's number for the tensor's dtype."""
    if tensor.dtype not in TYPES:
        raise TypeError(f'impl="cuda" does not serve {tensor.dtype}: use impl="torch" or "auto"')
    return TYPES[tensor.dtype]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _array(kind, values: Sequence) -> ctypes.Array:
    return (kind * len(values))(*values)
