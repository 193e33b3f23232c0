"""What a model is still good for, and whether it is told from one that never saw the forget set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kunbr_fast.measures.answers import Readout, Subject
from kunbr_fast.measures.knowledge import (
    log_truth_ratios,
    probability,
    probability_against_wrong,
    rouge_l_recall,
    truth_ratio_kept,
)
from kunbr_fast.measures.registry import Found, measure
from kunbr_fast.measures.resampling import bootstrap_error

_MOST_NATS = 709.0  # exp of more is beyond floating point; unlearning by ascent may bring a model there


@measure("utility", "perplexity", suites="core", unit="", known="lower", needs="answers")
def perplexity(subject: Subject, of: str) -> Found | None:
    """exp(sum of -log p(token) / number of tokens), over all tokens of all answers; at most e^709. Standard error:
    bootstrap over records, each with its tokens. Source: Jelinek et al., 1977."""
    rows = [(-float(answer.log_probs.sum()), len(answer)) for answer in subject.sets[of].answers if len(answer)]
    if not rows:
        return None
    return Found(
        _perplexity(sums := np.array(rows)), bootstrap_error(_perplexity, sums), len(rows),
        detail={"tokens": int(sums[:, 1].sum())},
    )  # fmt: skip


def _perplexity(rows: np.ndarray) -> float:
    nats, tokens = rows.sum(axis=0)
    return math.exp(min(nats / tokens, _MOST_NATS))


@measure("utility", "model utility", suites="tofu", sets="retain", needs="answers alternatives generation")
def model_utility(subject: Subject, of: str) -> Found | None:
    """Harmonic mean of the probability of the answer, ROUGE-L recall and truth ratio max(0, 1 - R) of each part of
    retain and holdout; 0 where one of them is 0. A part is the items of one file that have wrong answers. Items without
    a paraphrase (TOFU's real authors and world facts) have the probability against the wrong answers, and of holdout
    only they count: others are kept from the model for membership inference. detail: the figures that entered.
    Source: TOFU, arXiv 2401.06121; OpenUnlearning's `hm_aggregate`."""
    parts = [part for name in (of, "holdout") if name in subject.sets for part in _parts(subject, name)]
    if not parts:
        return None
    rows = [figures for _, figures in parts]
    said = [{**where, **dict(zip(_FIGURES, figures.mean(axis=0).tolist()))} for where, figures in parts]
    return Found(_utility(*rows), bootstrap_error(_utility, *rows), sum(map(len, rows)), detail={"parts": said})


_FIGURES = ("probability", "rouge_l_recall", "truth_ratio")


def _parts(subject: Subject, name: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Of a set: where each part is from, and the three figures of its items (N, 3)."""
    said = subject.sets[name]
    kept = truth_ratio_kept(subject, name)
    if kept is None:
        return []
    figures = zip(probability(said), probability_against_wrong(said), rouge_l_recall(said), kept.values, strict=True)
    parts: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
    for item, (plain, against, recall, ratio) in zip(said.items, figures, strict=True):
        row = (plain if item.paraphrase is not None else against, recall, ratio)
        if None not in row and not (name == "holdout" and item.paraphrase is not None):
            file = str(item.record.get("_where", "")).rpartition(":")[0]
            parts.setdefault((file, item.paraphrase is not None), []).append(row)
    return [
        ({"set": name, "file": file, "records": len(rows), "against_wrong": not paraphrased}, np.array(rows))
        for (file, paraphrased), rows in parts.items()
    ]


def _utility(*parts: np.ndarray) -> float:
    means = np.concatenate([part.mean(axis=0) for part in parts])
    return float(len(means) / (1 / means).sum()) if means.all() else 0.0


@measure(
    "utility", "forget quality", suites="tofu", sets="forget", needs="answers alternatives retrained", unit="", known=""
)
def forget_quality(subject: Subject, of: str) -> Found | None:
    """p-value of the two-sample Kolmogorov-Smirnov test that truth ratios R of this model and of the retrained one are
    of one distribution; above 0.05 they are not told apart. The same difference has a smaller p with more items. No
    standard error: what is resampled differs more than what was measured, so p's bootstrap is biased towards 0. detail:
    the statistic (the largest distance of the two distribution functions) with its bootstrap error, and both sample
    sizes. Source: TOFU, arXiv 2401.06121; OpenUnlearning's `ks_test`."""
    if subject.retrained is None:
        return None
    ratios = [_ratios(one.sets[of]) for one in (subject, subject.retrained)]
    if not all(map(len, ratios)):
        return None
    found = kolmogorov_smirnov()(*ratios)
    detail = {
        "statistic": float(found.statistic), "statistic_error": bootstrap_error(_distance, *ratios),
        "n": len(ratios[0]), "m": len(ratios[1]),
    }  # fmt: skip
    return Found(float(found.pvalue), None, len(ratios[0]), detail=detail)


def kolmogorov_smirnov() -> Callable[..., Any]:
    """SciPy's two-sample test. ValueError without SciPy."""
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise ValueError("forget quality needs scipy: pip install 'kunbr-fast[evaluate]'") from error
    return ks_2samp


def _ratios(said: Readout) -> np.ndarray:
    """log R of items that have one: the test sees order only, so it is the same as of R."""
    return np.array([log for log in log_truth_ratios(said) if log is not None])


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions."""
    at = np.concatenate([first, second])
    shares = (np.searchsorted(np.sort(one), at, "right") / len(one) for one in (first, second))
    return float(np.abs(np.subtract(*shares)).max())
