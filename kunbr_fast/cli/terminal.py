"""What a command tells: lines on a terminal, in which a name cannot do what a control character does."""

from __future__ import annotations

import sys

from kunbr_fast.files.shown import plain

LONGEST = 4000  # characters of a line


def show(text: str) -> None:
    """Lines on standard output."""
    print(_plain(text), flush=True)


def say(text: str) -> None:
    """Lines on standard error."""
    print(_plain(text), file=sys.stderr, flush=True)


def _plain(text: str) -> str:
    return "\n".join(plain(line, LONGEST) for line in text.split("\n"))
