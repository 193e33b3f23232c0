"""What a Trainer is given: its data sets, as forget and retain samples, and what is asked of the models."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.data import is_question, load_records
from kunbr_fast.data.samples import READ, check_keys
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.run.config import KUnBRConfig

logger = logging.getLogger(__name__)

Records = Sequence[Mapping] | str | Path | Sequence[str | Path]  # or files of them


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


# ---------------------------------------------------------------- what is asked of the models


@dataclasses.dataclass(frozen=True)
class Asked:
    """Folds of the attack, and questions for accuracy (None: those that there are otherwise)."""

    folds: list[Fold]
    forget: list[Mapping] | None
    retain: list[Mapping] | None

    @classmethod
    def of(
        cls,
        folds: Sequence[Fold | str | Path] | None,
        forget: Records | None,
        retain: Records | None,
        config: KUnBRConfig,
        explicit: bool,
    ) -> Asked:
        """The files read. Says which settings count for nothing. explicit: the user has set config.rtt."""
        equal = config.equal_choices
        found = cls(
            [_fold(fold, number, equal) for number, fold in enumerate(_several(folds))],
            None if forget is None else _asked(forget, "forget_questions", equal),
            None if retain is None else _asked(retain, "retain_questions", equal),
        )
        unused = [name for name in _settings("rtt_") if getattr(config, name) != getattr(KUnBRConfig(), name)]
        if found.folds and not config.rtt:
            logger.warning("folds=: rtt=False, there is no attack; accuracy is measured on their questions")
        elif not found.folds and config.rtt:
            cure = "folds= (two or more files of records, or kunbr_fast.evaluation.rtt.Fold) has one made"
            if explicit:
                raise ValueError(f"config: rtt=True without folds: there is nothing to attack with: {cure}")
            logger.log(
                logging.WARNING if unused else logging.INFO,
                "there is no RTT attack%s: %s",
                f", {', '.join(unused)} count{'s' * (len(unused) == 1)} for nothing" * bool(unused),
                cure,
            )
        return found

    def check_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is None and (self.folds or self.forget or self.retain):
            raise ValueError("folds and questions hold text: give a tokenizer as processing_class=")

    def questions(self, forget: Sequence[Any], retain: Sequence[Any], config: KUnBRConfig) -> dict[str, list[Mapping]]:
        """Those about each set, as `RunInputs` has them. forget, retain: the data."""
        of_folds = [record for fold in self.folds for record in fold.questions]
        found = {
            "forget": (of_folds or _among(forget)) if self.forget is None else self.forget,
            "retain": _among(retain) if self.retain is None else self.retain,
        }
        if not any(found.values()) and config.scoring != KUnBRConfig.scoring:
            logger.warning(
                "scoring=%r counts for nothing, as nothing is asked: give forget_questions= or retain_questions=",
                config.scoring,
            )
        return found


def _settings(prefix: str) -> list[str]:
    return [field.name for field in dataclasses.fields(KUnBRConfig) if field.name.startswith(prefix)]


def _several(folds: Any) -> list[Any]:
    if isinstance(folds, (str, Path, Fold, Mapping)):
        raise ValueError(f"folds: got {shown(folds)}, expected a list of two or more files, or Folds")
    return list(folds or ())


def _fold(fold: Any, number: int, equal_choices: str) -> Fold:
    if isinstance(fold, Fold):
        return fold
    if not isinstance(fold, (str, Path)):
        raise ValueError(f"folds[{number}]: got {shown(fold)}, expected a file of records, or a Fold")
    records = load_records(fold, equal_choices=equal_choices)
    return Fold(Path(fold).stem, records, [record for record in records if is_question(record)])


def _asked(given: Any, name: str, equal_choices: str) -> list[Mapping]:
    found, expected = [given] if isinstance(given, (str, Path)) else list(given), "question, choices and answer"
    if found and all(isinstance(file, (str, Path)) for file in found):
        if not (asked := _among(load_records(found, equal_choices=equal_choices))):
            raise ValueError(f"{name}: {plain(found[0])} has no question: expected lines with {expected}")
        return asked
    for number, record in enumerate(found):
        if not isinstance(record, Mapping) or not is_question(record):
            raise ValueError(f"{name}[{number}]: got {shown(record)}, expected records with {expected}, or files")
    return found


def _among(data: Sequence[Any]) -> list[Mapping]:
    return [record for record in data if isinstance(record, Mapping) and is_question(record)]
