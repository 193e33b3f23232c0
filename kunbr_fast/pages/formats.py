"""What is read of report.json and evaluation.json, as types that `files.documents.checked` holds them against.

Keys that are not named here are let be: later versions may write more.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import msgspec

from kunbr_fast.evaluation.curves import Share
from kunbr_fast.run.identity import Record

Error = Annotated[float, msgspec.Meta(ge=0)] | None
Number = Annotated[int, msgspec.Meta(ge=1)]  # of questions or records
Whole = Annotated[int, msgspec.Meta(ge=0)]
Seconds = dict[str, Annotated[float, msgspec.Meta(ge=0)]]


class Example(TypedDict, total=False):
    """A question and what models say."""

    set: str
    question: str
    answer: str
    original: str | None
    unlearned: str | None
    result: str | None
    retrained: str | None
    attacked: str | None


# ---------------------------------------------------------------- a run


class _Accuracy(TypedDict):
    plain: Share
    num_questions: Number


class Accuracy(_Accuracy, total=False):
    calibrated: Share | None
    smooth: Share | None
    smooth_error: Error
    change_error: Error
    chance: Share | None


class _Probability(TypedDict):
    mean: Share
    standard_error: Error
    num_records: Number


class Probability(_Probability, total=False):
    change_error: Error


class Config(TypedDict, total=False):
    """The settings that the page reads; it shows all."""

    objective: str
    warmup_objective: str | None
    adversary_every: int
    skip_last_layers: Whole


class _Report(TypedDict):
    kunbr_fast: str
    config: Config
    blocks: list[tuple[int, int]]
    density: dict[str, Any]
    seconds: Seconds
    losses: dict[str, list[dict[str, float | None]]]
    accuracy: dict[str, dict[str, Accuracy]]
    rtt: dict[str, Any] | None
    model: str


class Report(_Report, total=False):
    """A run's, besides its density and its curves, which have readers of their own."""

    probability: dict[str, dict[str, Probability]]
    cautions: list[str]
    examples: list[Example]
    gradient_cosines: dict[str, float]
    cache_errors: dict[str, dict[str, float]]
    result: Record


# ---------------------------------------------------------------- an evaluation


class Figure(TypedDict):
    measure: str
    title: str
    group: str
    set: str
    model: str
    value: float
    standard_error: Error
    number: Whole
    unit: str
    known: str
    detail: dict[str, Any]


class Missing(TypedDict):
    measure: str
    why: str


class Model(TypedDict, total=False):
    path: str | None
    fingerprint: str | None  # of one that was in memory, where nothing was kept


class Set(TypedDict, total=False):
    records: Whole
    files: list[str]
    forms: dict[str, int]
    fingerprint: str


class Scored(TypedDict):
    value: float
    standard_error: Error


class Task(TypedDict, total=False):
    """Of lm-evaluation-harness."""

    metric: str
    original: Scored
    result: Scored


class _Evaluation(TypedDict):
    kunbr_fast: str
    format: int
    suite: str
    settings: dict[str, Any]
    models: dict[str, Model]
    sets: dict[str, Set]
    figures: list[Figure]


class Evaluation(_Evaluation, total=False):
    missing: list[Missing]
    examples: list[Example]
    lm_eval: dict[str, Task] | None
    rtt: dict[str, Any] | None
    seconds: Seconds
