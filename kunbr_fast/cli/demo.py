"""`kunbr-fast demo`: a small model learns invented birthdays and forgets some of them."""

from __future__ import annotations

import argparse
from typing import Any

from kunbr_fast.cli.argument_types import number, path_name
from kunbr_fast.cli.arguments import add_output
from kunbr_fast.cli.inputs import sayer
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import show
from kunbr_fast.files.target import PICTURE, FileKind, FolderKind, json_with
from kunbr_fast.run.demo import demo
from kunbr_fast.values import SEED

LEGEND = """\
retain: people rehearsed during unlearning; bystanders: known, and never seen by it; RTT: the best that an
attacker gets on one half of the forget set by teaching the other half again (chance is 25 %)."""

KINDS = """\
full: all weights at the rates that robust has rehearsed against. Nobody has rehearsed lora (at one rate), int8, nf4."""

NEWER = ("robust", "attacks")  # which earlier versions did not have
KEYS = "kunbr_fast seed people config baseline blocks density losses rows rtt table".split()
REPORT = FileKind("a report of the demo", (".json",), json_with(*KEYS, also=NEWER))
WRITES = {"out": FolderKind({r"report\.json": REPORT, r"(density|relearning)\.png": PICTURE})}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_name, default="demo-out", metavar="DIR", help="where report.json and the plots go [demo-out]"
    )
    parser.add_argument("--seed", type=number(SEED), default=0, help="people, initial weights and data order [0]")
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check_outputs(arguments, WRITES)
    result = demo(arguments.out, arguments.seed, progress=not arguments.quiet, say=sayer(arguments))
    if not arguments.json:
        show(
            *result["table"].splitlines(),
            *LEGEND.splitlines(),
            "",
            *result["attacks"].splitlines(),
            *KINDS.splitlines(),
        )
        show(f"report.json, density.png and relearning.png are in {arguments.out}")
    return result
