"""Generated texts beside their references: ROUGE, and equality."""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections.abc import Callable
from typing import Any

from kunbr_fast.data.items import Item
from kunbr_fast.measures.answers import Readout

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile("[a-z0-9]")
_NEXT = re.compile(r"\n\n|\nQuestion|Question:")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Rouge:
    """Shares, 0..1. recall: of the reference's words, those in the text too, counted (rouge_1) or as the longest common
    subsequence (rouge_l). f1: the harmonic mean with the precision, the same share of the text's words."""

    rouge_1_recall: float
    rouge_l_recall: float
    rouge_l_f1: float


@functools.lru_cache(maxsize=1 << 16)  # three measures ask for the same pairs
def rouge(reference: str, text: str) -> Rouge | None:
    """By rouge-score with Porter's stemmer. Words are runs of a-z and 0-9: None where the reference has none, as a text
    in another script has, whose ROUGE would be 0 whatever was generated. Source: Lin, "ROUGE", 2004."""
    if not _WORD.search(reference.lower()):
        return None
    found = _scorer().score(reference, text)
    return Rouge(found["rouge1"].recall, found["rougeL"].recall, found["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score: pip install 'kunbr-fast[evaluate]'") from error
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge_of(name: str) -> Callable[[str, str], float | None]:
    """One of the fields of `rouge`."""

    def score(reference: str, text: str) -> float | None:
        found = rouge(reference, text)
        return None if found is None else getattr(found, name)

    return score


def equal(reference: str, text: str) -> float | None:
    """1 if they are equal but for case, ASCII punctuation, English articles and white space, else 0; None where nothing
    of the reference is left. Source: SQuAD's evaluation, arXiv 1606.05250."""
    wanted = _normalised(reference)
    return float(_normalised(text) == wanted) if wanted else None


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def first_answer(score: Callable[[str, str], float | None]) -> Callable[[str, str], float | None]:
    """score of what was generated up to a blank line or the next question: a model that was trained on text goes on
    behind its answer. Whole, where the reference has such a mark too. Source: MUSE's evaluation, arXiv 2407.06460."""

    def of_first(reference: str, text: str) -> float | None:
        return score(reference, text if _NEXT.search(reference) else _NEXT.split(text, 1)[0])

    return of_first


def is_continued(item: Item) -> bool:
    """Whether its reference is how a text goes on, no answer: a text line, or MUSE's prompt and gt, whose prompt is the
    beginning of an article (of MUSE's questions it begins with "Question:")."""
    verbatim = item.form == "muse" and not item.record.get("prompt", "Question:").startswith("Question:")
    return "text" in item.record or verbatim


def compared(
    said: Readout, score: Callable[[str, str], float | None], *, continued: bool = False
) -> list[float | None]:
    """score(reference, generated) of each item, of continued texts or of answers; None of the others, and of all where
    nothing was generated."""
    if said.generated is None:
        return [None] * len(said)
    return [
        score(reference, text) if is_continued(item) == continued else None
        for item, reference, text in zip(said.items, said.references, said.generated, strict=True)
    ]
