"""Records: the lines of a JSONL file, read and checked.

A record has one of four forms:

    {"question": str, "choices": [str or int, ...], "answer": index}     a multiple-choice question
    {"text": str}                                                         a corpus line
    {"prompt": str, "completion": str}                                    a prompt and what should follow it
    {"messages": [{"role": str, "content": str}, ...]}                    a chat (needs the tokenizer's chat template)

Beside these keys it may have "alternate", a second answer, "fact", the same name or number in all records about one
fact, and annotations (see `annotations`), which are not read.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.data.content import (
    ALLOWANCES,
    EQUAL,
    LETTERS,
    check_choices,
    equal_pair,
    is_blank,
    not_as_written,
)
from kunbr_fast.data.foreign import index_of
from kunbr_fast.data.forms import FACT, FORMS, OTHER_ANSWER, form_of
from kunbr_fast.data.messages import check_messages, without_keys
from kunbr_fast.files.documents import parse_json, read_lines
from kunbr_fast.files.scalars import Unread
from kunbr_fast.files.shown import plain, shown

logger = logging.getLogger(__name__)


def load_records(
    paths: str | Path | Sequence[str | Path], ignore_keys: Iterable[str] = (), equal_choices: str = "error"
) -> list[dict]:
    """Reads JSONL files into records; `record["_where"]` says where each came from ("file:line").

    ignore_keys: keys that are left out, of records and of messages, as if they were not there. equal_choices: "allow"
    for questions of which some choices are equal; one warning a file counts them. Blank lines are skipped.

    Errors: ValueError "file:line: ..." for a line that is not JSON, has no known form, a key that would not be used, a
    wrong answer index or equal choices; ValueError for a file without a record.
    """
    if equal_choices not in ALLOWANCES:
        raise ValueError(f"equal_choices={shown(equal_choices)}: expected one of {', '.join(ALLOWANCES)}")
    paths, ignored = [paths] if isinstance(paths, (str, Path)) else list(paths), frozenset(ignore_keys)
    if not paths:
        raise ValueError("no file was given: expected at least one JSONL file")
    records = []
    for path in paths:
        name, count = plain(path), len(records)
        for number, line in read_lines(path):
            if len(records) == count and (other := _no_lines(line)):
                raise ValueError(f"{name}:{number}: {other}")
            records.append(parse_record(line, f"{name}:{number}", ignored, equal_choices == "allow"))
        if len(records) == count:
            raise ValueError(f"{name}: empty: expected at least one JSON line")
        if alike := [record["_where"] for record in records[count:] if equal_pair(record.get("choices", ()))]:
            _warn(
                f"{alike[0]}: two of its choices are equal, and only the one that 'answer' names counts as right "
                f"({len(alike)} such question{'s' * (len(alike) > 1)} in {name})"
            )
    return records


def _no_lines(first: str) -> str | None:
    """What a file is that has JSON or a table in it, but no line of its own for each record, by its first line."""
    line = first.strip()
    if line.startswith("[") and (line == "[" or line[1:].lstrip().startswith("{")):
        return "a JSON array, expected one object a line: jq -c '.[]' FILE > FILE.jsonl writes that"
    if line == "{":
        return "an object over several lines, expected one object a line: jq -c . FILE > FILE.jsonl writes that"
    if not line.startswith(("{", "[")):
        names = [name.strip().strip('"').lower() for name in line.replace("\t", ",").replace(";", ",").split(",")]
        if len(names) > 1 and any(name in form for form in FORMS for name in names):
            return f"a table (CSV) with the columns {shown(names, 80)}, expected one JSON object a line: convert it"
    return None


@functools.cache
def _warn(text: str) -> None:
    """Once, however often a file is read."""
    logger.warning(text)


def is_record(entry: Mapping[str, Any]) -> bool:
    """Whether this is a record, and not a sample or a batch."""
    return not ("input_ids" in entry or "original" in entry)


def parse_record(line: str, where: str, ignored: Collection[str] = (), equal: bool = False) -> dict:
    """A checked record from one line of JSON, without its `ignored` keys. Error messages begin with `where`. equal: its
    choices may be equal."""
    record = parse_json(line, where, strict=False)  # its annotations are never read
    if not isinstance(record, dict):
        raise ValueError(f'{where}: got a {type(record).__name__}, expected an object such as {{"text": ...}}')
    if ignored:
        record = {key: value for key, value in record.items() if key not in ignored}
        if "messages" in record:
            record["messages"] = without_keys(record["messages"], ignored)
    choices = record.get("choices")
    if isinstance(choices, list) and any(isinstance(choice, float) for choice in choices):
        for choice, text in zip(choices, json.loads(line, parse_float=str, parse_int=str)["choices"]):
            if isinstance(choice, float) and text != str(choice):
                raise not_as_written(text, str(choice), where)
    return checked_record({**record, EQUAL: True} if equal and "choices" in record else record, where)


def checked_record(record: Mapping, where: str) -> dict:
    """The record, checked, with "_where". Keys that are null are left out: a table has them for other forms."""
    found = {key: value for key, value in record.items() if value is not None}
    found = found if any(found.keys() >= {*form} for form in FORMS) else dict(record)  # else the null is the error
    check_record(found, where)
    found["_where"] = where
    return found


def check_read(value: Any, where: str) -> None:
    """ValueError, beginning with `where`, for a number in it that `parse_json` has not taken."""
    if isinstance(value, Unread):
        raise ValueError(f"{where}: {value.why}")
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            check_read(item, where)


def check_record(record: Mapping, where: str) -> None:
    """ValueError, beginning with `where`, unless the record has one of the four forms, and no key but its form's,
    "alternate", "fact" and annotations."""
    form = form_of(record, where)
    if isinstance(fact := record.get(FACT, 0), bool) or not isinstance(fact, (str, int)) or fact == "":
        raise ValueError(
            f"{where}: {FACT!r} must be a name or a number, the same in all lines about a fact, got {shown(fact)}"
        )
    for key in form:
        check_read(record.get(key), f"{where}: {key!r}")
    if form == ("messages",):
        check_messages(record["messages"], where)
        return
    for key in form:
        if key == "choices":
            check_choices(record.get(key), where, record.get(EQUAL) is True)
        elif key == "answer":
            _check_answer(record.get(key), record["choices"], where)
        elif not isinstance(record.get(key), str) or is_blank(record[key]):
            found, cure = record.get(key), ""
            if isinstance(found, list) and found and isinstance(found[0], dict):
                cure = ": the turns of a chat go into one list, 'messages', the answer last"
            raise ValueError(f"{where}: {key!r} must be a string that is not blank, got {shown(found)}{cure}")


def _check_answer(answer: Any, choices: Sequence, where: str) -> None:
    if not isinstance(answer, bool) and isinstance(answer, int) and 0 <= answer < len(choices):
        return
    index = index_of(answer, choices) if isinstance(answer, str) else None
    cure = f": write {index}" if index is not None else ": they are counted from 0" * (answer == len(choices))
    raise ValueError(
        f"{where}: 'answer' must be the index of the right choice, 0 to {len(choices) - 1}, got {shown(answer)}{cure}"
    )


def say_unused_alternates(entries: Sequence[Mapping], what: str) -> None:
    """One warning a file where records or samples bring an "alternate" that a run does not read. No error: several
    objectives may be tried on one file."""
    if found := next((entry for entry in entries if entry.get(OTHER_ANSWER) is not None), None):
        file = str(found.get("_where", "")).rpartition(":")[0]
        _warn(
            f"{file or f'the {what} set'}: 'alternate' is not read: only an objective that takes second answers as "
            "they are given (dpo) reads those of what is to be forgotten"
        )


def is_question(record: Mapping) -> bool:
    """Tokens may have the question that they were made of beside them, and are none; in a table of several forms it may
    be null."""
    return is_record(record) and record.get("question") is not None


def question_prompt(record: Mapping) -> str:
    """The evaluation's own four-choice form: question, lettered choices, "Answer:" (no trailing space)."""
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(record["choices"])]
    return "\n".join([record["question"], *choices, "Answer:"])
