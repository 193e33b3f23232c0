"""The library of csrc/ (`impl="cuda"`), loaded by ctypes. Each operation's `cuda.py` calls it.

The library has a plain C interface (csrc/kunbr.h) and knows nothing of torch or Python: pointers, sizes, strides in
elements and torch's current stream go in, and a code comes back, which becomes an exception here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Unavailable

if TYPE_CHECKING:  # `kunbr-fast doctor` asks for the library without torch
    import torch

ABI_VERSION = 3
PATH = Path(__file__).with_name("libkunbr_cuda.so")
HOW_TO_BUILD = (
    "in a checkout with nvcc 12.4 or newer on the path run `python csrc/build.py`, or install from source there"
)

# kunbr.h's constants
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
_SIGNATURES = {
    "abi_version": (ctypes.c_int, ()),
    "source_hash": (ctypes.c_char_p, ()),
    "build": (ctypes.c_char_p, ()),
    "message": (ctypes.c_char_p, (ctypes.c_int,)),
    "detail": (ctypes.c_char_p, ()),
    "device": (ctypes.c_int, (ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
    "lion": (
        ctypes.c_int,
        (*_VECTOR * 4, _SIZE, *(_NUMBER,) * 4, *_ROUNDING, ctypes.c_uint32, _POINTER, _POINTER),
    ),
    "grad_density_workspace": (_SIZE, (_SIZE, ctypes.c_int, _SIZES, _SIZE, ctypes.c_int)),
    "grad_density": (
        ctypes.c_int,
        (*(_POINTER, _SIZES, _SIZE, _SIZE), ctypes.c_int, *(_POINTERS, _SIZES, _SIZES), ctypes.c_int, *_VECTOR)
        + (_SIZE, ctypes.c_int, ctypes.c_int, _POINTERS, _POINTER, _SIZE, ctypes.c_int, _POINTER),
    ),
    "adamw": (
        ctypes.c_int,
        (*_VECTOR * 2, _POINTER, *_VECTOR, *_VECTOR, _SIZE, ctypes.c_uint32, *(_NUMBER,) * 5, *_ROUNDING)
        + (_POINTER, _POINTER),
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
    """The library; `Unavailable` with the reason where there is none."""
    found = _load()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def description() -> str:
    """One line: what the library was built with and for, or why there is none."""
    found = _load()
    return found if isinstance(found, str) else found.kunbr_build().decode()


def source_hash() -> str:
    """Of the sources that the library was built from, or "none" where there is no library."""
    found = _load()
    return "none" if isinstance(found, str) else found.kunbr_source_hash().decode()


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
    import torch

    if torch.version.hip:
        return f"needs an NVIDIA GPU, and this torch is built for ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        # what the driver says: CUDA error 35 where there is none
        return f"needs a CUDA device, torch sees none; {_device(0) or 'the library sees one'}"
    return _device(torch.cuda.current_device() if device.index is None else device.index)
