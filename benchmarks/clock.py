"""Seconds of the stages of a whole run, and what they would be over more steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by stage: of steps the first ones of each training, and the others; of what has no steps all as first."""

    def __init__(self, device: torch.device):
        self._device = device
        self.first: dict[str, list[float]] = {}
        self.later: dict[str, list[float]] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, stage: str, first: bool = True) -> Iterator[None]:
        begin = self._now()
        yield
        (self.first if first else self.later).setdefault(stage, []).append(self._now() - begin)

    def total(self, stage: str) -> float:
        return sum(self.first.get(stage, [])) + sum(self.later.get(stage, []))

    def steps(self, stage: str) -> int:
        return len(self.first[stage]) + len(self.later.get(stage, []))

    def extrapolated(self, stage: str, steps: int) -> float:
        """Seconds of `steps` steps in as many trainings."""
        first, later = self.first[stage], self.later.get(stage, [])
        if not later:
            return sum(first) * steps / len(first)
        return sum(first) + sum(later) * (steps - len(first)) / len(later)


@dataclasses.dataclass(frozen=True)
class StageTime:
    """What a side took for it: milliseconds, extrapolated to `of` steps (or samples) from `measured`."""

    ms: float
    measured: int = 1
    of: int = 1
    unit: str = ""

    @property
    def note(self) -> str:
        return "" if self.measured >= self.of else f"extrapolated from {self.measured} of {self.of} {self.unit}"


@dataclasses.dataclass(frozen=True)
class Side:
    stages: dict[str, StageTime]
    clocked: float  # seconds that the clocks have measured
    peak: int | None
    others: float | None
