"""SHA-256 of files that are read again, and documents that carry their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kunbr_fast.files.atomic import atomic_write, sha256
from kunbr_fast.files.documents import parse_json, read_text
from kunbr_fast.files.shown import plain

# A file's time of change (ctime) cannot be set by a program, and every write moves it on, but in ticks of up to 10 ms.
TICK = 0.01
_known: dict[str, tuple[tuple[int, ...], str]] = {}


def checksum(path: str | os.PathLike, read: Callable[[int], Any] | None = None) -> str:
    """A regular file's SHA-256. ValueError for a link, a pipe and the like. read: as of `file_digest`.

    A file that this process has read and that nobody has written to since is not read again: M_u of an 8B model has
    16 GB, and is asked for many times. What that misses is a medium that changes bits by itself during the run.
    """
    path = os.path.abspath(path)
    now = os.lstat(path)
    if not stat.S_ISREG(now.st_mode):
        raise ValueError(f"{path}: not a regular file: something has been put in its place")
    mark = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
    if _known.get(path, (None, ""))[0] != mark:
        # what is written from here on has a later ctime than the one that is noted
        if 0 <= (age := time.time() - now.st_ctime) < TICK:
            time.sleep(TICK - age)
        _known[path] = mark, sha256(path, read)
    return _known[path][1]


def check_file(path: str | os.PathLike, expected: str, cure: str) -> None:
    """ValueError, which ends with `cure`, unless the file is there and has this SHA-256."""
    if not os.path.lexists(path):
        raise ValueError(f"{path}: missing: {cure}")
    if (found := checksum(path)) != expected:
        raise ValueError(f"{path}: damaged (SHA-256 {found[:12]}..., expected {expected[:12]}...): {cure}")


# ---------------------------------------------------------------- documents that carry their own checksum

LIMIT = 2**26  # bytes: the state of a run over 10^5 matrices has 8 MB
_SEAL = re.compile(r'(.*),\n  "sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


def write_sealed(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Writes `value` as indented JSON whose last key, "sha256", is the checksum of all text before it, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    with atomic_write(path) as file:
        file.write(f'{text},\n  "sha256": "{_digest(text)}"\n}}\n'.encode())


def read_sealed(path: str | Path, cure: str) -> dict[str, Any]:
    """The value of a file by `write_sealed`. ValueError, which ends with `cure`, if a bit of it has changed."""
    try:
        text = read_text(path, LIMIT)
    except ValueError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):  # a bit of it has changed: nobody is to save it anew
            raise ValueError(f"{path}: damaged (it is no text): {cure}") from error
        raise
    found = _SEAL.fullmatch(text)
    if found is None or _digest(found[1]) != found[2]:
        what = "its own checksum is missing" if found is None else "it does not have the checksum that it names"
        raise ValueError(f"{path}: damaged ({what}): {cure}")
    return parse_json(f"{found[1]}\n}}", plain(path), dict)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
