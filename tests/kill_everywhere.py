"""Kills `kunbr-fast unlearn` at each call that changes what is on the disk, resumes it, and compares the results.

Usage: ROOT FIRST STRIDE LIMIT ARGS..., where ARGS have no --out. Prints {"events": of one run, "tried": how many,
"wrong": {"event": what was wrong}} as JSON. Each run is a process of its own, forked from this one, which has the
modules loaded and has computed nothing.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from kunbr_fast.cli import command as cli
from kunbr_fast.cli import unlearn  # noqa: F401

CALLS = ("unlink", "remove", "rename", "replace", "fsync", "rmdir", "mkdir")
FOREIGN = {"notes.txt": b"mine", "work/thesis": b"years of work", ".saving-mine/x": b"y", ".report.json.abc.tmp": b"z"}
KILLED = 9


def run(arguments, kill_at=None):
    """(status, number of events, standard error) of one run, in a child."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        events, said = [], io.StringIO()

        def watched(call):
            def wrapper(*args, **kwargs):
                events.append(call.__name__)
                if len(events) == kill_at:
                    os._exit(KILLED)
                return call(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(os, name, watched(getattr(os, name)))
        status = 1
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = cli.main(arguments)
        os.write(write, json.dumps([len(events), said.getvalue()[-2000:]]).encode())
        os._exit(status)
    os.close(write)
    text = b""
    while part := os.read(read, 1 << 16):
        text += part
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *(json.loads(text) if text else (0, ""))


def result(out):
    report = json.loads((out / "report.json").read_text())
    tensors = {name: value.numpy().tobytes() for name, value in load_file(out / "model.safetensors").items()}
    return tensors, {k: report[k] for k in ("config", "losses", "accuracy", "rtt", "blocks", "density", "recovery")}


def foreign(out, write=False):
    for name, content in FOREIGN.items():
        path = out / name
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            return f"{name} is gone or changed"
    return None


def wrong(out, arguments, kill_at, truth):
    """What goes wrong in a run that is killed at an event and resumed, or None."""
    foreign(out, write=True)
    status, _, said = run(arguments, kill_at)
    if status != KILLED:
        return f"it was not killed: {status}, {said}"
    begun = (out / "kunbr-checkpoints").exists() or (out / "report.json").exists()
    status, _, said = run([*arguments, "--resume"])
    if not begun:
        if status != 2 or "no run to resume" not in said:
            return f"nothing was begun, and resuming gave {status}, {said}"
        status, _, said = run(arguments)
    if status:
        return f"resumed: {status}, {said}"
    if result(out) != truth:
        return "another result"
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    if odd := {name for name in left if name.startswith((".", "kunbr"))} - FOREIGN.keys():
        return f"left: {sorted(odd)}"
    return foreign(out)


def main():
    root, first, stride, limit, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    whole, events, said = Path(root) / "whole", 0, ""
    foreign(whole, write=True)
    status, events, said = run([*arguments, "--out", str(whole)])
    assert status == 0, said
    truth, found = result(whole), {}
    tried = list(range(int(first), events + 1, int(stride)))[: int(limit)]
    for event in tried:
        out = Path(root) / f"event-{event}"
        if (what := wrong(out, [*arguments, "--out", str(out)], event, truth)) is not None:
            found[event] = what
        shutil.rmtree(out)
    print(json.dumps({"events": events, "tried": len(tried), "wrong": found}))


if __name__ == "__main__":
    main()
