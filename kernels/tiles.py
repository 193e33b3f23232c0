"""Tile shapes of the Triton kernels, by GPU generation and shape: one table, untuned defaults, a reason beside each.

They were chosen before a GPU ran the kernels, so the reasons are counts (registers, shared memory, bytes and FLOPs),
not timings (docs/results.md has an H200's); `python -m kunbr_fast.kernels.aot` prints what they were read from. With
KUNBR_AUTOTUNE=1 in the environment the candidates are timed on the GPU at hand instead, once a shape and process.

Counts for bf16 on sm_90 (a multiprocessor has 64 Ki registers and 227 KiB of shared memory, and does 4096 dense FLOPs
and 128 additions a clock; the L2 cache gives all 132 of them about 5.5 TB/s):
  - A (BN, BK) tile of dW in fp32 takes BN*BK registers. 128 x 128 with 4 warps is 128 a thread, and two or three
    programs share a multiprocessor: one's sums run under the others' products.
  - A tile costs 2*BN*BK*T FLOPs and BN*BK additions: at T=64, 512 clocks of products, 128 of sums (|.| is free as a
    modifier of the addition; as an instruction of its own it would cost another 256).
  - Where dy's tile stays on the chip, 2*BN*BK*T FLOPs need T*BK*2 bytes of x: BN FLOPs a byte, 704 TFLOP/s at BN=128
    and 5.5 TB/s. Loading both operands gives half of that at 128 x 128, two thirds at 128 x 256.
Density on an H200, 14336 x 4096, 2048 tokens in samples of 32 / 64 / 128 / 256 / 512 / 1024 / 2048, TFLOP/s: seen 412 /
549 / 569 / 336 / 487 / 616 / 700 when a long program had one tile, a load waited for the sum, and a short one took 96
KiB whatever its tokens; predicted since, and not seen: 500-580 / 630-700 / 630-700 / 580-680 / 640-730 / 660-750 /
700-770.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable

import torch

# Mean tokens of a sample up to which a "short" kernel is taken. Counted for 128 x 256 of dW and a sample of 128 tokens:
# short 2048 clocks, as sums and starts run under other programs' products; long 2048 of products, 530 of a tile's end
# and 375 of a start. Longer samples lose what these gain: 64 FLOPs a byte of L2 in place of 85.
SHORT_MEAN_TOKENS = 128
# What a program's start costs (its tensor maps and the first loads): 3.4 to 3.9 us on an H200, whatever its tokens.
START_CLOCKS = 6000


@dataclasses.dataclass(frozen=True)
class Tile:
    """BN x BK: the tile of dW (output rows, input columns). BT: tokens of one step through a long sample."""

    BN: int
    BK: int
    BT: int
    num_warps: int
    num_stages: int  # steps whose loads have room at a time; where dy stays on the chip, steps of `short` tokens
    short: int = 0  # dy's tile of a sample of up to so many tokens (32, 64 or 128) stays on the chip; 0: of none
    tma: bool = False  # loads through tensor descriptors: rows must be 16-byte aligned
    group: int = 0  # how many tiles along N run together; 0: all
    tmem: bool = False  # products are summed in tensor memory (tcgen05), not in registers

    def __str__(self) -> str:
        way = f"short {self.short} " * bool(self.short) + "tma " * self.tma
        return f"{self.BN}x{self.BK}x{self.BT} {way}{self.num_warps} warps {self.num_stages} stages"

    @property
    def long_stages(self) -> int:
        """Stages of the long way: with `short`, as many as fit where dy's tile and the blocks of x lie otherwise."""
        if not self.short:
            return self.num_stages
        return self.short * (self.BN + self.num_stages * self.BK) // (self.BT * (self.BN + self.BK))

    def clocks(self, tokens: float) -> float:
        """Of a tile's products, at 4096 FLOPs a clock."""
        return 2 * self.BN * self.BK * tokens / 4096


# Rows that are not 16-byte aligned: narrow loads, which need many registers for their addresses. Not seen in models.
_ANY = Tile(64, 128, 32, 8, 2, group=8)
# On the CUDA cores, 16 times slower than bf16: neither loads nor sums matter, only that nothing spills.
_FP32 = Tile(64, 32, 16, 4, 2, group=8)
_COMMON = {
    "any": (_ANY,),
    "fp32": (_FP32,),
}

# (architecture, kind) -> candidates, the default first. Half precision: "short" and "long" samples,
# "any" for unaligned rows.
TABLE: dict[tuple[int, str], tuple[Tile, ...]] = {
    # mma.sync takes its operands from registers, and shared memory ends at 163 KiB: smaller tiles. dy's 128 rows stay
    # in registers (at most 163 a thread), x in 21 to 49 KiB of shared memory: three programs on a multiprocessor.
    (80, "short 32"): (Tile(128, 64, 32, 4, 4, short=32),),
    (80, "short 64"): (Tile(128, 64, 32, 4, 3, short=64),),
    (80, "short"): (Tile(128, 64, 32, 4, 2, short=128),),
    (80, "long"): (Tile(128, 128, 32, 8, 4, group=8),),
    # wgmma takes both operands from shared memory as they lie. TMA leaves 155 to 164 registers a thread in use, so
    # three programs share a multiprocessor where shared memory lets them: 40 and 64 KiB for samples of up to 32 and 64
    # tokens. For 128, dy's 32 KiB and two blocks of x of 32 KiB: two. Plain copies with their masks take up to 220.
    (90, "short 32"): (Tile(128, 128, 32, 4, 4, short=32, tma=True), Tile(128, 128, 32, 4, 4, short=32)),
    (90, "short 64"): (Tile(128, 128, 64, 4, 3, short=64, tma=True), Tile(128, 128, 64, 4, 3, short=64)),
    (90, "short"): (Tile(128, 128, 64, 4, 2, short=128, tma=True), Tile(128, 128, 64, 4, 2, short=128)),
    # 85 FLOPs a byte from L2; a stage is 48 KiB, so one program. Nothing runs under a tile's end (265 instructions of
    # two warps a scheduler): 530 clocks where 256 tokens have 4096 of products. 154 to 168 registers, plain up to 198.
    (90, "long"): (Tile(128, 256, 64, 8, 4, tma=True, group=8), Tile(128, 256, 64, 8, 3, group=8)),
    # tcgen05 keeps the tile in tensor memory, but the sums read it through registers: eight warps, or they spill.
    (100, "short 32"): (Tile(128, 128, 32, 8, 4, short=32, tma=True, tmem=True),),
    (100, "short 64"): (Tile(128, 128, 64, 8, 3, short=64, tma=True, tmem=True),),
    (100, "short"): (Tile(128, 128, 64, 8, 2, short=128, tma=True, tmem=True),),
    (100, "long"): (Tile(128, 256, 64, 8, 4, tma=True, tmem=True, group=8),),
} | {(architecture, kind): tiles for architecture in (80, 90, 100) for kind, tiles in _COMMON.items()}
ARCHITECTURES = sorted({architecture for architecture, _ in TABLE})

_tuned: dict[Hashable, Tile] = {}


def architecture(device: torch.device) -> int:
    """The newest entry of the table that the device can run. The interpreter, on a CPU, takes the newest of all."""
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:  # 99 KiB of shared memory, no tcgen05, no wgmma: what fits sm_80 fits
        return 80
    return max(a for a in ARCHITECTURES if a <= 10 * major + minor)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv can run inside a kernel too, and costs the host several times as much.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def aligned(x: torch.Tensor) -> bool:
    """Whether x (T, K) can be loaded 16 bytes at a time, and by a tensor descriptor: contiguous, aligned rows that do
    not overlap (an expanded gradient's do)."""
    return (
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def choose(device: torch.device, kind: str, shape: Hashable, run: Callable[[Tile], object]) -> Tile:
    """The tile for `kind` on `device`: the table's first, or with KUNBR_AUTOTUNE=1 the fastest of its candidates.

    `shape`: what a measured choice is remembered by; `run(tile)` launches the kernel.
    """
    candidates = TABLE[architecture(device), kind]
    if os.environ.get("KUNBR_AUTOTUNE") != "1" or len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    key = (device, kind, shape)
    if key not in _tuned:
        from triton.testing import do_bench  # the table serves where triton is missing too

        _tuned[key] = min(candidates, key=lambda tile: do_bench(lambda: run(tile), return_mode="median"))
    return _tuned[key]


# ---------------------------------------------------------------- norms: kernels that hold whole rows

# Elements of a row that one program can hold: 32 warps, the most there can be, of 8 a thread.
MAX_NORM_WIDTH = 8192
# Warps of a multiprocessor that sum over rows in the backward. 32 are resident (at most 64 registers a thread at D of
# 2048 and more); their dy, h and dh in bf16 are 48 KiB in flight, twice what 4.3 TB/s need at 700 ns. More programs
# would start late, and each has partial sums of 4*D bytes.
NORM_SUM_WARPS = 32


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """BR rows of up to BD elements each, in the registers of one program."""

    BR: int
    BD: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.BR}x{self.BD} {self.num_warps} warps"


def row_block(D: int) -> RowBlock:
    """8 elements a thread: one 16-byte load of bf16 a tensor. With 16 the backward spills at 8192 in fp32. Narrow rows
    share a program until it has 4 warps."""
    BD = next_power_of_2(D)
    BR = max(1, 1024 // BD)
    return RowBlock(BR, BD, BR * BD // 256)
