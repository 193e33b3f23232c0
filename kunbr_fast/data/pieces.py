"""A long text's tokens as several samples, in which each token has its loss once."""

from __future__ import annotations

import torch

from kunbr_fast.data.samples import IGNORE, Sample


def pieces(sample: Sample, max_length: int, head: int) -> list[Sample]:
    """The sample in pieces of nearly equal length, of at most `max_length` tokens.

    head: how many special tokens it begins with; each piece begins with them. A piece's next token is the last one of
    the piece before, which stands there to predict what follows it; neither it nor the head has a loss again.
    [sample] where it is short enough, or where no piece would have room for a token of its own.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    steps, most = len(ids) - head - 1, max_length - head - 1  # from a token to the next one: of the text, of a piece
    if len(ids) <= max_length or most < 1:
        return [sample]
    count = -(-steps // most)
    bounds = [head + i * steps // count for i in range(count + 1)]
    found = []
    for first, last in zip(bounds, bounds[1:]):
        own = labels[first : last + 1].clone()
        begin = labels[:head].clone()
        if first > head:
            own[0] = IGNORE
            begin[:] = IGNORE
        found.append({
            "input_ids": torch.cat((ids[:head], ids[first : last + 1])),
            "labels": torch.cat((begin, own)),
        })  # fmt: skip
    return found
