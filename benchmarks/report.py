"""Rows as people read them: a table for the terminal, pictures, and one HTML file that has all in it."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast import atomic
from kunbr_fast.benchmarks import charts
from kunbr_fast.benchmarks.harness import COLUMNS
from kunbr_fast.benchmarks.rows import Outcome, outcomes

WIDTH = 120  # of the terminal table
NOTHING = "–"


def write_report(
    rows: Sequence[Mapping[str, Any]], folder: str | Path, without: Mapping[str, str] | None = None
) -> list[Path]:
    """Writes report.html and the pictures in it, as PNG, to `folder`; returns their paths, report.html first.

    without: {case: why} of cases that have no rows, because ours was wrong or time or memory did not suffice.
    ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("no rows, so nothing to report")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cases = outcomes(rows)
    pictures = charts.draw(cases, folder)
    path = folder / "report.html"
    with atomic.atomic_write(path) as file:
        file.write(_page(rows, cases, pictures, without or {}).encode())
    return [path, *(picture for _, picture in pictures)]


# ---------------------------------------------------------------- what a row says


def _columns(cases: Sequence[Outcome]) -> list[str]:
    """Headings; the last ones only where a row has something for them."""
    names = ["ms", "p20 .. p80", "speed-up", "TFLOP/s", "GB/s", "% roof", "peak MiB", "kept MiB", "standing", "error"]
    cells = [_cells(case, row) for case in cases for row in case.ran]
    return [name for name in names if any(name in row for row in cells)]


def _cells(case: Outcome, row: Mapping[str, Any]) -> dict[str, str]:
    """{heading: text} of what the row has."""
    found = {
        "ms": _four(row["ms"]),
        "p20 .. p80": f"{_four(row['p20_ms'])} .. {_four(row['p80_ms'])}" if row["p20_ms"] and row["p80_ms"] else None,
        "speed-up": _times(row.get("speedup")),
        "% roof": f"{row['roofline_percent']:.1f}" if row.get("roofline_percent") else None,
        "error": f"{row['error']:.1e}" if row.get("error") is not None else None,
    }
    rate = ("TFLOP/s", "tflop_per_s") if case.gflop else ("GB/s", "gb_per_s")
    places = (("peak MiB", "peak_mib"), ("kept MiB", "kept_mib"), ("standing", "standing_mib"))
    if row.get(rate[1]):
        found[rate[0]] = _four(row[rate[1]])
    for heading, name in places:
        found[heading] = _four(row.get(name)) if row.get(name) is not None else None
    return {heading: text for heading, text in found.items() if text is not None}


def _four(value: float | None) -> str | None:
    """Four significant digits, or whole numbers beyond."""
    return None if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _reason(row: Mapping[str, Any]) -> str:
    return str(row.get("note") or "").removeprefix("not run: ") or "no reason given"


def _verdict(case: Outcome) -> str:
    """Best of ours against the best rival."""
    if case.ours is None:
        return "none of ours ran"
    said = f"best of ours: {case.ours['variant']}, {_four(case.ours['ms'])} ms"
    if not case.rivals:
        return f"{said}; no rival ran"
    rival, ratio = case.rivals[0], case.ratio
    word = "faster" if ratio >= 1 else "SLOWER"
    return f"{said}; best rival: {rival['variant']}, {_four(rival['ms'])} ms: {word} {_times(ratio)}"


# ---------------------------------------------------------------- terminal


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A block for each case: its variants, fastest first, ours with a star, parts of the work with a dash; who did not run,
    and why; who wins."""
    return "\n\n".join("\n".join(_block(case)) for case in outcomes(rows))


def _block(case: Outcome) -> Iterable[str]:
    work = [f"{_four(value)} {unit}" for value, unit in ((case.gflop, "GFLOP"), (case.mib, "MiB")) if value]
    yield _cut(f"{case.suite}: {case}  ({', '.join((case.dtype, *work))})")
    columns = _columns([case])
    lines = [["variant", *columns]]
    for row in case.ran:
        cells = _cells(case, row)
        mark = "*" if row["ours"] else "-" if case.does_less(row) else " "
        lines.append([f"{mark} {row['variant']}"[:26], *(cells.get(c, NOTHING) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if case.ran else []:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        yield _cut(f"  {'  '.join((first, *others))}")
    for row in case.ran:
        if row.get("note"):
            yield from _wrapped(f"  {row['variant']}: {row['note']}")
    for reason, names in _by_reason(case.not_run).items():
        yield from _wrapped(f"  not run: {', '.join(names)}: {reason}")
    yield from _wrapped(f"  {_verdict(case)}")


def _by_reason(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        names = found.setdefault(_reason(row), [])
        if row["variant"] not in names:
            names.append(row["variant"])
    return found


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ") or [""]


# ---------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5a5a5a; --line: #d9d9d9; --back: #ffffff; --shade: #f4f6f8;
  --ours: #fdeee4; --win: #00694c; --lose: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #a9a9a9; --line: #3d4248; --back: #16181b;
  --shade: #202429; --ours: #3a2415; --win: #4fd1a5; --lose: #ff9b66; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: .6rem 0 0; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } p, li { max-width: 60rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--shade); font-weight: 600; } .t { text-align: left; white-space: normal; }
.ours td { background: var(--ours); }
.less td { font-style: italic; color: var(--soft); } .win { color: var(--win); } .lose { color: var(--lose); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
img { display: block; width: 100%; max-width: 56rem; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; margin: .7rem 0; } summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
"""


def _page(rows, cases: Sequence[Outcome], pictures, without: Mapping[str, str]) -> str:
    about = {name: list(dict.fromkeys(str(row.get(name) or "") for row in rows)) for name in _about(rows)}
    device = about.get("device", [""])[0]
    parts = [
        "<h1>kunbr-fast benchmarks</h1>",
        f'<p class="soft">{_e(_count(len(cases), "case"))}, {_e(_count(len(rows), "row"))}'
        f"{', ' + _e(device) if device else ''}</p>",
        "<h2>Environment</h2>",
        "<dl>"
        + "".join(f"<dt>{_e(n)}</dt><dd>{_e('; '.join(filter(None, v)))}</dd>" for n, v in about.items() if any(v)),
        "</dl>",
        "<h2>Summary</h2>",
        '<p class="soft">Ratio: time of the fastest rival over that of the fastest of ours. Above 1 we are faster.</p>',
        _summary(cases),
        "<h2>Where we lose</h2>",
        _losses(cases),
        "<h2>Pictures</h2>" if pictures else "",
        *(_picture(*picture) for picture in pictures),
        "<h2>All rows</h2>",
        '<p class="soft">Median of the rounds with the 20th and 80th percentile; variants took turns. Peak: memory '
        "above what was there before. Kept: for the backward pass. Standing: what stays between two calls. Error: "
        "relative, from fp64, on a small sibling of the shape. Ours are shaded; in italics: a part of the "
        "work, no rival.</p>",
        *(_suite(suite, [c for c in cases if c.suite == suite]) for suite in dict.fromkeys(c.suite for c in cases)),
        "<h2>Not run, and why</h2>",
        _not_run(cases, without),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kunbr-fast benchmarks{_e(': ' + device) if device else ''}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _about(rows) -> list[str]:
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COLUMNS]


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _html_table(header: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], texts: int) -> str:
    """lines: (class of the row, cells as HTML). The first `texts` columns are text, the others numbers."""

    def cells(tag, values):
        return "".join(f"<{tag}{' class=t' if i < texts else ''}>{v}</{tag}>" for i, v in enumerate(values))

    body = "\n".join(f"<tr{f' class={name}' if name else ''}>{cells('td', values)}</tr>" for name, values in lines)
    return f'<div class="wide"><table><thead><tr>{cells("th", map(_e, header))}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _ratio(case: Outcome) -> str:
    if case.ratio is None:
        return NOTHING
    return f'<span class="{"win" if case.ratio >= 1 else "lose"}">{_times(case.ratio)}</span>'


def _summary(cases: Sequence[Outcome]) -> str:
    header = [
        "suite",
        "model",
        "case",
        "dtype",
        "best of ours",
        "best rival",
        "ours, ms",
        "rival, ms",
        "ratio",
        "% roof",
    ]
    lines = []
    for case in cases:
        ours, rival = case.ours or {}, case.rivals[0] if case.rivals else {}
        percent = f"{ours['roofline_percent']:.1f}" if ours.get("roofline_percent") else NOTHING
        names = (case.suite, case.model, case.case, case.dtype, *(r.get("variant", NOTHING) for r in (ours, rival)))
        lines.append((
            "", [*map(_e, names), *(_four(r.get("ms")) or NOTHING for r in (ours, rival)), _ratio(case), percent],
        ))  # fmt: skip
    return _html_table(header, lines, 6)


def _losses(cases: Sequence[Outcome]) -> str:
    lost = sorted((case for case in cases if case.ratio is not None and case.ratio < 1), key=lambda case: case.ratio)
    compared = sum(case.ratio is not None for case in cases)
    if not lost:
        return f"<p>Nowhere in the {_count(compared, 'case')} where ours and a rival ran.</p>"
    lines = [
        f"<li>{_e(case.suite)}: {_e(case)} ({_e(case.dtype)}): {_e(case.rivals[0]['variant'])} takes "
        f"{_four(case.rivals[0]['ms'])} ms, our {_e(case.ours['variant'])} {_four(case.ours['ms'])} ms: "
        f'<span class="lose">{_times(case.ratio)}</span></li>'
        for case in lost
    ]
    return f"<p>In {len(lost)} of {_count(compared, 'case')}, worst first:</p>\n<ul>\n" + "\n".join(lines) + "\n</ul>"


def _picture(heading: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_e(heading)}" src="data:image/png;base64,{data}">'


def _suite(suite: str, cases: Sequence[Outcome]) -> str:
    columns, blocks = _columns(cases), []
    for case in cases:
        lines = [
            (
                "ours" if row["ours"] else "less" if case.does_less(row) else "",
                [_e(row["variant"]), *(_cells(case, row).get(c, NOTHING) for c in columns)],
            )
            for row in case.ran
        ]
        notes = "".join(f"<p class=soft>{_e(r['variant'])}: {_e(r['note'])}</p>" for r in case.ran if r.get("note"))
        shown = _html_table(["variant", *columns], lines, 1) if lines else "<p>No variant ran.</p>"
        blocks.append(f"<h3>{_e(case)}, {_e(case.dtype)}</h3>{shown}{notes}")
    return f"<details><summary>{_e(suite)}: {_count(len(cases), 'case')}</summary>\n" + "\n".join(blocks) + "</details>"


def _not_run(cases: Sequence[Outcome], without: Mapping[str, str]) -> str:
    found: dict[tuple[str, str], dict[str, int]] = {}
    for case in cases:
        for row in case.not_run:
            names = found.setdefault((case.suite, _reason(row)), {})
            names[row["variant"]] = names.get(row["variant"], 0) + 1
    lines = [f"<li>{_e(case)}: {_e(why)}</li>" for case, why in without.items()]
    for (suite, reason), names in found.items():
        said = ", ".join(f"{_e(name)} ({_count(number, 'case')})" for name, number in names.items())
        lines.append(f"<li>{_e(suite)}: {said}: {_e(reason)}</li>")
    return "<ul>\n" + "\n".join(lines) + "\n</ul>" if lines else "<p>Everything ran.</p>"
