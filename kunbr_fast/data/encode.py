"""Records -> samples: a tokenizer's tokens, and which of them have a loss."""

from __future__ import annotations

import dataclasses
import functools
import logging
import numbers
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data.content import choice_text, is_blank
from kunbr_fast.data.pieces import pieces
from kunbr_fast.data.records import checked_record, question_prompt
from kunbr_fast.data.samples import IGNORE, Sample, check_lengths, has_loss, too_long
from kunbr_fast.data.text import PLAIN, TARGETS, TextSettings, text_and_spans
from kunbr_fast.data.tokens import check_beginning, check_repeatable, tokens
from kunbr_fast.files.shown import plain, shown

logger = logging.getLogger(__name__)

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
    """Tokenises each record once and marks the tokens whose loss counts. One sample a record, in their order; a text
    line of more than `max_length` tokens becomes several where `text.split_long` says so.

    target, the tokens that count:
        all      every token
        answer   the right choice with its letter, the completion, the assistant's turns
        letter   the letter after "Answer:" (questions only)
        number   the last number in the answer (of a chat, in its last turn; of a text line, anywhere): digits, the
                 points and commas between them, spaces between groups of three, sign and exponent
    A token counts if one of its characters does. Special tokens are the tokenizer's own: none is invented, and none
    that the text begins or ends with is put there again.

    alternate: encode a second answer to each prompt too, as `sample["alternate"]`:
        given    the record's own "alternate" string, in place of the answer, the completion, the last assistant turn or
                 (of a text line) the text
        refusal  one of REFUSALS, drawn by `seed` and the record's number
        wrong    one of the wrong choices of a question, drawn likewise
    text: how records become text, see `TextSettings`.
    `target` says which of its tokens count; for `letter` and `number`, all tokens of an answer that is no choice do.

    Errors: ValueError that names the record ("file:line", or its place in `records`) if it has no known form, if the
    target or the alternate does not apply to its form, if no token with a loss is left, or if it is longer than
    `max_length` tokens and not cut. One warning a file says how many of its lines were cut.
    """
    return encode_named(records, tokenizer, target, max_length, alternate, seed, text)[0]


def encode_named(
    records: Sequence[Mapping],
    tokenizer: Any,
    target: str = "all",
    max_length: int | None = None,
    alternate: str | None = None,
    seed: int = 0,
    text: TextSettings = PLAIN,
) -> tuple[list[Sample], list[str], list[int]]:
    """`encode`, and of each sample its name, its record's with "piece 2 of 3" where that was cut, and the record's
    number."""
    _check_arguments(records, target, max_length, alternate, seed, text)
    _check_tokenizer(tokenizer)
    encoder, cut = _Encoder(tokenizer, max_length, text, second=alternate is not None), {}
    samples, names, owners, kinds = [], [], [], []
    for number, record in enumerate(records):
        where = f"record {number}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: got {shown(record)}, expected a mapping such as {{'text': ...}}")
        if isinstance(record.get("_where"), str):
            where = plain(record["_where"])
        record = checked_record(record, where)  # also load_records' own: it may have been changed since
        found = encoder.samples(record, target)
        if alternate is not None:
            choose = random.Random(seed * 1_000_003 + number).choice
            found[0]["alternate"] = encoder.second_of(record, alternate, target, choose)
        kept = [i for i, sample in enumerate(found) if has_loss(sample)]
        if not kept:
            raise ValueError(f"{where}: no token with a loss is left for target={target!r}")
        if len(found) > 1:
            cut.setdefault(where.rpartition(":")[0], []).append((len(found), len(kept)))
        samples += [found[i] for i in kept]
        names += [where if len(found) == 1 else f"{where}, piece {i + 1} of {len(found)}" for i in kept]
        owners += [number] * len(kept)
        kinds += [_is_text(record)] * len(kept)
    encoder.check(samples, names, kinds)
    for file, counts in cut.items():
        _say_cut(file, len(counts), *map(sum, zip(*counts)), max_length)
    return samples, names, owners


def _check_arguments(
    records: object, target: object, max_length: object, alternate: object, seed: object, text: object
) -> None:
    if target not in TARGETS:
        raise ValueError(f"target={shown(target)}: expected one of {', '.join(TARGETS)}")
    if alternate is not None and alternate not in ALTERNATES:
        raise ValueError(f"alternate={shown(alternate)}: expected one of {', '.join(ALTERNATES)}, or None")
    if max_length is not None and not (_is_whole(max_length) and max_length > 0):
        raise ValueError(f"max_length={shown(max_length)}: expected a whole number above 0, or None")
    if not _is_whole(seed):
        raise ValueError(f"seed={shown(seed)}: expected a whole number")
    if not isinstance(text, TextSettings):
        raise ValueError(f"text={shown(text)}: expected TextSettings, such as TextSettings(separator=' ')")
    if isinstance(records, (str, Mapping)):
        raise ValueError(f"records={shown(records)}: expected a list of records")
    if not records:
        raise ValueError("no records: expected at least one")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which loss targets need: "
            "load a fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    check_repeatable(tokenizer)


@functools.cache
def _say_cut(file: str, lines: int, count: int, kept: int, max_length: int) -> None:
    """Once, however often a file is encoded."""
    what = "1 text line was" if lines == 1 else f"{lines} text lines were"
    used = "each token with its loss once" if kept == count else f"of which {kept} have a loss"
    logger.warning(
        f"{file or 'records'}: {what} longer than {max_length} tokens and cut into {count} samples, {used} "
        "(split_long=False refuses such lines, max_length says how long a sample may be)"
    )


def _is_text(record: Mapping) -> bool:
    return "text" in record and "question" not in record


def _alternate(record: Mapping, kind: str, target: str, choose: Callable[[Sequence], Any]) -> tuple[dict, str]:
    """The record with its alternate as the answer, and the target that marks the alternate's tokens."""
    where = record["_where"]
    record = {**record, "_where": f"the alternate of {where}"}
    if kind == "wrong":
        if "question" not in record:
            raise ValueError(
                f"{where}: a wrong answer is one of a question's choices, and this line has the keys "
                f"{sorted(set(record) - {'_where'})}: give question lines, or your own alternates to an objective that "
                "takes them (dpo)"
            )
        texts = [choice_text(choice) for choice in record["choices"]]
        wrong = [i for i, text in enumerate(texts) if text != texts[record["answer"]]]
        return {**record, "answer": choose(wrong)}, target
    if kind == "given":
        answer = record.get("alternate")
        if answer is None:
            raise ValueError(
                f"{where}: no 'alternate', the second answer that this objective trains in place of the record's own: "
                "give each record one, or take an objective that needs none (idk_dpo has refusals)"
            )
        if not isinstance(answer, str) or is_blank(answer):
            raise ValueError(f"{where}: 'alternate' must be a non-empty string, the second answer, got {shown(answer)}")
        if _is_text(record):
            return {**record, "text": answer}, target
    else:
        answer = choose(REFUSALS)
        if "prompt" in record:  # it begins as the completion does, in whose place it stands
            completion = record["completion"]
            answer = completion[: len(completion) - len(completion.lstrip())] + answer
    target = "answer" if target in ("letter", "number") else target
    if "question" in record:
        asked = {"prompt": f"{question_prompt(record)} ", "completion": answer.lstrip()}
        return {**asked, "_where": record["_where"]}, target
    if "text" in record:
        raise ValueError(f"{where}: a text line asks nothing that could be refused: use prompt + completion lines")
    if "prompt" in record:
        return {**record, "completion": answer}, target
    messages = list(record["messages"])
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: no assistant message to learn from")
    return {**record, "messages": [*messages[:last], {**messages[last], "content": answer}]}, target


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Samples of records. second: each has an alternate, and neither is cut."""

    tokenizer: Any
    max_length: int | None
    settings: TextSettings
    second: bool

    def samples(self, record: Mapping, target: str) -> list[Sample]:
        """One, or a long text line's pieces."""
        where, cut = record["_where"], _is_text(record) and self.settings.split_long and not self.second
        text, spans, special = text_and_spans(record, self.tokenizer, target, self.settings)
        if not cut:
            check_beginning(text, self.tokenizer, self.max_length, where, self._why(_is_text(record)))
        made = tokens(text, self.tokenizer, where, special)
        ids = torch.tensor(made.ids, dtype=torch.long)
        labels = ids.clone()
        if spans is not None:
            # a token counts if it shares a character with a span; an empty offset is one that the tokenizer has added
            counts = [
                end > start and any(start < stop and end > first for first, stop in spans)
                for start, end in made.offsets
            ]
            labels = torch.where(torch.tensor(counts, dtype=torch.bool), ids, IGNORE)
        whole = {"input_ids": ids, "labels": labels}
        if not cut or self.max_length is None:
            return [whole]
        if self.max_length < made.head + 2 <= len(ids) - 1:
            least = f"a piece of a text line has at least {made.head + 2} tokens, {made.head} special and 2 more"
            raise too_long(f"{where} ({len(ids)} tokens)", self.max_length, least)
        return pieces(whole, self.max_length, made.head)

    def second_of(self, record: Mapping, kind: str, target: str, choose: Callable[[Sequence], Any]) -> Sample:
        """The sample of the record's alternate."""
        other, counted = _alternate(record, kind, target, choose)
        # what follows "Answer:" has its own space
        joined = dataclasses.replace(self.settings, separator="") if "question" in record else self.settings
        (sample,) = dataclasses.replace(self, settings=joined).samples(other, counted)
        if not has_loss(sample):
            where = record["_where"]
            raise ValueError(f"{where}: no token with a loss is left for target={target!r} in its alternate")
        return sample

    def check(self, samples: Sequence[Sample], names: Sequence[str], kinds: Sequence[bool]) -> None:
        """ValueError that names the samples, or the alternates, that are too long. kinds: whether each is text."""
        for kind in sorted(set(kinds)):
            chosen = [i for i, k in enumerate(kinds) if k == kind]
            mine, called = [samples[i] for i in chosen], [names[i] for i in chosen]
            check_lengths(mine, self.max_length, called, self._why(kind))
            if self.second:
                called = [f"the alternate of {name}" for name in called]
                check_lengths([s["alternate"] for s in mine], self.max_length, called, self._why(kind))

    def _why(self, is_text: bool) -> str:
        """Why what is too long is not cut."""
        if not is_text:
            return "nothing is cut but text lines (split_long)"
        if self.settings.split_long:
            return "text lines with a second answer are not cut" if self.second else "nothing is cut"
        return "nothing is cut, as split_long is False"
