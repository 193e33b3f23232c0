"""`kunbr-fast plan`: memory and time of a run, from config.json and headers alone."""

from __future__ import annotations

import argparse
from typing import Any

from kunbr_fast.cli.argument_types import number, path_name
from kunbr_fast.cli.arguments import add_files, add_output, add_reading, add_settings
from kunbr_fast.cli.inputs import read_config, reader
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import show
from kunbr_fast.files.models import DTYPES
from kunbr_fast.files.target import SETTINGS
from kunbr_fast.planning.machines import DISK, GPUS, PROCESSES
from kunbr_fast.planning.plan import plan
from kunbr_fast.values import Bytes, Real

WRITES = {"out": SETTINGS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=path_name, metavar="DIR", help="model directory, or only its config.json"
    )
    parser.add_argument(
        "--gpu-memory",
        required=True,
        type=number(Bytes(unit_needed=True)),
        metavar="SIZE",
        help="such as 24GiB or 80GB",
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} [h100]")
    parser.add_argument("--gpus", type=number(PROCESSES), default=1, metavar="N", help="how many [1]")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as config.json says")
    add_files(parser, "--forget", "F.jsonl", "as of unlearn (default: sizes of WMDP)")
    add_files(parser, "--retain", "R.jsonl", "as of unlearn (default: sizes of WMDP)")
    add_reading(parser)
    parser.add_argument("--unlearned", action="store_true", help="M_u will be given: no warm-up")
    parser.add_argument("--stream", action="store_true", help="as of unlearn: layers come from the files one by one")
    size, rate = number(Bytes(unit_needed=True)), number(Real(0, above=True))
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="main memory of the machine, such as 32GiB [enough]"
    )
    parser.add_argument("--disk-rate", type=rate, default=DISK, metavar="GB/s", help=f"of the disk [{DISK:g}]")
    parser.add_argument("--out", type=path_name, metavar="run.yaml", help="the settings, for unlearn --config")
    add_settings(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check_outputs(arguments, WRITES)
    names = ("gpu", "gpus", "forget", "retain", "dtype", "unlearned", "stream", "memory", "disk_rate")
    config = read_config(arguments)
    found = plan(
        arguments.model,
        arguments.gpu_memory,
        config=config,
        read=reader(arguments, config),
        **{name: getattr(arguments, name) for name in names},
    )
    if arguments.out:
        found.config.save(arguments.out)
    if not arguments.json:
        show(*found.table().splitlines())
    return found.to_dict()
