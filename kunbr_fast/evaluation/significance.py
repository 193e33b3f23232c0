"""How sure a mean over questions is, or the difference of two: standard errors, and what so many questions can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z = 1.959963984540054  # of a standard normal, 2.5 % beyond it on each side


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None of one."""
    number = len(values)
    if number < 2:
        return None
    mean = sum(values) / number
    return (sum((value - mean) ** 2 for value in values) / (number - 1) / number) ** 0.5


def change_error(before: Sequence[float], after: Sequence[float]) -> float | None:
    """The standard error of the difference of two means over the same questions."""
    return standard_error([b - a for a, b in zip(before, after, strict=True)])


def differing_share(difference: float, error: float | None, number: int) -> float | None:
    """The share of questions that were answered differently, from the difference of two shares and its standard error;
    None where that is not known."""
    if number == 1:
        return abs(difference)
    return None if error is None else error**2 * (number - 1) + difference**2


def questions_needed(difference: float, differing: float) -> int:
    """How many questions tell two shares apart: McNemar's test with continuity correction, two-sided at 5 %, for shares
    that stay so. difference: of the shares, not 0. differing: the share of questions that were answered differently,
    which is at least the difference; where it is not known, the 2 p (1 - p) of chance, p the mean of the two."""
    gap = abs(difference)
    differing = max(differing, gap)
    root = (Z * differing**0.5 + (Z * Z * differing + 4 * gap) ** 0.5) / (2 * gap)
    return math.ceil(root * root - 1e-9)


def chance_of(questions: Sequence[Mapping[str, Any]]) -> float | None:
    """The share that guessing answers, the mean of 1 / choices; None of no questions."""
    return sum(1 / len(question["choices"]) for question in questions) / len(questions) if questions else None


def above_chance(right: int, number: int, chance: float) -> bool:
    """Whether so many right answers are more than guessing gives: exact binomial test, one-sided at 5 %. (With unlike
    numbers of choices, chance is their mean, and the test on the safe side.)"""
    log = math.log
    total = 0.0
    for k in range(right, number + 1):
        ways = math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1)
        total += math.exp(ways + k * log(chance) + (number - k) * log(1 - chance))
    return total <= 0.05
