"""The weights of a model whose layers are not in memory, read from its safetensors files when they are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kunbr_fast.files.atomic import write_with
from kunbr_fast.files.tensors import Shards, open_tensors
from kunbr_fast.model.weights import DAMAGED, Weights, finite

# files that may hold the former weights in another form, which a model saved anew must not bring along
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor in the files, and the part of a parameter that it is (all of it, or one expert's matrix)."""

    stored: str
    index: tuple = ()


class StoredWeights(Weights):
    """`Weights` in files. A tensor that is set stands for the stored one (`replace`), also in what `save` writes, so a
    streamed M_u can be the `unlearned` of a re-insertion.
    """

    streamed = True

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Parameter], shards: Shards, sources: Mapping[str, list[Piece]]
    ):
        """layers: parameters (placeholders) that are in the files only; sources: the pieces of every parameter."""
        self.shards, self._sources, self._layers = shards, sources, layers
        self._names = [name for name, _ in model.named_parameters()]
        everything = model.named_parameters(remove_duplicate=False)
        self._others = {name: parameter for name, parameter in everything if name not in layers}
        self._replaced: dict[str, Mapping[str, torch.Tensor]] = {}
        self._changed: set[str] = set()  # of the others

    def __contains__(self, name: object) -> bool:
        return name in self._layers or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, in the model's dtype; one of a layer is read anew, into main memory."""
        if name in self._others:
            return self._others[name].detach()
        like = self._layers[name]
        value = torch.empty(like.shape, dtype=like.dtype)
        if name in self._replaced:
            return value.copy_(self._replaced[name][name].detach())  # that may be mapped, with all of its file
        for piece in self._sources[name]:
            value[piece.index].copy_(self.shards[piece.stored])
        return value

    def strided(self, name: str, step: int) -> torch.Tensor:
        """`self[name].flatten()[::step]`; of a tensor that the files hold as it is no more is read than that."""
        pieces = self._sources[name]
        if name in self._others or name in self._replaced or [piece.index for piece in pieces] != [()]:
            return self[name].flatten()[::step]
        return self.shards[pieces[0].stored].flatten()[::step].to(self._layers[name].dtype, copy=True)

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

    def _read_anew(self, names: Iterable[str]) -> None:
        """Drops what has been read of these parameters."""

    def release(self) -> None:
        """Gives back the memory of what has been read."""

    def check(self, whose: str = "") -> None:
        """ValueError for a parameter that is not finite; `whose` goes before its name. Reads every file once."""
        for name in self:
            if not finite(self[name]):
                raise ValueError(f"{whose}{name}: it holds NaN or infinite values: {DAMAGED}")

    def save(self, directory: str | Path) -> None:
        """Copies the model's directory with the tensors of `replace` in place of the stored ones, in the files' dtypes.
        One file after the other, each whole or absent, config.json last. In memory: one file's new tensors, twice."""
        source, directory = self.shards.directory, Path(directory)
        self.check_target(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.release()
        new = {
            piece.stored: (name, piece.index)
            for name in (*self._replaced, *self._changed)
            for piece in self._sources[name]
        }
        for path in self.shards.paths:
            with open_tensors(path) as file:
                metadata = file.metadata()  # transformers asks for it
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # mapped
            for stored in tensors.keys() & new.keys():
                name, index = new[stored]
                tensors[stored] = self[name][index].to("cpu", tensors[stored].dtype)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_with(directory / path.name, functools.partial(save_file, tensors, metadata=metadata))
            del tensors  # before those of the next file
        others = [file for file in source.iterdir() if file.is_file() and file.suffix not in WEIGHTS]
        for file in sorted(others, key=lambda file: file.name == "config.json"):
            write_with(directory / file.name, functools.partial(shutil.copyfile, file))

    def check_target(self, directory: str | Path) -> None:
        """ValueError for a directory that the model's tensors are read from, where `save` must not write."""
        directory = Path(directory)
        stored = [values for values in self._replaced.values() if isinstance(values, StoredWeights)]
        sources = {weights.shards.directory for weights in (self, *stored)}
        if directory.exists() and any(directory.samefile(source) for source in sources):
            raise ValueError(f"{directory}: the model is read from there: save it elsewhere")

    def moved(self, directory: str | Path) -> None:
        """From now on all is read from `directory`, where `save` has written the model."""
        shards = Shards(directory)
        self._read_anew(self._layers)
        self.shards, self._replaced, self._changed = shards, {}, set()
