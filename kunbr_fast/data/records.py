"""Records: the lines of a JSONL file, read and checked.

A record has one of four forms:

    {"question": str, "choices": [str or int, ...], "answer": index}     a multiple-choice question
    {"text": str}                                                         a corpus line
    {"prompt": str, "completion": str}                                    a prompt and what should follow it
    {"messages": [{"role": str, "content": str}, ...]}                    a chat (needs the tokenizer's chat template)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.data.content import LETTERS, are_equal, check_choices, is_blank
from kunbr_fast.files.documents import parse_json, read_lines
from kunbr_fast.files.scalars import Unread
from kunbr_fast.files.shown import plain, shown

logger = logging.getLogger(__name__)


def load_records(paths: str | Path | Sequence[str | Path]) -> list[dict]:
    """Reads JSONL files into records; `record["_where"]` says where each came from ("file:line").

    Blank lines are skipped. Errors: ValueError "file:line: ..." for a line that is not JSON, has no known form or a
    wrong answer index; ValueError for a file without a record. One warning, with their number, for a file's questions
    of which some choices are equal.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ValueError("no file was given: expected at least one JSONL file")
    records = []
    for path in paths:
        name, count = plain(path), len(records)
        records += (parse_record(line, f"{name}:{number}") for number, line in read_lines(path))
        if len(records) == count:
            raise ValueError(f"{name}: empty: expected at least one JSON line")
        if alike := [record["_where"] for record in records[count:] if are_equal(record.get("choices", ()))]:
            _warn(
                f"{alike[0]}: two of its choices are equal, and only the one that 'answer' names counts as right "
                f"({len(alike)} such questions in {name})"
            )
    return records


@functools.cache
def _warn(text: str) -> None:
    """Once, however often a file is read."""
    logger.warning(text)


def is_record(entry: Mapping[str, Any]) -> bool:
    """Whether this is a record, and not a sample or a batch: one that was read from a file (whose other keys may have
    any name), or one without tokens."""
    return "_where" in entry or not ("input_ids" in entry or "original" in entry)


def parse_record(line: str, where: str) -> dict:
    """A checked record from one line of JSON. Error messages begin with `where`."""
    record = parse_json(line, where, strict=False)  # its other keys are never read
    if not isinstance(record, dict):
        raise ValueError(f'{where}: got a {type(record).__name__}, expected an object such as {{"text": ...}}')
    for key in _read_keys(record):
        check_read(record.get(key), f"{where}: {key!r}")
    check_record(record, where)
    record["_where"] = where
    return record


def _read_keys(record: Mapping) -> tuple[str, ...]:
    """The keys of its form, as `check_record` tells it."""
    if "question" in record:
        return "question", "choices", "answer"
    if "text" in record:
        return ("text",)
    return ("prompt", "completion") if "prompt" in record or "completion" in record else ("messages",)


def check_read(value: Any, where: str) -> None:
    """ValueError, beginning with `where`, for a number in it that `parse_json` has not taken."""
    if isinstance(value, Unread):
        raise ValueError(f"{where}: {value.why}")
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            check_read(item, where)


def check_record(record: Mapping, where: str) -> None:
    """ValueError, beginning with `where`, unless the record has one of the four forms."""

    def text(key: str) -> None:
        if not isinstance(record.get(key), str) or is_blank(record[key]):
            raise ValueError(f"{where}: {key!r} must be a string that is not blank, got {shown(record.get(key))}")

    if "question" in record:
        text("question")
        choices, answer = record.get("choices"), record.get("answer")
        check_choices(choices, where)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f"{where}: 'answer' must be the index of the right choice, 0 to {len(choices) - 1}, got {shown(answer)}"
            )
    elif "text" in record:
        text("text")
    elif "prompt" in record or "completion" in record:
        text("prompt")
        text("completion")
    elif "messages" in record:

        def is_turn(m: object) -> bool:
            return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)

        messages = record["messages"]
        if not (isinstance(messages, list) and messages and all(map(is_turn, messages))):
            raise ValueError(
                f'{where}: \'messages\' must be a list of {{"role": str, "content": str}}, got {shown(messages)}'
            )
    else:
        raise ValueError(
            f"{where}: unknown form with keys {shown(list(record), 120)}: expected question + choices + answer, text, "
            "prompt + completion, or messages"
        )


def is_question(record: Mapping) -> bool:
    return "question" in record


def question_prompt(record: Mapping) -> str:
    """The evaluation's own four-choice form: question, lettered choices, "Answer:" (no trailing space)."""
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(record["choices"])]
    return "\n".join([record["question"], *choices, "Answer:"])
