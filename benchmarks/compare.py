"""Two files of rows, before and after: what became slower, what faster, and what is noise.

A row is slower where the bands of the two files, p20 to p80, lie apart and its median took more than 2 % longer; faster
likewise. Machines drift too: where the product or the copy that ran beside the rows moved by more than 5 % (median over the
cases), times are also shown as they would be at the old rates, corrected by the rate that bounds the case. Where the two
verdicts differ the row is "unclear": the machine moved, not surely the code.
"""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.benchmarks.harness import KEY
from kunbr_fast.benchmarks.rows import parsed

LEAST = 1.02  # ratio of medians, below which nothing is called a change
DRIFT = 1.05  # of a roofline's rate
ONCE = 0.05  # half the band that a time has which was measured once, as the stages of end_to_end
MEMORY = {"peak_mib": "peak", "kept_mib": "kept", "standing_mib": "standing"}
WIDTH = 120
FASTER, SLOWER, NOISE, UNCLEAR, FAILED = "faster", "slower", "within noise", "unclear", "no longer runs"


@dataclasses.dataclass(frozen=True)
class Change:
    """One row of both files. ratio: after / before, of the medians, None where one of them has no time; corrected: the same
    at the old rates, None where the machine did not move. memory: {column: (before, after)} of what moved by more than
    1 % and 1 MiB."""

    key: dict[str, Any]
    ours: bool
    before_ms: float | None
    after_ms: float | None
    ratio: float | None
    corrected: float | None
    verdict: str
    memory: dict[str, tuple[float, float]]
    note: str = ""

    def __str__(self) -> str:
        return _named(self.key)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """changes: worst first. drift: {"matmul" | "copy": after / before}, of what both files have. differs: what the files
    do not share of device and dtype, as text. only_before, only_after: rows that the other file lacks, by name."""

    changes: list[Change]
    drift: dict[str, float]
    differs: list[str]
    only_before: list[str]
    only_after: list[str]

    @property
    def moved(self) -> bool:
        """Whether the machine did."""
        return any(_beyond(rate, DRIFT) for rate in self.drift.values())

    @property
    def regressions(self) -> list[Change]:
        """Ours that are slower, or ran before and do not now."""
        return [change for change in self.changes if change.ours and change.verdict in (SLOWER, FAILED)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        changes = [dataclasses.asdict(change) for change in self.changes]
        regressions = [str(change) for change in self.regressions]
        return {**dataclasses.asdict(self), "changes": changes, "regressions": regressions}


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Comparison:
    """Rows of two runs matched by what names them; of rows with one name the last counts."""
    old, new = ({tuple(row[name] for name in KEY): row for row in map(parsed, rows)} for rows in (before, after))
    both = [key for key in old if key in new]
    drift = _drift([(old[key], new[key]) for key in both])
    moved = any(_beyond(rate, DRIFT) for rate in drift.values())
    changes = [
        _change(old[key], new[key], drift if moved else None) for key in both if old[key]["ms"] or new[key]["ms"]
    ]
    changes.sort(key=lambda change: (change.verdict != FAILED, -(change.corrected or change.ratio or 0)))
    return Comparison(
        changes,
        drift,
        _differences(old.values(), new.values()),
        [_named(old[key]) for key in old if key not in new],
        [_named(new[key]) for key in new if key not in old],
    )


def _change(old, new, drift) -> Change:
    ratio = corrected = None
    note, verdict = "", NOISE
    if old["ms"] and new["ms"]:
        ratio, verdict = new["ms"] / old["ms"], _verdict(old, new, 1.0)
        if drift is not None:
            factor = drift.get(_bound(old), 1.0)
            corrected = ratio * factor
            verdict = verdict if verdict == _verdict(old, new, factor) else UNCLEAR
    else:
        verdict = FAILED if old["ms"] else "runs now"
        note = str(new.get("note") or "")
    memory = {}
    for name in MEMORY:
        a, b = old.get(name), new.get(name)
        if a is not None and b is not None and abs(b - a) > max(1.0, 0.01 * a):
            memory[name] = a, b
    key = {name: old[name] for name in KEY}
    return Change(key, bool(new["ours"]), old["ms"], new["ms"], ratio, corrected, verdict, memory, note)


def _verdict(old, new, factor: float) -> str:
    """factor: what makes a time of `new` one at the old rates."""
    (old_low, old_high), (new_low, new_high) = _band(old), _band(new)
    ratio = factor * new["ms"] / old["ms"]
    if factor * new_low > old_high and ratio > LEAST:
        return SLOWER
    if factor * new_high < old_low and ratio * LEAST < 1:
        return FASTER
    return NOISE


def _band(row) -> tuple[float, float]:
    """p20 and p80 of its milliseconds."""
    if row["p20_ms"] is None or row["p80_ms"] is None or row["p20_ms"] == row["p80_ms"]:
        return (1 - ONCE) * row["ms"], (1 + ONCE) * row["ms"]
    return row["p20_ms"], row["p80_ms"]


def _beyond(ratio: float, limit: float) -> bool:
    return max(ratio, 1 / ratio) > limit


RATES = {"matmul": "matmul_tflop_per_s", "copy": "copy_gb_per_s"}


def _drift(pairs) -> dict[str, float]:
    """after / before of the roofline's rates: median over the rows that have both."""
    found = {}
    for name, column in RATES.items():
        ratios = [new[column] / old[column] for old, new in pairs if old.get(column) and new.get(column)]
        if ratios:
            found[name] = statistics.median(ratios)
    return found


def _bound(row) -> str:
    """The rate that the needed work takes longer at."""
    flops = (row.get("gflop") or 0) / 1e3 / (row.get(RATES["matmul"]) or float("inf"))
    nbytes = (row.get("mib") or 0) * 2**20 / 1e9 / (row.get(RATES["copy"]) or float("inf"))
    return "matmul" if flops > nbytes else "copy"


def _differences(old, new) -> list[str]:
    found = []
    for name in ("device", "dtype", "threads"):
        a, b = (", ".join(sorted({str(row.get(name) or "") for row in rows})) for rows in (old, new))
        if a != b:
            found.append(f"{name}: {a or 'unknown'} before, {b or 'unknown'} after")
    return found


def _named(key: Mapping[str, Any]) -> str:
    return f"{key['suite']}: " + ", ".join(
        str(key[name]) for name in ("model", "case", "dtype", "variant") if key[name]
    )


# ---------------------------------------------------------------- terminal


def format(comparison: Comparison) -> str:
    """A table, worst first, ours with a star, after what the files do not share."""
    lines = [f"CAUTION: another {text}" for text in comparison.differs]
    if comparison.drift:
        moved = ", ".join(f"{name} {100 * (rate - 1):+.1f} %" for name, rate in comparison.drift.items())
        meaning = "the machine moved: corrected shows the ratio at the old rates" if comparison.moved else "steady"
        lines.append(f"roofline's rates, after to before: {moved} ({meaning})")
    lines = [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    if comparison.changes:
        lines += ["", *_table(comparison)]
    for title, names in (("before", comparison.only_before), ("after", comparison.only_after)):
        if names:
            lines += ["", f"only in the file {title}: {len(names)}", *(_cut(f"  {name}") for name in names)]
    counts: dict[str, int] = {}
    for change in comparison.changes:
        counts[change.verdict] = counts.get(change.verdict, 0) + 1
    counted = ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) or "no row is in both files"
    return "\n".join([*lines, "", f"{counted}; of ours {len(comparison.regressions)} regressed"]).lstrip("\n")


def _table(comparison: Comparison) -> list[str]:
    header = ["before ms", "after ms", "after/before", *(["corrected"] if comparison.moved else []), "verdict"]
    cells = []
    for change in comparison.changes:
        values = [_four(change.before_ms), _four(change.after_ms), _ratio(change.ratio)]
        cells.append([*values, *([_ratio(change.corrected)] if comparison.moved else []), change.verdict])
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    room = WIDTH - sum(widths) - 2 * len(widths) - 2
    names = [_cut(str(change), room) for change in comparison.changes]
    room = max(map(len, names))

    def line(name, values):
        return f"{name.ljust(room + 2)}  {'  '.join(v.rjust(w) for v, w in zip(values[:-1], widths))}  {values[-1]}"

    lines = [line("  variant", header)]
    for change, name, values in zip(comparison.changes, names, cells):
        lines.append(line(f"{'* ' if change.ours else '  '}{name}", values))
        for column, (a, b) in change.memory.items():
            lines.append(f"      {MEMORY[column]} memory {_four(a)} -> {_four(b)} MiB")
        if change.note:
            lines += textwrap.wrap(change.note, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _cut(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
