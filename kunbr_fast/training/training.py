"""What block and full training share: steps, micro-batches, divergence."""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kunbr_fast.memory import OutOfMemory, cannot_fit, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.vocabulary import check_batch
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.micro_batches import kept, micro_batches, summed
from kunbr_fast.training.settings import Execution

logger = logging.getLogger(__name__)


class Training(abc.ABC):
    """A training whose steps minimise a criterion.

    A subclass sets `parameters`, by name, and `optimizer`. name: for messages. When memory runs out in a step,
    `micro_batch_tokens` is lowered for it and for the steps after it, and `halvings` counts.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    layer_major = False  # whether all micro-batches of a step pass a layer before the next layer

    def __init__(self, decoder: Decoder, criterion: Criterion, execution: Execution, name: str):
        self.decoder, self.criterion, self.execution, self.name = decoder, criterion, execution, name
        self.micro_batch_tokens, self.halvings = execution.micro_batch_tokens, 0
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
        more = dict(alternate=alternate_batch, device=self.decoder.device)
        step = self.criterion.pack(forget_batch, retain_batch, **more)
        check_batch(self.decoder.model, step.packed)
        return self.step_packed(step)

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
        gradient. Where memory runs out the batch is begun again, in half the tokens of the micro-batch that failed."""
        before = self.halvings
        while True:
            micros, found = micro_batches(step, self.micro_batch_tokens), []
            try:
                for part in self._passes([micro.step for micro in micros]):
                    found.append(kept(part) if len(micros) > 1 else part)
                break
            except BaseException as error:
                self.drop_gradient()
                if not is_out_of_memory(error):
                    raise
                said = str(error)
            # of micro-batches that go side by side nobody knows which: the largest
            failed = max(micros, key=lambda m: m.step.packed.num_tokens) if self.layer_major else micros[len(found)]
            parts, tokens = failed.step.parts, failed.step.packed.num_tokens
            del micros, found, failed
            release()
            if len(parts.forget) + len(parts.retain) == 1:
                raise self._refusal(tokens, said)
            self.micro_batch_tokens = tokens // 2
            self.halvings += 1
        if self.halvings > before:
            limit = self.micro_batch_tokens
            logger.warning(
                f"{self.name}: memory ran out, so a step's {step.packed.num_tokens} tokens go through in {len(micros)} "
                f"parts, of at most {limit} tokens, from here on; the step's sums are the same "
                f"(micro_batch_tokens: {limit} does so from the start)"
            )
        return found[0] if len(micros) == 1 else summed(step.packed, micros, found)

    def _passes(self, steps: list[StepBatch]) -> Iterable[PartLoss]:
        """Forward and backward of each micro-batch."""
        return map(self._backward, steps)

    def _backward(self, step: StepBatch) -> PartLoss:
        return self.loss(step).backward()

    def update(self, retain_term: float | None = None) -> None:
        """One update from the accumulated gradient, which is then zero again. retain_term: of the step (`PartLoss`)."""
        try:
            self._update()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        else:
            self.criterion.advance(retain_term)
            self.steps += 1
            return
        raise self._refusal(None, said)

    def where(self) -> str:
        """The present step, for errors."""
        return f"step {self.steps}"

    def _refusal(self, tokens: int | None, said: str) -> OutOfMemory:
        """The error for a sample of `tokens` tokens that does not fit by itself, or (None) for an update."""
        what, cures = self._memory()
        if not self.execution.gradient_checkpointing:
            cures = ["gradient_checkpointing=True (the same result)", *cures]
        return cannot_fit(tokens, what, cures, self.decoder.device, said)

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
    def _memory(self) -> tuple[str, list[str]]:
        """What of the training is in memory, and what would need less of it; for an error."""
