"""Folders for what is on its way: locked while their process lives, removed by the next one where it was killed.

A folder is ours if its name has our form, this user owns it, and it holds the marker. The marker is locked (flock)
for as long as the process lives, so that a folder whose marker can be locked is one that nobody will finish.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARKER = ".kunbr-fast"


@contextlib.contextmanager
def scratch(prefix: str, directory: str | os.PathLike | None = None, suffix: str = "") -> Iterator[Path]:
    """A new private folder in `directory` (None: the system's for temporary files), removed at the end.

    Before, what killed processes have left there under the same prefix and suffix is removed.
    """
    directory = Path(tempfile.gettempdir() if directory is None else directory)
    remove_leftovers(directory, prefix, suffix)
    folder, marker = _make(directory, prefix, suffix)
    try:
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # what stays, if anything, goes with the next one
                _remove(folder)
    finally:
        os.close(marker)


def remove_leftovers(directory: str | os.PathLike, prefix: str | None = None, suffix: str = "") -> None:
    """Removes the scratch folders in `directory` whose process is gone. prefix None: those of writes, of any file."""
    start, end = (r"\..+\.", r"\.tmp") if prefix is None else (re.escape(prefix), re.escape(suffix))
    form = re.compile(f"{start}[0-9a-f]{{12}}{end}", re.DOTALL)
    try:
        with os.scandir(directory) as entries:
            found = [entry.path for entry in entries if form.fullmatch(entry.name)]
    except OSError:  # no such folder, or not ours to read: who writes there says so
        return
    for path in found:
        with contextlib.suppress(OSError):
            _remove_if_left(Path(path))


def _make(directory: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    """The folder, and its marker, open and locked."""
    while True:
        folder = directory / f"{prefix}{secrets.token_hex(6)}{suffix}"
        folder.mkdir(mode=0o700)
        try:
            marker = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another process took it for one that was left, before it had its marker
            continue
        except OSError:
            folder.rmdir()
            raise
        if _lock(marker, folder) is not False:
            return folder, marker
        os.close(marker)


def _lock(marker: int, folder: Path) -> bool | None:
    """Locks the marker of `folder`. False: another process has it, or has removed it. None: no locks here."""
    import fcntl

    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems: their leftovers stay
        return None
    try:
        return os.path.samestat(os.fstat(marker), os.lstat(folder / MARKER))
    except FileNotFoundError:
        return False


def _remove_if_left(folder: Path) -> None:
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return
    try:
        marker = os.open(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        folder.rmdir()  # killed between two calls; one that holds anything stays
        return
    try:
        if _lock(marker, folder):
            _remove(folder)
    finally:
        os.close(marker)


def _remove(folder: Path) -> None:
    """The marker last: a kill in between leaves a folder that is still known for ours."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != MARKER:
            os.unlink(entry.path)
    os.unlink(folder / MARKER)
    folder.rmdir()
