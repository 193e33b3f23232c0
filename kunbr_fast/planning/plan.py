"""What a run will take, before it is begun: memory by kind, FLOPs, bytes over the bus and time of each stage.

    found = plan("Llama-3-8B/config.json", "80GiB", gpu="h100")
    print(found.table()); found.config.save("run.yaml")

All of it is predicted (`predict`) from config.json (`costs`). No weights are read; where some lie in the
folder, their headers must be such as can be loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.files.models import has_tokenizer, load_tokenizer
from kunbr_fast.keywords import taken
from kunbr_fast.planning.costs import Architecture
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import ARITHMETIC, BUS, HOST, TRAFFIC, Setup
from kunbr_fast.planning.predict import KINDS, Run, Stage
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.values import least, parse_bytes

COUNTED = ("nll", "hidden_layers")  # retain losses whose costs are known
EQUAL = 1.02  # times that differ by less are no reason for other settings


@dataclasses.dataclass
class Plan:
    """The fastest settings that fit.

    config: all settings of the run; settings: those that the plan has chosen; tried: every combination, {"settings",
    "peak_bytes", "stage", "seconds", "fits"}; memory: bytes of the device; reserve: of these no stage's; host: bytes of
    main memory.
    """

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
            "settings": self.settings, "seconds": self.seconds,
            "peak_bytes": max(s.peak for s in self.stages) + self.reserve, "host_bytes": self.host, "stages": stages,
            "tried": self.tried, "assumed": self.assumed,
        }  # fmt: skip

    def table(self) -> str:
        """For people: a line for each stage, GiB by kind; some of the combinations; what was assumed."""
        besides = f"; main memory {self.host / 2**30:.1f} GiB besides" if self.host else ""
        lines = [f"PREDICTED, not measured: {self.title}", *self._stage_lines()]
        lines.append(f"in all {duration(self.seconds)}{besides}")
        fitting = sum(row["fits"] for row in self.tried)
        lines.append(f"{len(self.tried)} combinations, of which {fitting} fit; among them:")
        order = sorted(self.tried, key=lambda row: row["seconds"])
        shown = [row for row in order if not row["fits"]][:1]
        shown += [row for row in order if row["settings"] == self.settings]
        for row in [*shown, min(order, key=lambda row: row["peak_bytes"])]:
            fits = "fits" if row["fits"] else "does not fit"
            peak = f"{row['peak_bytes'] / 2**30:.2f} GiB ({row['stage']})"
            lines.append(f"  {_shown(row['settings'])}: {peak}, {duration(row['seconds'])}, {fits}")
        lines.append(f"chosen: {_shown(self.settings)}")
        return "\n".join([*lines, *(f"assumed: {text}" for text in self.assumed)])

    def _stage_lines(self) -> list[str]:
        kinds = [kind for kind in KINDS if any(stage.memory.get(kind) for stage in self.stages)]
        bus = any(stage.bus for stage in self.stages)
        rows = [["stage", "runs", "time", "PFLOP", *(["bus GB"] * bus), "peak GiB", *kinds]]
        inside = [stage for stage in self.stages if stage.of_block]
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
        return [
            "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]) for row in rows
        ]


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
    forget: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    ignore_keys: Sequence[str] = (),
    config: KUnBRConfig | None = None,
    **setup: Any,
) -> Plan:
    """The fastest settings of `unlearn` that fit a device, and what each stage takes with them.

    model: a model directory or its config.json. memory: of the device, "24GiB" or bytes. forget, retain: the files of
    `kunbr-fast unlearn`; their lengths are counted if the model directory has a tokenizer. ignore_keys: as of
    `load_records`. config: settings to start
    from: gradient_checkpointing, cache, optimizer_device and micro_batch_tokens are chosen, none of which changes the
    result. setup: gpu, gpus, dtype, unlearned and stream, see `Setup`.

    ValueError: input that does not fit, by file and cure; and where nothing fits, the least that does, and for what.
    """
    setup, config = taken(Setup, setup, "plan"), config or KUnBRConfig()
    memory = parse_bytes(memory, "gpu_memory", unit_needed=True)
    a, assumed = Architecture.load(model, setup.dtype)
    tokenizer = load_tokenizer(model) if forget and has_tokenizer(model) else None
    longest = least(config.max_length, a.max_positions)
    data = Data.load(forget, retain, tokenizer, dataclasses.replace(config, max_length=longest), ignore_keys)
    config.block_settings().check_reach(setup.stream, config.cover_precision)
    if setup.stream:
        data.folds = []
    assumed += _assumed(setup, config, data)
    run = Run(a, data, config, setup)
    found = [_try(run, choice, memory) for choice in _choices(setup)]
    fitting = [item for item in found if item[0]["fits"]]
    if not fitting:
        raise ValueError(_does_not_fit(run, min((row for row, _ in found), key=lambda row: row["peak_bytes"]), memory))
    # the plainest settings come first: of equally fast ones these
    fastest = min(row["seconds"] for row, _ in fitting)
    row, stages = next(item for item in fitting if item[0]["seconds"] <= EQUAL * fastest)
    host = max(stage.host for stage in stages)
    if not (setup.stream or setup.cpu):
        host = max(host, a.parameters * a.itemsize)
    if row["settings"]["optimizer_device"] == "host":
        assumed.append(f"the host updates a block at {HOST / 1e9:.0f} GB/s")
    title = f"{a.name}, {a.parameters / 1e9:.2f} billion parameters in {a.dtype}, on {setup.gpus} {setup.gpu} with "
    title += f"{memory / 2**30:.1f} GiB" + ", streamed layer by layer" * setup.stream
    chosen = dataclasses.replace(config, **row["settings"])
    return Plan(title, chosen, row["settings"], stages, [r for r, _ in found], memory, setup.reserve, host, assumed)


def _choices(setup: Setup) -> list[dict[str, Any]]:
    """All combinations of the settings that are chosen, the plainest first."""
    options = {
        "gradient_checkpointing": (False, True)[setup.stream :],  # a streamed step keeps nothing but inputs anyway
        "cache": ("host", "file") if setup.cpu else ("device", "host", "file"),
        "optimizer_device": ("device",) if setup.cpu else ("device", "host"),
        "micro_batch_tokens": (None, 1024, 256),
    }
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


def _try(run: Run, settings: dict[str, Any], memory: int) -> tuple[dict[str, Any], list[Stage]]:
    """(row of `Plan.tried`, stages) of a run with these settings."""
    stages = dataclasses.replace(run, config=dataclasses.replace(run.config, **settings)).stages()
    worst = max(stages, key=lambda stage: stage.peak)
    peak = worst.peak + run.setup.reserve
    seconds = sum(stage.runs * stage.seconds for stage in stages)
    return dict(settings=settings, peak_bytes=peak, stage=worst.name, seconds=seconds, fits=peak <= memory), stages


def _assumed(setup: Setup, config: KUnBRConfig, data: Data) -> list[str]:
    found = []
    if setup.stream:
        found.append(
            "no RTT attack, which trains every parameter; the files are in the page cache or as fast as the bus"
        )
    if setup.gpus > 1:
        found.append(
            f"{setup.gpus} GPUs, each with the whole model: blocks and samples divided, evaluation and the attack not"
        )
    names = ("cover_precision", "cache_dtype", "cache_bytes", "cuda_graphs")
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
        found.append(f"any {config.top_k} of the blocks: each counts with its chance to be chosen")
    if setup.cpu:
        found.append("freed memory goes back (MALLOC_MMAP_THRESHOLD_=262144): glibc keeps up to a third more by itself")
    else:
        found.append(
            "1 GiB of the GPU for CUDA itself, in each peak; kernels, not plain torch. No GPU has confirmed these peaks"
        )
    return found


def _does_not_fit(run: Run, least: Mapping[str, Any], memory: int) -> str:
    """least: the row of `Plan.tried` with the lowest peak."""
    stage, cures = least["stage"], []
    if stage == "warm-up":
        cures.append("make M_u on a larger machine and bring it (--unlearned)")
    elif stage == "RTT attack":
        cures.append("leave the attack out (rtt: false) and run `kunbr-fast rtt` on a larger machine")
    else:
        if stage.startswith("re-insertion"):
            settings = dataclasses.replace(run.config, **least["settings"])
            enough = dataclasses.replace(run, config=settings).enough_blocks(memory - run.setup.reserve)
            cures += [f"smaller blocks (num_blocks: {enough} or more)"] if enough is not None else []
        if stage == "density":
            cures.append("shorter samples (max_length)")
        if not run.setup.stream:
            cures.append("layers streamed from the files (--stream says what that takes)")
    return (
        f"does not fit: the least that the {stage} of {run.a.parameters / 1e9:.2f} billion parameters needs is "
        f"predicted to be {least['peak_bytes'] / 2**30:.2f} GiB, and there are {memory / 2**30:.2f}. "
        f"Cures: {'; '.join(cures)}"
    )
