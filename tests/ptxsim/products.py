"""wgmma: matrix products of a warpgroup, in the background, with operands in shared memory.

They come when a wait says that they must have come. Until then their sums are NaN, so that a use too early shows. Only
moves to other registers before the wait count for nothing: LLVM makes them, ptxas resolves them to the same registers.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .machine import instruction
from .parse import vector
from .tensors import swizzled
from .values import U16, U32, Fault, decode
from .warps import fragment


@dataclass
class Queue:
    """Of one warpgroup. `sums`: registers of products under way, with the value that the next product adds to; `uses`:
    how many products of each are to come; `moves`: registers that will have the same sums."""

    begun: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    sums: dict = field(default_factory=dict)
    uses: Counter = field(default_factory=Counter)
    moves: dict = field(default_factory=dict)


def follow_move(machine, source, to):
    """What is moved before it came will come to both. A register's bits are replaced, never changed, by what writes it:
    so they tell whether it is still the moved one that is read."""
    for queue in machine.products.values():
        if source in queue.sums:
            queue.moves.setdefault(source, set()).add(to)
            machine.moved[to] = machine.registers[machine.index[to]] = machine.registers[machine.index[to]].copy()


@instruction("wgmma")
def warpgroup(machine, ins):
    if ins.mods[0] == "fence":  # orders registers, which a product here takes at once
        return lambda mask: None
    if ins.mods[0] == "commit_group":
        return lambda mask: _commit(machine, mask)
    if ins.mods[0] == "wait_group":
        return lambda mask: _wait(machine, mask, int(ins.args[0]))
    return _product(machine, ins)


def _groups(machine, mask):
    """The warpgroups that are active, as a whole."""
    groups = mask.reshape(-1, 128)
    if (groups.any(1) != groups.all(1)).any():
        raise Fault("a part of a warpgroup runs what the whole warpgroup must run")
    return [int(group) for group in np.flatnonzero(groups[:, 0])]


def _commit(machine, mask):
    for group in _groups(machine, mask):
        queue = machine.products.setdefault(group, Queue())
        queue.groups.append(queue.begun)
        queue.begun = []


def _wait(machine, mask, newest):
    for group in _groups(machine, mask):
        queue = machine.products.setdefault(group, Queue())
        while len(queue.groups) > newest:
            for come, clock in queue.groups.pop(0):
                come()
                warps = 4 * group + np.arange(4)
                machine.order.finish(warps, machine.order.products + group, clock)


def addresses(descriptor, rows, transposed):
    """Where the (rows, 16) elements of an operand lie. transposed: rows of memory run along M or N, not along k.

    PTX ISA, "Matrix-descriptor format" and "Strides": addresses and byte offsets in units of 16.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3]  # as a tensor map counts
    if descriptor >> 49 & 7 or mode == 0:
        raise Fault("a descriptor without swizzle or with a base offset is not known here (tests/ptxsim)")
    width = 16 << mode
    row, k = np.arange(rows)[:, None], np.arange(16)
    if transposed:
        per = width // 2
        linear = start + row // per * leading + k // 8 * stride + k % 8 * width + row % per * 2
    else:
        linear = start + row // 8 * stride + row % 8 * width + k * 2
    return swizzled(linear, mode)


def _operand(machine, group, clock, descriptor, rows, transposed, type_):
    """Notes that the operand is read; gives what takes it when the product comes."""
    at, order = addresses(descriptor, rows, transposed), machine.order
    machine.shared.check(at, 2, "reads")
    known, agent = order.of_proxy(4 * group + np.arange(4)), order.products + group
    machine.shared.note_read(np.stack([at, at + 1]).ravel(), agent, clock, known)
    return lambda: decode(machine.shared.bytes.view(U16)[at >> 1], type_)


def _product(machine, ins):
    """(64, N) = or += (64, 16) @ (16, N): products of halves are exact, sums in fp32."""
    columns = int(re.fullmatch(r"m64n(\d+)k16", ins.mods[3])[1])
    names, type_, rest = vector(ins.args[0]), ins.mods[-1], ins.args[1:]
    if ins.mods[-3] != "f32" or rest[3:5] != ["1", "1"]:
        raise Fault("a matrix product that is not known here (tests/ptxsim)")
    in_registers = rest[0].startswith("{")
    a = [machine.operand(name, "b32" if in_registers else "b64") for name in vector(rest[0])]
    b, adds = machine.operand(rest[1], "b64"), machine.operand(rest[2], "pred")
    transposed = [False, *(x == "1" for x in rest[5:])][-2:]

    def run(mask):
        for group in _groups(machine, mask):
            first, clock = 128 * group, machine.order.start(machine.order.products + group)
            lanes = slice(first, first + 128)
            if in_registers:
                values = fragment([np.ascontiguousarray(get()[lanes]) for get in a], type_).reshape(64, 16)
                left = lambda values=values: values  # noqa: E731
            else:
                left = _operand(machine, group, clock, int(a[0]()[first]), 64, transposed[0], type_)
            right = _operand(machine, group, clock, int(b()[first]), columns, transposed[1], type_)
            _begin(machine, group, names, (left, right, bool(adds()[first]), clock))

    return run


def _begin(machine, group, names, work):
    left, right, adds, clock = work
    queue, lanes = machine.products.setdefault(group, Queue()), slice(128 * group, 128 * group + 128)
    for name in names:
        if name in queue.moves:
            raise Fault(f"a product adds to {name}, which was moved before it came")
        if name not in queue.sums:
            queue.sums[name] = machine.registers[machine.index[name]][lanes].copy()
        queue.uses[name] += 1
        _set(machine, name, lanes, 0xFFFFFFFF)

    def come():
        product = left() @ right().T
        parts = product.reshape(4, 2, 8, -1, 4, 2)  # warp, upper or lower, row, 8 columns, column pair, column
        for i, name in enumerate(names):
            part = np.ascontiguousarray(parts[:, i // 2 % 2, :, i // 4, :, i % 2]).reshape(128)
            new = (part + decode(queue.sums[name], "f32") if adds else part).view(U32)
            queue.sums[name] = new
            queue.uses[name] -= 1
            if queue.uses[name] == 0:
                del queue.sums[name]
                _set(machine, name, lanes, new)
                for to in queue.moves.pop(name, ()):
                    if machine.registers[machine.index[to]] is machine.moved[to]:
                        machine.moved[to][lanes] = new

    queue.begun.append((come, clock))


def _set(machine, name, lanes, bits):
    register = machine.registers[machine.index[name]].copy()
    register[lanes] = bits
    machine.registers[machine.index[name]] = register
