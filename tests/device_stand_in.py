#!/usr/bin/env python3
"""Stands in for `python3` on a GPU machine: says that there is a GPU, and plays the parts of device_suite.sh.

STAND_IN in the environment, as JSON: {part: how}, where how is one of

    wrong   exit status 1
    hang    never ends and ignores TERM, with two children that do the same: one in a process session of its own, one
            without an environment
    die     ends by a signal, and leaves these children
    leave   all is well, but for these children
    slow    takes a second more

and nothing, or anything else, for what goes well. A part writes what it has before it does any of that.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VERDICTS = [
    ("grad_density", "cuda", "portable", None),
    ("grad_density", "cuda", "hopper", "hung"),
    ("grad_density", "triton", "short", None),
    ("grad_density", "triton", "short by row", "wrong values"),
    ("lion", "triton", "all", None),
    ("adamw", "triton", "all", "not deterministic"),
]


def part(arguments):
    """The name of the part whose command this is; None for what the script itself asks."""
    text = " ".join(arguments)
    if arguments[0] == "-":
        return "environment"
    if text.startswith("-m kunbr_fast"):
        return arguments[3] if arguments[2] == "bench" else arguments[2]
    known = {"csrc/build.py": "build", "-m pip": "install", "-m pytest": "tests", "wide_demo.py": "evidence"}
    known["launch_each.py"] = "memcheck"
    return next((name for key, name in known.items() if key in text), None)


def write(name, arguments):
    """What the real one would leave."""
    print(f"{name} begins: {' '.join(arguments)}", file=sys.stderr, flush=True)
    if name == "prove":
        for operation, impl, kind, why in [verdict for verdict in VERDICTS if verdict[0] in arguments]:
            verdict = {"operation": operation, "impl": impl, "dtype": "bf16", "kind": kind, "right": why is None}
            print(json.dumps(verdict | {"why": why, "times": []}), flush=True)
        folder = Path(arguments[arguments.index("--out") + 1])
        for file in ("nvidia-stand-in.json", "nvidia-stand-in.lock", ".nvidia-stand-in.json.1f.tmp"):
            (folder / file).write_text("{}")
    elif arguments[:3] == ["-m", "kunbr_fast", "bench"]:
        folder = Path(arguments[arguments.index("--out") + 1])
        with open(folder / "results.csv", "a") as file:
            file.write(f"{name}\n")
        (folder / "results.json").write_text("[]")
        (folder / ".results.csv.2e.tmp").write_text("half")
    elif name == "evidence":
        Path(arguments[arguments.index("--out") + 1]).write_text("{}")


def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def main():
    arguments = sys.argv[1:]
    if arguments == ["stay"]:
        stay()
    if arguments[0].endswith("proven.py"):
        os.execv(sys.executable, [sys.executable, *arguments])
    name = part(arguments)
    if name is None:  # is_available; the way to this checkout, which is not there; pytest's plugins, which are
        if "is_available" in arguments[1]:
            print(os.environ.get("STAND_IN_GPU", "True"))
        sys.exit("kunbr_fast" in arguments[1])
    how = json.loads(os.environ.get("STAND_IN", "{}")).get(name)
    write(name, arguments)
    if how in ("hang", "die", "leave"):
        subprocess.Popen([__file__, "stay"], start_new_session=True)
        subprocess.Popen([__file__, "stay"], env={})
    if how == "hang":
        stay()
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(1)
    print(f"{name} ends", file=sys.stderr, flush=True)
    sys.exit(how == "wrong")


if __name__ == "__main__":
    main()
