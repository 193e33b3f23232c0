"""What the stages of a run that is planned have in common: sizes, rates, and where things lie."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kunbr_fast.planning.costs import Architecture, Batch, Step
from kunbr_fast.planning.layer_major import Traffic
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import Setup, Work
from kunbr_fast.run.config import KUnBRConfig

KINDS = (
    "weights", "layer buffers", "resident", "cover", "block copy", "gradient", "master", "optimiser", "prefix cache",
    "hidden states", "adversary", "activations", "head", "workspace",
)  # fmt: skip


@dataclasses.dataclass
class Stage:
    """One run of a stage, of which there are `runs` (of a block the mean number: the density chooses).

    memory: bytes by kind at the peak. bound: what its time is mostly that of, see `Setup.seconds`. bus: bytes that
    cross it; traffic: those of them that are a streamed model's layers. disk: bytes. host: bytes of main memory beside
    a GPU, layers of a streamed model not among them; store: what these take, in main memory and files: trained weights
    and optimiser state, or what is kept of what was read. resident: bytes of the device for each layer that stays.
    """

    name: str
    memory: dict[str, int]
    flops: float
    seconds: float
    bound: str
    bus: float = 0.0
    traffic: Traffic = Traffic()
    disk: float = 0.0
    host: int = 0
    store: int = 0
    resident: int = 0
    runs: float = 1.0

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def of_block(self) -> bool:
        return self.name.startswith("re-insertion")


@dataclasses.dataclass
class Taken:
    """What a stage, or a part of one, takes: fields of `Stage`, and its work, one part after the other."""

    memory: dict[str, int]
    work: list[Work]
    traffic: Traffic = Traffic()
    host: int = 0
    store: int = 0
    resident: int = 0


@dataclasses.dataclass
class Context:
    """A run with given settings, on each GPU of the setup. room: bytes of main memory for a streamed model's layers,
    their trained weights and optimiser state; what is more lies in files."""

    a: Architecture
    data: Data
    config: KUnBRConfig
    setup: Setup
    room: float = float("inf")
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what settings that are tried have in common

    def stage(self, name: str, taken: Taken) -> Stage:
        bound: Counter[str] = Counter()
        for work in taken.work:
            times = self.setup.seconds(work, self.a.itemsize)
            longest = max(times, key=times.get)
            bound[longest] += times[longest]
        total, host = sum(taken.work, Work()), taken.host
        if self.setup.stream and not self.setup.cpu:
            host += 2 * self.layer * (self.stays < self.a.layers)  # pinned, on the way
            host += self.a.outside * self.a.itemsize * self.setup.unlearned  # M_u's
        return Stage(
            name, taken.memory, total.flops, bound.total(), max(bound, key=bound.get),
            bus=total.bus_in + total.bus_out, traffic=taken.traffic, disk=total.disk, host=host,
            store=taken.store, resident=taken.resident,
        )  # fmt: skip

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), called once for each key and each choice of the settings that change its result."""
        key = key, self.config.gradient_checkpointing, self.config.micro_batch_tokens, self.config.num_blocks
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def sharded(self) -> bool:
        return self.config.sharding == "fsdp" and self.setup.gpus > 1

    @property
    def recompute(self) -> bool:
        return self.config.gradient_checkpointing or self.setup.stream

    def worst(self, found: Sequence[Batch], memory: Callable[[Batch], dict[str, int]]) -> dict[str, int]:
        """The most memory that a pass takes, of those over the batches with most tokens and most places."""
        candidates = {max(found, key=lambda batch: batch.tokens), max(found, key=lambda batch: batch.places)}
        return max(map(memory, candidates), key=lambda m: sum(m.values()))

    def pass_memory(self, found: Sequence[Batch], **step: Any) -> dict[str, int]:
        return self.worst(found, lambda batch: Step(self.a, batch, **step).memory())

    # ------------------------------------------------ layers

    @property
    def layer(self) -> int:
        """Bytes of a layer's weights."""
        return self.a.layer * self.a.itemsize

    @property
    def stays(self) -> int:
        """How many of the first layers stay on the device."""
        return min(self.config.resident_layers, self.a.layers) if self.setup.stream else self.a.layers

    def streamed(self, first: int, stop: int) -> int:
        """How many of these layers are streamed."""
        return max(0, stop - max(first, self.stays))

    def weights(self) -> dict[str, int]:
        if not self.setup.stream:
            return {"weights": self.a.parameters * self.a.itemsize}
        outside = self.a.outside * self.a.itemsize
        found = {
            "weights": outside * (1 + (self.setup.cpu and self.setup.unlearned)),
            "resident": self.stays * self.layer,
        }
        return found | {"layer buffers": 2 * self.layer * (self.stays < self.a.layers)}

    def in_files(self, state: int = 0) -> float:
        """The part of the streamed layers that does not lie in main memory. state: bytes of a layer's optimiser state,
        where they are trained; else those that stay on the device are kept in main memory too."""
        whole = (self.layer + state) * self.streamed(0, self.a.layers)
        room = self.room if state else self.room - self.stays * self.layer
        return min(1.0, max(0.0, 1 - room / whole)) if whole else 0.0

    def read(self, loads: float, anew: float = 0.0, beside: int = 0) -> tuple[Work, Traffic]:
        """Of weights alone. loads: how many layers come to the device; anew: how many of them come from the files
        wherever they lie afterwards, since they were never read; beside: bytes of a layer's optimiser state, which
        lies where its weights do."""
        nbytes = loads * self.layer
        disk = self.layer * (anew + (loads - anew) * self.in_files(beside))
        return Work(bus_in=nbytes, disk=disk), Traffic(weights_in=nbytes)

    def phases(self, work: Work, traffic: Traffic, streamed: float, up: float, files: float) -> list[Work]:
        """The parts of steps whose layers are streamed, one after the other, since two buffers look ahead by one layer:
        with layers that stay, with those that come on the way up and on the way down; and of these with those from main
        memory, and from files. States come on the way down, where all goes too.

        streamed: the part of the arithmetic that is of layers that come; up: the part of that on the way up; files: the
        part of the layers that lie in files."""
        if not self.setup.stream:
            return [work]
        stay = Work((1 - streamed) * work.flops, (1 - streamed) * work.memory)
        come, comes = work.minus(stay), traffic.weights_in / 2
        disk = come.disk * comes / traffic.total if traffic.total else 0.0
        first = Work(up * come.flops, up * come.memory, comes, 0.0, disk)
        found = [stay]
        for way in (first, come.minus(first)):
            slow = dataclasses.replace(way.times(files), disk=way.disk)
            found += [way.minus(slow), slow]
        return found

    # ------------------------------------------------ where things lie

    @property
    def cache_place(self) -> str:
        if self.config.cache != "auto":
            return self.config.cache
        return "host" if self.setup.cpu else "device"

    def placed(self, nbytes: int) -> tuple[int, int]:
        """(bytes of the device, of main memory beside a GPU) of what lies where the prefix cache does."""
        place, cpu = self.cache_place, self.setup.cpu
        here = place == "device" or (cpu and place == "host")
        return nbytes if here else 0, nbytes if place == "host" and not cpu else 0

    def moved(self, written: float, read: float) -> Work:
        """Bytes that are written to where the prefix cache lies, and read from there."""
        if self.cache_place == "device" or self.setup.cpu and self.cache_place == "host":
            return Work(memory=written + read)
        return Work(bus_in=read, bus_out=written, disk=(written + read) * (self.cache_place == "file"))


def tokens_of(samples: Sequence[tuple[int, int]]) -> int:
    return sum(length for length, _ in samples)
