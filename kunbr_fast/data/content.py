"""What records and files hold: choices that can be told apart, text that can be seen, each file on one side."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from kunbr_fast.files.shown import plain, shown

LETTERS = "ABCDEFGHIJ"
LARGEST_CHOICE = 1e100  # more digits are no answer that anybody could tell


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: white space, control and format characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def check_choices(choices: object, where: str) -> None:
    """ValueError, beginning with `where`, unless there are 2 or more, and not all the same. Some of them may be equal
    (`are_equal`), as in one of 20 published questions on birthdays."""
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: 'choices' must be a list of 2 to {len(LETTERS)} entries, got {shown(choices)}")
    for choice in choices:
        number = isinstance(choice, (int, float)) and not isinstance(choice, bool) and abs(choice) < LARGEST_CHOICE
        if not number and (not isinstance(choice, str) or is_blank(choice)):
            raise ValueError(
                f"{where}: each of 'choices' must be a finite number or a string that is not blank, got {shown(choice)}"
            )
    if len(_texts(choices)) == 1:
        raise ValueError(f"{where}: 'choices' must differ, and all of them are {shown(choices[0])}")


def are_equal(choices: Sequence[str | int | float]) -> bool:
    """Whether some of a question's choices cannot be told apart."""
    return len(_texts(choices)) < len(choices)


def _texts(choices: Sequence[str | int | float]) -> set[str]:
    return {str(choice).strip() for choice in choices}


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
