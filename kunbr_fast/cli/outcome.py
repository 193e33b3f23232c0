"""What a command that ends with an exception says on standard error, and its exit status."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path

from kunbr_fast.cli import process
from kunbr_fast.cli.outputs import of_disk, resumes
from kunbr_fast.files.shown import plain

PACKAGE = Path(__file__).resolve().parent.parent
# What torch says in a RuntimeError of no type of its own where a device is the cause, not the program.
_OF_DEVICES = (
    "CUDA error", "CUDA driver", "CUDA-capable", "CUDA GPUs", "NVIDIA driver", "compiled with CUDA", "cuDNN", "CUDNN_",
    "CUBLAS_STATUS", "CUSOLVER_STATUS", "NCCL", "device string", "device type at start", "device ordinal",
    "Cannot copy out of meta tensor", "arguments from the '", "MPS backend", "HIP error",
)  # fmt: skip


def outcome(
    error: BaseException, arguments: argparse.Namespace, caught: process.Caught, speaks: bool
) -> tuple[int | None, str]:
    """(exit status, text); None for a bug, which keeps its traceback. speaks: whether this is the rank that prints."""
    kept = "what was finished is kept, --resume goes on" if resumes(arguments) else ""
    and_kept = "; " + kept if kept else ""
    if caught.raised or isinstance(error, KeyboardInterrupt):
        number = caught.number or _asked_by(error)
        return 128 + number, process.SAID[number] + and_kept
    if isinstance(error, BrokenPipeError):
        return process.BROKEN_PIPE, ""  # as `yes | head`: its reader has enough
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return 2, _of_input(error) + (and_kept if of_disk(error) else "")
    if "torch" in sys.modules and (found := _of_training(error, arguments, caught, speaks, kept, and_kept)) is not None:
        return found
    if (text := _of_machine(error)) is not None:
        return 2, text + _where(error) + and_kept
    return None, ""


def _asked_by(error: BaseException) -> int:
    """The signal of an exception that came without one here: of another rank, which was asked to stop."""
    return signal.SIGTERM if isinstance(error, process.Stopped) else signal.SIGINT


def _of_input(error: BaseException) -> str:
    if isinstance(error, OSError):
        if error.filename is None:
            return error.strerror or str(error)
        name = error.filename if isinstance(error.filename, str) else repr(error.filename)
        return f"{plain(name)}: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file or a name that was given is not UTF-8 text ({error}): save it as UTF-8"
    return str(error)


def _of_training(
    error: BaseException, arguments: argparse.Namespace, caught: process.Caught, speaks: bool, kept: str, and_kept: str
) -> tuple[int, str] | None:
    from kunbr_fast.kernels.errors import Unavailable
    from kunbr_fast.memory import OutOfMemory, is_out_of_memory
    from kunbr_fast.parallel.group import ProcessGone
    from kunbr_fast.training.diverged import Diverged

    if isinstance(error, ProcessGone):
        if caught.number is not None:  # the others got the signal too, and were faster
            return 128 + caught.number, process.SAID[caught.number] + and_kept
        silent = error.told and not speaks  # the process that failed has said why
        return 4, "" if silent else str(error) + and_kept
    if isinstance(error, OutOfMemory):
        return 2, str(error) + (" W" + kept[1:] if kept else "")
    if isinstance(error, Diverged):
        return 3, str(error) + (f". {error.resume} (--resume)" if kept and error.resume else "")
    if isinstance(error, Unavailable):
        return 2, str(error)
    if is_out_of_memory(error):
        stream = "" if getattr(arguments, "stream", True) else "--stream, "
        cure = f"smaller batches or samples (--batch-size, --max-length), {stream}or a device with more memory"
        return 2, f"out of memory: {_first_line(error)}{_where(error)}. Cures: {cure}{and_kept}"
    return None


def _of_machine(error: BaseException) -> str | None:
    """Of errors that are not the program's; None for others."""
    said = _first_line(error)
    if isinstance(error, MemoryError):
        return "out of memory: give less at once, or take a machine with more"
    if isinstance(error, RecursionError):
        return f"nested too deep ({said}): is a file that was given nested without end?"
    if isinstance(error, OverflowError):
        return f"a number that was given is too large ({said}): give a smaller one"
    if type(error).__name__ == "SafetensorError":
        return f"{said}: a file of weights is damaged, or no safetensors file"
    if isinstance(error, ImportError) and not (error.name or "").startswith("kunbr_fast"):
        return f"{said}: install it, or repair the installation (`kunbr-fast doctor`)"
    torchs = (RuntimeError, AssertionError, NotImplementedError)
    if isinstance(error, torchs) and any(text in str(error) for text in _OF_DEVICES):
        return f"{said}: the device cannot be used, or has failed: `kunbr-fast doctor` shows what can run here"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".: ") or type(error).__name__


def _where(error: BaseException) -> str:
    """The last place in this package, for those who look for the cause."""
    ours = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return f" [{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}]" if ours else ""
