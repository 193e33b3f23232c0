"""Keyword arguments of a public function that are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def taken(kind: type[T], given: Mapping[str, Any], function: str) -> T:
    """`kind(**given)`. TypeError as Python's own for a name that is no field of it, with the nearest one that is."""
    _refuse_unknown(given, [field.name for field in dataclasses.fields(kind)], function)
    return kind(**given)


def changed(changes: Mapping[str, Any], function: str, *settings: Any) -> tuple[Any, ...]:
    """The settings (dataclass objects), each with those of `changes` that are its fields. TypeError as in `taken`."""
    fields = [{field.name for field in dataclasses.fields(each)} for each in settings]
    _refuse_unknown(changes, sorted(set().union(*fields)), function)
    return tuple(
        dataclasses.replace(each, **{name: value for name, value in changes.items() if name in own})
        for each, own in zip(settings, fields)
    )


def _refuse_unknown(given: Iterable[str], known: list[str], function: str) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{nearest(name, known)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """For the end of an error message: the nearest name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1, 0.4)
    return f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
