"""What the layers of a model hold of sets of records: hidden states, and answers by the logit lens, in one pass.

Logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020): the model's own final norm and head on the state
at a level, as if the layers above were not there. With it a question is answered as `evaluation.accuracy` does, by the
texts of its choices and by letters. At the last level, H, the answers are the model's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data import IGNORE, PackedBatch, TextSettings
from kunbr_fast.data.items import Item
from kunbr_fast.data.text import PLAIN
from kunbr_fast.evaluation.accuracy import Asked, Questions, has_letters, prepare_questions
from kunbr_fast.evaluation.probability import prepare_answers, spread
from kunbr_fast.evaluation.reading import Reading
from kunbr_fast.measures.states import Take, empty_states, keeping, read_levels
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder, Stretch

MOST = 64  # items of a set, spread evenly: of four-choice questions 256 texts, of Llama-3-8B 138 MB of states


@dataclasses.dataclass(frozen=True)
class LayerReadout:
    """What the layers of one model hold of one set of records: Q questions, N texts, levels 0...H (`measures.states`).

    texts: of each text its tokens: of a question one text a choice, question and choice; of another record its own,
    to the end of its answer (a long line's first piece). items: of each text its item's number. right: whether a text
    ends in the right choice; None of a record that is no question. states: (H + 1, N, D) float32, float64 of an fp64
    model, on the CPU, at each text's last token. choice, letter: (H + 1, Q) float64, 1 where the logit lens answers a
    question correctly, else 0; None without questions, `letter` also where the tokenizer has no letters.
    """

    texts: Sequence[Sequence[int]]
    items: Sequence[int]
    right: Sequence[bool | None]
    states: torch.Tensor
    choice: torch.Tensor | None = None
    letter: torch.Tensor | None = None

    @functools.cached_property
    def questions(self) -> list[range]:
        """Of each question its texts."""
        of = [(item, i) for i, (item, right) in enumerate(zip(self.items, self.right)) if right is not None]
        groups = [[i for _, i in group] for _, group in itertools.groupby(of, lambda pair: pair[0])]
        return [range(group[0], group[-1] + 1) for group in groups]

    @property
    def chance(self) -> float | None:
        """The share of questions that guessing answers; None without any."""
        return sum(1 / len(texts) for texts in self.questions) / len(self.questions) if self.questions else None

    @property
    def own(self) -> list[int]:
        """Of each item the text with its own answer."""
        return [i for i, right in enumerate(self.right) if right is not False]


def read_layers(
    decoder: Decoder,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Item]],
    *,
    most: int | None = MOST,
    text: TextSettings = PLAIN,
    max_length: int | None = None,
    place: Place | None = None,
    progress: str | None = None,
) -> dict[str, LayerReadout]:
    """Of several sets by name, in one pass: a streamed model reads each layer once for all of them.

    most: of more items of a set so many, spread evenly; None: all. text, max_length: as of `data.encode`, of records
    that are no questions. place, progress: as of `read_levels`. ValueError as of `prepare_questions` and `encode`;
    FloatingPointError where states are not finite.
    """
    texts = {name: _texts_of(decoder, tokenizer, name, items, most, text, max_length) for name, items in sets.items()}
    asked = {name: _AskedLayers(decoder, name, *of) for name, of in texts.items()}
    read_levels(decoder, [(one.reading, one.takes) for one in asked.values()], place=place, progress=progress)
    return {name: one.readout() for name, one in asked.items()}


@dataclasses.dataclass(frozen=True)
class _Texts:
    """`texts`, `items` and `right` of a `LayerReadout`, those of questions first."""

    texts: list[list[int]] = dataclasses.field(default_factory=list)
    items: list[int] = dataclasses.field(default_factory=list)
    right: list[bool | None] = dataclasses.field(default_factory=list)


def _texts_of(
    decoder: Decoder,
    tokenizer: Any,
    name: str,
    items: Sequence[Item],
    most: int | None,
    text: TextSettings,
    max_length: int | None,
) -> tuple[_Texts, dict[str, Questions]]:
    """What is read of a set, and its questions by scoring."""
    records = {i: {"_where": f"{name} record {i}", **items[i].record} for i in spread(range(len(items)), most)}
    asked, others = ([i for i in records if ("question" in records[i]) is is_one] for is_one in (True, False))
    found, questions = _Texts(), _questions_of(decoder, tokenizer, [records[i] for i in asked])
    if asked:
        of = questions["choice"]
        for item, answer, sequences, targets in zip(asked, of.answers, of.sequences, of.targets):
            found.texts.extend([*ids, pairs[-1][1]] for ids, pairs in zip(sequences, targets))
            found.items.extend([item] * len(sequences))
            found.right.extend(i == answer for i in range(len(sequences)))
    if others:
        found.texts.extend(_own_texts(decoder, tokenizer, [records[i] for i in others], text, max_length))
        found.items.extend(others)
        found.right.extend([None] * len(others))
    return found, questions


def _questions_of(decoder: Decoder, tokenizer: Any, records: Sequence[Mapping]) -> dict[str, Questions]:
    """By scoring; without "letter" where the tokenizer has no letters."""
    found = {}
    for scoring in ("choice", "letter") if records else ():
        if scoring == "letter" and not has_letters(tokenizer, records):
            continue
        found[scoring] = prepare_questions(tokenizer, records, scoring=scoring, decoder=decoder, candidates=False)
    return found


def _own_texts(
    decoder: Decoder, tokenizer: Any, records: Sequence[Mapping], text: TextSettings, max_length: int | None
) -> list[list[int]]:
    """Of each record, no question, its tokens to the end of its answer, without special ones behind it."""
    answers = prepare_answers(tokenizer, records, decoder=decoder, text=text, max_length=max_length)
    found: dict[int, list[int]] = {}
    for owner, sample in zip(answers.owners, answers.samples):
        if owner not in found:
            ids, last = sample["input_ids"].tolist(), int((sample["labels"] != IGNORE).nonzero()[-1])
            while last and ids[last] in tokenizer.all_special_ids:
                last -= 1
            found[owner] = ids[: last + 1]
    return list(found.values())


class _AskedLayers:
    """A set's texts in a `Reading`, and what is taken of them at each level."""

    def __init__(self, decoder: Decoder, name: str, of: _Texts, questions: Mapping[str, Questions]):
        self._decoder, self._of, self.reading = decoder, of, Reading(decoder)
        self._asked = {scoring: Asked(self.reading, one, name) for scoring, one in questions.items()}
        number = {item: i for i, item in enumerate(dict.fromkeys(of.items))}  # as `Asked` counts them: one tree each
        ends = [self.reading.add(ids, (name, number[item]))[-1] for ids, item in zip(of.texts, of.items)]
        self._states = empty_states(decoder, len(of.texts))
        self._taken = [self.reading.taken() for _ in range(decoder.num_layers + 1)]
        self.takes: list[Take] = [keeping(self._states, ends), self._take]

    def _take(self, level: int, batch: PackedBatch, hidden: torch.Tensor, nodes: list[int]) -> None:
        self._taken[level].take(self._decoder, batch, Stretch(self._decoder.num_layers, hidden), nodes)

    def readout(self) -> LayerReadout:
        rows = [taken.rows() for taken in self._taken]
        lenses = {
            scoring: torch.tensor([asked.accuracy(of).values for of in rows], dtype=torch.float64)
            for scoring, asked in self._asked.items()
        }
        return LayerReadout(self._of.texts, self._of.items, self._of.right, self._states, **lenses)
