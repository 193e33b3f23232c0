"""Keyword arguments of a public function that are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def named_by(*kinds: type) -> Callable[[F], F]:
    """Decorates a function whose `**keywords` are fields of these dataclasses: its signature, which `help` and editors
    show, has them by name, with their defaults."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=field.type)
            for name, field in fields.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])
        return function

    return decorate


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def taken(kind: type[T], given: Mapping[str, Any], function: str) -> T:
    """`kind(**given)`. TypeError as Python's own for a name that is no field of it, with the nearest one that is, and
    for one that is missing."""
    fields = dataclasses.fields(kind)
    _refuse_unknown(given, [field.name for field in fields], function)
    for field in fields:
        if field.name not in given and _default(field) is inspect.Parameter.empty:
            raise TypeError(f"{function}() missing 1 required keyword-only argument: {field.name!r}")
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


def meant(name: object, known: Iterable[str]) -> str:
    """For an error message: the nearest name, if one is near."""
    near = difflib.get_close_matches(str(name)[:100], known, 1, 0.4)
    return f": did you mean {near[0]!r}?" if near else ""


def nearest(name: object, known: Iterable[str]) -> str:
    """For the end of an error message: the nearest name, or as many of them as a line holds."""
    known = list(known)
    if near := meant(name, known):
        return near
    names = ", ".join(known)
    return f": known are {names if len(names) <= 200 else names[:200].rpartition(', ')[0] + ', ...'}"
