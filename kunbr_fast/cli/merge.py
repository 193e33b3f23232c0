"""`kunbr-fast merge`: one model from several, by their task vectors."""

from __future__ import annotations

import argparse
from typing import Any

from kunbr_fast.cli.argument_types import Different, number, path_name
from kunbr_fast.cli.arguments import add_output
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import show
from kunbr_fast.files.merge import METHODS, MODES, merge_models
from kunbr_fast.files.merge_folder import FOLDER
from kunbr_fast.values import ABOVE_ZERO, Real

WRITES = {"out": FOLDER}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, type=path_name, metavar="DIR", help="the model that the others were trained from"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        action=Different,
        type=path_name,
        required=True,
        metavar="DIR",
        help="one or more (safetensors)",
    )
    parser.add_argument("--out", required=True, type=path_name, metavar="DIR", help="the merged model, and merge.json")
    parser.add_argument(
        "--mode",
        choices=MODES,
        required=True,
        help="negate: the models were fine-tuned on what is to be forgotten; add: they were unlearned",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="consensus",
        help="of the task vectors; consensus: the mean where they agree in sign, 0 elsewhere [consensus]",
    )
    parser.add_argument(
        "--alpha", type=number(ABOVE_ZERO), default=1.0, metavar="A", help="how far along the task vector [1.0]"
    )
    parser.add_argument(
        "--agree",
        type=number(Real(0.5, 1, above=True)),
        default=1.0,
        metavar="SHARE",
        help="of the models that consensus needs, above 0.5 [1.0: all]",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the merge that was interrupted in --out")
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check_outputs(arguments, WRITES)
    found = merge_models(
        arguments.base,
        arguments.models,
        arguments.out,
        resume=arguments.resume,
        progress=not arguments.quiet,
        **{name: getattr(arguments, name) for name in ("mode", "method", "alpha", "agree")},
    )
    if not arguments.json:
        show(f"{found['tensors']} tensors, {found['entries']} entries; {found['agreed_share']:.1%} agree in sign")
        for model, norm in zip(found["models"], found["task_vector_norms"]):
            show(f"task vector of {model}: norm {norm:.4g}")
        change = f"change ({arguments.mode}, alpha {arguments.alpha:g})"
        show(f"{change}: norm {found['merged_norm']:.4g}, in {arguments.out}")
    return found
