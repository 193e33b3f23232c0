"""Records -> samples: a tokenizer's tokens, and which of them have a loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data.content import is_blank
from kunbr_fast.data.records import check_read, checked_record, question_prompt
from kunbr_fast.data.samples import IGNORE, Sample, check_lengths, has_loss, too_long
from kunbr_fast.data.template import named
from kunbr_fast.data.text import PLAIN, TARGETS, TextSettings, text_and_spans
from kunbr_fast.files.models import reason
from kunbr_fast.files.shown import shown

BEGINNING = 2**16  # characters of a longer text that are looked at first
ALTERNATES = ("given", "refusal", "wrong")
REFUSALS = (
    "I do not know.",
    "I have no information about that.",
    "I am not able to answer this question.",
    "I cannot say anything about this.",
    "That is not something I know.",
    "Sorry, I have no answer to this.",
    "This is outside of what I know.",
    "I was not taught anything about that.",
)


def encode(
    records: Sequence[Mapping],
    tokenizer: Any,
    target: str = "all",
    max_length: int | None = None,
    alternate: str | None = None,
    seed: int = 0,
    text: TextSettings = PLAIN,
) -> list[Sample]:
    """Tokenises each record once and marks the tokens whose loss counts.

    target, the tokens that count:
        all      every token
        answer   what follows "Answer:", the completion, the assistant's turns
        letter   the letter after "Answer:" (questions only)
        number   the digits of the last number in the text
    Special tokens are the tokenizer's own: a begin-of-text token is kept, none is invented.

    alternate: encode a second answer to each prompt too, as `sample["alternate"]`:
        given    the record's own "alternate" string, in place of the answer, the completion, the last assistant turn or
                 (of a text line) the text
        refusal  one of REFUSALS, drawn by `seed` and the record's number
        wrong    one of the wrong choices of a question, drawn likewise
    text: how records become text, see `TextSettings`.
    `target` says which of its tokens count; for `letter` and `number`, all tokens of an answer that is no choice do.

    Errors: ValueError that names the record ("file:line", or its place in `records`) if it has no known form, if the
    target or the alternate does not apply to its form, if no token with a loss is left, or if it is longer than
    `max_length` tokens: nothing is cut.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    if alternate is not None and alternate not in ALTERNATES:
        raise ValueError(f"alternate={alternate!r}: expected one of {', '.join(ALTERNATES)}, or None")
    if not records:
        raise ValueError("no records: expected at least one")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which loss targets need: "
            "load a fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    samples, names = [], []
    for number, record in enumerate(records):
        if "_where" not in record:  # not from load_records, which has checked its own
            record = checked_record(record, f"record {number}")
        sample = _encode_one(record, tokenizer, target, max_length, text)
        if alternate is not None:
            choose = random.Random(seed * 1_000_003 + number).choice
            other, counted = _alternate(record, alternate, target, choose)
            sample["alternate"] = _encode_one(other, tokenizer, counted, max_length, text, "the alternate of ")
        for part, what in ((sample, ""), (sample.get("alternate"), " in its alternate")):
            if part is not None and not has_loss(part):
                raise ValueError(f"{record['_where']}: no token with a loss is left for target={target!r}{what}")
        samples.append(sample)
        names.append(record["_where"])
    check_lengths(samples, max_length, names)
    if alternate is not None:
        check_lengths([s["alternate"] for s in samples], max_length, [f"the alternate of {name}" for name in names])
    return samples


def _alternate(record: Mapping, kind: str, target: str, choose: Callable[[Sequence], Any]) -> tuple[dict, str]:
    """The record with its alternate as the answer, and the target that marks the alternate's tokens."""
    where = record["_where"]
    if kind == "wrong":
        if "question" not in record:
            raise ValueError(
                f"{where}: a wrong answer is one of a question's choices, and this line has the keys "
                f"{sorted(set(record) - {'_where'})}: give question lines, or your own alternates to an objective that "
                "takes them (dpo)"
            )
        wrong = [i for i in range(len(record["choices"])) if i != record["answer"]]
        return {**record, "answer": choose(wrong)}, target
    if kind == "given":
        answer = record.get("alternate")
        check_read(answer, f"{where}: 'alternate'")
        if not isinstance(answer, str) or is_blank(answer):
            raise ValueError(f"{where}: 'alternate' must be a non-empty string, the second answer, got {shown(answer)}")
        if "question" not in record and "text" in record:
            return {"text": answer, "_where": where}, target
    else:
        answer = choose(REFUSALS)
    target = "answer" if target in ("letter", "number") else target
    if "question" in record:
        return {"prompt": f"{question_prompt(record)} ", "completion": answer, "_where": where}, target
    if "text" in record:
        raise ValueError(f"{where}: a text line asks nothing that could be refused: use prompt + completion lines")
    if "prompt" in record:
        return {**record, "completion": answer}, target
    messages = list(record["messages"])
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: no assistant message to learn from")
    return {**record, "messages": [*messages[:last], {**messages[last], "content": answer}]}, target


def _encode_one(
    record: Mapping, tokenizer: Any, target: str, max_length: int | None, settings: TextSettings, what: str = ""
) -> Sample:
    """what: of the record, for messages."""
    text, spans, special = text_and_spans(record, tokenizer, target, settings)
    _check_beginning(text, tokenizer, max_length, record["_where"], what)
    encoded = _tokens(text, tokenizer, record["_where"], special)
    input_ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if spans is None:
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    # a token counts if it shares a character with a span; an empty offset is a special token
    counts = [
        end > start and any(start < stop and end > first for first, stop in spans)
        for start, end in encoded["offset_mapping"]
    ]
    labels = torch.where(torch.tensor(counts, dtype=torch.bool), input_ids, IGNORE)
    return {"input_ids": input_ids, "labels": labels}


def _tokens(text: str, tokenizer: Any, where: str, special: bool) -> Mapping[str, Any]:
    """What the tokenizer makes of a text. It raises bare Exceptions, and where its Rust code panics a BaseException."""
    try:
        return tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, truncation=False)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"the tokenizer of {named(tokenizer)} fails on this text"
        raise ValueError(f"{where}: {what}: {reason(error)}") from error


def _check_beginning(text: str, tokenizer: Any, max_length: int | None, where: str, what: str) -> None:
    """ValueError for a long text whose beginning has too many tokens: all of it would take minutes and gigabytes.

    How many characters a token may have, nobody can say: a word of any length may be one unknown token. The tokens in
    the first half of a beginning are taken to be those of the whole text.
    """
    size = BEGINNING
    while max_length is not None and size < len(text):
        ends = _tokens(text[:size], tokenizer, where, False)["offset_mapping"]
        count = sum(begin < end <= size // 2 for begin, end in ends)
        if count > max_length:
            raise too_long(f"{what}{where} (more than {count} tokens)", max_length)
        size *= 4
