"""A run, an evaluation or several of them as one HTML file: no script, nothing loaded, all text escaped.

    write_page(["OUT"], Path("OUT/report.html"))

The same folders give the same bytes: nothing of the day or the machine is in the page.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

from kunbr_fast.files.atomic import atomic_write
from kunbr_fast.files.shown import plain
from kunbr_fast.files.target import GENERATOR
from kunbr_fast.pages import compare, measures, pictures, sections
from kunbr_fast.pages.markup import Markup, e, join, listed, paragraph, tag
from kunbr_fast.pages.sources import Source, read
from kunbr_fast.pages.style import STYLE
from kunbr_fast.version import __version__

NAME = "report.html"  # of a run's page, in its folder
# A browser may run and load nothing, whatever is in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
Section = tuple[str, str, Markup]  # (anchor, heading, content)


def write_page(folders: Sequence[str | os.PathLike], path: str | os.PathLike, title: str | None = None) -> None:
    """Writes the page of one folder of `kunbr-fast unlearn`, `baseline` or `evaluate`, or of several side by side, to
    `path`, whole or not at all. title: its heading (default: the folders' names).

    ValueError, one line that names the folder or file, where there is nothing to show or a file is damaged.
    """
    text = page_of([read(folder) for folder in folders], title)
    with atomic_write(path) as file:
        file.write(text.encode())


def page_of(sources: Sequence[Source], title: str | None = None) -> str:
    """The HTML. ValueError without a source."""
    if not sources:
        raise ValueError("no folders to report: expected one or more")
    if len(sources) == 1:
        (source,) = sources
        title = title or f"Unlearning report: {plain(source.name, 120)}"
        return _page(title, _of_one(source), _made_of([source]))
    sources = _distinct(sources)
    title = title or f"Unlearning runs compared: {', '.join(plain(source.name, 60) for source in sources)}"
    return _page(title, compare.of_several(sources), _made_of(sources))


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """With different names."""
    seen: dict[str, int] = {}
    found = []
    for source in sources:
        seen[source.name] = number = seen.get(source.name, 0) + 1
        found.append(source if number == 1 else dataclasses.replace(source, name=f"{source.name} ({number})"))
    return found


def _of_one(source: Source) -> Iterable[Section]:
    figures = (source.evaluation or {}).get("figures", ())
    run = source.report is not None
    return [
        ("headline", "In short", sections.headline(source)),
        ("asked", "What was asked", sections.asked(source)),
        ("before-after", "Before and after", sections.before_and_after(source)),
        ("kept", "Retained and lost", sections.kept_and_lost(source)),
        ("relearning", "What comes back under attack", sections.relearning(source)),
        ("examples", "Examples", sections.examples(source)),
        ("density", "Where the knowledge sits", pictures.density(source) if run else Markup("")),
        ("losses", "Losses by stage", pictures.losses(source) if run else Markup("")),
        ("depth", "Layer by layer, sample by sample", pictures.depth(figures)),
        ("measures", "All measures", measures.every_measure(source)),
        ("lm-eval", "General ability", measures.lm_eval(source)),
        ("seconds", "Seconds a stage", sections.seconds(source)),
        ("versions", "Versions and checksums", sections.versions(source)),
        ("limits", "What these figures do not show", sections.not_shown(source)),
    ]


def _made_of(sources: Sequence[Source]) -> str:
    files = ", ".join(f"{source.name}/{name}" for source in sources for name in source.checksums)
    return f"Made by kunbr-fast {__version__} of {files}."


def _page(title: str, found: Iterable[Section], made_of: str) -> str:
    found = [section for section in found if section[2]]
    links = listed(tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in found)
    body = [
        tag("header", tag("h1", title)),
        tag("nav", links, aria_label="sections"),
        tag("main", join(_section(*section) for section in found)),
        tag("footer", paragraph(made_of, "soft")),
    ]
    head = [
        '<meta charset="utf-8">',
        GENERATOR,
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{e(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    head_text = "\n".join(head)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head_text}\n</head>\n<body>\n{join(body)}\n</body>\n</html>\n'


def _section(anchor: str, heading: str, content: Markup) -> Markup:
    return tag("section", join([tag("h2", heading, id=anchor), content]))
