"""Memory, FLOPs, bytes over the bus and seconds of each stage of a run with given settings.

Memory is that of the accelerator, or on a CPU of the process above Python and its libraries. Time is the longest of
arithmetic, memory traffic and bus, each at a stated share of its rate on the data sheet. Disks, tokenising and launches
are left out.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kunbr_fast.data.schedule import Schedule
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.parallel.assign import SHARING_COSTS, spread_blocks
from kunbr_fast.planning.costs import Architecture, Batch, Step, Update, batches, forward_extra, forward_flops
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import ARITHMETIC, BUS, DISK, HOST, TRAFFIC, Setup
from kunbr_fast.run.config import KUnBRConfig

LOOKED_AT = 200  # steps of a stage whose batches are looked at one by one
# defaults of choice_accuracy, PrefixCache and knowledge_density
ACCURACY_BATCH, CACHE_TOKENS, DENSITY_TOKENS = 16, 4096, 2048
KINDS = (
    "weights", "layer buffers", "block copy", "gradient", "master", "optimiser", "prefix cache", "hidden states",
    "activations", "head", "workspace",
)  # fmt: skip


@dataclasses.dataclass
class Stage:
    """One run of a stage, of which there are `runs` (of a block the mean number: the density chooses).

    memory: bytes by kind at the peak. host: bytes of main memory beside a GPU. bus: bytes.
    """

    name: str
    memory: dict[str, int]
    flops: float
    seconds: float
    bus: float = 0.0
    host: int = 0
    runs: float = 1.0

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def of_block(self) -> bool:
        return self.name.startswith("re-insertion")


class Steps(NamedTuple):
    """whole: the batches of some of a training's steps; parts: their micro-batches; relearned: those of an adversary;
    count: of all its steps; retain: the most tokens of a step that are retained."""

    whole: list[Batch]
    parts: list[Batch]
    relearned: list[Batch]
    count: int
    retain: int


@dataclasses.dataclass
class Run:
    """The stages of one run with given settings, on each GPU of the setup."""

    a: Architecture
    data: Data
    config: KUnBRConfig
    setup: Setup
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what settings that are tried have in common

    def stages(self) -> list[Stage]:
        found = [self._once("evaluation", lambda: self.evaluation(3))] if self.data.questions else []
        if self._states_bytes(self._states_layers):
            found.append(self.states())
        if not self.setup.unlearned:
            found.append(self.training("warm-up", None))
        found.append(self._once("density", self.density))
        config = self.config
        how = config.num_blocks, config.top_k, config.skip_last_layers
        blocks = selectable_blocks(self.a.layers, *how) if config.top_k else []
        for block in blocks:
            name = f"re-insertion {block.start}-{block.stop - 1}"
            found.append(self.training(name, block, config.top_k / len(blocks)))
        if self.setup.gpus > 1:
            found = self._divided(found)
        return found + ([self._once("attack", self.attack)] if self.data.folds else [])

    def _divided(self, stages: list[Stage]) -> list[Stage]:
        """Over several GPUs, as `parallel` does: blocks are dealt out, samples of warm-up and density are spread, each
        GPU evaluates for itself."""
        gpus = self.setup.gpus
        costs = [stage.seconds for stage in stages if stage.of_block]
        alone, together = spread_blocks(costs, gpus, 1 / gpus, self.config.parallel)
        longest = max(sum(costs[i] for i in part) for part in alone)
        longest += sum(costs[i] for i in together) * SHARING_COSTS / gpus
        block = longest / sum(costs)
        shares = {"warm-up": SHARING_COSTS / gpus, "density": 1 / gpus, "evaluation": 1, "hidden states": 1}
        return [dataclasses.replace(s, runs=s.runs * (block if s.of_block else shares[s.name])) for s in stages]

    def enough_blocks(self, memory: int) -> int | None:
        """The smallest num_blocks whose blocks can be trained within so many bytes."""

        def fits(number: int) -> bool:
            run = dataclasses.replace(self, config=dataclasses.replace(self.config, num_blocks=number))
            return run.training("", range(self.a.layers // number)).peak <= memory

        numbers = range(self.a.layers + 1)
        found = bisect.bisect_left(numbers, True, self.config.num_blocks + 1, key=fits)
        return found if found in numbers else None

    # ------------------------------------------------ parts

    def _seconds(self, flops: float, traffic: float, bus: float = 0.0) -> float:
        machine = self.setup.machine
        rate = (machine.fp32 if self.a.itemsize > 2 else machine.bf16) * 1e12 * ARITHMETIC
        return max(flops / rate, traffic / (machine.memory * 1e9 * TRAFFIC), self._over_bus(bus))

    def _over_bus(self, nbytes: float) -> float:
        """Seconds."""
        return nbytes / (self.setup.machine.bus * 1e9 * BUS)

    def _weights(self) -> dict[str, int]:
        a, b = self.a, self.a.itemsize
        if not self.setup.stream:
            return {"weights": a.parameters * b}
        return {"weights": a.outside * b, "layer buffers": 2 * a.layer * b}

    def _bytes(self, layers: float, times: float) -> tuple[float, float]:
        """(memory traffic, bus bytes) of running that many layers so often."""
        moved = layers * times * self.a.layer * self.a.itemsize
        return moved, moved if self.setup.stream else 0.0

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), called once for each key and each choice of the settings that change its result."""
        key = key, self.config.gradient_checkpointing, self.config.micro_batch_tokens, self.config.num_blocks
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def _recompute(self) -> bool:
        return self.config.gradient_checkpointing or self.setup.stream

    def _worst(self, found: Sequence[Batch], **step: Any) -> dict[str, int]:
        """The memory of the passes over the batches with most tokens and most places."""
        candidates = {max(found, key=lambda batch: batch.tokens), max(found, key=lambda batch: batch.places)}
        return max((Step(self.a, b, **step).memory() for b in candidates), key=lambda m: sum(m.values()))

    # ------------------------------------------------ warm-up and blocks

    def training(self, name: str, block: range | None, chance: float = 1.0) -> Stage:
        """block: None for the warm-up. chance: that the block is one of the chosen ones."""
        a, b, config = self.a, self.a.itemsize, self.config
        epochs = config.warmup_epochs if block is None else config.block_epochs
        steps = self._once(("steps", epochs), lambda: self._steps(epochs))
        update = self._update(block)
        peak, flops = self._once(("passes", block, epochs), lambda: self._passes(block, steps))
        peak, flops = dict(peak), steps.count * flops
        if block is None and len(steps.parts) > len(steps.whole):  # all gradients are there from the first part on
            peak |= {"gradient": update.weights, "workspace": peak["workspace"] + a.vocabulary * a.hidden * b}
        longest = max(batch.tokens for batch in steps.whole)
        fixed, host = self._fixed(block, update)
        compared = 1 if self.setup.stream else len(self._compared(block))  # differences that wait for the backward
        peak["activations"] += compared * min(steps.retain, max(p.tokens for p in steps.parts)) * a.hidden * b
        start = 0 if block is None else block.start
        if self.setup.stream:  # one layer's activations at a time; the others' inputs wait in main memory
            inputs = (a.layers - start) * a.hidden * b
            peak["activations"] = max(peak["activations"] - inputs * max(part.tokens for part in steps.parts), 0)
            host += inputs * longest + 2 * a.layer * b
        top = self._top(block, update, peak, 0 if block is None else longest * a.hidden * b)
        memory = {kind: fixed.get(kind, 0) + top.get(kind, 0) for kind in dict.fromkeys((*fixed, *top))}

        above = a.layers - (block.stop if self.setup.stream else start)
        _, bus = self._bytes(above, 2 * steps.count)
        passes = steps.count * len(steps.parts) / len(steps.whole)
        traffic = passes * (2 * above * a.layer * b + 2 * sum(peak.values()))
        seconds = self._seconds(flops, traffic + steps.count * update.traffic * (not update.on_host), bus)
        if update.on_host:  # gradient down, update, weights up, one after the other
            bus += steps.count * 2 * update.weights
            seconds += steps.count * (self._over_bus(2 * update.weights) + update.traffic / HOST)
        stage = Stage(name, memory, flops, seconds, bus, host)
        if block is not None:
            stage.runs = config.rounds * chance
            self._add_prefix(stage, min(start, len(block)) / chance, epochs)
        return stage

    def _steps(self, epochs: int) -> Steps:
        config, data = self.config, self.data
        sizes = len(data.forget), len(data.retain), config.batch_size, config.retain_size
        seed, adversary = config.seed * 1000, config.full_settings().adversary
        schedule = Schedule(*sizes, max(1, epochs), seed, adversary)
        objective, whole, passed, relearned = config.criterion(range(1)).objective, [], [], []
        most = 0
        for number in _some(len(schedule)):
            forget, retain = schedule[number]
            sides = [data.forget[i] for i in forget] * (2 if objective.alternate else 1)
            sides = [sides, [data.retain[i] for i in retain if objective.retain]]
            whole.append(Batch.of(sides[0] + sides[1]))
            most = max(most, _tokens(sides[1]))
            # with an adversary each side goes by itself, after what it relearns
            passed += [Batch.of(side) for side in sides if side] if adversary else [whole[-1]]
            relearned += [Batch.of([data.forget[i] for i in batch]) for batch in schedule.relearned(number)]
        parts, relearned = ([part for batch in found for part in self._cut(batch)] for found in (passed, relearned))
        return Steps(whole, parts, relearned, schedule.steps_per_epoch * epochs, most)

    def _cut(self, batch: Batch) -> list[Batch]:
        """Its micro-batches."""
        return list(batches(list(zip(batch.lengths, batch.labels)), self.config.micro_batch_tokens or batch.tokens))

    def _passes(self, block: range | None, steps: Steps) -> tuple[dict[str, int], float]:
        """(memory of the largest pass, FLOPs of a step)"""
        start = 0 if block is None else block.start
        last = self.a.layers - 1 in self._compared(block)  # its output is then needed whole
        step = dict(block=block, start=start, torch=self.setup.cpu, recompute=self._recompute, rows_last=not last)
        flops = sum(Step(self.a, part, **step).flops() for part in steps.parts)
        again = step | {"block": None, "start": 0} if block is not None and self._reaches_model else step
        flops += sum(Step(self.a, part, **again).flops() for part in steps.relearned)
        found = [self._worst(steps.parts, **step)]
        if steps.relearned:
            found.append(self._worst(steps.relearned, **again))
        return max(found, key=lambda memory: sum(memory.values())), flops / len(steps.whole)

    @property
    def _reaches_model(self) -> bool:
        return self.config.block_settings().reaches_model

    def _update(self, block: range | None) -> Update:
        a, config = self.a, self.config
        return Update(
            entries=a.parameters if block is None else len(block) * a.layer,
            states={"lion": 1, "adamw": 2}[config.warmup_optimizer if block is None else config.optimizer],
            itemsize=a.itemsize,
            master=block is not None and config.master_weights and a.itemsize == 2,
            on_host=block is not None and config.optimizer_device == "host" and not self.setup.cpu,
        )

    @property
    def _cache_bytes(self) -> int:
        return _tokens(self.data.forget + self.data.retain) * self.a.hidden * self.a.itemsize

    def _compared(self, block: range | None) -> list[int]:
        """The layers whose outputs a training compares with the original's."""
        hidden = self.config.criterion(block, warmup=block is None).hidden
        return [] if hidden is None else hidden.chosen(self.a.layers, block)

    @property
    def _states_layers(self) -> list[int]:
        """Those whose outputs are kept: without a warm-up none below the lowest block, which may be the first one."""
        return self._compared(range(self.a.layers)) or ([] if self.setup.unlearned else self._compared(None))

    def _states_bytes(self, layers: Sequence[int]) -> int:
        return len(layers) * _tokens(self.data.retain) * self.a.hidden * self.a.itemsize

    def _placed(self, nbytes: int) -> tuple[int, int]:
        """(bytes of the device, of main memory beside a GPU) of what lies where the prefix cache does."""
        place, cpu = self._cache_place, self.setup.cpu
        here = place == "device" or (cpu and place == "host")
        return nbytes if here else 0, nbytes if place == "host" and not cpu else 0

    @property
    def _cache_place(self) -> str:
        if self.config.cache != "auto":
            return self.config.cache
        return "host" if self.setup.cpu else "device"

    def _fixed(self, block: range | None, update: Update) -> tuple[dict[str, int], int]:
        """(bytes by kind, bytes of main memory) that stay for the whole training."""
        fixed, cpu = {**self._weights(), "optimiser": update.state}, self.setup.cpu
        fixed["hidden states"], host = self._placed(self._states_bytes(self._states_layers))
        if self.config.adversary_every:  # its weights and AdamW's moments
            moments = dataclasses.replace(update, states=2).state
            fixed["adversary"] = update.weights + (update.master_bytes if block is not None else 0) + moments
            if block is not None and self._reaches_model:
                fixed["adversary"] = 3 * self.a.parameters * self.a.itemsize
        if block is None:
            return fixed, host
        fixed |= {"block copy": update.weights, "gradient": update.weights, "master": update.master_bytes}
        if cpu and update.master and update.states == 2:
            fixed["gradient"] += 4 * update.entries  # torch's AdamW reads an fp32 one, which stays
        fixed["prefix cache"], beside = self._placed(self._cache_bytes)
        host += beside
        if update.on_host:
            host += 2 * update.weights + update.master_bytes + update.state
            if "adversary" in fixed and not self._reaches_model:  # of its weights one copy is on the device
                host += fixed["adversary"]
                fixed["adversary"] = update.weights
            fixed |= {"master": 0, "optimiser": 0}
        return fixed, host

    def _top(self, block: range | None, update: Update, peak: dict[str, int], given: int) -> dict[str, int]:
        """The largest of what a pass, an update and the end of a training need besides. given: bytes of a block's
        input."""
        points = [{**peak, "activations": peak["activations"] + given}]
        points.append({"workspace": self._optimizer_temporary(block, update), "activations": given})
        if block is None:
            points[-1]["gradient"] = update.weights
        else:  # the trained block as it leaves the training
            points.append({"workspace": update.weights, "activations": given})
        return max(points, key=lambda point: sum(point.values()))

    def _optimizer_temporary(self, block: range | None, update: Update) -> int:
        """What plain torch makes within an update; a kernel nothing. AdamW is torch's own fused one."""
        if not self.setup.cpu or update.states == 2:
            return 0
        if block is None:
            return self.a.largest * self.a.itemsize
        return update.entries * (8 if update.master else self.a.itemsize)

    def _add_prefix(self, stage: Stage, layers: float, epochs: int) -> None:
        """The cache is rolled forward through so many layers, once for all blocks, and read each epoch."""
        cut = self._once("cache", lambda: list(batches(self.data.forget + self.data.retain, CACHE_TOKENS)))
        flops = sum(forward_flops(self.a, part, 1) for part in cut) * layers
        traffic, bus = self._bytes(layers, 1)
        read, place = (epochs + 1) * self._cache_bytes, self._cache_place
        copied = 0 if place == "device" or self.setup.cpu else read
        stage.flops += flops
        stage.bus += bus + copied
        stage.seconds += self._seconds(flops, traffic, bus) + self._over_bus(copied) + (place == "file") * read / DISK

    # ------------------------------------------------ the other stages

    def states(self) -> Stage:
        """One forward pass of the original over the retain set."""
        layers, cut = max(self._states_layers) + 1, list(batches(self.data.retain, CACHE_TOKENS))
        here, host = self._placed(self._states_bytes(self._states_layers))
        memory = {"hidden states": here, "activations": max(forward_extra(self.a, part) for part in cut)}
        flops = sum(forward_flops(self.a, part, layers) for part in cut)
        traffic, _ = self._bytes(layers, len(cut))
        bus = self._bytes(layers, 1)[1] + host
        seconds = self._seconds(flops, traffic, bus)
        return Stage("hidden states", {**self._weights(), **memory}, flops, seconds, bus, host)

    def density(self) -> Stage:
        a, config = self.a, self.config
        found = list(batches(self.data.forget, DENSITY_TOKENS))
        step = dict(
            block=None, torch=self.setup.cpu, fused=False, taps=True, rows_last=False, recompute=self._recompute
        )
        peak, host = self._worst(found, **step), 0
        if self.setup.stream:
            waiting = a.layers * a.hidden * a.itemsize
            peak["activations"] -= waiting * max(batch.tokens for batch in found)
            host = waiting * sum(n for n, _ in self.data.forget) + 2 * a.layer * a.itemsize
        if config.reduction == "mean":
            peak["gradient"] += 4 * a.layers * 3 * a.hidden * a.intermediate
        flops = sum(Step(a, batch, **step).flops() for batch in found)
        traffic, _ = self._bytes(a.layers, 2 * len(found))
        _, bus = self._bytes(a.layers, 2)
        return Stage("density", {**self._weights(), **peak}, flops, self._seconds(flops, traffic, bus), bus, host)

    def _asked(self, questions: Sequence[int]) -> Iterator[Batch]:
        texts = 4 if self.config.scoring == "choice" else 1
        for i in range(0, len(questions), ACCURACY_BATCH):
            lengths = [n for n in questions[i : i + ACCURACY_BATCH] for _ in range(texts)]
            yield Batch.of([(n, 1 if texts == 1 else n // 2) for n in lengths])

    def _answering(self, questions: Sequence[int]) -> tuple[float, float, float, dict[str, int]]:
        """(flops, seconds, bus bytes, memory) of measuring accuracy once."""
        a, found = self.a, list(self._asked(questions))
        flops = sum(forward_flops(a, batch, a.layers, batch.rows) for batch in found)
        traffic, bus = self._bytes(a.layers, len(found))
        logits = max(min(batch.rows * a.vocabulary * 4, 256 << 20) for batch in found)
        memory = {"activations": max(forward_extra(a, batch) for batch in found), "head": 2 * logits}
        return flops, self._seconds(flops, traffic, bus), bus, memory

    def evaluation(self, times: int) -> Stage:
        flops, seconds, bus, memory = self._answering(self.data.questions)
        return Stage("evaluation", {**self._weights(), **memory}, flops, seconds, bus, runs=times)

    def attack(self) -> Stage:
        """The mean of all attacks at a learning rate: training for each fold (one for all, where none is used), and the
        questions of all folds after each epoch."""
        a, config, folds = self.a, self.config, self.data.folds
        b, step = a.itemsize, dict(block=None, torch=self.setup.cpu, fused=False)
        others = [[sample for k, fold in enumerate(folds) if k != i for sample in fold] for i in range(len(folds))]
        asked, asking, _, _ = self._answering([n for fold in folds for n, _ in fold])
        flops, seconds, runs = 0.0, 0.0, 0
        found: list[Batch] = []
        for kind in map(ATTACKS.get, config.rtt_attacks):
            lrs, times = len(kind.lrs(config.rtt_lrs)), len(kind.measured(config.rtt_epochs))
            sets = [] if kind.rounds else [self.data.retain] if kind.others else others
            batches, count, work = self._fine_tuning(sets, kind.passes * config.rtt_epochs, step)
            found += batches
            peak = self._worst(batches, **step) if batches else {}
            traffic = count * (10 * a.parameters * b + 2 * sum(peak.values()))
            flops += lrs * (work + times * asked)
            seconds += lrs * (self._seconds(work, traffic) + times * asking)
            runs += lrs
        peak = self._worst(found, **step) if found else self._answering([n for fold in folds for n, _ in fold])[3]
        if found and sum(peak.values()) < a.parameters * b:  # the update is the peak
            peak = {"activations": 0, "head": 0, "gradient": a.parameters * b, "workspace": 0}
        memory = {**self._weights(), **({"optimiser": 2 * a.parameters * b} if found else {}), **peak}
        return Stage("RTT attack", memory, flops / runs, seconds / runs, runs=runs)

    def _fine_tuning(
        self, sets: Sequence[list[tuple[int, int]]], epochs: int, step: dict[str, Any]
    ) -> tuple[list[Batch], int, float]:
        """(some batches, steps, flops) of a training on each of the sets."""
        found, steps, flops = [], 0, 0.0
        for samples in sets:
            schedule = Schedule(len(samples), 0, self.config.rtt_batch_size, 1, epochs, self.config.seed)
            parts = [Batch.of([samples[k] for k in schedule[at][0]]) for at in _some(len(schedule), len(sets))]
            flops += len(schedule) * sum(Step(self.a, batch, **step).flops() for batch in parts) / len(parts)
            found, steps = found + parts, steps + len(schedule)
        return found, steps, flops


def _some(count: int, parts: int = 1) -> range:
    """Evenly spread numbers below count, LOOKED_AT / parts at most."""
    return range(0, count, -(-count * parts // LOOKED_AT))


def _tokens(samples: Sequence[tuple[int, int]]) -> int:
    return sum(length for length, _ in samples)
