"""What all pictures share: size, colours, legend, and bytes that depend on the data alone.

matplotlib is imported on use, with its own canvas and no pyplot, so that nothing of the caller's plotting state
changes. Colours are Okabe and Ito's, which stay apart for colour-blind readers.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

from kunbr_fast.files import atomic
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import MAKER

logger = logging.getLogger(__name__)

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
COLOURS = (ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
GRID = "#E3E3E3"
SIZE, DPI = (9.0, 4.8), 200


def canvas(size: tuple[float, float] = SIZE, dpi: int = DPI):
    """A figure without axes, `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes, grid: str = "y") -> None:
    """grid: the axis that has grid lines: "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_size(12.5)
    axes.yaxis.label.set_size(12.5)
    axes.title.set_size(15)


def single(size: tuple[float, float] = SIZE, grid: str = "y", dpi: int = DPI):
    """A figure and its one axes."""
    figure = canvas(size, dpi)
    axes = figure.add_subplot()
    style(axes, grid)
    return figure, axes


def legend(axes, loc: str = "lower left", bbox_to_anchor: tuple = (-0.01, 1.0), **options):
    """A legend between title and axes, where it can cover nothing."""
    return axes.legend(
        loc=loc,
        bbox_to_anchor=bbox_to_anchor,
        frameon=False,
        fontsize=11,
        borderaxespad=0.3,
        columnspacing=1.4,
        **options,
    )


def label(text: str, length: int) -> str:
    """A name as it stands in a picture: one line, cut, its dollars no formula. matplotlib leaves out what begins with
    "_"."""
    text = plain(text, 1000)
    text = text if len(text) <= length else text[: length - 1] + "…"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def drawn(path: str | Path, plot: Callable[[], None], what: str = "picture") -> bool:
    """Whether plot() made its picture, or `what` it is, at `path`. Why not is said in one line: what a picture shows is
    not lost with it."""
    try:
        plot()
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        logger.warning(f"{plain(path)}: the {what} could not be drawn: {shown(str(why), 200)[1:-1]}")
        return False
    return True


def save(figure, path: str | Path) -> None:
    """A PNG at `path`."""
    with atomic.atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of characters that the font lacks
        # No version and no time: the same data gives the same bytes. By the name we know our own pictures.
        figure.savefig(file, format="png", metadata={"Software": MAKER})
