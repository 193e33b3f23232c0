"""The charts of one run, and of several in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kunbr_fast.density.measure import NO_SHARES, Density
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult, Strongest
from kunbr_fast.pages.charts import Bars, Chart, Series, bars, lines
from kunbr_fast.pages.findings import NAMES, Measured, measured
from kunbr_fast.pages.markup import Markup, figure, join
from kunbr_fast.pages.sources import Source

POINTS = 300  # of a curve over steps, at most: means of neighbours stand for them beyond that


def _percents(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


# ---------------------------------------------------------------- before and after

_KINDS = {"original": "first", "unlearned": "s5", "result": "s1", "attacked": "s0"}


def before_and_after(source: Source) -> Markup:
    """Bars of each metric: sets by model, and what the strongest attack of the run brings back."""
    found, charts = measured(source), []
    for metric in ("accuracy", "probability"):
        sets = [w for w in ("forget", "retain") if any(_of(found, m, w, metric) for m in found)]
        models = [m for m in ("original", "unlearned", "result") if any(_of(found, m, w, metric) for w in sets)]
        groups = []
        for model in models:
            each = [_of(found, model, what, metric) for what in sets]
            values, errors = [one and one.value for one in each], [one and one.error for one in each]
            groups.append(Bars(NAMES[model], _percents(values), _percents(errors), _KINDS[model]))
        if groups and source.rtt is not None and source.rtt.metric == metric and "forget" in sets:
            values, errors = ([value if what == "forget" else None for what in sets]
                              for value in (source.rtt.accuracy, source.rtt.standard_error))  # fmt: skip
            groups.append(
                Bars("result, after the strongest attack", _percents(values), _percents(errors), _KINDS["attacked"])
            )
        chance = next(
            (one.chance for m in found.values() for one in m.values() if one.metric == metric and one.chance), None
        )
        label = "questions answered correctly (%)" if metric == "accuracy" else "probability of the right answer (%)"
        note = "The thin line at the end of a bar is its standard error, to both sides."
        how = dict(note=note, top=100, precision=".1f")
        chart = Chart("What the models know, before and after", "set", label, _guessing(chance), **how)
        charts.append(bars(chart, sets, groups, written=".0f"))
    return join(charts)


def _of(found: Mapping[str, Mapping[str, Measured]], model: str, what: str, metric: str) -> Measured | None:
    one = found.get(model, {}).get(what)
    return one if one is not None and one.metric == metric else None


def _guessing(chance: float | None) -> tuple[float, str] | None:
    return None if chance is None else (100 * chance, f"guessing ({figure(chance)})")


# ---------------------------------------------------------------- density

_RAW = {
    "fisher_ratio": ("Where the forget set weighs more than the retain set", "Fisher information, forget / retain"),
    "cosine": ("Where forget and retain gradients agree", "cosine of the mean gradients"),
    "slug": ("Where the forget set's gradient is large", "importance, |gradient| / |weights|"),
}
_SHARES = ("Where the knowledge of the forget set sits", "share of the density (%)")


def density(source: Source) -> Markup:
    """Bars a layer, the chosen blocks marked."""
    values, errors = _values(source.density)
    number, blocks = len(values), source.report["blocks"]
    chosen = {layer for start, stop in blocks for layer in range(start, stop)}
    last = source.config.get("skip_last_layers", 0) if blocks else 0
    skipped = {layer for layer in range(max(0, number - last), number)} - chosen

    def part(layers: set[int], name: str, kind: str) -> Bars:
        return Bars(
            name, *[[v if i in layers else None for i, v in enumerate(each)] for each in (values, errors)], kind
        )

    groups = [
        part(chosen, "re-inserted and trained", "s0"),
        part(set(range(number)) - chosen - skipped, "not chosen", "first"),
        part(skipped, "last layers, never chosen", "hollow"),
    ]
    marks = [(a, b - 1, f"{a}" if b == a + 1 else f"{a}–{b - 1}") for a, b in blocks]
    title, label = _RAW.get(source.density.statistic, _SHARES)
    found = source.density
    note = f"{found.statistic} of the gradients of {found.modules}, over {found.num_samples} samples."
    note += f" Blocks: {', '.join(label for _, _, label in marks)}." if marks else ""
    chart = Chart(title, "decoder layer", label, note=note)
    return bars(chart, [str(i) for i in range(number)], groups, together=True, brackets=marks)


def _values(found: Density) -> tuple[list[float], list[float | None]]:
    """Shares in percent with their errors; of a statistic without shares its values."""
    values, errors = found.per_layer.tolist(), [None] * len(found.per_layer)
    scale = 1.0 if found.statistic in NO_SHARES else 100 / (math.fsum(values) or 1.0)
    if found.standard_error is not None:
        errors = [scale * error for error in found.standard_error.tolist()]
    return [scale * value for value in values], errors


def densities(sources: Sequence[Source]) -> Markup:
    """The layers' densities of several runs, a chart for each statistic."""
    by_kind: dict[str, list[Series]] = {}
    for look, source in enumerate(sources):
        if source.density is not None:
            values, errors = _values(source.density)
            kind = source.density.statistic if source.density.statistic in NO_SHARES else ""
            by_kind.setdefault(kind, []).append(Series(source.name, range(len(values)), values, errors, look))
    texts = {kind: _RAW.get(kind, _SHARES) for kind in by_kind}
    return join(lines(Chart(title, "decoder layer", label), by_kind[kind]) for kind, (title, label) in texts.items())


# ---------------------------------------------------------------- losses


def losses(source: Source) -> Markup:
    """By step where there is a log, else by epoch; the stages one after the other."""
    found = _steps(source) if source.steps else _epochs(source)
    if found is None:
        return Markup("")
    x_label, xs, curves, borders, stages = found
    series = [
        Series(f"{name.removesuffix('_loss')} loss", xs, values, look=look)
        for look, (name, values) in enumerate(curves.items())
        if any(value is not None for value in values)
    ]
    note = f"Stages, at the lines: {', '.join(f'{i} {stage_name(name)}' for i, name in enumerate(stages, 1))}."
    chart = Chart("Losses while it was trained", x_label, "mean loss (nats a token)", note=note, breaks=borders)
    return lines(chart, series)


def _epochs(source: Source) -> tuple | None:
    stages = {name: epochs for name, epochs in source.report["losses"].items() if epochs}
    if not stages:
        return None
    rows = [row for epochs in stages.values() for row in epochs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    borders, end = [], 0
    for epochs in stages.values():
        borders.append(end + 0.5)
        end += len(epochs)
    curves = {name: [row.get(name) for row in rows] for name in names}
    return "epoch, of all stages", list(range(1, end + 1)), curves, borders[1:], stages


def _steps(source: Source) -> tuple | None:
    stages = source.steps["stage"]
    rows = [
        i
        for i in range(len(stages))
        if source.steps["loss"][i] is not None or source.steps["forget_loss"][i] is not None
    ]
    if not rows:
        return None
    borders = [source.steps["step"][b] - 0.5 for a, b in zip(rows, rows[1:]) if stages[a] != stages[b]]
    names = list(dict.fromkeys(stages[i] for i in rows))
    every = -(-len(rows) // POINTS)
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    xs = [source.steps["step"][part[0]] for part in parts]
    curves = {
        name: [_mean([source.steps[name][i] for i in part]) for part in parts]
        for name in ("forget_loss", "retain_loss")
    }
    if all(value is None for values in curves.values() for value in values):
        curves = {"loss": [_mean([source.steps["loss"][i] for i in part]) for part in parts]}
    return "step" if every == 1 else f"step (means of {every})", xs, curves, borders, names


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def stage_name(name: str) -> str:
    """A stage of report.json for people: "blocks.0.2-4" is round 1, layers 2 to 3."""
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) == 3 and all(end.isdecimal() for end in [parts[1], *parts[2].split("-")]):
        start, _, stop = parts[2].partition("-")
        last = int(stop) - 1
        layers = f"layer {start}" if int(start) == last else f"layers {start}–{last}"
        return layers if parts[1] == "0" else f"{layers}, round {int(parts[1]) + 1}"
    return {"warmup": "warm-up", "rtt": "attack"}.get(name, name)


# ---------------------------------------------------------------- relearning


def relearning(name: str, rtt: RTTResult, chance: float | None) -> Markup:
    """Each attack's curves."""
    series = []
    for look, attack in enumerate(rtt.attacks):
        series += _attack(rtt, attack, look)
    passes = [
        f"{a}: each stands for {ATTACKS[a].passes}" for a in rtt.attacks if a in ATTACKS and ATTACKS[a].passes > 1
    ]
    several = any(len(rtt.rates(attack)) > 1 for attack in rtt.attacks)
    note = [
        "The ring marks the strongest attack.",
        "Thin lines: other learning rates." if several else "",
        "What trains nothing is a point at 0." if any(_rounds(a) for a in rtt.attacks) else "",
        f"Epochs of {'; '.join(passes)}." if passes else "",
    ]
    title = f"What comes back under the attacks of {name}"
    return lines(_relearning_chart(title, rtt.metric, chance, " ".join(filter(None, note))), series)


def _relearning_chart(title: str, metric: str, chance: float | None, note: str) -> Chart:
    label = "held-out questions right (%)" if metric == "accuracy" else "probability of held-out answers (%)"
    level = _guessing(chance) if metric == "accuracy" else None
    x_label = "epochs of fine-tuning (0: before)"
    return Chart(title, x_label, label, level, note, top=100 if metric == "accuracy" else None, precision=".1f")


def _rounds(attack: str) -> bool:
    return attack in ATTACKS and ATTACKS[attack].rounds is not None


def _attack(rtt: RTTResult, attack: str, look: int) -> Iterator[Series]:
    found, epochs = rtt.summary(attack), rtt.epochs(attack)
    best = Strongest(attack, found["lr"], found["epoch"])
    rate = f", learning rate {best.lr:g}, epoch {best.epoch}" if best.lr else ""
    says = f" ({ATTACKS[attack].says})" if attack in ATTACKS else ""
    name = f"{attack}{says}: {figure(found['accuracy'], found['standard_error'])}{rate}"
    for lr in rtt.rates(attack):
        curve = _percents(rtt.curve(lr, attack=attack))
        if lr != best.lr:
            yield Series(f"{attack}, learning rate {lr:g}", range(len(epochs)), curve, look=look, thin=True)
            continue
        place, at = epochs.index(best.epoch), range(len(epochs))
        errors = [
            _percent(rtt.error(Strongest(attack, lr, epoch))) if epoch == best.epoch else None for epoch in epochs
        ]
        if _rounds(attack):
            place, at, curve, errors = 0, [0], curve[-1:], errors[-1:]
        yield Series(
            name, at, curve, errors, look, ring=place if best == rtt.strongest else None, line=not _rounds(attack)
        )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def compared_relearning(found: Sequence[tuple[str, int, RTTResult]], chance: float | None) -> Markup:
    """(name, look, curves) of several runs: each one's strongest attack; a chart for each metric, never both in one."""
    charts = []
    for metric in ("accuracy", "probability"):
        series = []
        for name, look, rtt in found:
            if rtt.metric == metric:
                series += [_strongest(name, look, rtt)]
        title = "What comes back: the strongest attack of each run"
        charts.append(lines(_relearning_chart(title, metric, chance, ""), series))
    return join(charts)


def _strongest(name: str, look: int, rtt: RTTResult) -> Series:
    attack, lr, epoch = rtt.strongest
    epochs, curve = rtt.epochs(attack), _percents(rtt.curve(lr, attack=attack))
    errors = [_percent(rtt.error(rtt.strongest)) if each == epoch else None for each in epochs]
    rate = f", learning rate {lr:g}" if lr else ""
    text = f"{name}: {figure(rtt.before)} → {figure(rtt.accuracy, rtt.standard_error)} ({attack}{rate})"
    return Series(text, range(len(epochs)), curve, errors, look, ring=epochs.index(epoch))


# ---------------------------------------------------------------- layers


_AXES = {"layers": "layer", "k": "sampled answers"}  # lists in a figure's detail, beside "values"


def depth(figures: Sequence[Mapping[str, Any]]) -> Markup:
    """What measures find at each layer, or with each number of samples: a chart for a measure, a curve for a model and
    a set."""
    charts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in figures:
        values = row["detail"].get("values")
        for axis in _AXES:
            at = row["detail"].get(axis)
            if isinstance(values, list) and isinstance(at, list) and len(at) == len(values) and all(map(_number, at)):
                charts.setdefault((row["measure"], axis), []).append(row)
    return join(_depth(axis, rows) for (_, axis), rows in charts.items())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _depth(axis: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    share = rows[0]["unit"] == "share"
    series = []
    for look, row in enumerate(rows):
        values = [value if _number(value) else None for value in row["detail"]["values"]]
        name = f"{NAMES.get(row['model'], row['model'])}: {row['set']}"
        series.append(Series(name, row["detail"][axis], _percents(values) if share else values, look=look))
    unit = " (%)" if share else " (points)" if rows[0]["unit"] == "points" else ""
    numbers = ", ".join(dict.fromkeys(f"{row['set']} {row['number']}" for row in rows))
    note = f"{rows[0]['measure']}; number: {numbers}."
    return lines(Chart(rows[0]["title"], _AXES[axis], f"value{unit}", note=note), series)
