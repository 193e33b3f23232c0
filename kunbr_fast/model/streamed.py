"""The decoder of a model whose layers come from its files when they run (`open_streamed`).

Several packed batches go through the layers together, each layer over all of them before the next one. So a layer is
brought in (over the bus, from a disk: `layer_stream`) twice a step, on the way up and on the way down, and not twice
for each micro-batch. Between two layers the activations of all batches wait in one store, on the device, in main memory
or in a memory-mapped file:

    up      for each layer below the top: for each batch: input of the layer -> input of the next, kept
    top     for each batch: the top layer, the head, the loss, and back through them
    down    for each layer: for each batch: the layer runs again on its kept input, now for its gradients; the gradient
            of the input takes the input's place in the store

Batches share no arithmetic, and weight gradients are added in the order of the batches. So the results are, bit for
bit, those of the batches one by one in a model that is in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Arrival, Decoder, Stretch, Turn
from kunbr_fast.model.weights import weights_of


class LayerMajor:
    """One forward and backward pass of layers start...top over `batches`.

    batches: on the decoder's device, all with activations at the input of layer `start`, or all without: these start at
    the embeddings. place: where the activations wait. store: that of an earlier pass, taken again where it is large
    enough.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[PackedBatch],
        start: int,
        top: int,
        place: Place | None = None,
        store: torch.Tensor | None = None,
    ):
        self.decoder, self.batches, self.start, self.top = decoder, list(batches), start, top
        self._offsets = list(itertools.accumulate((batch.num_tokens for batch in self.batches), initial=0))
        shape = (top - start + 1, self._offsets[-1], decoder.hidden_size)
        size = math.prod(shape)
        if store is None or store.numel() < size:
            store = None  # before the new one is made
            store = (place or Place()).allocate((size,), decoder.state_dtype, decoder.device, "activation store")
        self.store = store
        self._inputs = store[:size].view(shape)

    def _place(self, layer: int, number: int) -> torch.Tensor:
        """(T, D): where batch `number`'s input of a layer is kept. The layers below `start` share its place."""
        return self._inputs[max(layer, self.start) - self.start, self._offsets[number] : self._offsets[number + 1]]

    def _fetch(self, layer: int, number: int) -> torch.Tensor:
        return self._place(layer, number).to(self.decoder.device, non_blocking=True).detach()

    def gradient(self, number: int) -> torch.Tensor:
        """(T, D), after `run` with need_first: of the loss of a batch, by its input of layer `start`."""
        return self._fetch(self.start, number)

    def run(
        self,
        turn: Turn,
        need_first: bool = False,
        within: Callable[[int], contextlib.AbstractContextManager] = lambda number: contextlib.nullcontext(),
    ) -> None:
        """Up and down; a turn for each batch and layer, as in `Decoder.passes`. At layer `start` the hidden states
        require grad only if need_first. within: what a batch's passes run in, such as weights of its own."""
        given = [batch.hidden is not None for batch in self.batches]
        first = self.start if all(given) else 0
        if any(given) and not all(given):
            raise ValueError("some batches come from a prefix cache and others do not")
        with torch.no_grad():
            for number, batch in enumerate(self.batches):
                hidden = batch.hidden if all(given) else self.decoder.embed(batch)
                self._place(first, number).copy_(hidden, non_blocking=True)
        up = range(first, self.top)
        order = [*up, *range(self.top, self.start - 1, -1)]  # one, so that what comes next is known at the top too
        for count, layer in enumerate(self.decoder.visit(order)):
            for number, batch in enumerate(self.batches):
                x = self._fetch(layer, number)
                if count < len(up):
                    with torch.no_grad(), within(number):
                        out = self.decoder.run(batch, Stretch(layer, x), layer + 1)
                    self._place(layer + 1, number).copy_(out, non_blocking=True)
                    continue
                x.requires_grad_(layer > self.start or need_first)
                dy = self._fetch(layer + 1, number) if layer < self.top else None
                with within(number):
                    turn(number, Stretch(layer, x), layer + 1, dy)
                if x.requires_grad:
                    dx = torch.zeros_like(x) if x.grad is None else x.grad
                    self._place(layer, number).copy_(dx, non_blocking=True)


class StreamedDecoder(Decoder):
    """A `Decoder` that has one layer in place at a time. `weights` is the model's `LayerStream`."""

    def save(self, directory: str | Path, replace: bool = False) -> None:
        """Writes the model, weights of `place` included (`weights.moved`: from then on it is read from there)."""
        self.weights.save(directory, replace)

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
        store = (place or Place()).allocate(shape, self.state_dtype, self.device, "activation store").split(lengths)
        for batch, waiting in zip(batches, store):
            waiting.copy_(self.embed(batch))
        wanted = sorted(set(layers))

        def arrived(layer: int) -> Iterator[Arrival]:
            for number, waiting in enumerate(store if layer in wanted else ()):
                yield Arrival(number, batches[number], [layer], Stretch(layer, waiting.to(self.device, copy=True)))

        yield from arrived(0)
        for layer in self.visit(range(max(wanted, default=0))):  # one order: the next layer is read at each of them
            for batch, waiting in zip(batches, store):
                waiting.copy_(self.run(batch, Stretch(layer, waiting.to(self.device)), layer + 1))
            yield from arrived(layer + 1)

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
        LayerMajor(self, batches, start, self.num_layers - 1, place).run(turn, need_first=True)
