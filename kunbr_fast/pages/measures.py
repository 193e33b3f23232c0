"""The figures of `kunbr-fast evaluate` as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.measures.registry import GROUPS
from kunbr_fast.measures.suites import MEASURES
from kunbr_fast.pages.findings import NAMES
from kunbr_fast.pages.markup import NOTHING, Markup, change, code, figure, folded, join, pairs, setting, table, tag
from kunbr_fast.pages.sources import Source

MODELS = ("original", "result", "retrained")
KNOWN = {"higher": "↑", "lower": "↓", "": ""}


def every_measure(source: Source) -> Markup:
    """A table a group, and what is missing and why."""
    if source.evaluation is None:
        return Markup("")
    figures = source.evaluation["figures"]
    groups = [*GROUPS, *sorted({row["group"] for row in figures} - {*GROUPS})]
    parts = [_group(group, [row for row in figures if row["group"] == group]) for group in groups]
    reasons: dict[str, list[str]] = {}
    for each in source.evaluation.get("missing") or ():
        reasons.setdefault(each["why"], []).append(each["measure"])
    lines = [[why, join(map(code, names), ", ")] for why, names in reasons.items()]
    lost = table(["why", "measures"], lines, texts=2, label="What could not be measured")
    note = tag("p", "↑: a model that knows more of the set has more. ↓: it has less.", class_="soft") if figures else ""
    return join([note, *parts, join([tag("h3", "Missing"), lost]) if lost else ""])


def _group(group: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    if not rows:
        return Markup("")
    models = [name for name in (*MODELS, *sorted({row["model"] for row in rows} - {*MODELS}))
              if any(row["model"] == name for row in rows)]  # fmt: skip
    lines = []
    for measure, what in dict.fromkeys((row["measure"], row["set"]) for row in rows):
        of = {row["model"]: row for row in rows if (row["measure"], row["set"]) == (measure, what)}
        one = next(iter(of.values()))
        title = join(
            [f"{one['title']} {KNOWN.get(one['known'], '')}".strip(), tag("span", code(measure), class_="help")]
        )
        cells = [_cell(of.get(name)) for name in models]
        more = tag("span", _detail(of), class_="help") if _detail(of) else ""
        lines.append([title, join([f"{what} ({one['number']})", more]), *cells])
    header = ["measure", "set (number)", *[NAMES.get(name, name) for name in models]]
    made = table(header, lines, texts=2, label=f"Measures of {group}")
    formulas = [
        (code(name), MEASURES[name].formula)
        for name in dict.fromkeys(row["measure"] for row in rows)
        if name in MEASURES
    ]
    return join([tag("h3", group.capitalize()), made, folded("How each is defined", pairs(formulas))])


def _cell(row: Mapping[str, Any] | None) -> str:
    return NOTHING if row is None else figure(row["value"], row["standard_error"], row["unit"])


def _detail(of: Mapping[str, Mapping[str, Any]]) -> str:
    """Single values beside the result's figure, such as the sample sizes of a test."""
    row = of.get("result") or next(iter(of.values()))
    found = {name: value for name, value in row["detail"].items() if isinstance(value, (int, float, str))}
    return "; ".join(f"{name.replace('_', ' ')} {setting(value)}" for name, value in found.items())


def lm_eval(source: Source) -> Markup:
    """lm-evaluation-harness, by task."""
    rows = []
    for task, found in ((source.evaluation or {}).get("lm_eval") or {}).items():
        first, last = found.get("original"), found.get("result")
        moved = NOTHING
        if first and last:
            errors = (first.get("standard_error"), last.get("standard_error"))
            error = None if None in errors else math.hypot(*errors)
            moved = change(last["value"] - first["value"], error)
        rows.append([task, str(found.get("metric", "")), _harness(first), _harness(last), moved])
    return table(["task", "metric", "original", "result", "change"], rows, texts=2, label="lm-evaluation-harness")


def _harness(found: Mapping[str, Any] | None) -> str:
    return NOTHING if found is None else figure(found["value"], found.get("standard_error"))
