"""One step's samples as values: the packed batch, which samples are which, and their share of the whole step."""

from __future__ import annotations

import dataclasses
import enum

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.objectives.original import OriginalValues, Parts


@dataclasses.dataclass(frozen=True)
class Shares:
    """A batch's fraction of the forget and of the retain samples of a step, or of the batch `within` that it is cut
    from. The batches of a step sum to the step's loss:

        factor * (objective(forget) + retain_coeff * retain_scale * retain_term(retain))
    """

    forget: float = 1.0
    retain: float = 1.0
    within: Shares | None = None

    @property
    def factor(self) -> float:
        """What scales the batch's loss."""
        own = self.forget or 1.0
        return own if self.within is None else own * self.within.factor

    @property
    def retain_scale(self) -> float:
        """What scales the batch's retain term beyond that."""
        outer = 1.0 if self.within is None else self.within.retain_scale
        return outer * self.retain / (self.forget or 1.0)


WHOLE = Shares()


class Role(enum.Enum):
    """What a batch is for.

    TRAINED: the criterion at the weights that are trained. ATTACKED: forget samples, the criterion at an adversary's
    weights. RELEARNED: what the adversary itself minimises, the NLL of its samples (as `Parts.retain`).
    """

    TRAINED = "trained"
    ATTACKED = "attacked"
    RELEARNED = "relearned"


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """A packed batch as an objective takes it. Made by `Criterion.pack` and `Criterion.step_batch`.

    original: the original model's values for these samples, in their order, where the objective needs any. role: at
    which weights it is evaluated, and what for.
    """

    packed: PackedBatch
    parts: Parts
    original: OriginalValues | None = None
    shares: Shares = WHOLE
    role: Role = Role.TRAINED


@dataclasses.dataclass(frozen=True)
class PartLoss:
    """The loss of a `StepBatch`: its part of the step's, a scalar, differentiable as a `Criterion` gives it.

    nll (R,): the labelled rows', detached; None where no head ran. retain_term: of this batch alone, where the
    objective adapts to it, else None.
    """

    loss: torch.Tensor
    nll: torch.Tensor | None = None
    retain_term: float | None = None

    def plus(self, more: PartLoss) -> PartLoss:
        """With another loss of the same batch added, which has no rows of its own."""
        term = None if self.retain_term is None else self.retain_term + more.retain_term
        return dataclasses.replace(self, loss=self.loss + more.loss, retain_term=term)

    def backward(self) -> PartLoss:
        """Accumulates the gradient, and returns the loss detached."""
        self.loss.backward()
        return dataclasses.replace(self, loss=self.loss.detach())
