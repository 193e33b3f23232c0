"""Weight files written in the layout of others: the same files, tensors and names, some with other values.

A file is written tensor by tensor, each from memory or copied from the file that it is like. Where no dtype changes the
header is the same, byte for byte. Memory: one tensor.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from kunbr_fast.files.headers import FLOATS, ITEMSIZE, Header, Tensor, header_of
from kunbr_fast.files.shards import CHUNK, INDEX, Shards
from kunbr_fast.files.tensors import TYPES, write_tensor

TORCH = {code: TYPES[code] for code in FLOATS}
DTYPES = {dtype: code for code, dtype in TORCH.items()}


@dataclasses.dataclass(frozen=True)
class New:
    """What a stored tensor becomes. dtype: as headers name it; value: is asked for when it is written."""

    dtype: str
    value: Callable[[], torch.Tensor]


def write_like(shards: Shards, directory: Path, new: Mapping[str, New]) -> None:
    """Writes the files of `shards`, and their index, to an empty directory, with the tensors of `new` in place of
    theirs."""
    for header in shards.headers:
        write_file(header, directory / header.file.name, new)
    if shards.index is not None:
        text, before = shards.index.read_text(encoding="utf-8"), shards.nbytes
        nbytes = sum(t.entries * ITEMSIZE[_dtype(t, new)] for t in shards.tensors.values())
        if nbytes != before:
            text = re.sub(r'("total_size"\s*:\s*)[0-9.eE+]+', rf"\g<1>{nbytes}", text, count=1)
        (directory / INDEX).write_text(text, encoding="utf-8")


def write_file(header: Header, path: Path, new: Mapping[str, New]) -> None:
    """One file. header: of the one that it is like."""
    before, tensors = _begin(header, new)
    with header.reading() as source, open(path, "xb") as file:
        file.write(before)
        for tensor in tensors:
            if tensor.name in new:
                _write(file, new[tensor.name])
            else:
                _copy(source, file, tensor)


def _dtype(tensor: Tensor, new: Mapping[str, New]) -> str:
    return new[tensor.name].dtype if tensor.name in new else tensor.dtype


def _begin(header: Header, new: Mapping[str, New]) -> tuple[bytes, list[Tensor]]:
    """(the new file's header, the tensors in its order)."""
    if all(_dtype(tensor, new) == tensor.dtype for tensor in header.tensors):
        return header.raw, list(header.tensors)
    tensors = sorted(header.tensors, key=lambda tensor: -ITEMSIZE[_dtype(tensor, new)])
    metadata = json.loads(header.raw[8:]).get("__metadata__")
    return header_of(((tensor.name, _dtype(tensor, new), tensor.shape) for tensor in tensors), metadata), tensors


def _write(file: BinaryIO, new: New) -> None:
    write_tensor(file, new.value().detach().to("cpu", TORCH[new.dtype]))


def _copy(source: BinaryIO, file: BinaryIO, tensor: Tensor) -> None:
    source.seek(tensor.start)
    for first in range(tensor.start, tensor.stop, CHUNK):
        count = min(CHUNK, tensor.stop - first)
        if len(data := source.read(count)) != count:
            raise ValueError(f"{tensor.file}: cut short while it was read: is it still being written?")
        file.write(data)
