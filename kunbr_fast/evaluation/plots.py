"""The pictures of a run: where the knowledge sits, which layers to choose, and how much comes back under attack.

Made for a README: 1800 x 960 pixels, readable at half that size. No difference is shown by colour alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kunbr_fast.density.select import pareto_front
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult, Strongest
from kunbr_fast.evaluation.figures import COLOURS, GREY, MARKERS, ORANGE

NAME = 48  # characters of a method's name
_RAW = {  # statistics without shares: title, label
    "fisher_ratio": ("Where the forget set weighs more than the retain set", "Fisher information, forget / retain"),
    "cosine": ("Where forget and retain gradients agree", "cosine of the mean gradients"),
    "slug": ("Where the forget set's gradient is large", "importance, |gradient| / |weights|"),
}


_RING = {"marker": "o", "markerfacecolor": "none", "linewidth": 0}


def plot_density(density, blocks: Sequence[range], path: str | Path, skip_last_layers: int = 2) -> None:
    """Bars of the knowledge density per layer, PNG at `path`: shares in percent, or the values of a statistic that has
    no shares (fisher_ratio, cosine, slug).

    density: a `Density`. blocks: the chosen ranges of layers, shown in another colour with a bracket.
    skip_last_layers: layers at the top that are never chosen, shown hatched (where blocks were chosen at all).
    """
    title, y_label = _RAW.get(density.statistic, (None, None))
    if title is None:
        title, y_label = "Where the knowledge of the forget set sits", "share of the density (%)"
        total, unit = float(density.per_layer.sum()), 100
    else:
        total, unit, skip_last_layers = 1.0, 1, skip_last_layers if blocks else 0
    shares = [unit * float(value) / total for value in density.per_layer]
    number = len(shares)
    chosen = {layer for block in blocks for layer in block}
    if not chosen <= set(range(number)):
        raise ValueError(f"blocks {list(blocks)} name layers that a density of {number} layers does not have")
    skipped = set(range(max(0, number - skip_last_layers), number)) - chosen

    figure, axes = figures.single()
    groups = (
        ("re-inserted and trained", chosen, {"color": ORANGE}),
        ("not chosen", set(range(number)) - chosen - skipped, {"color": "#A9C6DC"}),
        (
            "last layers, never chosen",
            skipped,
            {"facecolor": "white", "edgecolor": GREY, "hatch": "////", "linewidth": 1},
        ),
    )
    for label, layers, style in groups:
        if layers:
            axes.bar(sorted(layers), [shares[layer] for layer in sorted(layers)], width=0.8, label=label, **style)
    ends, estimate = shares, ""  # where each layer's bar, or its error bar, ends
    if density.standard_error is not None:
        errors = [unit * float(error) / total for error in density.standard_error]
        axes.errorbar(range(number), shares, errors, fmt="none", ecolor="black", capsize=3)
        ends, estimate = [share + error for share, error in zip(shares, errors)], ", ± standard error"
    top, bottom = max(*ends, 0.0), min(*ends, 0.0)
    for block in blocks:
        _bracket(axes, block, max(ends[layer] for layer in block) + 0.035 * top, 0.015 * top)
    axes.set_ylim(1.14 * bottom, 1.14 * top)
    if bottom < 0:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.7, number - 0.3)
    axes.set_xticks(range(0, number, 1 if number <= 20 else 2 if number <= 40 else 4))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(y_label.replace("(%)", f"(%{estimate})"))
    axes.set_title(title, loc="left", fontweight="bold", pad=36 if blocks or skipped else 14)
    if blocks or skipped:
        figures.legend(axes, ncols=3)
    figures.save(figure, path)


def _bracket(axes, block: range, y: float, tick: float) -> None:
    """Over a block's bars, with its layers' numbers."""
    left, right = block[0] - 0.4, block[-1] + 0.4
    axes.plot([left, left, right, right], [y - tick, y, y, y - tick], color="black", linewidth=1.2)
    axes.annotate(
        f"{block[0]}" if len(block) == 1 else f"{block[0]}–{block[-1]}",
        ((left + right) / 2, y),
        (0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=11,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def plot_pareto(density, path: str | Path) -> None:
    """The layers by SLUG's importance and the alignment of their forget and retain gradients, PNG at `path`.

    density: `knowledge_density(statistic="slug", retain=...)`. The Pareto front (`blocks.pareto_front`) is joined by a
    line, in another colour and marker; up to 40 layers all points have their layer's number, else those of the front.
    """
    if density.alignment is None:
        raise ValueError('this density has no alignment: measure statistic="slug" with retain=samples to keep')
    importance, alignment = density.per_layer.tolist(), density.alignment.abs().tolist()
    front = pareto_front(importance, alignment)
    others = [layer for layer in range(len(importance)) if layer not in front]

    figure, axes = figures.single()
    axes.grid(axis="x", color=figures.GRID, linewidth=0.8)
    ordered = sorted(front, key=lambda layer: alignment[layer])
    line = dict(color=ORANGE, marker="o", markersize=9, linewidth=1.6, label="Pareto front", drawstyle="steps-post")
    crosses = dict(color="#6FA3C8", marker="x", markersize=7, linewidth=0, label="other layers")
    for layers, style in ((ordered, line), (others, crosses)):
        if layers:
            axes.plot([alignment[n] for n in layers], [importance[n] for n in layers], zorder=3, **style)
    for layer, point in enumerate(zip(alignment, importance)):
        if layer in front:
            style = {"xytext": (-6, 6), "ha": "right", "fontsize": 12, "fontweight": "bold"}
        elif len(importance) <= 40:
            style = {"xytext": (7, -4), "fontsize": 9.5, "color": "#555555"}
        else:
            continue
        axes.annotate(str(layer), point, textcoords="offset points", zorder=4, **style)
    for values, scale, limit in (
        (alignment, axes.set_xscale, axes.set_xlim),
        (importance, axes.set_yscale, axes.set_ylim),
    ):
        if max(values) > 10 * min(values) > 0:
            scale("log")
            limit(min(values) / 1.6, max(values) * 1.6)
        else:
            limit(0, 1.12 * max(values) or 1.0)
    axes.set_xlabel("|cosine| of the forget and the retain gradient")
    axes.set_ylabel("importance, |gradient| / |weights|")
    axes.set_title("Which layers to change: important, and not aligned", loc="left", fontweight="bold", pad=36)
    figures.legend(axes, ncols=2)
    figures.save(figure, path)


def plot_relearning(results: Mapping[str, RTTResult], path: str | Path, chance: float | None = 0.25) -> None:
    """Relearning curves of several methods under the RTT attack, PNG at `path`.

    results: method -> RTTResult. Each method's strongest attack is drawn strong, with its best epoch ringed, its other
    learning rates thin. Of one method each attack is drawn so. chance: accuracy of guessing (0..1); None, and
    answer probabilities, have no line of it. ValueError for results of both metrics.
    """
    if not results:
        raise ValueError("no methods to plot: the result mapping is empty")
    if len(metrics := {result.metric for result in results.values()}) > 1:
        raise ValueError("some methods have accuracies and some answer probabilities: make a plot of each")
    figure, axes = figures.single()
    first, by_accuracy = next(iter(results.values())), metrics == {"accuracy"}
    kinds = first.attacks if len(results) == 1 else []
    lines, title, columns = [], "What comes back under the RTT attack", 1
    if len(kinds) > 1:
        (method, columns), before = (*results, 2), first.before
        title = f"What comes back ({_share(before)} before the attacks): {figures.label(method, NAME - 18)}"
        for index, attack in enumerate(kinds):
            found = first.summary(attack)
            rate = f" (lr {_rate(found['lr'])})" if found["lr"] else ""
            steps = f", epochs x {ATTACKS[attack].passes}" * (ATTACKS[attack].passes > 1)
            lines += _curves(axes, first, attack, f"{attack}{steps}: {_share(found['accuracy'])}{rate}", index)
    else:
        for index, (method, result) in enumerate(results.items()):
            attack, lr, _ = result.strongest
            kind = f"{attack}, " * (attack != "full")
            label = f"{_share(result.before)} → {_share(result.accuracy)} ({kind}lr {_rate(lr)})"
            lines += _curves(axes, result, attack, f"{figures.label(method, NAME)}: {label}", index)
    drawn = [(result, attack) for result in results.values() for attack in kinds or [result.strongest.attack]]
    epochs = max(len(result.epochs(attack)) for result, attack in drawn) - 1
    keys = _keys(axes, chance if by_accuracy else None, any(len(result.rates(attack)) > 1 for result, attack in drawn))
    axes.set_ylim(0, 104 if by_accuracy else 1.1 * max(max(line.get_ydata(), default=0) for line in axes.lines))
    axes.set_xlim(-0.03 * epochs, 1.03 * epochs)
    axes.set_xticks(range(0, epochs + 1, max(1, -(-epochs // 16))))
    on = "" if columns > 1 else " on the other folds"
    axes.set_xlabel(f"epochs of fine-tuning{on} (0 = right after unlearning)")
    axes.set_ylabel("held-out accuracy (%)" if by_accuracy else "probability of the held-out answers (%)")
    rows = max(-(-len(lines) // columns), len(keys))
    axes.set_title(title, loc="left", fontweight="bold", pad=20 + 17 * rows)
    axes.add_artist(figures.legend(axes, handles=lines, ncols=columns))
    figures.legend(axes, handles=keys, loc="lower right", bbox_to_anchor=(1.01, 1.0))
    figures.save(figure, path)


def _curves(axes, result: RTTResult, attack: str, label: str, index: int) -> list:
    """An attack's curves, by measurement; returns the strongest one, which stands for it in the legend. What trains
    nothing is a point."""
    colour, turn = COLOURS[index % len(COLOURS)], index // len(COLOURS)
    marker = MARKERS[(index + turn) % len(MARKERS)]
    found, at, width = result.summary(attack), range(len(result.epochs(attack))), 2.4
    lr, place = found["lr"], result.epochs(attack).index(found["epoch"])
    for other in result.rates(attack):
        if other != lr:
            values = _percents(result.curve(other, attack=attack))
            axes.plot(at, values, color=colour, linewidth=1.1, alpha=0.4, zorder=2)
    curve = _percents(result.curve(lr, attack=attack))
    if ATTACKS[attack].rounds is not None:
        curve, at, width, place = curve[-1:], [0], 0, 0
    strong = axes.plot(at, curve, color=colour, marker=marker, markersize=6, linewidth=width, zorder=3, label=label)
    if Strongest(attack, lr, found["epoch"]) == result.strongest:
        axes.plot([place], [100 * result.accuracy], color=colour, **_RING, zorder=4, markersize=14)
    return strong


def _keys(axes, chance: float | None, several_rates: bool) -> list:
    """What is the same for all methods, in grey."""
    keys = axes.plot([], color=GREY, **_RING, markersize=12, label="strongest attack")
    if chance is not None:
        style = dict(color=GREY, linestyle="--", linewidth=1.6, zorder=1)
        keys.append(axes.axhline(100 * chance, **style, label=f"chance ({100 * chance:.0f} %)"))
    if several_rates:
        keys[1:1] = axes.plot([], color=GREY, linewidth=1.1, alpha=0.6, label="other learning rates")
    return keys


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _share(value: float) -> str:
    """In percent; a small one with two digits."""
    return f"{100 * value:.2g} %" if 0 < value < 0.0995 else f"{100 * value:.0f} %"


def _rate(lr: float) -> str:
    return f"{lr:g}".replace("e-0", "e-")
