"""Which implementation runs an operation: `impl="auto" | "cuda" | "triton" | "torch"`, one word everywhere.

`torch` is always there, every operation has Triton kernels, and some have CUDA kernels too (cuda_library.py). On a GPU
"auto" goes by what was proven on it (proof/): it takes the fastest of the implementations that are right, or torch.
`register` changes where one can run, and what "auto" makes of it; an operation's op.py calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from . import cuda_library, verdicts
from .errors import Unavailable

if TYPE_CHECKING:  # `kunbr-fast doctor` asks about the CPU without torch
    import torch

OPERATIONS = ("grad_density", "linear_loss", "lion", "adamw", "rms_norm", "layer_norm", "swiglu", "geglu", "rotary")
CUDA_OPERATIONS = ("grad_density", "lion", "adamw")  # those that csrc/ has kernels for
IMPLEMENTATIONS = ("cuda", "triton", "torch")  # of two that are equally fast "auto" prefers the first
TORCH = 1.0  # torch's speed, in which others' are given
UNPROVEN = "not proven on this GPU: run `kunbr-fast prove`"
DTYPE_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A call, as far as the choice of an implementation depends on it.

    kinds: {implementation: the kind of launch that it would take}; others take "all". size: about how many elements
    (which: the operation's cases.py), None where it is not known. in_graph: whether it runs in a CUDA graph.
    """

    operation: str
    device: torch.device
    dtype: torch.dtype | None = None
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    size: int | None = None
    in_graph: bool = False


logger = logging.getLogger(__name__)
WhyNot = Callable[["torch.device"], "str | None"]
Rate = Callable[[Request, str], "float | str"]
_registry: dict[tuple[str, str], tuple[WhyNot, Rate]] = {}
_logged: set[tuple] = set()
_chosen: dict[tuple, str] = {}
_in_graphs = 0  # how many are inside `in_graphs`, of all threads: a backward pass runs in others


def register(operation: str, impl: str, why_not: WhyNot, rate: Rate | None = None) -> None:
    """Says where `impl` of `operation` can run: why_not(device) is None, or a short reason. ValueError for an unknown
    name, and for an implementation that the operation's op.py does not call.

    rate(request, impl): how often "auto" would rather have it than torch, as a factor, or why it passes it by.
    """
    _check(operation, impl)
    if impl == "cuda" and operation not in CUDA_OPERATIONS:
        raise ValueError(f"{operation} has no CUDA kernel: expected one of {', '.join(CUDA_OPERATIONS)}")
    _registry[operation, impl] = why_not, rate or (lambda request, impl: float("inf"))
    forget()


def forget() -> None:
    """Makes each choice anew: after a change of what can run here, or of what was proven."""
    _chosen.clear()


verdicts.on_change(forget)


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
    found = _rate(Request(operation, _as_device(device)), impl)
    return found if isinstance(found, str) else None


def _rate(request: Request, impl: str) -> float | str:
    reason = why_not(request.operation, impl, request.device)
    return reason if reason is not None else _registry[request.operation, impl][1](request, impl)


@contextlib.contextmanager
def in_graphs() -> Iterator[None]:
    """Inside, "auto" chooses for calls that a CUDA graph will replay, for which the host's time does not count. For the
    calls before the capture too, which compile what will be captured."""
    global _in_graphs
    _in_graphs += 1
    try:
        yield
    finally:
        _in_graphs -= 1


def _as_device(device: torch.device | str) -> torch.device:
    """torch's; what has a `type` and an `index` stays as it is."""
    if hasattr(device, "type"):
        return device
    import torch

    return torch.device(device)


def resolve(
    operation: str,
    impl: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kinds: Mapping[str, str] | None = None,
    size: int | None = None,
) -> str:
    """The implementation to use, "cuda", "triton" or "torch", for tensors of `device`.

    "auto" takes the one with the best rate of those that can run, and logs its choice and the reasons once for each
    operation and kind of device (level INFO). A named implementation that cannot run raises `Unavailable` with the
    reason; an unknown name raises ValueError. A choice is remembered; `forget` ends that.

    dtype: of the tensors. Only torch serves float64: "auto" takes it, another named impl raises TypeError.
    kinds, size: as in `Request`.
    """
    if size is not None:  # by the nearest power of two, so that of those of one key the first decides nothing
        size = 1 << (size * size).bit_length() // 2
    key = operation, impl, device, dtype, _in_graphs > 0, size, kinds and tuple(kinds.values())
    found = _chosen.get(key)
    if found is None:
        request = Request(operation, _as_device(device), dtype, kinds or {}, size, _in_graphs > 0)
        found = _chosen[key] = _resolve(impl, request)
    return found


def _resolve(impl: str, request: Request) -> str:
    operation, device, dtype = request.operation, request.device, request.dtype
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
    rates = {name: _rate(request, name) for name in IMPLEMENTATIONS}
    choice = max((name for name, rate in rates.items() if not isinstance(rate, str)), key=rates.get)  # torch always is
    if (operation, device.type, choice) not in _logged:
        _logged.add((operation, device.type, choice))
        rejected = "; ".join(f"{name}: {reason}" for name, reason in rates.items() if isinstance(reason, str))
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


def _compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def triton_why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, None if they can."""
    if not _compiling() and importlib.util.find_spec("triton") is None:  # torch 2.11 cannot trace the search
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type not in ("cpu", "cuda", "meta"):
        return f"needs an NVIDIA GPU: parts of the kernels are PTX, which {device.type} devices cannot run"
    if device.type == "cpu":
        return "needs a CUDA device"
    import torch

    if torch.version.hip:
        return (
            f"needs an NVIDIA GPU: parts of the kernels are PTX, and this torch is built for ROCm {torch.version.hip}"
        )
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this is {capability[0]}.{capability[1]}"
    return None


def proven(request: Request, impl: str) -> float | str:
    """The rate of our own kernels on a GPU: their speed in torch's, where they were proven right and fast enough."""
    if request.device.type != "cuda":
        return "the interpreter is for tests"
    if verdicts.switched_off():
        return "proofs are off (KUNBR_PROVE=0)"
    found = _verdicts(request, impl)
    if not found:
        return UNPROVEN
    if not any(verdict.right for verdict in found):
        return found[0].why
    if request.dtype is None:
        speed = max((t.speed for verdict in found for t in verdict.times), default=None)
    else:
        speed = found[0].speed(request.size, "graph" if request.in_graph else "eager")
    if speed is None:
        return "right, but not timed on this GPU"
    return speed if speed >= verdicts.ENOUGH else f"slower than torch: {speed:.2g}x"


def _verdicts(request: Request, impl: str) -> list[verdicts.Verdict]:
    """The one on this request; without a dtype, as when only the operation is asked about, all that there are."""
    if request.dtype is None:
        asked = request.operation, impl
        return [v for v in verdicts.current(request.device) if (v.target.operation, v.target.impl) == asked]
    dtype = DTYPE_NAMES.get(str(request.dtype), "none")
    target = verdicts.Target(request.operation, impl, dtype, request.kinds.get(impl, "all"))
    found = verdicts.find(target, request.device)
    return [] if found is None else [found]


for _operation in CUDA_OPERATIONS:
    register(_operation, "cuda", lambda device: cuda_library.why_not(device), proven)
for _operation in OPERATIONS:
    register(_operation, "torch", lambda device: None, lambda request, impl: TORCH)
    register(_operation, "triton", triton_why_not, proven)
