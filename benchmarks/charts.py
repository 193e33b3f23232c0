"""The pictures of a report, as PNG: each of `CHARTS` takes the cases and a folder, and draws those that the rows have
data for.

Ours are warm colours and solid lines, rivals cold colours and dashed lines, so that sides can be told without a legend.
What would not fit goes on further pictures, and beyond `PAGES` of them into the title as "n more in the CSV".
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.rows import EXTRAPOLATED, Outcome, tilde
from kunbr_fast.benchmarks.suites import SUITES
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.figures import BLUE, GREEN, GREY, ORANGE

OURS = (ORANGE, "#E69F00", "#CC79A7", "#8B2E00")
RIVALS = (BLUE, "#56B4E9", GREEN, GREY, "#1B3A57", "#00404D")
WIDTH, DPI = 9.0, 140  # inches; a report has many pictures: half the bytes of a README's
LINE = 0.235  # inches of height that a bar takes
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # behind text that lines run through
BARS, PANELS, POINTS = 44, 6, 40  # of a picture; points: those that have numbers
PAGES = 3  # pictures of a kind and suite
NAMES = re.compile(rf"(end_to_end|roofline_\w+|(speedup|time|memory)_({'|'.join(SUITES)}))(_\d+)?\.png")


def draw(cases: Sequence[Outcome], folder: Path) -> list[tuple[str, Path]]:
    """[(heading, PNG)] of all that can be drawn. Those of an earlier report that are not drawn now go."""
    drawn = [found for chart in CHARTS for found in chart(cases, folder)]
    for old in set(folder.glob("*.png")) - {path for _, path in drawn}:
        if NAMES.fullmatch(old.name):
            old.unlink()
    return drawn


# ---------------------------------------------------------------- roofline


def roofline(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """FLOPs per byte against TFLOP/s, for each dtype. Whole runs say no bytes."""
    for dtype in dict.fromkeys(case.dtype for case in cases):
        some = [c for c in cases if c.dtype == dtype and c.gflop and c.mib and _best(c) and _rates(c)]
        if some:
            path = folder / f"roofline_{_name(dtype)}.png"
            _roofline(some, dtype, path)
            yield f"Roofline, {dtype}", path


def _rates(case: Outcome) -> tuple[float, float] | None:
    """(TFLOP/s, GB/s) of the product and the copy that ran beside a case."""
    row = case.ran[0]
    rates = row.get("matmul_tflop_per_s"), row.get("copy_gb_per_s")
    return rates if all(rates) else None


def _intensity(case: Outcome) -> float:
    return case.gflop * 1e9 / (case.mib * 2**20)


def _roofline(cases, dtype, path):
    shown = sorted(cases[:POINTS], key=lambda case: (round(math.log(_intensity(case)), 1), -_speed(case)))
    tflop, gb = (statistics.median(rates) for rates in zip(*map(_rates, cases)))
    lines = -(-len(shown) // 2)
    figure = figures.canvas((WIDTH, 5.2 + 0.17 * lines), DPI)
    axes, key = figure.subplots(2, height_ratios=(4.6, 0.17 * lines + 0.05))
    figures.style(axes, "both")
    axes.set_xscale("log")
    axes.set_yscale("log")

    xs, best = list(map(_intensity, shown)), list(map(_speed, shown))
    ridge = tflop * 1e3 / gb
    left, right = min(*xs, ridge) / 3, max(*xs, ridge) * 3
    roof = f"roof: product {_number(tflop)} TFLOP/s, copy {_number(gb)} GB/s"
    axes.plot([left, ridge, right], [left * gb / 1e3, tflop, tflop], color="black", linewidth=1.8, zorder=2, label=roof)
    speeds = [case.gflop / row["ms"] for case in shown for row in _best(case)]
    low, high = min(*speeds, left * gb / 1e3) / 2, max(*speeds, tflop) * 1.6
    for ours, style in (
        (1, {"color": ORANGE, "marker": "o", "markersize": 8, "label": "best of ours", "zorder": 5}),
        (0, {"color": BLUE, "marker": "X", "markersize": 7.5, "label": "best rival", "zorder": 4}),
    ):
        points = [(x, c.gflop / row["ms"]) for x, c in zip(xs, shown) for row in _best(c) if row["ours"] == ours]
        if points:
            axes.plot(*zip(*points), linewidth=0, markeredgecolor="white", **style)
    # Numbers stand in a row above the points, each as near to its own as the others leave it; one for points in one
    # place.
    groups = _together([(math.log(x / left) / math.log(right / left), math.log(y / low) / math.log(high / low))
                        for x, y in zip(xs, best)])  # fmt: skip
    labels = [f"{first + 1}" if first == last else f"{first + 1}–{last + 1}" for first, last in groups]
    wanted = [math.log(xs[first] / left) / math.log(right / left) for first, _ in groups]
    for (first, _), label, place in zip(groups, labels, _apart(wanted, [0.011 * (len(n) + 1.2) for n in labels])):
        at = left * (right / left) ** place
        axes.plot([xs[first], at], [best[first], high * 1.55], color="#C0C0C0", linewidth=0.8, zorder=1)
        axes.text(at, high * 1.75, label, ha="center", va="center", fontsize=9.5)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high * 2.2)
    axes.set_xlabel("FLOP per byte that have to be moved")
    axes.set_ylabel("TFLOP/s")
    more = f" ({len(cases) - len(shown)} more in the CSV)" if len(cases) > len(shown) else ""
    axes.set_title(f"How near to this machine's limits, {dtype}{more}", loc="left", fontweight="bold", pad=30)
    handles, _ = axes.get_legend_handles_labels()
    figures.legend(axes, handles=[*handles[1:], handles[0]], ncols=3)
    key.axis("off")
    for index, case in enumerate(shown):
        column, line = divmod(index, lines)
        key.text(0.5 * column, 1 - (line + 0.5) / lines, f"{index + 1:>2}  {_short(f'{case.suite}: {case}', 62)}",
                 transform=key.transAxes, va="center", fontsize=8.5)  # fmt: skip
    figures.save(figure, path)


def _best(case: Outcome) -> list[dict]:
    """The fastest row of each side that has one."""
    return [row for row in (case.ours, *case.rivals[:1]) if row]


def _speed(case: Outcome) -> float:
    """TFLOP/s of the fastest: GFLOP in a millisecond."""
    return max(case.gflop / row["ms"] for row in _best(case))


def _together(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """[(first, last)] of neighbours in the list that would cover each other; coordinates in parts of the axes."""
    found: list[tuple[int, int]] = []
    for index, (x, y) in enumerate(points):
        if found and abs(x - points[found[-1][0]][0]) < 0.012 and abs(y - points[found[-1][0]][1]) < 0.02:
            found[-1] = found[-1][0], index
        else:
            found.append((index, index))
    return found


def _apart(centres: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Rising `centres` moved so that labels of these widths do not meet, and all stay within 0..1 where they fit."""
    scale = min(1.0, 1 / sum(widths))
    found, edge = [], 0.0
    for centre, width in zip(centres, widths):
        found.append(max(centre, edge + scale * width / 2))
        edge = found[-1] + scale * width / 2
    edge = 1.0
    for index in reversed(range(len(found))):
        found[index] = min(found[index], edge - scale * widths[index] / 2)
        edge = found[index] - scale * widths[index] / 2
    return found


def bandwidth(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """Percent of the roofline, of the cases that have no FLOPs to speak of."""
    groups = []
    for case in cases:
        rows = [row for row in _best(case) if row.get("roofline_percent")]
        if not case.gflop and rows:
            groups.append((f"{case.suite}: {case}, {case.dtype}", [
                Bar(row["variant"], [(0, row["roofline_percent"], _side(row))], f"{row['roofline_percent']:.0f} %")
                for row in rows
            ]))  # fmt: skip
    yield from _charts(
        groups, folder / "roofline_memory_bound.png", "Memory-bound cases: how near to the rate of a copy",
        "% of the roofline: needed bytes at the rate of a copy, over the time taken", mark=100,
        sides=("best of ours", "best rival"),
    )  # fmt: skip


# ---------------------------------------------------------------- time against T


def times(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """Where a suite has an operation of one model at several T."""
    for suite in _suites(cases):
        panels: dict[tuple, list[Outcome]] = {}
        for case in cases:
            if case.suite == suite and case.tokens and case.ran:
                panels.setdefault((case.model, _kind(case), case.dtype), []).append(case)
        panels = {name: some for name, some in panels.items() if len({case.tokens for case in some}) > 1}
        names = list(panels)
        for page, first in enumerate(range(0, min(len(names), PANELS * PAGES), PANELS)):
            path = folder / f"time_{_name(suite)}{_page(page)}.png"
            left = len(names) - PANELS * PAGES if first + PANELS >= PANELS * PAGES else 0
            _times({name: panels[name] for name in names[first : first + PANELS]}, suite, left, path)
            yield f"Time against T, {suite}", path


def _kind(case: Outcome) -> str:
    """A case's label without its T."""
    return re.sub(rf",? *\b[A-Z] ?= ?{case.tokens}\b", "", case.case).strip(" ,")


def _times(panels, suite, left_out, path):
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = figures.canvas((WIDTH, 1.3 + 3.3 * lines), DPI)
    grid = figure.subplots(lines, columns, squeeze=False)
    rows = [row for some in panels.values() for case in some for row in case.ran]
    styles = _styles(rows)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((model, kind, dtype), some) in zip(grid.flat, panels.items()):
        figures.style(axes, "both")
        for variant, style in styles.items():
            mine = [(c.tokens, r) for c in some for r in c.ran if (r["variant"], r["ours"]) == variant]
            mine.sort(key=lambda point: point[0])
            if mine:
                axes.plot(*zip(*((tokens, row["ms"]) for tokens, row in mine)), **style)
            band = [(t, row["p20_ms"], row["p80_ms"]) for t, row in mine if row["p20_ms"] and row["p80_ms"]]
            if band:
                axes.fill_between(*zip(*band), color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({case.tokens for case in some})
        axes.set_xticks(ticks[:: -(-len(ticks) // 7)], [f"{tick}" for tick in ticks[:: -(-len(ticks) // 7)]])
        axes.set_xticks([], minor=True)
        _plain_ticks(axes)
        axes.set_title("\n".join((_short(model or suite, 44), _short(f"{kind}, {dtype}", 48))), loc="left")
        axes.title.set_size(11)
        axes.tick_params(labelsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms, band p20 to p80", fontsize=11)
    for axes in [*grid.flat][max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("T, tokens", fontsize=11)
    more = f" ({left_out} more in the CSV)" if left_out else ""
    figure.suptitle(f"{suite}: time against T{more}", x=0.01, ha="left", fontweight="bold", fontsize=15)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=f"{name} (ours)" if ours else name, **s) for (name, ours), s in styles.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=10)
    figures.save(figure, path)


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


# ---------------------------------------------------------------- bars


def speedups(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """The best of ours over each rival."""
    for suite in _suites(cases):
        some = [case for case in cases if case.suite == suite and case.ratio]
        groups = []
        for case in some:
            title = f"{case}, {case.dtype}: {case.ours['variant']}, {tilde(case.ours)}{_number(case.ours['ms'])} ms"
            groups.append((title, [_speedup(case, rival) for rival in case.rivals]))
        label = "rival's time / ours, logarithmic"
        if any(tilde(case.ours, *case.rivals) for case in some):
            label += f"; {EXTRAPOLATED}"
        yield from _charts(
            groups, folder / f"speedup_{_name(suite)}.png", f"{suite}: the fastest of ours over each rival", label,
            mark=1, log=True, sides=("ours is faster", "ours is slower"),
        )  # fmt: skip


def _speedup(case: Outcome, rival) -> Bar:
    ratio = case.over(rival)
    style = {"color": GREEN} if ratio >= 1 else {"color": ORANGE, "hatch": "////", "edgecolor": "white", "linewidth": 0}
    number = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"
    return Bar(rival["variant"], [(1, ratio - 1, style)], f"{tilde(case.ours, rival)}{number}x", ratio < 1)


def memory(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """What stays between two calls, where variants differ in it, and the peak above it."""
    for suite in _suites(cases):
        groups = []
        for case in cases:
            rows = [row for row in case.ran if row.get("peak_mib") is not None and not case.aside(row)]
            if case.suite == suite and rows:
                largest = max((row.get("standing_mib") or 0) + row["peak_mib"] for row in rows)
                if largest > 0:
                    rows.sort(key=lambda row: -row["ours"])
                    groups.append((f"{case}, {case.dtype}", [_memory(row, 100 / largest) for row in rows]))
        yield from _charts(
            groups, folder / f"memory_{_name(suite)}.png", f"{suite}: memory at the peak",
            "above the inputs, % of the largest of the case", mark=None,
            sides=("ours", "rival", "of it standing between calls"),
        )  # fmt: skip


def _memory(row, scale: float) -> Bar:
    standing, peak = row.get("standing_mib") or 0, row["peak_mib"]
    parts = [(standing * scale, peak * scale, _side(row))]
    text = f"{_number(standing + peak)} MiB"
    if standing:
        parts.insert(0, (0, standing * scale, {**_side(row), **STANDING}))
        text += f", {_number(standing)} of it standing"
    return Bar(row["variant"], parts, text)


STANDING = {"hatch": "xxxx", "edgecolor": "white", "linewidth": 0, "alpha": 0.75}


def _side(row) -> dict:
    return {"color": ORANGE if row["ours"] else BLUE}


class Bar:
    """parts: (begin, length, style). text: what stands at its end."""

    def __init__(self, label: str, parts: Sequence[tuple[float, float, dict]], text: str, bold: bool = False):
        self.label, self.parts, self.text, self.bold = label, parts, text, bold


def _charts(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    path: Path,
    title: str,
    label: str,
    *,
    mark: float | None,
    sides: Sequence[str],
    log: bool = False,
) -> Iterable[tuple[str, Path]]:
    """Horizontal bars under the headings of their groups, on as many pictures as they need."""
    pages, lines = [], BARS
    for group in groups:
        if lines + len(group[1]) + 1 > BARS:
            pages.append([])
            lines = 0
        pages[-1].append(group)
        lines += len(group[1]) + 1
    left_out = sum(map(len, pages[PAGES:]))
    for page, some in enumerate(pages[:PAGES]):
        more = f" ({left_out} more in the CSV)" if left_out and page == PAGES - 1 else ""
        at = path.with_name(f"{path.stem}{_page(page)}.png")
        _chart(some, at, title + more, label, mark, sides, log)
        yield title, at


def _chart(groups, path, title, label, mark, sides, log):
    from matplotlib.patches import Patch

    lines = sum(len(bars) + 1 for _, bars in groups)
    figure, axes = figures.single((WIDTH, 1.35 + LINE * lines), grid="x", dpi=DPI)
    y, places, names, used = 0, [], [], []
    ends = [begin + length for _, bars in groups for bar in bars for begin, length, _ in bar.parts]
    low, high = min(*ends, mark or 0, 0 if not log else 1), max(*ends, mark or 0)
    if log:
        axes.set_xscale("log")
        room = max(math.log(high / low), math.log(1.5))
        axes.set_xlim(low * math.exp(-0.13 * room), high * math.exp(0.13 * room))
    else:
        axes.set_xlim(0, high * (1.02 + 0.0125 * max(len(bar.text) for _, bars in groups for bar in bars)))
    for heading, bars in groups:
        axes.text(0.004, y, _short(heading, 96), transform=axes.get_yaxis_transform(), va="center", fontsize=10,
                  fontweight="bold", bbox=PAPER, zorder=4)  # fmt: skip
        y += 1
        for bar in bars:
            for begin, length, style in bar.parts:
                axes.barh(y, length, left=begin, height=0.74, **style)
            begin, length, style = bar.parts[-1]
            used += [style for _, _, style in bar.parts]
            back = log and length < 0
            axes.annotate(bar.text, (begin + length, y), (-4 if back else 4, 0), textcoords="offset points",
                          ha="right" if back else "left", va="center", fontsize=9.5,
                          fontweight="bold" if bar.bold else "normal")  # fmt: skip
            places.append(y)
            names.append(_short(bar.label, 26))
            y += 1
    axes.set_ylim(y - 0.4, -0.6)
    if not log:  # the room for the texts beyond the longest bar needs no marks
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * high])
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    if log:
        from matplotlib.ticker import FixedLocator, NullFormatter

        ticks = _ratios(*axes.get_xlim())
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xticklabels([f"{tick:g}x" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=1.2, zorder=3)
    axes.set_xlabel(label, fontsize=11)
    axes.set_title(title, loc="left", fontweight="bold", pad=30)
    if log:
        looks = [{"facecolor": GREEN}, {"facecolor": ORANGE, "hatch": "////", "edgecolor": "white"}]
    else:
        looks = [{"facecolor": ORANGE}, {"facecolor": BLUE}, {"facecolor": GREY, **STANDING}]
        standing = any("hatch" in style for style in used)
        sides = sides if standing else sides[:2]
    figures.legend(axes, handles=[Patch(label=side, **look) for side, look in zip(sides, looks)], ncols=3)
    figures.save(figure, path)


def _ratios(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most eight or so."""
    for steps in (
        (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        found = [s * 10.0**e for e in range(-4, 6) for s in steps if low <= s * 10.0**e <= high]
        if len(found) <= 9:
            return found
    return found


# ---------------------------------------------------------------- end to end


def stages(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """end_to_end: its cases are the stages and their total, its variants the sides."""
    runs: dict[tuple, list[Outcome]] = {}
    for case in cases:
        if case.suite == "end_to_end" and case.ran and _stage(case) != "total":
            runs.setdefault((case.model, case.dtype), []).append(case)
    for index, ((model, dtype), some) in enumerate(runs.items()):
        path = folder / f"end_to_end{_page(index)}.png"
        _stages(some, ", ".join(part for part in (model, dtype) if part), path)
        yield "End to end", path


def _stage(case: Outcome) -> str:
    """The blocks, which are many, as one stage."""
    return "re-insertion" if re.fullmatch(r"layers \d+-\d+", case.case) else case.case


def _stages(cases, name, path):
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
    figure, axes = figures.single((WIDTH, 1.9 + 0.75 * len(sides) + 0.25 * -(-len(names) // 3)), grid="x", dpi=DPI)
    colours = (BLUE, "#E69F00", GREEN, ORANGE, "#56B4E9", "#CC79A7", GREY, "#1B3A57")
    for y, (side, total) in enumerate(zip(sides, totals)):
        begin = 0.0
        for index, stage in enumerate(names):
            value = rows[side].get(stage, 0.0) / divisor
            style = {"hatch": "////"} if index >= len(colours) else {}
            axes.barh(y, value, left=begin, height=0.6, color=colours[index % len(colours)], edgecolor="white",
                      linewidth=0.8, label=stage if y == 0 else None, **style)  # fmt: skip
            if value * divisor > 0.08 * max(totals):
                axes.text(begin + value / 2, y, f"{value:.3g}", ha="center", va="center", color="white", fontsize=10,
                          fontweight="bold")  # fmt: skip
            begin += value
        text = f"{total / divisor:.3g} {unit}{', extrapolated' if side in extrapolated else ''}"
        axes.annotate(text, (begin, y), (5, 0), textcoords="offset points", va="center",
                      fontsize=11, fontweight="bold")  # fmt: skip
    axes.set_xlim(0, (1.32 if extrapolated else 1.13) * max(totals) / divisor)
    axes.set_ylim(len(sides) - 0.4, -0.6)
    axes.set_yticks(range(len(sides)), [_short(f"{v} (ours)" if ours else v, 30) for v, ours in sides])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel({"s": "seconds", "min": "minutes", "h": "hours"}[unit])
    lines = -(-len(names) // 3)
    axes.set_title(_short(f"End to end: {name}", 70), loc="left", fontweight="bold", pad=12 + 18 * lines)
    figures.legend(axes, ncols=3)
    figures.save(figure, path)


# ---------------------------------------------------------------- helpers


def _suites(cases: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(case.suite for case in cases))


def _name(text: str) -> str:
    """Fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _page(index: int) -> str:
    return f"_{index + 1}" if index else ""


def _short(text: str, length: int) -> str:
    text = text.replace("$", r"\$")  # no formulas
    return text if len(text) <= length else text[: length - 1] + "…"


def _number(value: float) -> str:
    """Three significant digits, and thousands in groups."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", " ")


CHARTS: tuple[Callable[[Sequence[Outcome], Path], Iterable[tuple[str, Path]]], ...] = (
    stages, roofline, bandwidth, speedups, times, memory,
)  # fmt: skip
