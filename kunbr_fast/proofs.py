"""Proves the kernels that impl="auto" may take, before the first pass on a GPU: once a machine, a minute or two."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.kernels import dispatch, verdicts
from kunbr_fast.kernels.proof import cases, prove
from kunbr_fast.kernels.verdicts import Target, Verdict

logger = logging.getLogger(__name__)

_seen: set[tuple] = set()  # what this process has tried to prove, or been told
_told = False


def ensure_proven(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    impl: str = "auto",
    *,
    say: Callable[[str], None] = logger.warning,
    progress: bool = True,
    group: Any = None,
) -> None:
    """Proves what is not proven yet of the kernels for tensors of these dtypes on `device`; keeps the verdicts.

    Does nothing on a CPU, for a named impl, under torch.compile or capture, with KUNBR_PROVE=0 and on a GPU that runs
    no kernel (which are said once), and where this process has done it before. Where a proof fails for want of memory,
    say, "auto" takes torch.

    say: told what begins and what was found. progress: show a bar. group: of the processes that share the work, which
    all have to call this: rank 0 proves and tells the others, which wait (a `parallel.group.Group`).
    """
    if device.type in ("cpu", "meta") or impl != "auto" or _inside(device):
        return
    if verdicts.switched_off():
        _say_once(say, 'proofs of kernels are off (KUNBR_PROVE=0): impl="auto" takes torch')
        return
    names = {name for dtype in _with_autocast(dtypes) if (name := cases.named(dtype)) is not None}
    alone, asked = group is None or group.size == 1, (device, frozenset(names))
    key = alone, *asked
    if key in _seen or (alone and (False, *asked) in _seen):  # rank 0 has told what there is
        return
    wanted = cases.targets(device, names)
    if names and not wanted:
        _say_once(say, f'no kernel runs on {device} ({dispatch.triton_why_not(device)}): impl="auto" takes torch')
    if not alone:
        found = None
        if group.first:
            _prove(device, wanted, say, progress)
            found = [verdict.as_json() for verdict in verdicts.current(device)]
        verdicts.adopt(map(Verdict.from_json, group.gather(found)[0]), device)
    if alone or not any(verdicts.find(target, device) for target in wanted):  # this rank's GPU is another one
        _prove(device, wanted, say, progress)
    _seen.add(key)  # not before: one that was interrupted, in a notebook say, begins anew


def _prove(device: torch.device, wanted: list[Target], say: Callable[[str], None], progress: bool) -> None:
    if not prove.missing(wanted, device):
        return
    say(
        f"proving the kernels on {torch.cuda.get_device_name(device)}: a minute or two, once a machine and version "
        "(KUNBR_PROVE=0 turns it off)"
    )
    begin = time.monotonic()
    with Progress(silent=not progress) as bar:
        found, none = prove.ensure(wanted, prove.Prover(device, progress=bar), say)
    for verdict in found:
        if not verdict.right:
            say(f"{verdict.target} is not used on this GPU: {verdict.why}. Please report it")
    for target, why in none.items():
        say(f'{target} could not be proven: {why}; impl="auto" takes torch')
    right = sum(verdict.right for verdict in found)
    if found:
        took = f"{time.monotonic() - begin:.0f} s"
        say(f"proven in {took}: {right} of {len(found)} are right; `kunbr-fast doctor` lists them")


def _with_autocast(dtypes: Iterable[torch.dtype]) -> set[torch.dtype]:
    return {*dtypes, *([torch.get_autocast_dtype("cuda")] if torch.is_autocast_enabled("cuda") else [])}


def _inside(device: torch.device) -> bool:
    """Whether this runs where no process may be waited for."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


def _say_once(say: Callable[[str], None], text: str) -> None:
    global _told
    if not _told:
        _told = True
        say(text)


class Progress:
    """A bar for each of two parts, checked and timed, with what is running. silent: lines only."""

    def __init__(self, silent: bool = False):
        self._silent, self._part, self._bar = silent, "", None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, part: str, done: int, total: int, now: str) -> None:
        if self._part != part:
            self.__exit__()
            options = dict(unit="kernel", dynamic_ncols=True, leave=False, disable=self._silent)
            self._part, self._bar = part, tqdm(total=total, desc=part, **options)
        self._bar.n = done
        self._bar.set_postfix_str(now[:60])

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
