"""All pictures that some rows have data for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.charts.bars import bandwidth, memory, speedups
from kunbr_fast.benchmarks.charts.roofline import roofline
from kunbr_fast.benchmarks.charts.stages import stages
from kunbr_fast.benchmarks.charts.times import times
from kunbr_fast.benchmarks.rows import Outcome
from kunbr_fast.benchmarks.suites import SUITES

CHARTS: tuple[Callable[[Sequence[Outcome], Path], Iterable[tuple[str, Path]]], ...] = (
    stages, roofline, bandwidth, speedups, times, memory,
)  # fmt: skip
NAMES = re.compile(rf"(end_to_end|roofline_\w+|(speedup|time|memory)_({'|'.join(SUITES)}))(_\d+)?\.png")


def draw(cases: Sequence[Outcome], folder: Path) -> list[tuple[str, Path]]:
    """[(heading, PNG)] of all that can be drawn. Pictures of an earlier report that are not drawn now are deleted."""
    drawn = [found for chart in CHARTS for found in chart(cases, folder)]
    for old in set(folder.glob("*.png")) - {path for _, path in drawn}:
        if NAMES.fullmatch(old.name):
            old.unlink()
    return drawn
