"""Full-parameter training on packed batches: the warm-up, the RTT attack, teaching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kunbr_fast.keywords import changed
from kunbr_fast.memory import gibibytes
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import constants
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.adversary import FullAdversary
from kunbr_fast.training.settings import Execution, FullSettings
from kunbr_fast.training.training import Training
from kunbr_fast.training.updates import Updates

VANISH = (
    "load the model in float32 (--dtype float32), or take master_weights (warmup_master_weights, rtt_master_weights) "
    "fp32 or, in bf16, stochastic"
)


class FullTraining(Training):
    """Every parameter of the model, trained in place.

    criterion: what a step minimises (default: gradient difference). If it needs the original's logits, the head is
    copied now, so the model must be the original; its other values come with each step (`StepBatch.original`).
    settings, execution: `FullSettings` and `Execution`; changes: single fields of these (lr=1e-5).

    Raises `Diverged` at a step whose loss or gradient is not finite (the weights are then as they were), or, at the
    next step and in `check`, whose update has destroyed the weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        criterion: Criterion | None = None,
        *,
        settings: FullSettings | None = None,
        execution: Execution | None = None,
        **changes: Any,
    ):
        settings, execution = changed(
            changes, "FullTraining", settings or FullSettings(changes.get("lr")), execution or Execution()
        )
        super().__init__(decoder, criterion or Criterion(), settings, execution, "training of all parameters")
        self.criterion.fit(decoder.num_layers)
        self.original_head = self.criterion.copy_of_head(decoder.head)
        fixed = constants(decoder.model)
        for name, parameter in decoder.model.named_parameters():
            parameter.requires_grad_(name not in fixed)
        self.constants = {name: p for name, p in decoder.model.named_parameters() if name in fixed}
        self.parameters = self._updated()
        self._begin()

    def _begin(self) -> None:
        """Makes the optimiser, and an adversary if there is to be one."""
        if self.decoder.streamed:
            raise ValueError(f"{self.decoder.name} is streamed: take StreamedFullTraining (`full_training` chooses)")
        settings, impl = self.settings, self.execution.impl
        settings.warn_if_updates_vanish(list(self.parameters.values()), VANISH)
        self.updates = Updates(self.parameters, settings, impl, self._numbers())
        self.optimizer = self.updates.optimizer
        if (adversary := settings.adversary) is not None:
            self.adversary = FullAdversary(
                adversary, impl, settings.adversary_rounding, self.parameters, self.drop_gradient
            )

    def _updated(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser updates, by name: a tied weight appears once."""
        return {name: p for name, p in self.decoder.model.named_parameters() if name not in self.constants}

    def _numbers(self) -> dict[str, int]:
        """By which each parameter has random bits of its own."""
        return {name: number for number, name in enumerate(self.parameters)}

    def loss(self, step: StepBatch) -> PartLoss:
        stretch = Stretch(recompute=self.execution.gradient_checkpointing)
        criterion, how = self.criterion_of(step.role), dict(impl=self.execution.impl, original_head=self.original_head)
        return criterion(self.decoder, step, stretch, **how)

    def drop_gradient(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _memory(self) -> tuple[str, list[str]]:
        weights = sum(p.nbytes for p in self.parameters.values())
        state = sum(x.nbytes for x in self.updates.tensors().values())
        cures = self.settings.instead_of_masters(self.decoder.dtype, self.lr_name.replace("lr", "master_weights"))
        master = "master weights and " * bool(cures)
        what = f"all parameters: weights {gibibytes(weights)}, gradient as much, {master}"
        what += f"optimiser state {gibibytes(state)}"
        return what, [*cures, "shorter samples (max_length)", "an M_u made on a larger machine (unlearned=)"]

    def gradients(self) -> list[torch.Tensor]:
        """What has been accumulated; none of a parameter that no loss has depended on."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _update(self) -> None:
        self.updates.step()

    def state(self) -> dict[str, torch.Tensor]:
        weights = {**self.constants, **self.parameters}  # all, so that a streamed or sharded training takes it up too
        tensors = {name: parameter.data for name, parameter in weights.items()} | self.updates.state()
        return {**tensors, **self.criterion.state(), **({} if self.adversary is None else self.adversary.state())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.criterion.load_state(state)
        if self.adversary is not None:
            self.adversary.load_state(state)
        self.optimizer.reset_flags()
        device = self.decoder.device
        self.updates.take({name: state[name].to(device, copy=True) for name in self.updates.begin(state)})
        self.steps = steps
