"""Device memory of one launch: copies of the host's tensors, with gaps between them that nobody may touch."""

import numpy as np

from .values import U8, UNSIGNED_OF_BYTES, Fault

BASE = 0x7000_0000_0000  # an address that is no host's and no offset
ALIGNMENT = 512  # what a CUDA allocation has
GAP = 512  # at least, between two allocations


class Global:
    """`add` allocations, `begin`, run programs, `end`: only then the host's arrays have what was written."""

    def __init__(self):
        self._allocations, self._size = [], GAP

    def add(self, array, elements=None, phase=0):
        """The address of a numpy uint8 array, at `phase` bytes after an aligned one. elements: a mask of the bytes that
        may be touched (default: all)."""
        at = self._size + phase
        self._allocations.append((at, array, elements))
        self._size = -(-(at + array.size + GAP) // ALIGNMENT) * ALIGNMENT
        return BASE + at

    def begin(self):
        self.bytes = np.zeros(self._size, U8)
        self.valid = np.zeros(self._size, U8)  # 0xFF: belongs to a tensor
        self.owner = np.zeros(self._size, np.int32)  # the program that wrote it, from 1 on; of an element's first byte
        for at, array, elements in self._allocations:
            self.bytes[at : at + array.size] = array
            self.valid[at : at + array.size] = 0xFF if elements is None else np.where(elements, U8(0xFF), U8(0))

    def end(self):
        for at, array, _ in self._allocations:
            array[:] = self.bytes[at : at + array.size]

    def detach(self):
        """Arrays of its own: for another launch when the tensors may be gone."""
        self._allocations = [(at, array.copy(), elements) for at, array, elements in self._allocations]

    def load(self, address, size, count, mask, program):
        """`count` values of `size` bytes from each active thread's address: arrays for all threads."""
        at = self._check(address, size, count, mask, program, "reads")
        memory = self.bytes.view(UNSIGNED_OF_BYTES[size])
        return [memory[at // size + j] for j in range(count)]

    def store(self, address, values, size, mask, program):
        at = self._check(address, size, len(values), mask, program, "writes")[mask]
        memory = self.bytes.view(UNSIGNED_OF_BYTES[size])
        for j, value in enumerate(values):
            memory[at // size + j] = value[mask].astype(memory.dtype)
            self.owner[at + j * size] = program + 1

    def _check(self, address, size, count, mask, program, does):
        """The offsets of active threads; others' are 0."""
        at = np.where(mask, address - BASE, 0)
        if (at % (size * count)).any():
            raise Fault(f"{does} {size * count} bytes of device memory that are not aligned")
        if ((at < 0) | (at + size * count > self._size)).any():
            raise Fault(f"{does} outside of device memory: {address[mask].min():#x}")
        full = np.iinfo(UNSIGNED_OF_BYTES[size]).max
        valid = self.valid.view(UNSIGNED_OF_BYTES[size])
        for j in range(count):
            beyond = mask & (valid[at // size + j] != full)
            if beyond.any():
                thread = int(np.flatnonzero(beyond)[0])
                raise Fault(f"thread {thread} of program {program} {does} {size * count} bytes beyond a tensor")
            self.only_mine(at[mask] + j * size, program, does)
        return at

    def only_mine(self, offsets, program, does):
        """Programs run in any order: none may touch what another wrote."""
        owner = self.owner[offsets]
        if ((owner != 0) & (owner != program + 1)).any():
            raise Fault(f"program {program} {does} what program {owner[owner != program + 1].max() - 1} wrote")

    def read_bytes(self, offsets, program, what):
        """Any number of bytes for a copy in the background, each checked. offsets: from BASE."""
        if offsets.size and ((offsets < 0) | (offsets >= self._size)).any():
            raise Fault(f"{what}: reads outside of device memory")
        if not self.valid[offsets].all():
            raise Fault(f"{what}: reads beyond a tensor")
        self.only_mine(offsets, program, "copies")
        return self.bytes[offsets]
