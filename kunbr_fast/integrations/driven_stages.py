"""The stages of `kunbr_fast.unlearn`, driven from outside: entered and left one by one, step by step, by another's
loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.report import Report
from kunbr_fast.evaluation.rtt import AttackDiverged
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.fingerprint import model_fingerprint
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.samples import share
from kunbr_fast.run.stages import Stages
from kunbr_fast.run.steps import LOSSES, new_account
from kunbr_fast.run.visits import BEGIN, MERGE, ORIGINAL, RTT, WARMUP, Stage, Visit, layers, visits
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.shared import SharedStep

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Span:
    """The driver's steps `first` to `stop` (exclusive) of a stage. Number 0 is the warm-up, n the n-th visit of a
    block."""

    number: int
    first: int
    stop: int


class DrivenStages(Stages):
    """The stages, entered and left one by one; the driver calls `backward`, `gather` and the training's optimiser.

    ranks: the driver's, which share each step; autocast: what a forward pass runs in.
    spans: of the stages that have steps; at: the present one; visit: the present one, None in the warm-up.
    """

    def __init__(
        self,
        inputs: RunInputs,
        config: KUnBRConfig,
        context: RunContext,
        ranks: Group,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ):
        self.ranks, self.autocast = ranks, autocast
        super().__init__(inputs, config, context)
        begun: dict[str, Any] = {"unlearned_given": inputs.unlearned is not None}
        if self.given is not None:
            begun["given"] = self.given
        if (found := self.state.result(BEGIN)) is None:
            self.state.finish(BEGIN, begun)  # from here on the settings of the data are fixed
        elif found != begun:
            how = "without" if inputs.unlearned is not None else "with"
            how = "with another" if found["unlearned_given"] == begun["unlearned_given"] else how
            raise ValueError(f"{self.work}: this run was begun {how} unlearned=")
        self.steps_per_epoch = self.schedule_of(None).steps_per_epoch
        self.spans = self._spans()
        self.at: Span | None = None
        self.visit: Visit | None = None
        self.training: FullTraining | BlockTraining | None = None
        self.blocks: list[range] | None = None
        self.measured: Density | None = None
        self.trained: dict[range, Mapping[str, torch.Tensor]] = {}
        self.cache: PrefixCache | None = None
        self._original: WeightSnapshot | None = None
        self._outer, self._inner = contextlib.ExitStack(), contextlib.ExitStack()
        self._step: SharedStep | None = None
        self.gathered: SharedStep | None = None  # what the next update is made from
        self._since_log: list[dict[str, float]] = []

    def prove_kernels(self, group: Group | None = None) -> None:
        with self.autocast():
            super().prove_kernels(self.ranks)

    def _spans(self) -> list[Span]:
        config, found, first = self.config, [], 0
        epochs = [0 if self.inputs.unlearned is not None else config.warmup_epochs]
        epochs += [config.block_epochs] * config.rounds * config.top_k
        for number, stop in enumerate(itertools.accumulate(epochs)):
            stop *= self.steps_per_epoch
            if stop > first:
                found.append(Span(number, first, stop))
            first = stop
        return found

    # ------------------------------------------------ from stage to stage

    def begin(self, steps: int) -> None:
        """Enters the stage in which the last of `steps` steps was done. The model must be the original."""
        self._original = self.keep_original()
        self._outer.enter_context(frozen(self.decoder.model))
        if steps > self.spans[-1].stop:
            raise ValueError(f"a checkpoint of step {steps}, in a run of {self.spans[-1].stop} steps")
        present = next(span for span in self.spans if steps <= span.stop)
        if present.number == 0:  # what a run that had come further has left is made again
            self.state.keep_only((BEGIN, ORIGINAL, Stage.evaluation("original")))
        self.evaluate("original")
        with self.autocast():
            self.measure_original()
        if present.number:
            self._take_trained(self.order[: present.number - 1], self.order[present.number - 1])
        self._enter(present)

    def _take_trained(self, before: list[Visit], present: Visit) -> None:
        """Takes up the blocks that earlier visits have trained."""
        cumulative = self.config.insertion == "cumulative"
        for visit in {visit.block: visit for visit in before}.values():  # the last of each block
            # the checkpoint has the present block's weights; its file of the former round may be gone
            if cumulative or visit.block != present.block:
                self.trained[visit.block] = self.state.weights(visit.stage)
                if cumulative:
                    self.decoder.place(self.trained[visit.block])

    def advance(self) -> None:
        """From a stage whose steps are all done to the next one."""
        following = self.spans[self.spans.index(self.at) + 1]
        self._leave(complete=True)
        self._enter(following)

    @functools.cached_property
    def order(self) -> list[Visit]:
        """All visits; M_u and density are made first where they are not yet there."""
        if self.state.result(WARMUP) is None:
            self._take_unlearned()
        self.measured = self.density()
        self.blocks = self.select(self.measured)
        with self.autocast():
            self.measure_original(self.blocks)
        return visits(self.config, self.blocks)

    def left(self, order: list[Visit]) -> list[Visit]:
        return order  # a checkpoint may be older than the results

    def _take_unlearned(self) -> None:
        """M_u's weights to warmup.safetensors, where no stage has made them."""
        own = dict(self.decoder.model.named_parameters())
        if (given := self.inputs.unlearned) is not None:
            values = {name: value.to(own[name].dtype) for name, value in given.items() if name in own}
        elif self.spans[0].number:  # no epoch of warm-up
            values = own
        else:
            raise ValueError(f"{self.work}: the warm-up's result is missing: resume from a checkpoint of the warm-up")
        accuracy = {}
        if any(self.inputs.questions.values()):
            self.decoder.place(values)
            accuracy = self._accuracy(self.decoder, "unlearned")
            self._original.restore(self.decoder.model)
        self.state.finish(WARMUP, {"accuracy": accuracy}, values)

    def _enter(self, span: Span) -> None:
        self.visit = self.order[span.number - 1] if span.number else None
        with contextlib.ExitStack() as stack:
            if self.visit is None:
                self._enter_warm_up(stack)
            else:
                self._enter_visit(stack, self.visit)
            self._inner = stack.pop_all()
        self.at, self.losses, self.schedule = span, new_account(), self.schedule_of(self.visit)

    def _enter_warm_up(self, stack: contextlib.ExitStack) -> None:
        says = f"warm-up on all parameters, {self.config.warmup_epochs} epochs"
        stack.enter_context(self.reporter.stage(WARMUP, says))
        self.training = stack.enter_context(self.full_training())
        self.feed = self.feed_of(self.training)

    def _enter_visit(self, stack: contextlib.ExitStack, visit: Visit) -> None:
        block, which = visit.block, f"visit {1 + self.order.index(visit)} of {len(self.order)}"
        says = f"re-insertion of layers {layers(block)}, {which}"
        stack.enter_context(self.reporter.stage(visit.stage, says))
        with self.reporter.part("prefix cache"):
            if self.cache is None:
                self.cache = self.prefix_cache()
            with self.autocast():
                self.cache.advance(block.start)
        source, self._values = self.trained.get(block) or self._unlearned(), {}
        self.training = stack.enter_context(self.block_training(visit, source, self._values))
        self.feed = self.feed_of(self.training, self.cache)

    def _leave(self, complete: bool) -> None:
        """Out of the present stage; with complete=False its result is used, but not recorded as the stage's."""
        self.check()
        visit, self.at, self.training = self.visit, None, None
        result = {"epochs": self.losses["epochs"]}
        self._inner.close()
        if visit is None:
            if complete:
                result["accuracy"] = self._accuracy(self.decoder, "unlearned")
                self.state.finish(WARMUP, result, dict(self.decoder.model.named_parameters()))
                self._original.restore(self.decoder.model)
            return
        self.trained[visit.block] = self._values
        if complete:
            self.state.finish(visit.stage, result, self._values)
            self.trained[visit.block] = self.state.weights(visit.stage)
            # of cumulative blocks any checkpoint needs the round before its own
            if visit.round > 0 and self.config.insertion == "independent":
                self.state.drop_file(visit.in_round(visit.round - 1).stage)

    def end(self, steps: int) -> None:
        """The model becomes M_u with the blocks trained so far; after a part of the warm-up it stays as it is. Until
        `close` it can be the original again."""
        warming, complete = self.visit is None, steps == self.at.stop
        self._leave(complete)
        if complete or not warming:
            _ = self.order  # of a run without blocks the density is not yet measured
            self.merge(self.trained)
        self._outer.close()
        self.cache, self.original = None, OriginalValues({})  # no training reads them any more

    def prove(self) -> Report | None:
        """After `end`: what the result is by its figures, and what was done; None where the warm-up was not finished.

        An attack that diverges is said; then there are no figures of it."""
        if self.measured is None:
            return None
        found = model_fingerprint(self.decoder.model)
        if (self.state.result(MERGE) or {}).get("model") != self.ranks.gather(found)[0]:  # figures of another result
            self.state.forget((RTT, Stage.evaluation("result")))
            self.state.finish(MERGE, {"model": found})
        unlearned = self.state.result(WARMUP).get("accuracy")
        accuracy = {"original": self.evaluate("original"), "unlearned": unlearned, "result": self.evaluate("result")}
        rtt = None
        try:
            self.group = self.ranks  # which share the attacks
            rtt = self.attack()
        except AttackDiverged as error:
            logger.warning("%s (rtt_lrs; this result has no figures of an attack)", error)
        finally:
            self.group = self.team = ALONE
        return self.report(self.measured, self.blocks, accuracy, rtt)

    def close(self) -> None:
        """The training is over: the original goes."""
        self._original = None
        self.drop_original()

    def abort(self) -> None:
        """After an exception: the model is the original again."""
        self.at = None
        self._inner.__exit__(*sys.exc_info())
        if self._original is not None:
            self._original.restore(self.decoder.model)
        self._outer.close()

    # ------------------------------------------------ steps

    def backward(self, step: int, micro: int, accumulation: int) -> torch.Tensor:
        """Adds the gradient of one of a step's `accumulation` micro-batches on this rank. Returns its loss; over all
        micro-batches and ranks they sum to the loss of the step."""
        number = step - self.at.first
        if micro == 0:
            self._relearn(number)
        whole = self.schedule[number]
        part, parts = micro * self.ranks.size + self.ranks.rank, accumulation * self.ranks.size
        mine = [share(samples, part, parts) for samples in whole]
        if (batch := self.feed.part(mine, whole)) is None:
            return torch.zeros((), device=self.decoder.device)
        if self._step is None:
            self._step = SharedStep(self.training)
        part = self.training.add_within(batch, self.autocast)
        self._step.add(batch, part)
        return part.loss

    def _relearn(self, number: int) -> None:
        """What the adversary, where there is one, does before a step; by all ranks."""
        ranks, training = self.ranks, self.training
        parts = [(batch, share(batch, ranks.rank, ranks.size)) for batch in self.schedule.relearned(number)]
        parts = [self.feed.relearned(mine, len(batch)) for batch, mine in parts]
        training.relearn(parts, ranks, lambda batch: training.add_within(batch, self.autocast))

    def gather(self, step: int) -> None:
        """After the last micro-batch: sums the gradients over the ranks. Raises `Diverged` if something is not finite,
        also what the update before has stored, or the retain loss beyond its limit."""
        self.gathered, self._step = self._step or SharedStep(self.training), None
        number, metrics = step - self.at.first, self.gathered.gather(self.ranks)
        self.account(self.training, number, (number + 1) % self.steps_per_epoch == 0, metrics, self.losses)
        self._since_log.append(metrics)

    def check(self) -> None:
        """`Diverged` where the last update has destroyed the weights: before a checkpoint, and at the end of a stage,
        since no later step looks at them."""
        with self.autocast():
            self.training.check(group=self.ranks)

    def logged(self, losses_too: bool) -> dict[str, float]:
        """Numbers alone, which every logger takes: the stage (0 the warm-up, n the n-th visit), the block's first and
        last layer, and the mean losses of the steps since the last time."""
        found: dict[str, float] = {"stage": self.at.number}
        if self.visit is not None:
            found |= {"first_layer": self.visit.block.start, "last_layer": self.visit.block.stop - 1}
        if losses_too and self._since_log:
            for name in LOSSES:
                values = [metrics[name] for metrics in self._since_log if metrics[name] is not None]
                if values:
                    found[name] = sum(values) / len(values)
            self._since_log = []
        return found

    # ------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the present stage, beside the model's weights."""
        tensors = self.training.state()
        if self.visit is None:  # the weights are in the model's file
            tensors = {name: value for name, value in tensors.items() if name not in self.training.parameters}
        return {
            "stage": self.at.number,
            "visit": None if self.visit is None else str(self.visit.stage),
            "steps": self.training.steps,
            "lr": [group["lr"] for group in self.training.optimizer.param_groups],
            "tensors": tensors,
            "extra": self.losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["stage"] != self.at.number:
            raise ValueError(f"optimizer.pt is of stage {state['stage']}, trainer_state.json of {self.at.number}")
        visit = None if self.visit is None else self.visit.stage
        # earlier versions went round by round, and did not note the visit
        old = None if self.config.rounds > 1 and self.config.insertion == "independent" else visit
        if state.get("visit", old) != visit:
            raise ValueError(f"optimizer.pt is of another visit than {visit}: its run had another order: start again")
        self.training.load_state({**self.training.state(), **state["tensors"]}, state["steps"])
        for group, lr in zip(self.training.optimizer.param_groups, state["lr"]):
            group["lr"] = lr
        self.losses = state["extra"]


class StageOptimizer(torch.optim.Optimizer):
    """The optimiser that the driver holds throughout: the present stage's."""

    def __init__(self, stages: DrivenStages):  # torch's own would want parameters
        self._stages = stages

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        training = self._stages.training
        return [] if training is None else training.optimizer.param_groups

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        return self._stages.training.optimizer.state

    def step(self, closure: Any = None) -> None:
        self._stages.gathered.apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: `step` has done it, and a block's gradients are views that stay."""

    def state_dict(self) -> dict[str, Any]:
        return self._stages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stages.load_state_dict(state_dict)
