"""The weights of a model whose layers are in files: read by name, and put in place when a layer runs.

A hook before each layer's forward does this, so any code that runs the layers one after the other works. Code that
knows the order beforehand says so (`visit`), and no layer is read in vain. `streaming` opens such a model.

A layer goes from its file, cast to the model's dtype, on a CPU into a buffer; on a GPU into a pinned buffer, and from
there, on a CUDA stream of its own, into a buffer on the device (`layer_buffers`). A thread does this for the next layer
while the present one computes. As many layers as `host_bytes` allows stay in main memory once they were read, and only
cross the bus from then on. The first layers, as many as `resident` says, stay on the device.

Inside `writable` a training may change the layers: what it has written comes back from a `LayerStore`.

The parameters of a layer in no buffer are placeholders: one NaN, expanded to the parameter's shape, so that shapes,
dtypes and devices are right and nothing computed from it can be mistaken for a result.

An H200 has run the CUDA part (`tests/training/test_streamed_gpu.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from kunbr_fast.files.parameters import Piece
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.tensors import placeholder
from kunbr_fast.memory import free_host_bytes, pinned_bytes
from kunbr_fast.model.layer_buffers import Buffer, Copies
from kunbr_fast.model.layer_files import Entry, LayerFiles
from kunbr_fast.model.layer_store import LayerStore, Layout, done
from kunbr_fast.model.weights import CARRIED


class _Slot(Buffer):
    """A buffer for one layer. layer: whose weights it holds or is loading; elsewhere: where they lie and are used, in
    place of the buffer."""

    layer: int | None = None
    elsewhere: torch.Tensor | None = None


class LayerStream(LayerFiles):
    """The weights of a model whose layers are in files. Made by `open_streamed`.

    buffers: how many layers are in place at a time, the next one's load included. host_bytes: the most main memory that
    `host` takes, or what is written inside `writable` (None: nothing, and half of what is free). resident: how many of
    the first layers stay on the device.
    loads: how often each layer has been put into a buffer; reads: how often it came from the files (and not from
    `host`, the layers kept in main memory, or from `store`); nbytes: what the buffers take, on the device.
    traffic: bytes to the device and from it: weights_in, weights_out, state_in, state_out.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        shards: Shards,
        sources: Mapping[str, list[Piece]],
        buffers: int,
        host_bytes: int | None,
        resident: int = 0,
    ):
        if buffers < 2:
            raise ValueError(f"buffers={buffers}: expected at least 2, one to compute with and one to fill")
        self.loads, self.traffic = Counter(), Counter()
        self.store: LayerStore | None = None
        self._transforms: list[Callable[[int], None]] = []
        self._own: dict[int, _Slot] = {}  # of resident layers
        self._dirty: set[int] = set()  # of the resident ones, what a training has changed
        self.host: dict[int, torch.Tensor] = {}
        self._host_bytes = host_bytes
        self.device = model.get_input_embeddings().weight.device
        self._nothing: dict[torch.dtype, torch.Tensor] = {}
        path = next(name for name, module in model.named_modules() if module is layers)
        entries = [self._lay_out(f"{path}.{i}", layer, i) for i, layer in enumerate(layers)]
        super().__init__(model, entries, shards, sources)
        self._sizes = [max(entry.place.stop for entry in own) for own in entries]
        self._weights = [sum(entry.place.stop - entry.place.start for entry in own) for own in entries]
        self._buffers = min(buffers, len(layers))
        self.copies = Copies(self.device)
        self._held: set[int] = set()
        self._last = 0
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._before_forward, number))
        layers.register_state_dict_pre_hook(_refuse_state)
        layers.__dict__[CARRIED] = self
        self.reside(resident)

    def _lay_out(self, path: str, layer: nn.Module, number: int) -> list[Entry]:
        """The layer's parameters one after the other; they become placeholders."""
        metas, made = {}, {}
        for module_name, module in layer.named_modules():
            for key, meta in module.named_parameters(recurse=False):
                name = ".".join(part for part in (path, module_name, key) if part)
                metas[name] = meta
                made[name] = nn.Parameter(self._placeholder(meta), requires_grad=False)
                setattr(module, key, made[name])
        return [Entry(name, made[name], number, place) for name, (place, _, _) in Layout(metas).items()]

    def _placeholder(self, like: torch.Tensor) -> torch.Tensor:
        if like.dtype not in self._nothing:
            self._nothing[like.dtype] = placeholder((), like.dtype, self.device)
        return self._nothing[like.dtype].expand(like.shape)

    @functools.cached_property
    def _slots(self) -> list[_Slot]:
        """Made when the first layer is loaded: a model that is only read from has none."""
        return [_Slot(max(self._sizes), self.copies) for _ in range(self._buffers)]

    def _own_slot(self, layer: int) -> _Slot:
        """Of a resident layer."""
        if layer not in self._own:
            self._own[layer] = _Slot(self._sizes[layer], self.copies)
        return self._own[layer]

    def _all_slots(self) -> list[_Slot]:
        """That there are."""
        return [*self.__dict__.get("_slots", ()), *self._own.values()]

    def reside(self, count: int) -> None:
        """From now on the first `count` layers stay on the device."""
        if not 0 <= count <= len(self._entries):
            raise ValueError(f"resident_layers={count}: expected 0 to {len(self._entries)}, the model's layers")
        self.release()
        self.resident = range(count)

    @property
    def nbytes(self) -> int:
        return self._buffers * max(self._sizes) + sum(self._sizes[layer] for layer in self.resident)

    def __deepcopy__(self, memo: Any) -> LayerStream:
        raise TypeError("a streamed model cannot be copied: open it once more with open_streamed")

    # ------------------------------------------------ what runs where

    def visit(self, order: Iterable[int]) -> Iterator[int]:
        """The layers of `order`, each with its weights in place, while the next ones of `order` are being read."""
        order = list(order)
        for number, layer in enumerate(order):
            self.load(layer, order[number + 1 :])
            yield layer

    def load(self, layer: int, then: Iterable[int] = ()) -> None:
        """Puts the layer's weights in place (on a GPU: for what is launched from now on), and starts loading the next
        ones, as far as there are buffers."""
        wanted: list[int] = []
        for number in (layer, *then):
            if len(wanted) == self._buffers:
                break
            if number not in self._held and number not in wanted:
                wanted.append(number)
        self._last = layer
        if not wanted:  # all held: no buffer is made for them
            return
        slots = {slot.layer: slot for slot in (*self._slots, *self._own.values())}
        free = [slot for slot in self._slots if slot.layer not in wanted]
        for number in wanted:
            if number not in slots:
                slots[number] = self._own_slot(number) if number in self.resident else free.pop(0)
                self._start(slots[number], number)
        if layer not in self._held and slots[layer].loading is not None:
            self._arrive(slots[layer])

    def _before_forward(self, layer: int, module: nn.Module, args: tuple) -> None:
        """Loads a layer's weights unless they are in place, and orders the next one's, in the direction in which the
        layers have been going."""
        if getattr(module.__dict__.get("forward"), "computes_nothing", False):  # Decoder's recorder
            return
        if layer in self._held or self._in_place(layer) is not None:
            return
        following = layer + (1 if layer >= self._last else -1)
        self.load(layer, [following] if 0 <= following < len(self._entries) else ())

    @contextlib.contextmanager
    def held(self, layers: range) -> Iterator[None]:
        """Inside, these layers' parameters are the caller's: they are not loaded and not touched. They must be as they
        were on entry, placeholders, when this is left."""
        for slot in self._all_slots():
            slot.wait()  # no thread reads these layers meanwhile
            if slot.layer in layers:
                self._leave(slot)
        before = set(self._held)
        self._held |= set(layers)
        try:
            yield
        finally:
            self._held = before

    def _read_anew(self, names: Iterable[str]) -> None:
        """Drops what has been read of these parameters."""
        layers = {self._stored[name].layer for name in names if name in self._stored}
        for slot in self._all_slots():
            slot.wait()  # it may be reading the former values
            if slot.layer in layers:
                self._leave(slot)
        for layer in layers:
            self.host.pop(layer, None)

    def release(self) -> None:
        """Gives the buffers back, until a layer is loaded again: every layer's parameters are placeholders."""
        for slot in self._all_slots():
            slot.wait()
            if slot.layer not in self._dirty:
                self._leave(slot)
        self.__dict__.pop("_slots", None)
        self._own = {layer: slot for layer, slot in self._own.items() if layer in self._dirty}

    # ------------------------------------------------ other weights, for a while

    @contextlib.contextmanager
    def writable(self, directory: str | Path | None = None) -> Iterator[Callable[[], None]]:
        """Inside, `store` is there for a training, which writes layers to it (`write`) and changes what is outside of
        the layers in place. Yields a function that makes the weights what they were on entry, as does leaving.
        directory: of what does not fit main memory."""
        if self.store is not None:
            raise RuntimeError("writable: this streamed model is being trained already: leave that `with` first")
        others = {id(own): (own, own.to("cpu", copy=True)) for own in self._others.values()}
        changed = set(self._changed)
        for slot in self._all_slots():
            slot.wait()  # it may be reading from `host`
        self.host.clear()
        budget = self._host_bytes
        if budget is None:  # half of what is free, less some layers: buffers, a gradient, what an update makes
            budget = max(0, free_host_bytes() // 2 - 8 * max(self._sizes))
        self.store = LayerStore(self.copies, budget, directory)

        @torch.no_grad()
        def reset() -> None:
            self._read_anew(self._stored)
            self._dirty.clear()
            self.store.reset()
            for own, before in others.values():
                own.copy_(before)
            self._changed = set(changed)

        try:
            yield reset
        finally:
            reset()
            self.store = None

    def write(self, layer: int) -> None:
        """Takes a layer's weights, which are in place, for the model's: into `store`, or where they are if the layer is
        resident."""
        slot = self._in_place(layer)
        if layer in self.resident:
            self._dirty.add(layer)
            return
        if slot.elsewhere is None:
            self.store.write(layer, slot, self._sizes[layer])
        self.traffic["weights_out"] += self._weights[layer]

    def _trained_layer(self, layer: int) -> torch.Tensor | None:
        if layer in self._dirty:
            return self._own[layer].data
        return self.store.weights(layer) if self.store is not None and layer in self.store else None

    @torch.no_grad()
    def put(self, layer: int, values: Mapping[str, torch.Tensor]) -> None:
        """Writes a layer's parameters, by name: a training takes up its checkpoint."""
        if layer in self.resident:
            self.load(layer)
            for entry in self._entries[layer]:
                entry.parameter.copy_(values[entry.name])
            self.write(layer)
            return
        self._read_anew([entry.name for entry in self._entries[layer]])
        flat = self.store.put_weights(layer, self._sizes[layer])
        for entry, view in zip(self._entries[layer], self._views(layer, flat)):
            view.copy_(values[entry.name])

    @contextlib.contextmanager
    def transformed(self, change: Callable[[int], None]) -> Iterator[Callable[[], None]]:
        """Inside, `change(layer)` changes a layer's weights in place each time they have come into place; what the
        mapping reads stays as it is. Yields a function that says that `change` is another one now."""
        self._refuse_trained("transformed")

        def anew() -> None:
            for slot in self._all_slots():
                slot.wait()
                self._leave(slot)

        anew()
        self._transforms.append(change)
        try:
            yield anew
        finally:
            anew()
            self._transforms.remove(change)

    # ------------------------------------------------ one buffer

    def _in_place(self, layer: int) -> _Slot | None:
        """Where the layer's weights are on the device, ready to be used."""
        return next((slot for slot in self._all_slots() if slot.layer == layer and slot.loading is None), None)

    def _leave(self, slot: _Slot) -> None:
        if slot.layer is not None and slot.loading is None:
            for entry in self._entries[slot.layer]:
                # a graph that has kept this weight for its backward pass must fail, not read the next layer's
                increment_version(entry.parameter)
                entry.parameter.data = self._placeholder(entry.parameter)
        # what is still being read into it comes to its end before the next
        slot.layer = slot.loading = slot.elsewhere = None

    def _start(self, slot: _Slot, layer: int) -> None:
        self._leave(slot)
        slot.layer = layer
        if not self.copies.cuda and self.store is not None and layer in self.store:  # trained where it lies
            slot.elsewhere = self._source(layer, slot.data)
            slot.loading = done()
            return
        self.copies.fill(slot, self._sizes[layer], functools.partial(self._source, layer))

    def _source(self, layer: int, buffer: torch.Tensor) -> torch.Tensor:
        """In the thread: where the layer's weights are in main memory, `buffer` if they had to be read."""
        found = self._found(layer, buffer)
        self.loads[layer] += 1
        self.traffic["weights_in"] += self._weights[layer]
        return found

    def _found(self, layer: int, buffer: torch.Tensor) -> torch.Tensor:
        if self.store is not None and layer in self.store:
            return self.store.weights(layer)
        if (kept := self.host.get(layer)) is not None:
            return kept
        budget = 0 if self.store is not None else self._host_bytes or 0  # a training's budget is its store's
        if sum(kept.numel() for kept in self.host.values()) + self._sizes[layer] > budget:
            self._read(layer, buffer)
            return buffer
        size = self._sizes[layer]
        kept = pinned_bytes(size) if self.copies.cuda else torch.empty(size, dtype=torch.uint8)
        self._read(layer, kept)
        self.host[layer] = kept
        return kept

    def _arrive(self, slot: _Slot) -> None:
        try:
            slot.arrive()
        except BaseException:
            slot.layer = None
            raise
        flat = slot.data if slot.elsewhere is None else slot.elsewhere
        for entry, view in zip(self._entries[slot.layer], self._views(slot.layer, flat)):
            entry.parameter.data = view
        for transform in self._transforms:
            transform(slot.layer)


def _refuse_state(*args: Any) -> None:
    raise ValueError(
        "this model is streamed: its state_dict, and what save_pretrained writes, would hold placeholders; use "
        "Decoder(model).save(directory)"
    )
