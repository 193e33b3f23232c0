"""`kunbr-fast baseline`: full-parameter unlearning by one objective, with all that `unlearn` measures."""

from __future__ import annotations

import argparse
from typing import Any

from kunbr_fast.cli.arguments import add_output, add_settings
from kunbr_fast.cli.inputs import read_config, sayer
from kunbr_fast.cli.unlearn import add_run, run_with
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.objectives.methods import OBJECTIVES
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.methods import called, methods, settings_of
from kunbr_fast.run.validity import OF_HIDDEN_LAYERS_TOO, names_of_blocks

# settings that have a shorter name here, since nothing is warmed up
CALLED = {
    "objective": ("", "what is minimised: " + "; ".join(f"{name}: {called(OBJECTIVES[name])}" for name in OBJECTIVES)),
    "warmup_epochs": ("--epochs", "epochs over the forget set"),
    "warmup_lr": ("--lr", "learning rate"),
    "warmup_optimizer": ("--optimizer", "lion or adamw"),
    "warmup_master_weights": ("--master-weights", "half precision and small updates: fp32 copies, none, stochastic"),
}
OF_BLOCKS = [*names_of_blocks(KUnBRConfig), "top_k", "warmup_objective", "warmup_objective_options"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    offered = [name for name in KUnBRConfig.__dataclass_fields__ if name not in OF_BLOCKS]
    add_settings(parser, [*offered, *OF_HIDDEN_LAYERS_TOO], CALLED)
    add_output(parser)
    parser.set_defaults(unlearned=None, set_top_k=0)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.config:
        _check_file(arguments.config)
    config = read_config(arguments)
    sayer(arguments)(f"{config.objective}: {methods()[config.objective].text}")
    return run_with(config, arguments)


def _check_file(path: str) -> None:
    """ValueError for a line about blocks."""
    lines, found = KUnBRConfig.read(path), KUnBRConfig.load(path)
    cure = "a baseline trains no blocks: leave the line out, or run `kunbr-fast unlearn`"
    if "method" in lines and settings_of(lines["method"]).get("top_k"):
        raise ValueError(f"{plain(path)}: method: {shown(lines['method'])}: {cure}")
    usual, of_hidden = KUnBRConfig().to_dict() | {"top_k": 0}, found.retain_loss == "hidden_layers"
    names = set(OF_BLOCKS) - {*(OF_HIDDEN_LAYERS_TOO if of_hidden else ())}
    for name in (name for name in lines if name in names):
        if (value := getattr(found, name)) != usual[name]:
            raise ValueError(f"{plain(path)}: {name}: {shown(value)}: {cure}")
