"""Tensors on disk: safetensors files that are whole or absent, and errors that name the file.

Written and read tensor by tensor, by plain reads: safetensors' own functions copy all tensors of a file before they
write it, and map the whole file to read one of them, which a model larger than its memory cannot have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from kunbr_fast.files.atomic import atomic_write
from kunbr_fast.files.checksums import check_file, checksum
from kunbr_fast.files.headers import COPY, ITEMSIZE, Header, Tensor, header_of
from kunbr_fast.files.shown import plain

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U64": torch.uint64, "I32": torch.int32, "U32": torch.uint32, "I16": torch.int16, "U16": torch.uint16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in TYPES.items()}
AT_ONCE = 1 << 26  # bytes of a tensor on a device that are copied to the host at a time


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors of any device and layout, one after the other, atomically. Of a mapping that makes its tensors
    when they are asked for, each is asked for twice. OSError where the disk is full or refuses."""
    found = [(name, CODES[tensor.dtype], tuple(tensor.shape)) for name in tensors for tensor in [tensors[name]]]
    found.sort(key=lambda entry: (-ITEMSIZE[entry[1]], entry[0]))  # within a width by name, as safetensors has it
    size = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in found)
    with atomic_write(path, size) as file:
        file.write(header_of(found))
        for name, _, _ in found:
            write_tensor(file, tensors[name])


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """A tensor's bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    for part in flat.split(AT_ONCE) if flat.device.type != "cpu" else [flat]:
        file.write(part.cpu().numpy())


class TensorFile(Mapping[str, torch.Tensor]):
    """A safetensors file that is open, as a mapping to its tensors: each is read, onto the CPU, when it is asked for.

    ValueError that names the file where it is damaged, cut short or not there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = Header.read(path)
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._file = header.open()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._tensors[name]
        return read_tensor(self._file, found, torch.empty(found.shape, dtype=TYPES[found.dtype]))

    def rows(self, name: str, wanted: range) -> torch.Tensor:
        """Some rows of a tensor, alone; of one that has none all."""
        found = self._tensors[name]
        if not found.shape:
            return self[name]
        if wanted.stop > found.shape[0]:
            raise ValueError(f"{plain(self.path)}: {name} has {found.shape[0]} rows, expected {wanted.stop}: {COPY}")
        out = torch.empty((len(wanted), *found.shape[1:]), dtype=TYPES[found.dtype])
        skipped = wanted.start * math.prod(found.shape[1:]) * out.element_size()
        return read_tensor(self._file, dataclasses.replace(found, start=found.start + skipped), out)

    def kind(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """A tensor's shape and dtype."""
        return torch.Size(self._tensors[name].shape), TYPES[self._tensors[name].dtype]

    def close(self) -> None:
        self._file.close()


def read_tensor(file: BinaryIO, found: Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fills a contiguous tensor on the CPU, of the stored dtype and shape, and returns it."""
    if out.numel():
        file.seek(found.start)
        left = memoryview(out.view(-1).view(torch.uint8).numpy())
        while left:
            if not (count := file.readinto(left)):
                raise ValueError(f"{plain(found.file)}: cut short while it was read ({found.name}): {COPY}")
            left = left[count:]
    return out


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[TensorFile]:
    """A `TensorFile`, closed afterwards."""
    file = TensorFile(path)
    try:
        yield file
    finally:
        file.close()


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU. Errors as of `TensorFile`."""
    with open_tensors(path) as file:
        return dict(file)


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Stands for weights that are not in memory: one NaN, expanded, which no result can come from unnoticed."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether a weight is a `placeholder`."""
    return 0 in tensor.stride()


class WeightSnapshot(Mapping[str, torch.Tensor]):
    """A model's weights in one safetensors file, read and written tensor by tensor, bit for bit.

    Behaves as a read-only mapping from parameter names to tensors, each read from the file when it is asked for.
    A tied weight is kept once. sha256: the file's, which each reading looks at (`checksum`), as it does after `save`;
    None: readings do not look.
    """

    def __init__(self, path: str | Path, sha256: str | None = None):
        self.path, self.sha256 = Path(path), sha256
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such weights file")

    @classmethod
    def save(cls, model: nn.Module, path: str | Path) -> WeightSnapshot:
        """Writes the model's parameters to `path`, atomically. ValueError for a streamed model's."""
        parameters = dict(model.named_parameters())
        absent = [name for name, parameter in parameters.items() if is_absent(parameter)]
        if absent:
            raise ValueError(f"{absent[0]} is not in memory: this model is streamed; load it whole for this")
        save_tensors(path, parameters)
        return cls(path, checksum(path))

    def _open(self) -> contextlib.AbstractContextManager[TensorFile]:
        if self.sha256 is not None:
            check_file(self.path, self.sha256, "it is not what was written: start again from files that are whole")
        return open_tensors(self.path)

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            names = list(file)
        yield from names

    def __len__(self) -> int:
        with self._open() as file:
            return len(file)

    def __contains__(self, name: object) -> bool:
        with self._open() as file:
            return name in file

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._open() as file:
            return file[name]

    def rows(self, name: str, wanted: range) -> torch.Tensor:
        """As of `TensorFile`."""
        with self._open() as file:
            return file.rows(name, wanted)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copies the weights into the model, or raises ValueError, with the model as it was, unless it has the same
        parameters, shapes and dtypes."""
        parameters = dict(model.named_parameters())
        with self._open() as file:
            names = set(file.keys())
            if names != set(parameters):
                odd = sorted(names ^ set(parameters))[0]
                raise ValueError(f"{self.path}: {odd} is in only one of the file and {type(model).__name__}")
            for name, parameter in parameters.items():
                shape, dtype = file.kind(name)
                if shape != parameter.shape or dtype != parameter.dtype:
                    raise ValueError(
                        f"{self.path}: {name} is {dtype} {tuple(shape)}, the model's is {parameter.dtype} "
                        f"{tuple(parameter.shape)}"
                    )
            for name, parameter in parameters.items():
                parameter.copy_(file[name])
