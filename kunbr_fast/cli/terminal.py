"""What a command tells: lines on a terminal, in which a name cannot do what a control character does."""

from __future__ import annotations

import logging
import sys

from kunbr_fast.files.shown import plain

LONGEST = 4000  # characters of a line


def show(*lines: str) -> None:
    """Lines on standard output."""
    print(*(plain(line, LONGEST) for line in lines), sep="\n", flush=True)


def say(text: str) -> None:
    """A line on standard error."""
    print(plain(text, LONGEST), file=sys.stderr, flush=True)


class PlainLines(logging.Formatter):
    """A warning as such a line."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), LONGEST)
