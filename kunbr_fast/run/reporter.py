"""What a run tells while it works: a line for what begins, a progress bar, the seconds of each stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm


class Timer:
    """Seconds since it was made, until it is stopped. before: those of earlier, interrupted processes."""

    def __init__(self) -> None:
        self.before = 0.0
        self._start = self._lap = time.perf_counter()
        self._stop: float | None = None

    @property
    def seconds(self) -> float:
        return self.before + (self._stop or time.perf_counter()) - self._start

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._lap = self._lap, time.perf_counter()
        return self._lap - last

    def stop(self) -> None:
        self._stop = time.perf_counter()


class Reporter:
    """Tells what a run does.

    progress: whether progress bars are shown. say(text): is given the lines. around(stage, part): gives a context
    manager that is entered around each stage (part "") and each part of one: "step", from its samples to the update,
    and "prefix cache", a fill or a move. A benchmark puts its clock there.
    seconds: of the stages that have ended, by name.
    """

    def __init__(
        self,
        progress: bool = False,
        say: Callable[[str], None] | None = None,
        around: Callable[[str, str], contextlib.AbstractContextManager] | None = None,
    ):
        self.progress, self._say = progress, say
        self._around = around or (lambda stage, part: contextlib.nullcontext())
        self.seconds: dict[str, float] = {}
        self._stage = ""

    def silent(self) -> Reporter:
        """The same without lines and bars, for the ranks that do not speak."""
        return Reporter(around=self._around)

    def say(self, text: str) -> None:
        if self._say is not None:
            self._say(text)

    @contextlib.contextmanager
    def stage(self, name: str, text: str = "") -> Iterator[Timer]:
        """Around a stage; says `text`. Yields its timer, which stands still afterwards."""
        if text:
            self.say(text)
        outer, self._stage = self._stage, name
        timer = Timer()
        try:
            with self._around(name, ""):
                yield timer
        finally:
            timer.stop()
            self._stage, self.seconds[name] = outer, timer.seconds

    def part(self, name: str) -> contextlib.AbstractContextManager:
        """Around a part of the present stage."""
        return self._around(self._stage, name)

    def bar(self, total: int, what: str, unit: str = "step", done: int = 0) -> tqdm:
        """A progress bar over `total` units, of which `done` are done."""
        return tqdm(total=total, initial=done, desc=what, unit=unit, leave=False, disable=not self.progress)

    def title(self, what: str) -> str | None:
        """For functions whose `progress` is their bar's title, or None for no bar."""
        return what if self.progress else None
