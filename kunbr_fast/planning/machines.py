"""What a plan is made for: the machine and its rates, and what is given with the run."""

from __future__ import annotations

import dataclasses

from kunbr_fast.values import Whole, check


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates: dense bf16 and fp32 (TFLOP/s), memory and one direction of the bus (GB/s). source: whose numbers."""

    bf16: float
    fp32: float
    memory: float
    bus: float
    source: str


GPUS = {
    "h200": Machine(989, 67, 4800, 64, "NVIDIA H200 data sheet, SXM; PCIe 5.0 x16"),
    "h100": Machine(989, 67, 3350, 64, "NVIDIA H100 data sheet, SXM; PCIe 5.0 x16"),
    "a100": Machine(312, 19.5, 2039, 32, "NVIDIA A100 80GB data sheet, SXM; PCIe 4.0 x16"),
    "l40s": Machine(362, 91.6, 864, 32, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
    "4090": Machine(165, 82.6, 1008, 32, "NVIDIA Ada whitepaper, fp32 accumulation; PCIe 4.0 x16"),
    "l4": Machine(121, 30.3, 300, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
    "cpu": Machine(0.25, 0.25, 20, 20, "2 cores of an AMD EPYC at twice the 130 GFLOP/s of benchmarks/results/cpu.csv"),
}
ARITHMETIC, TRAFFIC, BUS = 0.45, 0.8, 0.8  # of the peak rates: assumed for short packed batches, not measured
PROCESSES = Whole(1, 4096)
DISK, HOST = 2e9, 50e9  # bytes a second of a disk, and of main memory where the host makes the update. Assumed
RESERVE = 1 << 30  # of a GPU's memory: CUDA's context, libraries' workspaces, fragmentation. Assumed


@dataclasses.dataclass(frozen=True)
class Setup:
    """gpu: one of GPUS. gpus: how many. dtype: of the weights, if not as saved. unlearned: M_u is given, so there is no
    warm-up. stream: layers come over the bus one by one (`open_streamed`); M_u is given, and there is no attack.
    """

    gpu: str = "h100"
    gpus: int = 1
    dtype: str | None = None
    unlearned: bool = False
    stream: bool = False

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu}: known are {', '.join(GPUS)}")
        check("gpus", self.gpus, PROCESSES)
        if self.gpus > 1 and self.stream:
            raise ValueError(f"gpus={self.gpus}: expected 1 with stream=True, which is for one process")
        if self.stream and not self.unlearned:
            raise ValueError(
                "stream=True: the warm-up trains every parameter, which cannot be streamed: "
                "make M_u elsewhere and add unlearned=True"
            )

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
