"""Charts as inline SVG: lines and bars, each with a legend and its figures as a table.

Each is drawn twice, for narrow and for broad screens, of which the style sheet shows one: so text keeps its size. No
difference is shown by colour alone: lines have dashes and markers, bars their place. Names stand in the legend, which
is HTML and wraps; in the drawing are figures and short words alone. No `id` is used, so charts cannot clash.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from kunbr_fast.evaluation.figures import COLOURS
from kunbr_fast.pages.markup import Markup, e, folded, join, paragraph, table, tag

DASHES = (None, "9 4", "3 3", "10 3 3 3", "6 2", "2 5")
SIZES = {"narrow": (340, 290), "broad": (760, 330)}  # units, of 0.85 to 1.4 pixels
LEFT, RIGHT, TOP, BOTTOM = (
    40,
    14,
    44,
    42,
)  # at the left: at least  # above: the label of the axis, then that of a bracket
CHARACTER = 7.8  # of the labels, at most: units (DejaVu Sans is wide)


@dataclasses.dataclass(frozen=True)
class Series:
    """name: in legend and table. y: None where there is no value (the line is broken there). errors: standard errors.
    look: number of its colour, dashes and marker. thin: not in the legend. ring: the index of a point that is ringed.
    line: False for points alone."""

    name: Any
    x: Sequence[float]
    y: Sequence[float | None]
    errors: Sequence[float | None] | None = None
    look: int = 0
    thin: bool = False
    ring: int | None = None
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Bars:
    """kind: the class of its bars: "s0" ..., "first", "hollow". values: one for each category, None for no bar."""

    name: Any
    values: Sequence[float | None]
    errors: Sequence[float | None] | None = None
    kind: str = "s0"


@dataclasses.dataclass(frozen=True)
class Chart:
    """What all charts have. level: (y, name) of a line across, such as guessing. note: below. precision: digits of the
    table's figures. whole_x: x are whole numbers. breaks: x of lines from top to bottom."""

    title: str
    x_label: str
    y_label: str
    level: tuple[float, str] | None = None
    note: Any = ""
    from_zero: bool = True
    top: float | None = None
    precision: str = ".4g"
    breaks: Sequence[float] = ()


# ---------------------------------------------------------------- scales


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(12, 2 - math.floor(math.log10(step)))  # of a step of 1e-16, as distances of one model to itself have
    return [round(number * step, places) for number in range(first, last + 1)]


@dataclasses.dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float  # where `low` is drawn
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclasses.dataclass(frozen=True)
class Plane:
    """Where a chart is drawn: its size, where its axes begin, and the scale of y with its marks."""

    width: int
    height: int
    left: float
    y: Scale
    marks: Sequence[float]

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


def _plane(chart: Chart, values: Sequence[float], width: int, height: int) -> Plane:
    level = [chart.level[0]] if chart.level else []
    low, high = min([*values, *level], default=0.0), max([*values, *level], default=1.0)
    low = min(low, 0.0) if chart.from_zero else low
    marks = ticks(low, max(high, chart.top or high), 5)
    left = max(LEFT, 14 + CHARACTER * max(len(_label(mark)) for mark in marks))
    return Plane(width, height, left, Scale(marks[0], marks[-1], height - BOTTOM, TOP), marks)


def _label(value: float) -> str:
    return f"{value:g}".replace("-", "−")


# ---------------------------------------------------------------- pieces of SVG


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _element(name: str, content: str = "", **attributes: Any) -> str:
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{e(v)}"' for k, v in attributes.items() if v is not None)
    return f"<{name}{given}>{content}</{name}>" if content else f"<{name}{given}/>"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return _element("text", e(text), x=_n(x), y=_n(y), text_anchor=anchor)


def _path(points: Sequence[tuple[float, float]], **attributes: Any) -> str:
    return _element("path", d="M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points), **attributes)


def _marker(look: int, x: float, y: float, r: float = 4.2) -> str:
    """One of six shapes; past six colours another shape goes with each."""
    kind = (look + look // len(COLOURS)) % 6
    if kind == 0:
        return _element("circle", cx=_n(x), cy=_n(y), r=_n(r), class_="mark")
    if kind == 1:
        return _element("rect", x=_n(x - r), y=_n(y - r), width=_n(2 * r), height=_n(2 * r), class_="mark")
    s = r * 1.35
    shapes = (
        [(x, y - s), (x + s, y), (x, y + s), (x - s, y)],
        [(x, y - s), (x + s, y + r), (x - s, y + r)],
        [(x, y + s), (x + s, y - r), (x - s, y - r)],
        [(x - s, y - s / 3), (x - s / 3, y - s / 3), (x - s / 3, y - s), (x + s / 3, y - s), (x + s / 3, y - s / 3),
         (x + s, y - s / 3), (x + s, y + s / 3), (x + s / 3, y + s / 3), (x + s / 3, y + s), (x - s / 3, y + s),
         (x - s / 3, y + s / 3), (x - s, y + s / 3)],
    )  # fmt: skip
    return _element("polygon", points=" ".join(f"{_n(a)},{_n(b)}" for a, b in shapes[kind - 2]), class_="mark")


def _error(x: float, low: float, high: float) -> str:
    ends = f"M{_n(x - 3)} {_n(low)}H{_n(x + 3)}M{_n(x - 3)} {_n(high)}H{_n(x + 3)}M{_n(x)} {_n(low)}V{_n(high)}"
    return _element("path", d=ends, class_="error")


def _frame(chart: Chart, on: Plane) -> list[str]:
    """Grid, labels of the axes, and the level."""
    parts = [_text(2, 14, chart.y_label, "start"), _text(on.right, on.height - 6, chart.x_label, "end")]
    for mark in on.marks:
        parts.append(_across(on, mark, "axis" if mark == 0 else "grid"))
        parts.append(_text(on.left - 6, on.y(mark) + 4, _label(mark), "end"))
    return [*parts, _across(on, chart.level[0], "level")] if chart.level else parts


def _across(on: Plane, value: float, kind: str) -> str:
    return _path([(on.left, on.y(value)), (on.right, on.y(value))], class_=kind)


def _svg(width: int, height: int, label: str, kind: str, parts: Sequence[str]) -> Markup:
    content = "".join(parts)
    return Markup(_element("svg", content, viewBox=f"0 0 {width} {height}", class_=kind, role="img", aria_label=label))


def _key(name: Any, drawing: Sequence[str], class_: str) -> Markup:
    """An entry of a legend."""
    picture = _element("svg", "".join(drawing), viewBox="0 0 34 14", class_=class_, aria_hidden="true")
    return tag("li", Markup(picture + tag("span", name)))


def _figure(chart: Chart, keys: Sequence[Markup], draw: Callable[[int, int], list[str]], data: Markup) -> Markup:
    if chart.level:
        keys = [*keys, _key(chart.level[1], [_path([(1, 7), (33, 7)], class_="level")], "")]
    label = f"{chart.title}: {chart.y_label}, by {chart.x_label}. The figures are in the table below."
    drawn = [_svg(width, height, label, kind, draw(width, height)) for kind, (width, height) in SIZES.items()]
    legend = tag("ul", join(keys), class_="legend") if len(keys) else ""
    parts = [tag("figcaption", chart.title), legend, *drawn, paragraph(chart.note, "soft")]
    return tag("figure", join([*parts, folded("The figures of this chart", data)]))


# ---------------------------------------------------------------- lines


def lines(chart: Chart, series: Sequence[Series]) -> Markup:
    """Empty without a point."""
    points = [(x, y) for one in series for x, y in zip(one.x, one.y) if y is not None]
    if not points:
        return Markup("")
    ends = [y + way * (error or 0.0) for one in series for y, error in _with_errors(one) for way in (-1, 1)]
    xs = sorted({x for x, _ in points})

    def draw(width: int, height: int) -> list[str]:
        on = _plane(chart, ends, width, height)
        pad = 0.02 * (xs[-1] - xs[0]) or 0.5
        x = Scale(xs[0] - pad, xs[-1] + pad, on.left, on.right)
        parts = _frame(chart, on)
        for mark in _whole_ticks(xs, on.right - on.left):
            parts.append(_text(x(mark), on.bottom + 17, _label(mark)))
        for at in chart.breaks:
            parts.append(_path([(x(at), TOP), (x(at), on.bottom)], class_="grid"))
        for one in sorted(series, key=lambda one: not one.thin):
            parts += _line(one, x, on.y)
        return parts

    keys = [_series_key(one) for one in series if not one.thin]
    return _figure(chart, keys, draw, _series_table(chart, series))


def _whole_ticks(xs: Sequence[float], width: float) -> list[float]:
    """Some of the whole numbers from the first x to the last, as many as have room."""
    longest = max(len(f"{x:g}") for x in (xs[0], xs[-1]))
    room = max(2, int(width / (CHARACTER * longest + 12)))
    if xs[-1] - xs[0] < 1:
        return [xs[0]]
    marks = [mark for mark in ticks(xs[0], xs[-1], room) if xs[0] <= mark <= xs[-1] and mark == int(mark)]
    return marks or [xs[0], xs[-1]]


def _with_errors(one: Series | Bars) -> list[tuple[float, float | None]]:
    values = one.y if isinstance(one, Series) else one.values
    return [(v, error) for v, error in zip(values, one.errors or [None] * len(values)) if v is not None]


def _line(one: Series, x: Scale, y: Scale) -> list[str]:
    """A line, broken where a value is missing, its points and their errors."""
    places, pieces, piece = [], [], []
    for at, value in zip(one.x, one.y):
        place = None if value is None else (x(at), y(value))
        places.append(place)
        if place is None:
            piece = []
        else:
            if not piece:
                pieces.append(piece)
            piece.append(place)
    parts = []
    if one.line:
        style = dict(class_="line thin" if one.thin else "line", stroke_dasharray=_dashes(one.look))
        parts += [_path(piece, **style) for piece in pieces if len(piece) > 1]
    for place, value, error in zip(places, one.y, one.errors or [None] * len(places)):
        if place is not None and error:
            parts.append(_error(place[0], y(value - error), y(value + error)))
    if not one.thin and len(places) <= 60:
        parts += [_marker(one.look, *place) for place in places if place is not None]
    if one.ring is not None and places[one.ring] is not None:
        at = places[one.ring]
        parts.append(_element("circle", cx=_n(at[0]), cy=_n(at[1]), r="9", class_="ring"))
    return [_element("g", "".join(parts), class_=_look(one.look))] if parts else []


def _dashes(look: int) -> str | None:
    return DASHES[(look + look // len(COLOURS)) % len(DASHES)]


def _look(look: int) -> str:
    return f"s{look % len(COLOURS)}"


def _series_key(one: Series) -> Markup:
    drawing = [_path([(1, 7), (33, 7)], class_="line", stroke_dasharray=_dashes(one.look))] if one.line else []
    return _key(one.name, [*drawing, _marker(one.look, 17, 7)] if len(one.x) <= 60 else drawing, _look(one.look))


def _series_table(chart: Chart, series: Sequence[Series]) -> Markup:
    """A row a curve where there are many, else a row a point."""
    xs = sorted({x for one in series for x in one.x})
    found = [dict(zip(one.x, zip(one.y, one.errors or [None] * len(one.y)))) for one in series]

    def cell(of: dict, x: float) -> str:
        value, error = of.get(x, (None, None))
        return _said(value, error, chart.precision)

    if len(series) > 4 and len(xs) <= 60:
        rows = [[one.name, *[cell(of, x) for x in xs]] for one, of in zip(series, found)]
        return table([chart.x_label, *[f"{x:g}" for x in xs]], rows, caption=chart.y_label)
    rows = [[f"{x:g}", *[cell(of, x) for of in found]] for x in xs]
    return table([chart.x_label, *[one.name for one in series]], rows, caption=chart.y_label)


def _said(value: float | None, error: float | None, precision: str) -> str:
    if value is None:
        return ""
    return f"{value:{precision}}" + (f" ± {error:{precision}}" if error is not None else "")


# ---------------------------------------------------------------- bars


def bars(
    chart: Chart,
    categories: Sequence[str],
    groups: Sequence[Bars],
    *,
    together: bool = False,
    brackets: Sequence[tuple[int, int, str]] = (),
    written: str | None = None,
) -> Markup:
    """categories: short words or numbers under the bars. together: the groups stand at the same places, each category
    being of one of them. brackets: (first, last, label) over categories. written: how each bar's figure stands above
    it, None for not."""
    found = [pair for one in groups for pair in _with_errors(one)]
    if not found:
        return Markup("")
    ends = [value + way * (error or 0.0) for value, error in found for way in (-1, 1)]

    def draw(width: int, height: int) -> list[str]:
        on = _plane(chart, ends, width, height)
        slot = (on.right - on.left) / len(categories)
        parts = _frame(chart, on)
        step = max(1, math.ceil((max(map(len, categories)) * CHARACTER + 6) / slot))
        for i in range(0, len(categories), step):
            parts.append(_text(on.left + (i + 0.5) * slot, on.bottom + 17, categories[i]))
        for number, one in enumerate(groups):
            parts += _bars(one, on, slot, (0, 1) if together else (number, len(groups)), written)
        for first, last, label in brackets:
            ends_at = on.left + (first + 0.08) * slot, on.left + (last + 0.92) * slot
            parts += _bracket(*ends_at, on.y(_top(groups, first, last)) - 8, label)
        return parts

    keys = [_key(one.name, [_swatch(one.kind)], _class(one.kind)) for one in groups if _with_errors(one)]
    return _figure(chart, keys if len(keys) > 1 or together else [], draw, _bars_table(chart, categories, groups))


def _class(kind: str) -> str | None:
    return None if kind == "hollow" else kind


def _swatch(kind: str) -> str:
    return _element("rect", x="9", y="1", width="16", height="12", class_="hollow" if kind == "hollow" else "fill")


def _bars(one: Bars, on: Plane, slot: float, place: tuple[int, int], written: str | None) -> list[str]:
    """place: (number, of how many) in each category's slot."""
    number, places = place
    width, parts = min(0.8 * slot / places, 70), []
    for i, (value, error) in enumerate(zip(one.values, one.errors or [None] * len(one.values))):
        if value is None:
            continue
        left = on.left + (i + 0.5) * slot + (number - places / 2) * width
        top, bottom = sorted((on.y(value), on.y(0.0)))
        box = dict(x=_n(left + 0.5), y=_n(top), width=_n(max(width - 1, 1)), height=_n(bottom - top))
        parts.append(_element("rect", **box, class_="hollow" if one.kind == "hollow" else "fill"))
        if error:
            parts.append(_error(left + width / 2, on.y(value - error), on.y(value + error)))
        if written is not None:
            parts.append(_text(left + width / 2, on.y(value + (error or 0.0)) - 5, f"{value:{written}}"))
    return [_element("g", "".join(parts), class_=_class(one.kind))] if parts else []


def _top(groups: Sequence[Bars], first: int, last: int) -> float:
    found = [0.0]
    for one in groups:
        for i in range(first, last + 1):
            if one.values[i] is not None:
                found.append(one.values[i] + ((one.errors[i] or 0.0) if one.errors else 0.0))
    return max(found)


def _bracket(left: float, right: float, at: float, label: str) -> list[str]:
    ends = [(left, at + 5), (left, at), (right, at), (right, at + 5)]
    fits = CHARACTER * len(label) < right - left  # else it would stand over its neighbour's
    return [_path(ends, class_="axis"), *[_text((left + right) / 2, at - 4, label)] * fits]


def _bars_table(chart: Chart, categories: Sequence[str], groups: Sequence[Bars]) -> Markup:
    rows = []
    for i, name in enumerate(categories):
        cells = []
        for one in groups:
            error = one.errors[i] if one.errors is not None else None
            cells.append(_said(one.values[i], error, chart.precision))
        rows.append([name, *cells])
    return table([chart.x_label, *[one.name for one in groups]], rows, caption=chart.y_label)
