"""`kunbr-fast bench`: cases measured one by one, each one's rows kept as soon as they are there, then the report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kunbr_fast.benchmarks import harness, measure, report, rows

SAME = ("device", "threads", "torch", "commit")  # what rows of one file have to share to be compared within it


def bench(
    suites: Sequence[str],
    options: harness.Options,
    out: str | Path,
    *,
    budget: float = float("inf"),
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures `suites` and writes results.csv, results.json, report.html and the plots to the folder `out`.

    resume: rows in out/results.csv of the same machine, versions and commit stay, and their cases are not measured
    again. budget: seconds after which no case is begun. say: gets each case's table when it is there.

    Returns {"rows", "failed": {case: why ours gave no numbers}, "left_out": {case: why}, "files"}. ValueError for a folder
    that has results where `resume` is not given, or results that others measured.
    """
    options = dataclasses.replace(options, say=lambda text: bar.set_postfix_str(text))
    cases, out = harness.all_cases(suites, options), Path(out)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: interpreted kernels are not what is measured: unset it")
    csv = out / "results.csv"
    found = _earlier(csv, resume)
    done = {_name(row) for row in found}
    todo = [case for case in cases if _name(case.identity()) not in done]
    failed, left_out = {}, {}
    bar = tqdm(total=len(cases), initial=len(cases) - len(todo), disable=not progress, unit="case", dynamic_ncols=True)
    with bar:
        for case, measured, why in harness.run(todo, budget, lambda case: bar.set_postfix_str(str(case))):
            if why is None:
                found += measured
                rows.write_rows(csv, out / "results.json", found)
            else:
                (failed if isinstance(why, harness.Wrong) else left_out)[str(case)] = str(why)
            with bar.external_write_mode():
                say(report.table(measured) if why is None else f"{case}: {why}")
            bar.update()
    files = report.write_report(found, out, failed | left_out) if found else []
    return {"rows": found, "failed": failed, "left_out": left_out, "files": [str(path) for path in files]}


def _name(row) -> tuple:
    return tuple(str(row[name]) for name in harness.KEY[:-1])


def _earlier(csv: Path, resume: bool) -> list[dict[str, Any]]:
    if not csv.exists():
        return []
    if not resume:
        raise ValueError(f"{csv} exists: give another --out, or --resume to go on with it")
    found, about = rows.read_rows(csv), measure.about()
    for name in SAME:
        for row in found:
            if str(row[name]) != str(about[name]):
                raise ValueError(
                    f"{csv} was measured with {name} {row[name]}, this is {about[name]}: give another --out"
                )
    return found
