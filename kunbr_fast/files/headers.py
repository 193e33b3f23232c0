"""Headers of safetensors files, read and judged without torch, and without any of the tensors' bytes.

A safetensors file is eight bytes with the length of a JSON header, the header ({name: {"dtype", "shape",
"data_offsets"}}), and the tensors' bytes, one after the other without gaps.

Links are followed: Hugging Face's cache keeps models as links to ../../blobs, and shared weights are often linked. A
link is made by whoever owns the disk. What a stranger can write, the names in an index, may not leave the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kunbr_fast.files.documents import LIMIT, parse_json
from kunbr_fast.files.kinds import HEAD, told
from kunbr_fast.files.shown import plain, shown

COPY = "make or copy it again"
PLAIN = "load the model in its own library and save it in bfloat16"
LONGEST = 200  # characters of a tensor's name
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def odd_kind(path: Path) -> str | None:
    """What is there in place of a file, such as "a FIFO"; None for a file. OSError where nothing is."""
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else next((text for is_it, text in KINDS if is_it(mode)), "no file")


def open_regular(path: str | Path, missing: str = COPY) -> BinaryIO:
    """Opens a file to read. ValueError for what is not there (`missing` is the cure) or no file: opening a FIFO would
    wait for ever."""
    path = Path(path)
    try:
        if (kind := odd_kind(path)) is not None:
            raise ValueError(f"{plain(path)}: {kind}, expected a file: {COPY}")
        return open(path, "rb")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            link = f"a link to {shown(os.readlink(path))}, where nothing is" if path.is_symlink() else "no such file"
            raise ValueError(f"{plain(path)}: {link}: {missing}") from error
        raise ValueError(f"{plain(path)}: cannot be read ({error.strerror})") from error


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is: the bytes from `start` to `stop` of a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


class Mark(NamedTuple):
    """Tells a file from one that somebody has written to, and from another in its place."""

    size: int
    modified: int
    place: tuple[int, int]  # device and inode
    changed: int  # ctime, which no program can set

    @classmethod
    def of(cls, file: BinaryIO) -> Mark:
        now = os.fstat(file.fileno())
        return cls(now.st_size, now.st_mtime_ns, (now.st_dev, now.st_ino), now.st_ctime_ns)

    def is_of(self, other: Mark) -> bool:
        """Whether both are of one file. A change of permissions and a link move ctime alone; some network drives give
        inodes new numbers, with the same ctime."""
        return self[:2] == other[:2] and (self.place == other.place or self.changed == other.changed)


@dataclasses.dataclass(frozen=True)
class Header:
    """A file's header. raw: everything before the tensors; tensors: as they lie in the file; mark: the file's."""

    file: Path
    raw: bytes
    tensors: tuple[Tensor, ...]
    mark: Mark

    @property
    def size(self) -> int:
        """Of the file."""
        return self.mark.size

    def open(self) -> BinaryIO:
        """The file, to read. ValueError where it is another one than when the header was read."""
        file = open_regular(self.file)
        try:
            self._check(file)
        except ValueError:
            file.close()
            raise
        return file

    @contextlib.contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """`open`, closed afterwards. ValueError too where the file was changed inside."""
        with self.open() as file:
            yield file
            self._check(file)

    def _check(self, file: BinaryIO) -> None:
        now, size = Mark.of(file), self.mark.size
        if not now.is_of(self.mark):
            what = f"{now.size} bytes, {size} before" if now.size != size else "it has been written to"
            raise ValueError(
                f"{plain(self.file)}: changed while it was in use ({what}): put it back and start again (a run: "
                "--resume)"
            )

    @classmethod
    def read(cls, path: str | Path, missing: str = COPY) -> Header:
        """ValueError, in one line that names the file, for a header that is damaged or does not describe the file."""
        path = Path(path)
        with open_regular(path, missing) as file:
            mark = Mark.of(file)
            size = mark.size
            raw = file.read(8)
            length = int.from_bytes(raw, "little")
            if not 0 < length <= min(size - 8, LIMIT) and (what := told(raw + file.read(HEAD), text=False)) is not None:
                raise ValueError(f"{plain(path)}: {what}")
            if len(raw) < 8:
                raise _damaged(path, f"it has {size} bytes, a header begins with 8")
            if length > size - 8:
                raise _damaged(path, f"its header is to have {length} bytes, of {size - 8} that follow")
            if length > LIMIT:
                raise _damaged(path, f"its header is to have {length} bytes, at most {LIMIT} are read")
            raw += file.read(length)
        if len(raw) != length + 8:
            raise _damaged(path, "it is cut short")
        try:
            text = raw[8:].decode()
        except UnicodeDecodeError as error:
            raise _damaged(path, "its header is no UTF-8") from error
        entries = parse_json(text, f"{plain(path)}, its header")
        if not isinstance(entries, dict) or not text.startswith("{"):
            raise _damaged(path, f"its header is {shown(entries)}, expected an object")
        tensors = [_tensor(path, name, entry, len(raw)) for name, entry in entries.items() if name != "__metadata__"]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
        _check_metadata(path, entries.get("__metadata__", {}))
        _check_places(path, tensors, len(raw), size)
        return cls(path, raw, tuple(tensors), mark)


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """All that lies before the tensors in a file that holds them one after the other: each its name, dtype and shape.
    Those of the widest entries must come first: each then lies at a multiple of its entries' size."""
    entries, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{plain(path)}: not a whole safetensors file ({why}): {COPY}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, before: int) -> Tensor:
    """before: bytes of the file before the tensors."""
    where = f"its header's entry {shown(name)}"
    if not 0 < len(name) <= LONGEST or not name.isprintable():
        raise _damaged(path, f"{where} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{where} is {shown(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _damaged(path, f"{where} has dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 64:
        raise _damaged(path, f"{where} has shape {shown(shape)}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _damaged(path, f"{where} has data_offsets {shown(offsets)}, expected where it begins and ends")
    if dtype not in ITEMSIZE:
        raise ValueError(
            f"{plain(path)}: {name} is {shown(dtype)}, quantised: expected one of {', '.join(FLOATS)}: {PLAIN}"
        )
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEMSIZE[dtype]:
        raise _damaged(path, f"{where} has {stop - start} bytes, which {dtype} of shape {shown(shape)} has not")
    return Tensor(path, name, dtype, tuple(shape), before + start, before + stop)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"its header's __metadata__ is {shown(metadata)}, expected names and texts")


def _check_places(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    """The tensors must fill the file, one after the other."""
    for tensor in tensors:
        if tensor.start != start:
            what = "overlaps the one before" if tensor.start < start else "leaves a gap before it"
            raise _damaged(path, f"{shown(tensor.name)} {what}")
        start = tensor.stop
    if start != size:
        raise _damaged(path, f"its header describes {start} bytes, it has {size}")
