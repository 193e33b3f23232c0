"""The weights of a model whose layers are in files: read by name, and put in place when a layer runs.

A hook before each layer's forward does this, so any code that runs the layers one after the other works. Code that
knows the order beforehand says so (`visit`), and no layer is read in vain. `streaming` opens such a model.

A layer goes from the file's mapped pages, cast to the model's dtype, on a CPU into a buffer; on a GPU into a pinned
buffer, and from there, on a CUDA stream of its own, into a buffer on the device. A thread does this for the next
layer while the present one computes. No file stays mapped between two layers. As many layers as `host_bytes` allows
stay in main memory once they were read, and only cross the bus from then on.

The parameters of a layer in no buffer are placeholders: one NaN, expanded to the parameter's shape, so that shapes,
dtypes and devices are right and nothing computed from it can be mistaken for a result.

No GPU has run the CUDA part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from kunbr_fast.files.model_folder import new_model, side_files, within
from kunbr_fast.files.parameters import Piece
from kunbr_fast.files.readback import check_configuration, check_copies, check_tensors, read_back
from kunbr_fast.files.saving import copy_files
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.shown import plain
from kunbr_fast.files.tensors import open_tensors, placeholder
from kunbr_fast.files.weight_files import New, write_like
from kunbr_fast.model.weights import CARRIED, Weights, finite, why_not_finite

ALIGNMENT = 256  # of a parameter in its buffer, in bytes


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One parameter of a layer, and its bytes in a buffer."""

    name: str
    parameter: nn.Parameter
    layer: int
    place: slice


class _Slot:
    """A buffer for one layer. layer: whose weights it holds or is loading; loading: the load, until it has arrived.
    copies: the stream that writes to it, on a GPU."""

    def __init__(self, size: int, device: torch.device, copies: torch.cuda.Stream | None):
        self.layer: int | None = None
        self.loading: Future | None = None
        self.data = torch.empty(size, dtype=torch.uint8, device=device)
        self.staging, self.arrived = self.data, None
        if copies is not None:
            # a layer loaded in advance may still be on its way when the buffer is let go of: no other tensor gets this
            # memory before
            self.data.record_stream(copies)
            self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.arrived = torch.cuda.Event()


class LayerStream(Weights):
    """The weights of a model whose layers are in files. Made by `open_streamed`.

    As a mapping it reads a layer's parameter anew at each access. A tensor that is set stands for the stored one, also
    in what `save` writes, so a streamed M_u can be the `unlearned` of a re-insertion.

    sources: the pieces of every parameter. buffers: how many layers are in place at a time, the next one's load
    included. host_bytes: the most that `host` takes.
    loads: how often each layer has been put into a buffer; reads: how often it came from the files (and not from
    `host`, the layers kept in main memory); nbytes: what the buffers take, on the device.
    """

    streamed = True

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        shards: Shards,
        sources: Mapping[str, list[Piece]],
        buffers: int,
        host_bytes: int,
    ):
        if buffers < 2:
            raise ValueError(f"buffers={buffers}: expected at least 2, one to compute with and one to fill")
        self.loads, self.reads = Counter(), Counter()
        self.host: dict[int, torch.Tensor] = {}
        self._host_bytes = host_bytes
        self.device = model.get_input_embeddings().weight.device
        self._nothing: dict[torch.dtype, torch.Tensor] = {}
        path = next(name for name, module in model.named_modules() if module is layers)
        self._entries = [self._lay_out(f"{path}.{i}", layer, i) for i, layer in enumerate(layers)]
        self._stored = {entry.name: entry for entries in self._entries for entry in entries}
        self._sizes = [max(entry.place.stop for entry in entries) for entries in self._entries]
        self._buffers = min(buffers, len(layers))
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        on_gpu = None if self._copies is None else functools.partial(torch.cuda.set_device, self.device)
        self._worker = ThreadPoolExecutor(1, "kunbr-stream", on_gpu)
        self._held: set[int] = set()
        self._last = 0
        self.shards, self._sources, self._config = shards, sources, model.config
        self._names = [name for name, _ in model.named_parameters()]
        everything = model.named_parameters(remove_duplicate=False)
        self._others = {name: parameter for name, parameter in everything if name not in self._stored}
        self._replaced: dict[str, Mapping[str, torch.Tensor]] = {}
        self._changed: set[str] = set()  # of the others
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._before_forward, number))
        layers.register_state_dict_pre_hook(_refuse_state)
        layers.__dict__[CARRIED] = self

    def _lay_out(self, path: str, layer: nn.Module, number: int) -> list[_Entry]:
        """The layer's parameters one after the other; they become placeholders."""
        entries, end = [], 0
        for module_name, module in layer.named_modules():
            for key, meta in module.named_parameters(recurse=False):
                name = ".".join(part for part in (path, module_name, key) if part)
                size = meta.numel() * meta.element_size()
                parameter = nn.Parameter(self._placeholder(meta), requires_grad=False)
                setattr(module, key, parameter)
                entries.append(_Entry(name, parameter, number, slice(end, end + size)))
                end += -(-size // ALIGNMENT) * ALIGNMENT
        return entries

    def _placeholder(self, like: torch.Tensor) -> torch.Tensor:
        if like.dtype not in self._nothing:
            self._nothing[like.dtype] = placeholder((), like.dtype, self.device)
        return self._nothing[like.dtype].expand(like.shape)

    @functools.cached_property
    def _slots(self) -> list[_Slot]:
        """Made when the first layer is loaded: a model that is only read from has none."""
        return [_Slot(max(self._sizes), self.device, self._copies) for _ in range(self._buffers)]

    @property
    def nbytes(self) -> int:
        return self._buffers * max(self._sizes)

    def __deepcopy__(self, memo: Any) -> LayerStream:
        raise TypeError("a streamed model cannot be copied: open it once more with open_streamed")

    # ------------------------------------------------ a mapping

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, in the model's dtype; one of a layer is read anew, into main memory."""
        if name in self._others:
            return self._others[name].detach()
        like = self._stored[name].parameter
        value = torch.empty(like.shape, dtype=like.dtype)
        if name in self._replaced:
            return value.copy_(self._replaced[name][name].detach())  # that may be mapped, with all of its file
        for piece in self._sources[name]:
            value[piece.index].copy_(self.shards[piece.stored])
        return value

    @torch.no_grad()
    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """From now on these tensors, by parameter name, stand for the stored ones. Those of layers are not copied: the
        mapping is kept and read at each load, so it may be a `WeightSnapshot`, or another model's weights."""
        names = list(values)
        odd = [name for name in names if name not in self]
        if odd:
            raise ValueError(f"{odd[0]} is no parameter of this model")
        if values is self:
            raise ValueError("a stream cannot stand for itself")
        for name in names:
            if (own := self._others.get(name)) is not None:
                own.copy_(values[name])
                self._changed |= {other for other, parameter in self._others.items() if parameter is own}
            else:
                self._replaced[name] = values
        self._read_anew(names)

    @contextlib.contextmanager
    def instead(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, `replace(values)`; afterwards the model is as it was."""
        replaced, changed = dict(self._replaced), set(self._changed)
        others = {name: self._others[name].to("cpu", copy=True) for name in values if name in self._others}
        try:
            self.replace(values)
            yield
        finally:
            self.replace(others)
            self._replaced, self._changed = replaced, changed
            self._read_anew(values)

    def save(self, directory: str | Path, replace: bool = False) -> None:
        """Copies the model's directory with the tensors of `replace` in place of the stored ones, in the files' dtypes.
        Read back before it takes its place, as by `save_model`. Each file is whole or absent, config.json last. In
        memory: two parameters. replace: the files of a model that is there go when this one is complete."""
        self.check_target(directory)
        self.release()
        directory, copies = Path(directory), side_files(self.directory)
        with new_model(directory, replace, self.shards.nbytes) as staged:
            write_like(self.shards, staged, self._new(self._cached()))
            copy_files(copies, staged)
            with read_back(staged, directory):
                self.check_saved(staged)
                check_copies(copies, staged)

    def _cached(self) -> Callable[[str], torch.Tensor]:
        """Reads parameters; a stack of experts is many tensors of the files, one after the other."""
        return functools.lru_cache(2)(self.__getitem__)

    def check_saved(self, directory: Path, cast: bool = True) -> None:
        """ValueError unless the directory holds what `save` writes: the source's tensors and dtypes, this model's
        values and settings."""
        shards, before = check_configuration(self._config, directory), self.shards.tensors
        for name in sorted(shards.tensors.keys() | before.keys()):
            found = [(of[name].dtype, of[name].shape) if name in of else "missing" for of in (shards.tensors, before)]
            if found[0] != found[1]:
                raise ValueError(f"{plain(directory)}: {name} is {found[0]}, and {found[1]} in {plain(self.directory)}")
        check_tensors(shards, self._sources, self._cached(), cast)

    def _new(self, parameter: Callable[[str], torch.Tensor]) -> dict[str, New]:
        """What becomes of the stored tensors, in the files' dtypes."""

        def part(name: str, index: tuple) -> torch.Tensor:
            return parameter(name)[index]

        return {
            piece.stored: New(self.shards.tensors[piece.stored].dtype, functools.partial(part, name, piece.index))
            for name in (*self._replaced, *self._changed)
            for piece in self._sources[name]
        }

    def check_target(self, directory: str | Path | None) -> None:
        """ValueError for a directory that the model's tensors are read from, where `save` must not write; and None."""
        if directory is None:
            raise ValueError(
                "a streamed model's result is never in memory whole: give output_dir=, where it is written"
            )
        stored = [values for values in self._replaced.values() if isinstance(values, LayerStream)]
        if any(within(directory, weights.directory) for weights in (self, *stored)):
            raise ValueError(f"{directory}: the model is read from there: save it elsewhere")

    @property
    def directory(self) -> Path:
        return self.shards.directory

    def in_files(self, name: str) -> list[torch.Tensor]:
        return [self.shards[piece.stored] for piece in self._sources.get(name, ())]

    def moved(self, directory: str | Path) -> None:
        """From now on all is read from `directory`, where `save` has written the model."""
        shards = Shards(directory)
        self._read_anew(self._stored)
        self.shards, self._replaced, self._changed = shards, {}, set()

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
        slots = {slot.layer: slot for slot in self._slots}
        free = [slot for slot in self._slots if slot.layer not in wanted]
        for number in wanted:
            if number not in slots:
                slots[number] = free.pop(0)
                self._start(slots[number], number)
        if layer not in self._held and slots[layer].loading is not None:
            self._arrive(slots[layer])

    def _before_forward(self, layer: int, module: nn.Module, args: tuple) -> None:
        """Loads a layer's weights unless they are in place, and orders the next one's, in the direction in which the
        layers have been going."""
        if getattr(module.__dict__.get("forward"), "computes_nothing", False):  # Decoder's recorder
            return
        if layer in self._held or any(slot.layer == layer and slot.loading is None for slot in self._slots):
            return
        following = layer + (1 if layer >= self._last else -1)
        self.load(layer, [following] if 0 <= following < len(self._entries) else ())

    @contextlib.contextmanager
    def held(self, layers: range) -> Iterator[None]:
        """Inside, these layers' parameters are the caller's: they are not loaded and not touched. They must be as they
        were on entry, placeholders, when this is left."""
        for slot in self.__dict__.get("_slots", ()):
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
        for slot in self.__dict__.get("_slots", ()):
            if slot.loading is not None:
                slot.loading.exception()  # waits: it may be reading the former values
            if slot.layer in layers:
                self._leave(slot)
        for layer in layers:
            self.host.pop(layer, None)

    def release(self) -> None:
        """Gives the buffers back, until a layer is loaded again: every layer's parameters are placeholders."""
        for slot in self.__dict__.pop("_slots", ()):
            if slot.loading is not None:
                slot.loading.exception()  # waits: it may still be on its way
            self._leave(slot)

    # ------------------------------------------------ one buffer

    def _views(self, layer: int, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat[e.place].view(e.parameter.dtype).view(e.parameter.shape) for e in self._entries[layer]]

    def _leave(self, slot: _Slot) -> None:
        if slot.layer is not None and slot.loading is None:
            for entry in self._entries[slot.layer]:
                # a graph that has kept this weight for its backward pass must fail, not read the next layer's
                increment_version(entry.parameter)
                entry.parameter.data = self._placeholder(entry.parameter)
        slot.layer = slot.loading = None  # what is still being read into it comes to its end before the next

    def _start(self, slot: _Slot, layer: int) -> None:
        self._leave(slot)
        slot.layer = layer
        free = None if self._copies is None else torch.cuda.current_stream(self.device).record_event()
        slot.loading = self._worker.submit(self._fill, slot, layer, free)

    def _fill(self, slot: _Slot, layer: int, free: Any) -> None:
        """In the thread. free: an event after which nothing reads the buffer's former weights."""
        size, source = self._sizes[layer], self.host.get(layer)
        if source is None:
            stays = sum(kept.numel() for kept in self.host.values()) + size <= self._host_bytes
            if stays:
                source = torch.empty(size, dtype=torch.uint8, pin_memory=self._copies is not None)
            else:
                source = slot.staging
                if slot.arrived is not None:
                    slot.arrived.synchronize()  # the pinned buffer may still be on its way to the device
            self._read(layer, source)
            if stays:
                self.host[layer] = source
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(free)
                slot.data[:size].copy_(source[:size], non_blocking=True)
                slot.arrived.record(self._copies)
        elif source is not slot.data:
            slot.data[:size].copy_(source)
        self.loads[layer] += 1

    def _read(self, layer: int, flat: torch.Tensor) -> None:
        by_file: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        for entry, view in zip(self._entries[layer], self._views(layer, flat)):
            replaced = self._replaced.get(entry.name)
            if replaced is not None:
                view.copy_(replaced[entry.name])
                continue
            for piece in self._sources[entry.name]:
                by_file.setdefault(self.shards.files[piece.stored], []).append((piece.stored, view[piece.index]))
        for path, pairs in by_file.items():
            with open_tensors(path) as file:
                for stored, into in pairs:
                    value = file.get_tensor(stored)
                    into.copy_(value)
                    if not self.reads[layer] and not finite(into):
                        why = why_not_finite([value], into.dtype)
                        raise ValueError(f"{path}: {stored} holds NaN or infinite values (as {into.dtype}): {why}")
        self.reads[layer] += 1

    def _arrive(self, slot: _Slot) -> None:
        try:
            slot.loading.result()
        except BaseException:
            slot.layer = slot.loading = None
            raise
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        for entry, view in zip(self._entries[slot.layer], self._views(slot.layer, slot.data)):
            entry.parameter.data = view
        slot.loading = None


def _refuse_state(*args: Any) -> None:
    raise ValueError(
        "this model is streamed: its state_dict, and what save_pretrained writes, would hold placeholders; use "
        "Decoder(model).save(directory)"
    )
