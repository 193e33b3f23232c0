"""The weights of a model folder: which files they are in, judged from their headers, and read by tensor name.

As transformers 5 does: model.safetensors, else the files that model.safetensors.index.json names; nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.files.documents import read_json
from kunbr_fast.files.headers import COPY, FLOATS, LONGEST, PLAIN, Header, Tensor, open_regular
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import open_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = re.compile(r"(^|\.)(weight|q?weight_\w+|qweight|qzeros|g_idx|SCB|absmax|quant_\w+|quant_state\.\w+)$")
CHUNK = 1 << 24

logger = logging.getLogger(__name__)


class Shards:
    """The weights of a model directory, in one safetensors file or several, by tensor name.

    headers: of each file, in the order of their names; tensors: where each tensor is; files: the file of each; index:
    the index that names the files, if one was read. Nothing is read but headers until a tensor is asked for.
    log: a line names other weights beside these.

    Errors: ValueError that names the file which is missing, damaged, holds packed or quantised weights, or does not
    hold what the index says.
    """

    def __init__(self, directory: str | Path, log: bool = False):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"{plain(directory)}: no such directory: expected a local Hugging Face model directory")
        named, index = None, self.directory / INDEX
        single = os.path.lexists(self.directory / SINGLE) or not os.path.lexists(index)
        self.index = None if single else index
        if single:
            paths, cure = [self.directory / SINGLE], "only safetensors are read; convert pickled weights first"
        else:
            named, total = _read_index(index)
            paths = [self.directory / name for name in sorted(set(named.values()))]
            cure = "copy it too, the checkpoint is not whole"
        self.headers = [Header.read(path, cure) for path in paths]
        self.tensors: dict[str, Tensor] = {}
        for header in self.headers:
            for tensor in header.tensors:
                _check_packed(tensor)
                if (other := self.tensors.setdefault(tensor.name, tensor)) is not tensor:
                    raise ValueError(
                        f"{plain(header.file)}: {tensor.name} is in {other.file.name} too: keep one of them"
                    )
        self.files = {name: tensor.file for name, tensor in self.tensors.items()}
        if named is not None:
            self._check_index(index, named, total)
        if not self.tensors:
            raise ValueError(f"{plain(paths[0])}: holds no tensors: {COPY}")
        if log:
            self._name_others()

    def _check_index(self, index: Path, named: dict[str, str], total: int | None) -> None:
        found = {name: path.name for name, path in self.files.items()}
        if named != found:
            odd = sorted(set(named.items()) ^ set(found.items()))[0][0]
            where = found.get(odd)
            is_in = "is in none of its files" if where is None else f"is in {where}"
            says = f"names {named[odd]}" if odd in named else "does not name it"
            raise ValueError(f"{plain(index)}: {odd} {is_in}, the index {says}: the checkpoint is mixed up: {COPY}")
        size = self.nbytes
        if total is not None and not size / 8 <= total <= size * 8:  # some tools count in another dtype
            raise ValueError(
                f"{plain(index)}: total_size is {total}, its tensors have {size} bytes: correct or delete it"
            )

    def _name_others(self) -> None:
        """A line about safetensors files beside the weights, which may be older ones."""
        read = {header.file.name for header in self.headers}
        others = sorted(path.name for path in self.directory.glob("*.safetensors") if path.name not in read)
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            logger.warning(
                "%s: the weights are in %s; not read: %s%s", self.directory, min(read), shown(others[0]), more
            )

    @property
    def paths(self) -> list[Path]:
        return [header.file for header in self.headers]

    @property
    def nbytes(self) -> int:
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_tensors(self.files[name]) as file:
            return file.get_tensor(name)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with open_regular(a.file) as one, open_regular(b.file) as other:
            one.seek(a.start)
            other.seek(b.start)
            counts = (min(CHUNK, a.stop - at) for at in range(a.start, a.stop, CHUNK))
            return all(one.read(count) == other.read(count) for count in counts)


def _check_packed(tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS and PACKED.search(tensor.name):
        raise ValueError(
            f"{plain(tensor.file)}: {tensor.name} is {tensor.dtype}, packed or quantised: expected one of "
            f"{', '.join(FLOATS)}: {PLAIN}"
        )


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """({tensor: name of its file}, bytes in all, if the index says so)."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{plain(path)}: not an index of safetensors files ({what}): {COPY}")

    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise wrong(f"got {shown(index)}, expected an object with a weight_map")
    named = index["weight_map"]
    if not named:
        raise wrong("its weight_map is empty")
    for name, file in named.items():
        if not 0 < len(name) <= LONGEST or not name.isprintable():
            raise wrong(f"{shown(name)} is no name of a tensor")
        if not isinstance(file, str) or not file.isprintable() or not file.endswith(".safetensors"):
            raise wrong(f"{shown(name)} is to be in {shown(file)}, expected the name of a .safetensors file")
        if re.search(r"[/\\]", file):
            raise ValueError(
                f"{plain(path)}: {shown(name)} is to be in {shown(file)}: weights are read from the model's own folder "
                "only: copy the file there, and write its name without a path"
            )
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):  # transformers reads it
        raise wrong(f'its metadata is {shown(metadata)}, expected an object: add "metadata": {{}}')
    return named, _total(metadata.get("total_size"), wrong)


def _total(size: Any, wrong: Any) -> int | None:
    number = isinstance(size, int | float) and not isinstance(size, bool)
    if size is not None and not (number and math.isfinite(size) and size >= 0 and size == int(size)):
        raise wrong(f"its total_size is {shown(size)}, expected a number of bytes")
    return None if size is None else int(size)
