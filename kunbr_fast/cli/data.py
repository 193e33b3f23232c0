"""`kunbr-fast data check`: what files of records hold, before anything is trained or measured. Nothing is written."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from kunbr_fast.cli.argument_types import Different, Renamed, column, path_name
from kunbr_fast.cli.arguments import add_output, add_reading
from kunbr_fast.cli.show import described, marks_of_loss, positions_of, print_text, with_loss
from kunbr_fast.cli.terminal import show
from kunbr_fast.data import TARGETS, encode
from kunbr_fast.data.annotations import is_annotation
from kunbr_fast.data.content import EQUAL, equal_pair
from kunbr_fast.data.forms import keys_of, told
from kunbr_fast.data.items import Item
from kunbr_fast.data.messages import ASSISTANT
from kunbr_fast.data.overlap import common, facts, repeated
from kunbr_fast.data.published import item_files
from kunbr_fast.data.reading import File
from kunbr_fast.data.text import PLAIN, text_and_spans
from kunbr_fast.files.models import load_tokenizer
from kunbr_fast.files.shown import plain

SAMPLES = 3
LONGEST = 600  # characters of a sample that is printed; --json has all of them
OURS = ("_where", EQUAL)  # which reading puts beside a record
QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}

Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check"], metavar="check", help="look at files; nothing is written")
    parser.add_argument(
        "files",
        nargs="+",
        action=Different,
        metavar="FILE",
        help="JSON lines, JSON, CSV, Parquet, Arrow or a folder of datasets: records of ours, or files of TOFU, MUSE, "
        "WMDP, RWKU, KnowUnDo or RTT as their authors have them, known by their keys",
    )
    parser.add_argument(
        "--model",
        type=path_name,
        metavar="DIR",
        help="its tokenizer counts tokens, its config.json says how many a sample may have (default: characters)",
    )
    parser.add_argument(
        "--holdout-of",
        nargs="+",
        type=path_name,
        action=Different,
        metavar="F.jsonl",
        help="files that have no fact in common with the others: exit status 1 if one has",
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        help="the tokens that have a loss, as of unlearn (default: answer, of text lines all)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        type=column,
        action=Renamed,
        metavar="COLUMN=KEY",
        help="what keys of the files stand for, such as question=prompt answer=completion",
    )
    parser.add_argument("--chat", action="store_true", help="published questions and their answers as messages")
    add_reading(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    measure = _Measure(arguments.model, arguments.target)
    found, sides = [], []
    for file, items in _read(arguments.files, arguments):
        sides.append(_facts(items))
        measured = measure(_bar([item.record for item in items], f"measuring {plain(file.path, 40)}", arguments))
        found.append(_described(file, items) | measured)
    names = [entry["file"] for entry in found]
    overlaps = [
        _overlap(names[i], names[j], common(sides[i], sides[j]))
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    others = [
        _overlap(name, str(file.path), common(side, other))
        for file, items in _read(arguments.holdout_of or [], arguments)
        for other in [_facts(items)]
        for name, side in zip(names, sides)
    ]
    result = {
        "model": arguments.model,
        "positions": measure.positions,
        "files": found,
        "overlaps": [entry for entry in overlaps if entry["facts"]],
        "holdout_overlaps": [entry for entry in others if entry["facts"]],
    }
    arguments.status = 1 if result["holdout_overlaps"] else 0
    if not arguments.json:
        _print(result, arguments)
    return result


def _read(paths: Sequence[str], arguments: argparse.Namespace) -> Iterator[tuple[File, list[Item]]]:
    """Each file and its items. Equal choices get reading's warning; what is left out is told by `_described`."""
    if paths:
        given = (arguments.ignore_keys, "allow", arguments.columns, arguments.preset, arguments.chat)
        for file in item_files(paths, *given, say=lambda text: None):
            yield file, list(_bar(file, f"reading {plain(file.path, 40)}", arguments))


def _bar(values: Iterable[Value], what: str, arguments: argparse.Namespace) -> Iterable[Value]:
    """With a progress bar, where it takes more than two seconds."""
    return tqdm(values, desc=what, unit=" records", leave=False, delay=2, disable=arguments.quiet)


# ---------------------------------------------------------------- what a file holds


def _described(file: File, items: Sequence[Item]) -> dict[str, Any]:
    """Of a file that was read: its records by form, what nobody reads, and what it says twice."""
    records = [item.record for item in items]
    forms = Counter((item.form, told(keys_of(item.record))) for item in items)
    unread = Counter(key for record in records for key in record if is_annotation(key) and key not in OURS)
    alike = [record["_where"] for record in records if equal_pair(record.get("choices", ()))]
    return {
        "file": str(file.path),
        "records": len(items),
        "forms": [{"form": form, "record": kind, "records": count} for (form, kind), count in forms.items()],
        "paraphrases": sum(item.paraphrase is not None for item in items),
        "wrong_answers": sum(len(item.perturbed) for item in items),
        "left_out": dict(file.reader.left_out),
        "not_read": dict(unread),
        "repeated": _counted(repeated(records)),
        "equal_choices": _counted(alike),
    }


def _facts(items: Sequence[Item]) -> dict[Any, str]:
    return facts({"": [item.record for item in items]})


def _overlap(one: str, other: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {"files": [one, other], "facts": len(pairs), "first": pairs[0] if pairs else None}


def _counted(places: Sequence[Any]) -> dict[str, Any]:
    return {"records": len(places), "first": places[0] if places else None}


# ---------------------------------------------------------------- lengths and samples


class _Measure:
    """How long records are, in tokens of a model or in characters, and how the first ones are read."""

    def __init__(self, model: str | None, target: str | None):
        self.tokenizer = load_tokenizer(model) if model else None
        self.positions = positions_of(model) if model else None
        self.unit = "tokens" if model else "characters"
        self._target = target

    def __call__(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        sizes, samples, counted = [], [], 0
        for record in records:
            read = self._characters if self.tokenizer is None else self._tokens
            size, loss, parts = read(record, self._target or ("all" if keys_of(record) == ("text",) else "answer"))
            sizes.append(size)
            counted += loss
            if len(samples) < SAMPLES:
                samples.append({"where": record["_where"], self.unit: size, "with_loss": loss, "parts": parts()})
        return {
            "unit": self.unit,
            "lengths": {name: quantile(sizes, q) for name, q in QUANTILES.items()},
            "total": sum(sizes),
            "with_loss": counted,
            "too_long": None if self.positions is None else sum(size > self.positions for size in sizes),
            "samples": samples,
        }

    def _tokens(self, record: Mapping[str, Any], target: str) -> tuple[int, int, Callable[[], list]]:
        """How many there are, how many have a loss, and the text in parts."""
        (sample,) = encode([record], self.tokenizer, target)
        return len(sample["input_ids"]), with_loss(sample), lambda: described(sample, self.tokenizer)["parts"]

    def _characters(self, record: Mapping[str, Any], target: str) -> tuple[int, int, Callable[[], list]]:
        parts = _of_chat(record, target) if "messages" in record else _of_text(record, target)
        loss = sum(len(part["text"]) for part in parts if part["loss"])
        return sum(len(part["text"]) for part in parts), loss, lambda: parts


def _of_text(record: Mapping[str, Any], target: str) -> list[dict[str, Any]]:
    text, spans, _ = text_and_spans(record, None, target, PLAIN)
    ((first, stop),) = spans or [(0, len(text))]
    return _parts((text[:first], False), (text[first:stop], True), (text[stop:], False))


def _of_chat(record: Mapping[str, Any], target: str) -> list[dict[str, Any]]:
    """Its turns as they are; what a template writes around them is not known."""
    if target not in ("all", "answer"):
        raise ValueError(f"{record['_where']}: --target {target} of a chat takes --model: its template writes the text")
    turns = [(message["role"], message.get("content") or "") for message in record["messages"]]
    return _parts(*(
        part for role, content in turns
        for part in ((f"{role}: ", target == "all"), (content, target == "all" or role == ASSISTANT), ("\n", False))
    ))  # fmt: skip


def _parts(*parts: tuple[str, bool]) -> list[dict[str, Any]]:
    return [{"text": text, "loss": loss} for text, loss in parts if text]


def quantile(sizes: Iterable[int], share: float) -> int:
    """The least size that at least this share of them does not exceed (the nearest rank)."""
    ordered = sorted(sizes)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


# ---------------------------------------------------------------- what is printed


def _print(result: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    marks = marks_of_loss()
    for entry in result["files"]:
        show(*_lines(entry, result["positions"]))
        begin, end = marks
        print(f"  the first {len(entry['samples'])}, what has a loss {begin}marked{end}:", flush=True)
        for sample in entry["samples"]:
            show(f"{sample['where']}: {sample[entry['unit']]} {entry['unit']}, {sample['with_loss']} with a loss")
            print_text({"parts": _cut(sample["parts"])}, marks)
    for entry in result["overlaps"]:
        show(
            _said(entry, "a run refuses them in two forget files, or forgotten and kept (--overlap allow lets that be)")
        )
    for entry in result["holdout_overlaps"]:
        show(_said(entry, "a holdout set has none of them"))
    if arguments.holdout_of and not result["holdout_overlaps"]:
        show("no fact in common with the files of --holdout-of")


def _said(entry: Mapping[str, Any], why: str) -> str:
    (one, other), (first, second) = entry["files"], entry["first"]
    return f"{one} and {other}: {_number(entry['facts'], 'fact')} in both, such as {first} and {second}: {why}"


def _lines(entry: Mapping[str, Any], positions: int | None) -> Iterator[str]:
    forms = ", ".join(f"{each['records']} {each['form']} ({each['record']})" for each in entry["forms"])
    more = [(entry["paraphrases"], "paraphrase"), (entry["wrong_answers"], "wrong answer")]
    beside = "".join(f", {_number(count, what)}" for count, what in more if count)
    yield f"{plain(entry['file'])}: {_number(entry['records'], 'record')}: {forms}{beside}"
    for what, counts in (("left out", entry["left_out"]), ("not read", entry["not_read"])):
        if counts:
            yield f"  {what}: {', '.join(f'{plain(key, 40)} ({count})' for key, count in counts.items())}"
    if (twice := entry["repeated"])["records"]:
        first, again = twice["first"]
        yield f"  {_number(twice['records'], 'record')} with the text of an earlier one, such as {again} and {first}"
    least, median, p95, most = entry["lengths"].values()
    yield (
        f"  {entry['unit']}: {least} to {most}, median {median}, 95 % at most {p95}; {entry['total']} in all, "
        f"{entry['with_loss']} with a loss"
    )
    if entry["too_long"]:
        yield (
            f"  {entry['too_long']} longer than the model's {positions} positions: text lines are cut into several "
            "samples, others refused"
        )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _cut(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first LONGEST characters, and how many more there are."""
    found, room = [], LONGEST
    for part in parts:
        found.append({**part, "text": part["text"][:room]})
        room -= len(found[-1]["text"])
    rest = sum(len(part["text"]) for part in parts) - LONGEST
    return found if rest <= 0 else [*found, {"text": f" ... ({rest} more characters)", "loss": False}]
