"""Runs proofs in processes of their own: a kernel may hang, or break the device for the process that it runs in.

First whether each kind of launch is right, several processes side by side, as most of the time goes to compiling. Then
how fast, one after the other, as they would disturb each other's times.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import verdicts
from ..verdicts import Target, Timing, Verdict

LIMIT = 120.0  # seconds that a case may take: compiling on a busy machine takes long, too
START = 300.0  # and a process until it begins
OUT_OF_MEMORY = "out of memory"
ROOT = Path(sys.modules[__package__.partition(".")[0]].__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", f"{__package__}.child")
MOST_WORKERS = 8  # each takes some 0.5 GiB of device memory for its context


def ignore(*arguments) -> None:
    """For whom nothing is to be told."""


@dataclasses.dataclass
class Prover:
    """Proves targets on a device.

    limit: seconds that a case of a target may take before its process is ended. on_verdict: told each verdict as it is
    known; on_checked: each that is right and still has no times. progress: told ("checked" or "timed", how many, of how
    many, what is running). command: what runs child.py's `main`.
    """

    device: torch.device
    limit: float = LIMIT
    workers: int = 0  # 0: as many as there are CPUs, up to MOST_WORKERS
    on_verdict: Callable[[Verdict], None] = ignore
    progress: Callable[[str, int, int, str], None] = ignore
    command: Sequence[str] = COMMAND
    on_checked: Callable[[Verdict], None] = ignore

    def __post_init__(self):
        self.device = verdicts.with_index(self.device)  # a child has no current one, and torch sets none without

    def prove(
        self, targets: Sequence[Target], checked: Sequence[Verdict] = ()
    ) -> tuple[list[Verdict], dict[Target, str]]:
        """(verdicts, why there is none on the others). Out of memory, say, is no verdict. checked: verdicts without
        times on some of the targets, which were found right before."""
        self.found: list[Verdict] = []
        self.none: dict[Target, str] = {}
        self.gates = {v.target: {"why": None, "error": v.error, "bound": v.bound} for v in checked}
        unchecked = [target for target in targets if target not in self.gates]
        groups = [list(g) for _, g in itertools.groupby(unchecked, lambda t: (t.operation, t.impl, t.kind))]
        self._run("gate", groups, self.workers or min(MOST_WORKERS, _cpus()), self._judged)
        alone, self.none = self.none, {}  # they may fit then
        self._run("gate", [[target] for target, why in alone.items() if why == OUT_OF_MEMORY], 1, self._judged)
        self.none = {target: why for target, why in alone.items() if why != OUT_OF_MEMORY} | self.none
        self._run("time", [list(self.gates)], 1, self._timed)
        return self.found, self.none

    def _judged(self, target: Target, answer: dict[str, Any]) -> None:
        if "no_verdict" in answer:
            self.none[target] = answer["no_verdict"]
        elif answer["why"] is None:
            self.gates[target] = answer
            self.on_checked(self._verdict(target, answer))
        else:
            self._conclude(target, answer)

    def _timed(self, target: Target, answer: dict[str, Any]) -> None:
        """A kernel that breaks at the size of a model is wrong. One that there was no room to time is timed another
        time."""
        if "no_verdict" in answer:
            self.none[target] = f"right, but not timed: {answer['no_verdict']}"
        else:
            self._conclude(target, self.gates[target] | answer)

    def _conclude(self, target: Target, answer: dict[str, Any]) -> None:
        verdict = self._verdict(target, answer)
        self.found.append(verdict)
        self.on_verdict(verdict)

    def _verdict(self, target: Target, answer: dict[str, Any]) -> Verdict:
        times = tuple(Timing(**one) for one in answer.get("times", ()))
        of = verdicts.key(target.operation, target.impl, self.device)
        return Verdict(target, answer["why"], answer.get("error"), answer.get("bound"), times, of)

    def _run(self, work: str, jobs: list[list[Target]], workers: int, answered: Callable) -> None:
        """Calls `answered(target, answer)` for each target. A child that ends early leaves its rest to another one."""
        waiting, running = [job for job in jobs if job], []
        done, total = 0, sum(map(len, jobs))
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    while waiting and len(running) < workers:
                        child = Child(self.command, work, waiting.pop(0), self.device)
                        selector.register(child.output, selectors.EVENT_READ, child)
                        running.append(child)
                    selector.select(timeout=0.2)
                    for child in list(running):
                        answers, rest = child.answers(self.limit)
                        for target, answer in answers.items():
                            answered(target, answer)
                        done += len(answers)
                        if child.ended:
                            selector.unregister(child.output)
                            child.close()
                            running.remove(child)
                            waiting += [rest] if rest else []
                    now = ", ".join(str(child.current) for child in running if child.current is not None)
                    self.progress("checked" if work == "gate" else "timed", done, total, now)
            finally:
                for child in running:
                    child.kill()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Child:
    """A process, and its targets that have no answer yet."""

    def __init__(self, command: Sequence[str], work: str, targets: list[Target], device: torch.device):
        self.targets, self.current, self.ended = list(targets), None, False
        self.errors = tempfile.TemporaryFile()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
        )  # fmt: skip
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.text, self.heard = b"", time.monotonic()
        asked = [dataclasses.asdict(target) for target in targets]
        job = {"work": work, "device": str(device), "targets": asked, "parent": os.getpid()}
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended at once: `answers` says so

    def answers(self, limit: float) -> tuple[dict[Target, dict[str, Any]], list[Target]]:
        """(what has been answered since, the targets left to another process if this one has ended)."""
        found = {}
        while chunk := self.output.read(1 << 16):
            self.text += chunk
            self.heard = time.monotonic()
        *lines, self.text = self.text.split(b"\n")
        for line in map(json.loads, lines):
            if "bye" in line:  # where a device hangs its process may not be able to end
                self.ended = True
            elif "begin" in line:
                self.current = Target(**line["begin"])
            elif "case" not in line:  # a case is a sign of life, as kernels are compiled for each
                target = Target(**line.pop("end"))
                found[target] = line
                self.targets.remove(target)
                self.current = None
        if self.ended:
            return found, self.targets
        limit = START if self.current is None else limit
        late = time.monotonic() - self.heard > limit
        if chunk is None and not late:  # nothing to read now; b"" once it has closed its end
            return found, []
        self.ended = True
        why = self._why(limit if late else None)
        if self.current is not None:
            found[self.current] = {"why": why}
            self.targets.remove(self.current)
        elif not found and self.targets:  # it could not even begin: another one could not either
            found |= dict.fromkeys(self.targets, {"no_verdict": f"its process did not start: {why}"})
            self.targets = []
        return found, self.targets

    def _why(self, limit: float | None) -> str:
        """Why the process ended, which it is made to."""
        if limit is not None:
            self.kill()
            return f"hung (nothing for {limit:.0f} s)"
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        return f"crashed: exit code {code}" + f", {said}" * bool(said)

    def kill(self) -> None:
        """With all that it has started. One that hangs in the driver may outlive that for a while."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass

    def close(self) -> None:
        self.kill()
        self.errors.close()
        self.output.close()
        self.process.stdin.close()


# ---------------------------------------------------------------- what is missing


def missing(targets: Iterable[Target], device: torch.device) -> list[Target]:
    """Those on which there is no whole verdict: none that counts, or one on a right kernel without times."""
    found = ((target, verdicts.find(target, device)) for target in targets)
    return [target for target, verdict in found if verdict is None or (verdict.right and not verdict.times)]


def ensure(
    targets: Sequence[Target], prover: Prover, say: Callable[[str], None] = ignore, again: bool = False
) -> tuple[list[Verdict], dict[Target, str]]:
    """Proves what is missing of `targets`, once a machine: the verdicts are kept, and this process goes by them.

    Two processes do not prove at once: the second one waits, and takes what the first one found. Verdicts that cannot
    be kept (a folder that is read-only) count for this process, and `say` is told. again: all of `targets`, anew.
    """
    if not again and not missing(targets, prover.device):
        return [], {}
    with verdicts.alone(say):
        verdicts.forget()
        wanted = targets if again else missing(targets, prover.device)
        if not wanted:
            return [], {}
        problems: list[OSError] = []

        def keep(verdict: Verdict) -> None:
            """At once, as a proof may be killed."""
            try:
                verdicts.write(verdicts.path_of(prover.device), [verdict])
            except OSError as error:
                problems.append(error)

        def conclude(verdict: Verdict) -> None:
            keep(verdict)
            prover.on_verdict(verdict)

        checked = [] if again else [v for t in wanted if (v := verdicts.find(t, prover.device)) is not None]
        found, none = dataclasses.replace(prover, on_verdict=conclude, on_checked=keep).prove(wanted, checked)
        for error in problems[:1]:
            say(
                f"the verdicts on these kernels could not be kept ({error}): set KUNBR_CACHE to a folder that can be "
                "written, or they are proven at each start"
            )
        verdicts.adopt(found, prover.device)
        return found, none
