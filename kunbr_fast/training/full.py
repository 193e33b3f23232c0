"""Full-parameter training on packed batches: the warm-up, the RTT attack, teaching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import Sample, pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.memory import OutOfMemory, cannot_fit, gibibytes
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Parts
from kunbr_fast.training.flat_buffer import make_optimizer, warn_if_updates_vanish
from kunbr_fast.training.training import Training


class FullTraining(Training):
    """Every parameter of the model, trained in place.

    criterion: what a step minimises (default: gradient difference). If it needs the original's logits, the head is copied
    now, so the model must be the original; its other values come with each step (`StepBatch.original`).
    micro_batch_tokens: the most tokens that go through at once, as in `reinserted`; where memory runs out, fewer.

    Raises `Diverged`, with the weights as they were, at a step whose loss or gradient is not finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        lr: float,
        optimizer: str = "adamw",
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
        gradient_checkpointing: bool = False,
        impl: str = "auto",
        criterion: Criterion | None = None,
        micro_batch_tokens: int | None = None,
    ):
        super().__init__(decoder, criterion or Criterion(), "training of all parameters", micro_batch_tokens)
        self.gradient_checkpointing, self.impl = gradient_checkpointing, impl
        self.criterion.check_layer(decoder.num_layers)
        self.original_head = self.criterion.copy_of_head(decoder.head)
        self.parameters = dict(decoder.model.named_parameters())  # a tied weight appears once
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(optimizer, self.parameters.values(), lr, betas, weight_decay, impl=impl)
        warn_if_updates_vanish(list(self.parameters.values()), lr, "load the model in float32 (--dtype float32)")

    def loss(self, step: StepBatch) -> PartLoss:
        """The criterion's loss, differentiable in every parameter."""
        stretch = Stretch(recompute=self.gradient_checkpointing)
        return self.criterion(self.decoder, step, stretch, impl=self.impl, original_head=self.original_head)

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad()

    def _where(self) -> str:
        return f"step {self.steps}"

    def _refusal(self, tokens: int | None, said: str) -> OutOfMemory:
        weights = sum(p.nbytes for p in self.parameters.values())
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        state = sum(x.nbytes for x in state if isinstance(x, torch.Tensor))
        what = f"all parameters: weights {gibibytes(weights)}, gradient as much, optimiser state {gibibytes(state)}"
        cures = ["shorter samples (max_length)", "an M_u made on a larger machine (unlearned=)"]
        if not self.gradient_checkpointing:
            cures.insert(0, "gradient_checkpointing=True (the same result)")
        return cannot_fit(tokens, what, cures, self.decoder.device, said)

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
        return {**tensors, **self.criterion.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.criterion.load_state(state)
        self.optimizer.state.clear()
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
    lr: float,
    epochs: int,
    batch_size: int,
    optimizer: str = "adamw",
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
) -> None:
    """Plain fine-tuning of all parameters in place: minimises the mean over samples of each one's mean NLL.

    on_epoch(n) is called after epoch n = 1, 2, ... and may evaluate the model. Raises `Diverged`.
    """
    schedule = Schedule(len(samples), 0, batch_size, 1, epochs, seed)
    with frozen(decoder.model):
        training = FullTraining(decoder, lr=lr, optimizer=optimizer, betas=betas, weight_decay=weight_decay)
        for step in tqdm(range(len(schedule)), desc=progress, unit="step", leave=False, disable=progress is None):
            indices, _ = schedule[step]
            packed = pack([samples[i] for i in indices]).to(decoder.device)
            metrics = training.step_packed(StepBatch(packed, Parts.of(retain=len(indices))))
            if on_step is not None:
                on_step(metrics)
            if on_epoch is not None and (step + 1) % schedule.steps_per_epoch == 0:
                with torch.no_grad():
                    on_epoch((step + 1) // schedule.steps_per_epoch)
