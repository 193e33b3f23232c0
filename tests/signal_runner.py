"""Runs `kunbr-fast` and gets signals at a given point.

Usage: python signal_runner.py SIGNALS POINT[@RANK] COUNT ARGUMENTS...

The point is a function, in whose call number COUNT this process sends itself each of SIGNALS (SIGTERM,SIGINT).
"""

import os
import signal
import sys

import torch

from kunbr_fast.cli.entry import main as command_line
from kunbr_fast.density.passes import Measurement
from kunbr_fast.evaluation import rtt
from kunbr_fast.files import atomic
from kunbr_fast.run.state import RunState
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining

POINTS = {
    "warm-up": (FullTraining, "update"),
    "block": (BlockTraining, "update"),
    "density": (Measurement, "_pass"),
    "attack": (rtt, "measure_all"),
    "rename": (atomic.os, "replace"),
    "checkpoint": (RunState, "save_progress"),
    "none": (rtt, "no such function"),
}


def main():
    signals, point, count, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    point, _, rank = point.partition("@")
    owner, name = POINTS[point]
    real, calls = getattr(owner, name, None), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(count):
            for number in signals.split(","):
                os.kill(os.getpid(), getattr(signal, number))
        return real(*args, **kwargs)

    if rank in ("", os.environ.get("RANK")):
        setattr(owner, name, wrapped)
    sys.argv[1:] = arguments
    sys.exit(command_line())


if __name__ == "__main__":
    main()
