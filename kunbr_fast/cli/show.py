"""`--show K`: samples as the model reads them, the tokens that have a loss marked. Nothing is computed or written."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from kunbr_fast.cli.argument_types import number
from kunbr_fast.cli.terminal import show
from kunbr_fast.data import IGNORE, Sample, encode_named
from kunbr_fast.data.text import say_separator
from kunbr_fast.files.model_config import text_of
from kunbr_fast.files.models import ModelFolder, load_tokenizer
from kunbr_fast.files.shown import plain
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.values import COUNT, least

BRACKETS, COLOUR = ("⟦", "⟧"), ("\x1b[1;4;32m", "\x1b[0m")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A set of records. alternate: the kind of second answer that an objective wants, as in `encode`."""

    name: str
    records: Sequence[dict]
    target: str
    alternate: str | None = None


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show",
        type=number(COUNT),
        metavar="K",
        help="print the first K samples of each set as the model reads them, the tokens that have a loss marked, and "
        "end: all records are read, but no weights, and nothing is written",
    )


def show_samples(arguments: argparse.Namespace, config: KUnBRConfig, sets: Sequence[Shown]) -> dict[str, Any]:
    """The first --show samples of each set, and what all of them come to; printed, unless --json prints it."""
    tokenizer = load_tokenizer(arguments.model)
    limit = least(config.max_length, positions_of(arguments.model))
    say_separator(config.separator, *(one.records for one in sets))
    found = []
    for one in sets:
        samples, names, _ = encode_named(
            one.records, tokenizer, one.target, limit, one.alternate, config.seed, config.text()
        )
        first = zip(names[: arguments.show], samples)
        found.append(
            {
                "set": one.name,
                "target": one.target,
                "lines": len(one.records),
                "samples": len(samples),
                "tokens": sum(len(sample["input_ids"]) for sample in samples),
                "with_loss": sum(map(with_loss, samples)),
                "shown": [{"where": name, **described(sample, tokenizer)} for name, sample in first],
            }
        )
    if not arguments.json:
        marks = marks_of_loss()
        for entry in found:
            _print(entry, limit, marks)
    return {"max_length": limit, "sets": found}


def positions_of(model: str) -> int | None:
    """How many tokens a sample of the model has at most; None where its config.json does not say."""
    return getattr(text_of(ModelFolder(model).configuration()), "max_position_embeddings", None)


def with_loss(sample: Sample) -> int:
    """How many tokens have a loss: nothing predicts the first one."""
    return int((sample["labels"][1:] != IGNORE).sum())


def described(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """Its tokens counted, and its text in parts: each with whether it has a loss."""
    ids = sample["input_ids"].tolist()
    counts = [False, *(sample["labels"][1:] != IGNORE).tolist()]
    found = {"tokens": len(ids), "with_loss": sum(counts), "parts": _parts(ids, counts, tokenizer)}
    return found | ({"alternate": described(sample["alternate"], tokenizer)} if "alternate" in sample else {})


def _parts(ids: list[int], counts: list[bool], tokenizer: Any) -> list[dict[str, Any]]:
    """The text in parts, each with whether its tokens have a loss."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ends = [i for i in range(1, len(ids)) if counts[i] != counts[i - 1]] + [len(ids)]
    parts, first, before = [], 0, ""
    for end in ends:
        # A token alone may be another text than behind the others. Of a character that tokens share, the last one's.
        whole = text(ids[:end])
        known = whole if end == len(ids) else whole.rstrip("\ufffd")
        own = known[len(before) :] if known.startswith(before) else text(ids[first:end])
        parts.append({"text": own, "loss": counts[first]})
        first, before = end, known
    return parts


def marks_of_loss() -> tuple[str, str]:
    """What stands before and behind what has a loss."""
    plain_terminal = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return COLOUR if sys.stdout.isatty() and not plain_terminal else BRACKETS


def _print(entry: dict[str, Any], limit: int | None, marks: tuple[str, str]) -> None:
    most = "" if limit is None else f", at most {limit} tokens each"
    counts = ", ".join(f"{entry[key]} {key[: -1 if entry[key] == 1 else None]}" for key in ("lines", "samples"))
    begin, end = marks
    print(f"{entry['set']}: {counts}{most}; {_sizes(entry)} {begin}marked{end} (target {entry['target']})")
    for one in entry["shown"]:
        show(f"{one['where']}: {_sizes(one)}")
        print_text(one, marks)
        if other := one.get("alternate"):
            show(f"its alternate: {_sizes(other)}")
            print_text(other, marks)


def _sizes(entry: dict[str, Any]) -> str:
    return f"{entry['tokens']} tokens, {entry['with_loss']} with a loss"


def print_text(one: dict[str, Any], marks: tuple[str, str]) -> None:
    """Each line of the text behind a bar; where one ends, "\\n" stands, and for a backslash two."""
    written = ""
    for part in one["parts"]:
        begin, end = marks if part["loss"] else ("", "")
        lines = "".join(map(_escaped, part["text"])).split("\n")
        written += "\n".join(f"{begin}{line}{end}" if line else "" for line in lines)
    print(*(f"  | {line}" for line in written.removesuffix("\n").split("\n")), sep="\n", flush=True)


def _escaped(character: str) -> str:
    """As a terminal shows it without obeying it, and unlike a mark of ours."""
    if character == "\n":
        return "\\n\n"
    if character == "\\":
        return "\\\\"
    return f"\\u{ord(character):04x}" if character in BRACKETS else plain(character)
