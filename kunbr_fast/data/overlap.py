"""The same fact in two places that must have none in common: two folds of the attack, what is to be forgotten and kept.

A record's fact is its text: a question and its right answer, a text line, a prompt and its completion, the contents of
a chat but for system messages. Facts are the same where these differ in form, in the order of choices, in letter case,
white space, full stops, special tokens around them, or in how Unicode composes a letter; numbers are the same by value.
A question with another right answer is another fact (people share a name). Records with the same "fact" are about one
fact too, whatever their texts. What is given as tokens is the same where all tokens are, but for padding behind the
last label.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data.content import choice_text, folded
from kunbr_fast.data.forms import FACT, keys_of
from kunbr_fast.data.records import check_record, is_record
from kunbr_fast.data.samples import IGNORE
from kunbr_fast.files.shown import plain

Facts = Mapping[Hashable, str]  # of a side: each fact, and where it stands first

# Special tokens as text, in lower case: <s>, <bos>, <end_of_turn>, <|endoftext|>, DeepSeek's bars.
_SPECIAL = r"(?:<(?:/?s|bos|eos|pad|unk|(?:start|end)_of_turn|[|｜][^<>|｜\s]{1,40}[|｜])>|\[(?:bos|eos|pad|cls|sep)\])"
_AROUND = re.compile(rf"^(?:{_SPECIAL}\s*)+|(?:\s*{_SPECIAL})+$")
_STOPS = re.compile(r"(?<=\w)[.…。．｡।۔]+(?=\s|$)|(?<=[^\W\d])!+(?=\s|$)")  # 5! is a number
_WHOLE = re.compile(r"(?<![\w.,])(\d+)\.0+$")


def facts(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[Hashable, str]:
    """Of a side's records and samples, by what they are called where no file names them: "forget record"."""
    found: dict[Hashable, str] = {}
    for name, items in parts.items():
        for number, item in enumerate(items):
            where = item.get("_where") or f"{name} {number}"
            if not is_record(item):
                key: Hashable = ("tokens", _digest(_unpadded(item).cpu().numpy().tobytes()))
            else:
                check_record(item, where)
                key = _digest(text_of(item).encode(errors="surrogatepass"))
                if (name_of_fact := item.get(FACT)) is not None:
                    found.setdefault((FACT, name_of_fact), where)
            found.setdefault(key, where)
    return found


def repeated(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The places of each record whose text an earlier one has: the earlier one's, and its own. Whatever "fact" says:
    several texts about one fact are none twice."""
    first: dict[Hashable, str] = {}
    found = []
    for record in records:
        place, key = record["_where"], _digest(text_of(record).encode(errors="surrogatepass"))
        if first.setdefault(key, place) != place:
            found.append((first[key], place))
    return found


def common(one: Facts, other: Facts) -> list[tuple[str, str]]:
    """Where each fact of both stands first in the one and the other. Known by its text and by its name, it counts
    once."""
    return list({one[fact]: other[fact] for fact in one if fact in other}.items())


def text_of(record: Mapping[str, Any]) -> str:
    """By which a record's fact is known."""
    form = keys_of(record)
    if form[0] == "question":
        parts = [record["question"], choice_text(record["choices"][record["answer"]])]
    elif form[0] == "messages":
        turns = [m for m in record["messages"] if m["role"] not in ("system", "developer")] or record["messages"]
        parts = [part for turn in turns for part in _said(turn)]
    else:
        parts = [record[key] for key in form]
    text = folded(folded(" ".join(parts)).casefold())
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = _AROUND.sub("", text) or text
    return _WHOLE.sub(r"\1", _STOPS.sub("", text) or text)


def fact_of(record: Mapping[str, Any]) -> Hashable:
    """What a record is about: its "fact", or what it asks (a question, a prompt, a chat before its last answer), or its
    text. Records that ask the same are about one fact, whatever their answers."""
    if (given := record.get(FACT)) is not None:
        return given
    form = keys_of(record)
    if form[0] == "messages":
        last = max((i for i, turn in enumerate(record["messages"]) if turn["role"] == "assistant"), default=None)
        parts = [part for turn in record["messages"][:last] for part in _said(turn)]
    else:
        parts = [record[form[0]]]
    return _digest(folded(" ".join(parts)).casefold().encode(errors="surrogatepass"))


def _said(turn: Mapping[str, Any]) -> list[str]:
    """Of a message its content, and the functions that it calls."""
    calls = turn.get("tool_calls") or ()
    functions = [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]
    return [turn.get("content") or "", *(json.dumps(f, sort_keys=True, default=str) for f in functions)]


def _unpadded(sample: Mapping[str, Any]) -> torch.Tensor:
    """Its tokens without those at its end that are all the same and have no label."""
    ids, labels = sample["input_ids"], sample.get("labels")
    if labels is None:
        return ids
    kept = torch.nonzero((labels != IGNORE) | (ids != ids[-1])).flatten()
    return ids[: int(kept[-1]) + 1] if len(kept) else ids


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def overlap(sides: Sequence[Facts], why: str) -> str | None:
    """What to tell where a fact stands on two sides, else None: the first such pair, and how many. why: what is wrong
    with that."""
    owner: dict[Hashable, int] = {}
    first, several = "", set()
    for number, side in enumerate(sides):
        for fact, place in side.items():
            other = owner.setdefault(fact, number)
            if other != number:
                first = first or f"{sides[other][fact]} and {place} are the same fact"
                several.add(sides[other][fact])  # known by its text and by its name, it counts once
    return f"{first}, {why} ({len(several)} such fact{'s' * (len(several) > 1)})" if several else None


def of_folds(folds: Iterable[tuple[str, Sequence[Mapping[str, Any]]]], attack: bool = True) -> str | None:
    """`overlap` of folds, each its name, and its records and questions. attack: whether they are attacked now."""
    sides = [facts({f"fold {plain(name, 40)}, record": records}) for name, records in folds]
    attacks = "the attack" if attack else "a later attack, of which each file is a fold,"
    return overlap(sides, f"in two {'folds' if attack else 'forget files'}: {attacks} would teach what it asks about")


def of_sides(forget: Facts, retain: Facts) -> str | None:
    return overlap([forget, retain], "to be forgotten and to be kept")


def settle(found: str | None, setting: str, say: Callable[[str], None] = lambda text: None) -> None:
    """ValueError for an overlap that is not allowed (setting: "error" or "allow"); of one that is, a line."""
    if found is None:
        return
    if setting != "allow":
        raise ValueError(f"{found}: leave it out of one of them, or let it be (overlap=allow)")
    say(f"{found}; overlap=allow lets that be")
