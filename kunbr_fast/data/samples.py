"""Samples: tokens and labels, taken from samples or padded batches, and checked.

A sample is `{"input_ids": LongTensor (T,), "labels": LongTensor (T,)}`. Labels are aligned with input_ids as in Hugging
Face (the shift by one happens inside) and are -100 where a token has no loss. Under "alternate" it may hold a second
sample: another answer to the same prompt, which some objectives need. `encode` makes them from records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.files.shown import shown

Sample = dict[str, torch.Tensor]

IGNORE = -100  # the label of a token that has no loss


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
