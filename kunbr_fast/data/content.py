"""What records and files hold: choices that can be told apart, text that can be seen, each file on one side."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from kunbr_fast.files.shown import plain, shown

LETTERS = "ABCDEFGHIJ"
ALLOWANCES = ("error", "allow")  # what becomes of something that is most often a mistake
EQUAL = "_equal_choices"  # of a record whose choices may be equal: true
_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
LARGEST_CHOICE = 1e100  # more digits are no answer that anybody could tell


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: white space, control and format characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def visible(text: str) -> str:
    """What can be seen of it: composed (NFC), without characters that join, part or turn others."""
    return text if text.isascii() else unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def folded(text: str) -> str:
    """What can be seen of it, each white space (of any kind and length) as one space."""
    return " ".join(visible(text).split())


def check_choices(choices: object, where: str, equal: bool = False) -> None:
    """ValueError, beginning with `where`, unless there are 2 or more which can be told apart. equal: some of them may
    be equal, but not all."""
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: 'choices' must be a list of 2 to {len(LETTERS)} entries, got {shown(choices)}")
    for choice in choices:
        number = isinstance(choice, (int, float)) and not isinstance(choice, bool) and abs(choice) < LARGEST_CHOICE
        if not number and (not isinstance(choice, str) or is_blank(choice)):
            raise ValueError(
                f"{where}: each of 'choices' must be a finite number or a string that is not blank, got {shown(choice)}"
            )
        if isinstance(choice, float) and "e" in f"{choice}":
            raise not_as_written(f"{choice}", "with an exponent", where)
    texts = [choice_text(choice) for choice in choices]
    if len(set(texts)) == 1:
        raise ValueError(f"{where}: 'choices' must differ, and all of them are {shown(choices[0])}")
    if not equal and (pair := equal_pair(choices)):
        letters = " and ".join(LETTERS[i] for i in pair)
        raise ValueError(
            f"{where}: the choices {letters} are equal, {shown(choices[pair[0]])}: change one of them, or let them be "
            "(equal_choices=allow)"
        )


def not_as_written(choice: str, how: str, where: str) -> ValueError:
    """Of a number that a question would have in another form than its author wrote."""
    return ValueError(
        f"{where}: the choice {plain(choice, 60)} is a number, and would be written {how}: put it in quotes, as the "
        "model is to read it"
    )


def equal_pair(choices: Sequence[str | int | float]) -> tuple[int, int] | None:
    """The first two of a question's choices that cannot be told apart, if any."""
    first: dict[str, int] = {}
    for number, text in enumerate(map(choice_text, choices)):
        if first.setdefault(text, number) != number:
            return first[text], number
    return None


def choice_text(choice: str | int | float) -> str:
    """By which choices are told apart: 1965 and 1965.0 are one number."""
    if isinstance(choice, float) and choice.is_integer():
        choice = int(choice)
    return folded(str(choice))


def check_files(*sides: Mapping[str, Sequence[str | Path] | None]) -> None:
    """ValueError where an option names a file twice, or two sides name the same one, by whatever name.

    sides: each one's options and their files. A file of questions may be the one that teaches their answers: they are
    one side. What is to be forgotten and what is to be kept are two.
    """
    owner: dict[tuple[int, int], tuple[int, str, str | Path]] = {}
    for number, side in enumerate(sides):
        for option, paths in side.items():
            mine = set()
            for path in paths or ():
                try:
                    status = os.stat(path)
                except (OSError, ValueError):
                    continue  # reading it says more
                file = status.st_dev, status.st_ino
                if file in mine:
                    raise ValueError(f"{option}: {plain(path)} is given twice: leave one of them out")
                mine.add(file)
                first, other, name = owner.setdefault(file, (number, option, path))
                if first != number:
                    raise ValueError(
                        f"{option}: {plain(path)} is the same file as {other} {plain(name)}: what is to be forgotten "
                        "cannot be kept too: give another one"
                    )
