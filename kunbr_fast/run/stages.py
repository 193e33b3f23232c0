"""The five stages of KUnBR: warm-up, density, selection, re-insertion, proof. Resumable, one model in memory.

`Stages` has them and checks beforehand what they will meet; what they train with is in `run`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import PackedBatch, Sample, check_labels, check_lengths, encode, pack, with_alternates
from kunbr_fast.density.measure import Density, knowledge_density
from kunbr_fast.density.select import select_blocks
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.report import Report
from kunbr_fast.evaluation.rtt import RTTConfig, RTTResult, prepare_attack, rtt_attack
from kunbr_fast.files.models import check_same_architecture, check_vocabulary
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.finite import check_finite
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.layer_stream import layer_stream
from kunbr_fast.model.low_precision import check_cover
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import CacheShard, PrefixCache
from kunbr_fast.parallel.assign import block_cost, busiest_share, homes, spread_blocks
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.state import RunState, SharedState, fingerprint
from kunbr_fast.run.steps import Run
from kunbr_fast.training.graphs import check_cuda_graphs


def to_samples(
    data: Sequence[Mapping],
    tokenizer: Any,
    config: KUnBRConfig,
    decoder: Decoder,
    what: str,
    alternate: str | None = None,
) -> list[Sample]:
    """Records (tokenised once), samples or padded batches to samples that the model can take. alternate: the kind of
    second answer that each must bring, as in `encode`; of samples and batches it is what they hold."""
    if not data:
        raise ValueError(f"the {what} set is empty: expected at least one record")
    limit = min((n for n in (config.max_length, decoder.max_positions) if n is not None), default=None)
    if "input_ids" in data[0] or "original" in data[0]:
        samples, others = with_alternates(data)
        names = [f"{what} sample {i}" for i in range(len(samples))]
        check_lengths(samples, limit, names)
        check_labels(samples, names)
        if alternate is not None:
            if others is None:
                raise ValueError(
                    f"the {what} set has no alternates, which {config.objective} needs ({alternate}): give records, or samples "
                    'with a second sample under "alternate"'
                )
            names = [f"the alternate of {name}" for name in names]
            check_lengths(others, limit, names)
            check_labels(others, names)
            samples = [{**sample, "alternate": other} for sample, other in zip(samples, others)]
    elif tokenizer is None:
        raise ValueError(f"the {what} set holds records, not tokens: give tokenizer=")
    else:
        samples = encode(data, tokenizer, config.target, limit, alternate, config.seed)
    ids = [sample["input_ids"] for sample in samples]
    if alternate is not None:
        ids += [sample["alternate"]["input_ids"] for sample in samples]
    check_vocabulary(decoder.model, ids, f"the {what} set")
    return samples


def _is_streamed(model: Any) -> bool:
    return isinstance(model, nn.Module) and layer_stream(model) is not None


def _check_streamed(model: nn.Module, unlearned: Any, config: KUnBRConfig, group: Group) -> None:
    """ValueError for what cannot be done with a streamed model."""
    if unlearned is None:
        raise ValueError(
            "the warm-up trains every parameter, and of a streamed model they are never in memory together: give an "
            "unlearned model made elsewhere, by any method (unlearned=, --unlearned DIR)"
        )
    if not _is_streamed(unlearned) or unlearned is model:
        raise ValueError("the original is streamed: open the unlearned model with open_streamed too, as another one")
    if group.size > 1:
        raise ValueError("a streamed model is for one process: run it without torchrun")
    if config.cuda_graphs:
        raise ValueError("cuda_graphs=True: a streamed model's layers have no place of their own: leave it out")


class Stages(Run):
    """The stages of a run, each skipped if its result is already there.

    open_state: makes the `RunState`, from its arguments. group: the processes that share the run."""

    def __init__(
        self, model, forget, retain, config, tokenizer, unlearned, questions, folds, work, resume, progress, on_stage,
        open_state=None, group=ALONE,
    ):  # fmt: skip
        self.tokenizer, self.given, self.questions, self.folds = tokenizer, unlearned, questions, folds
        self.stream = layer_stream(model)
        if self.stream is not None:
            _check_streamed(model, unlearned, config, group)
        elif _is_streamed(unlearned):
            raise ValueError("the unlearned model is streamed and the original is not: open both with open_streamed")
        decoder = Decoder(model)
        # Bad settings and bad input fail now, not hours later at the stage that meets them.
        for operation in ("grad_density", "linear_loss", config.warmup_optimizer, config.optimizer):
            resolve(operation, config.impl, decoder.device)
        check_cuda_graphs(config.cuda_graphs, decoder.device)
        blocks = selectable_blocks(decoder.num_layers, config.num_blocks, config.top_k, config.skip_last_layers)
        for block in blocks:
            check_cover(decoder, block, config.cover_precision)
        criteria = [config.criterion(block) for block in blocks]
        for block, criterion in zip(blocks, criteria):
            criterion.check_layer(decoder.num_layers, block)
        if unlearned is None:
            criteria.append(config.criterion(warmup=True))
            criteria[-1].check_layer(decoder.num_layers)
        alternate = next((c.alternate for c in criteria if c.alternate is not None), None)
        forget = to_samples(forget, tokenizer, config, decoder, "forget", alternate)
        retain = to_samples(retain, tokenizer, config, decoder, "retain")
        alternates = [sample["alternate"] for sample in forget] if alternate is not None else []
        check_finite(model)
        if tokenizer is None and (folds or any(questions.values())):
            raise ValueError("questions and folds hold text: give tokenizer=")
        if config.rtt and folds and self.stream is None:
            prepare_attack(decoder, tokenizer, folds, rtt_config(config))
        if isinstance(unlearned, nn.Module):
            check_same_architecture(model, unlearned, "unlearned")
            check_finite(unlearned, "the unlearned model's ")
            if self.stream is not None:
                layer_stream(unlearned).check("the unlearned model's ")
        asked = [*questions.values(), *(part for fold in folds for part in (fold.train_records, fold.questions))]
        if alternates:
            asked.append(alternates)
        identity = fingerprint(model, forget, retain, *asked)
        given = (
            None if unlearned is None else fingerprint(unlearned) if isinstance(unlearned, nn.Module) else "a mapping"
        )
        started = {"the model or the data": identity, "the unlearned model": given, "resume": resume}
        group.check_same(started | config.to_dict())
        if open_state is None:
            open_state = RunState if group.size == 1 else functools.partial(SharedState, group.first, group.wait)
        state = open_state(work, identity, config, resume)
        super().__init__(decoder, config, forget, retain, alternates, state, work, group, progress, on_stage)

    def all(self) -> Report:
        if self.stream is not None and self.config.rtt and self.folds:
            self.on_stage(
                "no RTT attack: it trains every parameter, and of a streamed model they are never in memory together. "
                "`kunbr-fast rtt` attacks the result on a machine that holds it"
            )
        accuracy = {"original": self.evaluate("original")}
        self.measure_reference()
        self.warm_up()
        if self.questions["forget"] or self.questions["retain"]:
            accuracy["unlearned"] = self.state.result("warmup")["accuracy"]
        density = self.density()
        blocks = self.select(density)
        self.measure_reference(blocks)
        trained = self.reinsert(blocks)
        self.merge(trained)
        accuracy["result"] = self.evaluate("result")
        rtt = self.attack()
        seconds: dict[str, float] = {}
        losses: dict[str, list[dict[str, float]]] = {}
        cosines: dict[str, float] = {}
        cache_errors: dict[str, dict[str, float]] = {}
        for name, result in self.state.state["stages"].items():
            if "seconds" in result:
                group = name.split(".")[0]
                seconds[group] = seconds.get(group, 0.0) + result["seconds"]
            if "epochs" in result:
                losses[name] = result["epochs"]
            if "gradient_cosine" in result:
                cosines[name] = result["gradient_cosine"]
            if "cache_error" in result:
                cache_errors[name] = result["cache_error"]
        accuracy = {name: value for name, value in accuracy.items() if value}
        return Report(self.config.to_dict(), blocks, density, seconds, losses, accuracy, rtt, cosines, cache_errors)

    # ------------------------------------------------ stages

    def evaluate(self, name: str) -> dict[str, Any]:
        stage = f"evaluation.{name}"
        if (found := self.state.result(stage)) is not None:
            return found["accuracy"]
        start = time.perf_counter()
        accuracy = self._accuracy(name)
        self.state.finish(stage, {"accuracy": accuracy, "seconds": time.perf_counter() - start})
        return self.state.result(stage)["accuracy"]

    def _accuracy(self, name: str) -> dict[str, Any]:
        """Measured by one process; the others wait for the state that it writes."""
        out = {}
        if not self.group.first:
            return out
        for what, questions in self.questions.items():
            if questions:
                self.on_stage(f"accuracy of the {name} model on {len(questions)} {what} questions")
                found = choice_accuracy(
                    self.decoder,
                    self.tokenizer,
                    questions,
                    scoring=self.config.scoring,
                    progress=f"{what} accuracy" if self.progress else None,
                )
                out[what] = {"plain": found.plain, "calibrated": found.calibrated, "num_questions": found.num_questions}
        return out

    def measure_reference(self, blocks: Sequence[range] | None = None) -> None:
        """What the objectives need of M0, which the model must be now: of hidden layers once the blocks are known."""
        config, needs = self.config, {}
        if blocks is None:
            criteria = [config.criterion(range(self.decoder.num_layers))]
            criteria = [c for c in criteria if not c.objective.states]
            if self.given is None and self.state.result("warmup") is None:
                criteria.append(config.criterion(warmup=True))
        else:
            criteria = [c for c in map(config.criterion, blocks) if c.objective.states]
        for criterion in criteria:
            for kind, parts in criterion.needs.items():
                needs[kind] = tuple(dict.fromkeys((*needs.get(kind, ()), *parts)))
        if needs:
            self._measure("reference" if blocks is None else "reference.blocks", needs)

    def warm_up(self) -> None:
        """M_u's weights to work/warmup.safetensors; the model is M0 again afterwards."""
        given = None if self.given is None else fingerprint(self.given)
        if (found := self.state.result("warmup")) is not None:
            if given not in (None, found.get("given")):
                raise ValueError(
                    f"{self.work}: the warm-up is done with another unlearned model than the one given now. Give the same "
                    "one (--unlearned) or none, or another output directory"
                )
            return
        config, model = self.config, self.decoder.model
        if self.stream is not None:
            with self.stream.instead(layer_stream(self.given)):
                accuracy = self._accuracy("unlearned")
            self.state.finish("warmup", {"accuracy": accuracy, "given": given})  # its weights stay where they are
            return
        if given is not None:
            self.on_stage("keeping the unlearned model's weights")
            accuracy = self._accuracy_of(self.given)
            own = dict(model.named_parameters())
            values = {name: value.to(own[name].dtype) for name, value in self.given.named_parameters()}
            self.state.finish("warmup", {"accuracy": accuracy, "given": given}, values)
            self.given = None
            return
        original = self.work / "original.safetensors"
        if self.group.first:
            WeightSnapshot.save(model, original)
        self.group.wait()
        original = WeightSnapshot(original)
        name = config.criterion(warmup=True).objective.name.replace("_", " ")
        self.on_stage(f"warm-up: {name} on all parameters, {config.warmup_epochs} epochs")
        schedule = self._schedule(config.warmup_epochs, 0)
        try:
            with frozen(model), fused(model, config.impl):
                training = self.full_training()

                def packed(indices: list[int]) -> PackedBatch:
                    return pack([self.samples[i] for i in indices]).to(self.decoder.device)

                result = self._train("warmup", training, packed, schedule)
            result["accuracy"] = self._accuracy("unlearned")
            self.state.finish("warmup", result, dict(model.named_parameters()))
        finally:
            original.restore(model)
        self.group.wait()
        if self.group.first:
            original.path.unlink()

    def _accuracy_of(self, other: nn.Module) -> dict[str, Any]:
        ours, self.decoder = self.decoder, Decoder(other)
        try:
            with frozen(other):
                return self._accuracy("unlearned")
        finally:
            self.decoder = ours

    def density(self) -> Density:
        if (found := self.state.result("density")) is not None:
            return Density.from_dict(found["density"])
        self.on_stage(f"knowledge density of {self.decoder.num_layers} layers over {len(self.forget)} forget samples")
        start = time.perf_counter()
        density = knowledge_density(
            self.decoder,
            self.forget,
            self.config.modules,
            reduction=self.config.reduction,
            gradient_checkpointing=self.config.gradient_checkpointing or None,
            activations=self.config.activations,
            directory=self.work,
            impl=self.config.impl,
            progress=self.progress,
            group=self.group,
        )
        self.state.finish("density", {"density": density.to_dict(), "seconds": time.perf_counter() - start})
        return density

    def select(self, density: Density) -> list[range]:
        config = self.config
        blocks = select_blocks(density, config.num_blocks, config.top_k, config.skip_last_layers)
        if self.state.result("selection") is None:
            self.state.finish("selection", {"blocks": [[b.start, b.stop] for b in blocks]})
        self.on_stage("blocks: " + ", ".join(f"{b.start}-{b.stop - 1}" for b in blocks))
        return blocks

    def reinsert(self, blocks: list[range]) -> dict[range, WeightSnapshot]:
        """Each block's last trained weights, on disk. In cumulative mode the model holds them too, afterwards."""
        visits = [(round_, index) for round_ in range(self.config.rounds) for index in range(len(blocks))]
        if self.config.insertion == "independent":
            # which block comes when is no matter, so a block's rounds follow each other: the prefix cache is rolled forward once
            visits.sort(key=lambda visit: visit[1])
        if self.group.size == 1:
            return self._visit_all(blocks, visits)
        mine, together, home = self._spread(blocks, visits)
        with self._apart() if len(together) < len(blocks) else contextlib.nullcontext():
            self._visit_all(blocks, [visit for visit in visits if visit[1] in mine])
        self._visit_all(blocks, [visit for visit in visits if visit[1] in together], home)
        last = [self._stage(self.config.rounds - 1, block) for block in blocks]
        return {block: WeightSnapshot(self.state.file(stage)) for block, stage in zip(blocks, last)}

    @staticmethod
    def _stage(round_: int, block: range) -> str:
        return f"blocks.{round_}.{block.start}-{block.stop}"

    def _spread(self, blocks: list[range], visits: list[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
        """Of the blocks those that this process trains alone, and those that all train together, by index; and for each
        of `cached` the process that has it in the latter."""
        left = [visit for visit in visits if self.state.result(self._stage(visit[0], blocks[visit[1]])) is None]
        costs = [0.0] * len(blocks)
        steps = []
        for round_, index in left:
            costs[index] += block_cost(blocks[index], self.decoder.num_layers)
            schedule = self._schedule(self.config.block_epochs, self._number(round_, index, len(blocks)))
            first = len(self.forget)
            steps += [
                [*forget, *(first + i for i in retain)]
                for forget, retain in map(schedule.__getitem__, range(len(schedule)))
            ]
        sizes = [len(sample["input_ids"]) for sample in self.forget + self.retain]
        home = homes(steps, sizes, self.group.size)
        parallel = "samples" if self.config.insertion == "cumulative" else self.config.parallel
        share = busiest_share(steps, sizes, home, self.group.size) if steps else 1.0
        alone, together = spread_blocks(costs, self.group.size, share, parallel)

        def named(indices: Sequence[int]) -> str:
            return ", ".join(f"{blocks[i].start}-{blocks[i].stop - 1}" for i in indices) or "none"

        if len(together) < len(blocks):
            self.on_stage("layers by rank: " + "; ".join(f"{rank}: {named(part)}" for rank, part in enumerate(alone)))
        if together:
            self.on_stage(f"layers that all ranks train together: {named(together)}")
        return alone[self.group.rank], together, home

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, this process works for itself."""
        whole = self.state
        with whole.apart(self.group.rank) as self.state:
            self.team = ALONE
            try:
                yield
            finally:
                self.state, self.team = whole, self.group

    @staticmethod
    def _number(round_: int, index: int, num_blocks: int) -> int:
        """Of a visit's data order."""
        return 1 + round_ * num_blocks + index

    def _visit_all(
        self, blocks: list[range], visits: list[tuple[int, int]], home: list[int] | None = None
    ) -> dict[range, WeightSnapshot]:
        """Trains blocks, in the order of `visits` (round, index of the block), where that is not done yet. home: as
        `distributed.homes`, of the forget and retain samples, where `team` does it together."""
        config = self.config
        trained: dict[range, WeightSnapshot] = {}
        if not visits:
            return trained
        unlearned = self._unlearned()
        cache: PrefixCache | CacheShard | None = None
        for round_, index in visits:
            block = blocks[index]
            stage = self._stage(round_, block)
            resumed = self.state.result(stage) is not None
            if resumed and self.state.result(self._stage(round_ + 1, block)) is not None:
                continue  # no file is left of this round
            if not resumed:
                self.on_stage(
                    f"re-insertion of layers {block.start}-{block.stop - 1}, round {round_ + 1} of {config.rounds}"
                )
                start = time.perf_counter()
                if cache is None:
                    cache = self._cache(home)
                cache.advance(block.start)
                source = trained.get(block, unlearned)
                self._train_block(stage, block, source, cache, self._number(round_, index, len(blocks)), start, home)
            trained[block] = WeightSnapshot(self.state.file(stage))
            if round_ > 0:
                self.state.drop_file(self._stage(round_ - 1, block))
            # a streamed model has kept in main memory what it reads from the file from now on
            if config.insertion == "cumulative" and (resumed or self.stream is not None):
                self._place(trained[block])
        return trained

    def _unlearned(self) -> Mapping[str, torch.Tensor]:
        """M_u's weights on disk."""
        if self.stream is not None:
            return layer_stream(self.given)
        return WeightSnapshot(self.state.file("warmup"))  # its checksum reads the whole model

    def _train_block(
        self,
        stage: str,
        block: range,
        source: Mapping[str, torch.Tensor],
        cache: PrefixCache | CacheShard,
        number: int,
        start: float,
        home: list[int] | None = None,
    ) -> None:
        config = self.config
        values = _Values(source)
        with self.block_training(values, block) as training:
            schedule = self._schedule(config.block_epochs, number)
            measured = self._gradient_cosine(training, cache.batch, schedule, home)
            measured |= self._cache_error(training, cache, schedule, home)
            if config.cache_bytes is not None:
                steps = (self._mine(*schedule[number], home) for number in range(len(schedule)))
                cache.expect([self.members(training.criterion, *mine) for mine in steps])
            result = self._train(stage, training, cache.batch, schedule, start, home) | measured
        self.state.finish(stage, result, values.trained)

    @torch.no_grad()
    def _place(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self.stream is not None:
            self.stream.replace(weights)
            return
        parameters = dict(self.decoder.model.named_parameters())
        for name in weights:
            parameters[name].copy_(weights[name])

    def merge(self, trained: dict[range, WeightSnapshot]) -> None:
        """The model becomes M_u with the trained blocks."""
        self.on_stage("merging the trained blocks into the unlearned model")
        if self.stream is not None:
            self._place(self._unlearned())
        else:
            WeightSnapshot(self.state.file("warmup")).restore(self.decoder.model)
        for weights in trained.values():
            self._place(weights)

    def attack(self) -> RTTResult | None:
        config, folds = self.config, self.folds
        if not config.rtt or not folds or self.stream is not None:
            return None
        self.on_stage(f"RTT attack: {len(folds)} folds, learning rates {', '.join(f'{lr:g}' for lr in config.rtt_lrs)}")
        start = time.perf_counter()

        def keep(rows: list[dict]) -> None:
            nonlocal start
            now = time.perf_counter()
            stage = f"rtt.{rows[0]['fold']}.{rows[0]['lr']:g}"
            self.state.finish(stage, {"rows": rows, "seconds": now - start})
            start = now

        def done() -> list[dict]:
            stages = self.state.state["stages"].items()
            return [row for name, found in stages if name.split(".")[0] == "rtt" for row in found["rows"]]

        attack, rank = (self.decoder, self.tokenizer, folds, rtt_config(config)), self.group.rank
        if self.group.size > 1:  # each makes its share of the attacks, on a copy of the weights of its own
            rows = done()
            with self._apart():
                rtt_attack(*attack, self.work / f"rank-{rank}", self.progress, rows, keep, (rank, self.group.size))
        return rtt_attack(*attack, self.work, self.progress, done(), keep)


class _Values(dict):
    """M_u's weights from disk, read when asked for; what is written back is kept in `trained`."""

    def __init__(self, source: Mapping[str, torch.Tensor]):
        super().__init__()
        self.source, self.trained = source, {}

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.trained[name] = value


def rtt_config(config: KUnBRConfig) -> RTTConfig:
    return RTTConfig(
        lrs=config.rtt_lrs,
        epochs=config.rtt_epochs,
        batch_size=config.rtt_batch_size,
        target=config.rtt_target,
        scoring=config.scoring,
        seed=config.seed,
    )
