"""What a run will take, before it is begun: memory by kind, FLOPs, bytes over the bus and time of each stage.

    found = plan("Llama-3-8B/config.json", "80GiB", gpu="h100")
    print(found.table()); found.config.save("run.yaml")

All of it is predicted (`predict`) from config.json (`costs`). No weights are read; where some lie in the
folder, their headers must be such as can be loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.files.models import has_tokenizer, load_tokenizer
from kunbr_fast.keywords import taken
from kunbr_fast.planning.context import KINDS, Stage
from kunbr_fast.planning.costs import Architecture
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import ARITHMETIC, BUS, HOST, TRAFFIC, Setup
from kunbr_fast.planning.predict import Run
from kunbr_fast.planning.tried import Try, choices, does_not_fit, duration, in_words
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.values import least, parse_bytes

COUNTED = ("nll", "hidden_layers")  # retain losses whose costs are known
EQUAL = 1.02  # times that differ by less are no reason for other settings


@dataclasses.dataclass
class Plan:
    """The fastest settings that fit.

    best: with these; tried: every combination, `best` among them; approximations: what would change the result. memory:
    bytes of the device.
    """

    title: str
    best: Try
    tries: list[Try]
    approximations: list[Try]
    memory: int
    assumed: list[str]

    @property
    def config(self) -> KUnBRConfig:
        """All settings of the run."""
        return self.best.run.config

    @property
    def settings(self) -> dict[str, Any]:
        """Those that the plan has chosen."""
        return self.best.settings

    @property
    def stages(self) -> list[Stage]:
        return self.best.stages

    @property
    def seconds(self) -> float:
        return self.best.seconds

    @property
    def tried(self) -> list[dict[str, Any]]:
        return [each.row() for each in self.tries]

    @property
    def host(self) -> int:
        """Bytes of main memory."""
        return self.best.host

    def to_dict(self) -> dict[str, Any]:
        best = self.best
        stages = [dataclasses.asdict(stage) | {"peak_bytes": stage.peak} for stage in self.stages]
        return {
            "predicted": True, "model": self.title, "gpu_memory_bytes": self.memory,
            "reserve_bytes": best.run.setup.reserve, "settings": self.settings, "seconds": self.seconds,
            "peak_bytes": best.peak, "host_bytes": best.host, "stream_cache_bytes": best.stream_cache,
            "file_bytes": best.files, "stages": stages, "tried": self.tried,
            "approximations": [each.row() for each in self.approximations], "assumed": self.assumed,
        }  # fmt: skip

    def table(self) -> str:
        """For people: a line for each stage, GiB by kind; some of the combinations; what was assumed."""
        lines = [f"PREDICTED, not measured: {self.title}", *self._stage_lines(), *self._sums()]
        fitting = sum(each.fits for each in self.tries)
        lines.append(f"{len(self.tries)} combinations, of which {fitting} fit; among them:")
        order = sorted(self.tries, key=lambda each: each.seconds)
        shown = [each for each in order if not each.fits][:1]
        lines += [f"  {each}" for each in (*shown, self.best, min(order, key=lambda each: each.peak))]
        lines += [f"another result, so not chosen: {each}" for each in self.approximations]
        lines.append(f"chosen: {in_words(self.settings)}")
        if self.best.run.setup.stream:
            lines.append(f"unlearn with: --stream --stream-cache {self.best.stream_cache / 2**30:.1f}GiB")
        return "\n".join([*lines, *(f"assumed: {text}" for text in self.assumed)])

    def _sums(self) -> list[str]:
        best = self.best
        besides = f"; main memory {best.host / 2**30:.1f} GiB besides" if best.host else ""
        besides += f", and files of {best.files / 2**30:.1f} GiB" if best.files else ""
        attack = sum(stage.runs * stage.seconds for stage in self.stages if stage.name == "RTT attack")
        all_else = f", {duration(self.seconds - attack)} without the attack" if attack else ""
        return [f"in all {duration(self.seconds)}{all_else}{besides}"]

    def _stage_lines(self) -> list[str]:
        kinds = [kind for kind in KINDS if any(stage.memory.get(kind) for stage in self.stages)]
        bus = any(stage.bus for stage in self.stages)
        disk, reserve = any(stage.disk for stage in self.stages), self.best.run.setup.reserve
        head = ["stage", "runs", "time", "bound by", "PFLOP", *(["bus GB"] * bus), *(["disk GB"] * disk), "peak GiB"]
        rows = [[*head, *kinds]]
        inside = [stage for stage in self.stages if stage.of_block]
        left_out = inside[3:-2] if len(inside) > 8 else []
        for s in self.stages:
            if s in left_out:
                if s is left_out[0]:
                    rows.append([f"({len(left_out)} blocks more)", *[""] * (len(rows[0]) - 1)])
                continue
            numbers = [f"{s.runs:.3g}", duration(s.runs * s.seconds), s.bound, f"{s.runs * s.flops / 1e15:.3g}"]
            numbers += [f"{s.runs * s.bus / 1e9:.0f}"] * bus + [f"{s.runs * s.disk / 1e9:.0f}"] * disk
            numbers.append(f"{(s.peak + reserve) / 2**30:.2f}")
            rows.append([s.name, *numbers, *(f"{s.memory.get(k, 0) / 2**30:.2f}" for k in kinds)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return [
            "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]) for row in rows
        ]


def plan(
    model: str | Path,
    gpu_memory: str | int,
    *,
    forget: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    read: Callable[[str, str], list[dict]] | None = None,
    config: KUnBRConfig | None = None,
    **setup: Any,
) -> Plan:
    """The fastest settings of `unlearn` that fit a device, and what each stage takes with them.

    model: a model directory or its config.json. gpu_memory: of the device, "24GiB" or bytes. forget, retain: the files
    of `kunbr-fast unlearn`; their lengths are counted if the model directory has a tokenizer. read: reads one of them,
    given its path and "--forget" or "--retain", where `load_records` is to be told more. config: settings to start
    from: gradient_checkpointing, cache, optimizer_device, micro_batch_tokens, of a streamed model resident_layers and
    with several GPUs sharding are chosen, none of which changes the result (beyond the order of sums). setup: gpu,
    gpus, dtype, unlearned, stream, memory and disk_rate, see `Setup`.

    ValueError: input that does not fit, by file and cure; and where nothing fits, the least that does, and for what.
    """
    setup, config = taken(Setup, setup, "plan"), config or KUnBRConfig()
    memory = parse_bytes(gpu_memory, "gpu_memory", unit_needed=True)
    a, assumed = Architecture.load(model, setup.dtype)
    tokenizer = load_tokenizer(model) if forget and has_tokenizer(model) else None
    longest = least(config.max_length, a.max_positions)
    data = Data.load(forget, retain, tokenizer, dataclasses.replace(config, max_length=longest), read)
    config.block_settings().check_reach(setup.stream, config.cover_precision)
    if setup.stream and not setup.unlearned and config.adversary_every:
        raise ValueError(
            f"adversary_every={config.adversary_every}: a streamed warm-up holds no second model to relearn with: take "
            "0, or bring M_u (unlearned=True)"
        )
    assumed += _assumed(setup, config, data)
    run = Run(a, data, config, setup)
    found = [Try.of(run, choice, memory) for choice in choices(run)]
    fitting = [each for each in found if each.fits]
    if not fitting:
        raise ValueError(does_not_fit(min(found, key=lambda each: (each.lacks, each.peak)), memory))
    # the plainest settings come first: of equally fast ones these
    fastest = min(each.seconds for each in fitting)
    best = next(each for each in fitting if each.seconds <= EQUAL * fastest)
    if best.settings["optimizer_device"] == "host":
        assumed.append(f"the host updates a block at {HOST / 1e9:.0f} GB/s")
    title = f"{a.name}, {a.parameters / 1e9:.2f} billion parameters in {a.dtype}, on {setup.gpus} {setup.gpu} with "
    title += f"{memory / 2**30:.1f} GiB" + ", streamed layer by layer" * setup.stream
    return Plan(title, best, found, _approximations(run, best, memory), memory, assumed)


def _approximations(run: Run, best: Try, memory: int) -> list[Try]:
    """A streamed run's covers in low precision, beside the settings that were chosen: they change the result, so that
    nobody gets one who has not asked for it."""
    if not run.setup.stream or run.config.cover_precision != "none" or not run.config.top_k:
        return []
    others = {name: value for name, value in best.settings.items() if name != "resident_layers"}
    return [Try.of(run, others | {"cover_precision": precision}, memory) for precision in ("int8", "nf4")]


def _assumed(setup: Setup, config: KUnBRConfig, data: Data) -> list[str]:
    found = []
    if setup.stream:
        enough = "" if setup.memory else "; main memory for all layers, trained weights and optimiser state"
        found.append(f"a disk at {setup.disk_rate:g} GB/s, no page cache{enough}; both ways of the bus at a time")
    if setup.gpus > 1:
        found.append(f"{setup.gpus} GPUs: blocks, samples and attacks divided, evaluation not")
    names = ("cache_dtype", "cache_bytes", "cuda_graphs", *["cover_precision"] * (not setup.stream))
    left = [name for name in names if getattr(config, name, None) not in (None, "none", False)]
    found += [f"{', '.join(left)}: not counted"] if left else []
    if config.mask != "none" or config.objective != "gradient_difference" or config.retain_loss not in COUNTED:
        found.append(
            "objective, retain loss and mask cost what gradient difference costs "
            "(what they need besides is not counted)"
        )
    found += data.assumed
    found.append(f"{ARITHMETIC:.0%} of the peak arithmetic, {TRAFFIC:.0%} of the memory's rate, {BUS:.0%} of the bus'")
    found.append(f"{setup.gpu}: {setup.machine.source}")
    if config.top_k:
        some = f"any {config.top_k} of the blocks: each counts with its chance to be chosen"
        found.append(
            some
            if config.rule == "top_k"
            else f"all blocks are trained: how many {config.rule} chooses, the density says"
        )
    if setup.cpu:
        found.append("freed memory goes back (MALLOC_MMAP_THRESHOLD_=262144): glibc keeps up to a third more by itself")
    else:
        found.append(
            "1 GiB of the GPU for CUDA itself, in each peak; kernels, not plain torch. No GPU has confirmed these peaks"
        )
    return found
