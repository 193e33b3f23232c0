"""`kunbr-fast bench`: times the kernels, a step and a whole run, or compares two such runs."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kunbr_fast.benchmarks import compare, harness
from kunbr_fast.benchmarks.bench import bench, check_variants
from kunbr_fast.benchmarks.report import PICTURES, write_report
from kunbr_fast.benchmarks.rows import NEEDED, read_rows
from kunbr_fast.benchmarks.shapes import MODELS
from kunbr_fast.benchmarks.suites import SUITES
from kunbr_fast.cli.argument_types import Different, number, path_name
from kunbr_fast.cli.arguments import add_device, add_output
from kunbr_fast.cli.inputs import choose_device, say
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import show
from kunbr_fast.files.models import DTYPES
from kunbr_fast.files.target import PAGE, PICTURE, FileKind, FolderKind, csv_with, json_with
from kunbr_fast.values import SECONDS, Whole

DESCRIPTION = """\
Times each suite's cases on this machine: first a check of results against fp64, then rounds in which
ours, the rivals that are installed, and a copy and a matrix product (the roofline) take turns."""

REPORT = {r"report\.html": PAGE, PICTURES.pattern: PICTURE}
ROWS = {
    r"results\.csv": FileKind("a file of rows", (".csv",), csv_with(*NEEDED)),
    r"results\.json": FileKind("a file of rows", (".json",), json_with(*NEEDED, also=None)),
}
WRITES = {"out": FolderKind(REPORT | ROWS)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.description = "%(prog)s [SUITE ...] [options]", DESCRIPTION
    parser.epilog = "suites:\n" + "\n".join(f"  {name:<12} {text}" for name, text in SUITES.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("suites", nargs="*", action=Different, metavar="SUITE", help="which suites, see below [all]")
    parser.add_argument(
        "--out",
        type=path_name,
        default="bench-out",
        metavar="DIR",
        help="results.csv, results.json, report.html, plots [bench-out]",
    )
    parser.add_argument("--resume", action="store_true", help="keep the cases that have numbers in --out already")
    _add_cases(parser)
    _add_rounds(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="say which cases there are, and measure none")
    instead.add_argument(
        "--compare",
        nargs=2,
        type=path_name,
        metavar=("A.csv", "B.csv"),
        help="measure nothing: what became slower or faster from A to B, beyond noise; "
        "exit status 1 where ours became slower",
    )
    instead.add_argument(
        "--report", type=path_name, metavar="FILE.csv", help="measure nothing: the report of this file, in --out"
    )
    add_output(parser)


def _add_cases(parser: argparse.ArgumentParser) -> None:
    """Which cases are measured."""
    group = parser.add_argument_group("cases")
    add_device(group)
    group.add_argument("--dtype", choices=list(DTYPES), help="[bfloat16 on a GPU, float32 on a CPU]")
    group.add_argument(
        "--models",
        nargs="+",
        action=Different,
        choices=list(MODELS),
        metavar="NAME",
        help=f"shapes of {', '.join(MODELS)}",
    )
    group.add_argument(
        "--tokens",
        nargs="+",
        action=Different,
        type=_tokens,
        metavar="T",
        help="where a suite has them as a size; ragged: as questions have",
    )
    group.add_argument(
        "--variants", nargs="+", action=Different, metavar="NAME", help="only these, and what they are compared with"
    )
    group.add_argument("--quick", action="store_true", help="one small case a suite, to see that everything works")
    group.add_argument("--compile", action="store_true", help="torch.compile's variants on a CPU too (minutes)")
    group.add_argument("--tiles", action="store_true", help="density: each candidate tile of the Triton kernel too")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    """How long they are measured."""
    group = parser.add_argument_group("rounds")
    group.add_argument("--seconds", type=number(SECONDS), metavar="S", help="for the rounds of a case [4]")
    group.add_argument(
        "--repeats",
        type=number(Whole(1, 10**6)),
        metavar="N",
        help="rounds after which a case is done [7; 30 on a GPU]",
    )
    group.add_argument(
        "--budget",
        type=number(SECONDS),
        default=float("inf"),
        metavar="S",
        help="seconds after which no case is begun",
    )
    group.add_argument("--no-report", action="store_true", help="results.csv and results.json alone")


def _tokens(text: str) -> str:
    return text if text == "ragged" else str(number(Whole(1, 2**20))(text))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.compare:
        return _compare(arguments)
    if arguments.report:
        check_outputs(arguments, {"out": FolderKind(REPORT)})
        files = [str(path) for path in write_report(read_rows(arguments.report), arguments.out)]
        if not arguments.json:
            show(*files)
        return {"files": files}
    options = _options(arguments)
    suites = arguments.suites or SUITES
    if arguments.list:
        found = harness.all_cases(suites, options)
        check_variants(found, options.variants)
        cases = [str(case) for case in found]
        if not arguments.json:
            show(*cases)
        return {"cases": cases}
    check_outputs(arguments, WRITES)
    return _measure(suites, options, arguments)


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    found = compare.compare(*(read_rows(path) for path in arguments.compare))
    if not arguments.json:
        show(*compare.table(found).splitlines())
    arguments.status = 1 if found.regressions else 0
    return found.to_dict()


def _options(arguments: argparse.Namespace) -> harness.Options:
    lists = {name: getattr(arguments, name) for name in ("models", "tokens", "variants")}
    return harness.Options(
        device=torch.device(choose_device(arguments)),
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        **{name: value and tuple(value) for name, value in lists.items()},
        **{name: getattr(arguments, name) for name in ("quick", "compile", "tiles", "seconds", "repeats")},
    )


def _measure(suites: Any, options: harness.Options, arguments: argparse.Namespace) -> dict[str, Any]:
    found = bench(
        suites,
        options,
        arguments.out,
        budget=arguments.budget,
        resume=arguments.resume,
        progress=not arguments.quiet,
        write_report=not arguments.no_report,
        say=(lambda text: None) if arguments.json else lambda text: show(*text.splitlines()),
    )
    for what, cases in (("WRONG", found["wrong"]), ("left out", found["left_out"])):
        for case, reason in cases.items():
            say(f"{what}: {case}: {reason}")
    timed = [row for row in found["rows"] if row["ms"] and row["suite"] in suites]  # --resume keeps other suites' rows
    measured = {(row["suite"], row["model"], row["case"], row["tokens"]) for row in timed}
    arguments.status = 0 if measured and not found["wrong"] else 1
    if not arguments.json:
        more = "" if arguments.no_report else ", report and plots"
        show(f"numbers of {len(measured)} cases{more} are in {arguments.out}")
    return found
