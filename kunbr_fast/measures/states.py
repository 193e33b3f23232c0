"""The hidden states of all layers, from one packed pass over what texts have in common and what not (`Reading`).

Level l of a model with H layers is the input of layer l; level H is what comes out of the last layer, before the final
norm. A model in memory takes each batch through all layers; a streamed one takes all batches through a layer before the
next one, so that each layer is read once. Of a batch's states nothing is kept but what takers keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch
from kunbr_fast.evaluation.reading import BATCH_TOKENS, Reading, groups_of, samples_of
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.vocabulary import check_vocabulary
from kunbr_fast.model.weights import finite

Take = Callable[[int, PackedBatch, torch.Tensor, list[int]], None]  # (level, batch, its states (T, D), its nodes)


@torch.no_grad()
def read_levels(
    decoder: Decoder,
    asked: Sequence[tuple[Reading, Sequence[Take]]],
    *,
    place: Place | None = None,
    progress: str | None = None,
) -> None:
    """Takes each reading's texts through the model and hands their states at every level, 0...H in their order, to its
    takers, a batch at a time. A node (`data.trees`) may come more than once, of a model that runs no trees.

    place: where a streamed model's activations wait between two layers. progress: label of a progress bar.
    FloatingPointError where states are not finite.
    """
    readings, levels = [reading for reading, _ in asked], range(decoder.num_layers + 1)
    groups = groups_of(samples_of(decoder, readings), BATCH_TOKENS)
    batches = (readings[number].trees.pack(group, decoder.trees).to(decoder.device) for number, group in groups)
    bar = tqdm(total=len(groups) * len(levels), desc=progress, unit="layer", leave=False, disable=progress is None)
    with evaluating(decoder.model), bar:
        for at, batch, waited, stretch in decoder.forward_to(batches, levels, place) if groups else ():
            number, group = groups[at]
            take = functools.partial(_taken, asked[number][1], batch, [node for nodes in group for node in nodes], bar)
            hidden = decoder.embed(batch) if stretch.hidden is None else stretch.hidden
            take(stretch.start, hidden)
            above = [level for level in waited if level > stretch.start]
            for level in (level for level in above if not decoder.runs(level - 1)):
                raise ValueError(f"{decoder.layer_path(level - 1)} does not run on text: it has no states to measure")
            if above:
                taps = {level - 1: functools.partial(take, level) for level in above}
                decoder.run(batch, Stretch(stretch.start, hidden, taps=taps), above[-1])


def _taken(
    takes: Sequence[Take], batch: PackedBatch, nodes: list[int], bar: tqdm, level: int, hidden: torch.Tensor
) -> torch.Tensor:
    if not bool(finite(hidden)):
        raise FloatingPointError(
            f"hidden states at level {level} are not finite numbers: the model's weights have diverged (use a lower "
            "learning rate or an earlier checkpoint), or float16 cannot hold them (load it in bfloat16 or float32)"
        )
    for take in takes:
        take(level, batch, hidden, nodes)
    bar.update()
    return hidden


def hidden_states(
    decoder: Decoder, texts: Sequence[Sequence[int]], *, place: Place | None = None, progress: str | None = None
) -> torch.Tensor:
    """(H + 1, N, D), on the CPU: the state at the last token of each of N texts (token ids), at every level.

    float32, of fp64 models float64. It takes 4 (H + 1) N D bytes: of 256 texts and Llama-3-8B 138 MB. ValueError for
    no texts, an empty one, tokens that the model does not have, or more of them than it has positions.
    """
    if not texts or not all(map(len, texts)):
        raise ValueError("no texts, or an empty one: expected at least one token of each")
    check_vocabulary(decoder.model, map(torch.tensor, texts), [f"text {i}" for i in range(len(texts))])
    reading = Reading(decoder)
    ends = [reading.add(ids, number)[-1] for number, ids in enumerate(texts)]
    out = empty_states(decoder, len(texts))
    read_levels(decoder, [(reading, [keeping(out, ends)])], place=place, progress=progress)
    return out


def empty_states(decoder: Decoder, number: int) -> torch.Tensor:
    """As `hidden_states` has it, of so many texts."""
    shape = decoder.num_layers + 1, number, decoder.hidden_size
    return torch.empty(shape, dtype=torch.promote_types(decoder.state_dtype, torch.float32))


def keeping(out: torch.Tensor, ends: Sequence[int]) -> Take:
    """Puts the states at the nodes `ends` to out[level], in their order."""
    of: dict[int, list[int]] = {}
    for number, node in enumerate(ends):
        of.setdefault(node, []).append(number)

    def take(level: int, batch: PackedBatch, hidden: torch.Tensor, nodes: list[int]) -> None:
        found = [(place, number) for place, node in enumerate(nodes) for number in of.get(node, ())]
        if found:
            places, numbers = map(list, zip(*found))
            out[level, numbers] = hidden[places].to("cpu", out.dtype)

    return take
