"""Samples: tokens and labels, made from records by a tokenizer, or from padded batches.

A sample is `{"input_ids": LongTensor (T,), "labels": LongTensor (T,)}`. Labels are aligned with input_ids as in Hugging
Face (the shift by one happens inside) and are -100 where a token has no loss. Under "alternate" it may hold a second
sample: another answer to the same prompt, which some objectives need.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data.content import LETTERS, is_blank
from kunbr_fast.data.records import check_read, check_record, question_prompt
from kunbr_fast.files.models import reason
from kunbr_fast.files.shown import plain, shown

Sample = dict[str, torch.Tensor]

BEGINNING = 2**16  # characters of a longer text that are looked at first
IGNORE = -100  # the label of a token that has no loss
TARGETS = ("all", "answer", "letter", "number")
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
            record = {**record, "_where": f"record {number}"}
            check_record(record, record["_where"])
        sample = _encode_one(record, tokenizer, target, max_length)
        if alternate is not None:
            choose = random.Random(seed * 1_000_003 + number).choice
            other, counted = _alternate(record, alternate, target, choose)
            sample["alternate"] = _encode_one(other, tokenizer, counted, max_length, "the alternate of ")
        for part, what in ((sample, ""), (sample.get("alternate"), " in its alternate")):
            if part is not None and not _has_loss(part):
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
        return {"prompt": question_prompt(record), "completion": answer, "_where": where}, target
    if "text" in record:
        raise ValueError(f"{where}: a text line asks nothing that could be refused: use prompt + completion lines")
    if "prompt" in record:
        return {**record, "completion": answer}, target
    messages = list(record["messages"])
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: no assistant message to learn from")
    return {**record, "messages": [*messages[:last], {**messages[last], "content": answer}]}, target


def _has_loss(sample: Sample) -> bool:
    return bool((sample["labels"][1:] != IGNORE).any())


def check_lengths(samples: Sequence[Sample], max_length: int | None, names: Sequence[str]) -> None:
    """ValueError that names the samples longer than `max_length` tokens."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    long = [f"{name} ({n} tokens)" for name, n in zip(names, lengths) if max_length is not None and n > max_length]
    if long:
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise _too_long(f"{', '.join(long[:3])}{more}", max_length)


def _too_long(names: str, max_length: int) -> ValueError:
    return ValueError(
        f"longer than max_length={max_length}: {names}. Shorten them, or raise max_length if the model has more "
        "positions: nothing is cut"
    )


def check_labels(samples: Sequence[Sample], names: Sequence[str]) -> None:
    """ValueError that names the first sample without a labelled token."""
    for name, sample in zip(names, samples):
        if not _has_loss(sample):
            raise ValueError(f"{name}: no token after its first has a label, so it has no loss")


def _encode_one(record: Mapping, tokenizer: Any, target: str, max_length: int | None, what: str = "") -> Sample:
    """what: of the record, for messages."""
    text, spans, special = _text_and_spans(record, tokenizer, target)
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
        what = f"the tokenizer of {_named(tokenizer)} fails on this text"
        raise ValueError(f"{where}: {what}: {reason(error)}") from error


def _named(tokenizer: Any) -> str:
    return plain(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


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
            raise _too_long(f"{what}{where} (more than {count} tokens)", max_length)
        size *= 4


def _text_and_spans(record: Mapping, tokenizer: Any, target: str) -> tuple[str, list[tuple[int, int]] | None, bool]:
    """The text, the character spans that count (None: all), and whether the tokenizer adds special tokens."""
    where = record["_where"]
    if "question" in record:
        prompt, letter = question_prompt(record), LETTERS[record["answer"]]
        text = f"{prompt} {letter}. {record['choices'][record['answer']]}"
        answer, special = [(len(prompt) + 1, len(text))], True
    elif "text" in record:
        text, answer, special = record["text"], None, True
    elif "prompt" in record:
        prompt, completion = record["prompt"], record["completion"]
        text = prompt + completion if prompt[-1].isspace() or completion[0].isspace() else f"{prompt} {completion}"
        answer, special = [(len(text) - len(completion.lstrip()), len(text))], True
    else:
        text, answer, special = *_chat(record, tokenizer), False
    if target == "all":
        return text, None, special
    if target == "number":
        numbers = collections.deque(re.finditer(r"\d+", text), maxlen=1)
        if not numbers:
            raise ValueError(f"{where}: target='number' but there is no digit in {shown(text, 80)}")
        return text, [numbers[-1].span()], special
    if target == "letter":
        if "question" not in record:
            raise ValueError(f"{where}: target='letter' needs question lines, got {sorted(set(record) - {'_where'})}")
        return text, [(answer[0][0], answer[0][0] + 1)], special
    if answer is None:
        raise ValueError(f"{where}: target='answer' does not apply to a text line: use 'all' or 'number'")
    return text, answer, special


def _chat(record: Mapping, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The chat as the tokenizer's template writes it, and the spans of the assistant's turns."""
    where, messages = record["_where"], record["messages"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: 'messages' need a tokenizer with a chat template; use prompt + completion")

    if not isinstance(tokenizer.chat_template, (str, Mapping)):
        raise ValueError(
            f"{_named(tokenizer)}: its tokenizer's chat_template is {shown(tokenizer.chat_template)}, expected text"
        )

    def written(part: list[dict], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, **options)
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(
                f"{where}: the tokenizer's chat template does not take these messages: {reason(error)} (the template "
                f"of {_named(tokenizer)})"
            ) from error

    text = written(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(messages[:i], add_generation_prompt=True), written(messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError(f"{where}: this chat template rewrites earlier turns; use prompt + completion")
            spans.append((len(before), len(after)))
    if not spans:
        raise ValueError(f"{where}: no assistant message to learn from")
    return text, spans


def as_samples(samples: Iterable[Any]) -> list[Sample]:
    """Samples from samples, or from padded Hugging Face batches (input_ids, labels, attention_mask of shape (B, T)).

    The attention mask says what is padding, left or right, which is dropped; a hole in it is refused. Without labels,
    input_ids are the labels.
    """
    if isinstance(samples, Mapping):
        samples = [samples]
    result: list[Sample] = []
    for number, item in enumerate(samples):
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise TypeError(f"sample {number}: got {type(item).__name__}, expected a mapping with input_ids and labels")
        input_ids = _integers(item, "input_ids", number)
        labels = _integers(item, "labels", number) if item.get("labels") is not None else input_ids
        mask = torch.ones_like(input_ids) if item.get("attention_mask") is None else _mask(item, number)
        for name, tensor in (("labels", labels), ("attention_mask", mask)):
            if tensor.shape != input_ids.shape:
                raise ValueError(
                    f"sample {number}: {name} {tuple(tensor.shape)} and input_ids {tuple(input_ids.shape)} differ"
                )
        if input_ids.dim() == 1:
            rows = [(input_ids, labels, mask)]
        elif input_ids.dim() == 2:
            rows = list(zip(input_ids, labels, mask))
        else:
            raise ValueError(f"sample {number}: input_ids of shape {tuple(input_ids.shape)}, expected (T,) or (B, T)")
        for ids, label, kept in rows:
            if len(ids) == 0:
                raise ValueError(f"sample {number}: it has no token: leave it out")
            kept = torch.nonzero(kept).flatten()
            if len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
                raise ValueError(
                    f"sample {number}: its attention mask is empty or has a hole, which packing cannot keep"
                )
            inside = slice(int(kept[0]), int(kept[-1]) + 1)  # a view: no copy of the data set
            sample = {"input_ids": ids[inside], "labels": label[inside]}
            for name, wrong in (("token", sample["input_ids"] < 0), ("label", _wrong_labels(sample["labels"]))):
                if wrong.any():
                    place = int(wrong.nonzero()[0])
                    found = int(sample["input_ids" if name == "token" else "labels"][place])
                    expected = f"0 or more, or {IGNORE} where there is no loss" if name == "label" else "0 or more"
                    raise ValueError(f"sample {number}: the {name} {found} at place {place}: expected {expected}")
            result.append(sample)
    if not result:
        raise ValueError("no samples: expected at least one")
    return result


def _integers(item: Mapping[str, Any], key: str, number: int) -> torch.Tensor:
    """What a sample or batch holds under `key`, as a tensor of integers."""
    try:
        tensor = torch.as_tensor(item[key])
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, text, None, or an integer of more than 64 bits
        raise ValueError(
            f"sample {number}: {key}={shown(item[key])}: expected integers of 64 bits, in rows of one length"
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"sample {number}: {key} of {str(tensor.dtype)[6:]}: expected integers")
    return tensor.long()


def _mask(item: Mapping[str, Any], number: int) -> torch.Tensor:
    try:
        mask = torch.as_tensor(item["attention_mask"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"sample {number}: attention_mask={shown(item['attention_mask'])}: expected 0 and 1"
        ) from error
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"sample {number}: its attention mask has other values than 0 and 1")
    return mask


def _wrong_labels(labels: torch.Tensor) -> torch.Tensor:
    return (labels < 0) & (labels != IGNORE)


def with_alternates(batch: Any) -> tuple[list[Sample], list[Sample] | None]:
    """(`as_samples` of samples or padded batches, the same of their alternates); None for the second if none has any.

    An item holds its alternate under "alternate", in its own form; or it is {"original": ..., "alternate": ...}.
    ValueError if only some items have one, or if the numbers of samples differ.
    """
    items = [batch] if isinstance(batch, Mapping) else list(batch)
    originals = [item.get("original", item) if isinstance(item, Mapping) else item for item in items]
    samples = as_samples(originals)
    others = [item.get("alternate") if isinstance(item, Mapping) else None for item in items]
    if all(other is None for other in others):
        return samples, None
    if any(other is None for other in others):
        raise ValueError(f"sample {[o is None for o in others].index(True)} has no alternate, and others have one")
    alternates = as_samples(others)
    if len(alternates) != len(samples):
        raise ValueError(f"{len(samples)} samples with {len(alternates)} alternates: expected one alternate a sample")
    return samples, alternates
