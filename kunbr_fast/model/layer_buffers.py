"""Bytes on their way between main memory, or mapped files, and the device: buffers, and who copies.

On a GPU each direction has a thread and a CUDA stream of its own. What is not in pinned memory goes through a pinned
buffer. On a CPU "the device" is main memory too, and each way is one copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

Source = Callable[[torch.Tensor], torch.Tensor]  # gets a buffer in main memory; returns it, filled, or what holds more


class Copies:
    """Who copies to and from `device`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.inward, self.outward = (torch.cuda.Stream(device) if self.cuda else None for _ in range(2))
        begin = functools.partial(torch.cuda.set_device, device) if self.cuda else None
        self._reader = ThreadPoolExecutor(1, "kunbr-read", begin)
        self._writer = ThreadPoolExecutor(1, "kunbr-write", begin)

    def _now(self) -> Any:
        """After all that is launched so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def fill(self, buffer: Buffer, size: int, source: Source) -> None:
        """Begins to bring `size` bytes into the buffer, once nothing that is launched so far reads it."""
        buffer.loading = self._reader.submit(self._fill, buffer, size, source, self._now(), buffer.leaving)

    def drain(self, buffer: Buffer, size: int, target: torch.Tensor) -> Future:
        """Begins to copy the buffer's first bytes, as they are after all that is launched so far, to main memory."""
        buffer.leaving = self._writer.submit(self._drain, buffer, size, target, self._now())
        return buffer.leaving

    def _fill(self, buffer: Buffer, size: int, source: Source, free: Any, leaving: Future | None) -> None:
        if leaving is not None:
            leaving.result()
        if not self.cuda:
            found = source(buffer.data[:size])
            if found.data_ptr() != buffer.data.data_ptr():
                buffer.data[:size].copy_(found[:size])
            return
        buffer.arrived.synchronize()  # the pinned buffer may still be on its way to the device
        found = source(buffer.staging[:size])
        if not found.is_pinned():
            buffer.staging[:size].copy_(found[:size])
            found = buffer.staging
        with torch.cuda.stream(self.inward):
            self.inward.wait_event(free)
            buffer.data[:size].copy_(found[:size], non_blocking=True)
            buffer.arrived.record(self.inward)

    def _drain(self, buffer: Buffer, size: int, target: torch.Tensor, ready: Any) -> None:
        if not self.cuda:
            target[:size].copy_(buffer.data[:size])
            return
        pinned = target.is_pinned()
        into = target if pinned else buffer.staging
        with torch.cuda.stream(self.outward):
            self.outward.wait_event(ready)
            into[:size].copy_(buffer.data[:size], non_blocking=True)
            buffer.left.record(self.outward)
        buffer.left.synchronize()
        if not pinned:
            target[:size].copy_(into[:size])


class Buffer:
    """So many bytes on the device. loading, leaving: a copy into it, or out of it, that is under way."""

    def __init__(self, size: int, copies: Copies):
        self.data = torch.empty(size, dtype=torch.uint8, device=copies.device)
        self.loading: Future | None = None
        self.leaving: Future | None = None
        self._copies = copies
        if copies.cuda:
            # a copy may still be under way when the buffer is let go of: no other tensor gets this memory before
            self.data.record_stream(copies.inward)
            self.data.record_stream(copies.outward)
            self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()

    def arrive(self) -> None:
        """What is launched from now on finds what is loading here. Raises the error of a load that failed."""
        loading, self.loading = self.loading, None
        loading.result()
        if self._copies.cuda:
            torch.cuda.current_stream(self._copies.device).wait_event(self.arrived)

    def wait(self) -> None:
        """Until no thread and no copy uses it, nor the memory that it is filled from; of a load that failed nobody
        hears."""
        for job in (self.loading, self.leaving):
            if job is not None:
                job.exception()
        self.leaving = None
        if self._copies.cuda:
            self.arrived.synchronize()  # the thread has launched the copy, and does not wait for it
