"""The weights of a model folder: which files they are in, judged from their headers, and read by tensor name.

As transformers does: model.safetensors, else the files that model.safetensors.index.json names; nothing else. Where
neither is there, the error says what is, and what makes weights of it. Other weights beside them are named, not read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kunbr_fast.files.documents import read_json
from kunbr_fast.files.headers import COPY, FLOATS, LONGEST, PLAIN, Header, Tensor
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import TYPES, read_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = re.compile(
    r"(^|\.)(weight|q?weight_\w+|qweight|qzeros|g_idx|SCB|absmax|quant_\w+|quant_state\.\w+|\w+_(blocks|scales|packed))$"
)
MASK = re.compile(r"(^|[._])(bias|mask\w*)$")  # of attention, which older releases saved as bytes
_SAVE = "load it with transformers' from_pretrained, and save it with save_pretrained"
# what may lie in place of weights: (its name, what it is, the cure)
INSTEAD = tuple(
    (re.compile(name), what, cure)
    for name, what, cure in (
        (
            r"model\.[^.]+\.safetensors|model\.[^.]+-\d+-of-\d+\.safetensors|model-\d+-of-\d+\.[^.]+\.safetensors"
            r"|model\.safetensors\.index\.[^.]+\.json",
            "a variant, which is read only by its name (variant=)",
            f"{_SAVE}, or name it {SINGLE}, if it is one file",
        ),
        (
            r"model-\d+-of-\d+\.safetensors",
            f"parts of a model, and no {INDEX}, which says what is in which",
            "copy that too",
        ),
        (
            r"(adapter|non_lora).*\.safetensors",
            "an adapter, and no model",
            "merge it into the model (merge_and_unload)",
        ),
        (
            r"consolidated.*\.(safetensors|pth)|original",
            "weights in their maker's own form, which transformers does not read",
            f"copy {SINGLE}, or {INDEX} and its files, too",
        ),
        (r".+\.safetensors", "not the name of a model's weights", f"name it {SINGLE}, if it is all of them"),
        (r"pytorch_model.*\.bin(\.index.*\.json)?", "pickled weights; only safetensors are read", _SAVE),
        (r".+\.gguf", "a GGUF file, which is mostly quantised", "give the model that it was made from"),
        (
            r"tf_model.*\.h5|flax_model.*\.msgpack"
            r"|(?!(training_args|optimizer|scheduler|scaler|rng_state.*)\.).+\.(pth|pt|ckpt|bin|onnx|npz)",
            "weights of another form; only safetensors are read",
            _SAVE,
        ),
    )
)
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
        if not has_weights(self.directory):
            no = f"{plain(directory)}: no weights: neither {SINGLE} nor {INDEX} is there: {COPY}"
            raise ValueError(instead_of_weights(self.directory) or no)
        named, index = None, self.directory / INDEX
        self.index = None if os.path.lexists(self.directory / SINGLE) else index
        if self.index is None:
            paths = [self.directory / SINGLE]
        else:
            named, total = _read_index(index)
            paths = [self.directory / name for name in sorted(set(named.values()))]
        self.headers = [Header.read(path, "copy it too, the checkpoint is not whole") for path in paths]
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
        """A line about weights and indexes beside those that are read, which may be older ones."""
        read = {header.file.name for header in self.headers} | ({INDEX} if self.index is not None else set())
        others = [name for name in weights_in(self.directory) if name not in read]
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
        found = self.tensors[name]
        with self.open(found.file) as file:
            return read_tensor(file, found, torch.empty(found.shape, dtype=TYPES[found.dtype]))

    def open(self, path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
        """One of the files, to read. ValueError where it is another one than when it was opened first."""
        return next(header for header in self.headers if header.file == path).reading()

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with self.open(a.file) as one, self.open(b.file) as other:
            one.seek(a.start)
            other.seek(b.start)
            counts = (min(CHUNK, a.stop - at) for at in range(a.start, a.stop, CHUNK))
            return all(one.read(count) == other.read(count) for count in counts)


def has_weights(directory: str | Path) -> bool:
    """Whether the weights of a model are in the folder, by the names that they must have."""
    return any(os.path.lexists(Path(directory) / name) for name in (SINGLE, INDEX))


def weights_in(directory: Path, indexes: bool = True) -> list[str]:
    """The names in a folder of weights of any form, a folder of them (`original`), and indexes, if those count."""
    found = [name for name in sorted(os.listdir(directory)) if _is_weights(name) or (indexes and _is_index(name))]
    return [name for name in found if name != "original" or _holds_weights(directory / name)]


def _is_weights(name: str) -> bool:
    return not name.endswith(".json") and any(pattern.fullmatch(name) for pattern, _, _ in INSTEAD)


def _is_index(name: str) -> bool:
    return re.fullmatch(r".*\.(safetensors|bin)\.index(\..+)?\.json", name) is not None


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(map(_is_weights, os.listdir(folder)))


def instead_of_weights(directory: Path) -> str | None:
    """What lies there in place of weights, and the cure; None where weights, or nothing like them, are there."""
    if has_weights(directory):
        return None
    names = weights_in(directory)
    for pattern, what, cure in INSTEAD:
        if found := [name for name in names if pattern.fullmatch(name)]:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            return f"{plain(directory / found[0])}{more}: {what}: {cure}"
    return None


def _check_packed(tensor: Tensor) -> None:
    packed = PACKED.search(tensor.name) or (tensor.dtype in ("U8", "I8") and len(tensor.shape) > 1)
    if tensor.dtype not in FLOATS and packed and not MASK.search(tensor.name):
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
