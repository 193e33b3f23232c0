"""What a model knows of a set: is the right answer chosen, probable, generated?

The truth ratio of an item with wrong answers w_1..w_m is R = exp(-mean_i loss(w_i)) / exp(-loss(right)), losses per
token: a geometric mean of the wrong answers' probabilities, as in TOFU's own code (aggregate_eval_stat.py). The right
answer is the paraphrase, or where there is none the own answer, as of TOFU's real authors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from kunbr_fast.evaluation.accuracy import Accuracy
from kunbr_fast.measures.answers import Answer, Readout, Subject
from kunbr_fast.measures.registry import Found, mean_of, measure
from kunbr_fast.measures.texts import compared, equal, first_answer, rouge_of

# ---------------------------------------------------------------- questions


@measure("knowledge", "accuracy, by letter", suites="core", needs="letter")
def accuracy_letter(said: Readout) -> list[float | None]:
    """1 if the right choice's letter has the highest logit behind "Answer:", else 0; of questions. Source: the RTT
    evaluation of KUnBR, arXiv 2511.11667."""
    return _of_questions(said, said.letter)


@measure("knowledge", "accuracy, by letter, calibrated", suites="core", needs="letter")
def accuracy_letter_calibrated(subject: Subject, of: str) -> Found | None:
    """As by letter, after each letter's mean logit over the questions was subtracted: for models that prefer a letter.
    The standard error takes these means as given. Of two questions or more: of one all letters would be equal. Source:
    "contextual calibration", arXiv 2102.09690, its idea."""
    letter = subject.sets[of].letter
    if letter is None or letter.num_questions < 2:
        return None
    right = round(letter.calibrated * letter.num_questions)
    found = mean_of([1.0] * right + [0.0] * (letter.num_questions - right))
    return dataclasses.replace(found, values=None)  # which questions they are is not known


@measure("knowledge", "accuracy, by choice", suites="core", needs="choice")
def accuracy_choice(said: Readout) -> list[float | None]:
    """1 if of all choices the right one's text has the highest p(choice | question), else 0; of questions. No division
    by length. Source: lm-evaluation-harness' `acc`."""
    return _of_questions(said, said.choice)


@measure("knowledge", "accuracy, by choice, smooth", suites="core", needs="choice")
def accuracy_smooth(subject: Subject, of: str) -> Found | None:
    """Expected accuracy by choice over random distractors: C(r, c-1) / C(n, c-1), c choices, n wrong candidates (the
    set's other choices of the right one's kind) of which r are less probable. Standard error: s/sqrt(N), over
    questions. Source: kunbr_fast/evaluation/candidates.py."""
    choice = subject.sets[of].choice
    if choice is None:
        return None
    return Found(choice.smooth, choice.smooth_error, choice.num_questions, detail={"candidates": choice.pool})


def _of_questions(said: Readout, accuracy: Accuracy | None) -> list[float | None]:
    found: list[float | None] = [None] * len(said)
    for i, value in zip(said.questions, accuracy.values if accuracy else ()):
        found[i] = float(value)
    return found


# ---------------------------------------------------------------- likelihoods


@measure("knowledge", "probability of the answer", suites="core tofu", needs="answers")
def probability(said: Readout) -> list[float | None]:
    """p(answer | prompt)^(1/n), n its tokens. Source: TOFU, arXiv 2401.06121; OpenUnlearning's `probability`."""
    return [answer.probability if len(answer) else None for answer in said.answers]


@measure("knowledge", "probability against wrong answers", suites="tofu", needs="answers alternatives")
def probability_against_wrong(said: Readout) -> list[float | None]:
    """P(answer) / (P(answer) + sum_i P(w_i)), P length-normalised probabilities, w_i the wrong answers; of items that
    have some. Source: TOFU (real authors, world facts); OpenUnlearning's `probability_w_options`, there + 1e-10."""
    return [
        math.exp(-answer.loss - np.logaddexp.reduce([-answer.loss, *(-loss for loss in wrong)])) if wrong else None
        for answer, wrong in _with_wrong(said, said.answers)
    ]


@measure("knowledge", "truth ratio", suites="tofu", sets="forget", known="", needs="answers alternatives")
def truth_ratio(subject: Subject, of: str) -> Found | None:
    """min(R, 1/R): 1 where right and wrong answers are as probable, as for a model that has never seen them; less where
    either is more so. detail: log R of each item. Source: TOFU; OpenUnlearning's `truth_ratio`, closer_to_1_better,
    there with 1e-10 in the divisors."""
    ratios = log_truth_ratios(subject.sets[of])
    return mean_of([None if log is None else math.exp(-abs(log)) for log in ratios], log_ratios=ratios)


@measure("knowledge", "truth ratio, true better", suites="tofu", sets="retain holdout", needs="answers alternatives")
def truth_ratio_kept(subject: Subject, of: str) -> Found | None:
    """max(0, 1 - R). detail: log R of each item. Source: TOFU's figure of what is to be kept; OpenUnlearning's
    `truth_ratio`, true_better."""
    ratios = log_truth_ratios(subject.sets[of])
    return mean_of([None if log is None else -math.expm1(min(log, 0.0)) for log in ratios], log_ratios=ratios)


@measure("knowledge", "share of the truth", suites="tofu", needs="answers alternatives")
def truth_share(said: Readout) -> list[float | None]:
    """true / (true + false) = 1 / (1 + R). Source: OpenUnlearning, arXiv 2506.12618; its `truth_ratio`, prob_mean."""
    return [None if log is None else math.exp(-np.logaddexp(0.0, log)) for log in log_truth_ratios(said)]


def log_truth_ratios(said: Readout) -> list[float | None]:
    """log R of each item, None where it has no wrong answers. A logarithm, as a ratio may be beyond floating point."""
    right = [own if other is None else other for own, other in zip(said.answers, said.paraphrases, strict=True)]
    return [answer.loss - sum(wrong) / len(wrong) if wrong else None for answer, wrong in _with_wrong(said, right)]


def _with_wrong(said: Readout, right: Sequence[Answer]) -> list[tuple[Answer, list[float]]]:
    """Of each item its right answer and the losses of the wrong ones: none where one of them all has no tokens."""
    return [
        (answer, [wrong.loss for wrong in several] if all(map(len, (answer, *several))) else [])
        for answer, several in zip(right, said.perturbed, strict=True)
    ]


# ---------------------------------------------------------------- generated answers


@measure("knowledge", "ROUGE-L recall", suites="tofu", needs="generation")
def rouge_l_recall(said: Readout) -> list[float | None]:
    """LCS(reference, generated) / |reference|: words of the longest common subsequence, stemmed; of answers in Latin
    script. Source: Lin, "ROUGE", 2004; TOFU."""
    return compared(said, rouge_of("rouge_l_recall"))


@measure("knowledge", "ROUGE-1 recall", needs="generation")
def rouge_1_recall(said: Readout) -> list[float | None]:
    """Share of the reference's words that were generated too, each as often as it is there, stemmed; of answers in
    Latin script. Source: Lin, "ROUGE", 2004; OpenUnlearning's `rouge`, rouge1_recall."""
    return compared(said, rouge_of("rouge_1_recall"))


@measure("knowledge", "ROUGE-L F1", suites="muse", needs="generation")
def rouge_l_f1(said: Readout) -> list[float | None]:
    """2 P R / (P + R), R = LCS / |reference|, P = LCS / |generated|, up to a blank line or a next question; of answers
    in Latin script. Source: MUSE's knowledge memorisation, arXiv 2407.06460, there behind examples in the prompt."""
    return compared(said, first_answer(rouge_of("rouge_l_f1")))


@measure("knowledge", "exact match", needs="generation")
def exact_match(said: Readout) -> list[float | None]:
    """1 if the generated answer equals the reference but for case, ASCII punctuation, English articles and white space,
    else 0; up to a blank line or a next question; of answers of which something is left then. Source: SQuAD, arXiv
    1606.05250."""
    return compared(said, first_answer(equal))
