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
from kunbr_fast.evaluation.accuracy import Questions, letter_tokens, prepare_questions
from kunbr_fast.evaluation.probability import prepare_answers, spread
from kunbr_fast.measures.lens import letter_scores, log_probs
from kunbr_fast.measures.states import Ask, Read, empty_states, keeping, packed, parts, read_levels
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
    found, asks = {}, []
    for name, items in sets.items():
        found[name], more = _prepared(decoder, tokenizer, items, most, text, max_length)
        asks += more
    if asks:
        read_levels(decoder, asks, place=place, progress=progress)
    return found


def _prepared(
    decoder: Decoder,
    tokenizer: Any,
    items: Sequence[Item],
    most: int | None,
    text: TextSettings,
    max_length: int | None,
) -> tuple[LayerReadout, list[Ask]]:
    """A readout of which the tensors are empty, and what fills them."""
    records = {i: {"_where": f"record {i}", **items[i].record} for i in spread(range(len(items)), most)}
    asked, others = ([i for i in records if ("question" in records[i]) is is_one] for is_one in (True, False))
    texts, owners, right, choice, letter = [], [], [], None, None
    if asked:
        of = [records[i] for i in asked]
        choice = prepare_questions(tokenizer, of, scoring="choice", decoder=decoder)
        letter = _with_letters(decoder, tokenizer, of)
        for item, answer, sequences, targets in zip(asked, choice.answers, choice.sequences, choice.targets):
            texts += [[*ids, pairs[-1][1]] for ids, pairs in zip(sequences, targets)]
            owners += [item] * len(sequences)
            right += [i == answer for i in range(len(sequences))]
    if others:
        texts += _own_texts(decoder, tokenizer, [records[i] for i in others], text, max_length)
        owners, right = owners + others, right + [None] * len(others)
    lenses = [
        None if of is None else torch.empty(decoder.num_layers + 1, len(asked)).double() for of in (choice, letter)
    ]
    readout = LayerReadout(texts, owners, right, empty_states(decoder, len(texts)), *lenses)
    return readout, _asks(decoder, readout, choice, letter)


def _with_letters(decoder: Decoder, tokenizer: Any, records: Sequence[Mapping]) -> Questions | None:
    try:
        letter_tokens(tokenizer, max(len(record["choices"]) for record in records))
    except ValueError:  # it has none
        return None
    return prepare_questions(tokenizer, records, scoring="letter", decoder=decoder)


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


def _asks(decoder: Decoder, readout: LayerReadout, choice: Questions | None, letter: Questions | None) -> list[Ask]:
    """What fills a readout in. Its questions' texts come before the others."""
    asks: list[Ask] = []
    texts, questions = readout.texts, readout.questions
    for part in parts(sum(len(texts[i]) for i in of) for of in questions):
        where = slice(questions[part.start].start, questions[part.stop - 1].stop)
        lens = _choice_lens(decoder, choice, part, readout.choice)
        asks.append((packed(texts[where]), [keeping(readout.states, where), lens]))
    first = questions[-1].stop if questions else 0
    for part in parts(map(len, texts[first:])):
        where = slice(first + part.start, first + part.stop)
        asks.append((packed(texts[where]), [keeping(readout.states, where)]))
    prompts = [] if letter is None else [sequences[0] for sequences in letter.sequences]
    for part in parts(map(len, prompts)):
        asks.append((packed(prompts[part]), [_letter_lens(decoder, letter, part, readout.letter)]))
    return asks


def _choice_lens(decoder: Decoder, questions: Questions, part: slice, out: torch.Tensor) -> Read:
    """Puts whether each question of a part is answered correctly to out[level, part]: by the highest summed
    log-probability, the first of equal ones, as of `choice_accuracy`. The head, which is most of the work, runs once
    where choices begin alike."""
    chosen = range(part.start, part.stop)
    first: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # question and beginning -> text and position
    reads, owners, text = [], [], 0
    for i in chosen:
        for ids, pairs in zip(questions.sequences[i], questions.targets[i]):
            places = [first.setdefault((i, tuple(ids[: at + 1])), (text, at)) for at, _ in pairs]
            reads += [(*place, token) for place, (_, token) in zip(places, pairs)]
            owners += [text] * len(pairs)
            text += 1

    def read(level: int, batch: PackedBatch, hidden: torch.Tensor) -> None:
        found = log_probs(decoder, reads, batch, Stretch(decoder.num_layers, hidden))
        sums = torch.zeros(text, dtype=torch.float64).index_add_(0, torch.tensor(owners), found)
        _mark(out[level, part], sums.split([questions.num_choices[i] for i in chosen]), questions.answers[part])

    return read


def _letter_lens(decoder: Decoder, questions: Questions, part: slice, out: torch.Tensor) -> Read:
    """As `_choice_lens`, by the highest letter's logit."""
    chosen = range(part.start, part.stop)

    def read(level: int, batch: PackedBatch, hidden: torch.Tensor) -> None:
        scores = letter_scores(decoder, questions, chosen, batch, Stretch(decoder.num_layers, hidden))
        _mark(out[level, part], scores, questions.answers[part])

    return read


def _mark(out: torch.Tensor, scores: Sequence[torch.Tensor], answers: Sequence[int]) -> None:
    out.copy_(torch.tensor([float(of.argmax() == answer) for of, answer in zip(scores, answers)]))
