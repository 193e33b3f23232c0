"""FLOPs per byte against TFLOP/s, under the roof that the machine's product and copy make."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.charts.look import DPI, WIDTH, best, file_name, more, number, short
from kunbr_fast.benchmarks.rows import Outcome
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.figures import BLUE, ORANGE

POINTS = 40  # of a picture


def roofline(cases: Sequence[Outcome], folder: Path) -> Iterable[tuple[str, Path]]:
    """One picture for each dtype, of the cases that say FLOPs and bytes."""
    for dtype in dict.fromkeys(case.dtype for case in cases):
        some = [c for c in cases if c.dtype == dtype and c.gflop and c.mib and best(c) and _rates(c)]
        if some:
            path = folder / f"roofline_{file_name(dtype)}.png"
            _draw(some, dtype, path)
            yield f"Roofline, {dtype}", path


def _rates(case: Outcome) -> tuple[float, float] | None:
    """(TFLOP/s, GB/s) of the product and the copy that ran beside a case."""
    row = case.ran[0]
    rates = row.get("matmul_tflop_per_s"), row.get("copy_gb_per_s")
    return rates if all(rates) else None


def _intensity(case: Outcome) -> float:
    return case.gflop * 1e9 / (case.mib * 2**20)


def _speed(case: Outcome) -> float:
    """TFLOP/s of the fastest: GFLOP in a millisecond."""
    return max(case.gflop / row["ms"] for row in best(case))


def _draw(cases, dtype, path):
    shown = sorted(cases[:POINTS], key=lambda case: (round(math.log(_intensity(case)), 1), -_speed(case)))
    tflop, gb = (statistics.median(rates) for rates in zip(*map(_rates, cases)))
    lines = -(-len(shown) // 2)
    figure = figures.canvas((WIDTH, 5.2 + 0.17 * lines), DPI)
    axes, key = figure.subplots(2, height_ratios=(4.6, 0.17 * lines + 0.05))
    figures.style(axes, "both")
    axes.set_xscale("log")
    axes.set_yscale("log")

    xs = list(map(_intensity, shown))
    ridge = tflop * 1e3 / gb
    left, right = min(*xs, ridge) / 3, max(*xs, ridge) * 3
    roof = f"roof: product {number(tflop)} TFLOP/s, copy {number(gb)} GB/s"
    axes.plot([left, ridge, right], [left * gb / 1e3, tflop, tflop], color="black", linewidth=1.8, zorder=2, label=roof)
    speeds = [case.gflop / row["ms"] for case in shown for row in best(case)]
    low, high = min(*speeds, left * gb / 1e3) / 2, max(*speeds, tflop) * 1.6
    for ours, style in (
        (1, {"color": ORANGE, "marker": "o", "markersize": 8, "label": "best of ours", "zorder": 5}),
        (0, {"color": BLUE, "marker": "X", "markersize": 7.5, "label": "best rival", "zorder": 4}),
    ):
        points = [(x, c.gflop / row["ms"]) for x, c in zip(xs, shown) for row in best(c) if row["ours"] == ours]
        if points:
            axes.plot(*zip(*points), linewidth=0, markeredgecolor="white", **style)
    _label(axes, xs, list(map(_speed, shown)), (left, right), (low, high))
    axes.set_xlim(left, right)
    axes.set_ylim(low, high * 2.2)
    axes.set_xlabel("FLOP per byte that have to be moved")
    axes.set_ylabel("TFLOP/s")
    title = f"How near to this machine's limits, {short(dtype, 20)}{more(len(cases) - len(shown))}"
    axes.set_title(title, loc="left", fontweight="bold", pad=30)
    handles, _ = axes.get_legend_handles_labels()
    figures.legend(axes, handles=[*handles[1:], handles[0]], ncols=3)
    key.axis("off")
    for index, case in enumerate(shown):
        column, line = divmod(index, lines)
        text = f"{index + 1:>2}  {short(f'{case.suite}: {case}', 62)}"
        key.text(0.5 * column, 1 - (line + 0.5) / lines, text, transform=key.transAxes, va="center", fontsize=8.5)
    figures.save(figure, path)


def _label(axes, xs, ys, xlim, ylim):
    """Numbers in a row above the points, each as near to its own as fits; points in one place share one."""
    (left, right), (low, high) = xlim, ylim
    across, up = math.log(right / left), math.log(high / low)
    groups = _together([(math.log(x / left) / across, math.log(y / low) / up) for x, y in zip(xs, ys)])
    labels = [f"{first + 1}" if first == last else f"{first + 1}–{last + 1}" for first, last in groups]
    wanted = [math.log(xs[first] / left) / across for first, _ in groups]
    for (first, _), label, place in zip(groups, labels, apart(wanted, [0.011 * (len(n) + 1.2) for n in labels])):
        at = left * (right / left) ** place
        axes.plot([xs[first], at], [ys[first], high * 1.55], color="#C0C0C0", linewidth=0.8, zorder=1)
        axes.text(at, high * 1.75, label, ha="center", va="center", fontsize=9.5)


def _together(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """[(first, last)] of neighbours in the list that would cover each other; coordinates in parts of the axes."""
    found: list[tuple[int, int]] = []
    for index, (x, y) in enumerate(points):
        if found and abs(x - points[found[-1][0]][0]) < 0.012 and abs(y - points[found[-1][0]][1]) < 0.02:
            found[-1] = found[-1][0], index
        else:
            found.append((index, index))
    return found


def apart(centres: Sequence[float], widths: Sequence[float]) -> list[float]:
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
