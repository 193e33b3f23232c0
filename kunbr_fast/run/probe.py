"""Whether a model that is whole and finite is so in use: in half precision its activations may overflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kunbr_fast.data import Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import Place, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.weights import finite

FEWEST = 16  # samples of each kind that are tried, where there are so many
SHARE = 100  # a sample is tried for so many visits of one by a training: a forward pass for 200, two ways and back
BATCH_TOKENS = 4096
LOGITS_AT_ONCE = 1 << 26


def tried(samples: Mapping[str, Sequence[Sample]], visits: int) -> list[tuple[str, Sample]]:
    """What to try: (name, sample), of each kind some that are spread evenly. visits: of forget samples, by all
    trainings."""
    found = []
    for kind, part in samples.items():
        count = min(len(part), max(FEWEST, visits // SHARE))
        indices = [i * len(part) // count for i in range(count)]
        found += [(f"{kind} sample {i}", part[i]) for i in indices]
    return found


def overflowing(decoder: Decoder, named: Sequence[tuple[str, Sample]], place: Place) -> str | None:
    """The first part of a forward pass that is not finite, and for which samples; None where all are.

    Of a streamed model each layer is read once; place: where its activations wait. Where memory runs out all is begun
    again, with half the tokens at a time."""
    tokens, longest = BATCH_TOKENS, max(len(sample["input_ids"]) for _, sample in named)
    while True:
        try:
            return _overflowing(decoder, named, place, tokens)
        except Exception as error:
            if not is_out_of_memory(error) or tokens <= longest:
                raise
        release()
        tokens //= 2


@torch.no_grad()
def _overflowing(decoder: Decoder, named: Sequence[tuple[str, Sample]], place: Place, tokens: int) -> str | None:
    groups = token_batches([len(sample["input_ids"]) for _, sample in named], tokens)
    batches = (pack([named[i][1] for i in group]).to(decoder.device) for group in groups)
    at_once = max(1, LOGITS_AT_ONCE // decoder.config.vocab_size)
    with evaluating(decoder.model):
        for number, batch, _, stretch in decoder.forward_to(batches, [decoder.num_layers - 1], place):
            hidden = decoder.final(decoder.run(batch, stretch))
            parts = hidden[batch.rows].split(at_once)
            what = "the hidden states" if not finite(hidden) else "the logits"
            if what == "the hidden states" or not all(bool(finite(decoder.head(part))) for part in parts):
                first, last = named[groups[number][0]][0], named[groups[number][-1]][0]
                return f"{what} for {first}" + f" to {last}" * (first != last)
    return None
