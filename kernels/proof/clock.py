"""How fast a kind of launch is beside torch, call by call in turns: eagerly, and replayed from a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..verdicts import Timing
from .cases import Kind, Shape
from .gate import finish

ROUNDS, SECONDS = 30, 0.15  # at most of a shape and mode; at least LEAST rounds
LEAST = 3


def prepare(kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    """Runs each timed shape once: what it needs is compiled, and kept on disk, before the clock starts."""
    for shape in kind.shapes:
        try:
            shape.run(kind.impl, shape.draw(device, dtype))
            finish(device)
        except torch.OutOfMemoryError:
            pass  # that shape will not be timed either
        _release(device)


def times(kind: Kind, dtype: torch.dtype, device: torch.device) -> tuple[Timing, ...]:
    """Of each shape that fits the memory."""
    found = []
    for shape in kind.shapes:
        try:
            found += _times_of(shape, kind, dtype, device)
        except torch.OutOfMemoryError:
            pass
        _release(device)
    return tuple(found)


def _times_of(shape: Shape, kind: Kind, dtype: torch.dtype, device: torch.device) -> list[Timing]:
    inputs = shape.draw(device, dtype)
    runs = [lambda impl=impl: shape.run(impl, inputs) for impl in ("torch", kind.impl)]
    for run in runs:
        run()
        finish(device)
    before = _long_work(device) if kind.host_ahead and device.type == "cuda" else None
    found = [Timing(shape.size, "eager", *_in_turns(runs, device, before))]
    if kind.graphs and device.type == "cuda":
        replays = [_captured(run, device) for run in runs]
        if None not in replays:
            found.append(Timing(shape.size, "graph", *_in_turns(replays, device)))
    return found


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Replays `run` from a graph; None where it cannot be captured, which says nothing of its results."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return graph.replay


def _long_work(device: torch.device) -> Callable[[], object]:
    """Queues half a millisecond of work on the device, in which the host gets ahead. It empties the L2 cache, too."""
    buffer = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def queue() -> None:
        for value in range(8):
            buffer.fill_(value)

    return queue


def _in_turns(
    runs: list[Callable[[], object]], device: torch.device, before: Callable[[], object] | None = None
) -> list[float]:
    """The median of each, in milliseconds. before: runs ahead of each, untimed, and is not waited for."""
    measured: list[list[float]] = [[] for _ in runs]
    begin = time.monotonic()
    for number in range(ROUNDS):
        if number >= LEAST and time.monotonic() - begin > SECONDS:
            break
        for run, milliseconds in zip(runs, measured):
            milliseconds.append(_once(run, device, before))
    return [statistics.median(milliseconds) for milliseconds in measured]


def _once(run: Callable[[], object], device: torch.device, before: Callable[[], object] | None) -> float:
    """From an idle device where there is no `before`, so that the host's time counts where it is the longer one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return max(1e-6, (time.perf_counter() - begin) * 1e3)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    first.record()
    run()
    last.record()
    finish(device)
    return max(1e-6, first.elapsed_time(last))


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
