"""Which implementation runs an operation: `impl="auto" | "cuda" | "triton" | "torch"`, one word everywhere.

`torch` is always there, every operation has Triton kernels, and some have CUDA kernels too (cuda_library.py). Another
implementation joins with one line:

    dispatch.register("swiglu", "cuda", lambda device: None if device.type == "cuda" else "needs a GPU")

The function returns None where the implementation can run on tensors of that device, else a short reason. A second
function may give a reason why "auto" passes by an implementation that can run; `impl` may still name it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import cuda_library
from .errors import Unavailable

if TYPE_CHECKING:  # `kunbr-fast doctor` asks about the CPU without torch
    import torch

OPERATIONS = ("grad_density", "linear_loss", "lion", "adamw", "rms_norm", "layer_norm", "swiglu", "geglu", "rotary")
CUDA_OPERATIONS = ("grad_density", "lion", "adamw")  # those that csrc/ has kernels for
IMPLEMENTATIONS = ("cuda", "triton", "torch")  # the order in which "auto" prefers them
UNPROVEN = "not proven on this GPU"  # an H200 has run it: docs/results.md


logger = logging.getLogger(__name__)
WhyNot = Callable[["torch.device"], "str | None"]
_registry: dict[tuple[str, str], tuple[WhyNot, WhyNot | None]] = {}
_logged: set[tuple[str, str, str]] = set()


def register(operation: str, impl: str, why_not: WhyNot, why_not_auto: WhyNot | None = None) -> None:
    """Make `impl` known for `operation`: see the module docstring. ValueError for an unknown name."""
    _check(operation, impl)
    _registry[operation, impl] = why_not, why_not_auto


def has(operation: str, impl: str) -> bool:
    """Whether this release has an `impl` of `operation`, for whatever device."""
    _check(operation, impl)
    return (operation, impl) in _registry


def why_not(operation: str, impl: str, device: torch.device | str = "cpu") -> str | None:
    """None if `impl` can run `operation` on tensors of `device`, else the reason why not."""
    if not has(operation, impl):
        return "not in this release"
    return _registry[operation, impl][0](_as_device(device))


def why_not_auto(operation: str, impl: str, device: torch.device | str = "cpu") -> str | None:
    """None if "auto" may take `impl`, else why it cannot run or, if it can, why "auto" passes it by."""
    reason = why_not(operation, impl, device)
    if reason is not None:
        return reason
    passes_by = _registry[operation, impl][1]
    return None if passes_by is None else passes_by(_as_device(device))


def _as_device(device: torch.device | str) -> torch.device:
    """torch's; what has a `type` and an `index` stays as it is."""
    if hasattr(device, "type"):
        return device
    import torch

    return torch.device(device)


def resolve(
    operation: str, impl: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> str:
    """The implementation to use, "cuda", "triton" or "torch", for tensors of `device`.

    "auto" takes the first of these that can run and that it does not pass by. It logs its choice and the reasons once
    for each operation and kind of device (level INFO). A named implementation that cannot run raises `Unavailable` with
    the reason; an unknown name raises ValueError.

    dtype: of the tensors. Only torch serves float64: "auto" takes it, another named impl raises TypeError.
    """
    device = _as_device(device)
    check_dtype(operation, impl, dtype)
    if impl == "auto" and _is_float64(dtype):
        return "torch"
    if impl != "auto":
        reason = why_not(operation, impl, device)
        if reason is not None:
            raise Unavailable(
                f'{operation}: impl="{impl}" cannot run on {device}: {reason}. Use impl="auto", which takes '
                "what is available; `kunbr-fast doctor` lists it"
            )
        check_dtype(operation, impl, dtype, "cuda")
        return impl
    reasons = {name: why_not_auto(operation, name, device) for name in IMPLEMENTATIONS}
    choice = next(name for name, reason in reasons.items() if reason is None)  # torch always is
    if (operation, device.type, choice) not in _logged:
        _logged.add((operation, device.type, choice))
        rejected = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
        logger.info("%s on %s: using %s (%s)", operation, device, choice, rejected or "all are available")
    return choice


def check_dtype(operation: str, impl: str, dtype: torch.dtype | None, narrow: str = "triton") -> None:
    """TypeError for float64 where `impl` is `narrow`; for fakes of operators too, which choose none."""
    if impl == narrow and _is_float64(dtype):
        raise TypeError(
            f'{operation}: impl="{impl}" does not serve float64: use impl="torch" or "auto", or float32 inputs'
        )


def _is_float64(dtype: torch.dtype | None) -> bool:
    if dtype is None:
        return False
    import torch

    return dtype == torch.float64


def _check(operation: str, impl: str) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}: expected one of {', '.join(OPERATIONS)}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}: expected one of auto, {', '.join(IMPLEMENTATIONS)}")


def triton_why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this is {capability[0]}.{capability[1]}"
    return None


def triton_why_not_auto(device: torch.device) -> str | None:
    """Why "auto" passes Triton kernels by where they can run."""
    return UNPROVEN if device.type == "cuda" else "the interpreter is for tests"


def cuda_why_not_auto(device: torch.device) -> str | None:
    """Why "auto" passes the CUDA library by where it can run."""
    return UNPROVEN


for _operation in CUDA_OPERATIONS:
    register(_operation, "cuda", lambda device: cuda_library.why_not(device), cuda_why_not_auto)
for _operation in OPERATIONS:
    register(_operation, "torch", why_not=lambda device: None)
    register(_operation, "triton", triton_why_not, triton_why_not_auto)
