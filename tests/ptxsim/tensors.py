"""What sm_90 adds to load tiles: mbarriers, tensor maps, copies of boxes of a tensor (TMA), and the fences.

A tensor copy comes at any time after it was asked for, NaN until then, and at the latest when all else stands still.
"""

from dataclasses import dataclass

import numpy as np

from .machine import Wait, instruction
from .memory import BASE
from .order import MAX_MBARRIERS
from .parse import vector
from .values import U8, Fault, decode

# ---------------------------------------------------------------- mbarriers


@dataclass
class Mbarrier:
    """A phase ends when all arrivals and all bytes have come."""

    count: int
    agent: int  # of the tensor copies that report here
    made_by: int
    made_at: int
    arrivals: int = 0  # still missing
    bytes: int = 0  # still missing
    phase: int = 0
    stamp: np.ndarray | None = None  # what those know who arrived up to the last phase that ended
    coming: np.ndarray | None = None

    def add(self, stamp):
        self.coming = stamp if self.coming is None else np.maximum(self.coming, stamp)

    def check(self):
        if self.arrivals < 0:
            raise Fault(f"more arrivals than the {self.count} that the mbarrier was made for")
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals, self.phase, self.stamp = self.count, self.phase ^ 1, self.coming


def _find(machine, at, warp):
    found = machine.mbarriers.get(at)
    if found is None:
        raise Fault(f"no mbarrier was made at shared byte {at}")
    if machine.order.of_threads()[warp, found.made_by] < found.made_at:
        raise Fault(f"race: warp {warp} uses an mbarrier that warp {found.made_by} made, with no barrier between")
    return found


@instruction("mbarrier")
def mbarrier(machine, ins):
    build = {"init": _init, "inval": _invalidate, "arrive": _arrive, "try_wait": _wait, "test_wait": _wait}
    if ins.mods[0] not in build:
        raise Fault("not known here (tests/ptxsim)")
    return build[ins.mods[0]](machine, ins)


def _threads(machine, mask, *gets):
    """(warp, values) of each active thread."""
    values = [get() for get in gets]
    return [(int(machine.warp_of[i]), *(int(v[i]) for v in values)) for i in np.flatnonzero(mask)]


def _init(machine, ins):
    address, count = machine.address(ins.args[0]), machine.operand(ins.args[1], "b32")

    def run(mask):
        for warp, at, number in _threads(machine, mask, address, count):
            machine.shared.check(np.array([at]), 8, "makes an mbarrier in")
            if at in machine.mbarriers:
                raise Fault("an mbarrier where there is one already")
            agent = machine.order.tensors + at // 8 % MAX_MBARRIERS
            others = {other.agent for place, other in machine.mbarriers.items() if place != at}
            while agent in others:
                agent = machine.order.tensors + (agent + 1 - machine.order.tensors) % MAX_MBARRIERS
            made = Mbarrier(number, agent, warp, int(machine.order.clock[warp]), arrivals=number)
            machine.mbarriers[at] = made

    return run


def _invalidate(machine, ins):
    address = machine.address(ins.args[0])

    def run(mask):
        for warp, at in _threads(machine, mask, address):
            if _find(machine, at, warp).bytes:
                raise Fault("an mbarrier ends with bytes under way")
            del machine.mbarriers[at]

    return run


def _arrive(machine, ins):
    arguments = ins.args if ins.args[0].startswith("[") else ins.args[1:]
    address, number = machine.address(arguments[0]), machine.operand(arguments[1] if arguments[1:] else "1", "b32")
    expects = "expect_tx" in ins.mods

    def run(mask):
        for warp, at, n in _threads(machine, mask, address, number):
            found = _find(machine, at, warp)
            found.bytes += n if expects else 0
            found.arrivals -= 1 if expects else n
            found.add(machine.order.release([warp]))
            found.check()

    return run


def _wait(machine, ins):
    """Triton tries until the phase has ended: here the first try waits for it."""
    done, (address, parity) = ins.args[0], (machine.address(ins.args[1]), machine.operand(ins.args[2], "b32"))

    def run(mask):
        machine.write(done, machine.all, mask)
        at, phase, waits = address(), parity() & 1, []
        for warp in machine.warps_in(mask):
            mine = mask & (machine.warp_of == warp)
            (place,), (which,) = np.unique(at[mine]), np.unique(phase[mine])
            waits.append(Wait(mine, _ready(machine, warp, _find(machine, int(place), warp), which)))
        return waits

    return run


def _ready(machine, warp, found, phase):
    def ready():
        if found.phase == phase:
            return False
        if found.stamp is not None:
            machine.order.acquire([warp], found.stamp)
        return True

    return ready


# ---------------------------------------------------------------- fences


@instruction("fence")
def fence(machine, ins):
    """Followed are what threads wrote and the asynchronous proxy reads, and tensor maps; not order in device memory."""
    if ins.mods[1].startswith("tensormap"):
        address = machine.address(ins.args[0])
        return lambda mask: _acquire_map(machine, mask, address)
    if ins.mods[:2] == ["proxy", "async"] or "async" in [mod.split("::")[0] for mod in ins.mods]:
        return lambda mask: machine.order.fence(machine.warps_in(mask))
    return lambda mask: None


# ---------------------------------------------------------------- tensor maps

# Ours of 128 bytes, for what Triton sets (the hardware's encoding is not public): field -> offset, bytes
_FIELDS = {"global_address": (0, 8), "global_dim": (8, 4), "global_stride": (32, 8), "box_dim": (64, 2)}
_FIELDS |= {"element_stride": (76, 2), "rank": (88, 1), "elemtype": (89, 1), "interleave_layout": (90, 1)}
_FIELDS |= {"swizzle_mode": (91, 1), "fill_mode": (92, 1)}
_HALVES = (6, 10)  # elemtype of fp16, bf16


@instruction("tensormap")
def tensor_map(machine, ins):
    if ins.mods[0] == "replace":
        return _replace(machine, ins)
    if ins.mods[0] == "cp_fenceproxy":
        return _publish(machine, ins)
    raise Fault("not known here (tests/ptxsim)")


def _replace(machine, ins):
    """One field of a map that is made in shared memory."""
    offset, size = _FIELDS[ins.mods[2]]
    if not ins.mods[3].startswith("shared"):
        raise Fault("a tensor map that is changed in device memory")
    index = int(ins.args[1], 0) if len(ins.args) == 3 else 0
    address, new = machine.address(ins.args[0]), machine.operand(ins.args[-1], ins.mods[-1])

    def run(mask):
        values = new().astype(f"u{max(size, new().itemsize)}").view(U8).reshape(machine.num_threads, -1)
        at = address() + offset + index * size
        machine.shared.store(at, list(values[:, :size].T), 1, mask, machine.warp_of)

    return run


def _publish(machine, ins):
    """A whole warp copies the map from shared to device memory."""
    to, source = (machine.address(arg) for arg in ins.args[:2])

    def run(mask):
        machine.whole_warps(mask)
        (first,), (at,) = np.unique(to()[mask]), np.unique(source()[mask])
        if first % 128:
            raise Fault("a tensor map that is not aligned to 128 bytes")
        lanes = mask & (machine.thread % 32 < 16)
        part = 8 * (machine.thread.astype(np.int64) % 32)
        words = machine.shared.load(at + part, 8, 1, lanes, machine.warp_of)
        machine.memory.store(first + part, words, 8, lanes, machine.program)
        machine.maps[int(first)] = None

    return run


def _acquire_map(machine, mask, address):
    """What is written to a map is seen by tensor copies after this fence: by which warp, at which of its clocks."""
    warp, at = int(machine.warps_in(mask)[0]), int(np.unique(address()[mask])[0])
    machine.maps[at] = (warp, int(machine.order.clock[warp]))
    machine.order.release([warp])


def _check_acquired(machine, warp, at):
    """Maps that came with the launch need no fence."""
    fence = machine.maps.get(at, (warp, 0))
    if fence is None or machine.order.of_threads()[warp, fence[0]] < fence[1]:
        raise Fault("a tensor map that was made by this program, with no fence.proxy.tensormap before its use")


@dataclass
class Map:
    """A tensor of two dimensions, innermost first."""

    address: int
    dims: list[int]
    stride: int  # bytes from row to row
    box: list[int]
    swizzle: int  # 0 to 3: none, rows of 32, 64, 128 bytes

    @classmethod
    def read(cls, raw):
        def field(name, index=0):
            offset, size = _FIELDS[name]
            return int.from_bytes(raw[offset + index * size : offset + (index + 1) * size].tobytes(), "little")

        if field("rank") != 1 or field("elemtype") not in _HALVES or field("interleave_layout") or field("fill_mode"):
            raise Fault("a tensor map of another rank, type, layout or fill than is known here (tests/ptxsim)")
        if [field("element_stride", i) for i in (0, 1)] != [1, 1]:
            raise Fault("a tensor map with steps between elements")
        dims, box = ([field(name, i) for i in (0, 1)] for name in ("global_dim", "box_dim"))
        found = cls(field("global_address") - BASE, dims, field("global_stride"), box, field("swizzle_mode"))
        if found.address % 16 or found.stride % 16:
            raise Fault(f"a tensor map with rows that are not aligned: {found}")
        if found.swizzle and 2 * box[0] > 16 << found.swizzle or max(box) > 256 or not min(dims):
            raise Fault(f"a tensor map that the hardware refuses: {found}")
        return found


def swizzled(offset, mode):
    """Where a byte of an unswizzled row-major box lies: bits 4 to 6 change places within rows of 32, 64, 128 bytes."""
    return offset ^ ((offset >> 7 & (1 << mode) - 1) << 4)


# ---------------------------------------------------------------- copies of boxes


def tensor_copy(machine, ins):
    kinds = [mod.split("::")[0] for mod in ins.mods]
    if "2d" not in kinds or kinds.index("global") < kinds.index("shared") or "mbarrier" not in kinds:
        raise Fault("a tensor copy that is not known here (tests/ptxsim)")
    to, (name, coordinates), barrier = ins.args[0], ins.args[1].strip("[] ").split(",", 1), ins.args[2]
    x, y = (machine.operand(c, "s32") for c in vector(coordinates.strip()))
    gets = machine.address(to), machine.operand(name.strip(), "b64"), x, y, machine.address(barrier)

    def run(mask):
        for warp, at, map_at, column, row, place in _threads(machine, mask, *gets):
            _check_acquired(machine, warp, map_at)
            raw = machine.memory.read_bytes(map_at - BASE + np.arange(128), machine.program, "a tensor map")
            first = [int(decode(np.array([c], np.uint32), "s32")[0]) for c in (column, row)]
            _begin_copy(machine, warp, at, Map.read(raw), first, _find(machine, place, warp))

    return run


def _box(machine, tensor, first):
    """The bytes of a box, row by row; zero outside of the tensor."""
    columns, rows = (start + np.arange(size) for start, size in zip(first, tensor.box))
    inside = ((rows >= 0) & (rows < tensor.dims[1]))[:, None] & ((columns >= 0) & (columns < tensor.dims[0]))
    offsets = (tensor.address + rows[:, None] * tensor.stride + columns * 2)[inside]
    data = np.zeros((*inside.shape, 2), U8)
    data[inside] = machine.memory.read_bytes(offsets[:, None] + np.arange(2), machine.program, "a tensor copy")
    return data.ravel()


def _begin_copy(machine, warp, at, tensor, first, barrier):
    if at % (128 if tensor.swizzle == 0 else 128 << tensor.swizzle):
        raise Fault(f"a tensor copy to shared byte {at}, which is not aligned for swizzle {tensor.swizzle}")
    data = _box(machine, tensor, first)
    machine.shared.check(np.array([at, at + data.size - 16]), 16, "copies to")
    where = swizzled(at + np.arange(data.size), tensor.swizzle)
    clock, order = machine.order.start(barrier.agent), machine.order
    known = order.of_proxy([warp])
    machine.shared.note_write(where, barrier.agent, clock, known, seen=order.seen_by([warp]))
    machine.shared.bytes[where] = 0xFF

    def come():
        machine.shared.bytes[where] = data
        barrier.bytes -= data.size
        stamp = np.zeros((2, order.known.shape[2]), np.int32)
        stamp[:, barrier.agent] = clock
        barrier.add(stamp)
        barrier.check()

    machine.under_way.append(come)
