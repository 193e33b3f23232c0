"""One process at a time writes into a folder, or to a file: a lock that says who holds it.

    with hold(folder): ...          # folder/.kunbr-fast.lock
    with hold_file(path): ...       # .NAME.lock beside it

Who holds a folder writes files of certain names there (a model's, reports): nobody else holds one of these meanwhile.

The lock file is locked (flock) for as long as its process lives, and says which one that is. The system gives the lock
back whatever ends the process; then the file is left, and the next one takes it over. Where a file system has no locks,
or none that another machine sees, what the file says decides: a process of this machine is looked for, by its number
and the time when it began (numbers are given again); one of another machine may still be there, so it keeps the lock.
The file is removed by its holder alone. One that a power cut has left damaged says nothing, as an empty one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kunbr_fast.files.model_folder import is_model_file
from kunbr_fast.files.shown import plain

logger = logging.getLogger(__name__)

NAME = ".kunbr-fast.lock"
MOUNTS = "/proc/self/mountinfo"
# what those who hold folders write there, besides models; `run.output`, `merge_folder` and `bench` have the contents
REPORTS = frozenset(
    """report.json run.yaml density.png relearning.png report.html unlearning.json evaluation.json
    evaluation.csv merge.json merge.partial.json results.json""".split()
)
BEGINS = b'{"process": '  # a lock file
PATIENCE = 1.0  # seconds until a process that has just taken a lock has written who it is
# file systems that several machines may have at once, with locks that only one of them sees
_LOCKS_OF_ONE_MACHINE = re.compile(r"(fuse|9p|virtiofs|vboxsf)\b|.*\b(nolock|localflock|local_lock=(flock|all))\b")


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process. start: by the machine's clock ticks, where that is known; machine: this boot of it; pids: what its
    processes are numbered in (containers have their own)."""

    process: int
    host: str
    since: str
    command: str
    start: int | None
    machine: str
    pids: str

    @classmethod
    def this(cls) -> Holder:
        pid, host = os.getpid(), socket.gethostname()
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(pid, host, since, plain(command, 160), _start(pid), _machine() or host, _numbering())

    def lives(self) -> bool | None:
        """None where that cannot be known from here."""
        if self.machine != (_machine() or socket.gethostname()):
            return False if self.host == socket.gethostname() else None  # this machine was started again
        if self.pids != _numbering():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's
            pass
        return self.start is None or _start(self.process) in (None, self.start)

    def __str__(self) -> str:
        return f"process {self.process} on {plain(self.host, 80)}"


def _start(pid: int) -> int | None:
    """When it began; -1 for one that has ended and is not yet collected; None where that is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _numbering() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def hold(folder: str | os.PathLike, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Inside, no other process (nor another caller in this one) holds the folder, which is made if it is not there, and
    removed at the end if it is empty. say: told where a lock is taken over.

    ValueError where it is held, or a file in it that its holder would write, naming the process; OSError where nothing
    can be written there.
    """
    folder = Path(folder)
    with _held_by_us(folder / NAME, plain(folder), say):
        for name in os.listdir(folder):
            if name.startswith(".") and name.endswith(".lock") and _is_of_holder(of := name[1 : -len(".lock")]):
                _check_free(folder / name, plain(folder / of), say)
        yield


@contextlib.contextmanager
def hold_file(path: str | os.PathLike, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """`hold` of one file, which need not be there. ValueError also where its folder's holder would write it."""
    path = Path(path)
    with _held_by_us(path.with_name(f".{path.name}.lock"), plain(path), say):
        if _is_of_holder(path.name):
            _check_free(path.with_name(NAME), plain(path.parent), say)
        yield


def _is_of_holder(name: str) -> bool:
    return name in REPORTS or is_model_file(name)


def _check_free(file: Path, what: str, say: Callable[[str], None]) -> None:
    """ValueError where another one holds the lock. Of two that look at each other's none may go on, never both."""
    if os.path.lexists(file):
        _Lock(file, what, say).release()


@contextlib.contextmanager
def _held_by_us(file: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    lock = _Lock(Path(os.path.abspath(file)), what, say)
    _held.add(lock)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, file: Path, what: str, say: Callable[[str], None]):
        self.file, self.what, self._say = file, what, say
        self._made: list[Path] = []
        self._handle = -1
        try:
            for _ in range(1000):
                if self._take():
                    return
            raise OSError(errno.ENOENT, f"could not write {plain(self.file)}: {os.strerror(errno.ENOENT)}")
        except BaseException:
            self._close()
            raise

    def _take(self) -> bool:
        """False: the file is not what it was, look again."""
        self._close()
        fresh = self._open()
        if fresh is None:
            return False
        locked = _flock(self._handle)
        if locked is False:
            raise self._in_use(self._who())
        try:
            if not os.path.samestat(os.fstat(self._handle), os.lstat(self.file)):
                return False
        except FileNotFoundError:  # its holder has ended meanwhile
            return False
        before = None if fresh else self._read()
        if locked is None and not fresh:
            before = self._who()
            if before is None or before.lives() is not False:
                raise self._in_use(before, sure=False)
            self._set_aside()
            return False
        if before is None and os.fstat(self._handle).st_size:  # damaged
            if _locks_of_one_machine(self._handle):
                raise self._in_use(None, sure=False)
            self._say(f"{self.what}: a process was at work here and has ended: its lock is taken over")
        if before is not None:
            lives = before.lives()
            elsewhere = lives is None and _locks_of_one_machine(self._handle)
            if elsewhere or (lives and before.process != os.getpid()):  # the second: its lock was lost
                raise self._in_use(before, sure=False)
            self._say(f"{self.what}: {before} was at work here and has ended: its lock is taken over")
        self._write(needed=locked is None)
        return True

    def _open(self) -> bool | None:
        """Whether the file is a new one; None: it has come or gone meanwhile."""
        how = os.O_RDWR | os.O_DSYNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # DSYNC: other machines read it
        try:
            self._make_folder()
            try:
                self._handle, fresh = os.open(self.file, how | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                self._handle, fresh = os.open(self.file, how), False
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._foreign() from error
            raise OSError(error.errno, f"could not write {plain(self.file)}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise self._foreign()
        return fresh

    def _make_folder(self) -> None:
        missing = [folder for folder in self.file.parents if not os.path.lexists(folder)]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                self._made.append(folder)

    def _read(self) -> Holder | None:
        """Who the file says holds it; None where it says nothing yet, or no more."""
        data = os.pread(self._handle, 2**12, 0)
        if not (text := data.rstrip(b"\0")):
            return None
        try:
            found = json.loads(data)
            values = {field.name: found[field.name] for field in dataclasses.fields(Holder)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ValueError) and text[: len(BEGINS)] == BEGINS[: len(text)]:
                return None
            raise self._foreign() from error
        if not isinstance(values["process"], int) or values["process"] < 1:
            raise self._foreign()
        return Holder(**values)

    def _who(self) -> Holder | None:
        """The holder, after a moment's patience with one that has just begun; None where it does not say."""
        until = time.monotonic() + PATIENCE
        while (found := self._read()) is None or found.lives() is False:
            if time.monotonic() > until:
                return found if _flock(self._handle) is None else None
            time.sleep(0.02)
        return found

    def _write(self, needed: bool) -> None:
        """needed: the file is all that keeps others out; else a full disk is told of by what is written next."""
        data = json.dumps(dataclasses.asdict(Holder.this())).encode() + b"\n"
        try:
            written = os.pwrite(self._handle, data, 0)
            os.ftruncate(self._handle, written if written == len(data) else 0)
        except OSError as error:
            if needed:
                self.release()
                raise OSError(error.errno, f"could not write {plain(self.file)}: {error.strerror}") from error

    def _set_aside(self) -> None:
        """Takes away a file that a process which is gone has left: where there are no locks, of several that try one
        does it."""
        aside = self.file.with_name(f"{self.file.name}.{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):  # another was faster
            os.rename(self.file, aside)
            if os.path.samestat(os.fstat(self._handle), os.lstat(aside)):
                os.unlink(aside)
                self._say(f"{self.what}: {self._read()} was at work here and has ended: its lock is taken over")
            else:  # another one's, which has just begun
                os.rename(aside, self.file)

    def _in_use(self, holder: Holder | None, sure: bool = True) -> ValueError:
        who = "another process"
        if holder is not None:
            who = f"{holder} (since {plain(holder.since, 40)}: {plain(holder.command, 160)})"
        gone = "" if sure else f", or, if that process is gone, delete {plain(self.file)}"
        return ValueError(f"{self.what} is in use by {who}: wait until it has ended, or give another output{gone}")

    def _foreign(self) -> ValueError:
        return ValueError(f"{plain(self.file)}: it is no lock file of kunbr-fast's: move it away")

    def _close(self) -> None:
        """Without a lock: the file is somebody else's."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
        self._made = []

    def release(self) -> None:
        _held.discard(self)
        if self._handle < 0:
            return
        try:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._handle), os.lstat(self.file)):
                    os.unlink(self.file)
        finally:
            self._close()

    def forget(self) -> None:
        """In a process that was forked from the holder, which has it still."""
        os.close(self._handle)
        self._handle = -1


_held: set[_Lock] = set()


def _forget() -> None:
    while _held:
        _held.pop().forget()


os.register_at_fork(after_in_child=_forget)


def _flock(handle: int) -> bool | None:
    """Whether the file is locked now, for this handle; None where there are no locks."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _locks_of_one_machine(handle: int) -> bool:
    """Whether other machines may have the file system and would not see a lock."""
    device = os.fstat(handle).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path(MOUNTS).read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(
        line.split()[2] == number and _LOCKS_OF_ONE_MACHINE.match(line.partition(" - ")[2]) is not None
        for line in lines
    )
