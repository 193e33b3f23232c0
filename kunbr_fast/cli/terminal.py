"""What a command tells: lines on a terminal, in which a name cannot do what a control character does."""

from __future__ import annotations

import logging
import re
import sys

from kunbr_fast.files.shown import plain

LONGEST = 4000  # characters of a line
# The library's messages name parameters, as `name=` or `name=True`. Those that are options here:
OPTIONS = {
    "resume", "overwrite", "unlearned", "stream", "forget", "retain", "gpu_memory", "gpu", "gpus", "overlap",
    "equal_choices", "split_long", "preset",
}  # fmt: skip


def show(*lines: str) -> None:
    """Lines on standard output."""
    print(*(plain(line, LONGEST) for line in lines), sep="\n", flush=True)


def say(text: str) -> None:
    """A line on standard error."""
    print(plain(with_options(text), LONGEST), file=sys.stderr, flush=True)


def with_options(text: str) -> str:
    """A message of the library, with `--gpu x` for `gpu=x`, `--resume` for `resume=True`, `--no-x` for `x=False`; of
    one that names both, as `gpu=, --gpu x`, the option."""

    def option(found: re.Match) -> str:
        name, value = found.groups()
        if name not in OPTIONS:
            return found[0]
        option = name.replace("_", "-")
        if value == "False":
            return f"--no-{option}"
        return f"--{option}{'' if value == 'True' or not value else ' ' + value}"

    text = re.sub(r"\b[a-z_]+=, (?=--)", "", text)
    return re.sub(r"\b([a-z_]+)=(True\b|[^\s,;:)]*)", option, text)


class PlainLines(logging.Formatter):
    """A warning as such a line."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(with_options(super().format(record)), LONGEST)
