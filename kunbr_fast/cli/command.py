"""The table of commands, and what all of them end with: a result, or one line and an exit status.

A command is a module of this package with `add_arguments(parser)` and `run(arguments)`. Only the module of the chosen
command is imported: `kunbr-fast --help` and `kunbr-fast doctor` load no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from kunbr_fast.cli import process
from kunbr_fast.cli.outcome import outcome
from kunbr_fast.cli.terminal import PlainLines, with_options
from kunbr_fast.cli.usage import Parser
from kunbr_fast.files.shown import plain
from kunbr_fast.version import __version__

COMMANDS = {
    "demo": "teach a small model invented birthdays and make it forget them (minutes, CPU)",
    "unlearn": "make a model forget: warm-up, density, selection, re-insertion, proof",
    "baseline": "the same by an objective on all parameters (NPO, SimNPO, RMU, ...), without blocks: to compare with",
    "density": "knowledge density of each layer for a forget set; changes nothing",
    "evaluate": "the measures that people publish: knowledge, memorisation, privacy, utility, depth, with their errors",
    "rtt": "the RTT attack: how much comes back when a part of the forget set is taught again",
    "report": "one HTML file of a finished run or evaluation, or of several side by side",
    "verify": "is what a run's certificate (unlearning.json) says still so? changes nothing",
    "merge": "one model from several: task vectors negated or added, by sum, mean or agreement of their signs",
    "data": "look at files, ours or published sets': forms, overlaps, lengths, and which tokens have a loss",
    "plan": "predict memory and time of a run from config.json alone, and choose settings that fit",
    "bench": "time the kernels, a step and a whole run on this machine against their rivals, or compare two such runs",
    "prove": 'prove the kernels on this machine\'s GPU: right, and faster than torch; impl="auto" goes by that',
    "doctor": "versions, devices, and which implementation of each operation can run here",
}
TOGETHER = ("unlearn", "baseline", "density")  # what several processes can run


def parser(argv: Sequence[str] = ()) -> Parser:
    """The command line, with the arguments of the command in `argv` alone."""
    top = Parser(
        prog="kunbr-fast",
        commands=COMMANDS,
        description="Fast re-insertion unlearning (KUnBR, arXiv 2511.11667) for Hugging Face causal language models.",
    )
    top.add_argument("--version", action="version", version=f"kunbr-fast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == chosen:
            module = _module(name, command)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            top.chosen = command
    return top


def _module(name: str, command: Parser) -> ModuleType:
    try:
        return importlib.import_module(f"kunbr_fast.cli.{name}")
    except (ImportError, OSError) as error:  # OSError: of a shared library
        if (getattr(error, "name", None) or "").startswith("kunbr_fast"):
            raise
        broken = "a package that it needs cannot be imported"
        command.exit(2, f"{command.prog}: {broken}: {_one_line(str(error))}: repair the installation\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where `bench` or `prove` found a wrong result, `bench` a regression, `data` a fact of a holdout
    set, `verify` a difference, or a picture that --plot asked for could not be drawn; 2 for bad input, with one line on
    standard error; 3 where training diverged; 4 where another of several processes has failed; 130 for Ctrl-C, 143 for
    SIGTERM, 129 for SIGHUP; 141 where the reader of standard output has gone.

    Anything else is a bug and keeps its traceback. argv: None for the process's own, whose signals and streams are then
    the command line's.
    """
    if argv is not None:
        return _main(argv)
    process.begin()
    if sys.stdout is None:
        cure = "it is closed: give it a file or a reader, or /dev/null"
        return process.failed(OSError(errno.EBADF, cure, "standard output"))
    try:
        status = _main(sys.argv[1:])
    except SystemExit as stop:  # argparse's
        status = stop.code
    except OSError as error:  # of its help
        status = process.failed(error)
    return process.finished(status)


def _main(argv: Sequence[str]) -> int:
    arguments = parser(argv).parse_args(argv)
    warnings = logging.StreamHandler()
    warnings.setFormatter(PlainLines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[warnings])
    if getattr(arguments, "quiet", False):
        _no_progress_bars()
    arguments.group, arguments.status = None, 0
    with process.working() as caught:
        arguments.stop = caught.stop
        try:
            with _together(arguments), contextlib.ExitStack() as arguments.held:  # what it writes, see `outputs`
                result = arguments.run(arguments)
            if arguments.json and _speaks(arguments):
                print(json.dumps(result, indent=2))
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            status, text = outcome(error, arguments, caught, _speaks(arguments))
            if status is None:
                raise
            if text:
                with contextlib.suppress(OSError):
                    print(f"{_name(arguments)}: {_one_line(with_options(text))}", file=sys.stderr, flush=True)
            return status
    return arguments.status


def _one_line(text: str) -> str:
    """Without anything that a terminal obeys, whatever is in a name or a library's message."""
    return plain(" ".join(text.split()), 4000)


@contextlib.contextmanager
def _together(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside, the processes that torchrun has started are `arguments.group`; it stays None for one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    import torch

    from kunbr_fast.parallel.group import joined

    device = getattr(arguments, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    with joined(device) as arguments.group:
        if arguments.group.size > 1 and arguments.command not in TOGETHER:
            raise ValueError(
                f"{arguments.command} runs in one process ({', '.join(TOGETHER)} in several): start it without torchrun"
            )
        if not _speaks(arguments):
            arguments.quiet = arguments.json = True  # of json `main` prints nothing
            logging.getLogger().setLevel(logging.ERROR)
            _no_progress_bars()
        yield


def _speaks(arguments: argparse.Namespace) -> bool:
    """Whether this process prints: the only one, or rank 0."""
    return arguments.group is None or arguments.group.first


def _name(arguments: argparse.Namespace) -> str:
    group = arguments.group
    return "kunbr-fast" if group is None or group.size == 1 else f"kunbr-fast, rank {group.rank} of {group.size}"


def _no_progress_bars() -> None:
    """Switches off those of transformers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
