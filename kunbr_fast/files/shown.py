"""How a value or a name stands in a message: one line, cut, nothing in it that a terminal obeys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

LEVELS = 6


def shown(value: Any, limit: int = 60) -> str:
    """`repr(value)` cut to `limit` characters. The work is bounded too, however large or nested the value is: of a
    file's 394 bytes YAML's aliases make a value whose whole repr fills the memory."""
    text, pieces = "", _pieces(value, limit, LEVELS)
    while len(text) <= limit and (piece := next(pieces, None)) is not None:
        text += piece
    return _cut(text, limit)


def plain(name: Any, limit: int = 300) -> str:
    """A name or path without quotes, control characters and what turns the direction of text escaped."""
    text = str(name)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-(limit // 2) :]}"  # of a path both ends tell
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: max(0, limit - 3)]}..."


def _pieces(value: Any, limit: int, levels: int) -> Iterator[str]:
    if isinstance(value, (str, bytes, bytearray)):
        yield repr(value[: limit + 1])  # escapes whatever is not printable
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        yield f"an integer of {value.bit_length()} bits"  # more than 4300 digits Python does not even print
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
        yield from _of_many(value, limit, levels - 1)
    elif hasattr(type(value), "__len__") or hasattr(type(value), "__iter__"):
        yield f"<{type(value).__name__}>"  # a tensor, say, on a device
    else:
        yield plain(" ".join(repr(value).split()), 2 * limit)


def _of_many(value: Any, limit: int, levels: int) -> Iterator[str]:
    ends = {list: "[]", tuple: "()"}.get(type(value), "{}")
    if levels < 0:
        yield f"{ends[0]}...{ends[1]}"
        return
    yield ends[0]
    for number, item in enumerate(itertools.islice(value, limit)):
        yield ", " if number else ""
        yield from _pieces(item, limit, levels)
        if isinstance(value, Mapping):
            yield ": "
            yield from _pieces(value[item], limit, levels)
    yield "," + ends[1] if isinstance(value, tuple) and len(value) == 1 else ends[1]
