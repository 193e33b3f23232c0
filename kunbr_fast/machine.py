"""The processor of this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path


def usable_cpus() -> Collection[int]:
    """The logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: honours taskset and most containers
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
