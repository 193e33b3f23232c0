"""The weights of a streamed model as a mapping: what its files hold, what stands for it, and what was trained; written
out to files of the same form.

`layer_stream` puts them in place, layer by layer.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from kunbr_fast.files.model_folder import new_model, side_files, within
from kunbr_fast.files.parameters import Piece
from kunbr_fast.files.readback import check_configuration, check_copies, check_tensors, read_back
from kunbr_fast.files.saving import copy_files
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.shown import plain
from kunbr_fast.files.tensors import TYPES, read_tensor
from kunbr_fast.files.weight_files import New, write_like
from kunbr_fast.model.weights import Weights, finite, why_not_finite


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of a layer, and its bytes in a buffer."""

    name: str
    parameter: nn.Parameter
    layer: int
    place: slice


class LayerFiles(Weights, abc.ABC):
    """As a mapping it reads a layer's parameter anew at each access. A tensor that is set stands for the stored one,
    also in what `save` writes, so a streamed M_u can be the `unlearned` of a re-insertion.

    entries: of each layer; sources: the pieces of every parameter. reads: how often each layer came from the files.
    """

    streamed = True

    def __init__(
        self, model: nn.Module, entries: list[list[Entry]], shards: Shards, sources: Mapping[str, list[Piece]]
    ):
        self.reads = Counter()
        self._entries = entries
        self._stored = {entry.name: entry for own in entries for entry in own}
        self.shards, self._sources, self._config = shards, sources, model.config
        self._names = [name for name, _ in model.named_parameters()]
        everything = model.named_parameters(remove_duplicate=False)
        self._others = {name: parameter for name, parameter in everything if name not in self._stored}
        self._replaced: dict[str, Mapping[str, torch.Tensor]] = {}
        self._changed: set[str] = set()  # of the others

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, in the model's dtype; one of a layer is read anew, into main memory."""
        if name in self._others:
            return self._others[name].detach()
        like, entry = self._stored[name].parameter, self._stored[name]
        value = torch.empty(like.shape, dtype=like.dtype)
        if (trained := self._trained(entry)) is not None:
            return value.copy_(trained)
        if name in self._replaced:
            return value.copy_(self._replaced[name][name].detach())  # that may be mapped, with all of its file
        for piece in self._sources[name]:
            value[piece.index].copy_(self.shards[piece.stored])
        return value

    @torch.no_grad()
    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """From now on these tensors, by parameter name, stand for the stored ones. Those of layers are not copied: the
        mapping is kept and read at each load, so it may be a `WeightSnapshot`, or another model's weights. RuntimeError
        where a training has written layers, which would be read all the same."""
        self._refuse_trained("replace")
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
            for name in dict.fromkeys((*self._replaced, *self._changed, *self.trained()))
            for piece in self._sources[name]
        }

    def check_target(self, directory: str | Path | None) -> None:
        """ValueError for a directory that the model's tensors are read from, where `save` must not write; and None."""
        if directory is None:
            raise ValueError(
                "a streamed model's result is never in memory whole: give output_dir=, where it is written"
            )
        stored = [values for values in self._replaced.values() if isinstance(values, LayerFiles)]
        if any(within(directory, weights.directory) for weights in (self, *stored)):
            raise ValueError(f"{directory}: the model is read from there: save it elsewhere")

    @property
    def directory(self) -> Path:
        return self.shards.directory

    def in_files(self, name: str) -> list[torch.Tensor]:
        return [self.shards[piece.stored] for piece in self._sources.get(name, ())]

    def moved(self, directory: str | Path) -> None:
        """From now on all is read from `directory`, where `save` has written the model, in the files' dtypes."""
        shards = Shards(directory)
        self._read_anew(self._stored)
        self.shards, self._replaced = shards, {}
        for name in self._changed:
            for piece in self._sources[name]:
                self._others[name].detach()[piece.index].copy_(shards[piece.stored])
        self._changed = set()

    def changed_others(self) -> None:
        """What is outside of the layers was changed in place."""
        self._changed |= self._others.keys()

    # ------------------------------------------------ what was trained

    @abc.abstractmethod
    def _trained_layer(self, layer: int) -> torch.Tensor | None:
        """The flat weights of a layer that a training has written."""

    @abc.abstractmethod
    def _read_anew(self, names: Iterable[str]) -> None:
        """Drops what has been read of these parameters."""

    @abc.abstractmethod
    def release(self) -> None:
        """Gives the buffers back."""

    def _trained(self, entry: Entry) -> torch.Tensor | None:
        """What a training has written of a parameter; the tensor itself."""
        if (flat := self._trained_layer(entry.layer)) is None:
            return None
        return flat[entry.place].view(entry.parameter.dtype).view(entry.parameter.shape)

    def trained(self) -> dict[str, torch.Tensor]:
        """What a training has written, by name: the tensors themselves, which its later steps change."""
        found = {name: self._trained(entry) for name, entry in self._stored.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def views(self) -> Mapping[str, torch.Tensor]:
        return ChainMap(self.trained(), self)

    def _refuse_trained(self, what: str) -> None:
        if self.trained():
            raise RuntimeError(f"{what}: layers of this streamed model are being trained: leave `writable` first")

    # ------------------------------------------------ a layer

    def _views(self, layer: int, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat[e.place].view(e.parameter.dtype).view(e.parameter.shape) for e in self._entries[layer]]

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
            with self.shards.open(path) as file:
                for stored, into in pairs:
                    value = self._read_tensor(file, stored, into)
                    if not self.reads[layer] and not finite(into):
                        why = why_not_finite([value], into.dtype)
                        raise ValueError(f"{path}: {stored} holds NaN or infinite values (as {into.dtype}): {why}")
        self.reads[layer] += 1

    def _read_tensor(self, file: BinaryIO, stored: str, into: torch.Tensor) -> torch.Tensor:
        """Reads one into place; returns it in the file's dtype."""
        found = self.shards.tensors[stored]
        dtype = TYPES[found.dtype]
        if dtype == into.dtype and into.is_contiguous() and into.shape == found.shape:
            return read_tensor(file, found, into)
        value = read_tensor(file, found, torch.empty(found.shape, dtype=dtype))
        into.copy_(value)
        return value
