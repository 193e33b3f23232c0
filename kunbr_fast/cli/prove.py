"""`kunbr-fast prove`: whether each kernel is right and fast on this machine's GPU: what impl="auto" goes by."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kunbr_fast.cli.argument_types import Different, device_name, number, path_name
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.terminal import say, show
from kunbr_fast.cli.verdict_table import table
from kunbr_fast.files.target import FileKind, FolderKind, Target, check, is_empty, json_with
from kunbr_fast.kernels import dispatch, verdicts
from kunbr_fast.kernels.verdicts import Verdict
from kunbr_fast.values import SECONDS

VERDICTS = FileKind("a file of verdicts", (".json",), json_with("format", "checksum", "verdicts"))
LOCK = FileKind("an empty lock file", (".lock",), is_empty)
WRITES = {"out": FolderKind()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs every kernel that this GPU may launch, in processes of their own: against fp64, between canaries, twice, "
        'and beside torch\'s time. A minute or two, once a machine and version. impl="auto" takes what was proven '
        "right and at least 1.05 times as fast as torch. Exit status: 0 all are right, 1 some are wrong or have no "
        "verdict, 2 no GPU."
    )
    parser.add_argument(
        "operations", nargs="*", action=Different, metavar="OPERATION", help=f"{', '.join(dispatch.OPERATIONS)} [all]"
    )
    parser.add_argument(
        "--impl", nargs="+", action=Different, choices=("cuda", "triton"), default=["cuda", "triton"], help="[both]"
    )
    parser.add_argument(
        "--dtype", nargs="+", action=Different, choices=("bf16", "fp16", "fp32"), default=["bf16"],
        help="of the model; optimisers' fp32 weights are always among them [bf16]",
    )  # fmt: skip
    parser.add_argument("--device", type=device_name, default="cuda", metavar="cuda:0", help="which GPU [the first]")
    parser.add_argument("--again", action="store_true", help="prove anew what there are verdicts on")
    parser.add_argument(
        "--limit",
        type=number(SECONDS),
        metavar="SECONDS",
        help="end a process that says nothing for so long: it hangs [120]",
    )
    parser.add_argument("--out", type=path_name, metavar="DIR", help="write the verdicts to DIR/<gpu>.json too")
    parser.add_argument("--json", action="store_true", help="print one JSON object a verdict, as they come")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> None:
    """Prints as it goes: of `--json` lines too, which `main` would print as one list."""
    unknown = [name for name in arguments.operations if name not in dispatch.OPERATIONS]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r}: expected some of {', '.join(dispatch.OPERATIONS)}")
    check_outputs(arguments, WRITES)
    as_json, arguments.json = arguments.json, False
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"prove needs a GPU, and torch {torch.__version__} sees none; `kunbr-fast doctor` says more")
    device = torch.device(arguments.device)
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(f"--device {device}: expected cuda, or cuda:N below {torch.cuda.device_count()}")
    if arguments.out:
        file = verdicts.path_of(device, Path(arguments.out))
        check([Target("--out", str(file), VERDICTS), Target("--out", str(file.with_suffix(".lock")), LOCK)])
        verdicts.write(file, [])  # or all would be for nothing

    def tell(verdict: Verdict) -> None:
        """As they come: what has been found stays, whatever becomes of the rest."""
        if as_json:
            show(json.dumps(verdict.as_json()))
        if arguments.out:
            verdicts.write(file, [verdict])

    found, none = _prove(device, arguments, tell)
    if not found and not none:
        say("nothing to prove: none of these kernels can run here (`kunbr-fast doctor` says why)")
        arguments.status = 1
        return
    if not as_json:
        show(*table(found).splitlines())
    for target, why in none.items():
        say(f"no verdict on {target}: {why}")
    arguments.status = int(bool(none) or any(not verdict.right for verdict in found))


def _prove(device, arguments, tell) -> tuple[list[Verdict], dict]:
    """The verdicts asked for, those that there were first."""
    from kunbr_fast.kernels.proof import cases, prove
    from kunbr_fast.proofs import Progress

    targets = cases.targets(device, arguments.dtype, arguments.operations or dispatch.OPERATIONS, arguments.impl)
    wanted = set(targets if arguments.again else prove.missing(targets, device))
    known = [verdicts.find(target, device) for target in targets if target not in wanted]
    for verdict in known:
        tell(verdict)
    options = {} if arguments.limit is None else {"limit": arguments.limit}
    with Progress(silent=arguments.quiet) as progress:
        prover = prove.Prover(device, on_verdict=tell, progress=progress, **options)
        found, none = prove.ensure(targets, prover, progress.say, again=arguments.again)
    return known + found, none
