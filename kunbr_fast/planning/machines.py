"""What a plan is made for: the machine and its rates, and what is given with the run."""

from __future__ import annotations

import dataclasses

from kunbr_fast.values import Real, Whole, check, parse_bytes


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates: dense bf16 and fp32 (TFLOP/s), memory, one direction of the bus, and one direction between two GPUs
    (GB/s). source: whose numbers."""

    bf16: float
    fp32: float
    memory: float
    bus: float
    link: float
    source: str


GPUS = {
    "h200": Machine(989, 67, 4800, 64, 450, "NVIDIA H200 data sheet, SXM; PCIe 5.0 x16, NVLink"),
    "h100": Machine(989, 67, 3350, 64, 450, "NVIDIA H100 data sheet, SXM; PCIe 5.0 x16, NVLink"),
    "a100": Machine(312, 19.5, 2039, 32, 300, "NVIDIA A100 80GB data sheet, SXM; PCIe 4.0 x16, NVLink"),
    "l40s": Machine(362, 91.6, 864, 32, 32, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
    "a6000": Machine(155, 38.7, 768, 32, 32, "NVIDIA RTX A6000 data sheet; PCIe 4.0 x16, no NVLink bridge"),
    "4090": Machine(165, 82.6, 1008, 32, 32, "NVIDIA Ada whitepaper, fp32 accumulation; PCIe 4.0 x16"),
    "l4": Machine(121, 30.3, 300, 32, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
    "cpu": Machine(
        0.25, 0.25, 20, 20, 20, "2 cores of an AMD EPYC at twice the 130 GFLOP/s of benchmarks/results/cpu.csv"
    ),
}
ARITHMETIC, TRAFFIC, BUS = 0.45, 0.8, 0.8  # of the peak rates: assumed for short packed batches, not measured
PROCESSES = Whole(1, 4096)
DISK = 3.0  # GB a second, where nothing else is said
HOST = 50e9  # bytes a second of main memory where the host makes the update. Assumed
RESERVE = 1 << 30  # of a GPU's memory: CUDA's context, libraries' workspaces, fragmentation. Assumed
HOST_RESERVE = 4 << 30  # of a machine's main memory: the system, Python, its libraries. Assumed


@dataclasses.dataclass(frozen=True)
class Work:
    """Amounts of what goes on at the same time. flops; all else in bytes: of the device's memory, to it and from it
    over the bus, of the disk, of main memory that a host's update reads and writes, and of each GPU's link to others.
    """

    flops: float = 0.0
    memory: float = 0.0
    bus_in: float = 0.0
    bus_out: float = 0.0
    disk: float = 0.0
    host: float = 0.0
    link: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def times(self, factor: float) -> Work:
        return Work(*(factor * amount for amount in dataclasses.astuple(self)))

    def minus(self, other: Work) -> Work:
        return self + other.times(-1)


@dataclasses.dataclass(frozen=True)
class Setup:
    """gpu: one of GPUS. gpus: how many. dtype: of the weights, if not as saved. unlearned: M_u is given, so there is no
    warm-up. stream: layers come over the bus one by one (`open_streamed`). memory: main memory of the machine ("32GiB"
    or bytes; None: enough). disk_rate: GB a second that the disk reads or writes.
    """

    gpu: str = "h100"
    gpus: int = 1
    dtype: str | None = None
    unlearned: bool = False
    stream: bool = False
    memory: int | str | None = None
    disk_rate: float = DISK

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu}: known are {', '.join(GPUS)}")
        check("gpus", self.gpus, PROCESSES)
        check("disk_rate", self.disk_rate, Real(0, above=True))
        if self.memory is not None:
            object.__setattr__(self, "memory", parse_bytes(self.memory, "memory", unit_needed=True))
            if self.cpu:
                raise ValueError(f"memory={self.memory}: gpu=cpu has no other main memory than its own: leave it out")
        if self.gpus > 1 and self.stream:
            raise ValueError(f"gpus={self.gpus}: expected 1 with stream=True, which is for one process")

    @property
    def cpu(self) -> bool:
        return self.gpu == "cpu"

    @property
    def machine(self) -> Machine:
        return GPUS[self.gpu]

    @property
    def reserve(self) -> int:
        """Bytes of the device that no stage can have."""
        return 0 if self.cpu else RESERVE

    def seconds(self, work: Work, itemsize: int) -> dict[str, float]:
        """Of each resource. itemsize: of the weights."""
        machine = self.machine
        peak = machine.fp32 if itemsize > 2 else machine.bf16
        return {
            "arithmetic": work.flops / (peak * 1e12 * ARITHMETIC),
            "memory": work.memory / (machine.memory * 1e9 * TRAFFIC),
            "bus": max(work.bus_in, work.bus_out) / (machine.bus * 1e9 * BUS),
            "disk": work.disk / (self.disk_rate * 1e9),
            "host": work.host / HOST,
            "link": work.link / (machine.link * 1e9 * BUS),
        }
