"""How much of a set's wording a model holds, token for token."""

from __future__ import annotations

import numpy as np

from kunbr_fast.evaluation.candidates import SAMPLES
from kunbr_fast.measures.answers import Answer, Readout, Subject
from kunbr_fast.measures.registry import Found, mean_of, measure
from kunbr_fast.measures.texts import compared, rouge_of


@measure("memorisation", "exact memorisation", suites="core", needs="answers")
def exact_memorisation(said: Readout) -> list[float | None]:
    """Share of the answer's tokens that are the most probable one, given all before them. Source: Tirumala et al.,
    arXiv 2205.10770; OpenUnlearning's `exact_memorization`, there without the last token (of a chat: the end's)."""
    return [float(answer.greedy.mean()) if len(answer) else None for answer in said.answers]


@measure("memorisation", "extraction strength", suites="core tofu muse", needs="answers")
def extraction_strength(said: Readout) -> list[float | None]:
    """1 - k/n, n the answer's tokens, k the fewest of them after which greedy decoding gives all the rest; 0 where not
    even the last one is greedy. Source: Carlini et al., arXiv 2012.07805; OpenUnlearning's `extraction_strength`, there
    without the last token, and 1/n where ours is 0."""
    return [_greedy_tail(answer) / len(answer) if len(answer) else None for answer in said.answers]


def _greedy_tail(answer: Answer) -> int:
    """How many tokens at the end are greedy."""
    missed = np.flatnonzero(~answer.greedy)
    return len(answer) - 1 - int(missed[-1]) if len(missed) else len(answer)


@measure("memorisation", "verbatim memorisation", suites="muse", needs="generation")
def verbatim_memorisation(said: Readout) -> list[float | None]:
    """ROUGE-L F1 of the greedy continuation of a text's beginning with how it goes on; of text lines and MUSE's
    verbatim prompts. Source: MUSE, arXiv 2407.06460."""
    return compared(said, rouge_of("rouge_l_f1"), continued=True)


@measure("memorisation", f"leak at {SAMPLES[-1]} samples", suites="core", needs="choice answers")
def leak(subject: Subject, of: str) -> Found | None:
    """1 - (1 - p)^k, p = p(answer | prompt): the probability that the answer, word for word, is among k sampled at
    temperature 1. An expectation: nothing is sampled. detail: its mean for each k; the figure is the largest's.
    Source: kunbr_fast/evaluation/candidates.py."""
    logs = [float(answer.log_probs.sum()) if len(answer) else None for answer in subject.sets[of].answers]
    values = {k: [None if log is None else _found_among(k, log) for log in logs] for k in SAMPLES}
    found = mean_of(values[SAMPLES[-1]])
    if found is not None:
        means = [float(np.mean([value for value in values[k] if value is not None])) for k in SAMPLES]
        found.detail.update(k=list(SAMPLES), values=means)
    return found


def _found_among(k: int, log_p: float) -> float:
    """1 - (1 - p)^k, exact for small p."""
    with np.errstate(divide="ignore"):  # p = 1: log 0
        return float(-np.expm1(k * np.log1p(-min(np.exp(log_p), 1.0))))
