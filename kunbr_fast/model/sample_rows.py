"""Rows of activations by sample, with a budget for the fast place: what the prefix cache and the original's hidden
states are kept in.

With a budget there are two places. All samples lie in the slower one; the fast one has copies of those whose next use,
known beforehand (`expect`), is soonest. The sample with the latest next use is dropped first (Belady, IBM Systems
Journal 5, 1966); one whose next use is later than every cached sample's is not cached.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from kunbr_fast.memory import Place, choose_storage, gibibytes

CACHE_DTYPES = ("none", "bf16", "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class RowFormat:
    """How rows of activations are kept: `none` in the model's dtype, `bf16`, or `fp8`: e4m3 with a scale for each row
    (its largest value becomes 448), both in one row of bytes."""

    def __init__(self, kind: str, hidden_size: int, dtype: torch.dtype):
        if kind not in CACHE_DTYPES:
            raise ValueError(f"cache dtype {kind!r}: expected one of {', '.join(CACHE_DTYPES)}")
        self.kind, self._size, self._dtype = kind, hidden_size, dtype
        self._scale_at = -(-hidden_size // 4) * 4
        self.dtype = {"none": dtype, "bf16": torch.bfloat16, "fp8": torch.uint8}[kind]
        self.width = self._scale_at + 4 if kind == "fp8" else hidden_size
        self.exact = self.dtype == dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, width)"""
        if self.kind != "fp8":
            return x.to(self.dtype)
        scale = x.abs().amax(1, keepdim=True).float() / FP8_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        rows = torch.zeros(len(x), self.width, dtype=torch.uint8, device=x.device)
        rows[:, : self._size] = (x.float() / scale).to(FP8).view(torch.uint8)
        rows[:, self._scale_at :] = scale.view(torch.uint8)
        return rows

    def gathered(self, parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """Rows of several samples as one tensor on `device`, decoded. Nobody waits for the device."""
        if all(part.device == device for part in parts):
            return self.decode(torch.cat(list(parts)))
        lengths = [len(part) for part in parts]
        rows = parts[0].new_empty((sum(lengths), self.width), device=device)
        for part, into in zip(parts, rows.split(lengths)):  # one by one: a concatenation would not be pinned
            into.copy_(part, non_blocking=True)
        return self.decode(rows)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kind != "fp8":
            return rows.to(self._dtype)
        scale = rows[:, self._scale_at :].contiguous().view(torch.float32)
        return (rows[:, : self._size].view(FP8).float() * scale).to(self._dtype)


class SampleRows:
    """Some rows of each sample in one buffer, with random access by sample.

    counts: each sample's rows. rows: how a row is kept. device: the model's. what: they are, in errors. place: where
    they lie. budget: the most bytes there ("auto": on the device, without a GPU in main memory). What takes more lies
    in the next slower place, which is then `storage`, and `fast` the one asked for.
    """

    def __init__(
        self,
        counts: Sequence[int],
        rows: RowFormat,
        device: torch.device,
        what: str,
        place: Place,
        budget: int | None = None,
    ):
        self._offsets = list(itertools.accumulate(counts, initial=0))
        self.rows, self._device, self._what = rows, device, what
        shape = (self._offsets[-1], rows.width)
        self.nbytes = math.prod(shape) * rows.dtype.itemsize
        self.budget, self.fast, storage = budget, None, place.storage
        if storage == "auto":
            fastest = "device" if device.type == "cuda" else "host"
            storage = choose_storage(self.nbytes, device) if budget is None else fastest
        if budget is not None and self.nbytes > budget:
            if storage == "file":
                raise ValueError(
                    f"a budget of {gibibytes(budget)} for a {what} of {gibibytes(self.nbytes)} in a file: there "
                    "is no slower place for the rest; leave the budget out, or name a faster storage"
                )
            self.fast = storage
            storage = "file" if storage == "host" else choose_storage(self.nbytes, torch.device("cpu"))
        self.storage = storage
        self._buffer = Place(storage, place.directory).allocate(shape, rows.dtype, device, what)
        self.hits = self.misses = 0  # samples that were in the fast place, or not
        self.expect([])

    def span(self, first: int, last: int) -> torch.Tensor:
        """The rows of samples first...last, a view to be written to; then `_drop_held`."""
        return self._buffer[self._offsets[first] : self._offsets[last + 1]]

    def parts(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Each sample's rows, as they are kept, in the fast place if they are or can be there."""
        if self.fast is not None:
            before, after = self._now, range(self._now + 1, len(self._expected))
            self._now = next((n for n in after if self._expected[n] == tuple(indices)), before)
            if self._now > before + 1:  # what was left out will not be used
                self._last = [(-self._next_use(i), i) for i in self._held]
                heapq.heapify(self._last)
        return [self._part(i) for i in indices]

    def expect(self, batches: Iterable[Sequence[int]]) -> None:
        """The batches that will be asked for, in order; some may be left out. They decide what the fast place holds,
        not what `batch` returns."""
        self._expected = [tuple(indices) for indices in batches]
        self._now = -1  # which of them was asked for last
        self._uses: dict[int, list[int]] = {}
        for number, indices in enumerate(self._expected):
            for i in indices:
                self._uses.setdefault(i, []).append(number)
        self._drop_held()

    def _drop_held(self) -> None:
        self._held: dict[int, torch.Tensor] = {}  # samples in the fast place
        self._held_bytes = 0
        self._last: list[tuple[float, int]] = []  # heap of (-next use, sample); entries may be out of date

    def _part(self, i: int) -> torch.Tensor:
        """Sample i's rows, in the fast place if they are or can be there."""
        rows = self.span(i, i)
        if self.fast is None:
            return rows
        if i in self._held:
            self.hits += 1
        else:
            self.misses += 1
            if not self._make_room(rows.nbytes, self._next_use(i)):
                return rows
            fast = Place(self.fast).allocate(rows.shape, rows.dtype, self._device, self._what)
            self._held[i] = fast.copy_(rows)
            self._held_bytes += rows.nbytes
        heapq.heappush(self._last, (-self._next_use(i), i))
        return self._held[i]

    def _next_use(self, i: int) -> float:
        uses = self._uses.get(i, ())
        place = bisect.bisect_right(uses, self._now)
        return uses[place] if place < len(uses) else math.inf

    def _make_room(self, nbytes: int, use: float) -> bool:
        """Whether `nbytes` for a sample whose next use is `use` fit; drops samples that are used later than that."""
        if self._expected and use == math.inf:
            return False
        going: list[tuple[float, int]] = []
        room = self.budget - self._held_bytes
        while room < nbytes and self._last:
            entry = heapq.heappop(self._last)
            negative, i = entry
            if i not in self._held or -negative != self._next_use(i) or entry in going:
                continue
            going.append(entry)
            if -negative <= use:
                break
            room += self._held[i].nbytes
        fits = room >= nbytes
        for entry in going:
            if fits:
                self._held_bytes -= self._held.pop(entry[1]).nbytes
            else:
                heapq.heappush(self._last, entry)
        return fits
