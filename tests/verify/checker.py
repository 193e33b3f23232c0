"""sentryward in a process of its own, with limits of memory and time."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOW = "pip install '.[verify]'"
GRACE = 20  # seconds after its own limit of time before it is ended


@dataclasses.dataclass(frozen=True)
class Report:
    """result: sentryward's word. synchronization, memory: "passed", "failed" or why there is no answer.

    race: the two accesses without an order, as (instruction's line in the PTX, thread, space, "read" or "write") each
    """

    result: str
    synchronization: str
    memory: str
    why: str
    seconds: float
    mebibytes: float
    race: tuple[tuple[int, int, str, str], ...] = ()

    @property
    def passed(self) -> bool:
        return self.synchronization == self.memory == "passed"


def executable() -> str | None:
    """sentryward beside this Python, or on the path."""
    return shutil.which("sentryward", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))


def check(ptx: str, described: dict, seconds: int, mebibytes: int) -> Report:
    """RuntimeError where sentryward is not installed."""
    program = executable()
    if program is None:
        raise RuntimeError(f"sentryward is not installed: {HOW}")
    with tempfile.TemporaryDirectory(prefix="kunbr-verify-") as folder:
        source, given = Path(folder) / "kernel.ptx", Path(folder) / "launch.json"
        source.write_text(ptx)
        given.write_text(json.dumps(described))
        command = [program, str(source), "--input", str(given), "--timeout", str(seconds)]
        start = time.monotonic()
        said = _run([*command, "--memory-limit-mib", str(mebibytes)], seconds + GRACE, 2 * mebibytes + 1024)
        return _report(said, time.monotonic() - start)


def _run(command: list[str], seconds: int, mebibytes: int) -> dict:
    """What it prints. Its own limits are checked between steps, so it and its children are held to wider ones too."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=limit
    ) as process:
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"result": "timeout", "checks": {}, "diagnostics": [{"code": f"ended after {seconds} s"}]}
        finally:  # also where this process is interrupted
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    try:
        return json.loads(out)
    except ValueError:
        return {"result": "tool_failure", "checks": {}, "diagnostics": [{"code": (error or out)[-500:]}]}


def _report(said: dict, seconds: float) -> Report:
    checks = {name: said["checks"].get(name, "not_run") for name in ("synchronization", "memory")}
    for name, found in checks.items():
        if found not in ("passed", "failed"):
            checks[name] = said["result"]
    why = "; ".join(f"{d['code']}: {d.get('message', '')}".rstrip(": ") for d in said.get("diagnostics", [])[:2])
    race = ()
    if said.get("races"):
        ends = [said["races"][0][end] for end in ("first", "second")]
        space = said["races"][0]["region"]["address_space"]
        race = tuple((end["location"]["line"], end["actor"], space, end["mode"]) for end in ends)
    return Report(
        said["result"], **checks, why=why, seconds=seconds, mebibytes=said.get("peak_rss_mib") or 0, race=race
    )
