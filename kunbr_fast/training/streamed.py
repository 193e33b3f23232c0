"""Steps that go layer by layer, and re-insertion by them: for models that are streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Head, Stretch
from kunbr_fast.model.streamed import LayerMajor
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.training import Training


class LayerMajorSteps(Training):
    """All micro-batches of a step pass a layer before the next one."""

    layer_major = True
    original_head: Head | None = None
    _store: torch.Tensor | None = None  # where activations wait, kept from step to step

    def _measured(self, step: StepBatch, stretch: Stretch) -> StepBatch:
        if step.original is None and self.criterion_of(step.role).needs:
            raise ValueError(
                f"{self.criterion.objective.name} with retain_loss={self.criterion.retain_loss!r} needs the original "
                "model's values: give original=, made before (OriginalValues.of)"
            )
        return step

    def _layer_by_layer(
        self,
        steps: Sequence[StepBatch],
        start: int,
        enter: Callable[[int], None] = lambda layer: None,
        leave: Callable[[int], None] = lambda layer: None,
        topped: Callable[[int], None] = lambda number: None,
        need_first: bool = False,
    ) -> tuple[list[PartLoss], LayerMajor]:
        """Forward and backward of micro-batches from layer `start` on. enter, leave: called around each layer's
        backward passes; topped: after that of a micro-batch through the head and the top layer. need_first: also to the
        gradient at the input of `start`, which waits in the passes."""
        self._measured(steps[0], FROM_EMBEDDINGS)  # for its error
        decoder, found = self.decoder, []
        criterion = self.criterion_of(steps[0].role)  # of all: what an adversary relearns goes by itself
        distances = [criterion.distances(decoder, step) for step in steps]
        top = criterion.layer if criterion.objective.states else decoder.num_layers - 1
        how = dict(impl=self.execution.impl, original_head=self.original_head)

        def turn(number: int, stretch: Stretch, stop: int, dy: torch.Tensor | None) -> None:
            if number == 0:
                enter(stop - 1)
            if dy is None:
                found.append(criterion(decoder, steps[number], stretch, **how).backward())
                topped(number)
            else:
                stretch = dataclasses.replace(stretch, taps=distances[number].taps)
                out = decoder.run(steps[number].packed, stretch, stop)
                if (distance := distances[number].found.pop(stop - 1, None)) is None:
                    out.backward(dy)
                else:
                    part = criterion.layer_part(steps[number], distance)
                    torch.autograd.backward([out, part.loss], [dy, None])
                    found[number] = found[number].plus(dataclasses.replace(part, loss=part.loss.detach()))
            if number + 1 == len(steps):
                leave(stop - 1)

        store, self._store = self._store, None
        passes = LayerMajor(decoder, [step.packed for step in steps], start, top, self.execution.place, store)
        self._store = passes.store
        del store
        passes.run(turn, need_first=need_first, within=lambda number: self.at(steps[number].role))
        return found, passes


class GradientsOnTheWay(LayerMajorSteps):
    """Takes a layer's gradients when the pass leaves the layer: none is there at its end."""

    _good: torch.Tensor  # whether all that were taken are finite

    def _layer_by_layer(self, *args: Any, **how: Any) -> tuple[list[PartLoss], LayerMajor]:
        self._good = torch.tensor(True, device=self.decoder.device)
        return super()._layer_by_layer(*args, **how)

    def _look(self, gradients: Iterable[torch.Tensor]) -> None:
        self._good = self._good & finite(*gradients).to(self._good.device)

    def gradients(self) -> list[torch.Tensor]:
        """A number that is finite if all of them were."""
        return [torch.zeros(1, device=self._good.device).masked_fill_(~self._good, torch.nan)]


class LayerMajorTraining(LayerMajorSteps, BlockTraining):
    """`BlockTraining` of a streamed model. Made by `reinserted`.

    Each layer above the block is read once on the way up and once on the way down of a step, and with batches from a
    prefix cache none below it; with a cover in low precision, which is on the device, none at all. Of the block,
    weights, gradient and optimiser state are in memory. The bits are those of `BlockTraining` with the same
    micro_batch_tokens.

    What the objective needs of the original model must come with the batch (`StepBatch.original`), since the block's
    original weights are not in memory.
    """

    def _passes(self, steps: list[StepBatch]) -> list[PartLoss]:
        self._check_layer(steps[0].packed)
        return self._layer_by_layer(steps, self.block.start)[0]

    def _probe(self, step: StepBatch) -> PartLoss:
        return self._passes([step])[0]

    @torch.no_grad()
    def settle(self) -> None:
        """`take_out`; the trained weights, in main memory, then stand for those in the files."""
        trained = {name: value.to("cpu", copy=True) for name, value in self.tensors().items()}
        self.take_out()
        self.decoder.place(trained)
