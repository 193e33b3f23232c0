"""Trainings of a model whose layers are in parts on several processes (`parallel.sharded`).

A layer is put together by all ranks at once, so all of them make the same passes: a rank without samples, or with fewer
micro-batches than another, runs a sample with weight 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.files.row_files import rows_in
from kunbr_fast.memory import is_out_of_memory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.parallel.group import Group, ProcessGone
from kunbr_fast.parallel.sharded import shards_of
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.micro_batches import dealt, one_of, summed
from kunbr_fast.training.shared import SharedStep
from kunbr_fast.training.training import Training
from kunbr_fast.training.updates import MASTER, PREFIX, of_parameter

NO_ADVERSARY = "sharding={!r}: an adversary has weights of its own, which are not in parts: leave one of them out"


class LockStep(Training):
    """Accumulates in step with the other ranks."""

    def __init__(self, decoder: Decoder, *arguments: Any, **settings: Any):
        self.shards = shards_of(decoder.model)
        super().__init__(decoder, *arguments, **settings)

    def accumulate(self, step: StepBatch, idle: bool = False) -> PartLoss:
        """Of this rank's part of a step. idle: it has none, `step` is any sample, and counts nothing."""
        micros, found = self._cut(step, self.micro_batch_tokens), []
        passes = len(micros) if self.micro_batch_tokens is None else max(self.shards.group.gather(len(micros)))
        try:
            for number in range(passes):
                if number < len(micros):
                    found.append(self._pass(micros[number].step, idle))
                else:
                    self._pass(one_of(step), True)
        except BaseException as error:
            self.drop_gradient()
            if isinstance(error, ProcessGone) or not is_out_of_memory(error):  # another's memory may have run out
                raise
            said = str(error)
        else:
            self.last = step
            return found[0] if len(micros) == 1 else summed(step.packed, micros, found)
        raise self._refusal(max(step.packed.lengths), said)  # halves would leave the other ranks behind

    def _pass(self, step: StepBatch, idle: bool) -> PartLoss:
        part = self.shards.run(lambda: self.loss(step))
        if idle:
            part = dataclasses.replace(part, loss=part.loss * 0.0)
        with self.shards.group.computing():
            return part.backward()

    def _probe(self, step: StepBatch) -> PartLoss:
        return self._pass(step, False)

    def _memory(self) -> tuple[str, list[str]]:
        what, cures = super()._memory()
        limit, size = self.micro_batch_tokens, self.shards.group.size
        tokens = "a step in parts (micro_batch_tokens)" if limit is None else f"a lower micro_batch_tokens ({limit})"
        return f"on each of {size} processes a part of the model, and {what}", [tokens, "more processes", *cures]


class ShardedBlockTraining(LockStep, BlockTraining):
    """`BlockTraining` where the layers around the block are in parts. The block is whole on each rank."""


class ShardedTraining(LockStep, FullTraining):
    """`FullTraining` where all layers are in parts: each rank updates its rows of every parameter, and has their
    optimiser state.

    All ranks give `step` and `step_packed` the same whole batch, and deal its samples out. Stochastic rounding has
    other random bits than in one process.
    """

    def _begin(self) -> None:
        super()._begin()
        if self.adversary is not None:
            raise ValueError(NO_ADVERSARY.format("fsdp"))

    @property
    def ranks(self) -> Group:
        return self.shards.group

    def _updated(self) -> dict[str, torch.nn.Parameter]:
        """A part without rows has nothing to update."""
        return {name: part for name, part in self.shards.parts.items() if part.numel()}

    def _numbers(self) -> dict[str, int]:
        size, rank = self.ranks.size, self.ranks.rank
        return {name: number * size + rank for number, name in enumerate(self.shards.parts)}

    def step_packed(self, step: StepBatch, relearned: Sequence[StepBatch] = ()) -> dict[str, float | None]:
        self.relearn(relearned)
        mine = dealt(step, self.ranks.size, self.ranks.rank)
        shared = SharedStep(self)
        part = self.accumulate(one_of(step) if mine is None else mine, idle=mine is None)
        if mine is not None:
            shared.add(mine, part)
        self.last = step  # that all ranks have
        metrics = shared.gather(self.ranks)
        shared.apply()
        return metrics

    # ------------------------------------------------ of the parts

    def gradients(self) -> list[torch.Tensor]:
        return self.shards.gradients()

    def unsummed(self) -> list[torch.Tensor]:
        return self.shards.unsummed()

    def drop_gradient(self) -> None:
        self.shards.drop_gradients()

    def _update(self) -> None:
        self.shards.gradients()
        self.updates.step()
        self.shards.spread()
        self.drop_gradient()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's rows of everything; what is not cut, rank 0's alone."""
        found = super().state()
        cut = {n for n in found if n in self.parameters or (n.startswith((PREFIX, MASTER)) and found[n].dim())}
        return {name: found[name] for name in found if name in cut or self.ranks.first}

    def same_state(self) -> dict[str, torch.Tensor]:
        return self.shards.whole

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Of a whole model's training too, or of other ranks' (`RowFiles`)."""
        self.shards.take(state)
        self.criterion.load_state(state)
        self.optimizer.reset_flags()
        found = {name: self.shards.rows(of_parameter(name)) for name in self.updates.begin(state)}
        device = self.decoder.device
        self.updates.take({name: rows_in(state, name, rows).to(device, copy=True) for name, rows in found.items()})
        self.steps = steps
