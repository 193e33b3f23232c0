"""Two files of rows, before and after: what became slower, what faster, and what is noise.

A row is slower where the bands of the two files, p20 to p80, lie apart and its median took more than 2 % longer; faster
likewise. Machines drift too: where the rate that bounds a row's case, the product's or the copy's, as measured in the
row's own rounds, moved by more than 5 %, its time is also shown as it would be at the old rate. Where the two verdicts
differ the row is "unclear": the machine moved, not surely the code.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.benchmarks.rows import EXTRAPOLATED, KEY, NOTHING, WIDTH, cut, four, is_candidate, parsed, tilde

LEAST = 1.02  # ratio of medians, below which nothing is called a change
DRIFT = 1.05  # of a roofline's rate
FEW, APART = 5, 0.05  # with fewer rounds the band is at least that part of the median on either side
RATES = {"matmul": "matmul_tflop_per_s", "copy": "copy_gb_per_s"}
MEMORY = {"peak_mib": "peak", "kept_mib": "kept", "standing_mib": "standing"}
FASTER, SLOWER, NOISE, UNCLEAR, FAILED = "faster", "slower", "within noise", "unclear", "no longer runs"
GONE = {"ms": None, "note": "missing in the file after"}  # the row after of one of ours that the file lacks


@dataclasses.dataclass(frozen=True)
class Change:
    """A row of both files, or one of ours that only the first has.

    ratio: after / before, of the medians, None where one of them has no time. corrected: the same at the old rate,
    None where the machine did not move. extrapolated: whether the time before is, and the one after. regression: of
    ours, and slower or without a time now. memory: {column: (before, after)} of what moved by more than 1 % and 1 MiB.
    note: why it does not run.
    """

    key: dict[str, Any]
    ours: bool
    before_ms: float | None
    after_ms: float | None
    ratio: float | None
    corrected: float | None
    extrapolated: tuple[bool, bool]
    verdict: str
    regression: bool
    memory: dict[str, tuple[float, float]]
    note: str

    def __str__(self) -> str:
        return _named(self.key)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """changes: worst first. drift: {"matmul" | "copy": after / before}, the median over the rows that both files have;
    moved: whether one of these is beyond 5 %. differs: what the files do not share of device, dtype, threads and
    settings, as text. only_before, only_after: rows that are in one file and in no change, by name."""

    changes: list[Change]
    drift: dict[str, float]
    moved: bool
    differs: list[str]
    only_before: list[str]
    only_after: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "regressions": [str(change) for change in self.regressions]}


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Comparison:
    """Rows of two runs matched by what names them; of rows with one name the last counts."""
    old, new = ({tuple(row[name] for name in KEY): row for row in map(parsed, rows)} for rows in (before, after))
    pairs = [(row, new[key]) for key, row in old.items() if key in new]
    gone = [row for key, row in old.items() if key not in new and row["ours"] and row["ms"]]
    drift = _drift(pairs)
    changes = [_change(a, b) for a, b in [*pairs, *((row, GONE) for row in gone)] if a["ms"] or b["ms"]]
    changes.sort(key=lambda change: (change.verdict != FAILED, -(change.corrected or change.ratio or 0)))
    return Comparison(
        changes,
        drift,
        any(_beyond(rate, DRIFT) for rate in drift.values()),
        _differences(old.values(), new.values()),
        [_named(row) for key, row in old.items() if key not in new and row not in gone],
        [_named(row) for key, row in new.items() if key not in old],
    )


def _change(old, new) -> Change:
    ratio = corrected = None
    note = ""
    if old["ms"] and new["ms"]:
        ratio, verdict, factor = new["ms"] / old["ms"], _verdict(old, new, 1.0), _factor(old, new)
        if _beyond(factor, DRIFT):
            corrected = ratio * factor
            verdict = verdict if verdict == _verdict(old, new, factor) else UNCLEAR
    else:
        verdict = FAILED if old["ms"] else "runs now"
        note = new["note"]
    memory = {}
    for name in MEMORY:
        a, b = old.get(name), new.get(name)
        if a is not None and b is not None and abs(b - a) > max(1.0, 0.01 * a):
            memory[name] = a, b
    # a run's stages are measured once, and are parts of its total; candidates are nobody's time
    held = old["ours"] and not is_candidate(old) and (old["suite"] != "end_to_end" or old["case"] == "total")
    return Change(
        key={name: old[name] for name in KEY}, ours=bool(old["ours"]), before_ms=old["ms"], after_ms=new["ms"],
        ratio=ratio, corrected=corrected, extrapolated=(bool(tilde(old)), bool(tilde(new))), verdict=verdict,
        regression=bool(held) and verdict in (SLOWER, FAILED), memory=memory, note=note,
    )  # fmt: skip


def _verdict(old, new, factor: float) -> str:
    """factor: what makes a time of `new` one at the old rate."""
    (old_low, old_high), (new_low, new_high) = _band(old), _band(new)
    ratio = factor * new["ms"] / old["ms"]
    if factor * new_low > old_high and ratio > LEAST:
        return SLOWER
    if factor * new_high < old_low and ratio * LEAST < 1:
        return FASTER
    return NOISE


def _band(row) -> tuple[float, float]:
    """p20 and p80 of its milliseconds."""
    ms, low, high = row["ms"], row["p20_ms"], row["p80_ms"]
    if low is None or high is None:
        low = high = ms
    elif (row.get("rounds") or 0) >= FEW:
        return low, high
    return min(low, (1 - APART) * ms), max(high, (1 + APART) * ms)


def _beyond(ratio: float, limit: float) -> bool:
    return max(ratio, 1 / ratio) > limit


def _factor(old, new) -> float:
    """After / before of the rate that its work takes longer at, in the rows' own rounds. 1 where a row has none."""
    if not all(row.get(column) for row in (old, new) for column in RATES.values()):
        return 1.0
    flops = (old.get("gflop") or 0) / old[RATES["matmul"]] * 1e-3
    nbytes = (old.get("mib") or 0) * 2**20 / 1e9 / old[RATES["copy"]]
    column = RATES["matmul" if flops > nbytes else "copy"]
    return new[column] / old[column] if flops or nbytes else 1.0


def _drift(pairs) -> dict[str, float]:
    """after / before of the roofline's rates: median over the rows that have both."""
    found = {}
    for name, column in RATES.items():
        ratios = [new[column] / old[column] for old, new in pairs if old.get(column) and new.get(column)]
        if ratios:
            found[name] = statistics.median(ratios)
    return found


def _differences(old, new) -> list[str]:
    found = []
    for name in ("device", "dtype", "threads", "settings"):
        a, b = (", ".join(sorted({str(row.get(name) or "") for row in rows})) for rows in (old, new))
        if a != b:
            found.append(f"{name}: {a or 'none'} before, {b or 'none'} after")
    return found


def _named(key: Mapping[str, Any]) -> str:
    return f"{key['suite']}: {', '.join(key[name] for name in ('model', 'case', 'dtype', 'variant') if key[name])}"


# ---------------------------------------------------------------- terminal


def table(comparison: Comparison) -> str:
    """A table, worst first, ours with a star, after what the files do not share."""
    lines = [f"CAUTION: not the same {text}" for text in comparison.differs]
    if comparison.drift:
        drift = ", ".join(f"{name} {100 * (rate - 1):+.1f} %" for name, rate in comparison.drift.items())
        meaning = "the machine moved" if comparison.moved else "steady"
        lines.append(f"roofline's rates, after to before, median of the rows: {drift} ({meaning})")
    if _corrected(comparison):
        lines.append("corrected: after/before at the old rate, of rows beside which it moved by more than 5 %")
    if any(any(change.extrapolated) for change in comparison.changes):
        lines.append(EXTRAPOLATED)
    lines = [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    if comparison.changes:
        lines += ["", *_lines(comparison)]
    for title, names in (("before", comparison.only_before), ("after", comparison.only_after)):
        if names:
            lines += ["", f"only in the file {title}: {len(names)}", *(cut(f"  {name}") for name in names)]
    counts = collections.Counter(change.verdict for change in comparison.changes)
    counted = ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) or "no row is in both files"
    return "\n".join([*lines, "", f"{counted}; of ours {len(comparison.regressions)} regressed"]).lstrip("\n")


def _corrected(comparison: Comparison) -> bool:
    return any(change.corrected is not None for change in comparison.changes)


def _lines(comparison: Comparison) -> list[str]:
    corrected = ["corrected"] if _corrected(comparison) else []
    header = ["before ms", "after ms", "after/before", *corrected, "verdict"]
    cells = []
    for change in comparison.changes:
        before, after = ("~" if extrapolated else "" for extrapolated in change.extrapolated)
        ratios = [_ratio(value, before or after) for value in (change.ratio, change.corrected)][: 1 + len(corrected)]
        cells.append([before + four(change.before_ms), after + four(change.after_ms), *ratios, change.verdict])
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    room = WIDTH - sum(widths) - 2 * len(widths) - 2
    names = [cut(str(change), room) for change in comparison.changes]
    room = max(map(len, names))

    def line(name, values):
        return f"{name.ljust(room + 2)}  {'  '.join(v.rjust(w) for v, w in zip(values[:-1], widths))}  {values[-1]}"

    lines = [line("  variant", header)]
    for change, name, values in zip(comparison.changes, names, cells):
        lines.append(line(f"{'* ' if change.ours else '  '}{name}", values))
        for column, (a, b) in change.memory.items():
            lines.append(f"      {MEMORY[column]} memory {four(a)} -> {four(b)} MiB")
        if change.note:
            lines += textwrap.wrap(change.note, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _ratio(value: float | None, sign: str) -> str:
    return NOTHING if value is None else f"{sign}{value:.3f}"
