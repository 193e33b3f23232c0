"""Examples of a report: a few records of the forget set, and what a model takes for the answer to each.

Of a question it is the choice that the model holds most probable (`accuracy.Accuracy.predictions`), of another record
the probability of its answer (`probability`). Nothing is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kunbr_fast.data import is_question
from kunbr_fast.data.canonical import answered, asked, canonical
from kunbr_fast.data.content import choice_text
from kunbr_fast.evaluation.accuracy import Accuracy
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.probability import Probability, spread

MOST = 8
LONGEST = 400  # characters of a text that is shown
Said = Sequence[int | float] | None


def places_in(folds: Sequence[Fold]) -> list[list[int]]:
    """Of each fold the numbers of the questions (of folds without any, of the records) that are examples: `MOST` in
    all, spread evenly."""
    of_all = [(fold, i) for fold, data in enumerate(map(_measured, folds)) for i in range(len(data))]
    found = spread(of_all, MOST)
    return [[i for number, i in found if number == fold] for fold in range(len(folds))]


def _measured(fold: Fold) -> Sequence[Mapping[str, Any]]:
    return fold.questions or fold.train_records


def answers_at(found: Accuracy | Probability, places: Sequence[int]) -> list[int | float]:
    """The model's answers (`curves.Answers`) to the records with these numbers."""
    if isinstance(found, Accuracy):
        return [found.predictions[i] for i in places]
    return [round(found.values[i], 4) for i in places]


@dataclass(frozen=True)
class Examples:
    """records: that are shown. places: their numbers in the set that is measured. of_folds: whether they are the
    examples of the folds, so that what the attack brings back is known of them."""

    records: list[Mapping[str, Any]]
    places: list[int]
    of_folds: bool

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]], folds: Sequence[Fold]) -> Examples:
        """The folds' examples where all of them are among what is measured, else some of that."""
        chosen = [_measured(fold)[i] for fold, places in zip(folds, places_in(folds)) for i in places]
        numbers = {canonical(record): i for i, record in enumerate(measured)} if chosen else {}
        found = [numbers.get(canonical(record)) for record in chosen]
        of_folds = bool(found) and None not in found
        places = found if of_folds else spread(range(len(measured)), MOST)
        return cls([measured[i] for i in places], places, of_folds)

    def shown(self, original: Said, result: Said, attacked: Said, where: str) -> list[dict[str, str | None]]:
        """As report.json has them. The arguments are `curves.Answers` to the records: before, after, and under the
        strongest attack (None: not kept, by an earlier version, or not attacked). Without the first two there are none.
        where: begins the ValueError for answers to other records."""
        if original is None or result is None:
            return []
        attacked = attacked if self.of_folds and attacked is not None else [None] * len(self.records)
        if not len(original) == len(result) == len(attacked) == len(self.records):
            numbers = [len(part) for part in (original, result, attacked)]
            raise ValueError(f"{where}: answers to {numbers} examples, expected {len(self.records)} of each")
        return [
            {
                "question": _cut(asked(record)),
                "answer": _cut(answered(record)),
                **{
                    name: None if said is None else _said(record, said, where)
                    for name, said in (("original", before), ("result", after), ("attacked", then))
                },
            }
            for record, before, after, then in zip(self.records, original, result, attacked)
        ]


def _said(record: Mapping[str, Any], answer: int | float, where: str) -> str:
    if not is_question(record):
        return f"probability {answer:.2g}"
    if not isinstance(answer, int) or answer >= len(record["choices"]):
        raise ValueError(f"{where}: choice {answer} of a question with {len(record['choices'])}")
    return _cut(choice_text(record["choices"][answer]))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
