"""The prefix cache: every sample's activations at the input of the active block.

The layers below the block are frozen, so their output for a sample never changes while the block trains. It is
computed once, kept (T_total, D), and read back by sample. `advance` rolls it forward through the layers that are in
place, so going through the blocks from low to high costs one forward pass of each layer for each sample, in all.
The cache is exact: it stores the layers' output in their own dtype. Half or a quarter of the bytes are opt-in (`dtype`)
and not exact: each advance starts from rounded values; `relative_error` measures the effect.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import OutOfMemory, Place, cannot_fit, gibibytes, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.sample_rows import RowFormat, SampleRows

logger = logging.getLogger(__name__)


class PrefixCache(SampleRows):
    """Activations at the input of layer `layer` for `samples`, with random access by sample.

    storage, directory: as in `memory.Place`. dtype: how a row is kept, as in `RowFormat`. budget: as of `SampleRows`.

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
        place = Place(storage, directory)
        self.decoder, self.samples, self.progress = decoder, list(samples), progress
        if not self.samples:
            raise ValueError("no samples: expected at least one")
        lengths = [len(sample["input_ids"]) for sample in self.samples]
        self._batches = token_batches(lengths, batch_tokens)
        rows = RowFormat(dtype, decoder.hidden_size, decoder.state_dtype)
        super().__init__(lengths, rows, decoder.device, "prefix cache", place, budget)
        self._between = Place(self.storage, directory)
        self.reset()

    @property
    def layer(self) -> int | None:
        """The layer whose input is held; None after an `advance` that was interrupted by an exception."""
        return self._layer

    def reset(self) -> None:
        """Starts again at the embeddings (needed after a layer below `layer` has changed)."""
        self._fill(0, 0)

    def advance(self, layer: int) -> None:
        """Rolls every sample forward to the input of `layer`, or of the one below where passes through it begin
        (`Decoder.entry`); a layer behind the present one starts again below."""
        if not 0 <= layer <= self.decoder.num_layers:
            raise ValueError(f"layer {layer}: expected 0 to {self.decoder.num_layers}")
        layer = self.decoder.entry(layer)
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
        exact = self._unrounded(stop - start)
        with bar:
            for first, last in self.decoder.stretches(start, stop):
                # rounded where a model in memory rounds: at the end, whatever comes layer by layer
                self._run(first, last, bar, exact if first > start else None, exact if last < stop else None)
        self._layer = stop

    def _unrounded(self, layers: int) -> torch.Tensor | None:
        """(T, D): where activations wait between a streamed model's layers, if the cache itself would round them."""
        if self.rows.exact or not self.decoder.streamed or layers < 2:
            return None
        shape = self._offsets[-1], self.decoder.hidden_size
        return self._between.allocate(shape, self.decoder.state_dtype, self.decoder.device, "activation store")

    def _run(self, start: int, stop: int, bar: tqdm, source: torch.Tensor | None, target: torch.Tensor | None) -> None:
        """Rolls all samples through some layers, from `source` to `target` (None: the cache). Where memory runs out a
        batch is done again in halves, and later ones are cut to what fits."""
        queue, done, limit = collections.deque(self._batches), [], math.inf
        while queue:
            indices = queue.popleft()
            tokens, half = self._offsets[indices[-1] + 1] - self._offsets[indices[0]], len(indices) // 2
            if half and tokens > limit:
                queue.extendleft((indices[half:], indices[:half]))
                continue
            try:
                self._roll(indices, start, stop, source, target)
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

    def _roll(
        self, indices: Sequence[int], start: int, stop: int, source: torch.Tensor | None, target: torch.Tensor | None
    ) -> None:
        held, device = self.span(indices[0], indices[-1]), self.decoder.device
        own = slice(self._offsets[indices[0]], self._offsets[indices[-1] + 1])
        if stop == 0:
            hidden = None
        else:
            hidden = self.rows.decode(held.to(device)) if source is None else source[own].to(device)
        out = self.decoder.run(self._pack(indices), Stretch(start, hidden), stop)
        if target is None:
            held.copy_(self.rows.encode(out))
        else:
            target[own].copy_(out)

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
        hidden = self.rows.gathered(self.parts(indices), self.decoder.device)
        return self._pack(indices, hidden, self._layer)

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
