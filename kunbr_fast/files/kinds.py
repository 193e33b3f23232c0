"""What a file is that is not what its name says, by its first bytes: named, with the cure, wherever a file is read."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from kunbr_fast.files.shown import plain

HEAD = 512  # bytes that are enough
_UNPACK = "unpack it"
_LINES = "write it as text: pandas' to_json(NAME, orient='records', lines=True) does"
_RECORDS = "only records are read from one"
_MAGIC = (
    (b"version https://git-lfs.github.com/", "a git-lfs pointer, not the file itself", "git lfs pull in its folder"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    (b"\xfd7zXZ\x00", "compressed by xz", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"PK\x03\x04", "a zip archive (torch.save and Excel write such ones too)", _UNPACK),
    (b"PAR1", "a Parquet table", _RECORDS),
    (b"ARROW1\x00", "an Arrow table", _RECORDS),
    (b"\xff\xff\xff\xff\x10\x01\x00\x00", "an Arrow stream", _RECORDS),  # of datasets.save_to_disk, mostly
    (b"SQLite format 3\x00", "an SQLite database", _LINES),
    (b"\x89HDF\r\n", "an HDF5 file", _LINES),
    (b"GGUF", "a GGUF file", "give the model as its own library saves it, with safetensors"),
    (b"%PDF-", "a PDF", "write it as text"),
)


def told(head: bytes, text: bool = True) -> str | None:
    """What a file is, and the cure, where its first bytes say that it is not the text, or the safetensors (text=False),
    that it should be; else None."""
    for magic, what, cure in _MAGIC:
        if head.startswith(magic):
            return f"{what}: {cure}"
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return f"compressed by bzip2: {_UNPACK}"
    if re.match(rb"\x80[\x02-\x05][\x95c}(\]]", head):
        return "a pickle, which can hold any program: write it as text"
    if re.match(rb"\s*<(!doctype html|html|head)\b", head, re.IGNORECASE):
        return "a web page, as a download that failed leaves it: fetch the file again"
    if text and (encoding := _encoding(head)) is not None:
        return f"{encoding} text, not UTF-8 text: save the file as UTF-8"
    if head and not head.strip(b"\x00"):
        return "NUL bytes, as a write that failed leaves them: make or copy it again"
    return None


def check_kind(head: bytes, where: str) -> None:
    """ValueError, beginning with `where`, for the first bytes of what is no text."""
    if (what := told(head)) is not None:
        raise ValueError(f"{where}: {what}")


def check_start(path: Path) -> None:
    """`check_kind` of a file that other libraries read too, and a ValueError for a byte order mark, which they do not
    take: a result with a copy of it could not be loaded. Whether it is there, whoever reads it says."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(HEAD)
        check_kind(head, plain(path))
        if head.startswith(b"\xef\xbb\xbf"):
            raise ValueError(f"{plain(path)}: begins with a byte order mark: save it as UTF-8 without one")


def _encoding(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    start = head[:32]  # without a mark: of ASCII every second byte is NUL
    halves = start[::2], start[1::2]
    return "UTF-16" if len(start) > 3 and any(any(x) and not any(y) for x, y in (halves, halves[::-1])) else None
