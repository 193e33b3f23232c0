"""What the stages of a run share: its samples, its trainings by the settings, and the loop over a stage's steps.

Of several processes (`team`) each takes its part of a step's samples. `unlearn` has the stages themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.density.attribution import COMPARING, attribute
from kunbr_fast.files.tensors import load_tensors
from kunbr_fast.memory import parse_bytes
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import CacheShard, PrefixCache
from kunbr_fast.objectives.batch import WHOLE, Shares, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Needs, OriginalValues
from kunbr_fast.parallel.group import Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.state import RunState
from kunbr_fast.training.approximation import cosine, gradient_cosine
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.reinserted import reinserted
from kunbr_fast.training.shared import SharedStep


class Run:
    """One run: what its stages train, on what, and how.

    forget, retain, alternates: samples that the model can take, alternates in the order of forget, or none. group: the
    processes that share the run. on_stage(text): told what begins, by the first of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: KUnBRConfig,
        forget: list[Sample],
        retain: list[Sample],
        alternates: list[Sample],
        state: RunState,
        work: Path,
        group: Group,
        progress: bool,
        on_stage: Callable[[str], None] | None,
    ):
        self.decoder, self.config, self.state, self.work = decoder, config, state, work
        self.group, self.team = group, group  # all processes, and those that this one works with now
        self.forget, self.retain, self.alternates = forget, retain, alternates
        self.samples = forget + retain + alternates  # `members` and the original values count in it
        self.original = OriginalValues({})
        self.progress = progress and group.first
        self.on_stage = on_stage if on_stage and group.first else lambda text: None
        self.retain_limit = config.max_retain_loss or 2 * math.log(decoder.config.vocab_size)

    # ------------------------------------------------ samples

    def cached(self) -> list[Sample]:
        """Those of `samples` that the blocks train on."""
        criterion = self.config.criterion(range(self.decoder.num_layers))
        if criterion.alternate is not None:
            return self.samples
        return self.forget + self.retain if criterion.objective.retain else self.forget

    def members(self, criterion: Criterion, forget: Sequence[int], retain: Sequence[int]) -> list[int]:
        """The places in `samples` of a step's samples, in the order that the criterion takes them."""
        first = len(self.forget)
        alternates = [first + len(self.retain) + i for i in forget] if criterion.alternate is not None else []
        return [*forget, *alternates, *(first + i for i in retain if criterion.objective.retain)]

    def _measure(self, stage: str, needs: Needs) -> None:
        """Adds what `needs` names to `original`, from the model, or from the state where it is there already."""
        if self.state.result(stage) is None:
            self.on_stage("the original model's values for the objective")
            start, model = time.perf_counter(), self.decoder.model
            samples = {"forget": self.forget, "retain": self.retain, "alternate": self.alternates}
            found = OriginalValues({})
            if self.group.first:
                with fused(model, self.config.impl):
                    found = OriginalValues.of(
                        self.decoder,
                        samples,
                        needs,
                        impl=self.config.impl,
                        storage=self.config.activations,
                        directory=self.work,
                        progress=self.progress,
                    )
            self.state.finish(stage, {"seconds": time.perf_counter() - start}, found.tensors())
        found = OriginalValues.from_tensors(load_tensors(self.state.file(stage)))
        self.original = OriginalValues({**self.original.values, **found.values})

    def _schedule(self, epochs: int, number: int) -> Schedule:
        """Stage `number`'s own data order: 0 for the warm-up, then one for each visit of a block."""
        config = self.config
        return Schedule(
            len(self.forget),
            len(self.retain),
            config.batch_size,
            config.retain_size,
            epochs,
            config.seed * 1000 + number,
        )

    # ------------------------------------------------ trainings

    def full_training(self) -> FullTraining:
        config = self.config
        return FullTraining(
            self.decoder,
            lr=config.warmup_lr,
            optimizer=config.warmup_optimizer,
            weight_decay=config.weight_decay,
            gradient_checkpointing=config.gradient_checkpointing,
            impl=config.impl,
            criterion=config.criterion(warmup=True),
            micro_batch_tokens=config.micro_batch_tokens,
        )

    def block_training(
        self, values: MutableMapping[str, torch.Tensor], block: range
    ) -> contextlib.AbstractContextManager[BlockTraining]:
        config = self.config
        return reinserted(
            self.decoder,
            values,
            block,
            config.block_lr,
            criterion=config.criterion(block),
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            insertion=config.insertion,
            master_weights=config.master_weights,
            gradient_checkpointing=config.gradient_checkpointing,
            mask=None if config.mask == "none" else self.mask(block),
            cuda_graphs=config.cuda_graphs,
            optimizer_device=config.optimizer_device,
            micro_batch_tokens=config.micro_batch_tokens,
            cover_precision=config.cover_precision,
            activations=config.activations,
            directory=self.work,
            impl=config.impl,
        )

    def mask(self, block: range) -> dict[str, torch.Tensor]:
        """The weights of the block that may change, by all samples and the original as it stands."""
        config = self.config
        found = attribute(
            self.decoder,
            self.forget,
            self.retain if config.mask in COMPARING else None,
            config.mask,
            "all",
            blocks=[block],
            gradient_checkpointing=config.gradient_checkpointing or None,
            impl=config.impl,
            progress=self.progress,
            group=self.team,
        )
        return found.mask(ratio=config.mask_ratio)

    def _cache(self, home: list[int] | None) -> PrefixCache | CacheShard:
        """Of `cached`, or of those that this process has in steps that all share."""
        of = self.prefix_cache
        return of(self.cached()) if self.team.size == 1 else CacheShard(of, self.cached(), home, self.team.rank)

    def prefix_cache(self, samples: list[Sample]) -> PrefixCache:
        config = self.config
        return PrefixCache(
            self.decoder,
            samples,
            config.cache,
            self.work,
            progress=self.progress,
            dtype=config.cache_dtype,
            budget=parse_bytes(config.cache_bytes, "cache_bytes"),
        )

    # ------------------------------------------------ steps

    def _train(
        self,
        stage: str,
        training: FullTraining | BlockTraining,
        batch_of: Callable[[list[int]], PackedBatch],
        schedule: Schedule,
        start: float | None = None,
        home: list[int] | None = None,
    ) -> dict[str, Any]:
        """Runs the steps of a stage that are not yet done, with checkpoints; returns {"epochs", "seconds"}. batch_of:
        those of `samples` by their places; home: see `_step`."""
        start = time.perf_counter() if start is None else start
        first, extra = 0, {"epochs": [], "sums": None, "recent": [], "seconds": 0.0}
        if (found := self.state.progress(stage)) is not None:
            first, tensors, extra = found
            training.load_state(tensors, first)
            # what memory allowed before: other parts would have other bits
            limits = (extra.get("micro_batch_tokens"), training.micro_batches.tokens)
            training.micro_batches.tokens = min((n for n in limits if n is not None), default=None)
        every = self.config.checkpoint_every or schedule.steps_per_epoch

        def save(done: int) -> None:
            seconds = extra["seconds"] + time.perf_counter() - start
            also = {"seconds": seconds, "micro_batch_tokens": training.micro_batches.tokens}
            self.state.save_progress(stage, done, training.state(), {**extra, **also})

        label = "warm-up" if stage == "warmup" else f"block {stage.rpartition('.')[2]}"
        with tqdm(
            total=len(schedule), initial=first, desc=label, unit="step", leave=False, disable=not self.progress
        ) as bar:
            for number in range(first, len(schedule)):
                try:
                    metrics = self._step(training, batch_of, *schedule[number], home)
                except Diverged:
                    save(number)  # the weights before the bad step
                    raise
                self._account(stage, number, schedule, metrics, extra)
                bar.set_postfix_str(_shown(metrics), refresh=False)
                bar.update()
                if (number + 1) % every == 0 and number + 1 < len(schedule):
                    save(number + 1)
        self.team.check_same_bits(stage, training.state())
        return {"epochs": extra["epochs"], "seconds": extra["seconds"] + time.perf_counter() - start}

    def _step(
        self,
        training: FullTraining | BlockTraining,
        batch_of: Callable[[list[int]], PackedBatch],
        forget: list[int],
        retain: list[int],
        home: list[int] | None,
    ) -> dict[str, float | None]:
        """One step, by all of `team`. home: which process has each of the forget and retain samples; None: each takes an
        equal part of the step's."""
        team = self.team
        if team.size == 1:
            return training.step_packed(self._batch(training, batch_of, forget, retain))
        mine = self._mine(forget, retain, home)
        shares = Shares(*(len(part) / len(whole) for part, whole in zip(mine, (forget, retain))))
        batch, step = self._batch(training, batch_of, *mine, shares), SharedStep(training)
        if batch is not None:
            step.add_all(batch)
        try:
            metrics = step.gather(team, f"step {training.steps}")
        except Diverged:
            training.drop_gradient()
            raise
        step.apply()
        return metrics

    def _batch(
        self,
        training: FullTraining | BlockTraining,
        batch_of: Callable[[list[int]], PackedBatch],
        forget: Sequence[int],
        retain: Sequence[int],
        shares: Shares = WHOLE,
    ) -> StepBatch | None:
        """A step's batch of these forget and retain samples; None where the objective takes none of them."""
        indices = self.members(training.criterion, forget, retain)
        if not indices:
            return None
        return training.criterion.step_batch(batch_of(indices), len(forget), self.original.batch(indices), shares)

    def _mine(
        self, forget: list[int], retain: list[int], home: list[int] | None
    ) -> tuple[list[int], list[int]] | list[list[int]]:
        """Of a step's samples those that this process takes. home: as in `_step`."""
        team = self.team
        if home is None:
            return [
                x[team.rank * len(x) // team.size : (team.rank + 1) * len(x) // team.size] for x in (forget, retain)
            ]
        first = len(self.forget)
        return [i for i in forget if home[i] == team.rank], [i for i in retain if home[first + i] == team.rank]

    def _account(self, stage: str, number: int, schedule: Schedule, metrics: dict, extra: dict) -> None:
        """Means of each epoch for the report, and the limit on the retain loss. A loss that the objective does not
        measure is None throughout, and has no limit."""
        names = ("forget_loss", "retain_loss")
        sums = extra["sums"] or {**{name: 0.0 for name in names}, "steps": 0}
        for name in names:
            sums[name] = None if metrics[name] is None else sums[name] + metrics[name]
        sums["steps"] += 1
        extra["sums"] = sums
        if (number + 1) % schedule.steps_per_epoch == 0:
            extra["epochs"].append({n: None if sums[n] is None else sums[n] / sums["steps"] for n in names})
            extra["sums"] = None
        if metrics["retain_loss"] is None:
            return
        extra["recent"] = [*extra["recent"][-9:], metrics["retain_loss"]]
        recent = sum(extra["recent"]) / len(extra["recent"])
        if len(extra["recent"]) == 10 and recent > self.retain_limit:
            raise Diverged(
                f"{stage}, step {number}: the retain loss is beyond max_retain_loss = {self.retain_limit:.2f}", metrics
            )

    # ------------------------------------------------ what approximations make of a block's first step

    def _cache_error(
        self, training: BlockTraining, cache: PrefixCache | CacheShard, schedule: Schedule, home: list[int] | None
    ) -> dict[str, dict[str, float]]:
        """Of a prefix cache in low precision: what it makes of the samples and of the gradient of the block's first step
        (the first process's part)."""
        mine = self._mine(*schedule[0], home)
        indices = self.members(training.criterion, *mine)
        if cache.is_exact or not indices:
            return {}
        batch, exact = cache.batch(indices), cache.exact(indices)
        step = training.criterion.step_batch(batch, len(mine[0]), self.original.batch(indices))

        def gradient(hidden: torch.Tensor) -> torch.Tensor:
            training.accumulate(dataclasses.replace(step, packed=dataclasses.replace(batch, hidden=hidden)))
            found = training.flat.grad.clone()
            training.drop_gradient()
            return found

        error = float((batch.hidden.double() - exact.double()).norm() / exact.double().norm())
        same = cosine(gradient(batch.hidden), gradient(exact))
        self.on_stage(
            f"prefix cache in {self.config.cache_dtype}: a relative error of {error:.2g}; the block's gradient has a cosine of "
            f"{same:.6f} to the exact one"
        )
        return {"cache_error": {"relative_error": error, "gradient_cosine": same}}

    def _gradient_cosine(
        self,
        training: BlockTraining,
        batch_of: Callable[[list[int]], PackedBatch],
        schedule: Schedule,
        home: list[int] | None,
    ) -> dict[str, float]:
        """Of a cover in low precision: what it makes of the gradient of the block's first step (the first process's part)."""
        if training.cover is None:
            return {}
        step = self._batch(training, batch_of, *self._mine(*schedule[0], home))
        if step is None:
            return {}
        found = gradient_cosine(training, step)
        precision = training.cover.precision
        self.on_stage(f"cover in {precision}: the block's gradient has a cosine of {found:.6f} to the exact cover's")
        return {"gradient_cosine": found}


def _shown(metrics: Mapping[str, float | None]) -> str:
    """A step's losses for the progress bar: the NLLs, or the objective's own value where there are none."""
    shown = [f"{n} {metrics[f'{n}_loss']:.3f}" for n in ("forget", "retain") if metrics[f"{n}_loss"] is not None]
    return " ".join(shown) or f"loss {metrics['loss']:.4g}"
