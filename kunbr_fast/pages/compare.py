"""Several runs on one page: one table, overlaid curves, and the settings that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kunbr_fast.measures.registry import GROUPS, SETS
from kunbr_fast.pages import findings, pictures
from kunbr_fast.pages.findings import NAMES, measured
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
    paragraph,
    setting,
    table,
    tag,
    words,
)
from kunbr_fast.pages.sources import Source
from kunbr_fast.run.config import KUnBRConfig

Section = tuple[str, str, Markup]


def of_several(sources: Sequence[Source]) -> list[Section]:
    return [
        ("headline", "In short", _headline(sources)),
        ("measures", "All figures", _figures(sources)),
        ("relearning", "What comes back under attack", _relearning(sources)),
        ("density", "Where the knowledge sits", pictures.densities(sources)),
        ("settings", "Settings", _settings(sources)),
        ("seconds", "Seconds a stage", _seconds(sources)),
        ("versions", "Versions and checksums", _versions(sources)),
        ("limits", "What these figures do not show", _limits(sources)),
    ]


def _row(name: Any, cells: Sequence[str]) -> list[Any]:
    return [name, *cells]


def _header(sources: Sequence[Source], first: str) -> list[Any]:
    return [first, *[words(source.name) for source in sources]]


# ---------------------------------------------------------------- figures


def _headline(sources: Sequence[Source]) -> Markup:
    """The three figures of each run's own page, and what makes the runs hard to compare."""
    rows, titles = [], {}
    for number, source in enumerate(sources):
        for card in findings.cards(source):
            titles.setdefault(f"{card.title} ({card.metric})" if card.metric else card.title, [NOTHING] * len(sources))[
                number
            ] = card.big
    for title, cells in titles.items():
        rows.append(_row(title, cells))
    cautions = [tag("div", paragraph(text), class_="caution") for text in _unlike(sources)]
    for source in sources:
        cautions += [
            tag("div", paragraph(f"{source.name}: {text}."), class_="caution") for text in findings.warnings(source)
        ]
    note = "± is one standard error, over questions or records. Two runs on the same questions are not independent."
    return join([table(_header(sources, ""), rows, caption="The runs"), paragraph(note, "soft"), *cautions])


def _unlike(sources: Sequence[Source]) -> Iterator[str]:
    """Why figures of these runs may not be comparable."""
    metrics = {
        source.name: sorted({one.metric for of in measured(source).values() for one in of.values()})
        for source in sources
    }
    if len(kinds := {kind for found in metrics.values() for kind in found}) > 1:
        by_kind = {kind: [name for name, found in metrics.items() if kind in found] for kind in sorted(kinds)}
        said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_kind.items())
        yield (
            f"These runs were measured differently ({said}). An accuracy and a "
            "probability are not comparable: each has its own rows and charts."
        )
    identities = {source.name: _identity(source) for source in sources}
    for place, what in enumerate(("dtypes", "original models", "tokenizers", "data (forget, retain or questions)")):
        found = {parts[place] for parts in identities.values() if parts is not None}
        if len(found) > 1:
            yield f"The runs have different {what}: their figures differ for that reason too."
    if unknown := [name for name, parts in identities.items() if parts is None]:
        yield f"It is not known whether {', '.join(unknown)} began with the same model and data."
    yield from _evaluated_unlike([source.evaluation for source in sources if source.evaluation is not None])
    if len(versions := {source.report["kunbr_fast"] for source in sources if source.report is not None}) > 1:
        yield f"The runs are of different versions of kunbr-fast: {', '.join(sorted(versions))}."


READ_BY = ("text", "max_length", "max_new_tokens", "layer_records")  # settings of an evaluation that figures depend on


def _evaluated_unlike(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in SETS:
        found = {of["sets"][name].get("fingerprint") for of in evaluations if name in of["sets"]}
        if len(found) > 1:
            yield f"The evaluations have different {name} records: their figures of that set are not comparable."
    differ = [name for name in READ_BY if len({setting(of["settings"].get(name)) for of in evaluations}) > 1]
    if differ:
        yield f"The evaluations have different settings ({', '.join(differ)}), and their figures for that reason too."


def _identity(source: Source) -> list[str] | None:
    """dtype, model, tokenizer and data of the run."""
    result = (source.report or {}).get("result", {})
    parts = str(result.get("identity", "")).split("-")
    return parts if len(parts) == 4 else None


def _figures(sources: Sequence[Source]) -> Markup:
    found: dict[str, list[str]] = {}

    def put(name: str, number: int, text: str) -> None:
        found.setdefault(name, [NOTHING] * len(sources))[number] = text

    for number, source in enumerate(sources):
        for model, sets in measured(source).items():
            for what, one in sets.items():
                metric = "accuracy" if one.metric == "accuracy" else "answer probability"
                put(f"{what}, {metric}: {NAMES.get(model, model)}", number, figure(one.value, one.error))
        for who, rtt in source.attacks:
            metric = "accuracy" if rtt.metric == "accuracy" else "answer probability"
            put(f"{metric} before the attacks of {who}", number, figure(rtt.before, findings.before_error(rtt)))
            put(f"{metric} after the strongest attack of {who}", number, figure(rtt.accuracy, rtt.standard_error))
            put(f"came back ({metric}), {who}", number, change(rtt.recovery, rtt.change_error))
            for attack in rtt.attacks:
                summary = rtt.summary(attack)
                put(
                    f"{metric} after {attack}, of {who}", number, figure(summary["accuracy"], summary["standard_error"])
                )
    order = sorted(found, key=_order)
    own = table(_header(sources, "figure"), [_row(name, found[name]) for name in order], caption="Of the runs")
    return join([own, _evaluations(sources)])


def _order(name: str) -> int:
    """Sets first; the same figures of several runs stand together as they came."""
    return next((i for i, start in enumerate(("forget", "retain")) if name.startswith(start)), 2)


def _evaluations(sources: Sequence[Source]) -> Markup:
    """The results' figures by measure and set."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for number, source in enumerate(sources):
        for row in (source.evaluation or {}).get("figures", ()):
            if row["model"] in ("original", "result"):
                key = (row["group"], row["title"], row["set"], row["model"])
                text = figure(row["value"], row["standard_error"], row["unit"])
                rows.setdefault(key, [NOTHING] * len(sources))[number] = text
    groups = list(dict.fromkeys([*GROUPS, *(key[0] for key in rows)]))
    order = sorted(rows, key=lambda key: (groups.index(key[0]), *key[1:]))
    lines = [[f"{key[1]}: {key[2]}", NAMES.get(key[3], key[3]), *rows[key]] for key in order]
    return table(["measure", "model", *_header(sources, "")[1:]], lines, texts=2, caption="Of kunbr-fast evaluate")


def _relearning(sources: Sequence[Source]) -> Markup:
    found = [(source.name, look, source.attacks[0][1]) for look, source in enumerate(sources) if source.attacks]
    chances = {
        one.chance for source in sources for of in measured(source).values() for one in of.values() if one.chance
    }
    none = [source.name for source in sources if not source.attacks]
    note = paragraph(f"No attack was made on {', '.join(none)}.", "soft") if none else ""
    return join([pictures.compared_relearning(found, chances.pop() if len(chances) == 1 else None), note])


# ---------------------------------------------------------------- settings


def _settings(sources: Sequence[Source]) -> Markup:
    """Those that differ between the runs, shaded where a run is not as the first; folded all."""
    runs = [source for source in sources if source.config]
    if not runs:
        return Markup("")
    default = KUnBRConfig().to_dict()
    names = list(dict.fromkeys(name for source in runs for name in source.config))
    differ, every = [], []
    for name in names:
        values = [setting(source.config.get(name, default.get(name))) for source in runs]
        row = [code(name), *values]
        every.append(("differs" if len(set(values)) > 1 else "", row))
        if len(set(values)) > 1:
            differ.append(("differs", row))
    texts, header = len(runs) + 1, _header(runs, "setting")
    few = (
        table(header, differ, texts, caption="Settings that differ")
        if differ
        else paragraph("All settings are the same.")
    )
    return join([few, folded(f"All {len(every)} settings", table(header, every, texts, caption="All settings"))])


def _seconds(sources: Sequence[Source]) -> Markup:
    found: dict[str, list[str]] = {}
    for number, source in enumerate(sources):
        for name, value in ((source.report or {}).get("seconds") or {}).items():
            found.setdefault(pictures.stage_name(name), [NOTHING] * len(sources))[number] = f"{value:.1f}"
    return table(_header(sources, "stage"), [_row(*item) for item in found.items()], caption="Wall time, seconds")


def _versions(sources: Sequence[Source]) -> Markup:
    rows = []
    for source in sources:
        for name, digest in source.checksums.items():
            of = source.report if name == "report.json" else source.evaluation if name == "evaluation.json" else {}
            rows.append([f"{source.name}/{name}", str((of or {}).get("kunbr_fast", "")), code(digest)])
    return table(["file", "kunbr-fast", "SHA-256"], rows, texts=3, caption="Checksums of the files")


def _limits(sources: Sequence[Source]) -> Markup:
    """What holds of all runs, then what holds of some."""
    found = [findings.limits(source) for source in sources]
    every = [text for text in found[0] if all(text in of for of in found)]
    parts = [listed(map(e, every))]
    for source, of in zip(sources, found):
        rest = [text for text in of if text not in every]
        parts.append(join([tag("h3", words(source.name)), listed(map(e, rest))]) if rest else "")
    number = count(len(sources), "runs")
    same = f"{number} were chosen to be shown here. Whoever picks the best of many runs picks luck too."
    return join([*parts[:1], listed([same]), *parts[1:]])
