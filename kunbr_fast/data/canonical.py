"""One text for each record: the same whichever file it came from, and in whichever order its keys stood there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kunbr_fast.data.content import choice_text
from kunbr_fast.data.forms import FACT, OTHER_ANSWER, keys_of
from kunbr_fast.data.messages import ASSISTANT


def canonical(record: Mapping[str, Any]) -> str:
    """JSON (ASCII, sorted keys) of what a run reads of a record: the keys of its form, "alternate" and "fact". A choice
    is its text, as a model reads it: 1999 of a table and "1999" of a CSV file are one."""
    keys = (*keys_of(record), OTHER_ANSWER, FACT)
    found = {key: record[key] for key in keys if record.get(key) is not None}
    if "choices" in found:
        found["choices"] = [str(choice) for choice in found["choices"]]
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def asked(record: Mapping[str, Any]) -> str:
    """What a record asks, for people: "" of a text line, of a chat the turn before the last answer."""
    form = keys_of(record)
    if form[0] == "messages":
        before = record["messages"][: _last_answer(record)]
        return before[-1]["content"] if before else ""
    return "" if form[0] == "text" else record[form[0]]


def answered(record: Mapping[str, Any]) -> str:
    """The right answer to what is `asked`, for people."""
    form = keys_of(record)
    if form[0] == "question":
        return choice_text(record["choices"][record["answer"]])
    if form[0] == "messages":
        return record["messages"][_last_answer(record)]["content"]
    return record[form[-1]].strip()


def _last_answer(record: Mapping[str, Any]) -> int:
    """The place of the assistant's last turn; where there is none, of the last message."""
    turns = [i for i, message in enumerate(record["messages"]) if message["role"] == ASSISTANT]
    return turns[-1] if turns else len(record["messages"]) - 1
