"""What a full-parameter training makes of a streamed model's layers: their weights, and the optimiser's state.

    store = LayerStore(copies, budget, directory)      # by `LayerStream.writable`
    up and down:   weights of a layer  -> device       from here once they were written, else from the model's files
    down:          state of the layer  -> device, update; weights and state -> here

One buffer a layer for the weights and one for the state, made when they are written first: in main memory (pinned for a
GPU) as long as `budget` lasts, then in memory-mapped files, which are unlinked at once. To begin anew from the model's
files nothing is copied: `reset` forgets that anything was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from kunbr_fast.memory import LESS, OutOfMemory, Place, free_host_bytes, gibibytes, pinned_bytes
from kunbr_fast.model.layer_buffers import Buffer, Copies

CPU = torch.device("cpu")
ALIGNMENT = 256  # of a tensor in its buffer, in bytes


class Layout(dict[str, tuple[slice, torch.dtype, torch.Size]]):
    """Where each of some tensors lies in a flat buffer."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        end = 0
        for name, tensor in tensors.items():
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            self[name] = slice(end, end + size), tensor.dtype, tensor.shape
            end += -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def size(self) -> int:
        """Of the buffer."""
        return max((place.stop for place, _, _ in self.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(place.stop - place.start for place, _, _ in self.values())

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: flat[place].view(dtype).view(shape) for name, (place, dtype, shape) in self.items()}


class LayerStore:
    """copies: of the weights; the state has its own, as neither is to wait behind the other. budget: bytes of main
    memory; directory: of the files."""

    def __init__(self, copies: Copies, budget: int, directory: str | Path | None):
        self._copies, self._state_copies, self._directory = copies, Copies(copies.device), directory
        self._left = budget
        self._made: dict[tuple[str, int], torch.Tensor] = {}
        self._on_host: set[tuple[str, int]] = set()  # of these, what counts against the budget
        self._written: dict[tuple[str, int], Future] = {}
        self.layouts: dict[int, Layout] = {}  # of the state
        self._buffers: list[Buffer] = []
        self._loading: dict[int, Buffer] = {}

    def __contains__(self, layer: int) -> bool:
        """Whether it has the layer's weights."""
        return ("weights", layer) in self._written

    def reset(self) -> None:
        """Nothing was written; of a copy that failed nobody hears."""
        for job in self._written.values():
            job.exception()
        self._written.clear()
        self.layouts.clear()
        self.forget_loading()

    def _of(self, what: str, layer: int, size: int) -> torch.Tensor:
        """A buffer to write to."""
        key = what, layer
        if key not in self._made or self._made[key].numel() < size:
            if (smaller := self._made.pop(key, None)) is not None and key in self._on_host:
                self._on_host.remove(key)
                self._left += smaller.numel()
            del smaller
            on_host = size <= self._left
            if on_host and size > (free := free_host_bytes()):
                needs = f"the {what} of layer {layer} take {gibibytes(size)}, {gibibytes(free)} are free"
                raise OutOfMemory(f"main memory: {needs}: {LESS}")
            if on_host and self._copies.cuda:
                self._made[key] = pinned_bytes(size)
            else:
                place = Place("host" if on_host else "file", self._directory)
                self._made[key] = place.allocate((size,), torch.uint8, CPU, f"{what} of layer {layer}")
            if on_host:
                self._on_host.add(key)
                self._left -= size
        return self._made[key]

    # ------------------------------------------------ weights

    def write(self, layer: int, buffer: Buffer, size: int) -> None:
        """Begins to take a layer's weights, `size` bytes, from the device."""
        self._written["weights", layer] = self._copies.drain(buffer, size, self._of("weights", layer, size))

    def weights(self, layer: int) -> torch.Tensor:
        """The flat weights of a layer that was written."""
        self._written["weights", layer].result()
        return self._made["weights", layer]

    def put_weights(self, layer: int, size: int) -> torch.Tensor:
        """Where a layer's flat weights are to be filled in, from main memory."""
        flat = self._of("weights", layer, size)
        self._written["weights", layer] = done()
        return flat

    # ------------------------------------------------ optimiser state

    def expect_state(self, layer: int) -> int:
        """Begins to bring a layer's state to the device, where there is one; how many bytes that are."""
        if ("state", layer) not in self._written:
            return 0
        layout, written = self.layouts[layer], self._written["state", layer]
        if not self._copies.cuda:
            return layout.nbytes
        buffer = self._free(layout.size)
        self._loading[layer] = buffer

        def source(staging: torch.Tensor) -> torch.Tensor:
            written.result()
            return self._made["state", layer]

        self._state_copies.fill(buffer, layout.size, source)
        return layout.nbytes

    def state(self, layer: int) -> dict[str, torch.Tensor]:
        """The state that was expected, on the device (on a CPU where it lies): to be updated in place, and given to
        `write_state`."""
        if not self._copies.cuda:
            return self.stored_state(layer)
        if layer not in self._loading:
            return {}
        buffer = self._loading[layer]
        buffer.arrive()
        return self.layouts[layer].views(buffer.data)

    def write_state(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> int:
        """Begins to take a layer's state from the device; how many bytes that are. tensors: those of `state`, where it
        had any."""
        if not tensors:
            return 0
        layout, buffer = self.layouts.get(layer), self._loading.pop(layer, None)
        if layout is None or layout.keys() != tensors.keys():  # a parameter's first gradient may come late
            if layout is not None:  # some lie where others of them are going to
                tensors = {name: value.clone() for name, value in tensors.items()}
            if buffer is not None:
                buffer.wait()
            layout, buffer = Layout(tensors), None
            self.layouts[layer] = layout
        target = self._of("state", layer, layout.size)
        if self._copies.cuda and buffer is None:
            buffer = self._free(layout.size)
            buffer.wait()
        for name, view in layout.views(buffer.data if self._copies.cuda else target).items():
            if view.data_ptr() != tensors[name].data_ptr():
                view.copy_(tensors[name])
        drain = self._state_copies.drain
        self._written["state", layer] = drain(buffer, layout.size, target) if self._copies.cuda else done()
        return layout.nbytes

    def stored_state(self, layer: int) -> dict[str, torch.Tensor]:
        """In main memory, what was written: the tensors themselves."""
        if ("state", layer) not in self._written:
            return {}
        self._written["state", layer].result()
        return self.layouts[layer].views(self._made["state", layer])

    def put_state(self, layer: int, values: Mapping[str, torch.Tensor]) -> None:
        """Takes a layer's state from main memory: a checkpoint's."""
        layout = self.layouts[layer] = Layout(values)
        target = self._of("state", layer, layout.size)
        for name, view in layout.views(target).items():
            view.copy_(values[name])
        self._written["state", layer] = done()

    def forget_loading(self) -> None:
        """What was expected, by a step that ended in the middle, is not going to be asked for."""
        for buffer in self._loading.values():
            buffer.wait()
        self._loading.clear()

    def _free(self, size: int) -> Buffer:
        """One of two buffers: while one layer's state is updated the last one's may still be on its way out."""
        if self._buffers and self._buffers[0].data.numel() < size:
            for buffer in self._buffers:
                buffer.wait()
            self._buffers.clear()
        while len(self._buffers) < 2:
            self._buffers.append(Buffer(size, self._state_copies))
        used = {id(buffer) for buffer in self._loading.values()}
        found = next(buffer for buffer in self._buffers if id(buffer) not in used)
        self._buffers.remove(found)
        self._buffers.append(found)  # the one that was used longest ago is the next one
        return found


def done() -> Future:
    """A copy that has ended."""
    job: Future = Future()
    job.set_result(None)
    return job
