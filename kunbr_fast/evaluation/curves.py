"""Relearning curves: how much comes back, by attack, learning rate and epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec

from kunbr_fast.data.content import LETTERS
from kunbr_fast.evaluation.candidates import SAMPLES, guessing
from kunbr_fast.evaluation.significance import differing_share
from kunbr_fast.files.documents import checked
from kunbr_fast.files.shown import shown

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Error = Annotated[float, msgspec.Meta(ge=0, le=1)] | None
# Of each example (`evaluation.examples`) the number of a choice, or the probability of the answer.
Answers = list[Annotated[int, msgspec.Meta(ge=0, lt=len(LETTERS))] | Share]
KEYS = ("plain", "calibrated", "smooth")


class _Measured(TypedDict):
    fold: str
    lr: float
    epoch: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    plain: Share
    calibrated: Share | None


class Point(_Measured, total=False):
    """A point of a relearning curve. Those of earlier versions have the five first fields alone, of the attack `full`.

    metric: of a fold without questions "probability"; then `plain` is the mean answer probability of its records, whose
    number num_questions is, and `error` its standard error. change_error: the standard error of the difference to
    before the attack, over the same questions or records. diverged: the training of this fold diverged; the only point
    of its curve. answers: to the fold's examples, where it has any.
    """

    attack: str
    metric: Literal["probability"]
    error: Error
    change_error: Error
    num_questions: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    smooth: Share | None
    smooth_error: Error
    leak: Annotated[list[Share], msgspec.Meta(min_length=len(SAMPLES), max_length=len(SAMPLES))] | None
    pool: Annotated[float, msgspec.Meta(ge=1, le=10**9)] | None
    diverged: bool
    answers: Answers


class Curves(TypedDict):
    curves: list[Point]


class Strongest(NamedTuple):
    attack: str
    lr: float
    epoch: int


def attack_of(row: Point) -> str:
    return row.get("attack", "full")


class RTTResult:
    """Relearning curves: rows as of `Point`, epoch 0 is before the attack. All are of one metric: accuracies, or of
    folds without questions answer probabilities; then every `accuracy` here is such a probability, and "questions" are
    records.

    `calibrated` is None where the scoring has no such figure. A (attack, learning rate) that diverged on a fold has no
    curve, see `diverged`. ValueError unless every learning rate of an attack has every fold and epoch, and all rows one
    metric and those of a fold the same number of questions.

    Each question counts once in every figure: a fold weighs as much as it has questions. Rows of earlier versions may
    not say how many; where that is unknown of a fold, each fold counts once, as those versions had it.
    """

    def __init__(self, curves: list[dict]):
        self.curves = curves
        failed = {(attack_of(row), row["lr"]) for row in curves if row.get("diverged")}
        self._rows: dict[tuple[str, float], dict[tuple[str, int], dict]] = {}
        number = 0
        for row in curves:
            if (key := (attack_of(row), row["lr"])) not in failed:
                self._rows.setdefault(key, {})[row["fold"], row["epoch"]] = row
                number += 1
        self._folds = list(dict.fromkeys(row["fold"] for row in curves))
        self._epochs: dict[str, list[int]] = {}  # by attack
        for (attack, _), cells in self._rows.items():
            found = sorted({*self._epochs.get(attack, ()), *(epoch for _, epoch in cells)})
            self._epochs[attack] = found
        whole = bool(self._rows) and number == sum(map(len, self._rows.values()))
        for (attack, _), cells in self._rows.items():
            epochs = self._epochs[attack]
            regular = len(epochs) > 1 and epochs == list(range(0, epochs[-1] + 1, epochs[1]))
            whole &= regular and cells.keys() == {(fold, epoch) for fold in self._folds for epoch in epochs}
        if not whole:
            last = max((epochs[-1] for epochs in self._epochs.values()), default=0)
            raise ValueError(
                f"relearning curves are not complete: got {len(curves)} rows, expected one for each of "
                f"{len(self._folds)} folds x {max(len(self._rows), 1)} attacks and learning rates x epochs "
                f"0..{max(last, 1)}"
            )
        self.metric = _metric(curves)
        self._numbers = _numbers(curves, self._folds)
        self._weights = _weights(self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RTTResult) and self.curves == other.curves

    __hash__ = None

    # ------------------------------------------------ curves

    @property
    def attacks(self) -> list[str]:
        """The attacks that have a curve, in the order they were made."""
        return list(dict.fromkeys(attack for attack, _ in self._rows))

    @property
    def lrs(self) -> list[float]:
        """Learning rates of the first attack, in the order they were tried."""
        return self.rates(self.attacks[0])

    def rates(self, attack: str) -> list[float]:
        """Learning rates of an attack."""
        return [lr for name, lr in self._rows if name == attack]

    def epochs(self, attack: str) -> list[int]:
        """When an attack was measured, from 0 on."""
        return self._epochs[attack]

    def curve(self, lr: float, key: str = "plain", attack: str = "full") -> list[float] | None:
        """Mean over all questions at each of `epochs(attack)`; None if `key` was not measured."""
        if (attack, lr) not in self._rows or key not in KEYS:
            known = "; ".join(f"{name} at {self.rates(name)}" for name in self.attacks)
            raise ValueError(
                f"no curve {key!r} of {attack} at learning rate {lr}: there are {', '.join(KEYS)} of {known}"
            )
        return self._means(attack, lr, key)

    def _means(self, attack: str, lr: float, key: str) -> list[float] | None:
        cells = self._rows[attack, lr]
        if any(row.get(key) is None for row in cells.values()):
            return None
        return [self._mean([cells[fold, epoch][key] for fold in self._folds]) for epoch in self._epochs[attack]]

    def _mean(self, values: Sequence[float]) -> float:
        """Over questions, of each fold's value, in the folds' order."""
        weights = self._weights
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    @property
    def diverged(self) -> list[dict[str, Any]]:
        """What has no curve: the trainings that diverged."""
        return [
            {"attack": attack_of(row), "lr": row["lr"], "fold": row["fold"]}
            for row in self.curves
            if row.get("diverged")
        ]

    @property
    def num_questions(self) -> int | None:
        """Of all folds; None where it is not known."""
        return None if None in self._numbers else sum(self._numbers)

    # ------------------------------------------------ the strongest

    @property
    def before(self) -> float:
        """Plain accuracy before the attack, over all questions."""
        return self._means(self.attacks[0], self.lrs[0], "plain")[0]

    @property
    def accuracy(self) -> float:
        """RTT accuracy, the strongest attack found: the highest of any (attack, lr, epoch >= 1)."""
        return self._best("plain")[0]

    @property
    def strongest(self) -> Strongest:
        """(attack, lr, epoch) of the strongest; a tie goes to what was tried first, then to the early epoch."""
        return self._best("plain")[1]

    @property
    def best(self) -> tuple[float, int]:
        """(lr, epoch) of the strongest attack."""
        return self.strongest[1:]

    @property
    def calibrated_accuracy(self) -> float | None:
        """The strongest attack by calibrated accuracy, None where that was not measured."""
        return self._best("calibrated")[0]

    @property
    def smooth_accuracy(self) -> float | None:
        """The strongest attack by smooth accuracy, None where that was not measured."""
        return self._best("smooth")[0]

    @property
    def recovery(self) -> float:
        """What the attack brought back: accuracy minus the accuracy before it, of the same questions."""
        found, number = self.accuracy - self.before, self.num_questions
        if self.metric == "accuracy" and number and abs(found * number - round(found * number)) < 1e-9 * number:
            return round(found * number) / number  # questions, which are counted: none is 0, not a rounding error
        return found

    @property
    def standard_error(self) -> float | None:
        """Of `accuracy`, see `error`."""
        return self.error(self.strongest)

    def error(self, at: Strongest, key: str = "plain") -> float | None:
        """The standard error of a mean over questions, each fold's its own: sqrt(sum of n p (1 - p) over folds) / all
        questions, for `smooth` from its spread over questions. (Two folds alone would tell little.) It says how far
        another set of as many questions would be; not how far another training would, which takes several seeds. None
        where a fold has one question, which has no spread, and where an earlier version has not kept their number."""
        rows = [self._rows[at.attack, at.lr][fold, at.epoch] for fold in self._folds]
        if key == "smooth":
            return self._joint([row.get("smooth_error") for row in rows])
        if self.metric == "probability":
            return self._joint([row.get("error") for row in rows])
        numbers = [row.get("num_questions") for row in rows]
        spread = [(row[key] * (1 - row[key])) ** 0.5 for row in rows]
        return self._joint([s / n**0.5 if n is not None and n > 1 else None for s, n in zip(spread, numbers)])

    @property
    def change_error(self) -> float | None:
        """The standard error of `recovery`, of the same questions before and after; None where it was not kept."""
        return self.change_error_at(self.strongest)

    def change_error_at(self, at: Strongest) -> float | None:
        """The standard error of the difference to before the attack at one point of its curve."""
        return self._joint([self._rows[at.attack, at.lr][fold, at.epoch].get("change_error") for fold in self._folds])

    @property
    def differing(self) -> float | None:
        """The share of questions that the strongest attack has answered otherwise than before it, in each fold counted
        by itself; None where it was not kept."""
        attack, lr, epoch = self.strongest
        cells, found = self._rows[attack, lr], []
        for fold, number in zip(self._folds, self._numbers):
            before, row = cells[fold, 0], cells[fold, epoch]
            found.append(number and differing_share(row["plain"] - before["plain"], row.get("change_error"), number))
        return None if None in found else self._mean(found)

    @property
    def answers(self) -> Answers:
        """To the examples of all folds, in their order, under the strongest attack; none where they were not kept."""
        attack, lr, epoch = self.strongest
        cells = self._rows[attack, lr]
        return [answer for fold in self._folds for answer in cells[fold, epoch].get("answers", ())]

    def _joint(self, errors: Sequence[float | None]) -> float | None:
        """The standard error of a mean over questions, from each fold's."""
        if None in errors:
            return None
        return sum((w * error) ** 2 for w, error in zip(self._weights, errors)) ** 0.5 / sum(self._weights)

    def _best(self, key: str, attack: str | None = None) -> tuple[float | None, Strongest | None]:
        """The highest value of any attack, or of one; (None, None) where one of them has no such values."""
        curves = {(name, lr): self._means(name, lr, key) for name, lr in self._rows if attack in (None, name)}
        if None in curves.values():
            return None, None
        found = [
            (value, Strongest(name, lr, epoch))
            for (name, lr), values in curves.items()
            for epoch, value in zip(self._epochs[name], values)
            if epoch
        ]
        return max(found, key=lambda item: item[0])  # the first of equal ones

    def leaks(self, attack: str | None = None) -> list[float] | None:
        """The share of all questions whose answer is among k sampled ones, for each k of `SAMPLES`: after an attack, at
        the rate where it is the most, or (None) before all. None where it was not measured."""
        epoch = 0 if attack is None else self._epochs[attack][-1]
        found = []
        for lr in self.rates(attack or self.attacks[0]):
            curves = [self._rows[attack or self.attacks[0], lr][fold, epoch].get("leak") for fold in self._folds]
            if None in curves:
                return None
            found.append([self._mean(values) for values in zip(*curves)])
        return max(found, key=lambda curve: curve[-1])

    @property
    def guesses(self) -> list[float] | None:
        """`leaks` of guessing among the candidates; None where they are not known."""
        first = self._rows[self.attacks[0], self.lrs[0]]
        pools = [first[fold, 0].get("pool") for fold in self._folds]
        if None in pools:
            return None
        return [self._mean(values) for values in zip(*map(guessing, pools))]

    # ------------------------------------------------ for readers

    def summary(self, attack: str) -> dict[str, Any]:
        """An attack's strongest point by plain accuracy, its highest calibrated and smooth accuracy, and its leak."""
        accuracy, at = self._best("plain", attack)
        smooth, smooth_at = self._best("smooth", attack)
        return {
            "lr": at.lr,
            "epoch": at.epoch,
            "accuracy": accuracy,
            "standard_error": self.error(at),
            "calibrated_accuracy": self._best("calibrated", attack)[0],
            "smooth_accuracy": smooth,
            "smooth_error": None if smooth is None else self.error(smooth_at, "smooth"),
            "leak": self.leaks(attack),
        }

    def to_dict(self) -> dict:
        """JSON form: the summary for readers, and the curves, from which from_dict makes the result again."""
        attack, lr, epoch = self.strongest
        return {
            "metric": self.metric,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "calibrated_accuracy": self.calibrated_accuracy,
            "smooth_accuracy": self.smooth_accuracy,
            "before": self.before,
            "recovery": self.recovery,
            "best": {"lr": lr, "epoch": epoch},
            "strongest": {"attack": attack, "lr": lr, "epoch": epoch},
            "attacks": {name: self.summary(name) for name in self.attacks},
            "diverged": self.diverged,
            "leak": {"samples": list(SAMPLES), "before": self.leaks(), "guessing": self.guesses},
            "curves": [dict(row) for row in self.curves],
        }

    @classmethod
    def from_dict(cls, value: dict, where: str = "RTT result") -> RTTResult:
        """The result that to_dict wrote; the summary is computed anew from the curves. ValueError, which begins with
        `where`, for values of other types."""
        return cls(checked(value, Curves, where)["curves"])


def _metric(curves: list[Point]) -> str:
    found = sorted({row.get("metric", "accuracy") for row in curves})
    if len(found) > 1:
        raise ValueError(
            f"relearning curves are of {' and '.join(found)}: expected one metric, they are not comparable"
        )
    return found[0]


def _numbers(curves: list[Point], folds: list[str]) -> list[int | None]:
    """The questions of each fold, as far as its rows say."""
    numbers: dict[str, int] = {}
    for row in curves:
        if (number := row.get("num_questions")) and numbers.setdefault(row["fold"], number) != number:
            raise ValueError(
                f"relearning curves of fold {shown(row['fold'])} have {numbers[row['fold']]} questions and {number}: "
                "expected the same questions in all rows of a fold"
            )
    return [numbers.get(fold) for fold in folds]


def _weights(numbers: list[int | None]) -> list[int]:
    """Of each fold, in proportion to its questions; 1 of folds of one size, and where one's is not known."""
    if None in numbers:
        return [1] * len(numbers)
    common = math.gcd(*numbers)
    return [number // common for number in numbers]
