"""Smooth accuracy: a question asked with every set of distractors at once. And leak at k: what k sampled answers tell.

Four-choice accuracy is 0 or 1 a question, and depends on the three wrong choices that its author drew. Here the right
choice is ranked among *candidates*: all different choices of the question set that are of the right one's kind (numbers
for a number, words for words), and the question's own. With n wrong candidates of which r are less probable than the
right one, c choices of which the wrong ones are drawn at random are answered correctly with probability

    smooth = C(r, c - 1) / C(n, c - 1),

the expected plain accuracy. (Of candidates that are exactly as probable as the right one, j in the draw, each of the
j + 1 is the answer equally often.) Its standard error is several times smaller for the same questions.

Candidates share prefixes ("1957", "1958" by digits): a question's candidates are scored on as few texts as hold all of
their prefixes, from which many (position, token) pairs are read. So 120 years of one token are read from one text, by
digits from a dozen. What would be expensive is a sample, in one seeded order for all questions: at most 200 candidates
(`MOST`), and at most 16 texts a question (`TEXTS`), beside its own choices. Candidates in which the question's own
tokens are others, or that are longer than the model reads, are left out.
"""

import functools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kunbr_fast.data.content import choice_text

MOST, TEXTS = 200, 16
_AT_ONCE = 50  # candidates that are tokenised together
_NUMBER = re.compile(r"[+-]?\d[\d.,]*")
SAMPLES = (1, 2, 4, 8, 16, 32, 64)  # k of `leak`

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Candidates:
    """Of one question, tokenised.

    sequences: the texts, as tokens. reads: (sequence, position, token) of each log-probability that is needed. paths:
    of each candidate the reads that make it up; the right choice comes first. choices: of the question. pool: how many
    candidates there are, also where fewer are scored.
    """

    sequences: list[list[int]]
    reads: list[tuple[int, int, int]]
    paths: list[list[int]]
    choices: int
    pool: int

    def smooth(self, log_probs: torch.Tensor) -> float:
        """Of the log-probabilities of `reads`."""
        owners, read = self._flat
        sums = torch.zeros(len(self.paths), dtype=torch.float64).index_add_(0, owners, log_probs[read])
        right, wrong = sums[0], sums[1:]
        return expected_accuracy(int((wrong < right).sum()), int((wrong == right).sum()), len(wrong), self.choices)

    @functools.cached_property
    def _flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate and read of each step of all paths."""
        owners = [owner for owner, path in enumerate(self.paths) for _ in path]
        return torch.tensor(owners), torch.tensor([index for path in self.paths for index in path])


def expected_accuracy(less: int, equal: int, wrong: int, choices: int) -> float:
    """Of a question with so many choices, whose distractors are drawn from `wrong` candidates, `less` of which are less
    probable than the right choice and `equal` exactly as probable."""
    drawn = min(choices - 1, wrong)
    ways = (math.comb(equal, j) * math.comb(less, drawn - j) / (j + 1) for j in range(min(equal, drawn) + 1))
    return sum(ways) / math.comb(wrong, drawn)


def leak(log_probs: torch.Tensor) -> list[float]:
    """The share of questions whose answer is among k answers sampled at temperature 1, for each k of `SAMPLES`: the
    expectation itself, mean of 1 - (1 - p)^k, from the right answers' log-likelihoods."""
    missed = torch.log1p(-log_probs.exp().clamp(max=1.0))
    return [float(-torch.expm1(k * missed).mean()) for k in SAMPLES]


def guessing(pool: float) -> list[float]:
    """`leak` of guesses among so many candidates."""
    return [1 - (1 - 1 / pool) ** k for k in SAMPLES]


def find_candidates(
    records: Sequence[dict], own: Sequence[list[list[int]]], starts: Sequence[int], encode: Encode, limit: int | None
) -> list[Candidates]:
    """Of each question record. own: the tokens of question and choice, for each choice. starts: where the tokens begin
    whose probability counts. limit: tokens that the model reads."""
    pool = {choice_text(choice): f"{choice}" for record in records for choice in record["choices"]}
    order = list(pool)
    random.Random(0).shuffle(order)
    return [
        _of_question(record, fulls, start, _Pool(pool, order, encode, limit))
        for record, fulls, start in zip(records, own, starts, strict=True)
    ]


@dataclass(frozen=True)
class _Pool:
    """texts: by what choices are told apart. order: its keys, as they are tried."""

    texts: dict[str, str]
    order: list[str]
    encode: Encode
    limit: int | None


def _of_question(record: dict, fulls: list[list[int]], start: int, pool: _Pool) -> Candidates:
    mine = [choice_text(choice) for choice in record["choices"]]
    kind = _is_number(mine[record["answer"]])
    others = [text for text in pool.order if text not in mine and _is_number(text) == kind]
    chosen = {mine[record["answer"]]: fulls[record["answer"]]}
    for text, full in zip(mine, fulls, strict=True):
        chosen.setdefault(text, full)
    texts: list[list[int]] = []
    for full in chosen.values():
        texts = _with(texts, full[:-1])
    size, most = len(chosen) + len(others), max(TEXTS, len(texts))
    for first in range(0, min(len(others), MOST), _AT_ONCE):
        some = others[first : min(first + _AT_ONCE, MOST)]
        for text, full in zip(some, pool.encode([f"{record['question']} {pool.texts[text]}" for text in some])):
            if full[:start] != fulls[0][:start] or len(full) <= start or len(full) - 1 > (pool.limit or len(full)):
                continue
            more = _with(texts, full[:-1])
            if len(more) > most:
                return _candidates(list(chosen.values()), start, texts, len(mine), size)
            texts, chosen[text] = more, full
    return _candidates(list(chosen.values()), start, texts, len(mine), size)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _with(texts: list[list[int]], tokens: list[int]) -> list[list[int]]:
    """As few texts as begin with each of `texts` and with `tokens`."""
    if any(text[: len(tokens)] == tokens for text in texts):
        return texts
    return [*(text for text in texts if tokens[: len(text)] != text), tokens]


def _candidates(fulls: list[list[int]], start: int, sequences: list[list[int]], choices: int, pool: int) -> Candidates:
    reads: dict[tuple[int, ...], int] = {}
    places, paths = [], []
    for full in fulls:
        path = []
        for at in range(start, len(full)):
            prefix = tuple(full[: at + 1])
            if prefix not in reads:
                reads[prefix] = len(places)
                sequence = next(number for number, text in enumerate(sequences) if text[:at] == full[:at])
                places.append((sequence, at - 1, full[at]))
            path.append(reads[prefix])
        paths.append(path)
    return Candidates(sequences, places, paths, choices, pool)
