"""The pictures of docs/evidence.md: strongest attack, damage against attack, relearning curves."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kunbr_fast.benchmarks.forgetting.methods import METHODS
from kunbr_fast.benchmarks.forgetting.summary import damage, strength
from kunbr_fast.benchmarks.forgetting.units import REHEARSED, Unit
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.figures import BLUE, GREEN, GREY, ORANGE
from kunbr_fast.evaluation.plots import plot_relearning

Units = Mapping[str, Sequence[Unit]]


def draw(units: Units, wide: Sequence[str], folder: Path) -> list[Path]:
    """Those for which anything is finished."""
    plots = {
        "attacks": lambda path: plot_attacks(units, wide, path),
        "damage": lambda path: plot_damage(units, wide, path),
        "relearning": lambda path: plot_curves(units, path),
    }
    paths = {name: folder / f"evidence-{name}.png" for name in plots}
    return [path for name, path in paths.items() if figures.drawn(path, functools.partial(plots[name], path))]


def finished(units: Units, wide: Sequence[str]) -> dict[str, tuple[list[Unit], Sequence[str]]]:
    """Of each method the units whose attacks are finished, and which attacks these are."""
    found = {}
    for method, of in units.items():
        done = [unit for unit in of if strength(unit, [REHEARSED])]
        if done:
            whole = [unit for unit in done if METHODS[method].wide and strength(unit, wide)]
            found[method] = (whole, wide) if whole else (done, [REHEARSED])
    return found


def _values(done: Sequence[Unit], kinds: Sequence[str]) -> tuple[float, float]:
    """Mean and standard error over seeds of the strongest attack, smooth."""
    values = [strength(unit, kinds)[0] for unit in done]
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def colour(method: str) -> str:
    return ORANGE if method.startswith("robust") else GREEN if method == "never" else BLUE


def plot_attacks(units: Units, wide: Sequence[str], path: Path) -> None:
    """Bars of the strongest attack; those of methods that met the rehearsed kind alone are pale."""
    found = finished(units, wide)
    order = sorted(found, key=lambda method: -_values(*found[method])[0])
    figure, axes = figures.single((9.0, 0.9 + 0.42 * len(order)), grid="x")
    for place, method in enumerate(order):
        done, kinds = found[method]
        mean, error = _values(done, kinds)
        style = dict(color=colour(method), alpha=1.0 if len(kinds) > 1 else 0.45)
        axes.barh(place, mean, xerr=error, height=0.62, error_kw=dict(ecolor="#333333", capsize=3), **style)
        axes.annotate(f"{mean:.0f}", (mean + error + 1, place), va="center", fontsize=11)
    axes.set_yticks(range(len(order)), [METHODS[method].title for method in order])
    axes.axvline(25, color=GREY, linestyle="--", linewidth=1.4)
    axes.set_xlim(0, 108)
    axes.set_xlabel("smooth accuracy on what was forgotten, under the strongest attack (%)")
    axes.set_title("What the strongest attack brings back", loc="left", fontweight="bold", pad=30)
    handles = [
        *axes.plot([], color=BLUE, linewidth=9, label="all kinds of attack"),
        *axes.plot([], color=BLUE, linewidth=9, alpha=0.45, label="full fine-tuning alone"),
        *axes.plot([], color=GREY, linestyle="--", linewidth=1.4, label="chance"),
    ]
    figures.legend(axes, handles=handles, ncols=3)
    figures.save(figure, path)


def plot_damage(units: Units, wide: Sequence[str], path: Path) -> None:
    """A point a method: what it kept of bystanders, and what the strongest attack brings back."""
    found = finished(units, wide)
    figure, axes = figures.single((9.0, 5.8), grid="both")
    points: dict[str, tuple[float, float]] = {}
    for method, (done, kinds) in found.items():
        kept = [damage(unit, "bystanders") for unit in done]
        across = statistics.stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else 0.0
        mean, error = _values(done, kinds)
        style = dict(color=colour(method), marker="o" if len(kinds) > 1 else "s", markersize=8)
        fill = {} if len(kinds) > 1 else dict(markerfacecolor="white")
        axes.errorbar(statistics.mean(kept), mean, xerr=across, yerr=error, capsize=2.5, linewidth=1.1, **style, **fill)
        points[METHODS[method].title] = statistics.mean(kept), mean
    axes.axhline(25, color=GREY, linestyle="--", linewidth=1.4)
    axes.margins(x=0.14, y=0.08)
    axes.set_xlabel("bystanders, smooth accuracy (%): what unlearning has left alone")
    axes.set_ylabel("strongest attack (%)")
    axes.set_title("Damage and what comes back: right and low is good", loc="left", fontweight="bold", pad=30)
    dot = dict(color=BLUE, linewidth=0, markersize=8)
    handles = [
        *axes.plot([], marker="o", label="all kinds of attack", **dot),
        *axes.plot([], marker="s", markerfacecolor="white", label="full fine-tuning alone", **dot),
        *axes.plot([], color=GREY, linestyle="--", linewidth=1.4, label="chance"),
    ]
    figures.legend(axes, handles=handles, ncols=3)
    _name(figure, axes, points)
    figures.save(figure, path)


def _name(figure, axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each point's name beside it, where no other name and no point is."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 12, y - 12, 24, 24) for x, y in at.values()]
    places = [(9, 5, "left"), (-9, 5, "right"), (9, -14, "left"), (-9, -14, "right"), (9, 18, "left"), (9, -27, "left"),
              (-9, 18, "right"), (-9, -27, "right")]  # fmt: skip
    for name in sorted(points, key=lambda name: -points[name][1]):
        for x, y, side in places:
            text = axes.annotate(name, points[name], xytext=(x, y), textcoords="offset points", ha=side, fontsize=10)
            box = text.get_window_extent()
            free = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not any(map(box.overlaps, taken))
            if free or (x, y, side) == places[-1]:
                taken.append(box)
                break
            text.remove()


def plot_curves(units: Units, path: Path) -> None:
    """Relearning under the rehearsed kind of attack; of each seed the folds are folds of one curve."""
    results = {}
    for method, of in units.items():
        done = [unit for unit in of if METHODS[method].wide and unit.result(REHEARSED)]
        if done:
            rows = [{**row, "fold": f"{u.seed} {row['fold']}"} for u in done for row in u.result(REHEARSED).curves]
            results[METHODS[method].title] = RTTResult(rows)
    plot_relearning(results, path)
