"""Re-insertion whose steps go layer by layer: for models that are streamed, and for steps larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast import losses
from kunbr_fast.data import PackedBatch
from kunbr_fast.decoder import Decoder
from kunbr_fast.dispatch import resolve
from kunbr_fast.layer_major import LayerMajor, MicroBatch, micro_batches
from kunbr_fast.objectives import Criterion, Reference
from kunbr_fast.patch import fused
from kunbr_fast.prefix_cache import check_storage
from kunbr_fast.reinsertion import INSERTIONS, BlockTraining, _move_back, _values, block_tensors
from kunbr_fast.streaming import layer_stream
from kunbr_fast.training import Diverged, finite, frozen


class LayerMajorTraining(BlockTraining):
    """`BlockTraining` whose step takes its batch in micro-batches, layer by layer. Made by `reinserted_by_layer`.

    The gradient is the sum over micro-batches, in their order: with one, the bits of `BlockTraining`'s step; with more,
    those of `micro_batches` one after the other, and the step of the whole up to summation order. (An objective whose
    retain_coeff adapts itself sees the mean over micro-batches.)

    What the objective needs of the original model must be given (`Reference`), since the block's original weights are not
    in memory.
    """

    def __init__(
        self,
        *args: Any,
        micro_batch_tokens: int | None = None,
        storage: str = "auto",
        directory: str | Path | None = None,
        **settings: Any,
    ):
        check_storage(storage)
        if micro_batch_tokens is not None and micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens={micro_batch_tokens}: expected at least 1")
        self.micro_batch_tokens, self.storage, self.directory = micro_batch_tokens, storage, directory
        self._store: torch.Tensor | None = None
        super().__init__(*args, **settings)

    def step_packed(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> dict[str, float | None]:
        """As `BlockTraining.step_packed`; an exception leaves no part of a gradient."""
        try:
            loss, nll = self.accumulate(batch, num_forget, reference)
            metrics = self.criterion.metrics(batch, num_forget, loss, nll)
            if not finite(loss, *self.gradients()):
                raise Diverged(f"block {self.block.start}-{self.block.stop - 1}, step {self.steps}", metrics)
        except BaseException:
            self.flat.grad.zero_()
            self.criterion.drop()
            raise
        self.apply()
        return metrics

    def loss(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `BlockTraining.loss`: the batch in one go, its layers run again in the backward pass."""
        self._check_reference(reference)
        return super().loss(batch, num_forget, reference)

    def _check_reference(self, reference: Reference | None) -> None:
        if reference is None and self.criterion.needs:
            raise ValueError(
                f"{self.criterion.objective.name} with retain_loss={self.criterion.retain_loss!r} needs the original model's "
                "values: give reference=, made before (Reference.of)"
            )

    def accumulate(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds a batch's gradient to the block's; the loss and the rows' NLL (R,), detached, as from `loss`."""
        decoder, criterion = self.decoder, self.criterion
        if batch.hidden is not None and batch.layer != self.block.start:
            raise ValueError(
                f"the batch holds the input of layer {batch.layer}, the block begins at layer {self.block.start}"
            )
        self._check_reference(reference)
        parts = criterion.parts(batch, num_forget)
        micros = micro_batches(batch, parts, self.micro_batch_tokens)
        known = criterion.weights(batch, num_forget)
        top = criterion.layer if criterion.objective.states else decoder.num_layers - 1
        total: list[torch.Tensor] = []
        nll: list[tuple[torch.Tensor, torch.Tensor]] = []

        def loss_of(micro: MicroBatch, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            if known is not None:
                out = decoder.final(decoder.run(micro.batch, top, None, x, rows=True))
                cap = None if known.cap is None else known.cap[micro.rows]
                weight = known.weight[micro.rows]
                return losses.linear_loss(out, decoder.head, micro.batch.targets, weight, cap, impl=self.impl)
            share = micro.num_forget / num_forget if micro.num_forget else 1.0
            retained = sum(i in parts["retain"] for i in micro.samples) / max(len(parts["retain"]), 1)
            scale, criterion.retain_scale = criterion.retain_scale, criterion.retain_scale * retained / share
            try:
                loss, found = criterion(
                    decoder,
                    micro.batch,
                    micro.num_forget,
                    start=top,
                    hidden=x,
                    impl=self.impl,
                    reference=None if reference is None else reference.batch(micro.samples),
                )
            finally:
                criterion.retain_scale = scale
            return loss * share, found

        def turn(layer: int, number: int, x: torch.Tensor, dy: torch.Tensor | None) -> None:
            micro = micros[number]
            if dy is not None:
                decoder.run(micro.batch, layer, layer + 1, x).backward(dy)
                return
            loss, found = loss_of(micro, x)
            loss.backward()
            total.append(loss.detach())
            if found is not None:
                nll.append((micro.rows, found))

        store, self._store = self._store, None
        batches = [micro.batch for micro in micros]
        passes = LayerMajor(decoder, batches, self.block.start, top, self.storage, self.directory, store)
        self._store = passes.store
        del store
        passes.run(turn)
        if not nll:
            return sum(total), None
        rows, values = (torch.cat(tensors) for tensors in zip(*nll))
        return sum(total), torch.empty_like(values).index_copy_(0, rows, values)


@contextlib.contextmanager
def reinserted_by_layer(
    original: nn.Module | Decoder,
    unlearned: nn.Module | MutableMapping[str, torch.Tensor],
    block: range,
    lr: float,
    retain_coeff: float = 1.0,
    *,
    criterion: Criterion | None = None,
    micro_batch_tokens: int | None = None,
    storage: str = "auto",
    directory: str | Path | None = None,
    optimizer: str = "lion",
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    insertion: str = "independent",
    master_weights: bool = True,
    impl: str = "auto",
) -> Iterator[LayerMajorTraining]:
    """`reinserted`, whose steps go layer by layer over micro-batches; for streamed models, and for others too.

    original: as `reinserted` takes it, or a streamed model: each layer above the block is then read once on the way up
    and once on the way down of a step, and with batches from a prefix cache none below it. Of the block, weights, gradient
    and optimiser state are in memory.
    unlearned: a model, a mapping such as a `WeightSnapshot` or `Shards` (copied into the block at the start), or a streamed
    model's `layer_stream`.
    micro_batch_tokens: the most tokens that go through a layer at once (None: the whole step's). storage, directory: of
    the activations between two layers, (layers from the block up) x (tokens of a step) x hidden size; as in `PrefixCache`.

    The other arguments, the exit and the errors are those of `reinserted`. With insertion="cumulative" a streamed model
    keeps the trained block in main memory (`LayerStream.replace`).
    """
    if insertion not in INSERTIONS:
        raise ValueError(f"insertion={insertion!r}: expected one of {', '.join(INSERTIONS)}")
    decoder = original if isinstance(original, Decoder) else Decoder(original)
    criterion = criterion or Criterion(retain_coeff=retain_coeff, block=block)
    criterion.check_layer(decoder.num_layers)
    for operation in ("linear_loss", optimizer):
        resolve(operation, impl, decoder.device)
    stream = layer_stream(decoder)
    if unlearned is decoder.model or (stream is not None and unlearned is stream):
        raise ValueError("the unlearned model is the original itself: give a copy, or a mapping with its own weights")
    if isinstance(unlearned, nn.Module):
        unlearned = layer_stream(unlearned) or unlearned
    names = list(block_tensors(decoder, block))
    held = contextlib.nullcontext() if stream is None else stream.held(block)
    with frozen(decoder.model), fused(decoder.model, impl), held:
        training = LayerMajorTraining(
            decoder,
            block,
            _values(unlearned, names),
            criterion=criterion,
            lr=lr,
            optimizer=optimizer,
            betas=betas,
            weight_decay=weight_decay,
            master_weights=master_weights,
            gradient_checkpointing=True,
            impl=impl,
            micro_batch_tokens=micro_batch_tokens,
            storage=storage,
            directory=directory,
        )
        try:
            yield training
            _move_back(training, unlearned)
            if insertion == "cumulative" and stream is not None:
                stream.replace({name: value.to("cpu", copy=True) for name, value in training.tensors().items()})
        except BaseException:
            training.take_out()
            raise
        if insertion == "cumulative" and stream is None:
            training.settle()
        else:
            training.take_out()
