"""Is the order of accesses in the compiled kernels proven? By sentryward, a static verifier of PTX, without a GPU.

    pip install '.[verify]'
    python tests/verify/verify_ptx.py                the table of launches
    python tests/verify/verify_ptx.py --faults       faults planted in csrc's Hopper kernel, and which are named
    python tests/verify/verify_ptx.py --only density --json

Every schedule of a launch's threads is covered, for that launch alone: sizes and samples' lengths are constants. Exits
with 1 where a launch fails that is expected to pass, or a fault goes unseen that is expected to be named, and where one
passes or is named that the table says is not. docs/verified.md has the results and what they do not say.
"""

from __future__ import annotations

import argparse
import json
import sys

import checker
import copies
import faults
import hopper
from launches import Launch


def all_launches() -> list[Launch]:
    import triton_ptx

    return [*hopper.LAUNCHES, *triton_ptx.launches()]


def row_of(launch: Launch) -> dict:
    """One row of the table; problem: how it differs from what is expected, or ""."""
    row = dict(kernel=launch.kernel, launch=launch.label, architecture=launch.architecture)
    report, stores = copies.verify(launch)
    races = "none" if report.memory == "passed" else "found" if report.race else "unknown"
    if stores and report.passed:
        races = f"none but {stores} store{'s' * (stores > 1)} of copies"
    row |= dict(synchronization=report.synchronization, memory=report.memory, races=races)
    row |= dict(seconds=round(report.seconds, 1), mebibytes=round(report.mebibytes), why=report.why)
    problem = ""
    if not launch.beyond and not report.passed:
        problem = f"{report.result}: {report.why}"
    elif launch.beyond and report.passed:
        problem = f"passed, though the table says that it is beyond sentryward: {launch.beyond}"
    elif launch.beyond and "failed" in (report.synchronization, report.memory):
        problem = f"failed, though the table says that there is no answer ({launch.beyond}): {report.why}"
    return row | dict(beyond=launch.beyond, problem=problem)


def row_of_fault(fault: faults.Fault) -> dict:
    launch = fault.launch()
    report = checker.check(*launch.describe(), launch.seconds, launch.mebibytes)
    checks = dict(synchronization=report.synchronization, memory=report.memory)
    named = next((name for name, found in checks.items() if found == "failed"), "")
    if "missing-barrier-initialization" in report.why:  # named, though as a failure of the tool
        named = "synchronization"
    problem = ""
    if not named and not report.passed:
        problem = f"no answer: {report.result}: {report.why}"
    elif named != fault.named:
        problem = f"{named or 'nothing'} failed, expected {fault.named or 'nothing'}"
    row = dict(fault=fault.label, named=named or "not named", why=fault.why or report.why)
    return row | dict(seconds=round(report.seconds, 1), problem=problem)


COLUMNS = dict(kernel=12, launch=58, architecture=7, synchronization=16, memory=12, races=28, seconds=8)
FAULT_COLUMNS = dict(fault=44, named=16, seconds=8, why=60)


def line(row: dict, columns: dict[str, int]) -> str:
    return " ".join(f"{str(row[name]):<{width}}" for name, width in columns.items()).rstrip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", action="store_true", help="plant faults in csrc's Hopper kernel")
    parser.add_argument("--only", default="", metavar="TEXT", help="launches or faults whose line has this text")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    if checker.executable() is None:
        parser.error(f"sentryward is not installed: {checker.HOW}")
    columns, row = (FAULT_COLUMNS, row_of_fault) if options.faults else (COLUMNS, row_of)
    chosen = faults.FAULTS if options.faults else all_launches()
    chosen = [one for one in chosen if options.only in " ".join(map(str, vars(one).values()))]
    if not chosen:
        parser.error(f"--only {options.only}: no line has it")
    rows = []
    if not options.json:
        print(line({name: name for name in columns}, columns))
    for one in chosen:
        rows.append(row(one))
        if not options.json:
            print(line(rows[-1], columns), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    bad = [r for r in rows if r["problem"]]
    for r in bad:
        print(f"{r.get('launch') or r['fault']}: {r['problem']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
