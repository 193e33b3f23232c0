"""The same fact in two places that must have none in common: two folds of the attack, what is to be forgotten and kept.

A record's fact is its text: a question and its right answer, a text line, a prompt and its completion, the contents of
a chat. Facts are the same where these differ in form, in the order of choices, in letter case, white space or in how
Unicode composes a letter. A question with another right answer is another fact (people share a name). What is given as
tokens is the same where all tokens are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from kunbr_fast.data.content import visible
from kunbr_fast.data.forms import FORMS
from kunbr_fast.data.records import check_record, is_record
from kunbr_fast.files.shown import plain

Facts = Mapping[Hashable, str]  # of a side: each fact, and where it stands first


def facts(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[Hashable, str]:
    """Of a side's records and samples, by what they are called where no file names them: "forget record"."""
    found: dict[Hashable, str] = {}
    for name, items in parts.items():
        for number, item in enumerate(items):
            where = item.get("_where") or f"{name} {number}"
            if not is_record(item):
                key: Hashable = ("tokens", _digest(item["input_ids"].cpu().numpy().tobytes()))
            else:
                check_record(item, where)
                key = _digest(text_of(item).encode(errors="surrogatepass"))
            found.setdefault(key, where)
    return found


def text_of(record: Mapping[str, Any]) -> str:
    """By which a record's fact is known."""
    form = next(form for form in FORMS if all(record.get(key) is not None for key in form))
    if form[0] == "question":
        parts = [record["question"], str(record["choices"][record["answer"]])]
    elif form[0] == "messages":
        parts = [message["content"] for message in record["messages"]]
    else:
        parts = [record[key] for key in form]
    text = visible(visible(" ".join(parts)).casefold())
    return " ".join(text.split())


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
                several.add(fact)
    return f"{first}, {why} ({len(several)} such fact{'s' * (len(several) > 1)})" if several else None


def of_folds(folds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """`overlap` of the attack's folds: {name: its records and questions}."""
    sides = [facts({f"fold {plain(name, 40)}, record": records}) for name, records in folds.items()]
    return overlap(sides, "in two folds: the attack would teach what it asks about")


def of_sides(forget: Facts, retain: Facts) -> str | None:
    return overlap([forget, retain], "to be forgotten and to be kept")


def settle(found: str | None, setting: str, say: Callable[[str], None] = lambda text: None) -> None:
    """ValueError for an overlap that is not allowed (setting: "error" or "allow"); of one that is, a line."""
    if found is None:
        return
    if setting != "allow":
        raise ValueError(f"{found}: leave it out of one of them, or let it be (overlap=allow)")
    say(f"{found}; overlap=allow lets that be")
