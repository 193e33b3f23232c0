"""The data sets that a Trainer is given, as forget and retain samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kunbr_fast.data.samples import READ, check_keys


def forget_and_retain(
    forget: Any, retain: Any, train: Any, collator: Callable[[list], Any] | None
) -> tuple[list[Any], list[Any]]:
    """The samples of the two data sets, or of the one that holds both."""
    if forget is not None:
        return _items(forget), _items(retain)
    if hasattr(train, "forget") and hasattr(train, "retain"):
        return _items(train.forget or []), _items(train.retain or [])
    return _apart(train, collator)


def _items(data: Any) -> list[Any]:
    """A data set as a list; where an item has two answers, its own is on top and the other under "alternate"."""
    items = [data[i] for i in range(len(data))] if hasattr(data, "__len__") else list(data)
    pairs = [isinstance(item, Mapping) and "original" in item for item in items]
    for number, item in enumerate(items):
        if pairs[number]:
            check_keys(item, ("original", "alternate"), f"sample {number}")
    return [{**item["original"], "alternate": item["alternate"]} if pair else item for item, pair in zip(items, pairs)]


def _apart(data: Any, collator: Callable[[list], Any] | None) -> tuple[list[Any], list[Any]]:
    """The forget and retain samples of a data set of pairs, each different one once."""
    found: dict[str, dict[tuple, Any]] = {"forget": {}, "retain": {}}
    for number, item in enumerate(_items(data)):
        whole = isinstance(item, Mapping) and {"forget", "retain"} <= set(item)
        pair = item if whole or collator is None else collator([item])
        if not isinstance(pair, Mapping) or not {"forget", "retain"} <= set(pair):
            raise ValueError(
                f'train_dataset[{number}]: expected {{"forget": ..., "retain": ...}}, from the item itself or from '
                "data_collator([item]); or give forget_dataset= and retain_dataset="
            )
        check_keys(pair, tuple(found), f"train_dataset[{number}]")
        for name, samples in found.items():
            (sample,) = _items([pair[name]])
            samples.setdefault(_content(sample), sample)
    return list(found["forget"].values()), list(found["retain"].values())


def _content(sample: Any) -> tuple:
    """What tells a sample from another: all that is read of it."""
    given = [(key, sample[key]) for key in READ if sample.get(key) is not None]
    return tuple(
        (key, _content(value) if isinstance(value, Mapping) else torch.as_tensor(value).cpu().numpy().tobytes())
        for key, value in given
    )
