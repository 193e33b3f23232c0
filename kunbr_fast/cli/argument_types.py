"""What a word of the command line may be: types and actions for argparse, without torch."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from kunbr_fast.files.shown import shown
from kunbr_fast.values import ANY, ANY_WHOLE, Bytes, Real, Whole


def number(kind: Whole | Real | Bytes) -> Callable[[str], Any]:
    """An argument type: a number of `kind`."""

    def read(text: str) -> Any:
        try:
            return kind.parse(text)
        except ValueError as error:
            raise _refused(text, str(error)) from None

    read.kind = kind
    return read


def number_or(words: Sequence[str], kind: Whole | Real | Bytes) -> Callable[[str], Any]:
    """An argument type: one of some words, or a number of `kind`."""

    def read(text: str) -> Any:
        if text in words:
            return text
        try:
            return kind.parse(text)
        except ValueError as error:
            raise _refused(text, f"{', '.join(words)}, or {error}") from None

    read.kind = kind
    return read


def path_name(text: str) -> str:
    """An argument type: a name that a file or a folder can have. "" would be the folder one is in."""
    if not text.strip():
        raise _refused(text, "the name of a file or folder")
    try:
        os.lstat(text)
    except ValueError:
        raise _refused(text, "a name without NUL characters") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _refused(text, "a shorter name") from None
    return text


ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def escaped_text(text: str) -> str:
    """An argument type: text in which \\n is a line end, \\t a tab and \\\\ a backslash."""

    def read(match: re.Match[str]) -> str:
        if match[1] not in ESCAPES:
            raise _refused(text, r"n (line end), t (tab) or \ behind a \ (a backslash is \\)")
        return ESCAPES[match[1]]

    return re.sub(r"\\(.?)", read, text, flags=re.DOTALL)


def device_name(text: str) -> str:
    """An argument type: a device by name. `choose_device` says whether it is there."""
    if not re.fullmatch("cpu|cuda(:[0-9]{1,4})?", text):
        raise _refused(text, "cpu, cuda or cuda:N")
    return text


class Different(argparse.Action):
    """An option's several values, of which no two are equal, once: a second list would replace the first one."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest, self.default) is not self.default:
            raise argparse.ArgumentError(self, "given twice: expected once, with all values behind it")
        for i, value in enumerate(values):
            if any(_equal(value, other) for other in values[:i]):
                raise argparse.ArgumentError(self, f"{shown(value)} is given twice: leave one of them out")
        setattr(namespace, self.dest, values)


def _equal(value: Any, other: Any) -> bool:
    """Whether they are one value, or names of one file."""
    if value == other:
        return True
    try:
        return os.path.samefile(value, other)
    except (OSError, TypeError, ValueError):
        return False


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{shown(text)}: expected {expected}")


class Settings(argparse.Action):
    """NAME=VALUE pairs, each name once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        name, value = values
        found = dict(getattr(namespace, self.dest, {}))
        if name in found:
            raise argparse.ArgumentError(self, f"{shown(name)} is given twice: leave one of them out")
        setattr(namespace, self.dest, {**found, name: value})


def column(text: str) -> tuple[str, str]:
    """THEIRS=OURS: a key of the files, and the one that it stands for."""
    theirs, mark, ours = text.rpartition("=")
    if not mark or not theirs or not ours:
        raise _refused(text, "COLUMN=KEY, such as question=prompt")
    return theirs, ours


class Renamed(Different):
    """Several such pairs, each column once, as a dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        names = [theirs for theirs, _ in values]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise argparse.ArgumentError(self, f"{shown(twice)} is given twice: leave one of them out")
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, dict(values))


def name_and_value(text: str) -> tuple[str, Any]:
    """A setting of an objective, which knows what it may be."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise _refused(text, "NAME=VALUE, such as beta=0.1")
    for kind in (ANY_WHOLE, ANY):
        try:
            return name, kind.parse(value)
        except ValueError:
            pass
    return name, value
