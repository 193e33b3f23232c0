"""What an evaluation found: figures by measure, set and model, as an object, a table, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.report import markdown, plain_values
from kunbr_fast.files.atomic import atomic_write
from kunbr_fast.files.checksums import write_sealed
from kunbr_fast.measures.registry import GROUPS, Found, Measure
from kunbr_fast.version import __version__

FORMAT = 1
JSON, CSV = "evaluation.json", "evaluation.csv"
MODELS = ("original", "retrained", "result")  # in this order they are measured and shown
COLUMNS = ("measure", "group", "set", "model", "value", "standard_error", "number", "unit", "known", "title")
KEYS = "kunbr_fast format suite settings models sets figures missing examples seconds sha256".split()
MORE = ("rtt", "lm_eval")


@dataclasses.dataclass(frozen=True)
class Figure:
    """measure: how it is defined; set: "forget", "retain" or "holdout"; model: one of `MODELS`."""

    measure: Measure
    set: str
    model: str
    found: Found

    def to_dict(self) -> dict[str, Any]:
        one, found = self.measure, self.found
        return {
            "measure": one.name, "title": one.title, "group": one.group, "set": self.set, "model": self.model,
            "value": found.value, "standard_error": found.standard_error, "number": found.number, "unit": one.unit,
            "known": one.known, "detail": found.detail,
        }  # fmt: skip


@dataclasses.dataclass
class Evaluation:
    """figures: what was measured. missing: measure and why, of what was asked for and is not there. models: of each its
    path, if it has one, and fingerprint. sets: of each its records, files and forms. examples: a few questions with
    what each model answers. rtt: what an attack brought back. lm_eval: by task. seconds: by pass."""

    suite: str
    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    sets: dict[str, dict[str, Any]]
    figures: list[Figure]
    missing: list[dict[str, str]]
    examples: list[dict[str, str]]
    seconds: dict[str, float]
    rtt: RTTResult | None = None
    lm_eval: dict[str, Any] | None = None

    def __getitem__(self, key: tuple[str, str] | tuple[str, str, str]) -> Found:
        """evaluation["probability", "forget"], of the result; a third name is another model. KeyError where it was not
        measured."""
        name, of, model = (*key, "result")[:3]
        for figure in self.figures:
            if (figure.measure.name, figure.set, figure.model) == (name, of, model):
                return figure.found
        raise KeyError(key)

    def to_dict(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        found = {
            "kunbr_fast": __version__, "format": FORMAT, "suite": self.suite, "settings": self.settings,
            "models": self.models, "sets": self.sets, "figures": [figure.to_dict() for figure in self.figures],
            "missing": self.missing, "examples": self.examples, "seconds": self.seconds,
        }  # fmt: skip
        more = {"rtt": self.rtt and self.rtt.to_dict(), "lm_eval": self.lm_eval}
        return plain_values(found | {name: value for name, value in more.items() if value}, "evaluation")

    def write(self, folder: str | Path) -> None:
        """evaluation.csv and evaluation.json, which carries its own checksum, to a folder."""
        folder, values = Path(folder), self.to_dict()
        text = io.StringIO()
        rows = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        rows.writerows(values["figures"])
        with atomic_write(folder / CSV) as file:
            file.write(text.getvalue().encode())
        write_sealed(folder / JSON, values)

    def table(self) -> str:
        """The figures as a Markdown table, a row for each measure and set, a column for each model."""
        models = [name for name in MODELS if name in self.models]
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for figure in sorted(self.figures, key=lambda one: GROUPS.index(one.measure.group)):
            row = cells.setdefault((figure.measure.title, figure.set), {})
            row[figure.model] = written(figure.found.value, figure.found.standard_error, figure.measure.unit)
        rows = [[title, of, *(row.get(name, "-") for name in models)] for (title, of), row in cells.items()]
        return markdown(["measure", "set", *models], rows)


def written(value: float, error: float | None, unit: str) -> str:
    """A figure with its standard error: a share in percent, a small one in two digits; else four digits."""
    if unit == "share" and 0 < abs(value) < 0.00995:
        return f"{100 * value:.2g}{'' if error is None else f' ± {100 * error:.1g}'} %"
    if unit == "share":
        return f"{100 * value:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"
    return f"{value:.4g}{'' if error is None else f' ± {error:.2g}'}"


def figures_of(
    measures: Sequence[Measure], subjects: Mapping[str, Any], sets: Sequence[str]
) -> tuple[list[Figure], list[Measure]]:
    """All that can be had of these measures, and those of which nothing can."""
    found = [
        Figure(one, of, name, value)
        for one in measures
        for of in one.sets
        if of in sets
        for name, subject in subjects.items()
        if (value := one(subject, of)) is not None
    ]
    there = {figure.measure.name for figure in found}
    return found, [one for one in measures if one.name not in there]
