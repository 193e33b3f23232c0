"""HTML by parts: text that cannot be markup, figures with their standard errors, tables that scroll in their own box.

A `Markup` is HTML; every other value that stands in a cell or an item is text, and escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kunbr_fast.files.shown import plain

# Lines; joiners, in words of Persian and in emoji; spaces of all widths: none of them turns anything around.
KEPT = "\n\u200c\u200d\u00a0\u2000-\u200a\u202f\u205f\u3000"
LONGEST = 4000  # characters of a text
NOTHING = "–"


class Markup(str):
    """HTML as it is to stand in the page."""


def visible(value: Any, longest: int = LONGEST) -> str:
    """A text of several lines; control characters, and what turns the direction of text, as escapes."""

    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest // 2]} [...] {text[-(longest // 2) :]}"
    parts = re.split(f"([{KEPT}])", text)
    return "".join(part if i % 2 else plain(part, len(part)) for i, part in enumerate(parts))


def e(value: Any, longest: int = LONGEST) -> Markup:
    """Escaped, also for an attribute in quotes."""
    return value if isinstance(value, Markup) else Markup(html.escape(visible(value, longest), quote=True))


def tag(name: str, content: Any, **attributes: Any) -> Markup:
    """tag("td", "a < b", class_="text"). Attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{e(value)}"' for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{given}>{e(content)}</{name}>")


def join(parts: Iterable[Any], between: str = "\n") -> Markup:
    """Those that are not empty."""
    return Markup(between.join(e(part) for part in parts if part))


def words(text: Any) -> Markup:
    """What somebody wrote, in the direction of its own script."""
    return tag("bdi", text, dir="auto")


def code(text: Any) -> Markup:
    return tag("code", text)


def paragraph(content: Any, class_: str | None = None) -> Markup:
    return tag("p", content, class_=class_) if content else Markup("")


def listed(items: Iterable[Any], class_: str | None = None) -> Markup:
    lines = [tag("li", item) for item in items]
    return tag("ul", join(lines), class_=class_) if lines else Markup("")


def folded(summary: Any, content: Any) -> Markup:
    return tag("details", join([tag("summary", summary), content])) if content else Markup("")


def pairs(items: Mapping[str, Any] | Iterable[tuple[Any, Any]]) -> Markup:
    """Names and what they are."""
    items = items.items() if isinstance(items, Mapping) else items
    lines = [join([tag("dt", name), tag("dd", value)], "") for name, value in items if value not in (None, "")]
    return tag("dl", join(lines)) if lines else Markup("")


def table(
    header: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    texts: int = 1,
    caption: str | None = None,
    label: str | None = None,
) -> Markup:
    """The first `texts` columns are text, the first of them names its row; the others are figures. A row may be (class,
    cells). label: what it is called where a heading stands over it in place of a caption. Empty without rows."""
    lines = [_row(row, texts) for row in rows]
    if not lines:
        return Markup("")
    cells = [tag("th", name, scope="col", class_="t" if i < texts else None) for i, name in enumerate(header)]
    head = tag("thead", tag("tr", join(cells, "")))
    parts = [tag("caption", caption) if caption else "", head, tag("tbody", join(lines))]
    # a box that scrolls is reached by the keyboard
    return tag(
        "div", tag("table", join(parts)), class_="wide", tabindex="0", role="region", aria_label=caption or label
    )


def _row(row: Sequence[Any], texts: int) -> Markup:
    class_, cells = row if len(row) == 2 and isinstance(row[1], list) else (None, row)
    first = [tag("th", cells[0], scope="row", class_="t")]
    rest = [tag("td", cell, class_="t" if i < texts else None) for i, cell in enumerate(cells[1:], 1)]
    return tag("tr", join(first + rest, ""), class_=class_ or None)


# ---------------------------------------------------------------- figures


def figure(value: float | None, error: float | None = None, unit: str = "share") -> str:
    """With its standard error. unit: as of a `measures.registry.Measure`; a small share has two digits."""
    if value is None:
        return NOTHING
    small = unit == "share" and 0 < abs(value) < 0.00995
    return _written(value, error, (100.0, "\u00a0%", ".2g", ".1g") if small else _WAYS[unit if unit in _WAYS else ""])


def change(value: float | None, error: float | None = None, unit: str = "share") -> str:
    """A difference: of shares in points."""
    if value is None:
        return NOTHING
    scale, sign, *digits = _WAYS[unit if unit in _WAYS else ""]
    text = _written(value, error, (scale, " points" if sign else "", *digits))
    return f"+{text}" if value > 0 and float(text.split()[0].replace("−", "-")) > 0 else text


# Factor, sign, and how value and error are written. A figure and its error stay on one line.
_Way = tuple[float, str, str, str]
_WAYS: Mapping[str, _Way] = {
    "share": (100.0, "\u00a0%", ".1f", ".1f"),
    "points": (1.0, "\u00a0points", ".1f", ".1f"),
    "": (1.0, "", ".4g", ".2g"),
}


def _written(value: float, error: float | None, way: _Way) -> str:
    scale, sign, digits, of_error = way
    text = _number(scale * value, digits)
    text = text.replace("-", "−") if float(text) else text.lstrip("-")  # no minus zero
    return f"{text}{sign}" if error is None else f"{text}\u00a0±\u00a0{_number(scale * error, of_error)}{sign}"


def _number(value: float, digits: str) -> str:
    """Of significant digits no power of ten stands behind, up to a million."""
    text = f"{value:{digits}}"
    return f"{float(text):g}" if "e" in text else text


def count(number: int, what: str) -> str:
    return f"{number} {what.removesuffix('s') if number == 1 else what}"


def setting(value: Any) -> str:
    """As run.yaml has it, roughly."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting(each)}" for key, each in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
