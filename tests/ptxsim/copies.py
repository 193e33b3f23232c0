"""cp.async: copies from device memory to shared memory in the background, of each warp for itself.

They come as late as they may, when a wait says that they must have come; until then NaN stands there.
"""

import numpy as np

from .machine import instruction
from .memory import BASE
from .tensors import tensor_copy
from .values import U8, Fault


@instruction("cp")
def copy(machine, ins):
    if "tensor" in ins.mods:
        return tensor_copy(machine, ins)
    if "bulk" in ins.mods:  # groups of bulk copies to device memory: there are none
        return _nothing_to_wait_for(ins)
    if "commit_group" in ins.mods:
        return lambda mask: _commit(machine, mask)
    if "wait_group" in ins.mods or "wait_all" in ins.mods:
        newest = int(ins.args[0]) if ins.args else 0
        return lambda mask: _wait(machine, mask, newest)
    return _copy(machine, ins)


def _nothing_to_wait_for(ins):
    if "commit_group" not in ins.mods and "wait_group" not in ins.mods:
        raise Fault("a bulk copy without a tensor map is not known here (tests/ptxsim)")
    return lambda mask: None


def _copy(machine, ins):
    """Each thread `size` bytes, the first `some` of them from device memory and zeros after these."""
    to, source = (machine.address(arg) for arg in ins.args[:2])
    size = int(ins.args[2], 0)
    some = machine.operand(ins.args[3] if len(ins.args) > 3 else ins.args[2], "b32")

    def run(mask):
        at, taken = to()[mask], some()[mask].astype(np.int64)
        offset = np.where(taken > 0, source()[mask] - BASE, 0)
        machine.shared.check(at, size, "copies to")
        if (offset % size).any():
            raise Fault(f"copies {size} bytes of device memory that are not aligned")
        inside = np.arange(size) < taken[:, None]
        data = np.zeros(inside.shape, U8)
        data[inside] = machine.memory.read_bytes((offset[:, None] + np.arange(size))[inside], machine.program, "a copy")
        where, warps = at[:, None] + np.arange(size), machine.warp_of[mask]
        for warp in np.unique(warps):
            _begin(machine, warp, where[warps == warp].ravel(), data[warps == warp].ravel())

    return run


def _begin(machine, warp, where, data):
    agent = machine.order.copies + warp
    clock = machine.order.start(agent)
    machine.shared.note_write(where, agent, clock, machine.order.of_threads(), warp)
    machine.shared.bytes[where] = 0xFF
    machine.copies[warp][0].append((where, data, clock))


def _commit(machine, mask):
    for warp in machine.warps_in(mask):
        begun, groups = machine.copies[warp]
        groups.append(list(begun))
        begun.clear()


def _wait(machine, mask, newest):
    """Until at most the `newest` groups are under way."""
    for warp in machine.warps_in(mask):
        groups = machine.copies[warp][1]
        while len(groups) > newest:
            for where, data, clock in groups.pop(0):
                machine.shared.bytes[where] = data
                machine.order.finish([warp], machine.order.copies + warp, clock)
