"""The folds of the RTT attack: parts of the forget set that say nothing about one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kunbr_fast.data.overlap import facts, of_folds, overlap
from kunbr_fast.files.shown import plain, shown

NAME = 40  # characters of a fold's name in messages and on the progress bar


@dataclass(frozen=True)
class Fold:
    """One part of the forget set: the records that teach its facts, and the questions that ask for them. Where no fold
    has questions, they are measured by the probability of their records' answers (`evaluation.probability`)."""

    name: str
    train_records: list[dict]
    questions: list[dict]


def metric_of(folds: Sequence[Fold]) -> str:
    """What the folds are measured by."""
    return "accuracy" if any(fold.questions for fold in folds) else "probability"


def check_folds(folds: Sequence[Fold]) -> None:
    names = [fold.name for fold in folds]
    if len(folds) < 2:
        raise ValueError(
            f"got {len(folds)} fold, expected at least two: the attack trains on the other folds and asks "
            "about one. Give the forget set as several files of independent facts"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"fold names {shown(names, 200)} are not all different; rename the files")
    for fold in folds:
        if not fold.train_records:
            raise ValueError(f"fold {plain(fold.name, NAME)}: train_records is empty")
        if not fold.questions and metric_of(folds) == "accuracy":
            raise ValueError(
                f"fold {plain(fold.name, NAME)}: questions is empty, and other folds have some: give each fold "
                "questions, or none (then all are measured by the probability of their records' answers)"
            )


def overlap_of(folds: Sequence[Fold], attack: bool = True) -> str | None:
    """What to tell where folds say something about one another, else None. attack: as of `of_folds`."""
    return of_folds(((fold.name, [*fold.train_records, *fold.questions]) for fold in folds), attack)


def taught_of(folds: Sequence[Fold], other_facts: Sequence[Mapping]) -> str | None:
    """What to tell where a fold's fact is among the other facts, else None. ValueError where there are no others."""
    if not other_facts:
        raise ValueError(
            "the attack other_facts has nothing to teach: give facts of the folds' form that are not in them "
            "(--other-facts, a retain set), or leave it out of the attacks"
        )
    asked = [record for fold in folds for record in (*fold.train_records, *fold.questions)]
    sides = facts({"fold record": asked}), facts({"other fact": other_facts})
    return overlap(sides, "in a fold and in the other facts: the attack would teach what it asks about")
