"""The measures by name. Each is one short function whose docstring has formula and source.

    @measure("knowledge", "probability of the answer", suites="core tofu")
    def probability(said: Readout) -> list[float]:
        '''p(answer | prompt)^(1/n), n the tokens of the answer. Source: TOFU, arXiv 2401.06121.'''
        return [answer.probability for answer in said.answers]

A function of one `Readout` gives a value for each item, None where it does not apply: the figure is their mean. A
function of a `Subject` and the name of a set gives a `Found`, or None where it does not apply.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from kunbr_fast.measures.answers import Subject
from kunbr_fast.measures.resampling import bootstrap_error, mean

GROUPS = ("knowledge", "memorisation", "privacy", "utility", "depth")
SUITES = ("core", "tofu", "muse", "all")  # all: every measure
SETS = ("forget", "retain", "holdout")
# What a measure may need beyond likelihoods: other inputs (of which the reason for its absence speaks), or other passes
# through the model. sets other than its own: "holdout" for membership inference.
READ = ("letter", "choice", "answers", "alternatives")  # of likelihoods: questions by scoring; own and other answers
NEEDS = (*READ, "generation", "states", "attack", "original", "retrained", "holdout")


@dataclasses.dataclass(frozen=True)
class Found:
    """A figure. number: of values that it is over. values: of each item, where it is their mean. detail: what else is
    to be said (sample sizes of a test, a value a layer), as JSON has it."""

    value: float
    standard_error: float | None
    number: int
    values: Sequence[float | None] | None = None
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measure:
    """title: for people. unit: "share" (0..1, shown in percent), or "" for a number. known: "higher" if a
    model that knows more of the set has more, "lower", or "" where that cannot be said."""

    name: str
    group: str
    title: str
    suites: tuple[str, ...]
    sets: tuple[str, ...]
    needs: tuple[str, ...]
    unit: str
    known: str
    function: Callable[..., Any]

    @property
    def formula(self) -> str:
        """The docstring, with the source."""
        return inspect.getdoc(self.function) or ""

    def __call__(self, subject: Subject, of: str) -> Found | None:
        """None where it does not apply to the set's items."""
        if len(inspect.signature(self.function).parameters) > 1:
            return self.function(subject, of)
        return mean_of(self.function(subject.sets[of]))


def mean_of(values: Sequence[float | None], /, **detail: Any) -> Found | None:
    """The mean of values that are there, with the bootstrap's standard error; None of none."""
    there = [float(value) for value in values if value is not None]
    if not there:
        return None
    return Found(mean(there), bootstrap_error(mean, there), len(there), list(values), detail)


MEASURES: dict[str, Measure] = {}


def measure(
    group: str,
    title: str,
    *,
    suites: str = "",
    sets: str = "forget retain holdout",
    needs: str = "",
    unit: str = "share",
    known: str = "higher",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function under its name. Of `suites`, `sets` and `needs` the words."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        words = [(suites, SUITES), (sets, SETS), (needs, NEEDS), (group, GROUPS)]
        unknown = [word for given, allowed in words for word in given.split() if word not in allowed]
        if unknown or function.__name__ in MEASURES or not function.__doc__:
            raise ValueError(f"measure {function.__name__}: {unknown or 'its name is taken, or it has no docstring'}")
        MEASURES[function.__name__] = Measure(
            function.__name__, group, title, *(tuple(words.split()) for words in (suites, sets, needs)),
            unit, known, function,
        )  # fmt: skip
        return function

    return register
