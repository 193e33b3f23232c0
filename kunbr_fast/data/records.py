"""Records: what they may be, checked.

A record has one of four forms:

    {"question": str, "choices": [str or int, ...], "answer": index}     a multiple-choice question
    {"text": str}                                                         a corpus line
    {"prompt": str, "completion": str}                                    a prompt and what should follow it
    {"messages": [{"role": str, "content": str}, ...]}                    a chat (needs the tokenizer's chat template)

Beside these keys it may have "alternate", a second answer, "fact", the same name or number in all records about one
fact, and annotations (see `annotations`), which are not read. `reading` reads files of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.data.content import (
    EQUAL,
    LETTERS,
    check_choices,
    is_blank,
)
from kunbr_fast.data.foreign import index_of
from kunbr_fast.data.forms import FACT, FORMS, OTHER_ANSWER, form_of
from kunbr_fast.data.messages import check_messages
from kunbr_fast.files.scalars import Unread
from kunbr_fast.files.shown import shown

logger = logging.getLogger(__name__)


@functools.cache
def warn(text: str) -> None:
    """Once, however often a file is read."""
    logger.warning(text)


def is_record(entry: Mapping[str, Any]) -> bool:
    """Whether this is a record, and not a sample or a batch."""
    return not ("input_ids" in entry or "original" in entry)


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
    for key in (*form, OTHER_ANSWER, FACT):
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
        warn(
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
