"""Full-parameter training on packed batches: the warm-up, the RTT attack, teaching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import Sample, pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.keywords import changed
from kunbr_fast.memory import gibibytes
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Parts
from kunbr_fast.training.adversary import FullAdversary
from kunbr_fast.training.settings import Execution, FullSettings
from kunbr_fast.training.training import Training


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
        for parameter in decoder.model.parameters():
            parameter.requires_grad_(True)
        self.parameters = self._updated()
        cure = "load the model in float32 (--dtype float32)"
        self.optimizer = settings.make_optimizer(list(self.parameters.values()), execution.impl, cure)
        if (adversary := settings.adversary) is not None:
            self.adversary = FullAdversary(adversary, execution.impl, self.parameters, self.drop_gradient)

    def _updated(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser updates, by name: a tied weight appears once."""
        return dict(self.decoder.model.named_parameters())

    def loss(self, step: StepBatch) -> PartLoss:
        stretch = Stretch(recompute=self.execution.gradient_checkpointing)
        criterion, how = self.criterion_of(step.role), dict(impl=self.execution.impl, original_head=self.original_head)
        return criterion(self.decoder, step, stretch, **how)

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad()

    def _memory(self) -> tuple[str, list[str]]:
        weights = sum(p.nbytes for p in self.parameters.values())
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        state = sum(x.nbytes for x in state if isinstance(x, torch.Tensor))
        what = f"all parameters: weights {gibibytes(weights)}, gradient as much, optimiser state {gibibytes(state)}"
        return what, ["shorter samples (max_length)", "an M_u made on a larger machine (unlearned=)"]

    def gradients(self) -> list[torch.Tensor]:
        """What has been accumulated; none of a parameter that no loss has depended on."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return {**tensors, **self.criterion.state(), **({} if self.adversary is None else self.adversary.state())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.criterion.load_state(state)
        if self.adversary is not None:
            self.adversary.load_state(state)
        self.optimizer.state.clear()
        self.optimizer.reset_flags()
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)  # updated in place
        self.steps = steps


def train_all(
    decoder: Decoder,
    samples: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
    **settings: Any,
) -> None:
    """Plain fine-tuning of all parameters in place: `fine_tune`. settings: fields of `FullSettings` and `Execution`."""
    how = dict(epochs=epochs, batch_size=batch_size, seed=seed, on_epoch=on_epoch, on_step=on_step, progress=progress)
    with frozen(decoder.model):
        fine_tune(FullTraining(decoder, **settings), samples, **how)


def fine_tune(
    training: Training,
    samples: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
) -> None:
    """Minimises the mean over samples of each one's mean NLL.

    on_epoch(n) is called after epoch n = 1, 2, ... and may evaluate the model. Raises `Diverged`, also where the last
    update has destroyed the weights.
    """
    decoder = training.decoder
    schedule = Schedule(len(samples), 0, batch_size, 1, epochs, seed)
    for step in tqdm(range(len(schedule)), desc=progress, unit="step", leave=False, disable=progress is None):
        indices, _ = schedule[step]
        packed = pack([samples[i] for i in indices]).to(decoder.device)
        metrics = training.step_packed(StepBatch(packed, Parts.of(retain=len(indices))))
        if on_step is not None:
            on_step(metrics)
        if (step + 1) % schedule.steps_per_epoch == 0:
            training.check() if step + 1 == len(schedule) else training.check_update()
            if on_epoch is not None:
                with torch.no_grad():
                    on_epoch((step + 1) // schedule.steps_per_epoch)
