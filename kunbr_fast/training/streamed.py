"""Re-insertion whose steps go layer by layer: for models that are streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Stretch
from kunbr_fast.model.layer_major import LayerMajor
from kunbr_fast.objectives.original import Reference
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.micro_batches import MicroBatch, add_part


class LayerMajorTraining(BlockTraining):
    """`BlockTraining` of a streamed model: all micro-batches of a step pass a layer before the next one. Made by `reinserted`.

    Each layer above the block is read once on the way up and once on the way down of a step, and with batches from a
    prefix cache none below it. Of the block, weights, gradient and optimiser state are in memory. The bits are those of
    `BlockTraining` with the same micro_batch_tokens.

    What the objective needs of the original model must be given (`Reference`), since the block's original weights are not
    in memory.
    """

    def __init__(self, *args: Any, storage: str = "auto", directory: str | Path | None = None, **settings: Any):
        self.place = Place(storage, directory)
        self._store: torch.Tensor | None = None
        super().__init__(*args, **{**settings, "gradient_checkpointing": True})  # for `loss`

    def loss(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `BlockTraining.loss`: the batch in one go, its layers run again in the backward pass."""
        self._check_reference(reference)
        return super().loss(batch, num_forget, reference)

    def _check_reference(self, reference: Reference | None) -> None:
        if reference is None and self.criterion.needs:
            raise ValueError(
                f"{self.criterion.objective.name} with retain_loss={self.criterion.retain_loss!r} needs the original model's "
                "values: give reference=, made before (Reference.of)"
            )

    def accumulate(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._check_layer(batch)
        self._check_reference(reference)
        decoder, criterion = self.decoder, self.criterion
        parts = criterion.parts(batch, num_forget)
        top = criterion.layer if criterion.objective.states else decoder.num_layers - 1

        def together(micros: list[MicroBatch]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
            found: list[tuple[torch.Tensor, torch.Tensor | None]] = []

            def turn(layer: int, number: int, x: torch.Tensor, dy: torch.Tensor | None) -> None:
                micro = micros[number]
                if dy is not None:
                    decoder.run(micro.batch, Stretch(layer, x), layer + 1).backward(dy)
                    return
                how = dict(stretch=Stretch(top, x), impl=self.impl)
                loss = lambda batch, num_forget, given: criterion(decoder, batch, num_forget, reference=given, **how)  # noqa: E731
                found.append(add_part(criterion, parts, micro, reference, loss))

            store, self._store = self._store, None
            batches = [micro.batch for micro in micros]
            passes = LayerMajor(decoder, batches, self.block.start, top, self.place, store)
            self._store = passes.store
            del store
            passes.run(turn)
            return found

        return self.micro_batches.run(batch, parts, None, self.drop_gradient, together)

    @torch.no_grad()
    def settle(self) -> None:
        """`take_out`; the trained weights, in main memory, then stand for those in the files."""
        trained = {name: value.to("cpu", copy=True) for name, value in self.tensors().items()}
        self.take_out()
        self.decoder.place(trained)
