"""Other names for a record's keys: `question=prompt` has what lies under "question" read as the "prompt"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kunbr_fast.data.forms import FACT, FORMS, OTHER_ANSWER
from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import meant

KEYS = tuple(dict.fromkeys([*(key for form in FORMS for key in form), OTHER_ANSWER, FACT]))
CHOICES = "choices"  # the one key that several columns may make, in their order


class Columns:
    """names: theirs -> ours. ValueError for a key that records do not have, and for one that two columns would be."""

    def __init__(self, names: Mapping[str, str]):
        self._seen: set[str] = set()
        self._others: dict[str, None] = {}  # keys that were not renamed, for the error
        self._sources: dict[str, list[str]] = {}
        for theirs, ours in names.items():
            if ours not in KEYS:
                raise ValueError(
                    f"columns: {shown(theirs)} as {shown(ours)}: no key of a record{meant(ours, KEYS) or ':'} expected "
                    f"one of {', '.join(KEYS)}"
                )
            self._sources.setdefault(ours, []).append(theirs)
        for ours, several in self._sources.items():
            if len(several) > 1 and ours != CHOICES:
                raise ValueError(f"columns: {shown(several[0])} and {shown(several[1])} are both {ours!r}: keep one")

    @property
    def several(self) -> bool:
        """Whether the choices come from several columns, and the answer may be the letter of one."""
        return len(self._sources.get(CHOICES, ())) > 1

    def renamed(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The record under our names. ValueError where it has one of them already."""
        theirs = {name for several in self._sources.values() for name in several}
        found = {key: value for key, value in record.items() if key not in theirs}
        self._seen.update(theirs.intersection(record))
        self._others |= dict.fromkeys(found)
        for ours, several in self._sources.items():
            if not theirs.intersection(several).intersection(record):
                continue
            if found.get(ours) is not None:
                raise ValueError(
                    f"{where}: it has {ours!r} itself, beside {shown(several[0])}, which columns names so: ignore_keys "
                    "leaves one of them out"
                )
            value = record.get(several[0]) if len(several) == 1 else _gathered(record, several, where)
            if value is not None:
                found[ours] = value
        return found

    @property
    def unseen(self) -> str | None:
        """A column that was in no line, and the nearest that was."""
        for several in self._sources.values():
            for name in several:
                if name not in self._seen:
                    return f"{shown(name)}{meant(name, [*self._seen, *self._others])}"
        return None


def _gathered(record: Mapping[str, Any], names: list[str], where: str) -> list[Any]:
    """The choices that several columns hold; the last ones may be empty."""
    values = [record.get(name) for name in names]
    while values and values[-1] is None:
        values.pop()
    if None in values:
        raise ValueError(f"{where}: the choice {shown(names[values.index(None)])} is empty, and a later one is not")
    return values
