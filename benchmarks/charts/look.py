"""What all pictures share: colours, sizes, names of files, and how texts and numbers are shortened."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.benchmarks.rows import Outcome
from kunbr_fast.evaluation.figures import BLUE, GREEN, GREY, ORANGE, label

OURS = (ORANGE, "#E69F00", "#CC79A7", "#8B2E00")
RIVALS = (BLUE, "#56B4E9", GREEN, GREY, "#1B3A57", "#00404D")
WIDTH, DPI = 9.0, 140  # inches; a report has many pictures: half the bytes of a README's
PAGES = 3  # pictures of a kind and suite; what does not fit on them is counted in the last one's title


def suites_of(cases: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(case.suite for case in cases))


def best(case: Outcome) -> list[dict]:
    """The fastest row of each side that has one."""
    return [row for row in (case.ours, *case.rivals[:1]) if row]


def side(row: Mapping[str, Any]) -> dict:
    """The style of its side."""
    return {"color": ORANGE if row["ours"] else BLUE}


def file_name(text: str) -> str:
    """A name that a file can have, another one for each text."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    return name if len(name) <= 60 else f"{name[:48]}-{zlib.crc32(text.encode()):08x}"


def page(index: int) -> str:
    """The end of a file's name."""
    return f"_{index + 1}" if index else ""


def more(count: int) -> str:
    """The end of a title."""
    return f" ({count} more in the CSV)" if count > 0 else ""


short = label


def number(value: float) -> str:
    """Three significant digits, and thousands in groups."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", " ")
