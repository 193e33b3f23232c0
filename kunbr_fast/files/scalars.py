"""Numbers of documents, from their text, and what says that a document is not taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

LONGEST = 400  # characters: the largest float has 309 digits


class Refused(ValueError):
    """Why a document is not taken; the reader puts the file's name before it."""

    def __init__(self, text: str, line: int | None = None):
        super().__init__(text)
        self.line = line


def integer(text: str) -> int:
    """A whole number of 64 bits, with a sign or without. Its length comes first: int() of 10^5 digits takes long."""
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise Refused(f"the number {_cut(text)} does not fit in 64 bits: expected a smaller one")
    return number


def real(text: str) -> float:
    """A finite number."""
    if len(text) > LONGEST:
        raise Refused(f"the number {_cut(text)} is too long: expected at most {LONGEST}")
    if not math.isfinite(number := float(text)):
        raise Refused(f"the number {_cut(text)} is beyond a float of 64 bits: expected a finite one")
    if number == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0]):
        raise Refused(f"the number {_cut(text)} is rounded to 0: expected 0 itself, or a larger one")
    return number


def no_number(text: str) -> None:
    """Refuses NaN and Infinity, which JSON does not have."""
    raise Refused(f"{text} is not a finite number: write one")


class Unread(str):
    """The text of a number that is not taken, and why: for values that may never be read."""

    why: str


def or_text(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, but an `Unread` in place of what it refuses."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except Refused as error:
            unread = Unread(text)
            unread.why = str(error)
            return unread

    return parsed


def _cut(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}... of {len(text)} characters"
