"""Re-insertion: a block of the unlearned model, put into the original one, trained there alone, and moved back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from kunbr_fast.keywords import changed, named_by
from kunbr_fast.memory import Place
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import constants, frozen, owners_flag
from kunbr_fast.model.low_precision import low_precision_cover
from kunbr_fast.model.ownership import differentiable, no_adapter, not_frozen, uncompiled, whole
from kunbr_fast.model.patch import fused
from kunbr_fast.model.weights import weights_of
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.parallel.sharded import shards_of
from kunbr_fast.proofs import ensure_proven
from kunbr_fast.training.block import BlockTraining, block_tensors
from kunbr_fast.training.settings import BlockSettings, Execution
from kunbr_fast.training.sharded import ShardedBlockTraining
from kunbr_fast.training.streamed import LayerMajorTraining


@named_by(BlockSettings, Execution)
@contextlib.contextmanager
def reinserted(
    original: nn.Module | Decoder,
    unlearned: nn.Module | MutableMapping[str, torch.Tensor],
    block: range,
    lr: float | None = None,
    retain_coeff: float | None = None,
    *,
    criterion: Criterion | None = None,
    settings: BlockSettings | None = None,
    execution: Execution | None = None,
    **changes: Any,
) -> Iterator[BlockTraining]:
    """Puts a block of `unlearned` into `original`, and yields a `BlockTraining` whose `step` trains it there.

        with kf.reinserted(original, unlearned, block=range(2, 4), lr=2e-7) as training:
            for forget_batch, retain_batch in batches:
                training.step(forget_batch, retain_batch)

    original: a Hugging Face causal language model, or a `Decoder` of one. unlearned: a model of the same architecture,
    or a mapping from parameter names to tensors (a state dict) that holds the block's. Either may be streamed
    (`open_streamed`). settings: what is trained; execution: how. lr, retain_coeff and `changes` are single fields of
    these two, such as objective="npo" or cuda_graphs=True, see `BlockSettings` and `Execution`; activations= and
    directory= are `Execution.place`. criterion: the objective as an object, in place of its settings.

    On a normal exit the trained block is moved into `unlearned`. The original's weights, gradients and requires_grad
    flags are put back exactly, also after an exception (which leaves `unlearned` as it was: `Diverged` too, which the
    exit raises where the last update has destroyed the block); with
    insertion="cumulative" the trained block stays in the original for the next ones.

    What is frozen stays frozen: ValueError where a parameter of the block does not require grad in `unlearned`, a
    model, or in `original`. Only where all of the original is frozen is it taken for what it is here, a model to read
    from, unless insertion="cumulative" changes it.

    Errors: TypeError for an unknown setting. ValueError for a PEFT adapter, offloaded weights, an objective or options
    that do not exist, another architecture, shapes that differ, weights that are not finite or tied, and for one and
    the same model given as both.
    `dispatch.Unavailable` for an impl, or CUDA graphs, that cannot run here. A step: `Diverged`, and
    `memory.OutOfMemory` where one sample alone does not fit.
    """
    changes |= {name: value for name, value in (("lr", lr), ("retain_coeff", retain_coeff)) if value is not None}
    if changes.keys() & {"activations", "directory"}:
        changes["place"] = Place(changes.pop("activations", "auto"), changes.pop("directory", None))
    settings, execution = changed(changes, "reinserted", settings or BlockSettings(lr), execution or Execution())
    given = original.model if isinstance(original, Decoder) else uncompiled(original)
    no_adapter(given, "kf.reinserted", "the original")
    decoder = original if isinstance(original, Decoder) else Decoder(original)
    unlearned = uncompiled(unlearned, "the unlearned model") if isinstance(unlearned, (nn.Module, str)) else unlearned
    check_block(block, decoder.num_layers)
    _check_owned(decoder, unlearned, block, settings.insertion == "cumulative")
    criterion = settings.criterion(block, criterion)
    criterion.fit(decoder.num_layers, block)
    execution.check(decoder, block, settings.optimizer)
    settings.check_reach(decoder.streamed, execution.cover_precision)
    ensure_proven(decoder.device, {decoder.dtype}, execution.impl)
    if unlearned is decoder.model or (decoder.streamed and unlearned is decoder.weights):
        raise ValueError("the unlearned model is the original itself: give a copy, or a mapping with its own weights")
    if isinstance(unlearned, nn.Module):
        unlearned = weights_of(unlearned)
    kind = BlockTraining if shards_of(decoder.model) is None else ShardedBlockTraining
    if decoder.streamed:  # a backward pass runs layers again, which are not kept
        kind, execution = LayerMajorTraining, dataclasses.replace(execution, gradient_checkpointing=True)
    with (
        frozen(decoder.model),
        decoder.held(block),
        low_precision_cover(decoder, block, execution.cover_precision) as cover,
        fused(decoder.model, execution.impl),
    ):
        training = kind(decoder, block, unlearned, criterion, settings, execution, cover)
        try:
            yield training
            training.check()
            for name, value in training.tensors().items():
                unlearned[name] = value.clone()
        except BaseException:
            training.take_out()
            raise
        if settings.insertion == "cumulative":
            training.settle()
        else:
            training.take_out()


def _check_owned(
    decoder: Decoder, unlearned: nn.Module | MutableMapping[str, torch.Tensor], block: range, stays: bool
) -> None:
    """ValueError where the owner of one of the models has not left the block to be trained. stays: in the original."""
    call, model = "kf.reinserted", decoder.model
    differentiable(model)
    fixed = constants(model)
    own = {name: p for name, p in block_tensors(decoder, block).items() if name not in fixed}
    if not decoder.streamed and (stays or any(map(owners_flag, model.parameters()))):
        not_frozen(own, call, "original")
    if isinstance(unlearned, nn.Module):
        no_adapter(unlearned, call, "the unlearned model")
        whole(unlearned, "the unlearned model's ")
        if not weights_of(unlearned).streamed:
            given = {name: p for name, p in unlearned.named_parameters() if name in own}
            not_frozen(given, call, "unlearned")
