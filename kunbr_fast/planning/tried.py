"""A run with some settings: what it takes of the device and of main memory, and where it does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

from kunbr_fast.planning.context import Stage
from kunbr_fast.planning.machines import HOST_RESERVE
from kunbr_fast.planning.predict import Run


@dataclasses.dataclass
class Try:
    """run: with `settings`, as many layers resident as `memory`, the device's, allows; stages: its own."""

    settings: dict[str, Any]
    run: Run
    stages: list[Stage]
    memory: int

    @classmethod
    def of(cls, run: Run, settings: dict[str, Any], memory: int) -> Try:
        run = _with(run, settings)
        if not run.setup.stream:
            return cls(settings, run, run.stages(), memory)
        run = _with(run, {"resident_layers": 0})
        stages, resident, left = run.stages(), 0, memory
        if not run.setup.cpu:
            free = [(memory - run.setup.reserve - stage.peak) // stage.resident for stage in stages]
            resident = min(max(0, min(free)), run.a.layers)
            left = run.setup.memory - HOST_RESERVE if run.setup.memory else float("inf")
        settings = settings | {"resident_layers": resident}
        run, room = _with(run, settings), float("inf")
        for stage in run.stages():  # of those that want more than there is
            needed = stage.peak if run.setup.cpu else stage.host
            if needed + stage.store > left:
                room = min(room, max(0, left - needed))
        run = dataclasses.replace(run, room=room)
        return cls(settings, run, run.stages(), memory)

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak(self) -> int:
        return self.worst.peak + self.run.setup.reserve

    @property
    def seconds(self) -> float:
        return sum(stage.runs * stage.seconds for stage in self.stages)

    @property
    def stream_cache(self) -> int:
        """Bytes of main memory for layers."""
        return round(min(self.run.room, max(stage.store for stage in self.stages)))

    @property
    def files(self) -> int:
        """Bytes of layers that find no room there."""
        return max(stage.store for stage in self.stages) - self.stream_cache

    @property
    def host(self) -> int:
        """Bytes of main memory that it takes."""
        setup, a = self.run.setup, self.run.a
        if setup.stream:
            return max(stage.host + min(self.stream_cache, stage.store) for stage in self.stages)
        return max(0 if setup.cpu else a.parameters * a.itemsize, *(stage.host for stage in self.stages))

    @property
    def lacks(self) -> int:
        """Bytes of main memory that are not there."""
        return max(0, self.host + HOST_RESERVE - self.run.setup.memory) if self.run.setup.memory else 0

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory and not self.lacks

    def row(self) -> dict[str, Any]:
        return {
            "settings": self.settings, "peak_bytes": self.peak, "stage": self.worst.name, "seconds": self.seconds,
            "host_bytes": self.host, "fits": self.fits,
        }  # fmt: skip

    def __str__(self) -> str:
        fits = "fits" if self.fits else "does not fit" + ", for lack of main memory" * bool(self.lacks)
        peak = f"{self.peak / 2**30:.2f} GiB ({self.worst.name})"
        return f"{in_words(self.settings)}: {peak}, {duration(self.seconds)}, {fits}"


def choices(run: Run) -> list[dict[str, Any]]:
    """All combinations of the settings that are chosen, the plainest first."""
    setup = run.setup
    trains_all = not setup.unlearned or bool(run.data.folds)
    options = {
        "gradient_checkpointing": (False, True)[setup.stream :],  # a streamed step keeps nothing but inputs anyway
        "cache": ("host", "file") if setup.cpu else ("device", "host", "file"),
        "optimizer_device": ("device",) if setup.cpu or not run.config.top_k else ("device", "host"),
        "micro_batch_tokens": (None, 1024, 256),
    }
    # an adversary of a warm-up in parts would be a second model
    if setup.gpus > 1 and trains_all and (setup.unlearned or not run.config.adversary_every):
        options["sharding"] = ("none", "fsdp")
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


def _with(run: Run, settings: Mapping[str, Any]) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))


def in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}: {json.dumps(v).strip(chr(34))}" for k, v in settings.items())


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def does_not_fit(least: Try, memory: int) -> str:
    """least: with the least main memory too few, and then the lowest peak."""
    run, stage, cures = least.run, least.worst.name, []
    if least.lacks:
        worst = max(least.stages, key=lambda stage: stage.host)
        return (
            f"does not fit: the {worst.name} of {run.a.parameters / 1e9:.2f} billion parameters is predicted to need "
            f"{(least.host + HOST_RESERVE) / 2**30:.2f} GiB of main memory at least, and there are "
            f"{run.setup.memory / 2**30:.2f} (--memory). Cures: shorter samples (max_length); a machine with more"
        )
    if stage == "warm-up":
        cures.append("make M_u on a larger machine and bring it (--unlearned)")
    elif stage == "RTT attack":
        cures.append("leave the attack out (rtt: false) and run `kunbr-fast rtt` on a larger machine")
    else:
        if stage.startswith("re-insertion"):
            enough = run.enough_blocks(memory - run.setup.reserve)
            cures += [f"smaller blocks (num_blocks: {enough} or more)"] if enough is not None else []
        if stage == "density":
            cures.append("shorter samples (max_length)")
    if not run.setup.stream:
        alone = ", for one GPU," * (run.setup.gpus > 1)
        cures.append(f"layers streamed from the files (--stream{alone} says what that takes)")
        cures += _more_gpus(least, memory) if stage in ("warm-up", "RTT attack") else []
    return (
        f"does not fit: the least that the {stage} of {run.a.parameters / 1e9:.2f} billion parameters needs is "
        f"predicted to be {least.peak / 2**30:.2f} GiB, and there are {memory / 2**30:.2f}. Cures: {'; '.join(cures)}"
    )


def _more_gpus(least: Try, memory: int) -> list[str]:
    """On how many of them, up to 8, a training of all parameters fits whose weights they divide."""
    for gpus in range(least.run.setup.gpus + 1, 9):
        run = dataclasses.replace(least.run, setup=dataclasses.replace(least.run.setup, gpus=gpus), made={})
        if any(Try.of(run, choice, memory).fits for choice in choices(run)):
            return [f"{gpus} such GPUs (--gpus {gpus}), which divide the weights among them (sharding: fsdp)"]
    return []
