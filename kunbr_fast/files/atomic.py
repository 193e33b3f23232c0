"""Atomic writes: a file is the old one or the new one, never half of one.

A write goes to a file in a temporary folder beside its target, is flushed to the disk (fsync) and takes the target's
name in one step (rename); then the directory entry is flushed. A kill or a full disk in between leaves the old file.
The next write to the same target removes what a killed one has left (`scratch`), with all that a library put there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kunbr_fast.files.scratch import scratch

FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(scratch: Path) -> int:
    """The permissions of a new file by the umask (or the directory's own rule), which reads them from one."""
    probe = scratch / ".probe"
    probe.open("xb").close()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Turns what Rust libraries raise for a full disk (SafetensorError, a bare Exception) into an OSError."""
    try:
        yield
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, size: int | None = None) -> Iterator[Path]:
    """Yields the path of an empty file near `path`; on success it becomes `path`, on failure it is removed.

    size: bytes that are going to be written, if that is known: a full disk's error says how many. OSError where `path`
    is a device, a pipe or a socket, which a file would replace.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_special(path)
        with scratch(f".{path.name}.", path.parent, ".tmp") as folder:
            temporary = folder / path.name
            temporary.open("xb").close()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # the umask's
            with os_errors():
                yield temporary
            sync(temporary)
            os.chmod(temporary, mode)  # a library may have replaced the file by a private one (safetensors does)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        reason = f"{error.strerror or error}{sizes(error, path.parent, size)}"
        raise OSError(error.errno, f"could not write {path}: {reason}; the file before it is untouched") from error


def _refuse_special(path: Path) -> None:
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file")


def sizes(error: OSError, folder: Path, size: int | None) -> str:
    """What a full disk's error adds: the bytes that are needed, where that is known, and those that are free."""
    if size is None or error.errno not in FULL:
        return ""
    return f" ({in_units(size)} needed, {in_units(shutil.disk_usage(folder).free)} free)"


def in_units(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, size: int | None = None) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends without an exception. size: as of `atomic_path`."""
    with atomic_path(path, size) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: no other JSON reader takes them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def write_with(path: str | os.PathLike, writer: Callable[[Path], None], size: int | None = None) -> None:
    """Calls `writer(temporary_path)`, then gives the file its name: for libraries that take a path. size: as of
    `atomic_path`."""
    with atomic_path(path, size) as temporary:
        writer(temporary)


def sha256(path: str | os.PathLike, read: Callable[[int], Any] | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal. read: as of `file_digest`."""
    return file_digest(path, hashlib.sha256(), read)


def file_digest(path: str | os.PathLike, digest: Any, read: Callable[[int], Any] | None = None) -> str:
    """A file's content in `digest` (hashlib's interface), in hexadecimal. read: is told how many bytes were read."""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):  # Python 3.10 has no hashlib.file_digest
            digest.update(chunk)
            if read is not None:
                read(len(chunk))
    return digest.hexdigest()
