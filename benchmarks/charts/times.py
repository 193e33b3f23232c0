"""Milliseconds against T: where a suite has an operation of one model at several T."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.charts.look import DPI, OURS, PAGES, RIVALS, WIDTH, file_name, more, page, short, suites_of
from kunbr_fast.benchmarks.rows import Outcome
from kunbr_fast.evaluation import figures

PANELS = 6  # of a picture


def times(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    for suite in suites_of(cases):
        panels: dict[tuple, list[Outcome]] = {}
        for case in cases:
            if case.suite == suite and case.tokens and case.ran:
                panels.setdefault((case.model, _kind(case), case.dtype), []).append(case)
        some = [(name, found) for name, found in panels.items() if len({case.tokens for case in found}) > 1]
        for index, first in enumerate(range(0, min(len(some), PANELS * PAGES), PANELS)):
            path = folder / f"time_{file_name(suite)}{page(index)}.png"
            left_out = more(len(some) - PANELS * PAGES if index == PAGES - 1 else 0)
            _draw(some[first : first + PANELS], suite, f"{suite}: time against T{left_out}", path)
            yield f"Time against T, {suite}", path


def _kind(case: Outcome) -> str:
    """A case's label without its T."""
    return re.sub(rf",? *\b[A-Z] ?= ?{case.tokens}\b", "", case.case).strip(" ,")


def _draw(panels, suite, title, path):
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = figures.canvas((WIDTH, 1.3 + 3.3 * lines), DPI)
    grid = figure.subplots(lines, columns, squeeze=False)
    styles = _styles([row for _, some in panels for case in some for row in case.ran])
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((model, kind, dtype), some) in zip(grid.flat, panels):
        _panel(axes, some, styles)
        axes.set_title("\n".join((short(model or suite, 44), short(f"{kind}, {dtype}", 48))), loc="left")
        axes.title.set_size(11)
        axes.tick_params(labelsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms, band p20 to p80", fontsize=11)
    for axes in [*grid.flat][max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("T, tokens", fontsize=11)
    figure.suptitle(short(title, 120), x=0.01, ha="left", fontweight="bold", fontsize=15)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=short(f"{name} (ours)" if ours else name, 40), **s) for (name, ours), s in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=10)
    figures.save(figure, path)


def _panel(axes, cases, styles):
    figures.style(axes, "both")
    for variant, style in styles.items():
        mine = [(c.tokens, r) for c in cases for r in c.ran if (r["variant"], r["ours"]) == variant]
        mine.sort(key=lambda point: point[0])
        if mine:
            axes.plot(*zip(*((tokens, row["ms"]) for tokens, row in mine)), **style)
        band = [(t, row["p20_ms"], row["p80_ms"]) for t, row in mine if row["p20_ms"] and row["p80_ms"]]
        if band:
            axes.fill_between(*zip(*band), color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({case.tokens for case in cases})
    ticks = ticks[:: -(-len(ticks) // 7)]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xticks([], minor=True)
    _plain_ticks(axes)


def _plain_ticks(axes) -> None:
    """Milliseconds as 0.2, 5, 100: on a logarithmic axis of less than two decades with numbers in between too."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axes.get_ylim()
    if high / low < 3:  # then a decade has too few marks
        low, high = math.sqrt(low * high) / 1.8, math.sqrt(low * high) * 1.8
        axes.set_ylim(low, high)
    marks = (1, 2, 5) if high / low < 1e3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _styles(rows) -> dict[tuple, dict]:
    """{(variant, ours): how its line looks}, ours first."""
    names = sorted({(row["variant"], row["ours"]) for row in rows}, key=lambda name: (-name[1], name[0]))
    found, counts = {}, [0, 0]
    for name in names:
        ours = bool(name[1])
        index, colours = counts[ours], OURS if ours else RIVALS
        counts[ours] += 1
        found[name] = {
            "color": colours[index % len(colours)],
            "linestyle": "-" if ours else "--",
            "linewidth": 2.4 if ours else 1.6,
            "marker": ("os^D" if ours else "Xv<>P*")[index % len(colours)],
            "fillstyle": "full" if index < len(colours) else "none",  # the second time round
            "markersize": 6 if ours else 6.5,
            "zorder": 4 if ours else 3,
        }
    return found
