"""The command line: `kunbr-fast COMMAND`, one file a command."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`kunbr-fast` with these arguments: the exit status. See `kunbr_fast.cli.command.main`."""
    from kunbr_fast.cli.command import main

    return main(argv)
