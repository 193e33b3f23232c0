"""The five stages of KUnBR: warm-up, density, selection, re-insertion, proof. Resumable, one model in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from kunbr_fast.density.measure import COMPARING, Density, knowledge_density
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.folds import metric_of
from kunbr_fast.evaluation.report import Report
from kunbr_fast.evaluation.rtt import AttackDiverged, finished_attacks
from kunbr_fast.files.shown import plain
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.prefix_cache import CacheShard, PrefixCache
from kunbr_fast.model.weights import finite, weights_of
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.parallel.assign import block_cost, busiest_share, homes, spread_blocks
from kunbr_fast.parallel.group import ALONE
from kunbr_fast.run.probe import overflowing, tried
from kunbr_fast.run.proof import Proof, reported
from kunbr_fast.run.reporter import Timer
from kunbr_fast.run.steps import Run
from kunbr_fast.run.visits import (
    DENSITY,
    MERGE,
    ORIGINAL,
    ORIGINAL_HIDDEN,
    RTT,
    SELECTION,
    WARMUP,
    Stage,
    Visit,
    layers,
    visits,
)
from kunbr_fast.training.diverged import Diverged

MERGED, WARM_UP = "the merge of the trained blocks", "the end of the warm-up"  # what errors call them


class Stages(Run):
    """The stages of a run, each skipped if its result is already there."""

    def all(self) -> Report:
        self.evaluate("original")
        self.measure_original()
        # a threshold may leave no block: that is known before the hours of the warm-up
        blocks = self.select(self.density()) if self.config.rule == "threshold" else None
        self.warm_up()
        density = self.density()
        blocks = self.select(density) if blocks is None else blocks
        self.measure_original(blocks)
        trained = self.reinsert(blocks)
        self.original = OriginalValues({})  # no training reads it any more
        with self._judged():
            self.merge(trained)
            self.evaluate("result")
        return self.report(density, blocks, self.attack())

    def report(self, density: Density, blocks: list[range], rtt: RTTResult | None) -> Report:
        """Of a run whose stages are done."""
        results = self.state.results()
        seconds: dict[str, float] = {}
        for stage, result in results.items():
            if "seconds" in result:
                seconds[stage.group] = seconds.get(stage.group, 0.0) + result["seconds"]

        def each(key: str) -> dict[str, Any]:
            return {str(stage): result[key] for stage, result in results.items() if key in result}

        more = {"gradient_cosines": each("gradient_cosine"), "cache_errors": each("cache_error")}
        more |= {kind: self.figures(kind) for kind in ("accuracy", "probability")}
        more["examples"] = self._proof.shown(results, rtt, f"{plain(self.state.path)}: answers")
        return Report(self.config.to_dict(), blocks, density, seconds, each("epochs"), rtt=rtt, **more)

    # ------------------------------------------------ proof

    def evaluate(self, name: str) -> dict[str, Any]:
        """The accuracy of the model, which is the `name` one."""
        stage = Stage.evaluation(name)
        if self.state.result(stage) is None:
            with self.reporter.stage(stage) as took, self._answering(MERGED if name == "result" else None):
                found = self._measured(self.decoder, name)
            self.state.finish(stage, {**found, "seconds": took.seconds})
        return reported(self.state.result(stage), "accuracy")

    def figures(self, kind: str) -> dict[str, dict[str, Any]]:
        """Of each model that was measured by `kind`, "accuracy" or "probability", as the report has them."""
        stages = {"original": Stage.evaluation("original"), "unlearned": WARMUP, "result": Stage.evaluation("result")}
        found = {name: reported(self.state.result(stage), kind) for name, stage in stages.items()}
        return {name: value for name, value in found.items() if value}

    @functools.cached_property
    def _proof(self) -> Proof:
        return Proof(self.inputs, self.config, self.decoder)

    def _measured(self, decoder: Decoder, name: str) -> dict[str, Any]:
        """By rank 0; the others wait for the state that it writes."""
        if not self.group.first or not self._proof:
            return {"accuracy": {}}
        for line in self._proof.says(name):
            self.reporter.say(line)
        original = None if name == "original" else self.state.result(Stage.evaluation("original")) or {}
        place, bar = Place(self.config.cache, self.work), self.reporter.title("evaluation")
        return self._proof.measure(decoder, original, place, bar)

    @contextlib.contextmanager
    def _answering(self, made_by: str | None) -> Iterator[None]:
        """Inside, an answer that is not finite is `Diverged` for all ranks: of the stage that has made the model, if
        one has."""
        said = None
        try:
            yield
        except FloatingPointError as error:
            if made_by is None:
                raise
            said = str(error).partition(": its weights")[0]
        said = next((found for found in self.group.gather(said) if found is not None), None)
        if said is not None:
            raise self.overflown(made_by, said)

    def attack(self) -> RTTResult | None:
        try:
            return self._attack()
        except AttackDiverged:
            raise
        except FloatingPointError as error:
            found = self.overflown(MERGED, str(error).partition(": its weights")[0])
            found.resumable("", self.locked(found))
            raise found from error

    def _attack(self) -> RTTResult | None:
        attack, progress, rank = self.rtt, self.reporter.progress, self.group.rank
        if attack is None:
            return None
        lrs = ", ".join(f"{lr:g}" for lr in self.config.rtt_lrs)
        folds = f"{len(attack.folds)} folds" + ", by answer probability" * (metric_of(attack.folds) == "probability")
        kinds = "" if self.config.rtt_attacks == ("full",) else f" ({', '.join(self.config.rtt_attacks)})"
        with self.reporter.stage(RTT, f"RTT attack{kinds}: {folds}, learning rates {lrs}") as took:

            def keep(rows: list[dict]) -> None:
                stage = Stage.attack(rows[0]["fold"], rows[0]["lr"], rows[0]["attack"])
                self.state.finish(stage, {"rows": rows, "seconds": took.lap()})

            def done() -> list[dict]:
                rows = [row for found in self.state.results(RTT).values() for row in found["rows"]]
                finished_attacks(rows, attack.folds, attack.config, f"{plain(self.state.path)}: ")
                return rows

            if self.in_parts:
                attack.run(self.work, progress, done(), keep, ranks=self.group)
            if self.group.size > 1:  # each makes its share of the attacks, on its own copy of the weights
                rows, said = done(), None
                with self._apart():
                    try:
                        attack.run(self.work / f"rank-{rank}", progress, rows, keep, (rank, self.group.size))
                    except AttackDiverged as error:
                        said = str(error)
                if said := next((found for found in self.group.gather(said) if found is not None), None):
                    raise AttackDiverged(said)
            return attack.run(self.work, progress, done(), keep, place=Place(self.config.cache, self.work))

    # ------------------------------------------------ warm-up

    def measure_original(self, blocks: Sequence[range] | None = None) -> None:
        """What the objectives need of M0, which the model must be now: of hidden layers once the blocks are known, or
        before the warm-up where that needs them too."""
        config, needs, num_layers = self.config, {}, self.decoder.num_layers
        if blocks is None:
            criteria = [config.criterion(range(num_layers))] if config.top_k else []
            criteria = [c for c in criteria if not c.objective.states]
            if self.inputs.unlearned is None and self.state.result(WARMUP) is None:
                criteria.append(warm_up := config.criterion(warmup=True))
                if warm_up.hidden is not None:
                    self.keep_states(warm_up.hidden.chosen(num_layers))
        else:
            criteria = [c for c in map(config.criterion, blocks) if c.objective.states]
            hidden, left = config.criterion(range(num_layers)).hidden, self.left(visits(config, blocks))
            if hidden is not None and left:
                self.keep_states(hidden.chosen(num_layers, min((v.block for v in left), key=lambda block: block.start)))
        for criterion in criteria:
            for kind, parts in criterion.needs.items():
                if criterion.hidden is None or not kind.startswith("layer."):
                    needs[kind] = tuple(dict.fromkeys((*needs.get(kind, ()), *parts)))
        if needs:
            self.measure(ORIGINAL if blocks is None else ORIGINAL_HIDDEN, needs)

    def left(self, order: list[Visit]) -> list[Visit]:
        """The visits that are still to be made."""
        return [visit for visit in order if self.state.result(visit.stage) is None]

    def warm_up(self) -> None:
        """M_u's weights to warmup.safetensors; the model is M0 again afterwards."""
        given = self.given
        if (found := self.state.result(WARMUP)) is not None:
            if given not in (None, found.get("given")):
                raise ValueError(
                    f"{self.work}: the warm-up is done with another unlearned model than the one given now. Give the "
                    "same one (unlearned=) or none, or another output directory"
                )
        elif given is not None:
            self._take_given(given)
        else:
            self._warm_up()

    def _take_given(self, given: str) -> None:
        """Keeps the unlearned model that the user brings; given: its fingerprint."""
        with self.decoder.instead(self.inputs.unlearned) as decoder:
            found = self._measured(decoder, "unlearned")
        weights = weights_of(self.inputs.unlearned)
        values = None  # those of a streamed one stay where they are
        if not weights.streamed:
            self.reporter.say("keeping the unlearned model's weights")
            values = {name: weights[name].to(own.dtype) for name, own in self.decoder.model.named_parameters()}
        self.state.finish(WARMUP, {**found, "given": given}, values)

    def _warm_up(self) -> None:
        name = self.config.criterion(warmup=True).objective.name.replace("_", " ")
        says = "warm-up: " * bool(self.config.top_k) + f"{name} on all parameters, {self.config.warmup_epochs} epochs"
        with self.changing_original() as original:
            with self.reporter.stage(WARMUP, says) as took, self.full_training(original) as training:
                result = self.train(WARMUP, training, self.feed_of(training), self.schedule_of(None), took)
            del training  # what it has on the device
            with self._rejecting(WARMUP), self._answering(WARM_UP):
                result |= self._measured(self.decoder, "unlearned")
            self.state.finish(WARMUP, result, self.decoder.weights.views())

    # ------------------------------------------------ density, selection

    def density(self) -> Density:
        if (found := self.state.result(DENSITY)) is not None:
            return self._recorded(Density.from_dict(found["density"], f"{plain(self.state.path)}: density"))
        samples = f"{len(self.samples.forget)} forget samples"
        if self.config.statistic in COMPARING:
            samples += f" and {len(self.samples.retain)} retain samples"
        says = f"knowledge density of {self.decoder.num_layers} layers over {samples}"
        with self.reporter.stage(DENSITY, says) as took:
            density = knowledge_density(
                self.decoder,
                self.samples.forget,
                self.config.modules,
                self.config.statistic,
                self.config.reduction,
                retain=self.samples.retain if self.config.statistic in COMPARING else None,
                gradient_checkpointing=self.config.gradient_checkpointing or None,
                activations=self.config.cache,
                directory=self.work,
                impl=self.config.impl,
                progress=self.reporter.progress,
                group=self.group,
            )
        self.state.finish(DENSITY, {"density": density.to_dict(), "seconds": took.seconds})
        return density

    def _recorded(self, density: Density) -> Density:
        if len(density.per_layer) != self.decoder.num_layers:
            raise ValueError(
                f"{self.state.path}: a density of {len(density.per_layer)} layers, the model has "
                f"{self.decoder.num_layers}: start again in another directory"
            )
        return density

    def select(self, density: Density) -> list[range]:
        blocks = self.config.select(density)
        chosen = [[block.start, block.stop] for block in blocks]
        if (found := self.state.result(SELECTION)) is None:
            self.state.finish(SELECTION, {"blocks": chosen})
        elif found["blocks"] != chosen:
            raise ValueError(
                f"{self.state.path}: it says that blocks {found['blocks']} were selected, its density and the settings "
                f"select {chosen}: start again in another directory"
            )
        self.reporter.say("blocks: " + (", ".join(map(layers, blocks)) or "none, the warm-up's result is the model"))
        return blocks

    # ------------------------------------------------ re-insertion

    def reinsert(self, blocks: list[range]) -> dict[range, WeightSnapshot]:
        """Each block's last trained weights, on disk. In cumulative mode the model holds them too, afterwards."""
        order = visits(self.config, blocks)
        if self.group.size == 1 or not order:
            return self._visit_all(order)
        mine, together, home = self._spread(blocks, order)
        if self.context.log and len(together) < len(blocks):
            self.reporter.say("log_to: steps of blocks that other processes train are not in the log")
        if self.cover_in_parts:
            self.keep_original()
        with self._apart() if len(together) < len(blocks) else contextlib.nullcontext():
            self._visit_all([visit for visit in order if visit.index in mine])
        self._visit_all([visit for visit in order if visit.index in together], home)
        if self.cover_in_parts:
            self.drop_original()
        last = [visit for visit in order if visit.round == self.config.rounds - 1]
        return {visit.block: self.state.weights(visit.stage) for visit in last}

    def _spread(self, blocks: list[range], order: list[Visit]) -> tuple[list[int], list[int], list[int]]:
        """The blocks, by index, that this rank trains alone, and those that all train together; and for the latter the
        rank that has each sample (as of `Feed`)."""
        costs = [0.0] * len(blocks)
        steps = []
        first = len(self.samples.forget)
        for visit in order:
            if self.state.result(visit.stage) is None:
                costs[visit.index] += block_cost(visit.block, self.decoder.num_layers)
                schedule = self.schedule_of(visit)
                for number, (forget, retain) in enumerate(schedule):
                    steps += [*schedule.relearned(number), [*forget, *(first + i for i in retain)]]
        sizes = [len(sample["input_ids"]) for sample in self.samples.forget + self.samples.retain]
        home = homes(steps, sizes, self.group.size)
        read = len(home) if self.config.criterion(blocks[0]).objective.retain else first
        if self.cover_in_parts and len(set(home[:read])) < self.group.size:
            raise ValueError(
                f"sharding='fsdp_cover': {read} samples do not reach each of {self.group.size} processes: take fewer"
            )
        together = self.config.insertion == "cumulative" or self.cover_in_parts
        parallel = "samples" if together else self.config.parallel
        share = busiest_share(steps, sizes, home, self.group.size) if steps else 1.0
        alone, together = spread_blocks(costs, self.group.size, share, parallel)

        def named(indices: Sequence[int]) -> str:
            return ", ".join(layers(blocks[i]) for i in indices) or "none"

        if len(together) < len(blocks):
            ranks = "; ".join(f"{rank}: {named(part)}" for rank, part in enumerate(alone))
            self.reporter.say(f"layers by rank: {ranks}")
        if together:
            self.reporter.say(f"layers that all ranks train together: {named(together)}")
        return alone[self.group.rank], together, home

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, this rank works for itself."""
        whole = self.state
        with whole.apart(self.group.rank) as self.state:
            self.team = ALONE
            try:
                yield
            finally:
                self.state, self.team = whole, self.group

    def _visit_all(self, order: list[Visit], home: list[int] | None = None) -> dict[range, WeightSnapshot]:
        """Makes the visits that are not yet made. home: as of `Feed`, where all of the team make them together."""
        trained: dict[range, WeightSnapshot] = {}
        unlearned = self._unlearned()
        cache: PrefixCache | CacheShard | None = None
        for visit in order:
            block, stage = visit.block, visit.stage
            resumed = self.state.result(stage) is not None
            if resumed and self.state.result(visit.in_round(visit.round + 1).stage) is not None:
                continue  # no file is left of this round
            if not resumed:
                rounds = f"round {visit.round + 1} of {self.config.rounds}"
                with self.reporter.stage(stage, f"re-insertion of layers {layers(block)}, {rounds}") as took:
                    with self.reporter.part("prefix cache"):
                        if cache is None:
                            cache = self.prefix_cache(home)
                        cache.advance(block.start)
                    self._train_block(visit, trained.get(block, unlearned), cache, home, took)
            trained[block] = self.state.weights(stage)
            if visit.round > 0:
                self.state.drop_file(visit.in_round(visit.round - 1).stage)
            if self.config.insertion == "cumulative":
                self.decoder.place(trained[block])
        return trained

    def _unlearned(self) -> Mapping[str, torch.Tensor]:
        """M_u's weights on disk."""
        if "file" in self.state.result(WARMUP):
            return self.state.weights(WARMUP)
        return weights_of(self.inputs.unlearned)

    def _train_block(
        self,
        visit: Visit,
        source: Mapping[str, torch.Tensor],
        cache: PrefixCache | CacheShard,
        home: list[int] | None,
        took: Timer,
    ) -> None:
        schedule, trained = self.schedule_of(visit), {}
        with self.block_training(visit, source, trained) as training:
            feed = self.feed_of(training, cache, home)
            measured = self.measure_approximations(training, cache, feed, schedule)
            if self.config.cache_bytes is not None:
                cache.expect(feed.reads(schedule))
            result = self.train(visit.stage, training, feed, schedule, took) | measured
        self.state.finish(visit.stage, result, trained)

    def merge(self, trained: Mapping[range, Mapping[str, torch.Tensor]]) -> None:
        """The model becomes M_u with the trained blocks."""
        text = "merging the trained blocks into the unlearned model" if trained else "looking at the result"
        with self.reporter.stage(MERGE, text):
            for weights in (self._unlearned(), *trained.values()):
                self.decoder.place(weights)
        self.check_result(trained)
        self._check_forward()

    def check_result(self, trained: Mapping[range, Mapping[str, torch.Tensor]] = MappingProxyType({})) -> None:
        """`Diverged` where the model, or of a streamed one what was trained, is not finite: it is not to be saved."""
        parts = trained.values() if self.decoder.streamed else [dict(self.decoder.model.named_parameters())]
        for weights in parts:
            for name in weights:
                if not finite(weights[name]):
                    raise self.overflown(MERGED, f"{name} is not finite")

    def _check_forward(self) -> None:
        """`Diverged` where the result, each of whose blocks was finite inside the original, is not in use."""
        config, samples = self.config, self.samples
        blocks = config.top_k if config.rule == "top_k" else len(self.state.result(SELECTION)["blocks"])
        epochs = config.warmup_epochs + config.rounds * blocks * config.block_epochs
        named = tried({"forget": samples.forget, "retain": samples.retain}, epochs * len(samples.forget))
        found = overflowing(self.decoder, named, Place(self.config.cache, self.work))
        found = next((what for what in self.group.gather(found) if what is not None), None)
        if found is not None:
            raise self.overflown(MERGED, f"{found} are not finite, though every block was in the original model")

    def overflown(self, made_by: str, cause: str) -> Diverged:
        """The error of a model that is not finite though the steps that made it were."""
        rates = ("block_lr", "warmup_lr") if made_by == MERGED else ("warmup_lr",)
        cures = {name: f"lower {name} ({getattr(self.config, name):g})" for name in rates}
        if self.inputs.unlearned is not None:
            cures.pop("warmup_lr")
            cures["unlearned"] = "take an unlearned model that is nearer to the original"
        if self.decoder.dtype == torch.float16:
            cures["dtype"] = "load the model in bfloat16 or float32"
        return Diverged(made_by, {}, cause, cures)

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Inside, a result that is not finite takes the blocks' results with it: others are to be trained."""
        try:
            yield
        except Diverged as error:
            self.state.forget(("blocks", MERGE, RTT, Stage.evaluation("result")))
            error.resumable("A resumed run trains the blocks again", self.locked(error))
            raise
