"""What block and full training share: steps, micro-batches, divergence."""

from __future__ import annotations

import abc
import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data import PackedBatch, as_samples, pack
from kunbr_fast.files.shown import shown
from kunbr_fast.kernels.optimizers.op import Watched
from kunbr_fast.memory import OutOfMemory, cannot_fit, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.vocabulary import check_batch
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import WHOLE, PartLoss, Role, Shares, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Parts
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.training.adversary import Adversary
from kunbr_fast.training.diverged import ASCENT, LOSS, UPDATE, Diverged
from kunbr_fast.training.micro_batches import MicroBatch, kept, micro_batches, one_of, summed
from kunbr_fast.training.settings import Execution, FullSettings

logger = logging.getLogger(__name__)

RELEARNING = Criterion()  # of samples that count as retained: their mean NLL


def relearned_batch(batch: Any, device: torch.device | str = "cpu", shares: Shares = WHOLE) -> StepBatch:
    """Samples, padded or packed batches as what an adversary relearns. shares: of a part of it."""
    packed = (batch if isinstance(batch, PackedBatch) else pack(as_samples(batch))).to(device)
    return StepBatch(packed, Parts.of(retain=packed.num_samples), shares=shares, role=Role.RELEARNED)


class Training(abc.ABC):
    """A training whose steps minimise a criterion.

    A subclass sets `parameters`, by name, and `optimizer`. name: for messages. When memory runs out in a step,
    `micro_batch_tokens` is lowered for it and for the steps after it, and `halvings` counts.

    What a step's update stores is looked at in the next step, together with its loss, so that nobody waits for it;
    after the last step, by `check`.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: Watched
    adversary: Adversary | None = None  # a subclass sets it where `settings` have one
    ranks: Group = ALONE  # that each hold a part of it, and make every step together from the same whole batch
    layer_major = False  # whether all micro-batches of a step pass a layer before the next layer
    torn = False  # whether a step has ended in the middle of its updates, and cannot be begun again
    stage, lr_name = "", "lr"  # what errors call the training, and the setting of its learning rate

    def __init__(self, decoder: Decoder, criterion: Criterion, settings: FullSettings, execution: Execution, name: str):
        self.decoder, self.criterion, self.settings, self.execution = decoder, criterion, settings, execution
        self.name = name
        self.micro_batch_tokens, self.halvings = execution.micro_batch_tokens, 0
        self.steps = 0
        self.last: StepBatch | None = None  # that a gradient was accumulated from

    def step(
        self, forget_batch: Any, retain_batch: Any = None, alternate_batch: Any = None, relearned: Sequence[Any] = ()
    ) -> dict[str, float | None]:
        """One update by the objective.

        forget_batch, retain_batch: sequences of samples, padded Hugging Face batches, or (from a prefix cache)
        packed batches with hidden states at the block's input. retain_batch may be None.
        alternate_batch: for an objective that needs second answers, those to the forget prompts, in the same order;
        where it is None they come from forget_batch (`data.with_alternates`).
        relearned: with an adversary the `relearned_before` batches that it relearns first, of other facts than
        forget_batch's: `forget_loss` is then the adversary's.

        Returns `losses.metrics`. Raises `Diverged`, and makes no update, if the loss or a gradient is not finite, or
        the weights that the update before has made.
        """
        more = dict(alternate=alternate_batch, device=self.decoder.device)
        step = self.criterion.pack(forget_batch, retain_batch, **more)
        check_batch(self.decoder.model, step.packed)
        exercise = [relearned_batch(batch, self.decoder.device) for batch in relearned]
        for batch in exercise:
            check_batch(self.decoder.model, batch.packed)
        return self.step_packed(step, exercise)

    def step_packed(self, step: StepBatch, relearned: Sequence[StepBatch] = ()) -> dict[str, float | None]:
        """`step` of one batch."""
        self.relearn(relearned)
        part = self.accumulate(step)
        good = finite(part.loss, *self.gradients())
        for flag in self.flags():
            # one on the host is known there, and an update there is over
            good = good & (flag[0] == 0 if flag.device == good.device else not int(flag))
        metrics = losses.metrics(step, part)
        self.judge(metrics, bool(good))  # read after the metrics, so that the host waits once
        self.update(part.retain_term)
        return metrics

    @property
    def relearned_before(self) -> int:
        """How many batches the adversary relearns before the next step; 0 without one."""
        return 0 if self.adversary is None else self.adversary.settings.steps_before(self.steps)

    def relearn(
        self,
        batches: Sequence[StepBatch | None],
        group: Group = ALONE,
        add: Callable[[StepBatch], PartLoss] | None = None,
    ) -> None:
        """What the adversary does before a step: starts anew where it is time to, and relearns. batches: of
        `relearned_batch`, one for each of its steps; of several ranks (group) each has its part, or None. add: adds a
        batch's gradient (default: `accumulate`)."""
        if len(batches) != (wanted := self.relearned_before):
            what = "its settings have an adversary" if self.adversary is not None else "there is no adversary"
            raise ValueError(
                f"{self.where()}: got {len(batches)} batches to relearn, expected {wanted}: {what} (relearned_before)"
            )
        if self.adversary is None:
            return
        if self.adversary.settings.forks(self.steps):
            self._fitting(lambda: self.adversary.fork(self.steps))
        for batch in batches:
            if batch is not None:
                (add or self.accumulate)(batch)
            if group.size > 1:
                group.sum(self.adversary.gradients())
            self._fitting(self.adversary.update)

    def flags(self) -> list[torch.Tensor]:
        """Of all updates: see `Watched.flag`."""
        return self.optimizer.flags() + ([] if self.adversary is None else self.adversary.flags())

    def at(self, role: Role) -> contextlib.AbstractContextManager[None]:
        """Inside, the parameters have the weights at which a batch of this role is evaluated. An adversary that has not
        forked yet, as where an approximation is measured before the first step, is what is trained."""
        if role is Role.TRAINED or not self.adversary.forked:
            return contextlib.nullcontext()
        return self.adversary.relearning() if role is Role.RELEARNED else self.adversary.inside()

    def criterion_of(self, role: Role) -> Criterion:
        return RELEARNING if role is Role.RELEARNED else self.criterion

    def agreed(self, good: bool) -> bool:
        """Whether all `ranks` find so."""
        return all(self.ranks.gather(good))

    def judge(self, metrics: Mapping[str, float | None], good: bool) -> None:
        """`Diverged`, without the gradient, unless all is `good`: it, the loss, and what the updates so far stored."""
        if good:
            return
        self.drop_gradient()
        self.check_update(metrics)
        what = "a gradient" if math.isfinite(metrics["loss"]) else "the loss"
        if self.adversary is not None:
            raise self._diverged_with_adversary(what, metrics)
        if not self.steps:
            cause = f"{what} itself is not finite, before any update, so the learning rate is not the cause"
            raise Diverged(self.where(0), metrics, cause, self._first_loss(metrics))
        raise self.diverged(f"{what} is not finite, after the update of step {self.steps - 1}", metrics, self.steps)

    def _diverged_with_adversary(self, what: str, metrics: Mapping[str, float | None]) -> Diverged:
        """The error of a loss or gradient that is not finite, at the adversary's weights or at the trained ones."""
        lr = self.adversary.lr
        lower = {"adversary_lrs": f"take {lr:g} out of adversary_lrs"}
        if not self.adversary.left_finite():
            cause = f"the adversary's weights are not finite: it relearned at the learning rate {lr:g}"
            return Diverged(self.where(), metrics, cause, lower)
        cause = f"{what} is not finite, at the adversary's weights (learning rate {lr:g}) or at the trained ones"
        error = self.diverged(cause, metrics, self.steps)
        error.cures = lower | error.cures
        return error

    def check_update(self, metrics: Mapping[str, float | None] | None = None) -> None:
        """`Diverged` if an update has stored weights or state that are not finite. Waits for the device."""
        if not self.agreed(self.optimizer.left_finite()):
            raise self.diverged(UPDATE, metrics)

    def check(self, batch: StepBatch | None = None, group: Group = ALONE) -> None:
        """After the last step, which no other one looks at: `check_update`, and `Diverged` where the weights as they
        are now give a sample a loss or a gradient that is not finite, as the next step would find. The sample is of
        `batch`, or of the last step's. group: the ranks that share the steps, of which all raise if one does."""
        cause, metrics, batch = None, {}, self.last if batch is None else batch
        if not self.agreed(self.optimizer.left_finite()):
            cause = UPDATE
        elif batch is not None:
            loss = self._probe(one_of(batch)).loss
            if not finite(loss, *self.gradients()):
                cause, metrics = LOSS, {"loss": float(loss)}
            self.drop_gradient()
        group = group if group.size > 1 else self.ranks
        cause = next((found for found in group.gather(cause) if found is not None), None)
        if cause is not None:
            raise self.diverged(cause, metrics)
        self.last = None  # it has been looked at

    def _probe(self, step: StepBatch) -> PartLoss:
        """Forward and backward, launch by launch."""
        return self.loss(step).backward()

    def diverged(
        self, cause: str, metrics: Mapping[str, float | None] | None = None, step: int | None = None
    ) -> Diverged:
        """The error. step: the bad one; None: the last one, whose update it was."""
        at, cures = self.where(self.steps - 1 if step is None else step), self._cures()
        return Diverged(at, metrics or {}, cause, cures)

    def _cures(self) -> dict[str, str]:
        """What helps, by setting."""
        lr, decay, name = self.settings.lr, self.settings.weight_decay, self.lr_name
        cures = {name: f"lower the learning rate ({name}={lr:g})"}
        if lr * decay >= 1:  # a weight is multiplied by 1 - lr * decay
            cures = {"weight_decay": f"lower weight_decay ({decay:g})"} | cures
        epochs = {name.replace("lr", "epochs"): ASCENT["epochs"]}
        cures |= {key: cure for key, cure in ASCENT.items() if key != "epochs" and self._has(key)} | epochs
        return cures

    def _has(self, setting: str) -> bool:
        """Whether the objective has it."""
        if setting == "forget_loss_cap":
            return setting in self.criterion.options
        found = self.criterion.objective  # one that updates it has it in its checkpoints
        return setting != "retain_coeff" or (found.retain and found.update is None)

    def _first_loss(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        """What helps where a loss or gradient is not finite before any update, by setting: no learning rate does."""
        criterion, cures = self.criterion, {}
        if criterion.retain_coeff != 1 and criterion.objective.retain:
            cures["retain_coeff"] = f"lower retain_coeff ({criterion.retain_coeff:g})"
        cap = criterion.options.get("forget_loss_cap")
        if cap is not None:
            cures["forget_loss_cap"] = f"take another forget_loss_cap ({cap:g})"
        defaults = {**criterion.objective.options, "layer": criterion.layer, "forget_loss_cap": cap}
        options = [f"{name}={shown(value)}" for name, value in criterion.options.items() if value != defaults[name]]
        if options:
            cures["objective_options"] = f"take other options of {criterion.objective.name} ({', '.join(options)})"
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        measured = [metrics[name] for name in ("forget_loss", "retain_loss") if metrics[name] is not None]
        if not cures or not all(map(math.isfinite, measured)):  # else the model's own answers are finite
            cures["model"] = "take another model" + f", or a wider dtype than {dtype}" * (dtype != "float64")
        return cures

    def accumulate(self, step: StepBatch) -> PartLoss:
        """Adds a batch's gradient, in micro-batches where it does not fit; its loss, detached. An exception leaves no
        gradient. Where memory runs out the batch is begun again, in half the tokens of the micro-batch that failed."""
        before, self.last = self.halvings, None
        while True:
            micros, found = self._cut(step, self.micro_batch_tokens), []
            try:
                for part in self._passes([micro.step for micro in micros]):
                    found.append(kept(part) if len(micros) > 1 else part)
                break
            except BaseException as error:
                self.drop_gradient()
                if self.torn or not is_out_of_memory(error):
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
        self.last = step
        return found[0] if len(micros) == 1 else summed(step.packed, micros, found)

    def add_within(self, step: StepBatch, forward: Callable[[], contextlib.AbstractContextManager]) -> PartLoss:
        """`accumulate` of a batch that fits; `forward()`: what forward passes run in, such as autocast."""
        micros, found = self._cut(step, None), []
        for micro in micros:
            with self.at(micro.step.role):
                with forward():
                    part = self.loss(micro.step)
                found.append(part.backward())
        self.last = step
        return found[0] if len(micros) == 1 else summed(step.packed, micros, found)

    def _cut(self, step: StepBatch, max_tokens: int | None) -> list[MicroBatch]:
        return micro_batches(step, max_tokens, self.adversary is not None and step.role is Role.TRAINED)

    def _passes(self, steps: list[StepBatch]) -> Iterable[PartLoss]:
        """Forward and backward of each micro-batch."""
        return map(self._backward, steps)

    def _backward(self, step: StepBatch) -> PartLoss:
        with self.at(step.role):
            return self.loss(step).backward()

    def update(self, retain_term: float | None = None) -> None:
        """One update from the accumulated gradient, which is then zero again. retain_term: of the step (`PartLoss`)."""
        self._fitting(self._update)
        self.criterion.advance(retain_term)
        self.steps += 1

    def _fitting(self, update: Callable[[], None]) -> None:
        """Makes an update; `OutOfMemory` where it does not fit."""
        try:
            update()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        raise self._refusal(None, said)

    def where(self, step: int | None = None) -> str:
        """A step (None: the present one), for errors."""
        return f"{self.stage}, " * bool(self.stage) + f"step {self.steps if step is None else step}"

    def _refusal(self, tokens: int | None, said: str) -> OutOfMemory:
        """The error for a sample of `tokens` tokens that does not fit by itself, or (None) for an update."""
        what, cures = self._memory()
        if self.adversary is not None:
            what += ", and an adversary: a copy of its weights and AdamW's two moments"
            reaches = getattr(self.settings, "reaches_model", False)
            cures = [*cures, *["adversary_reach='block'"] * reaches, "no adversary (adversary_every=0)"]
        if not (self.execution.gradient_checkpointing or self.layer_major):
            cures = ["gradient_checkpointing=True (the same result)", *cures]
        return cannot_fit(tokens, what, cures, self.decoder.device, said)

    # ------------------------------------------------ of each kind of training

    @abc.abstractmethod
    def loss(self, step: StepBatch) -> PartLoss:
        """The criterion's loss, differentiable in the trained parameters."""

    @abc.abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """What has been accumulated."""

    def unsummed(self) -> list[torch.Tensor]:
        """What has been accumulated and is to be summed over the ranks that share a step: of each the same tensors."""
        for parameter in self.parameters.values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self.gradients()

    @abc.abstractmethod
    def drop_gradient(self) -> None:
        """Forgets what has been accumulated."""

    @abc.abstractmethod
    def state(self) -> Mapping[str, torch.Tensor]:
        """Everything that training needs to go on: weights, optimiser state, the criterion's. The tensors themselves:
        later steps change them."""

    def same_state(self) -> Mapping[str, torch.Tensor]:
        """What of the state must be the same on all ranks."""
        return self.state()

    @abc.abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Takes up a `state()` after `steps` steps; the next steps give the same bits as uninterrupted ones."""

    @abc.abstractmethod
    def _update(self) -> None:
        """The optimiser's update, after which the gradient is zero."""

    @abc.abstractmethod
    def _memory(self) -> tuple[str, list[str]]:
        """What of the training is in memory, and what would need less of it; for an error."""
