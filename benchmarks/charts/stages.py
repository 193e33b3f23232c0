"""A whole run, stacked by stage: end_to_end's cases are the stages and their total, its variants the sides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.charts.look import DPI, WIDTH, page, short
from kunbr_fast.benchmarks.rows import Outcome, tilde
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.figures import BLUE, GREEN, GREY, ORANGE

COLOURS = (BLUE, "#E69F00", GREEN, ORANGE, "#56B4E9", "#CC79A7", GREY, "#1B3A57")


def stages(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    runs: dict[tuple, list[Outcome]] = {}
    for case in cases:
        if case.suite == "end_to_end" and case.ran and _stage(case) != "total":
            runs.setdefault((case.model, case.dtype), []).append(case)
    for index, (names, some) in enumerate(runs.items()):
        path = folder / f"end_to_end{page(index)}.png"
        _draw(some, f"End to end: {', '.join(filter(None, names))}", path)
        yield "End to end", path


def _stage(case: Outcome) -> str:
    """The blocks, which are many, as one stage."""
    return "re-insertion" if re.fullmatch(r"layers \d+-\d+", case.case) else case.case


def _draw(cases, title, path):
    rows, extrapolated = {}, set()
    for case in cases:
        for row in case.ran:
            side, stage = (row["variant"], row["ours"]), _stage(case)
            seconds = rows.setdefault(side, {})
            seconds[stage] = seconds.get(stage, 0.0) + row["ms"] / 1e3
            if tilde(row):
                extrapolated.add(side)
    sides = sorted(rows, key=lambda side: (-side[1], sum(rows[side].values())))
    totals = [sum(rows[side].values()) for side in sides]
    unit, divisor = ("s", 1) if max(totals) < 600 else ("min", 60) if max(totals) < 36000 else ("h", 3600)
    names = list(dict.fromkeys(map(_stage, cases)))
    lines = -(-len(names) // 3)  # of the legend
    figure, axes = figures.single((WIDTH, 1.9 + 0.75 * len(sides) + 0.25 * lines), grid="x", dpi=DPI)
    for y, (side, total) in enumerate(zip(sides, totals)):
        begin = 0.0
        for index, stage in enumerate(names):
            value = rows[side].get(stage, 0.0) / divisor
            style = {"hatch": "////"} if index >= len(COLOURS) else {}
            axes.barh(y, value, left=begin, height=0.6, color=COLOURS[index % len(COLOURS)], edgecolor="white",
                      linewidth=0.8, label=short(stage, 40) if y == 0 else None, **style)  # fmt: skip
            if value * divisor > 0.08 * max(totals):
                axes.text(begin + value / 2, y, f"{value:.3g}", ha="center", va="center", color="white", fontsize=10,
                          fontweight="bold")  # fmt: skip
            begin += value
        text = f"{total / divisor:.3g} {unit}{', extrapolated' if side in extrapolated else ''}"
        axes.annotate(text, (begin, y), (5, 0), textcoords="offset points", va="center",
                      fontsize=11, fontweight="bold")  # fmt: skip
    axes.set_xlim(0, (1.32 if extrapolated else 1.13) * max(totals) / divisor)
    axes.set_ylim(len(sides) - 0.4, -0.6)
    axes.set_yticks(range(len(sides)), [short(f"{v} (ours)" if ours else v, 30) for v, ours in sides])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel({"s": "seconds", "min": "minutes", "h": "hours"}[unit])
    axes.set_title(short(title, 70), loc="left", fontweight="bold", pad=12 + 18 * lines)
    figures.legend(axes, ncols=3)
    figures.save(figure, path)
