"""The decoder of a model whose layers come from its files when they run (`open_streamed`)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Arrival, Decoder, Stretch, Turn
from kunbr_fast.model.layer_major import LayerMajor
from kunbr_fast.model.weights import weights_of


class StreamedDecoder(Decoder):
    """A `Decoder` that has one layer in place at a time. `weights` is the model's `LayerStream`."""

    def save(self, directory: str | Path) -> None:
        """Writes the model, weights of `place` included; from then on it is read from there."""
        self.weights.save(directory)
        self.weights.moved(directory)

    def held(self, layers: range) -> contextlib.AbstractContextManager:
        return self.weights.held(layers)

    @contextlib.contextmanager
    def instead(self, other: nn.Module) -> Iterator[Decoder]:
        with self.weights.instead(weights_of(other)):
            yield self

    def visit(self, order: Iterable[int]) -> Iterator[int]:
        return self.weights.visit(order)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Each layer by itself; where there is none (start == stop) one empty stretch."""
        if start == stop:
            yield start, stop
        for layer in self.visit(range(start, stop)):
            yield layer, layer + 1

    @torch.no_grad()
    def forward_to(
        self, batches: Iterable[PackedBatch], layers: Iterable[int], place: Place | None = None
    ) -> Iterator[Arrival]:
        batches = list(batches)
        lengths = [batch.num_tokens for batch in batches]
        shape = (sum(lengths), self.hidden_size)
        store = (place or Place()).allocate(shape, self.dtype, self.device, "activation store").split(lengths)
        for batch, waiting in zip(batches, store):
            waiting.copy_(self.embed(batch))
        for start, stop in itertools.pairwise([0, *sorted(set(layers))]):
            for layer in self.visit(range(start, stop)):
                for batch, waiting in zip(batches, store):
                    waiting.copy_(self.run(batch, Stretch(layer, waiting.to(self.device)), layer + 1))
            for number, waiting in enumerate(store):
                yield Arrival(number, batches[number], [stop], Stretch(stop, waiting.to(self.device, copy=True)))

    def groups(self, batches: Sequence[PackedBatch]) -> Sequence[Sequence[PackedBatch]]:
        return [batches] if batches else []

    def passes(
        self,
        batches: Sequence[PackedBatch],
        start: int,
        turn: Turn,
        recompute: bool = False,
        place: Place | None = None,
    ) -> None:
        def one_layer(layer: int, number: int, x: torch.Tensor, dy: torch.Tensor | None) -> None:
            turn(number, Stretch(layer, x), layer + 1, dy)

        LayerMajor(self, batches, start, self.num_layers - 1, place).run(one_layer, need_first=True)
