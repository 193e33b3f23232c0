"""Barriers, exchange between the lanes of a warp, and matrix products of one warp (mma.sync)."""

from dataclasses import dataclass, field

import numpy as np

from .machine import Wait, instruction
from .parse import vector
from .values import U16, U32, Fault, decode


@dataclass
class Barrier:
    arrived: int = 0
    generation: int = 0
    stamps: list = field(default_factory=list)  # what those who arrived know
    waiting: list = field(default_factory=list)  # warps that will know it


@instruction("bar", "barrier")
def barrier(machine, ins):
    """bar.sync, bar.arrive: of the whole program, or of as many threads as are said."""
    if "warp" in ins.mods:  # order between the lanes of a warp is not followed
        return lambda mask: None
    which = machine.operand(ins.args[0], "b32")
    count = machine.operand(ins.args[1] if len(ins.args) > 1 else str(machine.num_threads), "b32")

    def run(mask):
        waits = []
        for name in np.unique(which()[mask]):
            mine = mask & (which() == name)
            state = machine.barriers.setdefault(int(name), Barrier())
            generation = state.generation
            _arrive(machine, state, mine, int(count()[mine][0]), "arrive" not in ins.mods)
            if "arrive" not in ins.mods:
                ready = lambda state=state, generation=generation: state.generation > generation  # noqa: E731
                waits.append(Wait(mine, ready))
        return waits

    return run


def _arrive(machine, state, mask, needed, waits):
    warps = machine.warps_in(mask)
    state.arrived += int(mask.sum())
    state.stamps.append(machine.order.release(warps))
    if waits:
        state.waiting.extend(warps)
    if state.arrived > needed:
        raise Fault(f"{state.arrived} threads at a barrier of {needed}")
    if state.arrived == needed:
        machine.order.acquire(state.waiting, np.maximum.reduce(state.stamps))
        state.arrived, state.generation = 0, state.generation + 1
        state.stamps, state.waiting = [], []


@instruction("shfl")
def shuffle(machine, ins):
    mode = next(mod for mod in ins.mods if mod in ("bfly", "idx"))
    names, value, other = ins.args[0].split("|"), *(machine.operand(arg, "b32") for arg in ins.args[1:3])
    lane = np.arange(machine.num_threads) % 32

    def run(mask):
        machine.whole_warps(mask)
        by = other().astype(np.int64) & 31
        source = np.arange(machine.num_threads) - lane + (lane ^ by if mode == "bfly" else by)
        machine.write(names[0], value()[source], mask)
        for name in names[1:]:
            machine.write(name, machine.all, mask)

    return run


@instruction("elect")
def elect(machine, ins):
    """One lane of each warp: here the first."""
    name, chosen = ins.args[0].split("|")

    def run(mask):
        machine.whole_warps(mask)
        machine.write(name, np.zeros(machine.num_threads, U32), mask)
        machine.write(chosen, machine.thread % 32 == 0, mask)

    return run


def fragment(registers, type_):
    """The 16 x 16 left operand of each warp from 4 registers of pairs: (warps, 16, 16) fp32.

    Lane l has row l / 4, columns 2 * (l % 4) and the next, of the upper left, lower left, upper right, lower right.
    """
    quarters = [decode(r.view(U16).reshape(-1, 8, 8), type_) for r in registers]
    return np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)], 2)


@instruction("mma")
def product(machine, ins):
    """(16, 8) = (16, 16) @ (16, 8) + (16, 8): products of halves are exact, sums in fp32."""
    type_ = ins.mods[-3]
    if "m16n8k16" not in ins.mods or ins.mods[-4] != "f32" or type_ not in ("bf16", "f16"):
        raise Fault("a matrix product that is not known here (tests/ptxsim)")
    out = vector(ins.args[0])
    a, b, c = ([machine.operand(name, "b32") for name in vector(arg)] for arg in ins.args[1:])

    def run(mask):
        machine.whole_warps(mask)
        left = fragment([get() for get in a], type_)
        right = np.concatenate([decode(get().view(U16).reshape(-1, 8, 8), type_) for get in b], 2)  # (warps, 8, 16)
        sums = [decode(get(), "f32").reshape(-1, 8, 4, 1) for get in c]
        acc = [np.concatenate(pair, 3).reshape(-1, 8, 8) for pair in (sums[:2], sums[2:])]
        result = left @ right.swapaxes(1, 2) + np.concatenate(acc, 1)
        halves = np.ascontiguousarray(result).reshape(-1, 2, 8, 4, 2)  # warp, upper or lower, row, column pair, column
        for i, name in enumerate(out):
            machine.write(name, np.ascontiguousarray(halves[:, i // 2, :, :, i % 2]).view(U32).reshape(-1), mask)

    return run
