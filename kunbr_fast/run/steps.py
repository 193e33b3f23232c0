"""What the stages of a run share: its samples, its trainings by the settings, and the loop over a stage's steps."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.density.attribution import COMPARING, attribute
from kunbr_fast.files.shown import plain
from kunbr_fast.files.tensors import WeightSnapshot, load_tensors
from kunbr_fast.memory import Place
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import CacheShard, PrefixCache
from kunbr_fast.objectives.layer_states import LayerStates
from kunbr_fast.objectives.original import Needs, OriginalValues
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.parallel.sharded import sharded
from kunbr_fast.proofs import ensure_proven
from kunbr_fast.run.checks import prepare
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.reporter import Timer
from kunbr_fast.run.samples import Feed
from kunbr_fast.run.visits import SELECTION, STATES, WARMUP, Stage, Visit, layers, visits
from kunbr_fast.stopping import Stopped
from kunbr_fast.training.approximation import cache_error, gradient_cosine
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.fine_tune import full_training
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.reinserted import reinserted
from kunbr_fast.training.sharded import LockStep
from kunbr_fast.training.shared import SharedStep
from kunbr_fast.training.training import Training
from kunbr_fast.values import least, parse_bytes

LOSSES = ("forget_loss", "retain_loss")


class Run:
    """One run: what its stages train, on what, and how. Its settings, models and data are checked here.

    group: the ranks that share the run; team: those that this one works with now.
    """

    def __init__(self, inputs: RunInputs, config: KUnBRConfig, context: RunContext):
        inputs = inputs.allowing_equal_choices() if config.equal_choices == "allow" else inputs
        self.inputs, self.config, self.context, self.work = inputs, config, context, context.work
        self.reporter = context.reporter
        self.group = self.team = context.group
        self.decoder, self.samples, self.rtt, self.state, self.given = prepare(inputs, config, context)
        self.prove_kernels()
        self.original = OriginalValues({})
        self._kept: WeightSnapshot | None = None
        self.retain_limit = config.max_retain_loss or 2 * math.log(self.decoder.config.vocab_size)

    def prove_kernels(self, group: Group | None = None) -> None:
        """Before anything runs on a GPU. group: the processes that share the run, in place of `self.group`."""
        group, reporter = group or self.group, self.reporter
        how = dict(say=reporter.say, progress=reporter.progress and group.first, group=group)
        ensure_proven(self.decoder.device, {self.decoder.dtype}, self.config.impl, **how)

    # ------------------------------------------------ what trainings read

    def measure(self, stage: Stage, needs: Needs) -> None:
        """Adds the original's values that `needs` names, from the model, or where it has them from the state."""
        if self.state.result(stage) is None:
            found = OriginalValues({})
            says, impl = "the original model's values for the objective", self.config.impl
            with self.reporter.stage(stage, says) as took, fused(self.decoder.model, impl):
                if self.group.first:
                    how = {"impl": impl, "progress": self.reporter.progress}
                    place = Place(self.config.cache, self.work)
                    found = OriginalValues.of(self.decoder, self.samples.parts, needs, place=place, **how)
            self.state.finish(stage, {"seconds": took.seconds}, found.tensors())
        found = OriginalValues.from_tensors(load_tensors(self.state.file(stage)))
        self.original = self.original.joined(found)

    def keep_states(self, layers: Sequence[int]) -> None:
        """Keeps the outputs of these layers for the retain set, where they are not yet kept. The model must be the
        original: no file has them, a resumed run makes them again."""
        if self.original.states is not None:
            return
        config, retain = self.config, self.samples.retain
        says = f"the original model's hidden states at {len(layers)} layers"
        with self.reporter.stage(STATES, says) as took, fused(self.decoder.model, config.impl):
            took.before = (self.state.result(STATES) or {"seconds": 0.0})["seconds"]
            how = dict(dtype=config.cache_dtype, progress=self.reporter.progress)
            how["budget"] = self._share_of_budget(len(layers) * _tokens(retain), _tokens(self._cached))
            states = LayerStates(self.decoder, retain, layers, Place(config.cache, self.work), **how)
        self.original = self.original.with_states(states, len(self.samples.forget))
        self.state.finish(STATES, {"seconds": took.seconds})

    def _share_of_budget(self, rows: int, others: int) -> int | None:
        """Of cache_bytes, which the prefix cache and the original's hidden states divide by their rows."""
        budget = parse_bytes(self.config.cache_bytes, "cache_bytes")
        return budget if budget is None or not others else budget * rows // (rows + others)

    @property
    def _cached(self) -> list[Sample]:
        """The samples that blocks train on."""
        if not self.config.top_k:
            return []
        return self.samples.read_by(self.config.criterion(range(self.decoder.num_layers)))

    def prefix_cache(self, home: list[int] | None = None) -> PrefixCache | CacheShard:
        """Of the samples that blocks train on; of a team's the rank's own, by `home` (as of `Feed`)."""
        config, cached, states = self.config, self._cached, self.original.states
        others = 0 if states is None else len(states.layers) * _tokens(self.samples.retain)

        def of(samples: list[Sample]) -> PrefixCache:
            return PrefixCache(
                self.decoder,
                samples,
                config.cache,
                self.work,
                progress=self.reporter.progress,
                dtype=config.cache_dtype,
                budget=self._share_of_budget(_tokens(cached), others),
            )

        return of(cached) if self.team.size == 1 else CacheShard(of, cached, home, self.team.rank)

    # ------------------------------------------------ trainings

    @property
    def in_parts(self) -> bool:
        """Whether what trains all parameters holds them in parts on all ranks."""
        return self.config.sharding != "none" and self.group.size > 1

    @property
    def cover_in_parts(self) -> bool:
        """Whether the layers around a block are in parts too, while all ranks train it together."""
        return self.config.sharding == "fsdp_cover" and self.group.size > 1

    @contextlib.contextmanager
    def full_training(self, original: WeightSnapshot | None = None) -> Iterator[FullTraining]:
        """original: the model's weights, kept, where it may be in parts."""
        config, decoder = self.config, self.decoder
        how = dict(criterion=config.criterion(warmup=True), settings=config.full_settings(self._order_seed(None)))
        how |= dict(execution=config.execution(self.work))
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(decoder.model))
            stack.enter_context(fused(decoder.model, config.impl))
            if self.in_parts and original is not None:
                stack.enter_context(sharded(decoder.model, decoder.layers, self.group, original))
            training = full_training(decoder, **how)
            if training.ranks.size > 1:
                stack.callback(training.updates.forget)  # before the model is whole again
            training.stage, training.lr_name = "warm-up", "warmup_lr"
            yield training

    @contextlib.contextmanager
    def block_training(
        self, visit: Visit, source: Mapping[str, torch.Tensor], trained: dict[str, torch.Tensor]
    ) -> Iterator[BlockTraining]:
        """Begins with the block's weights in `source`; at the end they are in `trained`."""
        config, block = self.config, visit.block
        criterion, settings = config.criterion(block), config.block_settings(self._order_seed(visit), self._mask(block))
        how = dict(criterion=criterion, settings=settings, execution=config.execution(self.work))
        with contextlib.ExitStack() as stack:
            if self.cover_in_parts:
                stack.enter_context(fused(self.decoder.model, config.impl))  # whose forwards FSDP is around
                around = [layer for i, layer in enumerate(self.decoder.layers) if i not in block]
                stack.enter_context(sharded(self.decoder.model, around, self.team, self._kept, trained=False))
            training = stack.enter_context(reinserted(self.decoder, ChainMap(trained, source), block, **how))
            training.lr_name = "block_lr"
            yield training

    def _mask(self, block: range) -> dict[str, torch.Tensor] | None:
        """The weights of the block that may change, by all samples and the original as it stands; None: all."""
        config = self.config
        if config.mask == "none":
            return None
        found = attribute(
            self.decoder,
            self.samples.forget,
            self.samples.retain if config.mask in COMPARING else None,
            config.mask,
            "all",
            blocks=[block],
            gradient_checkpointing=config.gradient_checkpointing or None,
            impl=config.impl,
            progress=self.reporter.progress,
            group=self.team,
        )
        return found.mask(ratio=config.mask_ratio)

    def schedule_of(self, visit: Visit | None) -> Schedule:
        """The data order of a visit; None: of the warm-up."""
        config, samples, seed = self.config, self.samples, self._order_seed(visit)
        epochs = config.warmup_epochs if visit is None else config.block_epochs
        sizes = len(samples.forget), len(samples.retain), config.batch_size, config.retain_size
        return Schedule(*sizes, epochs, seed, config.full_settings(seed).adversary, samples.facts)

    def _order_seed(self, visit: Visit | None) -> int:
        return self.config.seed * 1000 + (0 if visit is None else visit.number)

    def feed_of(
        self, training: Training, cache: PrefixCache | CacheShard | None = None, home: list[int] | None = None
    ) -> Feed:
        """From the prefix cache, or without one from the embeddings on. home: as of `Feed`."""
        packed = self._pack if cache is None else cache.batch
        team = self.team if training.ranks.size == 1 else ALONE  # all of them take the whole step
        return Feed(self.samples, training.criterion, packed, self.original, team, home)

    def _pack(self, places: list[int]) -> PackedBatch:
        return pack([self.samples.all[i] for i in places]).to(self.decoder.device)

    # ------------------------------------------------ the original, while its weights change

    @contextlib.contextmanager
    def changing_original(self) -> Iterator[WeightSnapshot | None]:
        """Inside, the model's weights may change; afterwards they are the original's, which wait in a file of the
        state. Yields it, or None: a streamed model's are in its own files."""
        if self.decoder.streamed:
            with self.decoder.weights.writable(self.work):
                yield None
            return
        original = self.keep_original()
        try:
            yield original
        finally:
            original.restore(self.decoder.model)
        self.drop_original()

    def keep_original(self) -> WeightSnapshot:
        """The model's weights, in a file until `drop_original`."""
        self._kept = self.state.keep("original", self.decoder.weights)
        return self._kept

    def drop_original(self) -> None:
        self.state.drop("original")

    # ------------------------------------------------ steps

    def train(self, stage: Stage, training: Training, feed: Feed, schedule: Schedule, took: Timer) -> dict[str, Any]:
        """Runs the steps of a stage that are not yet done, with checkpoints; returns {"epochs", "seconds"}.

        A checkpoint counts once a later step's forward pass was finite, and its retain loss within the limit."""
        first, account = self._taken_up(stage, training, schedule, took)
        if self.config.cache_bytes is not None:
            self.original.expect([feed.places(*step) for step in schedule])
        every, stop = self.config.checkpoint_every or schedule.steps_per_epoch, self.context.stop
        team = feed.team if training.ranks.size == 1 else training.ranks

        def save(done: int) -> None:
            training.check_update()
            also = {"seconds": took.seconds, "micro_batch_tokens": training.micro_batch_tokens}
            # a copy: later confirmations write it again
            self.state.save_progress(stage, done, training.state(), copy.deepcopy(account) | also, training.ranks)

        title, before = "warm-up" if stage.block is None else f"layers {layers(stage.block)}", self.steps_before(stage)
        bar = self.reporter.bar(len(schedule), title, done=first)
        with self._rejecting(stage), bar, stop.between_steps():
            for number in range(first, len(schedule)):
                with self.reporter.part("step"):
                    metrics = self._step(training, feed, schedule, number)
                if metrics["retain_loss"] is None or metrics["retain_loss"] <= self.retain_limit:
                    self.state.confirm(stage)
                self.account(training, number, (number + 1) % schedule.steps_per_epoch == 0, metrics, account)
                self.context.log.add(before + number + 1, stage, {n: metrics[n] for n in ("loss", *LOSSES)})
                bar.set_postfix_str(_shown(metrics), refresh=False)
                bar.update()
                if number + 1 < len(schedule) and (stop.agreed or (number + 1) % every == 0):
                    save(number + 1)
                    if stop.agreed:
                        raise Stopped
            if any(team.gather(stop.requested)):  # in the last step
                save(len(schedule))
                raise Stopped
            self._check_end(training, feed, schedule)
        team.check_same_bits(stage, training.same_state())
        return {"epochs": account["epochs"], "seconds": took.seconds}

    def steps_before(self, stage: Stage | None = None) -> int:
        """Steps of the whole run before those of a stage; None: of all stages that have some."""
        if stage == WARMUP:
            return 0
        first = 0 if self.given is not None else len(self.schedule_of(None))
        order = visits(self.config, [range(*block) for block in self.state.result(SELECTION)["blocks"]])
        before = order if stage is None else order[: [visit.stage for visit in order].index(stage)]
        return first + sum(len(self.schedule_of(visit)) for visit in before)

    def _taken_up(
        self, stage: Stage, training: Training, schedule: Schedule, took: Timer
    ) -> tuple[int, dict[str, Any]]:
        """(steps done, account) of the stage's checkpoint, which `training` takes up; of none: of its beginning."""
        first, account = 0, new_account()
        if (found := self.state.progress(stage)) is not None:
            first, tensors, extra = found[0], found[1], copy.deepcopy(found[2])
            done = len(extra["epochs"]), extra["sums"]["steps"] if extra["sums"] else 0
            if done != (expected := divmod(first, schedule.steps_per_epoch)):
                raise ValueError(
                    f"{plain(self.state.path)}: {plain(stage)}: extra.epochs, extra.sums: got {done[0]} and "
                    f"{done[1]} steps, expected {expected[0]} and {expected[1]}: start again in another directory"
                )
            training.load_state(tensors, first)
            # what memory allowed before: other micro-batches would have other bits
            training.micro_batch_tokens = least(extra.pop("micro_batch_tokens", None), training.micro_batch_tokens)
            took.before = extra.pop("seconds")
            account = extra
        return first, account

    @contextlib.contextmanager
    def _rejecting(self, stage: Stage) -> Iterator[None]:
        """Where the stage diverges inside, its last checkpoint goes, unless a later step has found it good."""
        try:
            yield
        except Diverged as error:
            self.state.reject(stage)
            sentence = "A resumed run begins this stage again"
            if (done := self.state.confirmed_steps(stage)) is not None:
                sentence = f"The checkpoint after {done} steps was found good: a resumed run goes on from there"
            if self.state.results(stage.group):
                sentence += ", with this learning rate, by which the blocks that are done were trained"
            error.resumable(sentence, self.locked(error))
            raise

    def locked(self, error: Diverged) -> list[str]:
        """The cures of an error that a resumed run would refuse."""
        return [name for name in error.cures if self.state.is_locked(name, self.config.stage_of(name))]

    def _check_end(self, training: Training, feed: Feed, schedule: Schedule) -> None:
        """What the last update has made."""
        batch = None
        if training.last is None and schedule:  # resumed after the last step
            step = schedule[len(schedule) - 1]
            batch = feed.part(feed.mine(*step), step)
            batch = feed.stand_in() if batch is None and isinstance(training, LockStep) else batch
        training.check(batch, feed.team)

    def _step(self, training: Training, feed: Feed, schedule: Schedule, number: int) -> dict[str, float | None]:
        """One step, by all of the feed's team."""
        whole, relearned = schedule[number], schedule.relearned(number)
        exercise = [feed.relearned(feed.mine(batch, [])[0], len(batch)) for batch in relearned]
        if feed.team.size == 1:
            metrics = training.step_packed(feed.batch(*whole), exercise)
            self.context.stop.agreed = any(training.ranks.gather(self.context.stop.requested))
            return metrics
        training.relearn(exercise, feed.team)
        step = SharedStep(training, self.context.stop)
        if (batch := feed.part(feed.mine(*whole), whole)) is not None:
            step.add(batch, training.accumulate(batch))
        elif isinstance(training, LockStep):
            training.accumulate(feed.stand_in(), idle=True)
        metrics = step.gather(feed.team)
        step.apply()
        return metrics

    def account(
        self, training: Training, step: int, ends_epoch: bool, metrics: Mapping[str, float | None], account: dict
    ) -> None:
        """Takes a step's losses into the epochs' means, and holds the retain loss against its limit. A loss that the
        objective does not measure is None throughout, and has no limit."""
        sums = account["sums"] or {**dict.fromkeys(LOSSES, 0.0), "steps": 0}
        for name in LOSSES:
            sums[name] = None if None in (sums[name], metrics[name]) else sums[name] + metrics[name]
        sums["steps"] += 1
        account["sums"] = sums
        if ends_epoch:
            account["epochs"].append(means(sums))
            account["sums"] = None
        if metrics["retain_loss"] is None:
            return
        account["recent"] = [*account["recent"][-9:], metrics["retain_loss"]]
        recent = sum(account["recent"]) / len(account["recent"])
        if len(account["recent"]) == 10 and recent > self.retain_limit:
            cause = f"the retain loss is beyond max_retain_loss = {self.retain_limit:.2f}"
            error = training.diverged(cause, metrics, step)
            error.cures["max_retain_loss"] = "raise max_retain_loss"
            raise error

    # ------------------------------------------------ what approximations make of a block's first step

    def measure_approximations(
        self, training: BlockTraining, cache: PrefixCache | CacheShard, feed: Feed, schedule: Schedule
    ) -> dict[str, Any]:
        """What a cover or a cache in low precision makes of a block's first step (rank 0's part): for the report."""
        found, step = {}, feed.mine(*schedule[0])
        if not (places := feed.places(*schedule[0])):
            return found
        if training.cover is not None:
            same = found["gradient_cosine"] = gradient_cosine(training, feed.batch(*step))
            self.reporter.say(
                f"cover in {training.cover.precision}: the block's gradient has a cosine of {same:.6f} to the exact "
                "cover's"
            )
        if not cache.is_exact:
            error = found["cache_error"] = cache_error(training, feed.batch(*step), cache.exact(places))
            if (states := self.original.states) is not None:
                error["original_states"] = states.relative_error
            self.reporter.say(
                f"prefix cache in {self.config.cache_dtype}: a relative error of {error['relative_error']:.2g}; the "
                f"block's gradient has a cosine of {error['gradient_cosine']:.6f} to the exact one"
            )
        return found


def new_account() -> dict[str, Any]:
    """Of a stage's losses: means of its epochs, sums of the present one, the last retain losses."""
    return {"epochs": [], "sums": None, "recent": []}


def means(sums: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    """Of an account's sums: the mean losses of the steps in them. None where there are none."""
    return sums and {name: None if sums[name] is None else sums[name] / sums["steps"] for name in LOSSES}


def _shown(metrics: Mapping[str, float | None]) -> str:
    """A step's losses for the progress bar: the NLLs, or the objective's own value where there are none."""
    shown = [f"{n} {metrics[f'{n}_loss']:.3f}" for n in ("forget", "retain") if metrics[f"{n}_loss"] is not None]
    return " ".join(shown) or f"loss {metrics['loss']:.4g}"


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample["input_ids"]) for sample in samples)
