"""What a folder holds that a page is made of: read once, each file checked."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.files.checksums import checksum, read_sealed
from kunbr_fast.files.documents import checked, read_json, read_text
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import is_signed
from kunbr_fast.pages import formats
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.identity import check_whole
from kunbr_fast.run.log import COLUMNS, FOLDER, TABLE

REPORT, EVALUATION, CERTIFICATE, SETTINGS = "report.json", "evaluation.json", "unlearning.json", "run.yaml"
LOG_LIMIT = 2**28  # bytes: a million steps
CURE = "make it again, or move it away"
_HEX = re.compile(r"(?:[a-z0-9]+[-:])?[0-9a-f]{32,128}")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder. report: of its run, as JSON has it, with density and curves (rtt) read; evaluation: likewise, with its
    own curves (evaluated_rtt). certificate: of unlearning.json. steps: of the log, {column: values}. checksums: SHA-256
    of the files that were read. edited: files of settings that somebody has changed since the run."""

    name: str
    report: Mapping[str, Any] | None = None
    density: Density | None = None
    rtt: RTTResult | None = None
    evaluation: Mapping[str, Any] | None = None
    evaluated_rtt: RTTResult | None = None
    certificate: Mapping[str, Any] | None = None
    steps: Mapping[str, Sequence[Any]] | None = None
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
    edited: Sequence[str] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        return {} if self.report is None else self.report["config"]

    @property
    def attacks(self) -> list[tuple[str, RTTResult]]:
        """(what made it, its curves)"""
        found = [("the run", self.rtt)] if self.rtt is not None else []
        again = self.evaluated_rtt is not None and self.evaluated_rtt != self.rtt  # else evaluate has read the run's
        return found + ([("kunbr-fast evaluate", self.evaluated_rtt)] if again else [])

    @property
    def sealed(self) -> list[tuple[str, str]]:
        """(where, checksum) of all that the certificate names."""
        return list(_checksums(self.certificate or {}, ""))


def read(folder: str | Path) -> Source:
    """ValueError, one line that names the folder or the file, where there is nothing to show, or a file is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise ValueError(f"{plain(folder)}: {what}: expected the --out of kunbr-fast unlearn, baseline or evaluate")
    there = {name: path for name in (REPORT, EVALUATION, CERTIFICATE) if (path := folder / name).exists()}
    if not there.keys() & {REPORT, EVALUATION}:
        raise ValueError(
            f"{plain(folder)}: neither {REPORT} nor {EVALUATION} is there: expected the --out of kunbr-fast unlearn, "
            "baseline or evaluate, finished"
        )
    found: dict[str, Any] = {"name": folder.resolve().name}
    if REPORT in there:
        found |= _report(there[REPORT])
    if EVALUATION in there:
        found |= _evaluation(there[EVALUATION])
    if CERTIFICATE in there:
        found["certificate"] = read_sealed(there[CERTIFICATE], CURE)
    if (log := folder / FOLDER / TABLE).exists():
        found["steps"] = _log(log)
    if (settings := folder / SETTINGS).exists() and "report" in found:
        found["edited"] = [SETTINGS] if _differs(settings, found["report"]["config"]) else []
    return Source(**found, checksums={name: checksum(path.resolve()) for name, path in there.items()})


def _report(path: Path) -> dict[str, Any]:
    where = plain(path)
    value = read_json(path)
    checked(value, formats.Report, f"{where}: not the report of a run (kunbr-fast unlearn or baseline)")
    check_whole(value, where, CURE)
    density = Density.from_dict(value["density"], f"{where}: density")
    layers = len(density.per_layer)
    for start, stop in value["blocks"]:
        if not 0 <= start < stop <= layers:
            raise ValueError(f"{where}: blocks: got {shown([start, stop])}, expected layers of 0 to {layers}")
    return {"report": value, "density": density, "rtt": _curves(value["rtt"], where)}


def _curves(found: Mapping[str, Any] | None, where: str) -> RTTResult | None:
    if not found:
        return None
    try:
        return RTTResult.from_dict(found, f"{where}: rtt")
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(where) else f"{where}: rtt: {said}") from error


def _evaluation(path: Path) -> dict[str, Any]:
    where = plain(path)
    value = read_sealed(path, CURE)
    checked(value, formats.Evaluation, f"{where}: not of kunbr-fast evaluate")
    if value["format"] != 1:
        raise ValueError(f"{where}: format {value['format']}, and this version reads 1: use a newer kunbr-fast")
    return {"evaluation": value, "evaluated_rtt": _curves(value.get("rtt"), where)}


def _log(path: Path) -> dict[str, list[Any]]:
    """{column: values, None where there is none} of the steps. The last line may have been cut."""
    where, rows = plain(path), list(csv.reader(io.StringIO(read_text(path, LOG_LIMIT))))
    if not rows or rows[0] != list(COLUMNS):
        raise ValueError(f"{where}: not a log of kunbr-fast: {CURE}")
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(COLUMNS):
            if number == len(rows):
                break
            raise ValueError(f"{where}:{number}: got {len(row)} columns, expected {len(COLUMNS)}: {CURE}")
        for name, cell in zip(COLUMNS, row):
            try:
                found[name].append(cell if name == "stage" else _finite(cell))
            except ValueError as error:
                raise ValueError(f"{where}:{number}: {name}: got {shown(cell)}, expected a number: {CURE}") from error
    return found


def _finite(cell: str) -> float | None:
    """None too for a loss that is no number any more: the curve has a gap there."""
    value = float(cell) if cell else math.nan
    return value if math.isfinite(value) else None


def _differs(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether run.yaml is no longer what the run wrote."""
    return not is_signed(path) or any(config.get(name) != value for name, value in KUnBRConfig.read(path).items())


def _checksums(value: Any, where: str) -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        at = f"{where}.{key}" if where else str(key)
        if isinstance(each, str) and _HEX.fullmatch(each):
            yield at, each
        else:
            yield from _checksums(each, at)
