"""`kunbr-fast bench`: cases measured one by one, each one's rows kept as soon as they are there, then the report."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.benchmarks import harness, measure, report, rows
from kunbr_fast.files.lock import hold
from kunbr_fast.files.shown import shown


def bench(
    suites: Sequence[str],
    options: harness.Options,
    out: str | Path,
    *,
    budget: float = float("inf"),
    resume: bool = False,
    write_report: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures `suites` and writes results.csv, results.json and, unless write_report=False, report.html and the plots
    to the folder `out`.

    resume: cases that have numbers in out/results.csv are not measured again; they have to be of the same machine,
    versions, commit and settings. Rows of other suites stay, whatever their settings. budget: seconds after which no
    case is begun. say: gets each case's table when it is there.

    Returns {"rows", "wrong": {case, or case and variant: what was wrong with ours}, "left_out": {case: why}, "files"}.
    A case that gave no numbers has rows that say why. ValueError for options that no case takes, for a folder that has
    results where `resume` is not given, or results that do not go with these.
    """
    if options.device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {options.device}: what runs elsewhere than on a CPU or CUDA device is not timed here")
    options = dataclasses.replace(options, say=lambda text: bar.set_postfix_str(text))
    cases, out = harness.all_cases(suites, options), Path(out)
    check_variants(cases, options.variants)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: interpreted kernels are not what is measured: unset it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    with hold(out):
        csv = out / "results.csv"
        found = _earlier(csv, resume, options, suites)
        done = {_name(row) for row in found}
        todo = [case for case in cases if _name(case.identity()) not in done]
        wrong, left_out = {}, {}
        gc.collect()
        gc.freeze()  # what libraries have made: each variant's peak is measured after a collection
        if (
            options.device.index is not None
        ):  # without an index it is the current one already, and set_device refuses it
            torch.cuda.set_device(options.device)  # of events, and of what rivals launch
        bar = tqdm(
            total=len(cases), initial=len(cases) - len(todo), disable=not progress, unit="case", dynamic_ncols=True
        )
        with bar:
            for case, measured, why in harness.run(todo, budget, lambda case: bar.set_postfix_str(str(case))):
                found += map(rows.parsed, measured)
                rows.write_rows(csv, out / "results.json", found)
                wrong |= {f"{case}, {row['variant']}": row["note"] for row in measured if rows.is_wrong(row)}
                if why is not None:
                    (wrong if isinstance(why, harness.Wrong) else left_out)[str(case)] = str(why)
                with bar.external_write_mode():
                    say(report.table(measured) if why is None else f"{case}: {why}")
                bar.update()
        files = report.write_report(found, out) if found and write_report else []
        return {"rows": found, "wrong": wrong, "left_out": left_out, "files": [str(path) for path in files]}


def _name(row) -> tuple:
    return tuple(str(row[name]) for name in rows.KEY[:-1])


def check_variants(cases: Iterable[harness.Case], wanted: Sequence[str] | None) -> None:
    """ValueError for a name that no variant of these cases has."""
    if not wanted:
        return
    there = {variant.name for case in cases for variant in case.variants(case.small().draw())}
    if unknown := sorted(set(wanted) - there):
        raise ValueError(f"no variant {shown(unknown[0])} in these suites: expected some of {', '.join(sorted(there))}")


def _earlier(csv: Path, resume: bool, options: harness.Options, suites: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the cases that have numbers and nothing wrong, and all rows of other suites."""
    if not csv.exists():
        return []
    if not resume:
        raise ValueError(f"{csv} exists: give another folder, or resume=True to go on with it")
    same = measure.about(options.device)
    del same["command"]
    found = rows.read_rows(csv)
    for row in found:
        asked = {"settings": options.settings} if row["suite"] in suites else {}
        for name, value in (asked | same).items():
            if str(row.get(name) or "") != str(value):
                raise ValueError(
                    f"{csv} was measured with {name} {row.get(name) or 'unknown'}, this is {value or 'none'}: "
                    "give another folder"
                )
    done = {_name(row) for row in found if row["ms"]} - {_name(row) for row in found if rows.is_wrong(row)}
    return [row for row in found if row["suite"] not in suites or _name(row) in done]
