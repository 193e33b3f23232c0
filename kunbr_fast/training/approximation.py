"""What an approximation makes of a block's first step."""

from __future__ import annotations

import dataclasses

import torch

from kunbr_fast.objectives.batch import StepBatch
from kunbr_fast.training.block import BlockTraining


def gradient_cosine(training: BlockTraining, step: StepBatch) -> float:
    """Cosine of the block's gradient to the one that the exact cover gives, of one batch; 1.0 where the cover is exact.

    training: of `reinserted(..., cover_precision=)`. Costs two forward and backward passes and one more gradient's
    memory; no step is taken and no gradient is left.
    """
    if training.cover is None:
        return 1.0
    graphs, training.graphs = training.graphs, None  # what they captured runs on one kind of weights
    try:
        with training.cover.exact():
            exact = _gradient(training, step)
        return cosine(_gradient(training, step), exact)
    finally:
        training.graphs = graphs


def cache_error(training: BlockTraining, step: StepBatch, exact: torch.Tensor) -> dict[str, float]:
    """What a prefix cache in low precision makes of one batch: the relative error of its activations, and the cosine of
    the block's gradient to the exact one. exact (T, D): the activations without rounding. Costs what `gradient_cosine`
    costs."""
    held = step.packed.hidden
    error = float((held.double() - exact.double()).norm() / exact.double().norm())
    truth = dataclasses.replace(step, packed=dataclasses.replace(step.packed, hidden=exact))
    return {"relative_error": error, "gradient_cosine": cosine(_gradient(training, step), _gradient(training, truth))}


def _gradient(training: BlockTraining, step: StepBatch) -> torch.Tensor:
    training.accumulate(step)
    found = training.flat.grad.clone()
    training.drop_gradient()
    return found


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two vectors of any length, summed in fp64; 0 where one is 0, and 1 where both are."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for part, other in zip(a.split(1 << 22), b.split(1 << 22)):
        part, other = part.double(), other.double()
        sums += torch.stack([part @ other, part @ part, other @ other])
    dot, one, two = sums.tolist()
    if one == 0 or two == 0:
        return float(one == two)
    return dot / (one * two) ** 0.5
