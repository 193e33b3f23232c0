"""What block and full training share: steps, micro-batches, divergence."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch

from kunbr_fast.data import PackedBatch, as_samples, pack
from kunbr_fast.data.batch import join
from kunbr_fast.memory import OutOfMemory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.micro_batches import MicroBatches
from kunbr_fast.training.settings import Execution


class Training(abc.ABC):
    """A training whose steps minimise a criterion.

    A subclass sets `parameters`, by name, and `optimizer`. name: for the log.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(self, decoder: Decoder, criterion: Criterion, execution: Execution, name: str):
        self.decoder, self.criterion, self.execution = decoder, criterion, execution
        self.micro_batches = MicroBatches(execution.micro_batch_tokens, name, self._refusal)
        self.steps = 0

    def step(self, forget_batch: Any, retain_batch: Any = None, alternate_batch: Any = None) -> dict[str, float | None]:
        """One update by the objective.

        forget_batch, retain_batch: sequences of samples, padded Hugging Face batches, or (from a prefix cache)
        packed batches with hidden states at the block's input. retain_batch may be None.
        alternate_batch: for an objective that needs second answers, those to the forget prompts, in the same order;
        where it is None they come from forget_batch (`data.with_alternates`).

        Returns `losses.metrics`. Raises `Diverged`, with the weights as they were, if the loss or a gradient is not
        finite.
        """
        criterion = self.criterion
        if criterion.alternate is not None and alternate_batch is None:
            if isinstance(forget_batch, PackedBatch):
                raise ValueError(f"{criterion.objective.name} needs alternates: give them packed, as alternate_batch")
            forget_batch, alternate_batch = criterion.split(forget_batch)
        forget = packed = self._packed(forget_batch)
        if criterion.alternate is not None:
            packed = join(packed, self._packed(alternate_batch))
        if retain_batch is not None:
            packed = join(packed, self._packed(retain_batch))
        return self.step_packed(criterion.step_batch(packed, forget.num_samples))

    def _packed(self, batch: Any) -> PackedBatch:
        batch = batch if isinstance(batch, PackedBatch) else pack(as_samples(batch))
        return batch.to(self.decoder.device)

    def step_packed(self, step: StepBatch) -> dict[str, float | None]:
        """`step` of one batch."""
        part = self.accumulate(step)
        good = finite(part.loss, *self.gradients())  # read after the metrics, so that the host waits once
        metrics = losses.metrics(step, part)
        if not good:
            self.drop_gradient()
            raise Diverged(self.where(), metrics)
        self.update(part.retain_term)
        return metrics

    def accumulate(self, step: StepBatch) -> PartLoss:
        """Adds a batch's gradient, in micro-batches where it does not fit; its loss, detached. An exception leaves no
        part of a gradient."""
        return self.micro_batches.run(step, self._backward, self.drop_gradient)

    def _backward(self, step: StepBatch) -> PartLoss:
        return self.loss(step).backward()

    def update(self, retain_term: float | None = None) -> None:
        """`apply`, with an error that says what to change where memory runs out."""
        self.micro_batches.update(lambda: self.apply(retain_term))

    def apply(self, retain_term: float | None = None) -> None:
        """One update from the accumulated gradient, which is then zero again. retain_term: of the step (`PartLoss`)."""
        self._update()
        self.criterion.advance(retain_term)
        self.steps += 1

    # ------------------------------------------------ of each kind of training

    @abc.abstractmethod
    def loss(self, step: StepBatch) -> PartLoss:
        """The criterion's loss, differentiable in the trained parameters."""

    @abc.abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """What has been accumulated."""

    @abc.abstractmethod
    def drop_gradient(self) -> None:
        """Forgets what has been accumulated."""

    @abc.abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything that training needs to go on: weights, optimiser state, the criterion's. The tensors themselves:
        later steps change them."""

    @abc.abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Takes up a `state()` after `steps` steps; the next steps give the same bits as uninterrupted ones."""

    @abc.abstractmethod
    def _update(self) -> None:
        """The optimiser's update, after which the gradient is zero."""

    @abc.abstractmethod
    def where(self) -> str:
        """The present step, for errors."""

    @abc.abstractmethod
    def _refusal(self, tokens: int | None, said: str) -> OutOfMemory:
        """See `MicroBatches`."""
