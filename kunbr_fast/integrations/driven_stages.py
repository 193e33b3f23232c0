"""The stages of `kunbr_fast.unlearn`, driven from outside: entered and left one by one, step by step, by another's
loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.report import Report
from kunbr_fast.evaluation.rtt import AttackDiverged
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.integrations.stage_steps import Span, epochs_of_stages, shared_out
from kunbr_fast.model.fingerprint import model_fingerprint
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.samples import share
from kunbr_fast.run.stages import Stages
from kunbr_fast.run.steps import LOSSES, means, new_account
from kunbr_fast.run.visits import BEGIN, MERGE, ORIGINAL, RTT, WARMUP, Stage, Visit, layers, visits
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.shared import SharedStep

logger = logging.getLogger(__name__)


class DrivenStages(Stages):
    """The stages, entered and left one by one; the driver calls `backward`, `gather` and the training's optimiser.

    ranks: the driver's, which share each step; autocast: what a forward pass runs in; max_steps: what all stages share,
    each then has the first ones of its own. arguments: the driver's that the weights depend on, see `changed`.
    spans: of the stages that have steps; at: the present one; visit: the present one, None in the warm-up.
    """

    def __init__(
        self,
        inputs: RunInputs,
        config: KUnBRConfig,
        context: RunContext,
        ranks: Group,
        autocast: Callable[[], contextlib.AbstractContextManager],
        max_steps: int | None = None,
        arguments: Mapping[str, str] | None = None,
    ):
        self.ranks, self.autocast = ranks, autocast
        super().__init__(inputs, config, context)
        self.steps_per_epoch = self.schedule_of(None).steps_per_epoch
        self.shared: str | None = None  # what to tell of max_steps
        self.planned = self._planned(max_steps)
        self.changed: dict[str, tuple[str, str]] = {}  # of `arguments`, what was otherwise when the run was begun
        self._begin_state(max_steps, dict(arguments or {}))
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

    def _planned(self, max_steps: int | None) -> dict[int, int]:
        """The steps of each stage that has some, by its number."""
        epochs = epochs_of_stages(self.config, self.inputs.unlearned is None)
        steps = {number: n * self.steps_per_epoch for number, n in enumerate(epochs) if n}
        if max_steps is None:
            return steps
        shared, self.shared = shared_out(max_steps, steps)
        return shared

    def _begin_state(self, max_steps: int | None, arguments: dict[str, str]) -> None:
        """From here on the settings of the data are fixed, and what else the run was begun with."""
        begun: dict[str, Any] = {"unlearned_given": self.inputs.unlearned is not None, "run": uuid.uuid4().hex}
        others = {"given": self.given, "max_steps": max_steps, "arguments": arguments}
        begun |= {name: value for name, value in others.items() if value is not None}
        if (found := self.state.result(BEGIN)) is None:
            self.state.finish(BEGIN, begun)
            return
        before = found.get("arguments", {})
        self.changed = {n: (before[n], now) for n, now in arguments.items() if before.get(n, now) != now}
        if found.get("max_steps") != max_steps:
            was, now = (f"max_steps={n}" if n else "without max_steps" for n in (found.get("max_steps"), max_steps))
            raise ValueError(f"{self.work}: this run was begun {was}, and is {now} now: put it back")
        if found["unlearned_given"] != begun["unlearned_given"] or found.get("given") != self.given:
            how = "without" if begun["unlearned_given"] else "with"
            how = "with another" if found["unlearned_given"] == begun["unlearned_given"] else how
            raise ValueError(f"{self.work}: this run was begun {how} unlearned=")

    def _spans(self) -> list[Span]:
        ends, found, first = self.state.result(BEGIN).get("ends", {}), [], 0
        for number, steps in self.planned.items():
            stop = ends.get(str(number), first + steps)
            if not first < stop <= first + steps:
                raise ValueError(
                    f"{self.state.path}: begin: ends: got {stop}, expected {first + 1} to {first + steps}: start again "
                    "in another directory"
                )
            found.append(Span(number, first, stop, steps))
            first = stop
        return found

    def end_stage(self, step: int) -> str:
        """The present stage ends after `step` steps of all stages. The state keeps that, so that a resumed run ends it
        there too. Returns what to tell."""
        at, begun = self.at, self.state.result(BEGIN)
        ends = {number: stop for number, stop in begun.get("ends", {}).items() if int(number) < at.number}
        self.state.finish(BEGIN, begun | {"ends": ends | {str(at.number): step}})
        self.spans = self._spans()
        self.at = next(span for span in self.spans if span.number == at.number)
        name = "the warm-up"
        if self.visit is not None:
            name = f"visit {at.number} of {len(self.order)} (layers {layers(self.visit.block)})"
        then = "the next stage begins" if self.at is not self.spans[-1] else "it was the last stage"
        return f"a callback has ended {name} after {step - at.first} of {at.steps} steps: {then}"

    # ------------------------------------------------ from stage to stage

    def begin(self, steps: int) -> None:
        """Enters the stage in which the last of `steps` steps was done. The model must be the original."""
        self._original = self.keep_original()
        self._outer.enter_context(frozen(self.decoder.model))
        if steps > self.spans[-1].stop:
            raise ValueError(
                f"a checkpoint of step {steps}, in a run of {self.spans[-1].stop} steps: give one of this run as "
                "resume_from_checkpoint"
            )
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
        self._leave()
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
        found = {}
        if self._proof:
            self.decoder.place(values)
            found = self._measured(self.decoder, "unlearned")
            self._original.restore(self.decoder.model)
        self.state.finish(WARMUP, found, values)

    def _enter(self, span: Span) -> None:
        self.visit = self.order[span.number - 1] if span.number else None
        with contextlib.ExitStack() as stack:
            if self.visit is None:
                self._enter_warm_up(stack, span.steps)
            else:
                self._enter_visit(stack, self.visit)
            self._inner = stack.pop_all()
        self.at, self.losses, self.schedule = span, new_account(), self.schedule_of(self.visit)

    def _enter_warm_up(self, stack: contextlib.ExitStack, steps: int) -> None:
        says = f"warm-up on all parameters, {steps} steps"
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

    def _leave(self) -> None:
        """Out of the present stage, which is done."""
        self.check()
        visit, self.at = self.visit, None
        self.training = self.feed = self.gathered = None  # with all that they hold
        result = {"epochs": [*self.losses["epochs"], *filter(None, [means(self.losses["sums"])])]}
        self._inner.close()
        if visit is None:
            result |= self._measured(self.decoder, "unlearned")
            self.state.finish(WARMUP, result, dict(self.decoder.model.named_parameters()))
            self._original.restore(self.decoder.model)
            return
        self.state.finish(visit.stage, result, self._values)
        self.trained[visit.block] = self.state.weights(visit.stage)
        # of cumulative blocks any checkpoint needs the round before its own
        if visit.round > 0 and self.config.insertion == "independent":
            self.state.drop_file(visit.in_round(visit.round - 1).stage)

    def end(self, steps: int) -> None:
        """After the last stage the model becomes M_u with the trained blocks. Until `close` it can be the original
        again."""
        if steps != (whole := self.spans[-1].stop):
            raise RuntimeError(f"the training ended after {steps} of {whole} steps: its blocks are not merged: resume")
        self._leave()
        _ = self.order  # of a run without blocks the density is not yet measured
        self.merge(self.trained)
        self._outer.close()
        self.cache, self.original = None, OriginalValues({})  # no training reads them any more

    def prove(self) -> Report:
        """After `end`: what the result is by its figures, and what was done.

        An attack that diverges is said; then there are no figures of it."""
        found = model_fingerprint(self.decoder.model)
        if (self.state.result(MERGE) or {}).get("model") != self.ranks.gather(found)[0]:  # figures of another result
            self.state.forget((RTT, Stage.evaluation("result")))
            self.state.finish(MERGE, {"model": found})
        self.evaluate("result")
        rtt = None
        try:
            self.group = self.ranks  # which share the attacks
            rtt = self.attack()
        except AttackDiverged as error:
            logger.warning("%s (rtt_lrs; this result has no figures of an attack)", error)
        finally:
            self.group = self.team = ALONE
        return self.report(self.measured, self.blocks, rtt)

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
        if isinstance(self.training, BlockTraining):
            self.training.check_in_place()
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
            "run": self.state.result(BEGIN).get("run"),
            "visit": None if self.visit is None else str(self.visit.stage),
            "steps": self.training.steps,
            "lr": [group["lr"] for group in self.training.optimizer.param_groups],
            "tensors": tensors,
            "extra": self.losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["stage"] != self.at.number:
            raise ValueError(
                f"optimizer.pt is of stage {state['stage']}, trainer_state.json of {self.at.number}: give another "
                "checkpoint as resume_from_checkpoint"
            )
        if state.get("run") != self.state.result(BEGIN).get("run"):
            raise ValueError("the checkpoint is of another training in this output_dir: delete it, or give another one")
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
    def defaults(self) -> dict[str, Any]:
        """The rate that the stage began with, which some schedules read."""
        group = self.param_groups[0]
        return {"lr": group.get("initial_lr", group["lr"])}

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
