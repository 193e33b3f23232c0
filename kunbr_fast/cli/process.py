"""The process of the command line: what signals do to it, and its standard streams.

Ctrl-C, SIGTERM and SIGHUP give one line on standard error and the exit status 128 + the signal's number. What happens
in between depends on when they come:

- Before and after a command's work (imports, most of all) there is nothing to lose: the process ends at once (`begin`).
- In the work (`working`) an exception is raised, so that what is open is closed; within a run's training steps SIGTERM
  and SIGHUP wait for the present step and its checkpoint (`kunbr_fast.stopping`).
- A second signal ends the process at once. So does the first where the main thread is inside C++ for long and no
  training step can be waited for.

Files are whole whenever the process ends: each takes its name in one step (`files.atomic`). This module is imported
first of all, so it imports little.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from kunbr_fast.stopping import Stop, Stopped

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated (SIGHUP)"}
ECHO = 5.0  # seconds within which torchrun passes on what its processes may have got already
PATIENCE = 5.0  # seconds that a handler may have to wait for C++, where nothing is finished first
BROKEN_PIPE = 128 + signal.SIGPIPE

_work: Caught | None = None  # while a command works
_handled = 0.0  # when a handler ran last
_begun = False


def end(number: int) -> NoReturn:
    """One line, and the end, whatever else is under way."""
    with contextlib.suppress(OSError):
        os.write(2, f"kunbr-fast: {SAID[number]}\n".encode())
    os._exit(128 + number)


class Caught:
    """The signals that come while a command works. number: the first; stop: what its run asks."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raised = False  # in the middle of the work: what went wrong after it has its cause there
        self.stop = Stop()
        self._at = 0.0
        self._again = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _handled
        _handled = now = time.monotonic()
        if self._again:
            self._again = False
            raise Stopped
        if self.number is not None:
            if not _echoes(now - self._at):
                end(number)
            return
        self.number, self._at = number, now
        if number == signal.SIGHUP:
            _leave_terminal()
        self.stop.request()
        if number == signal.SIGINT or not self.stop.awaited:
            if _imports(frame):  # an extension's start may print what is raised in it, and go on
                end(number)
            self.raised = True
            raise Stopped

    def swallowed(self, hook: object, unraisable: sys.UnraisableHookArgs) -> None:
        """In place of sys.unraisablehook: an exception that Python could not raise, as in a __del__, comes again."""
        if issubclass(unraisable.exc_type, Stopped) and self.number is not None:
            _thread.start_new_thread(self._repeat, ())  # not from here: it would be raised within this hook
        else:
            hook(unraisable)

    def _repeat(self) -> None:
        time.sleep(0.01)
        self._again = True
        _thread.interrupt_main(self.number)


def _echoes(seconds: float) -> bool:
    """Whether a signal so long after another may be the same one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and seconds < ECHO


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave_terminal() -> None:
    """Writing to a terminal that has gone is an error, which would cost the checkpoint."""
    gone = os.open(os.devnull, os.O_RDWR)
    for stream in _terminals:
        os.dup2(gone, stream)
    os.close(gone)


_terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]


def _install(handler: object) -> dict[int, object]:
    """Sets it for the signals that are not ignored (nohup's, say); returns the handlers before."""
    before = {number: signal.getsignal(number) for number in SAID}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


@contextlib.contextmanager
def working() -> Iterator[Caught]:
    """While a command works; afterwards all handlers are those of before. In another thread than the main one, where
    Python allows no handlers, nothing is caught."""
    global _work
    import threading

    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    hook, outer = sys.unraisablehook, _work
    before = _install(caught)
    _work, sys.unraisablehook = caught, lambda unraisable: caught.swallowed(hook, unraisable)
    try:
        yield caught
    finally:
        _work, sys.unraisablehook = outer, hook
        for number, old in before.items():
            signal.signal(number, old)


# ---------------------------------------------------------------- a process of our own


def begin() -> None:
    """First of all, in a process that is the command line's: signals end it with one line from here on, and what is
    printed is no reason to fail."""
    global _begun
    if _begun:
        return
    _begun = True
    _install(lambda number, frame: end(number))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_leave_alone)
    _thread.start_new_thread(_watch, (reading,))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: no other file may get its number
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # where it is None, print takes standard output
    if sys.stdout is not None:
        sys.stdout = Output.of(sys.stdout)


class Output(io.TextIOWrapper):
    """Standard output, which an error of it names; of names that are no text it shows the bytes."""

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> Output:
        how = {name: getattr(stream, name) for name in ("encoding", "line_buffering", "write_through")}
        return cls(stream.detach(), errors="backslashreplace", **how)

    def write(self, text: str) -> int:
        with self._naming():
            return super().write(text)

    def flush(self) -> None:
        with self._naming():
            super().flush()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = "standard output"
            raise


def _leave_alone() -> None:
    """In a forked process: its signals are its own."""
    signal.set_wakeup_fd(-1)
    _install(signal.SIG_DFL)


def _watch(pipe: int) -> None:
    """Ends the process where Python cannot run the handler, as the main thread is inside C++: at an import, or waiting
    for another process."""
    earlier: float | None = None
    while True:
        for number in os.read(pipe, 64):
            now = time.monotonic()
            second = earlier is not None and not _echoes(now - earlier)
            earlier = earlier or now
            if number not in SAID or (_work is not None and _work.stop.awaited and not second):
                continue
            time.sleep(1.0 if _work is None or second else PATIENCE)
            if _handled < now - 0.5:
                end(number)


def finished(status: int) -> int:
    """The exit status, when all that was printed has been taken. What nobody takes is dropped, without Python's own
    words at its exit."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if number == 1:
                status = status or failed(error)
    return status


def failed(error: OSError) -> int:
    """Where the command line itself cannot be answered; without a word where its reader has had enough."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    with contextlib.suppress(OSError):
        print(f"kunbr-fast: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
    return 2
