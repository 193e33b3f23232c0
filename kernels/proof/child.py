"""The process that runs kernels for a proof: `python -m kunbr_fast.kernels.proof.child`, started by prove.py.

It reads one job, JSON on a line of its standard input, and answers with lines of JSON: {"begin": target} before each
target, {"case": name} before each of its cases, {"end": target, ...} after it, {"bye": true} at the end. A kernel's
error that may have broken the device ends it early.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import torch

from ..errors import Unavailable
from ..verdicts import Target
from . import clock, gate
from .cases import DTYPES, Kind, kind_of


def main(find: Callable[[Target], Kind] = kind_of) -> None:
    """find: the table's entry of a target; tests give kinds of their own."""
    _end_with_the_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(sys.stdin.readline())
    if os.getppid() != job.get("parent", os.getppid()):
        os._exit(1)  # it went before it could take this process along
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    warnings.simplefilter("ignore")  # of torch's own, for inputs that are NaN on purpose
    work = {"gate": _gate, "time": _time}[job["work"]]
    for target in (Target(**one) for one in job["targets"]):
        _say(answers, begin=dataclasses.asdict(target))
        found, broken = _tried(work, find(target), DTYPES[target.dtype], device, lambda case: _say(answers, case=case))
        _say(answers, end=dataclasses.asdict(target), **found)
        if broken:
            break
    _say(answers, bye=True)
    os._exit(0)  # a device that hangs would keep a tidy end waiting


def _tried(
    work, kind: Kind, dtype: torch.dtype, device: torch.device, begins: Callable[[str], None]
) -> tuple[dict[str, Any], bool]:
    """What is found, and whether nothing more can be run here. {"no_verdict": why}: it says nothing of the kernel."""
    try:
        return work(kind, dtype, device, begins), False
    except gate.Hung as reason:
        return {"why": f"hung ({reason})"}, True
    except (torch.OutOfMemoryError, MemoryError):
        return {"no_verdict": "out of memory"}, False
    except Unavailable as reason:
        return {"no_verdict": str(reason)}, False
    except Exception as reason:
        text = f"{type(reason).__name__}: {_first_line(reason)}"
        busy = "busy or unavailable" in text or "out of memory" in text.lower()
        return {"no_verdict" if busy else "why": text if busy else f"crashed: {text}"}, True


def _gate(kind: Kind, dtype: torch.dtype, device: torch.device, begins: Callable[[str], None]) -> dict[str, Any]:
    found = gate.judge(kind, dtype, device, begins)
    if found.why is None:
        begins("shapes")
        clock.prepare(kind, dtype, device)
    return dataclasses.asdict(found)


def _time(kind: Kind, dtype: torch.dtype, device: torch.device, begins: Callable[[str], None]) -> dict[str, Any]:
    found = clock.times(kind, dtype, device)
    if kind.shapes and not found:  # beside a large model, say: it may fit another time
        raise torch.OutOfMemoryError
    return {"why": None, "times": [dataclasses.asdict(t) for t in found]}


def _first_line(reason: BaseException) -> str:
    return (str(reason).strip().partition("\n")[0] or repr(reason))[:200]


def _say(answers: TextIO, **line: Any) -> None:
    print(json.dumps(line), file=answers, flush=True)


def _end_with_the_parent() -> None:
    """A parent that is killed takes this process along (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
