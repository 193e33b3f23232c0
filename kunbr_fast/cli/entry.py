"""The console script `kunbr-fast`: from here on a signal is one line, so it comes before all other imports."""

from kunbr_fast.cli import process


def main() -> int:
    process.begin()
    from kunbr_fast.cli.command import main

    return main()
