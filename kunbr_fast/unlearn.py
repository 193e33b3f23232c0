"""The five stages of KUnBR: warm-up, density, selection, re-insertion, proof. Resumable, one model in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.attribution import COMPARING, attribute
from kunbr_fast.blocks import select_blocks, selectable_blocks
from kunbr_fast.checkpoint import RunState, fingerprint
from kunbr_fast.config import KUnBRConfig
from kunbr_fast.data import PackedBatch, Sample, check_labels, check_lengths, encode, is_question, pack, with_alternates
from kunbr_fast.decoder import Decoder, check_finite
from kunbr_fast.density import Density, knowledge_density
from kunbr_fast.dispatch import resolve
from kunbr_fast.distributed import (
    ALONE,
    Group,
    SharedState,
    SharedStep,
    block_cost,
    busiest_share,
    homes,
    spread_blocks,
)
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.report import Report
from kunbr_fast.evaluation.rtt import Fold, RTTConfig, RTTResult, prepare_attack, rtt_attack
from kunbr_fast.loading import check_same_architecture, check_vocabulary
from kunbr_fast.memory import parse_bytes
from kunbr_fast.objectives import Criterion, Needs, Reference
from kunbr_fast.patch import fused
from kunbr_fast.prefix_cache import PrefixCache
from kunbr_fast.quantized import check_cover, cosine, gradient_cosine
from kunbr_fast.reinsertion import BlockTraining, check_cuda_graphs, reinserted
from kunbr_fast.schedule import Schedule
from kunbr_fast.streaming import layer_stream
from kunbr_fast.training import Diverged, FullTraining, frozen
from kunbr_fast.weights import WeightSnapshot, load_tensors


def unlearn(
    model: nn.Module,
    forget: Sequence[Mapping],
    retain: Sequence[Mapping],
    config: KUnBRConfig | None = None,
    *,
    tokenizer: Any = None,
    unlearned: nn.Module | None = None,
    forget_questions: Sequence[Mapping] | None = None,
    retain_questions: Sequence[Mapping] | None = None,
    folds: Sequence[Fold] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_stage: Callable[[str], None] | None = None,
    before_cleanup: Callable[[Report], None] | None = None,
    group: Group = ALONE,
) -> Report:
    """Makes `model` forget, in place: warm-up, density, selection, re-insertion, merge, and the measured proof.

    forget, retain: records (see kunbr_fast.data; they need `tokenizer`), samples, or padded Hugging Face batches. Where
    config.objective needs a second answer to each forget prompt, it is encoded from the record as the objective says;
    samples and batches bring it under "alternate".
    unlearned: an M_u of the same architecture made by any method; then there is no warm-up (its weights are copied to
    disk first, and it is not changed).
    forget_questions, retain_questions: question records to measure accuracy on (default: those among forget and
    retain). folds: what the RTT attack uses; without them, or with config.rtt false, there is no attack.
    output_dir: where `work/` keeps checkpoints (a temporary directory if None); removed at the end of a whole run.
    on_stage(text): told what begins. before_cleanup(report): called when all is done and `work/` still there, the
    place to save the model, so that a failing save (full disk) can be resumed too.
    resume: go on where a run with the same model, data and settings was interrupted: same bits as without.
    group: the processes that do this together (`distributed.joined`), each calling with the same arguments; then
    output_dir is needed, which all must see. Rank 0 alone reports, calls back and cleans up; all return the report, and
    hold the result.

    model may be streamed (`streaming.open_streamed`), with an `unlearned` that is too. Neither is ever in memory whole, M_u
    is not copied, there is no attack (it trains all parameters), and the result is written to output_dir, from where the
    model is read afterwards. Weights and report are, in fp64 and fp32 bit for bit, those of the model in memory.

    Returns the `Report`. One model is in memory: M0 waits on disk during the warm-up, M_u during re-insertion.
    Settings and data are checked before anything is computed: ValueError, or `dispatch.Unavailable` for config.impl. On
    an exception the model holds whatever the stage had reached; `Diverged` leaves the last good state in `work/`.
    """
    config = config or KUnBRConfig()
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        if output_dir is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kunbr-")))
        else:
            work = Path(output_dir) / "work"
            work.mkdir(parents=True, exist_ok=True)
        stream = layer_stream(model)
        if stream is not None:
            if output_dir is None:
                raise ValueError(
                    "a streamed model's result is never in memory whole: give output_dir=, where it is written"
                )
            for source in (stream, None if unlearned is None else layer_stream(unlearned)):
                if source is not None:
                    source.check_target(output_dir)
        if output_dir is None and group.size > 1:
            raise ValueError("several processes need an output_dir that all of them see")
        questions = {"forget": _questions(forget_questions, forget), "retain": _questions(retain_questions, retain)}
        run = Run(
            model, forget, retain, config, tokenizer, unlearned, questions, folds or [], work, resume, progress, on_stage,
            group=group,
        )  # fmt: skip
        report = run.all()
        if stream is not None:
            run.on_stage(f"writing the model to {output_dir}")
            stream.save(output_dir)
            stream.moved(output_dir)
        if before_cleanup is not None and group.first:
            before_cleanup(report)
    group.wait()
    if output_dir is not None and group.first:
        shutil.rmtree(work)
    return report


def _questions(given: Sequence[Mapping] | None, records: Sequence[Mapping]) -> list[Mapping]:
    return list(given) if given is not None else [r for r in records if isinstance(r, Mapping) and is_question(r)]


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


class Run:
    """One run: every method is a stage, skipped if its result is already there.

    open_state: makes the `RunState`, from its arguments. group: the processes that share the run."""

    def __init__(
        self, model, forget, retain, config, tokenizer, unlearned, questions, folds, work, resume, progress, on_stage,
        open_state=None, group=ALONE,
    ):  # fmt: skip
        self.group, self.team = group, group  # all processes, and those that this one works with now
        self.config, self.tokenizer, self.work, self.progress = config, tokenizer, work, progress and group.first
        self.given, self.questions, self.folds = unlearned, questions, folds
        self.on_stage = on_stage if on_stage and group.first else lambda text: None
        self.stream = layer_stream(model)
        self._check_streamed(model, unlearned)
        self.decoder = Decoder(model)
        # Bad settings and bad input fail now, not hours later at the stage that meets them.
        for operation in ("grad_density", "linear_loss", config.warmup_optimizer, config.optimizer):
            resolve(operation, config.impl, self.decoder.device)
        check_cuda_graphs(config.cuda_graphs, self.decoder.device)
        blocks = selectable_blocks(self.decoder.num_layers, config.num_blocks, config.top_k, config.skip_last_layers)
        for block in blocks:
            check_cover(self.decoder, block, config.cover_precision)
        criteria = [config.criterion(block) for block in blocks]
        for block, criterion in zip(blocks, criteria):
            criterion.check_layer(self.decoder.num_layers, block)
        if unlearned is None:
            criteria.append(config.criterion(warmup=True))
            criteria[-1].check_layer(self.decoder.num_layers)
        alternate = next((c.alternate for c in criteria if c.alternate is not None), None)
        self.forget = to_samples(forget, tokenizer, config, self.decoder, "forget", alternate)
        self.retain = to_samples(retain, tokenizer, config, self.decoder, "retain")
        self.alternates = [sample["alternate"] for sample in self.forget] if alternate is not None else []
        self.samples = self.forget + self.retain + self.alternates  # `members` and the reference count in it
        self.reference = Reference({})
        check_finite(model)
        if tokenizer is None and (folds or any(questions.values())):
            raise ValueError("questions and folds hold text: give tokenizer=")
        if config.rtt and folds and self.stream is None:
            prepare_attack(self.decoder, tokenizer, folds, rtt_config(config))
        if isinstance(unlearned, nn.Module):
            check_same_architecture(model, unlearned, "unlearned")
            check_finite(unlearned, "the unlearned model's ")
            if self.stream is not None:
                layer_stream(unlearned).check("the unlearned model's ")
        asked = [*questions.values(), *(part for fold in folds for part in (fold.train_records, fold.questions))]
        if self.alternates:
            asked.append(self.alternates)
        identity = fingerprint(model, self.forget, self.retain, *asked)
        given = (
            None if unlearned is None else fingerprint(unlearned) if isinstance(unlearned, nn.Module) else "a mapping"
        )
        started = {"the model or the data": identity, "the unlearned model": given, "resume": resume}
        group.check_same(started | config.to_dict())
        if open_state is None:
            open_state = RunState if group.size == 1 else functools.partial(SharedState, group.first, group.wait)
        self.state = open_state(work, identity, config, resume)
        self.retain_limit = config.max_retain_loss or 2 * math.log(self.decoder.config.vocab_size)

    def _check_streamed(self, model: nn.Module, unlearned: Any) -> None:
        """ValueError for what cannot be done with a streamed model."""
        given = isinstance(unlearned, nn.Module) and layer_stream(unlearned) is not None
        if self.stream is None and given:
            raise ValueError("the unlearned model is streamed and the original is not: open both with open_streamed")
        if self.stream is None:
            return
        if unlearned is None:
            raise ValueError(
                "the warm-up trains every parameter, and of a streamed model they are never in memory together: give an "
                "unlearned model made elsewhere, by any method (unlearned=, --unlearned DIR)"
            )
        if not given or unlearned is model:
            raise ValueError(
                "the original is streamed: open the unlearned model with open_streamed too, as another one"
            )
        if self.group.size > 1:
            raise ValueError("a streamed model is for one process: run it without torchrun")
        if self.config.cuda_graphs:
            raise ValueError("cuda_graphs=True: a streamed model's layers have no place of their own: leave it out")

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
        if self.group.size == 1:
            return self._visit_all(blocks, visits)
        mine, together, home = self._spread(blocks, visits)
        with self._apart() if len(together) < len(blocks) else contextlib.nullcontext():
            # a block's rounds one after the other: the prefix cache is rolled forward once
            self._visit_all(blocks, [visit for index in mine for visit in visits if visit[1] == index])
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
        cache: PrefixCache | _Shard | None = None
        for round_, index in visits:
            block = blocks[index]
            stage = self._stage(round_, block)
            resumed = self.state.result(stage) is not None
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
            # a streamed model has kept in main memory what it reads from the file from now on
            if config.insertion == "cumulative" and (resumed or self.stream is not None):
                self._place(trained[block])
        return trained

    def _unlearned(self) -> Mapping[str, torch.Tensor]:
        """M_u's weights on disk."""
        if self.stream is not None:
            return layer_stream(self.given)
        return WeightSnapshot(self.state.file("warmup"))  # its checksum reads the whole model

    def _cache(self, home: list[int] | None) -> PrefixCache | _Shard:
        """Of `cached`, or of those that this process has in steps that all share."""

        of = self.prefix_cache
        return of(self.cached()) if self.team.size == 1 else _Shard(of, self.cached(), home, self.team.rank)

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

    def _train_block(
        self,
        stage: str,
        block: range,
        source: Mapping[str, torch.Tensor],
        cache: PrefixCache | _Shard,
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

    def _cache_error(
        self, training: BlockTraining, cache: PrefixCache | _Shard, schedule: Schedule, home: list[int] | None
    ) -> dict[str, dict[str, float]]:
        """Of a prefix cache in low precision: what it makes of the samples and of the gradient of the block's first step
        (the first process's part)."""
        mine = self._mine(*schedule[0], home)
        indices = self.members(training.criterion, *mine)
        if cache.is_exact or not indices:
            return {}
        batch, exact = cache.batch(indices), cache.exact(indices)

        def gradient(hidden: torch.Tensor) -> torch.Tensor:
            training.accumulate(dataclasses.replace(batch, hidden=hidden), len(mine[0]), self.reference.batch(indices))
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
        forget, retain = self._mine(*schedule[0], home)
        indices = self.members(training.criterion, forget, retain)
        if not indices:
            return {}
        found = gradient_cosine(training, batch_of(indices), len(forget), self.reference.batch(indices))
        precision = training.cover.precision
        self.on_stage(f"cover in {precision}: the block's gradient has a cosine of {found:.6f} to the exact cover's")
        return {"gradient_cosine": found}

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

    # ------------------------------------------------ steps

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

    def _measure(self, stage: str, needs: Needs) -> None:
        if self.state.result(stage) is None:
            self.on_stage("the original model's values for the objective")
            start, model = time.perf_counter(), self.decoder.model
            samples = {"forget": self.forget, "retain": self.retain, "alternate": self.alternates}
            found = Reference({})
            if self.group.first:
                with fused(model, self.config.impl):
                    found = Reference.of(
                        self.decoder,
                        samples,
                        needs,
                        impl=self.config.impl,
                        storage=self.config.activations,
                        directory=self.work,
                        progress=self.progress,
                    )
            self.state.finish(stage, {"seconds": time.perf_counter() - start}, found.tensors())
        found = Reference.from_tensors(load_tensors(self.state.file(stage)))
        self.reference = Reference({**self.reference.values, **found.values})

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
            indices = self.members(training.criterion, forget, retain)
            return training.step_packed(batch_of(indices), len(forget), self.reference.batch(indices))
        mine = self._mine(forget, retain, home)
        share, retain_share = (len(part) / len(whole) for part, whole in zip(mine, (forget, retain)))
        indices = self.members(training.criterion, *mine)
        step = SharedStep(training)
        if indices:
            step.add_all(batch_of(indices), len(mine[0]), self.reference.batch(indices), share, retain_share)
        try:
            metrics = step.gather(team, f"step {training.steps}")
        except Diverged:
            training.drop_gradient()
            raise
        training.micro_batches.update(training.apply)
        return metrics

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


def _shown(metrics: Mapping[str, float | None]) -> str:
    """A step's losses for the progress bar: the NLLs, or the objective's own value where there are none."""
    shown = [f"{n} {metrics[f'{n}_loss']:.3f}" for n in ("forget", "retain") if metrics[f"{n}_loss"] is not None]
    return " ".join(shown) or f"loss {metrics['loss']:.4g}"


class _Shard:
    """The prefix cache of the samples that one process has; `batch` takes their places among all. of: makes one."""

    def __init__(
        self, of: Callable[[list[Sample]], PrefixCache], samples: list[Sample], home: Sequence[int], rank: int
    ):
        # after the forget and retain samples come alternates, each with its forget sample
        held = [i for i in range(len(samples)) if home[i if i < len(home) else i - len(home)] == rank]
        self._place = {index: place for place, index in enumerate(held)}
        self._cache = of([samples[i] for i in held]) if held else None

    def advance(self, layer: int) -> None:
        if self._cache is not None:
            self._cache.advance(layer)

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        return self._cache.batch([self._place[i] for i in indices])

    @property
    def is_exact(self) -> bool:
        return self._cache is None or self._cache.is_exact

    def exact(self, indices: Sequence[int]) -> torch.Tensor:
        return self._cache.exact([self._place[i] for i in indices])

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        if self._cache is not None:
            self._cache.expect([self._place[i] for i in indices] for indices in batches)


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
