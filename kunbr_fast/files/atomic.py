"""Atomic writes: a file is the old one or the new one, never half of one.

A write goes to a temporary file beside its target, is flushed to the disk (fsync) and takes the target's name in one
step (rename); then the directory entry is flushed. A kill or a full disk in between leaves the old file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(directory: Path) -> int:
    """The permissions of a new file by the umask (or the directory's own rule), which reads them from one."""
    probe = directory / f".{secrets.token_hex(6)}.tmp"
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
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`; on success it becomes `path`, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.open("xb").close()  # not mkstemp, whose files are private: this one has the umask's permissions
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with os_errors():
            yield temporary
        sync(temporary)
        os.chmod(temporary, mode)  # a library may have replaced the file by a private one (safetensors does)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"could not write {path}: {reason}; the file before it is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends without an exception."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: no other JSON reader takes them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def write_with(path: str | os.PathLike, writer: Callable[[Path], None]) -> None:
    """Calls `writer(temporary_path)`, then gives the file its name: for libraries that take a path."""
    with atomic_path(path) as temporary:
        writer(temporary)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):  # Python 3.10 has no hashlib.file_digest
            digest.update(chunk)
    return digest.hexdigest()
