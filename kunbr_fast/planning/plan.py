"""What a run will take, before it is begun: memory by kind, FLOPs, bytes over the bus and time of each stage.

    found = plan("Llama-3-8B/config.json", "80GiB", gpu="h100")
    print(found.table()); found.config.save("run.yaml")

All of it is predicted from config.json (`costs`); no weights are read. Memory is that of the accelerator, or on a CPU of
the process above Python and its libraries. Time is the longer of arithmetic and of memory traffic, each at a stated share
of what the data sheet says: a rough guide, which disks, tokenising and launches are no part of.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from kunbr_fast.data import IGNORE, encode, is_question, load_records
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.memory import bytes_of
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.parallel.assign import SHARING_COSTS, spread_blocks
from kunbr_fast.planning.costs import Architecture, Batch, Step, batches, forward_extra, forward_flops
from kunbr_fast.run.config import KUnBRConfig

# ---------------------------------------------------------------- machines


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peak rates: dense bf16 and fp32 (TFLOP/s), memory and one direction of the bus (GB/s), and whose numbers they are."""

    bf16: float
    fp32: float
    memory: float
    bus: float
    source: str


GPUS = {
    "h200": Gpu(989, 67, 4800, 64, "NVIDIA H200 data sheet, SXM; PCIe 5.0 x16"),
    "h100": Gpu(989, 67, 3350, 64, "NVIDIA H100 data sheet, SXM; PCIe 5.0 x16"),
    "a100": Gpu(312, 19.5, 2039, 32, "NVIDIA A100 80GB data sheet, SXM; PCIe 4.0 x16"),
    "l40s": Gpu(362, 91.6, 864, 32, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
    "4090": Gpu(165, 82.6, 1008, 32, "NVIDIA Ada whitepaper, fp32 accumulation; PCIe 4.0 x16"),
    "l4": Gpu(121, 30.3, 300, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
    "cpu": Gpu(0.25, 0.25, 20, 20, "2 cores of an AMD EPYC at twice the 130 GFLOP/s of benchmarks/results/cpu.csv"),
}
ARITHMETIC, TRAFFIC, BUS = 0.45, 0.8, 0.8  # of the peak rates: assumed for short packed batches, not measured
DISK, HOST = 2e9, 50e9  # bytes a second of a disk, and of main memory where the host makes the update. Assumed
RESERVE = 1 << 30  # of a GPU's memory: CUDA's context, libraries' workspaces, fragmentation. Assumed
EQUAL = 1.02  # times that differ by less are no reason for other settings
LOOKED_AT = 200  # steps of a stage whose batches are looked at one by one
# defaults of choice_accuracy, PrefixCache and knowledge_density
ACCURACY_BATCH, CACHE_TOKENS, DENSITY_TOKENS = 16, 4096, 2048
KINDS = ("weights", "layer buffers", "block copy", "gradient", "master", "optimiser", "prefix cache", "activations", "head", "workspace")  # fmt: skip


def parse_bytes(text: str) -> int:
    """ "24GiB", "24 GB", "512MiB" -> bytes."""
    found = bytes_of(text, unit_needed=True)
    if not found:
        raise ValueError(f"--gpu-memory {text!r}: expected a number above 0 and a unit, such as 24GiB, 80GB or 512MiB")
    return found


# ---------------------------------------------------------------- data


@dataclasses.dataclass
class Data:
    """(tokens, rows with a label) of each sample; folds: of each fold of the attack, its samples as that trains them;
    questions: tokens of each prompt whose accuracy is measured; assumed: what was not known, in words."""

    forget: list[tuple[int, int]]
    retain: list[tuple[int, int]]
    folds: list[list[tuple[int, int]]]
    questions: list[int]
    assumed: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(
        cls, forget: Sequence[str] | None, retain: Sequence[str] | None, tokenizer: Any, config: KUnBRConfig
    ) -> Data:
        """Of the files of `kunbr-fast unlearn`; lengths by the tokenizer, or WMDP's where there is none."""
        if bool(forget) != bool(retain):
            raise ValueError("--forget and --retain go together: give both, or none for assumed lengths")
        found, assumed = {}, []
        for what, paths in (("forget", forget), ("retain", retain)):
            found[what] = [load_records(path) for path in paths] if paths else [[None] * 157] * 5
        if not forget:
            assumed.append("785 forget and 785 retain samples, all of them questions, in 5 folds (as WMDP has them)")
        if not forget or tokenizer is None:
            assumed.append("lengths of WMDP's questions: mean 77, at most 224 tokens" + ("" if not forget else ": there is no tokenizer"))  # fmt: skip

        def sizes(records: list, target: str) -> list[tuple[int, int]]:
            if not forget or tokenizer is None:
                return [(n, 1 if target == "letter" else n - 1) for n in assumed_lengths(len(records))]
            samples = encode(records, tokenizer, target, config.max_length)
            return [(len(s["input_ids"]), int((s["labels"][1:] != IGNORE).sum())) for s in samples]

        every = {what: [r for part in parts for r in part] for what, parts in found.items()}
        asked = [r for records in every.values() for r in records if r is None or is_question(r)]
        folds = found["forget"] if asked and len(found["forget"]) > 1 and config.rtt else []
        return cls(
            sizes(every["forget"], config.target),
            sizes(every["retain"], config.target),
            [sizes(part, config.rtt_target) for part in folds],
            [tokens for tokens, _ in sizes(asked, "all")] if asked else [],
            assumed,
        )


def assumed_lengths(count: int) -> list[int]:
    """Log-normal with a mean of 77, from 20 to 224; not sorted."""
    normal = NormalDist()
    places = sorted(range(count), key=lambda i: i * 0.6180339887498949 % 1.0)
    return [round(min(224, max(20, 68 * math.exp(0.5 * normal.inv_cdf((i + 0.5) / count))))) for i in places]


# ---------------------------------------------------------------- stages


@dataclasses.dataclass
class Stage:
    """memory: bytes by kind at the peak; host: bytes of main memory beside a GPU; seconds, flops, bus (bytes): of one run of
    the stage, of which there are `runs` (of a block the mean number: which ones are chosen the density will say)."""

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


@dataclasses.dataclass
class Run:
    """The stages of one run with given settings, on each of `gpus`. unlearned: M_u is given, so there is no warm-up; stream: layers come over
    the bus one by one (`open_streamed`)."""

    a: Architecture
    data: Data
    config: KUnBRConfig
    gpu: Gpu
    cpu: bool = False
    unlearned: bool = False
    stream: bool = False
    gpus: int = 1
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what settings that are tried have in common

    def stages(self) -> list[Stage]:
        found = [copy.copy(self._once("evaluation", lambda: self.evaluation(3)))] if self.data.questions else []
        if not self.unlearned:
            found.append(self.training("warm-up", None, self.config.warmup_epochs, self.config.batch_size))
        found.append(copy.copy(self._once("density", self.density)))
        blocks = selectable_blocks(
            self.a.layers, self.config.num_blocks, self.config.top_k, self.config.skip_last_layers
        )
        for block in blocks:
            name, chance = f"re-insertion {block.start}-{block.stop - 1}", self.config.top_k / len(blocks)
            found.append(self.training(name, block, self.config.block_epochs, self.config.batch_size, chance))
        if (
            self.gpus > 1
        ):  # see `distributed`: blocks are dealt out, samples of the other stages but evaluation are spread
            inside = [stage for stage in found if stage.name.startswith("re-insertion")]
            costs = [stage.seconds for stage in inside]
            alone, together = spread_blocks(costs, self.gpus, 1 / self.gpus, self.config.parallel)
            longest = max(sum(costs[i] for i in part) for part in alone)
            longest += sum(costs[i] for i in together) * SHARING_COSTS / self.gpus
            for stage in found:
                if stage.name == "warm-up":
                    stage.runs *= SHARING_COSTS / self.gpus
                elif stage.name != "evaluation":
                    stage.runs *= longest / sum(costs) if stage in inside else 1 / self.gpus
        if self.data.folds:
            found.append(copy.copy(self._once("attack", self.attack)))
        return found

    def enough_blocks(self, memory: int) -> int | None:
        """The smallest num_blocks whose blocks can be trained within so many bytes."""
        low, high = self.config.num_blocks, self.a.layers + 1

        def fits(number: int) -> bool:
            config = dataclasses.replace(self.config, num_blocks=number)
            return dataclasses.replace(self, config=config).training("", range(self.a.layers // number), 1, config.batch_size).peak <= memory  # fmt: skip

        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high if high <= self.a.layers else None

    # ------------------------------------------------ parts

    def _seconds(self, flops: float, traffic: float, bus: float = 0.0) -> float:
        rate = (self.gpu.fp32 if self.a.itemsize > 2 else self.gpu.bf16) * 1e12 * ARITHMETIC
        return max(flops / rate, traffic / (self.gpu.memory * 1e9 * TRAFFIC), bus / (self.gpu.bus * 1e9 * BUS))

    def _weights(self) -> dict[str, int]:
        a, b = self.a, self.a.itemsize
        if not self.stream:
            return {"weights": a.parameters * b}
        return {"weights": a.outside * b, "layer buffers": 2 * a.layer * b}

    def _bytes(self, layers: float, times: float) -> tuple[float, float]:
        """(memory traffic, bus bytes) of running that many layers so often."""
        moved = layers * times * self.a.layer * self.a.itemsize
        return moved, moved if self.stream else 0.0

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), or what it gave before for the same key and settings (but those that only say where things lie)."""
        key = key, self.config.gradient_checkpointing, self.config.micro_batch_tokens, self.config.num_blocks
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _schedule(self, epochs: int, size: int) -> tuple[list[Batch], list[Batch], int]:
        """Batches of a training's steps (of many steps some), their micro-batches, and how many steps there are."""
        config = self.config
        schedule = Schedule(
            len(self.data.forget), len(self.data.retain), size, config.retain_size, max(1, epochs), config.seed * 1000
        )
        objective, found = config.criterion(range(1)).objective, []
        for forget, retain in (schedule[i] for i in _some(len(schedule))):
            sizes = [self.data.forget[i] for i in forget] * (2 if objective.alternate else 1)
            found.append(Batch.of(sizes + [self.data.retain[i] for i in retain if objective.retain]))
        return found, [part for batch in found for part in self._cut(batch)], schedule.steps_per_epoch * epochs

    def _cut(self, batch: Batch) -> list[Batch]:
        """Its micro-batches."""
        return list(batches(list(zip(batch.lengths, batch.labels)), self.config.micro_batch_tokens or batch.tokens))

    def _worst(self, found: Sequence[Batch], **step: Any) -> dict[str, int]:
        """The memory of the passes over the batches with most tokens and most places."""
        candidates = {max(found, key=lambda batch: batch.tokens), max(found, key=lambda batch: batch.places)}
        return max((Step(self.a, b, **step).memory() for b in candidates), key=lambda m: sum(m.values()))

    # ------------------------------------------------ the stages

    def training(self, name: str, block: range | None, epochs: int, size: int, chance: float = 1.0) -> Stage:
        """chance: that the block is one of the chosen ones."""
        a, b, config = self.a, self.a.itemsize, self.config
        found, parts, steps = self._once((epochs, size), lambda: self._schedule(epochs, size))
        start = 0 if block is None else block.start
        entries = a.parameters if block is None else len(block) * a.layer
        master = block is not None and config.master_weights and b == 2
        states = {"lion": 1, "adamw": 2}[config.warmup_optimizer if block is None else config.optimizer]
        state = states * entries * (4 if master else b)
        fixed = {**self._weights(), "optimiser": state}
        cache = host = 0
        if block is not None:
            fixed |= {"block copy": entries * b, "gradient": entries * b, "master": 4 * entries * master}
            if self.cpu and master and states == 2:
                fixed["gradient"] += 4 * entries  # torch's AdamW reads an fp32 one, which stays
            cache = sum(n for n, _ in self.data.forget + self.data.retain) * a.hidden * b
            where = config.cache if config.cache != "auto" else "host" if self.cpu else "device"
            fixed["prefix cache"] = cache if where == "device" or (self.cpu and where == "host") else 0
            host = cache if where == "host" and not self.cpu else 0
        on_host = block is not None and config.optimizer_device == "host" and not self.cpu
        if on_host:
            host += 2 * entries * b + fixed["master"] + state
            fixed |= {"master": 0, "optimiser": 0}
        steps_at = dict(
            block=block, start=start, torch=self.cpu, checkpoint=config.gradient_checkpointing or self.stream
        )
        peak, flops = self._once(
            (block, epochs),
            lambda: (
                self._worst(parts, **steps_at),
                sum(Step(a, part, **steps_at).flops() for part in parts) / len(found),
            ),
        )
        peak, flops = dict(peak), steps * flops
        if block is None and len(parts) > len(found):  # all gradients are there from the first part on
            peak |= {"gradient": entries * b, "workspace": peak["workspace"] + a.vocabulary * a.hidden * b}
        longest = max(batch.tokens for batch in found)
        given = longest * a.hidden * b if block is not None else 0
        if self.stream:  # one layer's activations at a time; the others' inputs wait in main memory
            inputs = (a.layers - start) * a.hidden * b
            peak["activations"] = max(peak["activations"] - inputs * max(part.tokens for part in parts), 0)
            host += inputs * longest + 2 * a.layer * b
        points = [{**peak, "activations": peak["activations"] + given}]
        points.append({"workspace": self._optimizer_temporary(block, entries, states, master), "activations": given})
        if block is None:
            points[-1]["gradient"] = entries * b
        else:  # the trained block as it leaves the training
            points.append({"workspace": entries * b, "activations": given})
        top = max(points, key=lambda point: sum(point.values()))
        memory = {kind: fixed.get(kind, 0) + top.get(kind, 0) for kind in dict.fromkeys((*fixed, *top))}
        above = a.layers - (start if not self.stream else block.stop)
        _, bus = self._bytes(above, 2 * steps)
        update = entries * (2 * b + (4 if master else b) * (2 * states + 2))
        traffic = steps * (2 * above * a.layer * b + 2 * sum(peak.values())) * len(parts) / len(found)
        seconds = self._seconds(flops, traffic + steps * update * (not on_host), bus)
        if on_host:  # gradient down, update, weights up, one after the other
            bus += steps * 2 * entries * b
            seconds += steps * (2 * entries * b / (self.gpu.bus * 1e9 * BUS) + update / HOST)
        if block is not None:  # the cache is rolled forward, once for all blocks, and read each epoch
            samples, layers = self.data.forget + self.data.retain, min(start, len(block)) / chance
            cut = self._once("cache", lambda: list(batches(samples, CACHE_TOKENS)))
            rolled = sum(forward_flops(a, part, 1) for part in cut) * layers
            traffic, over = self._bytes(layers, 1)
            read = 0 if where == "device" or self.cpu else (epochs + 1) * cache
            flops, bus = flops + rolled, bus + over + read
            seconds += self._seconds(rolled, traffic, over) + read / (self.gpu.bus * 1e9 * BUS)
            seconds += (where == "file") * (epochs + 1) * cache / DISK
        return Stage(name, memory, flops, seconds, bus, host, 1.0 if block is None else config.rounds * chance)

    def _optimizer_temporary(self, block: range | None, entries: int, states: int, master: bool) -> int:
        """What plain torch makes within an update; a kernel nothing. AdamW is torch's own fused one."""
        if not self.cpu or states == 2:
            return 0
        b = self.a.itemsize
        if block is None:
            return self.a.largest * b
        return entries * (8 if master else b)

    def density(self) -> Stage:
        a, config = self.a, self.config
        found = list(batches(self.data.forget, DENSITY_TOKENS))
        checkpoint = config.gradient_checkpointing or self.stream
        step = dict(block=None, torch=self.cpu, fused=False, taps=True, rows_last=False, checkpoint=checkpoint)
        peak, host = self._worst(found, **step), 0
        if self.stream:
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
        """All parameters by AdamW on all folds but one, for each fold; once for each learning rate."""
        a, config, folds = self.a, self.config, self.data.folds
        b, flops, steps, found = a.itemsize, 0.0, 0, []
        step = dict(block=None, torch=self.cpu, fused=False)
        for i in range(len(folds)):
            others = [sample for k, fold in enumerate(folds) if k != i for sample in fold]
            schedule = Schedule(len(others), 0, config.rtt_batch_size, 1, config.rtt_epochs, config.seed)
            parts = [Batch.of([others[k] for k in schedule[at][0]]) for at in _some(len(schedule), len(folds))]
            flops += len(schedule) * sum(Step(a, batch, **step).flops() for batch in parts) / len(parts)
            found, steps = found + parts, steps + len(schedule)
        peak = self._worst(found, **step)
        traffic = steps * (10 * a.parameters * b + 2 * sum(peak.values()))
        if sum(peak.values()) < a.parameters * b:  # the update is the peak
            peak = {"activations": 0, "head": 0, "gradient": a.parameters * b, "workspace": 0}
        asked, asking, _, _ = self._answering([n for fold in folds for n, _ in fold])
        seconds = self._seconds(flops, traffic) + (config.rtt_epochs + 1) * asking
        memory = {**self._weights(), "optimiser": 2 * a.parameters * b, **peak}
        flops += (config.rtt_epochs + 1) * asked
        return Stage("RTT attack", memory, flops, seconds, runs=len(config.rtt_lrs))


def _some(count: int, parts: int = 1) -> range:
    """Evenly spread numbers below count, LOOKED_AT / parts at most."""
    return range(0, count, -(-count * parts // LOOKED_AT))


# ---------------------------------------------------------------- the plan


@dataclasses.dataclass
class Plan:
    """The fastest settings that fit. config: all settings of the run; settings: those that the plan has chosen; tried: every
    combination, {"settings", "peak_bytes", "stage", "seconds", "fits"}; memory: what the device has."""

    title: str
    config: KUnBRConfig
    settings: dict[str, Any]
    stages: list[Stage]
    tried: list[dict[str, Any]]
    memory: int
    reserve: int
    host: int
    assumed: list[str]

    @property
    def seconds(self) -> float:
        return sum(stage.runs * stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        stages = [dataclasses.asdict(stage) | {"peak_bytes": stage.peak} for stage in self.stages]
        return {
            "predicted": True, "model": self.title, "gpu_memory_bytes": self.memory, "reserve_bytes": self.reserve,
            "settings": self.settings, "seconds": self.seconds, "peak_bytes": max(s.peak for s in self.stages) + self.reserve,
            "host_bytes": self.host, "stages": stages, "tried": self.tried, "assumed": self.assumed,
        }  # fmt: skip

    def table(self) -> str:
        """For people: a line for each stage, GiB by kind."""
        kinds = [kind for kind in KINDS if any(stage.memory.get(kind) for stage in self.stages)]
        bus = any(stage.bus for stage in self.stages)
        rows = [["stage", "runs", "time", "PFLOP", *(["bus GB"] * bus), "peak GiB", *kinds]]
        inside = [s for s in self.stages if s.name.startswith("re-insertion")]
        left_out = inside[3:-2] if len(inside) > 8 else []
        for s in self.stages:
            if s in left_out:
                if s is left_out[0]:
                    rows.append([f"({len(left_out)} blocks more)", *[""] * (len(rows[0]) - 1)])
                continue
            numbers = [f"{s.runs:.3g}", duration(s.runs * s.seconds), f"{s.runs * s.flops / 1e15:.3g}"]
            numbers += [f"{s.runs * s.bus / 1e9:.0f}"] * bus + [f"{(s.peak + self.reserve) / 2**30:.2f}"]
            rows.append([s.name, *numbers, *(f"{s.memory.get(k, 0) / 2**30:.2f}" for k in kinds)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"PREDICTED, not measured: {self.title}"]
        lines += [
            "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]) for row in rows
        ]
        lines.append(f"in all {duration(self.seconds)}; main memory {self.host / 2**30:.1f} GiB besides" if self.host else f"in all {duration(self.seconds)}")  # fmt: skip
        fitting = sum(row["fits"] for row in self.tried)
        lines.append(f"{len(self.tried)} combinations, of which {fitting} fit; among them:")
        order = sorted(self.tried, key=lambda row: row["seconds"])
        shown = [row for row in order if not row["fits"]][:1] + [
            row for row in order if row["settings"] == self.settings
        ]
        for row in [*shown, min(order, key=lambda row: row["peak_bytes"])]:
            fits = "fits" if row["fits"] else "does not fit"
            lines.append(f"  {_shown(row['settings'])}: {row['peak_bytes'] / 2**30:.2f} GiB ({row['stage']}), {duration(row['seconds'])}, {fits}")  # fmt: skip
        lines.append(f"chosen: {_shown(self.settings)}")
        return "\n".join([*lines, *(f"assumed: {text}" for text in self.assumed)])


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}: {json.dumps(v).strip(chr(34))}" for k, v in settings.items())


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def plan(
    model: str | Path,
    memory: str | int,
    *,
    gpu: str = "h100",
    forget: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    config: KUnBRConfig | None = None,
    dtype: str | None = None,
    gpus: int = 1,
    unlearned: bool = False,
    stream: bool = False,
) -> Plan:
    """The fastest settings of `unlearn` that fit a device, and what each stage takes with them.

    model: a model directory or its config.json. memory: of the device, "24GiB" or bytes. gpu: one of GPUS. forget, retain:
    the files of `kunbr-fast unlearn`; their lengths are counted if the model directory has a tokenizer. config: settings
    to start from: gradient_checkpointing, cache, optimizer_device and micro_batch_tokens are chosen, none of
    which changes the result. dtype: of the weights, if not as saved. unlearned: M_u is given, so there is no
    warm-up. stream: for models that `streaming` opens, whose M_u is given, without the attack.

    ValueError: input that does not fit, by file and cure; and where nothing fits, the least that does, and for what.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    if gpus < 1 or (gpus > 1 and stream):
        raise ValueError(f"--gpus {gpus}: expected 1 or more, and 1 with --stream, which is for one process")
    config, memory = config or KUnBRConfig(), memory if isinstance(memory, int) else parse_bytes(memory)
    if stream and not unlearned:
        raise ValueError("--stream: the warm-up trains every parameter, which cannot be streamed: make M_u elsewhere and add --unlearned")  # fmt: skip
    a, assumed = Architecture.load(model, dtype)
    data = Data.load(forget, retain, _tokenizer(Path(model)) if forget else None, config)
    cpu = gpu == "cpu"
    if stream:
        data.folds = []
        assumed.append(
            "no RTT attack, which trains every parameter; the files are in the page cache or as fast as the bus"
        )
    if gpus > 1:
        assumed.append(
            f"{gpus} GPUs, each with the whole model: blocks and samples divided, evaluation and the attack not"
        )
    left = [name for name in ("cover_precision", "cache_dtype", "cache_bytes", "cuda_graphs") if getattr(config, name, None) not in (None, "none", False)]  # fmt: skip
    assumed += [f"{', '.join(left)}: not counted"] if left else []
    if config.mask != "none" or config.objective != "gradient_difference" or config.retain_loss != "nll":
        assumed.append(
            "objective, retain loss and mask cost what gradient difference costs (what they need besides is not counted)"
        )
    assumed += [
        *data.assumed,
        f"{ARITHMETIC:.0%} of the peak arithmetic, {TRAFFIC:.0%} of the memory's rate, {BUS:.0%} of the bus'",
    ]
    assumed.append(f"{gpu}: {GPUS[gpu].source}")
    assumed.append(f"any {config.top_k} of the blocks: each counts with its chance to be chosen")
    reserve = 0 if cpu else RESERVE
    if reserve:
        assumed.append(
            "1 GiB of the GPU for CUDA itself, in each peak; kernels, not plain torch. No GPU has confirmed these peaks"
        )

    if cpu:
        assumed.append(
            "freed memory goes back (MALLOC_MMAP_THRESHOLD_=262144): glibc keeps up to a third more by itself"
        )
    run = Run(a, data, config, GPUS[gpu], cpu, unlearned, stream, gpus)

    def tried(**settings: Any) -> tuple[dict[str, Any], list[Stage]]:
        stages = dataclasses.replace(run, config=dataclasses.replace(config, **settings)).stages()
        worst = max(stages, key=lambda stage: stage.peak)
        row = dict(settings=settings, peak_bytes=worst.peak + reserve, stage=worst.name)
        row |= dict(seconds=sum(s.runs * s.seconds for s in stages), fits=worst.peak + reserve <= memory)
        return row, stages

    places = ("host", "file") if cpu else ("device", "host", "file")
    # a streamed step keeps nothing but inputs anyway
    options = (False, True)[stream:], places, ("device",) if cpu else ("device", "host"), (None, 1024, 256)
    names = "gradient_checkpointing", "cache", "optimizer_device", "micro_batch_tokens"
    choices = [dict(zip(names, values)) for values in itertools.product(*options)]
    found = [tried(**choice) for choice in choices]
    least = min(found, key=lambda item: item[0]["peak_bytes"])[0]
    if not least["fits"]:
        enough = None
        if least["stage"].startswith("re-insertion"):
            settings = dataclasses.replace(config, **least["settings"])
            enough = dataclasses.replace(run, config=settings).enough_blocks(memory - reserve)
        raise ValueError(_does_not_fit(a, least, memory, stream, enough))
    fitting = [item for item in found if item[0]["fits"]]  # the plainest settings first: of equally fast ones these
    fastest = min(row["seconds"] for row, _ in fitting)
    row, stages = next(item for item in fitting if item[0]["seconds"] <= EQUAL * fastest)
    host = (
        max(stage.host for stage in stages)
        if stream or cpu
        else max(a.parameters * a.itemsize, *(s.host for s in stages))
    )
    if row["settings"]["optimizer_device"] == "host":
        assumed.append(f"the host updates a block at {HOST / 1e9:.0f} GB/s")
    title = f"{a.name}, {a.parameters / 1e9:.2f} billion parameters in {a.dtype}, on {gpus} {gpu} with {memory / 2**30:.1f} GiB"
    title += ", streamed layer by layer" if stream else ""
    chosen = dataclasses.replace(config, **row["settings"])
    return Plan(title, chosen, row["settings"], stages, [r for r, _ in found], memory, reserve, host, assumed)


def _tokenizer(path: Path) -> Any | None:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _does_not_fit(a: Architecture, least: Mapping[str, Any], memory: int, stream: bool, enough: int | None) -> str:
    stage, cures = least["stage"], []
    if stage == "warm-up":
        cures.append("make M_u on a larger machine and bring it (--unlearned)")
    elif stage == "RTT attack":
        cures.append("leave the attack out (rtt: false) and run `kunbr-fast rtt` on a larger machine")
    else:
        if enough is not None:
            cures.append(f"smaller blocks (num_blocks: {enough} or more)")
        if stage == "density":
            cures.append("shorter samples (max_length)")
        if not stream:
            cures.append("layers streamed from the files (--stream says what that takes)")
    return (
        f"does not fit: the least that the {stage} of {a.parameters / 1e9:.2f} billion parameters needs is predicted to be "
        f"{least['peak_bytes'] / 2**30:.2f} GiB, and there are {memory / 2**30:.2f}. Cures: {'; '.join(cures)}"
    )
