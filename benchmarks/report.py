"""Rows as people read them: a table for the terminal, pictures, and one HTML file that has all in it."""

from __future__ import annotations

import base64
import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.benchmarks.charts.bars import bandwidth, memory, speedups
from kunbr_fast.benchmarks.charts.roofline import roofline
from kunbr_fast.benchmarks.charts.stages import stages
from kunbr_fast.benchmarks.charts.times import times
from kunbr_fast.benchmarks.rows import COLUMNS, EXTRAPOLATED, NOTHING, WIDTH, Outcome, cut, four, outcomes, tilde
from kunbr_fast.benchmarks.suites import SUITES
from kunbr_fast.files import atomic
from kunbr_fast.files.target import GENERATOR, is_picture

CHARTS = (stages, roofline, bandwidth, speedups, times, memory)
PICTURES = re.compile(rf"(end_to_end|roofline_\w+|(speedup|time|memory)_({'|'.join(SUITES)}))(_\d+)?\.png")


def write_report(rows: Sequence[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Writes report.html and the pictures in it, as PNG, to `folder`; returns their paths, report.html first.

    Pictures of an earlier report there go. ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("no rows, so nothing to report")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cases = outcomes(rows)
    pictures = draw(cases, folder)
    path = folder / "report.html"
    with atomic.atomic_write(path) as file:
        file.write(_page(rows, cases, pictures).encode())
    return [path, *(picture for _, picture in pictures)]


def draw(cases: Sequence[Outcome], folder: Path) -> list[tuple[str, Path]]:
    """[(heading, PNG)] of all that can be drawn. Pictures of an earlier report that are not drawn now are deleted."""
    drawn = [found for chart in CHARTS for found in chart(cases, folder)]
    for old in set(folder.glob("*.png")) - {path for _, path in drawn}:
        if PICTURES.fullmatch(old.name) and is_picture(old):
            old.unlink()
    return drawn


# ---------------------------------------------------------------- what a row says


def _columns(cases: Sequence[Outcome]) -> list[str]:
    """Headings; the last ones only where a row has something for them."""
    names = ["ms", "p20 .. p80", "speed-up", "TFLOP/s", "GB/s", "% roof", "peak MiB", "kept MiB", "standing", "error"]
    cells = [_cells(case, row) for case in cases for row in case.ran]
    return [name for name in names if any(name in row for row in cells)]


def _cells(case: Outcome, row: Mapping[str, Any]) -> dict[str, str]:
    """{heading: text} of what the row has."""
    sign, baseline = tilde(row), next((r for r in case.ran if r["variant"] == row.get("baseline")), None)
    found = {"ms": f"{sign}{four(row['ms'])}", "p20 .. p80": None, "speed-up": None, "% roof": None, "error": None}
    if row["p20_ms"] and row["p80_ms"]:
        found["p20 .. p80"] = f"{four(row['p20_ms'])} .. {four(row['p80_ms'])}"
    if row.get("speedup"):
        found["speed-up"] = tilde(row, baseline) + _times(row["speedup"])
    if row.get("roofline_percent"):
        found["% roof"] = f"{sign}{row['roofline_percent']:.1f}"
    if row.get("error") is not None:
        found["error"] = f"{row['error']:.1e}"
    heading, name = ("TFLOP/s", "tflop_per_s") if case.gflop else ("GB/s", "gb_per_s")
    if row.get(name):
        found[heading] = f"{sign}{four(row[name])}"
    for heading, name in (("peak MiB", "peak_mib"), ("kept MiB", "kept_mib"), ("standing", "standing_mib")):
        if row.get(name) is not None:
            found[heading] = four(row[name])
    return {heading: text for heading, text in found.items() if text is not None}


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _ms(row: Mapping[str, Any]) -> str:
    return f"{tilde(row)}{four(row['ms'])} ms"


def _ratio(case: Outcome) -> str:
    return f"{'~' if case.extrapolated else ''}{_times(case.ratio)}"


def _reason(row: Mapping[str, Any]) -> str:
    return str(row.get("note") or "").removeprefix("not run: ") or "no reason given"


def _verdict(case: Outcome) -> str:
    """Best of ours against the best rival."""
    if case.ours is None:
        return "none of ours ran"
    said = f"best of ours: {case.ours['variant']}, {_ms(case.ours)}"
    if not case.rivals:
        return f"{said}; no rival ran"
    rival, word = case.rivals[0], "faster" if case.ratio >= 1 else "SLOWER"
    return f"{said}; best rival: {rival['variant']}, {_ms(rival)}: {word} {_ratio(case)}"


# ---------------------------------------------------------------- terminal


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A block for each case: its variants, fastest first, ours with a star, with a dash what is neither ours nor a
    rival (parts of the work, candidates); who did not run, and why; who wins."""
    cases = outcomes(rows)
    blocks = ["\n".join(_block(case)) for case in cases]
    return "\n\n".join(blocks + [EXTRAPOLATED] * _extrapolated(cases))


def _extrapolated(cases: Sequence[Outcome]) -> bool:
    return any(tilde(*case.ran) for case in cases)


def _block(case: Outcome) -> Iterable[str]:
    work = [f"{four(value)} {unit}" for value, unit in ((case.gflop, "GFLOP"), (case.mib, "MiB")) if value]
    yield cut(f"{case.suite}: {case}  ({', '.join((case.dtype, *work))})")
    columns = _columns([case])
    lines = [["variant", *columns]]
    for row in case.ran:
        cells = _cells(case, row)
        sign = "-" if case.aside(row) else "*" if row["ours"] else " "
        lines.append([f"{sign} {row['variant']}"[:26], *(cells.get(c, NOTHING) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if case.ran else []:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        yield cut(f"  {'  '.join((first, *others))}")
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
.less td { font-style: italic; color: var(--soft); }
.win { color: var(--win); } .lose { color: var(--lose); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
img { display: block; width: 100%; max-width: 56rem; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; margin: .7rem 0; } summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
"""


def _page(rows, cases: Sequence[Outcome], pictures) -> str:
    about = {name: list(dict.fromkeys(str(row.get(name) or "") for row in rows)) for name in _about(rows)}
    device = about.get("device", [""])[0]
    counts = f"{_count(len(cases), 'case')}, {_count(len(rows), 'row')}"
    legend = f'<p class="soft">{EXTRAPOLATED}</p>' if _extrapolated(cases) else ""
    parts = [
        "<h1>kunbr-fast benchmarks</h1>",
        f'<p class="soft">{_e(f"{counts}, {device}" if device else counts)}</p>',
        _chosen(cases),
        "<h2>Environment</h2>",
        "<dl>",
        *(f"<dt>{_e(n)}</dt><dd>{_e('; '.join(filter(None, v)))}</dd>" for n, v in about.items() if any(v)),
        "</dl>",
        "<h2>Summary</h2>",
        '<p class="soft">Ratio: time of the fastest rival over that of the fastest of ours. Above 1 we are faster.</p>',
        legend,
        _summary(cases),
        "<h2>Where we lose</h2>",
        _losses(cases),
        "<h2>Pictures</h2>" if pictures else "",
        *(_picture(*picture) for picture in pictures),
        "<h2>All rows</h2>",
        '<p class="soft">Median of the rounds with the 20th and 80th percentile; variants took turns. Peak: memory '
        "above what was there before. Kept: for the backward pass. Standing: what stays between two calls. Error: "
        "relative, from fp64, on a small sibling of the shape. Ours are shaded; in italics what is neither ours nor a "
        "rival: parts of the work, candidates.</p>",
        legend,
        *(_suite(suite, [c for c in cases if c.suite == suite]) for suite in dict.fromkeys(c.suite for c in cases)),
        "<h2>Not run, and why</h2>",
        _not_run(cases),
    ]
    title = f"kunbr-fast benchmarks{_e(': ' + device) if device else ''}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'{GENERATOR}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _chosen(cases: Sequence[Outcome]) -> str:
    """What users get who name no implementation, where kernels of ours ran on a GPU."""
    ran = {row["variant"].split()[0].strip(",") for c in cases for row in c.ran if row["ours"] and row.get("cuda")}
    if not ran & {"triton", "cuda"}:
        return ""
    said = 'impl="auto" takes a kernel where it was proven right and faster than torch: `kunbr-fast doctor` lists them.'
    return f"<p>{_e(said)}</p>"


def _about(rows) -> list[str]:
    """What was measured with: the columns after those of the measurement, and the settings."""
    return [name for name in dict.fromkeys(n for row in rows for n in row) if name not in COLUMNS or name == "settings"]


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _html_table(header: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], texts: int) -> str:
    """lines: (class of the row, cells as HTML). The first `texts` columns are text, the others numbers."""

    def cells(tag, values):
        return "".join(f"<{tag}{' class=t' if i < texts else ''}>{v}</{tag}>" for i, v in enumerate(values))

    body = "\n".join(f"<tr{f' class={name}' if name else ''}>{cells('td', values)}</tr>" for name, values in lines)
    head = f"<thead><tr>{cells('th', map(_e, header))}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _coloured(case: Outcome) -> str:
    if case.ratio is None:
        return NOTHING
    return f'<span class="{"win" if case.ratio >= 1 else "lose"}">{_ratio(case)}</span>'


def _summary(cases: Sequence[Outcome]) -> str:
    header = "suite|model|case|dtype|best of ours|best rival|ours, ms|rival, ms|ratio|% roof".split("|")
    lines = []
    for case in cases:
        best = [case.ours, case.rivals[0] if case.rivals else None]
        names = (case.suite, case.model, case.case, case.dtype, *(row["variant"] if row else NOTHING for row in best))
        ours, rival = (_cells(case, row) if row else {} for row in best)
        numbers = (ours.get("ms", NOTHING), rival.get("ms", NOTHING), _coloured(case), ours.get("% roof", NOTHING))
        lines.append(("", [*map(_e, names), *numbers]))
    return _html_table(header, lines, 6)


def _losses(cases: Sequence[Outcome]) -> str:
    lost = sorted((case for case in cases if case.ratio is not None and case.ratio < 1), key=lambda case: case.ratio)
    compared = _count(sum(case.ratio is not None for case in cases), "case")
    silent = [case for case in cases if case.ours is None]
    said = f"In {len(lost)} of {compared}, worst first:" if lost else f"Nowhere in the {compared} where both sides ran."
    parts = [f"<p>{said}</p>"]
    parts.append(_list(
        f"{_e(_named(case))}: {_e(case.rivals[0]['variant'])} takes {_ms(case.rivals[0])}, our "
        f"{_e(case.ours['variant'])} {_ms(case.ours)}: {_coloured(case)}" for case in lost
    ))  # fmt: skip
    if silent:
        parts.append(f"<p>{_count(len(silent), 'case')} without numbers of ours:</p>")
        parts.append(_list(f"{_e(_named(case))}: {_e(_why_silent(case))}" for case in silent))
    return "\n".join(filter(None, parts))


def _why_silent(case: Outcome) -> str:
    reasons = _by_reason([row for row in case.not_run if row["ours"]])
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()) or "there was none"


def _named(case: Outcome) -> str:
    return f"{case.suite}: {case} ({case.dtype})"


def _list(items: Iterable[str]) -> str:
    """items: HTML."""
    lines = "\n".join(f"<li>{item}</li>" for item in items)
    return f"<ul>\n{lines}\n</ul>" if lines else ""


def _picture(heading: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_e(heading)}" src="data:image/png;base64,{data}">'


def _suite(suite: str, cases: Sequence[Outcome]) -> str:
    columns, blocks = _columns(cases), []
    for case in cases:
        lines = [
            (
                "less" if case.aside(row) else "ours" if row["ours"] else "",
                [_e(row["variant"]), *(_cells(case, row).get(c, NOTHING) for c in columns)],
            )
            for row in case.ran
        ]
        notes = "".join(f"<p class=soft>{_e(r['variant'])}: {_e(r['note'])}</p>" for r in case.ran if r.get("note"))
        shown = _html_table(["variant", *columns], lines, 1) if lines else "<p>No variant ran.</p>"
        blocks.append(f"<h3>{_e(case)}, {_e(case.dtype)}</h3>{shown}{notes}")
    return f"<details><summary>{_e(suite)}: {_count(len(cases), 'case')}</summary>\n" + "\n".join(blocks) + "</details>"


def _not_run(cases: Sequence[Outcome]) -> str:
    """By suite and reason; a case of which nothing ran, by its name."""
    whole: dict[tuple[str, str], list[str]] = {}
    some: dict[tuple[str, str], dict[str, int]] = {}
    for case in cases:
        reasons = _by_reason(case.not_run)
        if len(reasons) == 1 and not case.ran:
            whole.setdefault((case.suite, *reasons), []).append(f"{case} ({case.dtype})")
            continue
        for row in case.not_run:
            names = some.setdefault((case.suite, _reason(row)), {})
            names[row["variant"]] = names.get(row["variant"], 0) + 1
    lines = [(suite, "; ".join(names), reason) for (suite, reason), names in whole.items()]
    for (suite, reason), names in some.items():
        lines.append((suite, ", ".join(f"{name} ({_count(n, 'case')})" for name, n in names.items()), reason))
    return _list(_e(": ".join(line)) for line in lines) or "<p>Everything ran.</p>"
