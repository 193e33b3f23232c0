"""The original's outputs of layers for a whole data set: computed once, and kept as the prefix cache keeps its rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.sample_rows import RowFormat, SampleRows


class Spread:
    """The mean over states of |h - mean h|^2, from sums in fp64 of those that were added."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, 0.0, 0.0

    def add(self, states: torch.Tensor) -> None:
        """Of (T, D)."""
        self._count += len(states)
        self._total = self._total + states.sum(0, dtype=torch.float64)
        self._squares = self._squares + torch.linalg.vector_norm(states, dtype=torch.float64).square()

    def value(self) -> torch.Tensor:
        return (self._squares - self._total.square().sum() / self._count) / self._count


class LayerStates(SampleRows):
    """The outputs of `layers` for all tokens of `samples`, from one forward pass of the model as it is now: it must be
    the original. A streamed model reads each layer once.

    A sample's rows are its tokens at the first layer, then at the next. place: where they lie, and a streamed model's
    activations on the way. dtype, budget: as of the prefix cache. spread: of each layer, see `Spread`. relative_error:
    |kept - exact| / |exact| over all of them, 0 where rows are kept in the model's own dtype.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        layers: Sequence[int],
        place: Place | None = None,
        *,
        dtype: str = "none",
        budget: int | None = None,
        batch_tokens: int = 4096,
        progress: bool = False,
    ):
        self.layers, self._lengths = sorted(layers), [len(sample["input_ids"]) for sample in samples]
        place, rows = place or Place(), RowFormat(dtype, decoder.hidden_size, decoder.state_dtype)
        counts = [len(self.layers) * length for length in self._lengths]
        super().__init__(counts, rows, decoder.device, "original's hidden states", place, budget)
        self._spreads = {layer: Spread() for layer in self.layers}
        self._errors = torch.zeros(2, dtype=torch.float64, device=decoder.device)
        batches = token_batches(self._lengths, batch_tokens)
        packed = (pack([samples[i] for i in indices]).to(decoder.device) for indices in batches)
        with tqdm(
            total=len(batches) * len(self.layers),
            desc="original's hidden states",
            unit="batch",
            leave=False,
            disable=not progress,
        ) as bar:
            for number, batch, stops, stretch in decoder.forward_to(packed, [i + 1 for i in self.layers], place):
                self._measure(decoder, batch, batches[number], stops, stretch)
                bar.update(len(stops))
        wrong, whole = self._errors.tolist()  # waits for the device
        self.spread = {layer: float(spread.value()) for layer, spread in self._spreads.items()}
        self.relative_error = (wrong / whole) ** 0.5 if wrong else 0.0

    @torch.no_grad()
    def _measure(
        self, decoder: Decoder, batch: PackedBatch, indices: Sequence[int], stops: Sequence[int], stretch: Stretch
    ) -> None:
        """The outputs of the layers below `stops`: the batch may have come as far as the first of them already."""
        taps = {stop - 1: functools.partial(self._keep, stop - 1, indices) for stop in stops}
        if stretch.start in stops:
            taps.pop(stretch.start - 1)(stretch.hidden)
        if taps:
            decoder.run(batch, Stretch(stretch.start, stretch.hidden, taps=taps), max(stops))

    def _keep(self, layer: int, indices: Sequence[int], states: torch.Tensor) -> torch.Tensor:
        self._spreads[layer].add(states)
        rows = self.rows.encode(states)
        if not self.rows.exact:
            for at, x in enumerate((self.rows.decode(rows) - states, states)):
                self._errors[at] += torch.linalg.vector_norm(x, dtype=torch.float64).square()
        first = itertools.accumulate((self._lengths[i] for i in indices), initial=0)
        for i, start in zip(indices, first):
            self._of(layer, self.span(i, i)).copy_(rows[start : start + self._lengths[i]], non_blocking=True)
        return states

    def _of(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """A layer's rows among those of a sample."""
        return rows.unflatten(0, (len(self.layers), -1))[self.layers.index(layer)]

    def __len__(self) -> int:
        return len(self._lengths)

    def batch(self, indices: Sequence[int]) -> dict[int, list[torch.Tensor]]:
        """For each layer the rows of the samples `indices`, as they are kept (`rows.gathered` decodes them)."""
        parts = self.parts(indices)
        return {layer: [self._of(layer, part) for part in parts] for layer in self.layers}
