"""Loads and stores, also of the 8 x 8 matrices that a warp holds in its registers (ldmatrix, stmatrix)."""

import numpy as np

from .machine import PARAM, instruction
from .parse import vector
from .values import SIGNED, U16, U32, U64, UNSIGNED_OF_BYTES, Fault, num_bytes


def _space(ins):
    for mod in ins.mods:
        if mod in ("global", "param") or mod.startswith("shared"):
            return mod.split("::")[0]
    raise Fault("an access to a memory that is not named")


@instruction("ld")
def load(machine, ins):
    type_, names, address = ins.mods[-1], vector(ins.args[0]), machine.address(ins.args[1])
    size, count, space = num_bytes(type_), len(names), _space(ins)

    def run(mask):
        if space == "global":
            values = machine.memory.load(address(), size, count, mask, machine.program)
        elif space == "shared":
            values = machine.shared.load(address(), size, count, mask, machine.warp_of)
        else:
            memory, at = machine.params.view(UNSIGNED_OF_BYTES[size]), (address() - PARAM) // size
            values = [memory[at + j] for j in range(count)]
        for name, value in zip(names, values):
            if type_ in SIGNED and name != "_":  # the sign fills a wider register
                register = machine.dtypes[machine.index[name]]
                value = value.view(SIGNED[type_]).astype(f"i{register.itemsize}").view(register)
            machine.write(name, value, mask)

    return run


@instruction("st")
def store(machine, ins):
    type_, address = ins.mods[-1], machine.address(ins.args[0])
    gets = [machine.operand(name, type_) for name in vector(ins.args[1])]
    size, space = num_bytes(type_), _space(ins)

    def run(mask):
        values = [get() for get in gets]
        if space == "global":
            machine.memory.store(address(), values, size, mask, machine.program)
        else:
            machine.shared.store(address(), values, size, mask, machine.warp_of)

    return run


def _count(ins):
    return int(next(mod for mod in ins.mods if mod in ("x1", "x2", "x4"))[1:])


def _naming_rows(machine, count, mask):
    """Lane l gives the address of row l % 8 of matrix l / 8: the threads that do."""
    machine.whole_warps(mask)
    return mask & (machine.thread % 32 < 8 * count)


@instruction("ldmatrix")
def load_matrix(machine, ins):
    """Lane l gets row l / 4, elements 2 * (l % 4) and the next; with .trans of the transposed matrix."""
    count, names, address = _count(ins), vector(ins.args[0]), machine.address(ins.args[1])

    def run(mask):
        lanes = _naming_rows(machine, count, mask)
        rows = np.stack(machine.shared.load(address(), 8, 2, lanes, machine.warp_of), 1)  # two times 8 bytes
        matrices = rows.view(U16).reshape(machine.warps, 4, 8, 8)
        if "trans" in ins.mods:
            matrices = matrices.swapaxes(2, 3)
        for name, matrix in zip(names, matrices.swapaxes(0, 1)):
            machine.write(name, np.ascontiguousarray(matrix).view(U32).reshape(-1), mask)

    return run


@instruction("stmatrix")
def store_matrix(machine, ins):
    count, address = _count(ins), machine.address(ins.args[0])
    gets = [machine.operand(name, "b32") for name in vector(ins.args[1])]

    def run(mask):
        lanes = _naming_rows(machine, count, mask)
        matrices = np.stack([get() for get in gets], 1).reshape(-1, 32, count).swapaxes(1, 2)  # (warps, count, lanes)
        matrices = np.ascontiguousarray(matrices).view(U16).reshape(-1, count, 8, 8)
        if "trans" in ins.mods:
            matrices = matrices.swapaxes(2, 3)
        rows = np.zeros((machine.warps, 4, 8, 2), U64)
        rows[:, :count] = np.ascontiguousarray(matrices).view(U64)
        machine.shared.store(address(), list(rows.reshape(-1, 2).T), 8, lanes, machine.warp_of)

    return run
