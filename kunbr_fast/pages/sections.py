"""The sections of one run's page, each empty where there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.pages import findings, pictures
from kunbr_fast.pages.findings import NAMES, measured
from kunbr_fast.pages.formats import Example
from kunbr_fast.pages.markup import (
    NOTHING,
    Markup,
    change,
    code,
    count,
    e,
    figure,
    folded,
    join,
    listed,
    pairs,
    paragraph,
    setting,
    table,
    tag,
    words,
)
from kunbr_fast.pages.sources import Source
from kunbr_fast.run.config import KUnBRConfig

EXAMPLES = 60  # shown at most


def headline(source: Source) -> Markup:
    cards = []
    for card in findings.cards(source):
        parts = [tag("h3", card.title), tag("p", card.big, class_="big"), tag("p", card.text)]
        cards.append(tag("div", join(parts), class_="card"))
    warnings = [tag("div", paragraph(f"Caution: {text}."), class_="caution") for text in findings.warnings(source)]
    note = "± is one standard error, over questions or records. The last section says what these figures do not show."
    return join([tag("div", join(cards), class_="cards"), paragraph(note, "soft"), *warnings])


# ---------------------------------------------------------------- what was asked


def asked(source: Source) -> Markup:
    about: list[tuple[str, Any]] = []
    if source.report is not None:
        about += [("original model", words(source.report["model"])), ("method", method(source.report))]
        density = source.density
        about.append(("layers", f"{len(density.per_layer)}; blocks re-inserted: {blocks(source.report) or 'none'}"))
        about.append(("forget set", f"{count(density.num_samples, 'samples')} trained on{_asked(source, 'forget')}"))
        about.append(("retain set", _asked(source, "retain").removeprefix("; ")))
    if source.evaluation is not None:
        for name, model in source.evaluation["models"].items():
            about.append((f"measured: {NAMES.get(name, name)}", words(model.get("path") or NOTHING)))
        for name, each in source.evaluation["sets"].items():
            about.append((f"measured on: {name}", _set(each)))
        if "retrained" in source.evaluation["models"]:
            about.append(("retrained", "a model that was trained without the forget set"))
        about.append(("suite of measures", setting(source.evaluation["suite"])))
    return join([pairs(about), _settings(source), _evaluation_settings(source)])


def method(report: Mapping[str, Any]) -> str:
    """As `evaluation.report.Report.method` names it."""
    config = report["config"]
    objective = config.get("warmup_objective") or config.get("objective") or "unknown"
    name = "KUnBR" if report["blocks"] else str(objective).replace("_", " ")
    return f"{name}, with a relearning adversary" if config.get("adversary_every") else name


def blocks(report: Mapping[str, Any]) -> str:
    found = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in report["blocks"]]
    return ", ".join(found)


def _asked(source: Source, what: str) -> str:
    found = next((sets[what] for sets in measured(source).values() if what in sets), None)
    return "" if found is None else f"; {found.of} asked"


def _set(each: Mapping[str, Any]) -> Markup:
    forms = ", ".join(f"{number} {form}" for form, number in (each.get("forms") or {}).items())
    files = join([words(name) for name in each.get("files") or ()], ", ")
    return join([f"{count(each.get('records', 0), 'records')}{f' ({forms})' if forms else ''}", files], ": ")


def _settings(source: Source) -> Markup:
    """Those that are not the defaults, and folded all of them."""
    if not source.config:
        return Markup("")
    fields, default = KUnBRConfig.__dataclass_fields__, KUnBRConfig().to_dict()
    changed, every = [], []
    for name, value in source.config.items():
        help_ = fields[name].metadata["help"] if name in fields else "of another version"
        usual = setting(default[name]) if name in default else NOTHING
        every.append([join([code(name), tag("span", help_, class_="help")], " "), setting(value), usual])
        if name not in default or value != default[name]:
            changed.append(every[-1])
    header = ["setting", "value", "default"]
    said = "Settings that are not the defaults" if changed else "All settings have their defaults."
    few = table(header, changed, texts=3, caption=said) if changed else paragraph(said)
    return join([few, folded(f"All {len(every)} settings", table(header, every, texts=3, caption="All settings"))])


def _evaluation_settings(source: Source) -> Markup:
    if source.evaluation is None or not source.evaluation["settings"]:
        return Markup("")
    rows = [[code(name), setting(value)] for name, value in source.evaluation["settings"].items()]
    return folded("Settings of the evaluation", table(["setting", "value"], rows, texts=2, caption="Of the evaluation"))


# ---------------------------------------------------------------- before and after


def before_and_after(source: Source) -> Markup:
    found = measured(source)
    if not found:
        return Markup("")
    sets = [what for what in ("forget", "retain") if any(what in of for of in found.values())]
    header = ["model"] + [f"{what}, {_metric(found, what)}" for what in sets]
    rows = []
    for model in (name for name in NAMES if name in found):
        rows.append([NAMES[model], *[_cell(found[model].get(what)) for what in sets]])
    for who, rtt in source.attacks:
        if "forget" in sets and rtt.metric == next(of["forget"] for of in found.values() if "forget" in of).metric:
            after = [figure(rtt.accuracy, rtt.standard_error) if what == "forget" else NOTHING for what in sets]
            rows.append([f"result, after the strongest attack of {who}", *after])
    more = _other_scorings(found, sets)
    return join(
        [table(header, rows, label="Before and after, with standard errors"), pictures.before_and_after(source), more]
    )


def _metric(found: Mapping[str, Any], what: str) -> str:
    metric = next(of[what].metric for of in found.values() if what in of)
    return "accuracy" if metric == "accuracy" else "answer probability"


def _cell(found: findings.Measured | None) -> str:
    return NOTHING if found is None else figure(found.value, found.error)


def _other_scorings(found: Mapping[str, Any], sets: Sequence[str]) -> Markup:
    """Calibrated and smooth accuracy, where they were measured."""
    kinds = [
        kind
        for kind in ("calibrated", "smooth")
        if any(getattr(one, kind) is not None for of in found.values() for one in of.values())
    ]
    if not kinds:
        return Markup("")
    header = ["model"] + [f"{what}, {kind}" for what in sets for kind in kinds]
    rows = []
    for model in (name for name in NAMES if name in found):
        cells = []
        for what in sets:
            one = found[model].get(what)
            for kind in kinds:
                error = one.smooth_error if one is not None and kind == "smooth" else None
                cells.append(figure(one and getattr(one, kind), error))
        rows.append([NAMES[model], *cells])
    said = (
        "Calibrated: after each letter's mean logit was taken away. Smooth: the expected accuracy over random wrong "
        "choices, which varies less."
    )
    return folded(
        "Calibrated and smooth accuracy", join([table(header, rows, caption="Other scorings"), paragraph(said, "soft")])
    )


def kept_and_lost(source: Source) -> Markup:
    """The retain set, and all of the evaluation that is not of the forget set."""
    rows = []
    found = measured(source)
    first, last = (found.get(model, {}).get("retain") for model in ("original", "result"))
    if first is not None and last is not None:
        moved = change(last.value - first.value, last.change_error)
        rows.append([f"{_metric(found, 'retain')}, of the run: retain", _cell(first), _cell(last), moved])
    figures = (source.evaluation or {}).get("figures", ())
    for row, before in _pairs_of(figures):
        if row["set"] != "forget":
            unit = row["unit"]
            errors = (row["standard_error"], before["standard_error"])
            error = None if None in errors else math.hypot(*errors)
            values = [figure(each["value"], each["standard_error"], unit) for each in (before, row)]
            rows.append([f"{row['title']}: {row['set']}", *values, change(row["value"] - before["value"], error, unit)])
    note = (
        ""
        if not figures
        else (
            "Errors of the run's changes are of the same questions before and after. Those of the evaluation are as if "
            "each model had been asked other questions: sqrt(a² + b²)."
        )
    )
    made = table(["measure", "original", "result", "change"], rows, label="Before and after, of what was to stay")
    return join([made, paragraph(note, "soft")]) if rows else Markup("")


def _pairs_of(figures: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(of the result, of the original) of the same measure and set."""
    before = {(row["measure"], row["set"]): row for row in figures if row["model"] == "original"}
    for row in figures:
        if row["model"] == "result" and (row["measure"], row["set"]) in before:
            yield row, before[row["measure"], row["set"]]


# ---------------------------------------------------------------- curves


def relearning(source: Source) -> Markup:
    chance = next((one.chance for of in measured(source).values() for one in of.values() if one.chance), None)
    parts = []
    for who, rtt in source.attacks:
        parts += [pictures.relearning(who, rtt, chance), attack_table(rtt)]
    return join(parts)


def attack_table(rtt: RTTResult) -> Markup:
    """Each attack's strongest point; what was before them; what diverged."""
    smooth = rtt.smooth_accuracy is not None
    rows = [
        ["before the attack", "", NOTHING, NOTHING, figure(rtt.before, findings.before_error(rtt)), *[NOTHING] * smooth]
    ]
    for attack in rtt.attacks:
        found = rtt.summary(attack)
        trained = [f"{found['lr']:g}", f"{found['epoch']}"] if found["lr"] else [NOTHING, NOTHING]
        cells = [figure(found["accuracy"], found["standard_error"])]
        cells += [figure(found["smooth_accuracy"], found["smooth_error"])] * smooth
        rows.append([attack, ATTACKS[attack].says if attack in ATTACKS else "", *trained, *cells])
    for attack, lr in dict.fromkeys((each["attack"], each["lr"]) for each in rtt.diverged):
        rows.append([attack, "diverged", f"{lr:g}", NOTHING, NOTHING, *[NOTHING] * smooth])
    metric = "accuracy" if rtt.metric == "accuracy" else "answer probability"
    header = ["attack", "what it does", "learning rate", "epoch", metric, *["smooth accuracy"] * smooth]
    return table(header, rows, texts=2, caption="The strongest point of each attack")


# ---------------------------------------------------------------- examples


def examples(source: Source) -> Markup:
    found = [*(source.report or {}).get("examples", ()), *(source.evaluation or {}).get("examples", ())]
    parts = [tag("div", pairs(_example(one)), class_="example") for one in found[:EXAMPLES]]
    note = "" if len(found) <= EXAMPLES else f"The first {EXAMPLES} of {len(found)}; all are in the JSON files."
    shown = join(parts[:6])
    return join(
        [shown, folded(f"{len(parts) - 6} more", join(parts[6:])) if len(parts) > 6 else "", paragraph(note, "soft")]
    )


_ANSWERS = {
    "question": "question",
    "answer": "right answer",
    "original": "original says",
    "unlearned": "after the warm-up",
    "result": "result says",
    "retrained": "retrained says",
    "attacked": "after the attack",
}


def _example(one: Example) -> Iterator[tuple[str, Any]]:
    if one.get("set"):
        yield "set", one["set"]
    for key, name in _ANSWERS.items():
        if one.get(key) is not None:
            yield name, words(one[key]) if one[key] else tag("span", "(nothing)", class_="soft")


# ---------------------------------------------------------------- how


def seconds(source: Source) -> Markup:
    parts = []
    for what, found in (("the run", source.report), ("the evaluation", source.evaluation)):
        took = (found or {}).get("seconds") or {}
        total, most = sum(took.values()), max(took.values(), default=0.0) or 1.0
        rows = []
        for name, value in took.items():
            bar = Markup(f'<span class="bar" style="width:{max(0.0, 8 * value / most):.2f}rem"></span>')
            rows.append([pictures.stage_name(name), bar, f"{value:.1f}"])
        rows.append(("sum", ["all", "", f"{total:.1f}"]))
        parts.append(table(["stage", "", "seconds"], rows if took else [], texts=2, caption=f"Wall time of {what}"))
    return join(parts)


def versions(source: Source) -> Markup:
    about: list[tuple[str, Any]] = []
    for what, found in (("the run", source.report), ("the evaluation", source.evaluation)):
        if found is not None:
            about.append((f"kunbr-fast of {what}", found["kunbr_fast"]))
    rows = [[f"{name} (the file)", "SHA-256", code(digest)] for name, digest in source.checksums.items()]
    result = (source.report or {}).get("result", {})
    if isinstance(identity := result.get("identity"), str):
        names = ("dtype", "original model", "tokenizer", "data")
        rows += [[f"{name}, of the run", "fingerprint", code(part)] for name, part in zip(names, identity.split("-"))]
    for name, entry in (result.get("files") or {}).items():
        rows.append([f"{name} (the result)", f"xxh3, of {entry.get('size')} bytes", code(entry.get("xxh3"))])
    for kind in ("models", "sets"):
        for name, entry in (source.evaluation or {}).get(kind, {}).items():
            if entry.get("fingerprint"):
                rows.append([f"{name}, as evaluated", "fingerprint", code(entry["fingerprint"])])
    rows += [[f"unlearning.json: {where}", "of the certificate", code(digest)] for where, digest in source.sealed]
    approximations = [
        *[
            (f"cover of {pictures.stage_name(n)}, cosine to the exact gradient", f"{v:.6f}")
            for n, v in _of(source, "gradient_cosines")
        ],
        *[(f"cache of {pictures.stage_name(n)}", setting(v)) for n, v in _of(source, "cache_errors")],
    ]
    made = table(["what", "kind", "checksum"], rows, texts=3, caption="Checksums")
    return join([pairs(about + approximations), made])


def _of(source: Source, name: str) -> list[tuple[str, Any]]:
    return list(((source.report or {}).get(name) or {}).items())


def not_shown(source: Source) -> Markup:
    return listed(e(text) for text in findings.limits(source))
