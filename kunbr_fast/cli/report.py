"""`kunbr-fast report`: a run, an evaluation, or several of them side by side, as one HTML file."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kunbr_fast.cli.argument_types import path_name
from kunbr_fast.cli.arguments import add_output
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import show
from kunbr_fast.files.target import PAGE
from kunbr_fast.pages.page import NAME, write_page

DESCRIPTION = """\
One self-contained HTML file: what was asked, before and after, what comes back under attack, what was
lost, and what these figures do not show. Several OUT stand side by side."""
WRITES = {"out": PAGE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.description = "%(prog)s OUT [OUT ...] [options]", DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "the --out of kunbr-fast unlearn, baseline or evaluate: report.json, evaluation.json or both"
    parser.add_argument("folders", nargs="+", type=path_name, metavar="OUT", help=text)
    text = f"[OUT/{NAME}; of several it has to be given]"
    parser.add_argument("--out", type=path_name, metavar="FILE.html", help=text)
    parser.add_argument("--title", metavar="TEXT", help="the page's heading [the folders' names]")
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.out is None:
        if len(arguments.folders) > 1:
            raise ValueError(
                f"{len(arguments.folders)} folders: the page belongs to none of them, give it a place, --out FILE.html"
            )
        arguments.out = os.path.join(arguments.folders[0], NAME)
    check_outputs(arguments, WRITES)
    write_page(arguments.folders, arguments.out, arguments.title)
    if not arguments.json:
        show(f"the report is in {arguments.out}")
    return {"file": arguments.out}
