"""Tensors on disk: safetensors files that are whole or absent, and errors that name the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kunbr_fast.files.atomic import write_with
from kunbr_fast.files.checksums import check_file, checksum


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors of any device and layout, atomically. OSError where the disk is full or refuses."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_with(path, lambda temporary: save_file(tensors, temporary), size)


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[safe_open]:
    """The file as safetensors' own reader; ValueError that names it where it is damaged or cut short."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}): make or copy it again") from error


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU. Errors as in `open_tensors`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Stands for weights that are not in memory: one NaN, expanded, which no result can come from unnoticed."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether a weight is a `placeholder`."""
    return 0 in tensor.stride()


class WeightSnapshot:
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

    def _open(self) -> contextlib.AbstractContextManager[safe_open]:
        if self.sha256 is not None:
            check_file(self.path, self.sha256, "it is not what was written: start again from files that are whole")
        return open_tensors(self.path)

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            yield from file.keys()

    def __contains__(self, name: object) -> bool:
        with self._open() as file:
            return name in file.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._open() as file:
            return file.get_tensor(name)

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
            values = {name: file.get_tensor(name) for name in parameters}  # mapped, not read, until they are copied
            for name, parameter in parameters.items():
                value = values[name]
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise ValueError(
                        f"{self.path}: {name} is {value.dtype} {tuple(value.shape)}, the model's is "
                        f"{parameter.dtype} {tuple(parameter.shape)}"
                    )
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
