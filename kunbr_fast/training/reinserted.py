"""Re-insertion: a block of the unlearned model, put into the original one, trained there alone, and moved back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.low_precision import check_cover, low_precision_cover
from kunbr_fast.model.patch import fused
from kunbr_fast.model.weights import weights_of
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.block import BlockTraining, block_tensors
from kunbr_fast.training.flat_buffer import check_optimizer_device
from kunbr_fast.training.graphs import check_cuda_graphs

INSERTIONS = ("independent", "cumulative")


def _values(unlearned: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    missing = [name for name in names if name not in unlearned]
    if missing:
        raise ValueError(f"the unlearned model has no {missing[0]}: it is not of the original's architecture")
    return {name: unlearned[name] for name in names}


@contextlib.contextmanager
def reinserted(
    original: nn.Module | Decoder,
    unlearned: nn.Module | MutableMapping[str, torch.Tensor],
    block: range,
    lr: float,
    retain_coeff: float = 1.0,
    *,
    objective: str = "gradient_difference",
    objective_options: Mapping[str, Any] | None = None,
    retain_loss: str = "nll",
    criterion: Criterion | None = None,
    optimizer: str = "lion",
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    forget_loss_cap: float | None = None,
    insertion: str = "independent",
    master_weights: bool = True,
    gradient_checkpointing: bool = False,
    mask: Mapping[str, torch.Tensor] | None = None,
    cuda_graphs: bool = False,
    optimizer_device: str = "device",
    micro_batch_tokens: int | None = None,
    cover_precision: str = "none",
    activations: str = "auto",
    directory: str | Path | None = None,
    impl: str = "auto",
) -> Iterator[BlockTraining]:
    """Puts a block of `unlearned` into `original`, and yields a `BlockTraining` whose `step` trains it there.

        with kf.reinserted(original, unlearned, block=range(2, 4), lr=2e-7) as training:
            for forget_batch, retain_batch in batches:
                training.step(forget_batch, retain_batch)

    original: a Hugging Face causal language model (or a `Decoder` of one); unlearned: a model of the same
    architecture, or a mapping from parameter names to tensors (a state dict) that holds the block's. Either may be streamed
    (`streaming.open_streamed`).
    On a normal exit the trained block is moved into `unlearned`. The original's weights, gradients and
    requires_grad flags are put back exactly, also after an exception (which leaves `unlearned` as it was);
    with insertion="cumulative" the trained block stays in the original for the next ones.
    objective, objective_options, retain_loss: what a step minimises, by name; see `kunbr_fast.objectives`. criterion: the
    same as an object, in place of these, of retain_coeff and of forget_loss_cap.
    master_weights: fp32 copies of half-precision block weights for the optimiser.
    gradient_checkpointing: keep only the input of each layer above the prefix for the backward pass, and run the layer
    again there. The result is the same.
    mask: for some of the block's parameters, by name, a bool tensor of its shape: where it is False the weight keeps its
    bits (M_u's), whatever optimiser and weight decay. `attribute(...).mask()` makes them; names outside the block have
    no effect, and what has no mask may change everywhere.
    cuda_graphs: steps run in buckets of fixed sizes, each captured once as a CUDA graph (`kunbr_fast.graphs`), where the
    objective's weights are known before the pass (gradient difference, ga). No GPU has run it.
    optimizer_device: "host" keeps the optimiser's state and the weights that it updates in main memory, where the update
    runs (by torch), and the original's own block too as long as the other one is in its place (nothing else may look at
    those weights meanwhile). On a CPU the bits are the same; a GPU's kernels round otherwise than the host.
    micro_batch_tokens: the most tokens that go through at once; a larger step goes in parts, whose gradients add up to the
    same up to summation order. Where memory runs out, a step is taken in smaller parts all by itself.
    cover_precision: fp8, int8 or nf4 keep the weights of the linear layers above the block in so many bits; the
    exact ones wait in main memory. An approximation: `quantized` says of what, `quantized.gradient_cosine` how good.
    activations, directory: of a streamed original, whose steps go layer by layer (`layer_training`); where the activations
    of all of a step's tokens wait between two layers, as in `PrefixCache`.
    impl: who runs the fused layers (`patched`), the loss and the optimiser.

    Errors: ValueError for an objective or options that do not exist, for another architecture, shapes that differ, weights
    that are not finite or tied, and for one and the same model given as both; `dispatch.Unavailable` for an impl, or CUDA
    graphs, that cannot run here. A step: `Diverged`, and `memory.OutOfMemory` where one sample alone does not fit.
    """
    if insertion not in INSERTIONS:
        raise ValueError(f"insertion={insertion!r}: expected one of {', '.join(INSERTIONS)}")
    decoder = original if isinstance(original, Decoder) else Decoder(original)
    check_block(block, decoder.num_layers)
    given = (objective, objective_options or None, retain_loss, retain_coeff, forget_loss_cap)
    if criterion is not None and given != ("gradient_difference", None, "nll", 1.0, None):
        raise ValueError(
            "criterion= stands for objective, objective_options, retain_loss, retain_coeff and forget_loss_cap: give "
            "those or it"
        )
    if criterion is None:
        criterion = Criterion(
            objective,
            objective_options,
            retain_loss=retain_loss,
            retain_coeff=retain_coeff,
            forget_loss_cap=forget_loss_cap,
            block=block,
        )
    criterion.check_layer(decoder.num_layers, block)
    for operation in ("linear_loss", optimizer):
        resolve(operation, impl, decoder.device)
    check_cuda_graphs(cuda_graphs, decoder.device)
    check_optimizer_device(optimizer_device)
    check_cover(decoder, block, cover_precision)
    if unlearned is decoder.model or (decoder.streamed and unlearned is decoder.weights):
        raise ValueError("the unlearned model is the original itself: give a copy, or a mapping with its own weights")
    if isinstance(unlearned, nn.Module):
        unlearned = weights_of(unlearned)
    kind = BlockTraining
    if decoder.streamed:
        from kunbr_fast.training.streamed import LayerMajorTraining  # which is a BlockTraining

        if cuda_graphs:
            raise ValueError("cuda_graphs=True: a streamed model's layers have no place of their own: leave it out")
        kind = functools.partial(LayerMajorTraining, storage=activations, directory=directory)
    names = list(block_tensors(decoder, block))
    with (
        frozen(decoder.model),
        decoder.held(block),
        low_precision_cover(decoder, block, cover_precision) as cover,
        fused(decoder.model, impl),
    ):
        training = kind(
            decoder,
            block,
            _values(unlearned, names),  # not kept here: what comes from a file is in memory for a moment only
            criterion=criterion,
            lr=lr,
            optimizer=optimizer,
            betas=betas,
            weight_decay=weight_decay,
            master_weights=master_weights,
            gradient_checkpointing=gradient_checkpointing,
            impl=impl,
            mask=mask,
            cuda_graphs=cuda_graphs,
            optimizer_device=optimizer_device,
            micro_batch_tokens=micro_batch_tokens,
        )
        training.cover = cover
        try:
            yield training
            for name, value in training.tensors().items():
                unlearned[name] = value.clone()
        except BaseException:
            training.take_out()
            raise
        if insertion == "cumulative":
            training.settle()
        else:
            training.take_out()
