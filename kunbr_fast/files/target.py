"""What a command is going to write, looked at before the work begins: nothing that is not ours is replaced.

    check([Target("--out", "density.json", DENSITY)], [("--model", "MODEL"), ("--forget", "f.jsonl")])

A file of ours is known by its content, by each kind's own `ours`: JSON by its keys, a picture by the Software field of
its metadata, CSV by its header, HTML by its generator, settings by a checksum of theirs in the first line (so one that
was edited since is the user's). Whether a place can be written to is found by writing there: a temporary folder beside
the target, removed at once. The target is not touched.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from kunbr_fast.files.documents import read_json
from kunbr_fast.files.model_folder import within
from kunbr_fast.files.scratch import scratch
from kunbr_fast.files.shown import plain

MAKER = "kunbr-fast"  # as pictures and pages name it
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
READ_AT_MOST = 2**25  # bytes of a file that is looked at


@dataclasses.dataclass(frozen=True)
class FileKind:
    """what: in messages, "a density file". ours: whether the content of an existing file is of this kind."""

    what: str
    suffixes: tuple[str, ...]
    ours: Callable[[Path], bool]


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """files: what is written there, by a pattern of the whole name. Other files stay. begun: whether a folder that
    holds a model is one that we have begun to write."""

    files: Mapping[str, FileKind] = dataclasses.field(default_factory=dict)
    begun: Callable[[Path], bool] = lambda folder: False


@dataclasses.dataclass(frozen=True)
class Target:
    option: str  # as the user wrote it: "--out"
    given: str
    kind: FileKind | FolderKind

    @property
    def path(self) -> Path:
        return Path(self.given)

    def refuse(self, why: str, path: Path | None = None) -> ValueError:
        """path: of a file in the target, where that is a folder."""
        inside = path is not None and path != self.path
        return ValueError(f"{self.option} {plain(path if inside else self.given)}: {why}")


def check(targets: Sequence[Target], inputs: Sequence[tuple[str, str | os.PathLike]] = ()) -> None:
    """ValueError, one line, for the first target that must not or cannot be written. inputs: (option, path) of all that
    the command reads: files, and folders of models. No target is changed."""
    for number, target in enumerate(targets):
        try:
            (_check_file if isinstance(target.kind, FileKind) else _check_folder)(target, inputs)
        except OSError as error:  # a folder that may not be looked at
            raise target.refuse(f"{error.strerror or error}: give another place") from error
        for other in targets[:number]:
            if _same(target.path, other.path):
                raise target.refuse(f"is also {other.option}: one would replace the other; give two names")


# ---------------------------------------------------------------- one target


def _check_file(target: Target, inputs: Sequence[tuple[str, str | os.PathLike]]) -> None:
    path, kind = target.path, target.kind
    if target.given.endswith(os.sep) or path.name in ("", ".."):
        raise target.refuse(f"expected the name of a file, {kind.what}")
    _check_inputs(target, path, inputs)
    _check_place(target, path, kind)
    if path.suffix.lower() not in kind.suffixes:
        raise target.refuse(f"expected a name that ends in {' or '.join(kind.suffixes)}, for {kind.what}")
    _check_content(target, path, kind)
    _try(target, path.parent, path.name)


def _check_folder(target: Target, inputs: Sequence[tuple[str, str | os.PathLike]]) -> None:
    path, kind = target.path, target.kind
    if not target.given:
        raise target.refuse("expected the name of a folder")
    _check_inputs(target, path, inputs)
    if os.path.lexists(path) and not path.is_dir():
        raise target.refuse("is not a folder: name a folder")
    if within(Path.cwd(), path):
        raise target.refuse("is the current folder, or holds it: give a folder of its own")
    if path.is_dir():
        if (found := model_in(path)) and not kind.begun(path):
            raise target.refuse(f"holds a model ({found.name}), which is left alone: give another folder")
        for entry in sorted(path.iterdir()):
            of = next((of for pattern, of in kind.files.items() if re.fullmatch(pattern, entry.name)), None)
            if of is not None:
                _check_inputs(target, entry, inputs)
                _check_place(target, entry, of)
                _check_content(target, entry, of)
    _try(target, path, path.name)


def model_in(folder: Path) -> Path | None:
    """A file that makes the folder one of a model, if there is one."""
    found = [folder / "config.json", *(path for pattern in WEIGHTS for path in sorted(folder.glob(pattern)))]
    return next((path for path in found if os.path.lexists(path)), None)


def _check_inputs(target: Target, path: Path, inputs: Sequence[tuple[str, str | os.PathLike]]) -> None:
    """By file and not by name: links, hard links and other spellings are seen through."""
    for option, given in inputs:
        if _same(path, Path(given)):
            raise target.refuse(f"is what {option} names, and would be replaced: give another", path)
        if os.path.isdir(given):
            if any(_same(above, Path(given)) for above in Path(os.path.realpath(path)).parents):
                raise target.refuse(f"lies in the folder of {option}, where nothing is written: give another", path)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(one) == os.path.realpath(other)


def _check_place(target: Target, path: Path, kind: FileKind) -> None:
    """What is there, if anything, is a plain file."""
    try:
        about = os.lstat(path)
    except OSError:
        return  # `_try` says what is wrong, if anything
    if stat.S_ISLNK(about.st_mode):
        raise target.refuse("is a symbolic link: name the file itself", path)
    if stat.S_ISDIR(about.st_mode):
        raise target.refuse(f"is a folder: name a file, {kind.what}", path)
    if not stat.S_ISREG(about.st_mode):
        raise target.refuse(f"is a device, a pipe or a socket: name a file, {kind.what}", path)


def _check_content(target: Target, path: Path, kind: FileKind) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    try:
        ours = kind.ours(path)
    except OSError as error:
        raise target.refuse(f"cannot be read: {error.strerror}: give another name", path) from error
    if not ours:
        raise target.refuse(f"exists and is not {kind.what} of {MAKER}: it is left alone; give another name", path)
    if not mode & 0o222:
        raise target.refuse("is read-only: it is left alone; give another name", path)


def _try(target: Target, folder: Path, name: str) -> None:
    """Writes in `folder`, or where it will be made."""
    there, missing = folder, []
    try:
        while not os.path.lexists(there):
            missing.append(there.name)
            there = there.parent
        if not there.is_dir():
            raise OSError(errno.ENOTDIR, f"{there} is not a folder")
        for part in missing:
            os.path.lexists(there / part) or _absent(there / part)
        with scratch(f".{name}.", there, ".tmp") as here:
            (here / name[:100]).write_bytes(b"x")
    except OSError as error:
        raise target.refuse(f"cannot be written: {error.strerror or error}: give another place") from error


def _absent(path: Path) -> None:
    """OSError unless the name could be one there."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass


# ---------------------------------------------------------------- what is ours


def json_with(*keys: str, also: Collection[str] | None = ()) -> Callable[[Path], bool]:
    """Recognises a JSON object that has these keys, perhaps some of `also` (None: any), and no other: what somebody has
    added to is theirs. Of a list, the first object counts."""

    def ours(path: Path) -> bool:
        try:
            found = read_json(path)
        except ValueError:
            return False
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, dict) or not found.keys() >= {*keys}:
            return False
        return also is None or found.keys() <= {*keys, *also}

    return ours


def csv_with(*columns: str) -> Callable[[Path], bool]:
    """Recognises a CSV file that has these columns."""

    def ours(path: Path) -> bool:
        with open(path, "rb") as file:
            return {*file.readline(2**16).decode(errors="replace").strip().split(",")} >= {*columns}

    return ours


def is_page(path: Path) -> bool:
    """An HTML page whose generator we are."""
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(2**12)


def is_picture(path: Path) -> bool:
    """A PNG file whose Software field names us."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"tEXt" and size < 2**12:
                if file.read(size) == f"Software\0{MAKER}".encode():
                    return True
                file.seek(4, os.SEEK_CUR)
            else:
                file.seek(size + 4, os.SEEK_CUR)
    return False


def signed(text: str) -> str:
    """The text under a line with its checksum, a comment."""
    return f"{_SIGNATURE}{_checksum(text)}\n{text}"


def is_signed(path: Path) -> bool:
    """A file that `signed` made and nobody has edited."""
    try:
        first, _, rest = _text(path).partition("\n")
    except ValueError:
        return False
    return first == _SIGNATURE + _checksum(rest)


def is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _text(path: Path) -> str:
    """ValueError for what is larger than any file of ours, or not UTF-8."""
    if path.stat().st_size > READ_AT_MOST:
        raise ValueError
    return path.read_bytes().decode()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


GENERATOR = f'<meta name="generator" content="{MAKER}">'
_SIGNATURE = f"# by {MAKER}; it replaces this file only while the lines below have the checksum "
PICTURE = FileKind("a picture", (".png",), is_picture)
PAGE = FileKind("a report", (".html",), is_page)
SETTINGS = FileKind("a file of settings", (".yaml", ".yml"), is_signed)
