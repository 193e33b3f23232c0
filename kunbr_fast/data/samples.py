"""Samples: tokens and labels, taken from samples or padded batches, and checked.

A sample is `{"input_ids": LongTensor (T,), "labels": LongTensor (T,)}`. Labels are aligned with input_ids as in Hugging
Face (the shift by one happens inside) and are -100 where a token has no loss. Under "alternate" it may hold a second
sample: another answer to the same prompt, which some objectives need. `encode` makes them from records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from kunbr_fast.data import flattened
from kunbr_fast.data.annotations import is_annotation
from kunbr_fast.data.flattened import integers, pieces, tensor_of
from kunbr_fast.data.forms import FORMS
from kunbr_fast.files.shown import shown

Sample = dict[str, torch.Tensor]

IGNORE = -100  # the label of a token that has no loss
READ = ("input_ids", "labels", "attention_mask", "token_type_ids", "alternate", *flattened.KEYS)
HARMLESS = ("special_tokens_mask", "length", "offset_mapping", "overflow_to_sample_mapping", "use_cache", "return_loss")
LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
_OF_RECORDS = frozenset(key for form in FORMS for key in form)
_ALIKE = "a sample's loss is the mean over its labelled tokens, and all samples count alike: leave it out"
_TOKENS = "samples are given as tokens, in input_ids: leave it out"
HINTS = {
    **dict.fromkeys(("weight", "weights", "loss_weights", "sample_weight", "num_items_in_batch"), _ALIKE),
    **dict.fromkeys(("inputs_embeds", "pixel_values", "decoder_input_ids", "input_features"), _TOKENS),
    **dict.fromkeys(("past_key_values", "cache_position"), "a sample is run from its first token: leave it out"),
    "shift_labels": "labels are aligned with input_ids, and shifted inside: give labels",
    "cu_seqlens": f"the offsets of samples end to end are {flattened.OFFSETS[0]}, or give position_ids",
}
# How the words of a key begin by which other tools say where samples of a row begin and end, or where the loss is.
_BORDERS = tuple(
    "seq segment doc sample example pack chunk block bound start begin end offset split position row turn len cu mask "
    "attention".split()
)
_LOSSES = ("loss", "label", "target", "prompt", "source", "src", "response", "answer", "completion", "assistant")
_SPLIT = "give position_ids that begin at 0 with each, or split the row"
_WORDS = re.compile("[A-Z]?[a-z]+|[A-Z]+")


def has_loss(sample: Sample) -> bool:
    return bool((sample["labels"][1:] != IGNORE).any())


def check_lengths(
    samples: Sequence[Sample], max_length: int | None, names: Sequence[str], why: str = "nothing is cut"
) -> None:
    """ValueError that names the samples longer than `max_length` tokens. why: none of these was cut."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    long = [f"{name} ({n} tokens)" for name, n in zip(names, lengths) if max_length is not None and n > max_length]
    if long:
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise too_long(f"{', '.join(long[:3])}{more}", max_length, why)


def too_long(names: str, max_length: int, why: str) -> ValueError:
    return ValueError(
        f"longer than max_length={max_length}: {names}. Shorten them, or raise max_length if the model has more "
        f"positions: {why}"
    )


def check_labels(samples: Sequence[Sample], names: Sequence[str]) -> None:
    """ValueError that names the first sample without a labelled token."""
    for name, sample in zip(names, samples):
        if not has_loss(sample):
            raise ValueError(f"{name}: no token after its first has a label, so it has no loss")


def as_samples(samples: Iterable[Any]) -> list[Sample]:
    """Samples from samples, or from Hugging Face batches (input_ids, labels, attention_mask of shape (B, T)).

    The attention mask says what is padding, left or right, which is dropped; a hole in it is refused. Rows of samples
    end to end are taken apart (`flattened`). Without labels, input_ids are the labels.

    Nothing is ignored: ValueError names a key that would not be used. Taken beside these are what changes nothing
    (HARMLESS, annotations as of records, text, null, token_type_ids of 0) and masks of the loss that the labels keep.
    """
    if isinstance(samples, Mapping):
        samples = [samples]
    return list(chain.from_iterable(_found(samples)))


def _found(samples: Iterable[Any]) -> list[list[Sample]]:
    """`as_samples`, those of each item."""
    result = []
    labelled = []  # those that brought labels
    for number, item in enumerate(samples):
        where = f"sample {number}"
        if not isinstance(item, Mapping) or "input_ids" not in item:
            keys = f" with the keys {shown(list(item))}" if isinstance(item, Mapping) else ""
            raise TypeError(f"{where}: got {type(item).__name__}{keys}, expected a mapping with input_ids and labels")
        found = _samples_of(item, where)
        result.append(found)
        if item.get("labels") is not None:
            labelled += [(sample, where) for sample in found]
    if not any(result):
        raise ValueError("no samples: expected at least one")
    _check_aligned(labelled)
    return result


def _samples_of(item: Mapping[str, Any], where: str) -> list[Sample]:
    """Those of one sample or batch."""
    check_keys(item, (*READ, *HARMLESS, *LOSS_MASKS), where)
    ids = integers(item, "input_ids", where)
    labels = integers(item, "labels", where) if item.get("labels") is not None else ids
    mask = None if item.get("attention_mask") is None else _mask(item, ids, where)
    for name, tensor in (("labels", labels), ("attention_mask", mask)):
        if tensor is not None and tensor.shape != ids.shape:
            raise ValueError(f"{where}: {name} {tuple(tensor.shape)} and input_ids {tuple(ids.shape)} differ")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{where}: input_ids of shape {tuple(ids.shape)}, expected (T,) or (B, T)")
    _check_beside(item, labels, mask, where)
    if ids.dim() == 1:
        ids, labels, mask = ids[None], labels[None], None if mask is None else mask[None]
    if ids.shape[1] == 0:
        raise ValueError(f"{where}: it has no token: leave it out")
    found = []
    for row, tokens in pieces(item, mask, labels, ids, where):
        sample = {"input_ids": ids[row, tokens], "labels": labels[row, tokens]}  # views: no copy of the data set
        for name, wrong in (("token", sample["input_ids"] < 0), ("label", _wrong_labels(sample["labels"]))):
            if wrong.any():
                place = int(wrong.nonzero()[0])
                value = int(sample["input_ids" if name == "token" else "labels"][place])
                expected = f"0 or more, or {IGNORE} where there is no loss" if name == "label" else "0 or more"
                raise ValueError(f"{where}: the {name} {value} at place {place}: expected {expected}")
        found.append(sample)
    return found


def check_keys(item: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """ValueError, beginning with `where`, for a key that would not be used: neither known, an annotation, null, nor
    what tokens were made of (text, and the keys of a record)."""
    for key, value in item.items():
        if key in known or value is None or is_annotation(key) or key in _OF_RECORDS or _is_text(value):
            continue
        raise ValueError(f"{where}: {shown(key, 40)} would not be used: {HINTS.get(key) or _cure(key)}")


def _cure(key: object) -> str:
    """What to do with a key of an unknown name. To leave it out may be to change what the batch means."""
    words = [word.lower() for word in _WORDS.findall(key)] if isinstance(key, str) else []
    if any(word.startswith(_LOSSES) for word in words):
        return f"if it says which tokens have a loss, give labels of {IGNORE} where there is none; else leave it out"
    if any(word.startswith(_BORDERS) for word in words):
        return f"if it says where samples of a row begin or end, {_SPLIT}; else leave it out"
    return "leave it out, or begin its name with _"


def _is_text(value: Any) -> bool:
    """Whether it is text, texts, or a chat."""
    value = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


def _check_beside(item: Mapping[str, Any], labels: torch.Tensor, mask: torch.Tensor | None, where: str) -> None:
    """ValueError for token types, and for masks of the loss, that say what tokens and labels do not."""
    kept = torch.ones_like(labels) if mask is None else mask
    if item.get("token_type_ids") is not None:
        types = integers(item, "token_type_ids", where)
        if types.shape != labels.shape or bool((types[kept != 0] != 0).any()):
            raise ValueError(f"{where}: token_type_ids are not 0 throughout, and none of our models reads them")
    lengths, rows = item.get("length"), 1 if labels.dim() == 1 else len(labels)
    count = (
        lengths.numel() if torch.is_tensor(lengths) else len(lengths) if isinstance(lengths, (list, tuple)) else rows
    )
    if count != rows:
        raise ValueError(
            f"{where}: length of {count} samples in {rows} row{'s' * (rows > 1)}: {_SPLIT}; then leave it out"
        )
    for key in LOSS_MASKS:
        if item.get(key) is not None:
            loss = tensor_of(item, key, where, "0 and 1")
            if bool(((loss != 0) & (loss != 1)).any()):
                raise ValueError(
                    f"{where}: {key} has other values than 0 and 1: a sample's loss is the mean over its labelled "
                    f"tokens, which all count alike: give labels of {IGNORE} where there is no loss, and leave it out"
                )
            has = ((labels != IGNORE) & (kept != 0))[..., 1:]  # a first token never has a loss
            if loss.shape != labels.shape or not torch.equal(has, (loss != 0)[..., 1:] & (kept != 0)[..., 1:]):
                raise ValueError(
                    f"{where}: {key} would not be used, and the labels say another thing: expected labels of {IGNORE} "
                    "where it is 0"
                )


def _check_aligned(labelled: Sequence[tuple[Sample, str]]) -> None:
    """ValueError where all labels are those of the token after their place: a loss on them would be one token late."""
    strict = 0
    for sample, _ in labelled:
        ids, labels = sample["input_ids"], sample["labels"][:-1]
        if bool(((labels != IGNORE) & (labels != ids[1:])).any()):
            return
        strict += int(((labels != IGNORE) & (ids[:-1] != ids[1:])).sum())
    if strict > 1:  # one alone may be an answer of another kind
        raise ValueError(
            f"{labelled[0][1]}: its labels are shifted already, each is the token after its place: expected labels "
            "aligned with input_ids (labels[t] = input_ids[t]), as Hugging Face has them; the shift happens inside"
        )


def _mask(item: Mapping[str, Any], ids: torch.Tensor, where: str) -> torch.Tensor:
    mask = tensor_of(item, "attention_mask", where, "0 and 1")
    if mask.dim() > 2 or (mask.dim() == 2 and mask.shape != ids.shape and mask.shape[0] == mask.shape[1]):
        raise ValueError(
            f"{where}: attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ: a mask of token "
            "pairs is not read. Give 1 for a token and 0 for padding, or the samples' numbers (1, 1, 2, 2)"
        )
    if mask.is_complex() or bool((mask < 0).any()) or bool((mask != mask.long()).any()):
        raise ValueError(
            f"{where}: its attention mask has other values than 0 and 1: give 1 for a token and 0 for padding"
        )
    return mask.long()


def _wrong_labels(labels: torch.Tensor) -> torch.Tensor:
    return (labels < 0) & (labels != IGNORE)


def with_alternates(batch: Any) -> tuple[list[Sample], list[Sample] | None]:
    """(`as_samples` of samples or padded batches, the same of their alternates); None for the second if none has any.

    An item holds its alternate under "alternate", in its own form; or it is {"original": ..., "alternate": ...}.
    ValueError if only some items have one, or if the numbers of samples differ.
    """
    items = [batch] if isinstance(batch, Mapping) else list(batch)
    for number, item in enumerate(items):
        if isinstance(item, Mapping) and "original" in item:
            check_keys(item, ("original", "alternate"), f"sample {number}")
    originals = [item.get("original", item) if isinstance(item, Mapping) else item for item in items]
    samples = _found(originals)
    others = [item.get("alternate") if isinstance(item, Mapping) else None for item in items]
    if all(other is None for other in others):
        return list(chain.from_iterable(samples)), None
    if any(other is None for other in others):
        raise ValueError(f"sample {[o is None for o in others].index(True)} has no alternate, and others have one")
    alternates = _found(others)
    for number, (found, other) in enumerate(zip(samples, alternates)):
        if len(found) != len(other):
            raise ValueError(
                f"sample {number}: it holds {len(found)} and its alternate {len(other)}: expected one alternate for "
                "each sample"
            )
    return list(chain.from_iterable(samples)), list(chain.from_iterable(alternates))
