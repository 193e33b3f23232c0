"""What a Trainer is given: its data sets, as forget and retain samples, and what is asked of the models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.data import is_question, is_record, load_records
from kunbr_fast.data.samples import READ, check_keys
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.samples import entries

logger = logging.getLogger(__name__)

SETS = ("forget", "retain")
Records = Sequence[Mapping] | str | Path | Sequence[str | Path]  # or files of them


def as_named_here(given: Mapping[str, Any]) -> dict[str, Any]:
    """A Trainer's keywords: tokenizer by its present name, and a stream of data, of which Trainer wants to know the
    length, as a list."""
    given = dict(given)
    if "tokenizer" in given:
        if given.get("processing_class") is not None:
            raise ValueError("tokenizer and processing_class are the same: give processing_class alone")
        logger.warning("tokenizer= is taken as processing_class=, its present name")
        given["processing_class"] = given.pop("tokenizer")
    data = given.get("train_dataset")
    if data is not None and not hasattr(data, "__len__") and not _has_both(data):
        given["train_dataset"] = entries(data, "train_dataset")
    return given


def as_config(config: KUnBRConfig | Mapping[str, Any] | None) -> KUnBRConfig:
    if isinstance(config, (str, Path)):
        raise ValueError(f"config: got {shown(str(config))}, expected settings: KUnBRConfig.load(...) reads a file")
    if not isinstance(config, (KUnBRConfig, Mapping, type(None))):
        raise ValueError(f"config: got {shown(config)}, expected a KUnBRConfig or a mapping of its settings")
    return KUnBRConfig.from_dict(dict(config)) if isinstance(config, Mapping) else config or KUnBRConfig()


def forget_and_retain(
    forget: Any, retain: Any, train: Any, collator: Callable[[list], Any] | None
) -> tuple[list[Any], list[Any]]:
    """The samples of the two data sets, or of the one that holds both."""
    if forget is None and isinstance(train, Mapping):
        forget, retain = _splits(train)
    elif forget is None and _has_both(train):
        forget, retain = train.forget or [], train.retain or []
    if forget is None:
        return _apart(train, collator)
    return _items(forget, "forget"), _items(retain, "retain")


def _has_both(data: Any) -> bool:
    return hasattr(data, "forget") and hasattr(data, "retain")


def _splits(data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two of a mapping, a DatasetDict say."""
    got = f"train_dataset: got {' and '.join(map(plain, data)) or 'nothing'}, expected forget and retain"
    if missing := [name for name in SETS if name not in data]:
        names = ", ".join(f"{name!r}: data[...]" for name in SETS)
        raise ValueError(f"{got}: {' and '.join(missing)} missing: name its parts, {{{names}}}")
    if others := [name for name in data if name not in SETS]:
        both = ", ".join(f"{name!r}: data[{name!r}]" for name in SETS)
        raise ValueError(f"{got}: {', '.join(map(plain, others))} would not be read: give {{{both}}}")
    return data["forget"], data["retain"]


def check_tokenizer(tokenizer: Any, given: Mapping[str, Sequence[Any]]) -> None:
    """ValueError where data hold text and there is no tokenizer. given: by name."""
    for name, data in given.items():
        if tokenizer is None and data and isinstance(data[0], Mapping) and is_record(data[0]):
            raise ValueError(
                f"{name}: records, not tokens ({shown(dict(data[0]))}): give a tokenizer as processing_class="
            )


def _items(data: Any, name: str = "train") -> list[Any]:
    """A data set as a list; where an item has two answers, its own is on top and the other under "alternate"."""
    if isinstance(data, Mapping) and not {"input_ids", "original"} & data.keys():
        parts = ", ".join(plain(key) for key in data)
        raise ValueError(f"{name}_dataset: got a mapping of {parts}, expected one data set: give one of its parts")
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (Mapping, str)):
        data = [data[i] for i in range(len(data))]  # not all of these are iterables that end
    items = entries(data, name)
    pairs = [isinstance(item, Mapping) and "original" in item for item in items]
    for number, item in enumerate(items):
        if pairs[number]:
            check_keys(item, ("original", "alternate"), f"sample {number}")
    items = [{**item["original"], "alternate": item["alternate"]} if pair else item for item, pair in zip(items, pairs)]
    return [_present(item) if isinstance(item, Mapping) and is_record(item) else item for item in items]


def _present(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the keys that are null: a table has them for records of other forms."""
    return {key: value for key, value in record.items() if value is not None} or record


def _apart(data: Any, collator: Callable[[list], Any] | None) -> tuple[list[Any], list[Any]]:
    """The forget and retain samples of a data set of pairs, each different one once."""
    found: dict[str, dict[tuple, Any]] = {name: {} for name in SETS}
    for number, item in enumerate(_items(data)):
        whole = isinstance(item, Mapping) and {"forget", "retain"} <= set(item)
        pair = item
        if not whole and collator is not None:
            with contextlib.suppress(Exception):  # Trainer's own makes batches of tokens alone
                pair = collator([item])
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
    """What tells a sample from another: all that is read of it, and of a record all of it."""
    if is_record(sample):
        return (json.dumps(sample, sort_keys=True, default=str),)
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

    @property
    def texts(self) -> dict[str, Sequence[Mapping]]:
        """All of it, by names for errors."""
        of_folds = {f"fold {plain(fold.name)}": fold.train_records for fold in self.folds}
        return {**of_folds, "forget_questions": self.forget or (), "retain_questions": self.retain or ()}

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
    if isinstance(given, Mapping):
        raise ValueError(f"{name}: got {shown(dict(given))}, expected a list of records, or files of them")
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
