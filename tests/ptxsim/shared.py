"""Shared memory of one program: bytes, and of each byte who wrote it last and when each agent read it last."""

import numpy as np

from .order import Order
from .values import U8, UNSIGNED_OF_BYTES, Fault


class Shared:
    def __init__(self, size, order: Order):
        self.size, self.order = size, order
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, U8)
        self.writer = np.full(size, -1, np.int16)
        self.written = np.zeros(size, np.int32)
        self.read = np.zeros((size, order.readers), np.int32)

    def check(self, at, size, does):
        """at: byte offsets, of accesses of `size` bytes."""
        if at.size and ((at < 0) | (at + size > self.size)).any():
            raise Fault(f"{does} beyond shared memory: {at.min()} to {at.max() + size} of {self.size} bytes")
        if (at % min(size, 16)).any():
            raise Fault(f"{does} {size} bytes of shared memory that are not aligned")

    def load(self, at, size, count, mask, warp_of):
        self.check(at[mask], size * count, "reads")
        self._threads(self.note_read, at, size * count, mask, warp_of)
        memory, at = self.bytes.view(UNSIGNED_OF_BYTES[size]), np.where(mask, at, 0)
        return [memory[at // size + j] for j in range(count)]

    def store(self, at, values, size, mask, warp_of):
        self.check(at[mask], size * len(values), "writes")
        self._threads(self.note_write, at, size * len(values), mask, warp_of)
        memory, at = self.bytes.view(UNSIGNED_OF_BYTES[size]), at[mask]
        for j, value in enumerate(values):
            memory[at // size + j] = value[mask].astype(memory.dtype)

    def _threads(self, note, at, size, mask, warp_of):
        if mask.any():
            warps = np.repeat(warp_of[mask], size)
            where = (at[mask][:, None] + np.arange(size)).ravel()
            note(where, warps, self.order.clock[warps], self.order.of_threads(), warps)

    def note_read(self, at, agent, clock, known, who=0):
        """`agent` reads the bytes at `at`; known[who] is what it may rely on."""
        writer = self.writer[at]
        if (writer < 0).any():
            raise Fault(f"{self._name(agent, writer < 0)} reads shared byte {at[writer < 0][0]}, which nothing wrote")
        self._refuse(known[who, writer] < self.written[at], at, agent, "reads", "written by", writer)
        self.read[at, agent] = clock

    def note_write(self, at, agent, clock, known, who=0, seen=None):
        """The same. seen: what it may rely on about reads, where that differs (a write after a read needs no fence)."""
        writer = self.writer[at]
        self._refuse((writer >= 0) & (known[who, writer] < self.written[at]), at, agent, "writes", "written by", writer)
        readers = (known if seen is None else seen)[:, : self.order.readers]
        unordered = self.read[at] > readers[who]
        self._refuse(unordered.any(1), at, agent, "writes", "read by", unordered.argmax(1))
        self.writer[at], self.written[at] = agent, clock

    def _name(self, agent, which):
        return self.order.name(agent if np.ndim(agent) == 0 else agent[which][0])

    def _refuse(self, race, at, agent, does, other_did, others):
        if race.any():
            other = self.order.name(others[race][0])
            text = f"race: {self._name(agent, race)} {does} shared byte {at[race][0]}, {other_did} {other}"
            raise Fault(f"{text}, with no barrier, wait or fence between")
