"""What was written is read back, from the disk, and compared with what is in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.files import model_config
from kunbr_fast.files.atomic import sync
from kunbr_fast.files.headers import Tensor, open_regular
from kunbr_fast.files.models import ModelFolder, load_model
from kunbr_fast.files.parameters import Piece, check_all_used, stored_parameters
from kunbr_fast.files.shards import CHUNK, Shards
from kunbr_fast.files.shown import plain
from kunbr_fast.files.weight_files import DTYPES, TORCH


class NotWritten(ValueError):
    """A file that was read back is not what was written."""


@contextlib.contextmanager
def read_back(staged: Path, target: Path) -> Iterator[None]:
    """Flushes the files in `staged`, which are going to be those of `target`, to the disk, and has the system forget
    them: what the block reads is on the disk. A ValueError becomes a `NotWritten` that names them in `target`."""
    for path in staged.rglob("*"):
        if path.is_file():
            sync(path)
            forget(path)
    try:
        yield
    except ValueError as error:
        said = str(error).replace(plain(staged), plain(target))
        raise NotWritten(f"{said} [read back after writing; nothing there is replaced]") from error


def forget(path: Path) -> None:
    """Drops a flushed file from the system's cache, so that it is next read from the disk."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def check_model(model: nn.Module, directory: Path, cast: bool = False) -> None:
    """ValueError unless the directory holds this model: its configuration, and each tensor with the same name, shape,
    dtype and bytes. cast: as of `check_tensors`."""
    shards = check_configuration(model.config, directory)
    stored = stored_parameters(model, shards)
    tensors = model.state_dict(keep_vars=True)
    if stored.followed:
        check_all_used(stored, shards)
        check_tensors(shards, stored.sources, tensors.__getitem__, cast)
        return
    loaded = load_model(directory, None if cast else str(model.dtype).removeprefix("torch.")).state_dict()
    for name, tensor in tensors.items():
        here, there = tensor.detach().cpu(), loaded[name]
        if not (torch.equal(there, here.to(there.dtype)) or (cast and torch.equal(there.to(here.dtype), here))):
            raise ValueError(f"{plain(directory)}: {name} is not what is in memory")


def check_configuration(config: Any, directory: Path) -> Shards:
    """The directory's weights. ValueError where its config.json has other settings; one that transformers does not
    know by its config.json is not read."""
    if not is_known(config):
        return Shards(directory)
    folder = ModelFolder(directory, log=False)
    if changed := model_config.differing(folder.configuration(), config):
        raise ValueError(f"{plain(folder.config_path)}: it has another {changed} than the model in memory")
    return folder.shards


def is_known(config: object) -> bool:
    """Whether transformers reads a config.json to this class."""
    from transformers import CONFIG_MAPPING

    kind = getattr(config, "model_type", None)
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] is type(config)


def check_tensors(
    shards: Shards, sources: Mapping[str, Sequence[Piece]], value: Callable[[str], torch.Tensor], cast: bool = False
) -> None:
    """ValueError unless the files hold `value(name)` of each name. cast: the files may have other dtypes, in which the
    values, or from which the values were made."""
    for name, pieces in sources.items():
        whole = value(name).detach()
        for piece in pieces:
            if not _holds(shards, piece.stored, whole[piece.index], cast):
                file = shards.files[piece.stored]
                raise ValueError(f"{plain(file)}: {piece.stored} is not what is in memory")


def _holds(shards: Shards, stored: str, value: torch.Tensor, cast: bool) -> bool:
    tensor = shards.tensors[stored]
    if tensor.shape != tuple(value.shape):
        return False
    value = value.cpu()
    if DTYPES.get(value.dtype) == tensor.dtype:
        return _same_bytes(tensor, value)
    if value.dtype in DTYPES and not cast:
        return False
    if tensor.dtype not in TORCH or value.dtype not in DTYPES:
        return torch.equal(shards[stored], value)
    return _same_bytes(tensor, value.to(TORCH[tensor.dtype])) or torch.equal(shards[stored].to(value.dtype), value)


def _same_bytes(tensor: Tensor, value: torch.Tensor) -> bool:
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    if not flat.numel():
        return True
    with open_regular(tensor.file) as file:
        file.seek(tensor.start)
        for part in flat.split(CHUNK):
            data = bytearray(part.numel())
            if file.readinto(data) != len(data) or not torch.equal(torch.frombuffer(data, dtype=torch.uint8), part):
                return False
    return True


def check_copies(copies: Mapping[str, Path], directory: Path) -> None:
    """ValueError unless the files of these names are those that they were copied from."""
    for name, path in copies.items():
        with open_regular(directory / name, "it was written just now") as copy, open_regular(path) as original:
            same = copy.read() == original.read()
        if not same:
            raise ValueError(f"{plain(directory / name)}: it is not {plain(path)}, which it was copied from")
