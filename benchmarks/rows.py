"""Rows: their columns, the files that hold them (a CSV for people and spreadsheets, a JSON of the same rows), and what
report and comparison share: the rows of a case, and how numbers and long lines are shown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.benchmarks.measure import percentile
from kunbr_fast.files import atomic
from kunbr_fast.files.documents import parse_json, read_text
from kunbr_fast.files.shown import plain, shown

# What names a row, then what was measured. `measure.about()` follows.
KEY = ("suite", "model", "case", "tokens", "dtype", "variant")
COLUMNS = (
    *KEY, "ours", "ms", "p20_ms", "p80_ms", "rounds", "baseline", "speedup", "gflop", "spent_gflop", "mib",
    "tflop_per_s", "gb_per_s", "roofline_percent", "peak_mib", "kept_mib", "standing_mib", "error", "note", "settings",
    "matmul_tflop_per_s", "copy_gb_per_s", "others_cores",
)  # fmt: skip
NEEDED = (*KEY, "ours", "ms", "p20_ms", "p80_ms")  # the rest may be missing: files of other releases stay readable
TEXTS = ("suite", "model", "case", "dtype", "variant", "baseline", "note", "settings")
NUMBERS = frozenset({*COLUMNS, "threads"} - {*TEXTS})
LARGEST, SMALLEST = 1e15, 1e-30  # of what is measured, beside 0: what plots can show
WRONG = "wrong: "  # how the reason begins for which the gate leaves a variant out


@dataclasses.dataclass(frozen=True)
class Measured:
    """times: milliseconds of each round, or of the one run. baseline: those of the baseline. rates: (FLOP/s, bytes/s)
    of the roofline. others: cores that other processes used meanwhile."""

    times: Sequence[float]
    baseline: Sequence[float] | None = None
    rates: tuple[float, float] | None = None
    error: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    standing_bytes: int | None = None
    spent_flops: int | None = None
    others: float | None = None

    def columns(self, flops: int, nbytes: int) -> dict[str, Any]:
        """flops, nbytes: that the operation needs."""
        ms = statistics.median(self.times)
        found = {
            "ms": rounded(ms), "rounds": len(self.times), "tflop_per_s": rounded(flops / ms / 1e9),
            "gb_per_s": rounded(nbytes / ms / 1e6),
        }  # fmt: skip
        if len(self.times) > 1:
            found |= {"p20_ms": rounded(percentile(self.times, 0.2)), "p80_ms": rounded(percentile(self.times, 0.8))}
        if self.baseline is not None:
            found["speedup"] = round(statistics.median(b / a for a, b in zip(self.times, self.baseline)), 3)
        if self.rates is not None:
            rate, copy = self.rates
            found["roofline_percent"] = round(100 * max(flops / rate, nbytes / copy) * 1e3 / ms, 1)
            found |= {"matmul_tflop_per_s": rounded(rate / 1e12), "copy_gb_per_s": rounded(copy / 1e9)}
        for name in ("peak", "kept", "standing"):
            size = getattr(self, f"{name}_bytes")
            found[f"{name}_mib"] = "" if size is None else rounded(size / 2**20)
        found["spent_gflop"] = "" if self.spent_flops is None else rounded(self.spent_flops / 1e9)
        found["error"] = "" if self.error is None else f"{self.error:.1e}"
        found["others_cores"] = "" if self.others is None else round(self.others, 2)
        return found


def rounded(value: float) -> float:
    """Four significant digits, or whole numbers beyond."""
    return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)


# ---------------------------------------------------------------- files


def parsed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with numbers in its columns of numbers, None where one is missing, and texts in the others: the same of a
    fresh row and of one that was read. ValueError names the column."""
    return {name: _number(name, value) if name in NUMBERS else _text(value) for name, value in row.items()}


def _number(name: str, value: Any) -> int | float | None:
    if value is None or value == "":
        return None
    try:
        number = int(value) if isinstance(value, int) else float(value)
        if math.isfinite(number) and _can_be(name, number):
            return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{plain(name, 40)} is {shown(value)}, expected a number of 0, or {SMALLEST:g} to {LARGEST:g}")


def _can_be(name: str, number: float) -> bool:
    if number < 0 and not name.endswith("_mib"):  # memory may be less afterwards
        return False
    return number == 0 or SMALLEST <= abs(number) and (abs(number) <= LARGEST or name == "error")


def _text(value: Any) -> str:
    """Without carriage returns, which the csv of older Pythons writes and cannot read, and nothing that a terminal
    obeys: it ends on one."""
    lines = "" if value is None else str(value).replace("\r", " ")
    return lines if lines.isprintable() else "\n".join(plain(line, len(lines)) for line in lines.split("\n"))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .csv or .json that `write_rows` wrote, `parsed`. ValueError names the file and its line (in a
    .json, the row, counted from 1) for anything else."""
    path = Path(path)
    text, name, found = read_text(path), plain(path), []
    for place, row in (_from_json if path.suffix == ".json" else _from_csv)(text, name):
        try:
            found.append(parsed(row))
        except ValueError as error:
            raise ValueError(f"{name}, {place}: {error}") from None
    if not found:
        raise ValueError(f"{name}: no rows of benchmarks: it has none")
    return found


def _check(names: Collection[str], place: str) -> None:
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise ValueError(f"{place}: no rows of benchmarks: there is no column {', '.join(missing)}")


def _from_json(text, path):
    rows = parse_json(text, path, list[dict[str, str | int | float | bool | None]])
    for number, row in enumerate(rows, 1):
        _check(row, f"{path}, row {number}")
        yield f"row {number}", row


def _from_csv(text, path):
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, [])
        _check(header, f"{path}, line 1")
        for fields in filter(None, reader):
            place = f"line {reader.line_num}"
            if len(fields) != len(header):
                raise ValueError(f"{path}, {place}: {len(fields)} fields, expected the header's {len(header)}")
            yield place, dict(zip(header, fields))
    except csv.Error as error:
        raise ValueError(f"{path}, line {max(1, reader.line_num)}: {error}") from None


def write_rows(path_csv: str | Path, path_json: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Both files anew, each whole or not at all. Columns in the order in which the rows have them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [parsed(dict.fromkeys(columns) | row) for row in rows]  # first: what cannot be read again is not written
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic.atomic_write(path_csv) as file:
        file.write(text.getvalue().encode())
    atomic.write_json(path_json, rows)


# ---------------------------------------------------------------- cases


class Outcome:
    """All rows of one case, `parsed`: first those that ran, by time, then the others."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.ran = sorted((row for row in rows if row["ms"]), key=lambda row: row["ms"])
        self.not_run = [row for row in rows if not row["ms"]]
        self.suite, self.model, self.case, self.tokens, self.dtype = (rows[0][name] for name in KEY[:-1])
        self.gflop, self.mib = rows[0].get("gflop") or 0, rows[0].get("mib") or 0

    def __str__(self) -> str:
        return ", ".join(part for part in (self.model, self.case) if part)

    @property
    def ours(self) -> dict[str, Any] | None:
        """The fastest of ours."""
        return next((row for row in self.ran if row["ours"] and not is_candidate(row)), None)

    @property
    def rivals(self) -> list[dict[str, Any]]:
        """Those that do the same work, fastest first."""
        return [row for row in self.ran if not row["ours"] and not self.aside(row)]

    def aside(self, row: Mapping[str, Any]) -> bool:
        """Neither ours nor a rival: a candidate, or what returned nothing that the gate could compare, where ours did:
        a part of the work, timed as a yardstick."""
        if row["ours"]:
            return is_candidate(row)
        return row.get("error") is None and bool(self.ours) and self.ours.get("error") is not None

    @property
    def ratio(self) -> float | None:
        """The fastest rival's time over that of our fastest: below 1 we lose."""
        return self.over(self.rivals[0]) if self.rivals else None

    def over(self, rival: Mapping[str, Any]) -> float | None:
        """A rival's time over that of our fastest."""
        return rival["ms"] / self.ours["ms"] if self.ours else None

    @property
    def extrapolated(self) -> bool:
        """Whether one of the two times of `ratio` is."""
        return bool(tilde(self.ours, *self.rivals[:1]))


def is_wrong(row: Mapping[str, Any]) -> bool:
    """One of ours that the gate left out."""
    return bool(row["ours"]) and row["note"].startswith(f"not run: {WRONG}")


def is_candidate(row: Mapping[str, Any]) -> bool:
    """A tile that --tiles tries: nothing that a user would get."""
    return row["variant"].split()[:1] == ["tile"]


def outcomes(rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """The cases of `rows`, in the order in which they first occur."""
    cases: dict[tuple, list] = {}
    for row in map(parsed, rows):
        cases.setdefault(tuple(row[name] for name in KEY[:-1]), []).append(row)
    return [Outcome(rows) for rows in cases.values()]


# ---------------------------------------------------------------- as text

WIDTH = 120  # of what the terminal shows
NOTHING = "–"
EXTRAPOLATED = "~ extrapolated"


def tilde(*rows: Mapping[str, Any] | None) -> str:
    """What stands before a number that comes from these rows: "~" where one of them is extrapolated."""
    return "~" if any(str(row.get("note") or "").startswith("extrapolated") for row in rows if row) else ""


def four(value: float | None) -> str:
    """Four significant digits, or whole numbers beyond."""
    return NOTHING if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def cut(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
