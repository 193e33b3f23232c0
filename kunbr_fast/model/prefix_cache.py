"""The prefix cache: every sample's activations at the input of the active block.

The layers below the block are frozen, so their output for a sample never changes while the block trains. It is
computed once, kept (T_total, D), and read back by sample. `advance` rolls it forward through the layers that are in
place, so going through the blocks from low to high costs one forward pass of each layer for each sample, in all.
The cache is exact: it stores the layers' output in their own dtype. Half or a quarter of the bytes are opt-in (`dtype`)
and not exact: each advance starts from rounded values; `relative_error` measures the effect.

With a budget there are two places. All samples lie in the slower one; the fast one has copies of those whose next use,
known beforehand (`expect`), is soonest. The sample with the latest next use is dropped first (Belady, IBM Systems
Journal 5, 1966); one whose next use is later than every cached sample's is not cached.
"""

from __future__ import annotations

import bisect
import collections
import heapq
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import OutOfMemory, Place, cannot_fit, choose_storage, gibibytes, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder, Stretch

logger = logging.getLogger(__name__)
CACHE_DTYPES = ("none", "bf16", "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Rows:
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

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kind != "fp8":
            return rows.to(self._dtype)
        scale = rows[:, self._scale_at :].contiguous().view(torch.float32)
        return (rows[:, : self._size].view(FP8).float() * scale).to(self._dtype)


class PrefixCache:
    """Activations at the input of layer `layer` for `samples`, with random access by sample.

    storage, directory: as in `memory.Place`. dtype: how a row is kept, as in `Rows`. budget: the most bytes in
    `storage` ("auto": on the device, without a GPU in main memory). A larger cache lies in the next slower place, which
    is then `storage`, and `fast` the one asked for.

    The cache trusts that layers below `layer` stay as they are; `reset` starts again at the embeddings.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        storage: str = "auto",
        directory: str | Path | None = None,
        batch_tokens: int = 4096,
        progress: bool = False,
        *,
        dtype: str = "none",
        budget: int | None = None,
    ):
        Place(storage)
        self.decoder, self.samples, self.progress = decoder, list(samples), progress
        if not self.samples:
            raise ValueError("no samples: expected at least one")
        lengths = [len(sample["input_ids"]) for sample in self.samples]
        self._offsets = list(itertools.accumulate(lengths, initial=0))
        self._batches = token_batches(lengths, batch_tokens)
        self.rows = Rows(dtype, decoder.hidden_size, decoder.dtype)
        shape = (self._offsets[-1], self.rows.width)
        self.nbytes = math.prod(shape) * self.rows.dtype.itemsize
        self.budget, self.fast = budget, None
        if storage == "auto":
            fastest = "device" if decoder.device.type == "cuda" else "host"
            storage = choose_storage(self.nbytes, decoder.device) if budget is None else fastest
        if budget is not None and self.nbytes > budget:
            if storage == "file":
                raise ValueError(
                    f"a budget of {gibibytes(budget)} for a prefix cache of {gibibytes(self.nbytes)} in a file: there "
                    "is no slower place for the rest; leave the budget out, or name a faster storage"
                )
            self.fast = storage
            storage = "file" if storage == "host" else choose_storage(self.nbytes, torch.device("cpu"))
        self.storage = storage
        self._buffer = Place(storage, directory).allocate(shape, self.rows.dtype, decoder.device, "prefix cache")
        self.hits = self.misses = 0  # samples that were in the fast place, or not
        self.expect([])
        self.reset()

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

    @property
    def layer(self) -> int | None:
        """The layer whose input is held; None after an `advance` that was interrupted by an exception."""
        return self._layer

    def reset(self) -> None:
        """Starts again at the embeddings (needed after a layer below `layer` has changed)."""
        self._fill(0, 0)

    def advance(self, layer: int) -> None:
        """Rolls every sample forward to the input of `layer`; a layer behind the present one starts again below."""
        if not 0 <= layer <= self.decoder.num_layers:
            raise ValueError(f"layer {layer}: expected 0 to {self.decoder.num_layers}")
        if self._layer is None or layer < self._layer:
            self.reset()
        if layer > self._layer:
            self._fill(self._layer, layer)

    @torch.no_grad()
    def _fill(self, start: int, stop: int) -> None:
        bar = tqdm(
            total=len(self._batches) * max(stop - start, 1),
            desc=f"prefix cache to layer {stop}",
            unit="batch",
            leave=False,
            disable=not self.progress or stop == 0,
        )
        self._layer = None  # until all samples are there
        self._drop_held()
        with bar:
            for first, last in self.decoder.stretches(start, stop):
                self._run(first, last, bar)
        self._layer = stop

    def _run(self, start: int, stop: int, bar: tqdm) -> None:
        """Rolls all samples through some layers. Where memory runs out a batch is done again in halves, and later ones
        are cut to what fits."""
        queue, done, limit = collections.deque(self._batches), [], math.inf
        while queue:
            indices = queue.popleft()
            tokens, half = self._offsets[indices[-1] + 1] - self._offsets[indices[0]], len(indices) // 2
            if half and tokens > limit:
                queue.extendleft((indices[half:], indices[:half]))
                continue
            try:
                self._roll(indices, start, stop)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error)
            else:
                done.append(indices)
                bar.update(max(stop - start, 1))
                continue
            release()
            if not half:
                raise self._refusal(tokens, said)
            if limit == math.inf:
                logger.warning(
                    f"prefix cache: memory ran out at a batch of {tokens} tokens: it goes on in smaller ones, same "
                    "result"
                )
            limit = tokens // 2
            queue.appendleft(indices)
        self._batches = done  # as small as they had to be

    def _roll(self, indices: Sequence[int], start: int, stop: int) -> None:
        held = self._buffer[self._offsets[indices[0]] : self._offsets[indices[-1] + 1]]
        hidden = None if stop == 0 else self.rows.decode(held.to(self.decoder.device))
        held.copy_(self.rows.encode(self.decoder.run(self._pack(indices), Stretch(start, hidden), stop)))

    def _pack(self, indices: Sequence[int], *more: Any) -> PackedBatch:
        return pack([self.samples[i] for i in indices], *more).to(self.decoder.device)

    def _refusal(self, tokens: int, said: str) -> OutOfMemory:
        cures = ["shorter samples (max_length)", "a streamed model (open_streamed)"]
        if self.storage == "device" or self.fast == "device":
            cures.insert(0, 'the cache elsewhere (cache="host")')
        return cannot_fit(tokens, f"prefix cache: {gibibytes(self.nbytes)}", cures, self.decoder.device, said)

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The samples `indices` as a packed batch on the model's device, with `hidden` and `layer` filled in."""
        if not len(indices):
            raise ValueError("an empty batch: expected at least one sample index")
        if min(indices) < 0:
            raise IndexError(f"sample index {min(indices)}: expected 0 to {len(self.samples) - 1}")
        if self._layer is None:
            raise ValueError("the prefix cache was interrupted half-way: call advance or reset first")
        if self.fast is not None:
            before, after = self._now, range(self._now + 1, len(self._expected))
            self._now = next((n for n in after if self._expected[n] == tuple(indices)), before)
            if self._now > before + 1:  # what was left out will not be used
                self._last = [(-self._next_use(i), i) for i in self._held]
                heapq.heapify(self._last)
        parts = [self._part(i) for i in indices]
        lengths = [len(part) for part in parts]
        rows = self._buffer.new_empty((sum(lengths), self._buffer.shape[1]), device=self.decoder.device)
        for part, into in zip(parts, rows.split(lengths)):  # one by one: a concatenation would not be pinned
            into.copy_(part, non_blocking=True)
        return self._pack(indices, self.rows.decode(rows), self._layer)

    @property
    def is_exact(self) -> bool:
        return self.rows.exact

    @torch.no_grad()
    def exact(self, indices: Sequence[int]) -> torch.Tensor:
        """(T, D): the samples' activations without rounding, computed anew from the embeddings."""
        return self.decoder.run(self._pack(indices), stop=self._layer)

    def relative_error(self, indices: Sequence[int]) -> float:
        """|held - exact|_2 / |exact|_2 over all of the samples' activations."""
        exact = self.exact(indices).double()
        return float((self.batch(indices).hidden.double() - exact).norm() / exact.norm())

    # ------------------------------------------------ the fast place

    def _part(self, i: int) -> torch.Tensor:
        """Sample i's rows, in the fast place if they are or can be there."""
        rows = self._buffer[self._offsets[i] : self._offsets[i + 1]]
        if self.fast is None:
            return rows
        if i in self._held:
            self.hits += 1
        else:
            self.misses += 1
            if not self._make_room(rows.nbytes, self._next_use(i)):
                return rows
            fast = Place(self.fast).allocate(rows.shape, rows.dtype, self.decoder.device, "prefix cache")
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


class CacheShard:
    """One rank's part of a prefix cache. `batch` takes indices among all samples; home: each one's rank; of: makes the
    `PrefixCache`."""

    def __init__(
        self, of: Callable[[list[Sample]], PrefixCache], samples: list[Sample], home: Sequence[int], rank: int
    ):
        # after the forget and retain samples come alternates; each lies where its forget sample does
        held = [i for i in range(len(samples)) if home[i if i < len(home) else i - len(home)] == rank]
        self._place = {index: place for place, index in enumerate(held)}
        self._cache = of([samples[i] for i in held]) if held else None

    def advance(self, layer: int) -> None:
        if self._cache is not None:
            self._cache.advance(layer)

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        return self._cache.batch([self._place[i] for i in indices])

    @property
    def is_exact(self) -> bool:
        return self._cache is None or self._cache.is_exact

    def exact(self, indices: Sequence[int]) -> torch.Tensor:
        return self._cache.exact([self._place[i] for i in indices])

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        if self._cache is not None:
            self._cache.expect([self._place[i] for i in indices] for indices in batches)
