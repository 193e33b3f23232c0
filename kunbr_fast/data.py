"""From JSONL lines to token samples, and from samples to packed batches.

A *record* is a line of a JSONL file, one of four forms:

    {"question": str, "choices": [str or int, ...], "answer": index}     a multiple-choice question
    {"text": str}                                                         a corpus line
    {"prompt": str, "completion": str}                                    a prompt and what should follow it
    {"messages": [{"role": str, "content": str}, ...]}                    a chat (needs the tokenizer's chat template)

A *sample* is `{"input_ids": LongTensor (T,), "labels": LongTensor (T,)}`; labels are aligned with input_ids as in
Hugging Face (the shift by one happens inside) and are -100 where a token has no part in the loss. It may hold a second
sample under "alternate": another answer to the same prompt, which some objectives need.

A *packed batch* is several samples end to end with no padding, and the offsets that separate them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LETTERS = "ABCDEFGHIJ"
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
IGNORE = -100
Sample = dict[str, torch.Tensor]


# ---------------------------------------------------------------- reading


def load_records(paths: str | Path | Sequence[str | Path]) -> list[dict]:
    """Reads JSONL files into records; each keeps where it came from in `record["_where"]` ("file:line").

    Errors: ValueError "file:line: ..." for a line that is no JSON, no known form, or has a wrong answer index; for a
    file without any record. Blank lines are skipped.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ValueError("no file was given: expected at least one JSONL file")
    records = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        count = len(records)
        with open(path, encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        records.append(parse_record(line, f"{path}:{number}"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text ({error}): save the file as UTF-8") from error
        if len(records) == count:
            raise ValueError(f"{path}: empty: expected at least one JSON line")
    return records


def parse_record(line: str, where: str) -> dict:
    """One JSON line to a checked record; `where` opens every error message."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}): {line.strip()[:80]!r}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise ValueError(f"{where}: not JSON that Python reads ({error}): {line.strip()[:80]!r}") from error
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise ValueError(f"{where}: not valid Unicode ({error.reason}): {line.strip()[:80]!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f'{where}: got a {type(record).__name__}, expected an object such as {{"text": ...}}')
    _check_record(record, where)
    return {**record, "_where": where}


def _check_record(record: Mapping, where: str) -> None:
    def text(key: str) -> None:
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"{where}: {key!r} must be a non-empty string, got {record.get(key)!r}")

    if "question" in record:
        text("question")
        choices, answer = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{where}: 'choices' must be a list of 2 to {len(LETTERS)} entries, got {choices!r}")
        if any(isinstance(c, bool) or not isinstance(c, (str, int, float)) or str(c) == "" for c in choices):
            raise ValueError(f"{where}: each of 'choices' must be a non-empty string or a number, got {choices!r}")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f"{where}: 'answer' must be the index of the right choice, 0 to {len(choices) - 1}, got {answer!r}"
            )
    elif "text" in record:
        text("text")
    elif "prompt" in record or "completion" in record:
        text("prompt")
        text("completion")
    elif "messages" in record:
        messages = record["messages"]
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
        )
        if not good:
            raise ValueError(
                f'{where}: \'messages\' must be a list of {{"role": str, "content": str}}, got {messages!r}'
            )
    else:
        raise ValueError(
            f"{where}: unknown form with keys {sorted(record)}: expected question + choices + answer, text, "
            "prompt + completion, or messages"
        )


def is_question(record: Mapping) -> bool:
    return "question" in record


def question_prompt(record: Mapping) -> str:
    """The evaluation's own four-choice form: question, lettered choices, "Answer:" (no trailing space)."""
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(record["choices"])]
    return "\n".join([record["question"], *choices, "Answer:"])


# ---------------------------------------------------------------- tokenising


def encode(
    records: Sequence[Mapping],
    tokenizer: Any,
    target: str = "all",
    max_length: int | None = None,
    alternate: str | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Tokenises each record once and marks the tokens whose loss counts.

    target: `all` tokens; the `answer` tokens (what follows "Answer:", the completion, the assistant's turns); the
    `letter` after "Answer:" (questions only); the digits of the last `number` in the text.
    Special tokens are the tokenizer's own (a begin-of-text token is kept, none is invented).

    alternate: also encode a second answer to each record's prompt, as `sample["alternate"]`:
    `given`: the record's own "alternate" string, in place of the answer, the completion, the last assistant turn or
    (of a text line) the text; `refusal`: one of REFUSALS; `wrong`: one of the wrong choices of a question.
    Which one it is follows from `seed` and the record's number. Its tokens count by `target` too; where that is `letter`
    or `number` and the answer is no choice of the question, all of the answer counts.

    Errors: ValueError that names the record ("file:line", or its place in `records`) when it has no known form, when
    a target does not apply to its form, when nothing is left to learn from, when it has no such alternate, and when
    samples are longer than `max_length` tokens (they are reported, not cut).
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
    samples = []
    for number, record in enumerate(records):
        if "_where" not in record:  # not from load_records, which has checked its own
            record = {**record, "_where": f"record {number}"}
            _check_record(record, record["_where"])
        sample = _encode_one(record, tokenizer, target)
        if alternate is not None:
            choose = random.Random(seed * 1_000_003 + number).choice
            other, counted = _alternate(record, alternate, target, choose)
            sample["alternate"] = _encode_one(other, tokenizer, counted)
        for part, what in ((sample, ""), (sample.get("alternate"), " in its alternate")):
            if part is not None and not bool((part["labels"][1:] != IGNORE).any()):
                raise ValueError(f"{record['_where']}: no token with a loss is left for target={target!r}{what}")
        samples.append(sample)
    names = [record.get("_where", f"record {i}") for i, record in enumerate(records)]
    check_lengths(samples, max_length, names)
    if alternate is not None:
        check_lengths([s["alternate"] for s in samples], max_length, [f"the alternate of {name}" for name in names])
    return samples


def _alternate(record: Mapping, kind: str, target: str, choose: Callable[[Sequence], Any]) -> tuple[dict, str]:
    """The record with its alternate for an answer, and the target that counts its tokens."""
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
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{where}: 'alternate' must be a non-empty string, the second answer, got {answer!r}")
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


def check_lengths(samples: Sequence[Sample], max_length: int | None, names: Sequence[str] | None = None) -> None:
    """ValueError that names the samples longer than `max_length` tokens, by `names` or by their place."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    long = [i for i, length in enumerate(lengths) if max_length is not None and length > max_length]
    if long:
        shown = ", ".join(f"{names[i] if names else f'sample {i}'} ({lengths[i]} tokens)" for i in long[:3])
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise ValueError(
            f"longer than max_length={max_length}: {shown}{more}. Shorten them, or raise max_length if the model has "
            "more positions: nothing is cut"
        )


def check_labels(samples: Sequence[Sample], names: Sequence[str] | None = None) -> None:
    """ValueError that names the first sample without a loss, by `names` or by its place."""
    for i, sample in enumerate(samples):
        if not bool((sample["labels"][1:] != IGNORE).any()):
            name = names[i] if names else f"sample {i}"
            raise ValueError(f"{name}: no token after its first has a label, so it has no loss")


def _encode_one(record: Mapping, tokenizer: Any, target: str) -> Sample:
    text, spans, special = _text_and_spans(record, tokenizer, target)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, truncation=False)
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
        numbers = list(re.finditer(r"\d+", text))
        if not numbers:
            raise ValueError(f"{where}: target='number' but there is no digit in {text[:80]!r}")
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

    def written(part: list[dict], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, **options)
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"{where}: the tokenizer's chat template does not take these messages: {error}") from error

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


# ---------------------------------------------------------------- packing


def _index(function: Callable[[PackedBatch], Any]) -> functools.cached_property:
    """A cached property made of integers alone: worked out on the host, and sent to the batch's device without a wait
    for what runs there."""

    def value(self: PackedBatch) -> Any:
        if self.host is self:
            return function(self)
        found = getattr(self.host, function.__name__)
        if isinstance(found, tuple):
            return tuple(send(x, self.device) for x in found)
        return None if found is None else send(found, self.device)

    value.__doc__ = function.__doc__
    return functools.cached_property(value)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`. The copy goes through pinned memory, so that the host does not wait for a GPU."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def grid(first: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """(B * width,) int64: item number at each place of a right-padded (B, width) grid whose row i holds the items
    first[i], ..., first[i] + counts[i] - 1; a padded place repeats first[i]."""
    place = torch.arange(width)
    return (first[:, None] + torch.where(place < counts[:, None], place, 0)).flatten()


@dataclasses.dataclass
class PackedBatch:
    """B samples end to end, T tokens in all, no padding.

    input_ids, labels, position_ids: (T,) int64; lengths: B ints whose sum is T.
    hidden: optional (T, D) activations at the input of layer `layer` (from the prefix cache).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    hidden: torch.Tensor | None = None
    layer: int = 0
    _host: PackedBatch | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def host(self) -> PackedBatch:
        """The same batch in main memory; itself if it is there."""
        if self.device.type == "cpu":
            return self
        if self._host is None:
            tensors = (x.cpu() for x in (self.input_ids, self.labels, self.position_ids))
            self._host = PackedBatch(*tensors, self.lengths)
        return self._host

    @functools.cached_property
    def row_counts(self) -> list[int]:
        """How many labelled rows each sample has."""
        return self.host.rows_per_sample.tolist()

    @_index
    def cu_seqlens(self) -> torch.Tensor:
        """(B+1,) int64 offsets: sample i holds the tokens cu_seqlens[i]:cu_seqlens[i+1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @_index
    def sample_of_token(self) -> torch.Tensor:
        """(T,) int64: the sample that each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_samples), torch.tensor(self.lengths))

    @_index
    def rows(self) -> torch.Tensor:
        """(R,) int64: the positions whose next token has a label. Only these need the head."""
        follows = self.position_ids[1:] != 0  # a sample's first token follows nothing
        return torch.nonzero(follows & (self.labels[1:] != IGNORE)).squeeze(1)

    @_index
    def targets(self) -> torch.Tensor:
        """(R,) int64: the token to be predicted at each of `rows`."""
        return self.labels[self.rows + 1]

    @_index
    def row_sample(self) -> torch.Tensor:
        """(R,) int64: the sample of each of `rows`."""
        return self.sample_of_token[self.rows]

    @_index
    def rows_per_sample(self) -> torch.Tensor:
        """(B,) int64: how many labelled rows each sample has."""
        return torch.bincount(self.row_sample, minlength=self.num_samples)

    @_index
    def pad_index(self) -> torch.Tensor | None:
        """(B * Lmax,) int64: the packed token at each place of the right-padded (B, Lmax) grid; a padded place
        repeats its sample's first token, so that it stays finite. None where no place is padded."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        return grid(self.cu_seqlens[:-1], torch.tensor(self.lengths), longest)

    @_index
    def unpad_index(self) -> torch.Tensor:
        """(T,) int64: the place of each packed token in the flattened (B, Lmax) grid."""
        return self.sample_of_token * max(self.lengths) + self.position_ids

    @_index
    def row_grid(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The labelled rows as a right-padded (B, Rmax) grid: (B * Rmax,) which of `rows` is at each place (padded
        places repeat one), (R,) the place of each of `rows` in the flattened grid, and (B, Rmax) the position in its
        sample of each place's token."""
        return self.row_grid_of(max(1, *self.row_counts))

    def row_grid_of(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`row_grid` of a batch on the host, for a grid of `width` places a sample, Rmax or more."""
        first = self.rows_per_sample.cumsum(0) - self.rows_per_sample
        index = grid(first, self.rows_per_sample, width).clamp(max=len(self.rows) - 1)
        back = self.row_sample * width + torch.arange(len(self.rows)) - first[self.row_sample]
        return index, back, self.position_ids[self.rows][index].view(-1, width)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`; from the host without a wait for what runs there."""
        device = torch.device(device)
        if self.device == device:
            return self
        host = self.host
        tensors = (send(x, device) for x in (host.input_ids, host.labels, host.position_ids))
        hidden = None if self.hidden is None else self.hidden.to(device)
        return PackedBatch(*tensors, self.lengths, hidden, self.layer, host)


def pack(samples: Sequence[Sample], hidden: torch.Tensor | None = None, layer: int = 0) -> PackedBatch:
    """Puts samples end to end, in main memory. `hidden` (T, D), on any device: their activations at the input of
    `layer`, in the same order."""
    if not samples:
        raise ValueError("an empty batch: expected at least one sample")
    lengths = [len(sample["input_ids"]) for sample in samples]
    if min(lengths) == 0:
        raise ValueError(f"sample {lengths.index(0)} of the batch has no token")
    return PackedBatch(
        input_ids=torch.cat([sample["input_ids"] for sample in samples]).cpu(),
        labels=torch.cat([sample["labels"] for sample in samples]).cpu(),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        hidden=hidden,
        layer=layer,
    )


def as_samples(samples: Iterable[Any]) -> list[Sample]:
    """Samples, or padded Hugging Face batches (input_ids, labels, attention_mask of shape (B, T)), to samples.

    Padding is dropped by the attention mask, so it can have no part in anything. A batch without labels takes its
    input_ids for labels. Left and right padding are both understood; a hole in the mask is refused.
    """
    if isinstance(samples, Mapping):
        samples = [samples]
    result: list[Sample] = []
    for number, item in enumerate(samples):
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise TypeError(f"sample {number}: got {type(item).__name__}, expected a mapping with input_ids and labels")
        input_ids = torch.as_tensor(item["input_ids"])
        labels = torch.as_tensor(item["labels"]) if item.get("labels") is not None else input_ids
        mask = item.get("attention_mask")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
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
            kept = torch.nonzero(kept).flatten()
            if len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
                raise ValueError(
                    f"sample {number}: its attention mask is empty or has a hole, which packing cannot keep"
                )
            inside = slice(int(kept[0]), int(kept[-1]) + 1)  # a view: no copy of the data set
            result.append({"input_ids": ids[inside].long(), "labels": label[inside].long()})
    if not result:
        raise ValueError("no samples: expected at least one")
    return result


def with_alternates(batch: Any) -> tuple[list[Sample], list[Sample] | None]:
    """`as_samples` of samples or padded batches, and of their alternates in the same order (None where none has one).

    An item holds its alternate, of its own form, under "alternate"; {"original": ..., "alternate": ...} is understood
    too. ValueError if only some have one, or if the numbers of samples differ.
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
