"""The command line: `kunbr-fast COMMAND`."""

from kunbr_fast.cli.main import main

__all__ = ["main"]
