"""Linear probes: is the right one of a question's choices still linearly readable from hidden states?

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644; of an
unlearned model's layers as in WMDP, arXiv 2403.03218, and on questions that the probe was not trained on.

Ridge regression in closed form: x are the states at the last token of "question choice", less their mean over the
question's choices (what a question's texts share cannot say which is right), each feature divided by its root mean
square over the training questions; y is 1 of the right choice and 0 of the others, less its mean. With n training texts

    w = X^T (X X^T + RIDGE * trace(X X^T) / n * I)^-1 y

so that the penalty is the mean eigenvalue of X X^T: fixed before anything is measured, whatever the width. A held-out
question is answered by the choice with the highest w . x.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

FOLDS, RIDGE = 5, 1.0


def fold_of(facts: Sequence[Hashable]) -> torch.Tensor:
    """(Q,) the fold of each question, of which facts says what it is about: facts are in folds 0, 1, ..., 4, 0, 1, ...
    So each fold has some of every file, and a fact that several questions are about is in one fold."""
    numbers = {fact: number for number, fact in enumerate(dict.fromkeys(facts))}
    return torch.tensor([numbers[fact] % FOLDS for fact in facts])


def probe(states: torch.Tensor, questions: Sequence[range], answers: Sequence[int], fold: torch.Tensor) -> torch.Tensor:
    """(Q,) float64: of each question, when it is held out, 1 where the probe finds the right choice, else 0; where j
    choices have the same highest score and the right one is among them, 1/j.

    states: (N, D), of any float dtype. questions: of each question its texts, rows of `states`. answers: which of them
    is right. fold: of `fold_of`. ValueError for fewer than two facts.
    """
    if len(fold.unique()) < 2:
        raise ValueError(f"{len(fold.unique())} facts: a probe is trained on some and asked others, give two or more")
    x, y = _centred(states.double(), questions, answers)
    owner = torch.repeat_interleave(torch.arange(len(questions)), torch.tensor([len(of) for of in questions]))
    out = torch.empty(len(questions), dtype=torch.float64)
    for held in range(int(fold.max()) + 1):
        scores = x @ _weights(*(part[fold[owner] != held] for part in (x, y)))
        for i in (fold == held).nonzero()[:, 0].tolist():
            mine = scores[owner == i]
            best = mine == mine.max()
            out[i] = float(best[answers[i]]) / float(best.sum())
    return out


def _centred(
    states: torch.Tensor, questions: Sequence[range], answers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the module docstring, question by question, x not yet divided."""
    x = torch.cat([states[of.start : of.stop] - states[of.start : of.stop].mean(0) for of in questions])
    y = [torch.tensor([float(i == answer) for i in range(len(of))]) for of, answer in zip(questions, answers)]
    return x, torch.cat([right.double() - right.double().mean() for right in y])


def _weights(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(D,), for x that is not divided."""
    size = x.square().mean(0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)  # a feature that is the same in all choices says nothing
    z = x * scale
    gram = z @ z.T
    penalty = RIDGE * gram.trace() / len(gram)
    if not bool(penalty > 0):  # all choices have one state: nothing to learn
        return torch.zeros(x.shape[1], dtype=x.dtype)
    gram.diagonal().add_(penalty)
    return scale * (z.T @ torch.linalg.solve(gram, y))
