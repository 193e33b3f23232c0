"""What models say about sets of records: all that measures are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.accuracy import Accuracy
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.measures.layers import LayerReadout
from kunbr_fast.measures.value_vectors import ValueVectors


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says of the tokens of a text that count, each given all before it; n of them.

    tokens: (n,) int64, their ids. log_probs: (n,) float64, log p(token). greedy: (n,) bool, whether the token is the
    argmax of the logits. means, deviations: (n,) float64, of log p(v) over the vocabulary's tokens v, under p: mean
    sum_v p(v) log p(v) and the standard deviation. text: the tokens decoded, without special ones.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    greedy: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    text: str = ""

    def __len__(self) -> int:
        """n. An answer of no tokens has no loss: measures leave it out."""
        return len(self.tokens)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats a token."""
        return -float(self.log_probs.mean())

    @property
    def probability(self) -> float:
        """p(answer | prompt)^(1/n)"""
        return math.exp(-self.loss)


@dataclasses.dataclass(frozen=True)
class Readout:
    """What one model says about one set of records, N items.

    answers: of each item its own answer: the completion, the assistant's turns, the right choice behind the question,
    of a text line all but the first token. paraphrases, perturbed: of each item, None and () where it has none (of a
    question the wrong choices are perturbed). letter, choice: accuracies of the items that are questions (`questions`,
    their numbers), None without any. generated: of each item the greedy continuation of its prompt, None where nothing
    was generated (text lines continue their own beginning). references: the answers as text, to compare with it.
    states: what the layers hold, None where that was not read.
    """

    items: Sequence[Item]
    answers: Sequence[Answer]
    paraphrases: Sequence[Answer | None]
    perturbed: Sequence[Sequence[Answer]]
    questions: Sequence[int] = ()
    letter: Accuracy | None = None
    choice: Accuracy | None = None
    generated: Sequence[str] | None = None
    references: Sequence[str] = ()
    states: LayerReadout | None = None

    def __len__(self) -> int:
        return len(self.items)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured: what it says about each set ("forget", "retain", "holdout"), and the models that it is
    compared with: the original (before unlearning) and one retrained without the forget set, where they were given.
    rtt: what attacks brought back of the forget set; value_vectors: beside the original's. None where not measured."""

    name: str
    sets: Mapping[str, Readout]
    original: Subject | None = None
    retrained: Subject | None = None
    rtt: RTTResult | None = None
    value_vectors: ValueVectors | None = None
