"""Full-parameter training on packed batches: the warm-up, the RTT attack, teaching; and what all training shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.memory import OutOfMemory, cannot_fit, gibibytes
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.finite import finite
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Reference
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.flat_buffer import make_optimizer, warn_if_updates_vanish
from kunbr_fast.training.micro_batches import MicroBatch, MicroBatches, add_part


class FullTraining:
    """Every parameter of the model, trained in place. Its steps take packed batches; `state` is what a resume needs.

    criterion: what `step_packed` minimises (default: gradient difference). If that needs the original's logits, the head
    is copied now, so the model must be the original; its other values are given to each step (`Reference`).
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
        self.micro_batches = MicroBatches(micro_batch_tokens, "training of all parameters", self._refusal)
        self.decoder, self.gradient_checkpointing, self.impl = decoder, gradient_checkpointing, impl
        self.criterion = criterion or Criterion()
        self.criterion.check_layer(decoder.num_layers)
        self.reference_head = self.criterion.copy_of_head(decoder.head)
        self.parameters = dict(decoder.model.named_parameters())  # a tied weight appears once
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(optimizer, self.parameters.values(), lr, betas, weight_decay, impl=impl)
        warn_if_updates_vanish(list(self.parameters.values()), lr, "load the model in float32 (--dtype float32)")
        self.steps = 0

    def step(self, batch: PackedBatch, rows: losses.RowWeights, num_forget: int = 0) -> dict[str, float | None]:
        """One update; returns `losses.metrics`; the batch's first `num_forget` samples are forget samples."""
        second = range(num_forget, batch.num_samples)
        parts = {"forget": range(num_forget), "alternate": second[:0], "retain": second}

        def one(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            part = losses.RowWeights(rows.weight[micro.rows], None if rows.cap is None else rows.cap[micro.rows])
            stretch = Stretch(recompute=self.gradient_checkpointing)
            loss, nll = losses.weighted_pass(self.decoder, micro.batch, part, stretch, impl=self.impl)
            loss.backward()
            return loss.detach(), nll

        loss, nll = self.micro_batches.run(batch, parts, one, self.drop_gradient)
        return self._update(loss, losses.metrics, batch, num_forget, nll)

    def step_packed(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> dict[str, float | None]:
        """One update by the criterion on a batch whose samples are in the order of `Criterion.parts`."""
        loss, nll = self.accumulate(batch, num_forget, reference)
        return self._update(loss, self.criterion.metrics, batch, num_forget, nll)

    def accumulate(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds a batch's gradient; as `BlockTraining.accumulate`."""
        criterion = self.criterion
        parts = criterion.parts(batch, num_forget)

        def one(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
            return add_part(criterion, parts, micro, reference, self.loss)

        return self.micro_batches.run(batch, parts, one, self.drop_gradient)

    def loss(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The criterion's loss, differentiable in every parameter, and the rows' NLL; as `Criterion.__call__`."""
        return self.criterion(
            self.decoder,
            batch,
            num_forget,
            stretch=Stretch(recompute=self.gradient_checkpointing),
            impl=self.impl,
            reference=reference,
            reference_head=self.reference_head,
        )

    def _update(self, loss, metrics, batch: PackedBatch, num_forget: int, nll) -> dict[str, float | None]:
        good = finite(loss, *self.gradients())  # read after the metrics, so that the host waits once
        found = metrics(batch, num_forget, loss, nll)
        if not good:
            self.drop_gradient()
            raise Diverged(f"step {self.steps}", found)
        self.micro_batches.update(self.apply)
        return found

    def drop_gradient(self) -> None:
        """Forgets what has been accumulated, as if its losses had never been."""
        self.optimizer.zero_grad()
        self.criterion.drop()

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

    def apply(self) -> None:
        """One update from the accumulated gradients, which are then dropped."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.criterion.advance()
        self.steps += 1

    def gradient_difference_step(
        self,
        forget: Sequence[Sample],
        retain: Sequence[Sample],
        retain_coeff: float,
        forget_loss_cap: float | None = None,
    ) -> dict[str, float | None]:
        """One update that minimises -L_forget + retain_coeff * L_retain; arguments as in `losses.gradient_difference`."""
        batch = pack([*forget, *retain]).to(self.decoder.device)
        rows = losses.gradient_difference(batch, len(forget), retain_coeff, forget_loss_cap)
        return self.step(batch, rows, len(forget))

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, optimiser and criterion state by name. The tensors themselves: later steps change them."""
        tensors = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return {**tensors, **self.criterion.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Takes up a `state()` after `steps` steps; the next steps give the same bits as uninterrupted ones."""
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
            batch = pack([samples[i] for i in indices]).to(decoder.device)
            metrics = training.step(batch, losses.likelihood(batch))
            if on_step is not None:
                on_step(metrics)
            if on_epoch is not None and (step + 1) % schedule.steps_per_epoch == 0:
                with torch.no_grad():
                    on_epoch((step + 1) // schedule.steps_per_epoch)
