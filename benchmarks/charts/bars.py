"""Horizontal bars under the heading of each case: speed-ups, percent of the roofline, memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.benchmarks.charts import look
from kunbr_fast.benchmarks.charts.look import best, file_name, number, short, suites_of
from kunbr_fast.benchmarks.rows import EXTRAPOLATED, Outcome, tilde
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.figures import BLUE, GREEN, GREY, ORANGE

BARS, LINE = 44, 0.235  # lines of a picture, and inches of height that one takes
FAR = 1e6  # the largest ratio that an axis has room for
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # behind text that lines run through
SLOWER = {"hatch": "////", "edgecolor": "white"}
STANDING = {"hatch": "xxxx", "edgecolor": "white", "linewidth": 0, "alpha": 0.75}
FINE = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
ROUND = (FINE, (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # steps of an axis within a decade, from fine to coarse


def speedups(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """The best of ours over each rival."""
    for suite in suites_of(cases):
        some, groups = [case for case in cases if case.suite == suite and case.ratio], []
        for case in some:
            title = f"{case}, {case.dtype}: {case.ours['variant']}, {tilde(case.ours)}{number(case.ours['ms'])} ms"
            groups.append((title, [_speedup(case, rival) for rival in case.rivals]))
        label = "rival's time / ours, logarithmic"
        if any(tilde(case.ours, *case.rivals) for case in some):
            label += f"; {EXTRAPOLATED}"
        yield from Chart(
            folder / f"speedup_{file_name(suite)}.png", f"{suite}: the fastest of ours over each rival", label,
            ("ours is faster", "ours is slower"), mark=1, log=True,
        ).draw(groups)  # fmt: skip


def _speedup(case: Outcome, rival: Mapping[str, Any]) -> Bar:
    ratio = case.over(rival)
    style = {"color": GREEN} if ratio >= 1 else {"color": ORANGE, "linewidth": 0, **SLOWER}
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"
    return Bar(rival["variant"], [(1, ratio - 1, style)], f"{tilde(case.ours, rival)}{text}x", ratio < 1)


def bandwidth(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """Percent of the roofline, of the cases that have no FLOPs to speak of."""
    groups = []
    for case in cases:
        shares = [(row, row["roofline_percent"]) for row in best(case) if row.get("roofline_percent")]
        if not case.gflop and shares:
            bars = [Bar(row["variant"], [(0, share, look.side(row))], f"{share:.0f} %") for row, share in shares]
            groups.append((f"{case.suite}: {case}, {case.dtype}", bars))
    yield from Chart(
        folder / "roofline_memory_bound.png", "Memory-bound cases: how near to the rate of a copy",
        "% of the roofline: needed bytes at the rate of a copy, over the time taken", ("best of ours", "best rival"),
        mark=100,
    ).draw(groups)  # fmt: skip


def memory(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """What stays between two calls, where variants differ in it, and the peak above it."""
    for suite in suites_of(cases):
        groups = []
        for case in cases:
            rows = [row for row in case.ran if row.get("peak_mib") is not None and not case.aside(row)]
            if case.suite == suite and rows:
                largest = max((row.get("standing_mib") or 0) + row["peak_mib"] for row in rows)
                if largest > 0:
                    rows.sort(key=lambda row: -row["ours"])
                    groups.append((f"{case}, {case.dtype}", [_memory(row, 100 / largest) for row in rows]))
        yield from Chart(
            folder / f"memory_{file_name(suite)}.png", f"{suite}: memory at the peak",
            "above the inputs, % of the largest of the case", ("ours", "rival", "of it standing between calls"),
        ).draw(groups)  # fmt: skip


def _memory(row: Mapping[str, Any], scale: float) -> Bar:
    standing, peak = row.get("standing_mib") or 0, row["peak_mib"]
    parts = [(standing * scale, peak * scale, look.side(row))]
    text = f"{number(standing + peak)} MiB"
    if standing:
        parts.insert(0, (0, standing * scale, {**look.side(row), **STANDING}))
        text += f", {number(standing)} of it standing"
    return Bar(row["variant"], parts, text)


@dataclasses.dataclass(frozen=True)
class Bar:
    """parts: (begin, length, style). text: what stands at its end."""

    label: str
    parts: Sequence[tuple[float, float, dict]]
    text: str
    bold: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """label: of the axis. sides: what the colours mean. mark: where a line is. log: a logarithmic axis of ratios."""

    path: Path
    title: str
    label: str
    sides: Sequence[str]
    mark: float | None = None
    log: bool = False

    def draw(self, groups: Sequence[tuple[str, Sequence[Bar]]]) -> Iterable[tuple[str, Path]]:
        """(title, PNG) of as many pictures as the groups (heading, bars) need."""
        pages, lines = [], BARS
        for group in groups:
            if lines + len(group[1]) + 1 > BARS:
                pages.append([])
                lines = 0
            pages[-1].append(group)
            lines += len(group[1]) + 1
        left_out = sum(map(len, pages[look.PAGES :]))
        for index, some in enumerate(pages[: look.PAGES]):
            at = self.path.with_name(f"{self.path.stem}{look.page(index)}.png")
            self._draw(some, at, self.title + look.more(left_out if index == look.PAGES - 1 else 0))
            yield self.title, at

    def _draw(self, groups, path, title):
        every = [bar for _, bars in groups for bar in bars]
        figure, axes = figures.single((look.WIDTH, 1.35 + LINE * (len(groups) + len(every))), grid="x", dpi=look.DPI)
        high = self._limits(axes, every)
        y, places = 0, []
        for heading, bars in groups:
            axes.text(0.004, y, short(heading, 96), transform=axes.get_yaxis_transform(), va="center", fontsize=10,
                      fontweight="bold", bbox=PAPER, zorder=4)  # fmt: skip
            y += 1
            for bar in bars:
                self._bar(axes, bar, y)
                places.append(y)
                y += 1
        axes.set_ylim(y - 0.4, -0.6)
        if self.log:
            _ratio_ticks(axes)
        else:  # the room for the texts beyond the longest bar needs no marks
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * high])
        axes.set_yticks(places, [short(bar.label, 26) for bar in every])
        axes.tick_params(axis="y", length=0, labelsize=9.5)
        if self.mark is not None:
            axes.axvline(self.mark, color="black", linewidth=1.2, zorder=3)
        axes.set_xlabel(self.label, fontsize=11)
        axes.set_title(short(title, 120), loc="left", fontweight="bold", pad=30)
        self._legend(axes, any("hatch" in style for bar in every for _, _, style in bar.parts))
        figures.save(figure, path)

    def _limits(self, axes, bars) -> float:
        """Sets the axis' limits; returns the end of the longest bar."""
        ends = [begin + length for bar in bars for begin, length, _ in bar.parts]
        low, high = min(*ends, self.mark or 0, 1 if self.log else 0), max(*ends, self.mark or 0)
        if self.log:
            low, high = max(low, 1 / FAR), min(high, FAR)  # what is beyond leaves the picture
            axes.set_xscale("log")
            room = max(math.log(high / low), math.log(1.5))
            axes.set_xlim(low * math.exp(-0.13 * room), high * math.exp(0.13 * room))
        else:
            axes.set_xlim(0, high * (1.02 + 0.0125 * max(len(bar.text) for bar in bars)))
        return high

    def _bar(self, axes, bar, y):
        for begin, length, style in bar.parts:
            axes.barh(y, length, left=begin, height=0.74, **style)
        begin, length, _ = bar.parts[-1]
        back = self.log and length < 0
        axes.annotate(short(bar.text, 120), (begin + length, y), (-4 if back else 4, 0), textcoords="offset points",
                      ha="right" if back else "left", va="center", fontsize=9.5,
                      fontweight="bold" if bar.bold else "normal")  # fmt: skip

    def _legend(self, axes, standing):
        from matplotlib.patches import Patch

        if self.log:
            looks = [{"facecolor": GREEN}, {"facecolor": ORANGE, **SLOWER}]
        else:
            looks = [{"facecolor": ORANGE}, {"facecolor": BLUE}, {"facecolor": GREY, **STANDING}]
        sides = self.sides if standing else self.sides[:2]
        figures.legend(axes, handles=[Patch(label=side, **look) for side, look in zip(sides, looks)], ncols=3)


def _ratio_ticks(axes) -> None:
    """Round ratios, at most nine or so."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    low, high = axes.get_xlim()
    for steps in ROUND:
        ticks = [s * 10.0**e for e in range(-4, 6) for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) <= 9:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticklabels([f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
