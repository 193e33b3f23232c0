"""What tests of all rooms share: relative errors, processes of their own, and what an environment may do to code."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kunbr_fast as kf
from kunbr_fast.run.reporter import Reporter

HERE = Path(__file__).resolve().parent


def relative(ours, truth):
    """|ours - truth| / |truth|, Euclidean, in fp64."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


def rarely(values, often):
    """Parameters of a test: those in `often` run each time, the others, which show the same, with `make test-slow`."""
    return [value if value in often else pytest.param(value, marks=pytest.mark.slow) for value in values]


def environment(**more):
    """For a process that imports this checkout and what lies in tests/, and is none of a group's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | more


def python(*arguments, **more):
    """Runs another interpreter, and waits. more: variables of its environment."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def refused(message):
    """A real write error in the middle of a file, which each library reports in its own way: files may not grow.
    For the statement only: the limit is the process's, and pytest's own output may go to a long file."""
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(OSError, match=message):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)


def forbid_waiting(monkeypatch):
    """What would wait for a GPU raises."""

    def refuse(*arguments, **options):
        raise AssertionError("this waits for the device")

    for name in ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(torch, "nonzero", refuse)


@contextlib.contextmanager
def poisoned(device):
    """torch.empty fills floats with NaN inside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(8, device=device).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def stopping_within(step):
    """A reporter and a `Stop` for `kf.unlearn`, which is asked to stop within its step number `step` (None: never), and
    the list of the stages of the steps that it makes."""
    made, stop = [], kf.Stop()

    @contextlib.contextmanager
    def around(stage, part):
        yield
        if part == "step":
            made.append(stage)
            if len(made) == step:
                stop.request()

    return Reporter(around=around), stop, made
