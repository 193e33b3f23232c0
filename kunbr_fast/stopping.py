"""A run that ends in good order because it was asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """A run was asked to stop and has. What was finished is kept in its output_dir, and `resume` goes on from there.

    No `Exception`: code that tries again after one must not take it for a failure.
    """


class Stop:
    """A request to end a run after its present step, with a checkpoint: made by a signal's handler or another thread.

        stop = kf.Stop()
        signal.signal(signal.SIGTERM, lambda number, frame: stop.request())
        kf.unlearn(model, forget, retain, output_dir=out, stop=stop)  # raises kf.Stopped

    The steps of the warm-up and of blocks look at it; other work goes on until the next of these. Of several ranks that
    share their steps all stop at the same one, if one of them is asked to.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False  # as of the last step, by all ranks that shared it
        self.awaited = False  # whether a run is at its steps, and will see a request soon

    def request(self) -> None:
        self.requested = True

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Around steps that look at the request."""
        self.awaited = True
        try:
            yield
        finally:
            self.awaited = False
