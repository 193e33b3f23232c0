"""What an approximation makes of a block's gradient."""

from __future__ import annotations

from typing import Any

import torch


def gradient_cosine(training: Any, *batch: Any) -> float:
    """Cosine of the block's gradient to the one that the exact cover gives, of one batch; 1.0 where the cover is exact.

    training: a `BlockTraining` of `reinserted(..., cover_precision=)`; batch: the arguments of its `step_packed`. Costs
    two forward and backward passes and one more gradient's memory; no step is taken and no gradient is left.
    """
    if training.cover is None:
        return 1.0

    def gradient() -> torch.Tensor:
        training.accumulate(*batch)
        found = training.flat.grad.clone()
        training.flat.grad.zero_()
        training.criterion.drop()
        return found

    graphs, training._graphs = training._graphs, None  # what they captured runs on one kind of weights
    try:
        with training.cover.exact():
            exact = gradient()
        return cosine(gradient(), exact)
    finally:
        training._graphs = graphs


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
