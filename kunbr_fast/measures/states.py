"""The hidden states of all layers, from one packed pass: at the last token of texts, and wherever a reader wants them.

Level l of a model with H layers is the input of layer l; level H is what comes out of the last layer, before the final
norm. A model in memory takes each batch through all layers; a streamed one takes all batches through a layer before the
next one, so that each layer is read once. Nothing of a whole text is kept but what readers keep.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import IGNORE, PackedBatch, pack, token_batches
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.vocabulary import check_vocabulary
from kunbr_fast.model.weights import finite

BATCH_TOKENS = 4096

Read = Callable[[int, PackedBatch, torch.Tensor], None]  # (level, batch, its states (T, D))
Ask = tuple[PackedBatch, Sequence[Read]]


def packed(texts: Sequence[Sequence[int]]) -> PackedBatch:
    """Texts as token ids, nothing of them labelled."""
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in texts]
    return pack([{"input_ids": ids, "labels": torch.full_like(ids, IGNORE)} for ids in tensors])


@torch.no_grad()
def read_levels(
    decoder: Decoder,
    asked: Sequence[Ask],
    *,
    place: Place | None = None,
    progress: str | None = None,
) -> None:
    """Takes each batch through the model and hands its states at every level, 0...H in their order, to its readers.

    place: where a streamed model's activations wait between two layers. progress: label of a progress bar.
    FloatingPointError where states are not finite.
    """
    levels = range(decoder.num_layers + 1)
    bar = tqdm(total=len(asked) * len(levels), desc=progress, unit="layer", leave=False, disable=progress is None)
    batches = (batch.to(decoder.device) for batch, _ in asked)
    with evaluating(decoder.model), bar:
        for number, batch, waited, stretch in decoder.forward_to(batches, levels, place):
            read = functools.partial(_checked, asked[number][1], batch, bar)
            hidden = decoder.embed(batch) if stretch.hidden is None else stretch.hidden
            read(stretch.start, hidden)
            above = [level for level in waited if level > stretch.start]
            for level in (level for level in above if not decoder.runs(level - 1)):
                raise ValueError(f"{decoder.layer_path(level - 1)} does not run on text: its layers have no states")
            if above:
                taps = {level - 1: functools.partial(read, level) for level in above}
                decoder.run(batch, Stretch(stretch.start, hidden, taps=taps), above[-1])


def _checked(reads: Sequence[Read], batch: PackedBatch, bar: tqdm, level: int, hidden: torch.Tensor) -> torch.Tensor:
    if not bool(finite(hidden)):
        raise FloatingPointError(
            f"hidden states at level {level} are not finite numbers: the model's weights have diverged (use a lower "
            "learning rate or an earlier checkpoint), or float16 cannot hold them (load it in bfloat16 or float32)"
        )
    for read in reads:
        read(level, batch, hidden)
    bar.update()
    return hidden


def hidden_states(
    decoder: Decoder, texts: Sequence[Sequence[int]], *, place: Place | None = None, progress: str | None = None
) -> torch.Tensor:
    """(H + 1, N, D), on the CPU: the state at the last token of each of N texts (token ids), at every level.

    float32, of fp64 models float64. It takes 4 (H + 1) N D bytes: of 256 texts and Llama-3-8B 138 MB. ValueError for
    no texts, an empty one, tokens that the model does not have, or more of them than it has positions.
    """
    if not texts:
        raise ValueError("no texts: expected at least one")
    check_vocabulary(decoder.model, map(torch.tensor, texts), [f"text {i}" for i in range(len(texts))])
    out = empty_states(decoder, len(texts))
    asks = [(packed(texts[part]), [keeping(out, part)]) for part in parts(map(len, texts))]
    read_levels(decoder, asks, place=place, progress=progress)
    return out


def empty_states(decoder: Decoder, number: int) -> torch.Tensor:
    """As `hidden_states` has it, of so many texts."""
    shape = decoder.num_layers + 1, number, decoder.hidden_size
    return torch.empty(shape, dtype=torch.promote_types(decoder.state_dtype, torch.float32))


def parts(lengths: Iterable[int]) -> list[slice]:
    """Which of consecutive texts go through the model together."""
    ends = itertools.accumulate(map(len, token_batches(list(lengths), BATCH_TOKENS)), initial=0)
    return [slice(first, end) for first, end in itertools.pairwise(ends)]


def keeping(out: torch.Tensor, where: slice) -> Read:
    """Puts the state at the last token of each of a batch's texts to out[level, where]."""

    def read(level: int, batch: PackedBatch, hidden: torch.Tensor) -> None:
        out[level, where] = hidden[batch.cu_seqlens[1:] - 1].to("cpu", out.dtype)

    return read
