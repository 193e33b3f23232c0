"""A training's state in one file for each rank, of which each holds some rows of every tensor.

The rows are in the order of the ranks, so where a rank's begin is told by the files before it. What is not cut, such as
a step's number, is in one file alone. Whoever goes on, on whatever number of ranks, reads the rows that it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kunbr_fast.files.checksums import check_file
from kunbr_fast.files.tensors import WeightSnapshot, open_tensors


def rows_of(total: int, rank: int, size: int) -> range:
    """A rank's rows of a tensor of `total`: `torch.chunk`'s, so that the last ranks may have fewer or none."""
    each = -(-total // size)
    return range(min(rank * each, total), min((rank + 1) * each, total))


class RowFiles(Mapping):
    """The tensors of such files by name, each whole; `rows` reads some of one. Nothing is read before it is asked for.

    paths: in the order of the ranks, with the SHA-256 of each, which is looked at before a file's tensors are read.
    cure: ends the error of a file that has another one.
    """

    def __init__(self, paths: Sequence[tuple[Path, str]], cure: str):
        self._paths, self._cure = list(paths), cure
        self._lengths: dict[str, list[tuple[int, int]]] = {}  # name -> (file, rows)
        for number, (path, _) in enumerate(self._paths):
            with open_tensors(path) as file:
                for name in file:
                    shape, _ = file.kind(name)
                    self._lengths.setdefault(name, []).append((number, shape[0] if shape else 0))

    def __iter__(self) -> Iterator[str]:
        return iter(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, range(sum(length for _, length in self._lengths[name])))

    def rows(self, name: str, wanted: range) -> torch.Tensor:
        """Some rows of a tensor; of one that has none all. ValueError where the files do not have them."""
        found, first = [], 0
        for number, length in self._lengths[name]:
            if not length:
                with self._open(number) as file:
                    return file[name]
            mine = range(max(wanted.start - first, 0), min(wanted.stop - first, length))
            if mine:
                with self._open(number) as file:
                    found.append(file.rows(name, mine))
            first += length
        if wanted.stop > first:
            raise ValueError(
                f"{self._paths[0][0]}: {name} has {first} rows in the files of all ranks, expected {wanted.stop}: "
                f"{self._cure}"
            )
        return torch.cat(found)

    def _open(self, number: int) -> contextlib.AbstractContextManager:
        path, sha256 = self._paths[number]
        check_file(path, sha256, self._cure)
        return open_tensors(path)


def rows_in(tensors: Mapping[str, torch.Tensor], name: str, wanted: range) -> torch.Tensor:
    """Some rows of one of `tensors`, read alone where they are in files; what has no rows whole."""
    if isinstance(tensors, RowFiles | WeightSnapshot):
        return tensors.rows(name, wanted)
    value = tensors[name]
    return value[wanted.start : wanted.stop] if value.dim() else value
