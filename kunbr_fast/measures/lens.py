"""Answers by states that are already there: the head on a batch's last states, wherever in the model these are from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.evaluation.accuracy import Questions
from kunbr_fast.model.decoder import Stretch

_LOGITS_AT_ONCE = 1 << 26  # elements of one block of fp32 logits: 256 MiB


def letter_scores(
    decoder, questions: Questions, chosen: range, batch: PackedBatch, stretch: Stretch
) -> list[torch.Tensor]:
    """Each chosen question's letter logits, the batch having their prompts; the stretch may begin after the layers."""
    letters = torch.tensor(questions.letters, device=decoder.device)
    logits = decoder.logits(batch, batch.cu_seqlens[1:] - 1, stretch)[:, letters].double().cpu()
    return [logits[k, : questions.num_choices[i]] for k, i in enumerate(chosen)]


def log_probs(decoder, reads: Sequence[tuple[int, int, int]], batch: PackedBatch, stretch: Stretch) -> torch.Tensor:
    """Of each (text of the batch, position, token) the token's log-probability there, float64 on the CPU."""
    offsets = batch.cu_seqlens.tolist()
    places = torch.tensor([offsets[text] + position for text, position, _ in reads], device=decoder.device)
    tokens = torch.tensor([token for *_, token in reads], device=decoder.device)
    rows, row_of = places.unique(return_inverse=True)  # in order; logits are made once a row
    hidden = decoder.run(batch, stretch)
    at_once = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)
    out = torch.empty(len(reads), dtype=torch.float64)
    for first in range(0, len(rows), at_once):
        logits = decoder.head(decoder.final(hidden[rows[first : first + at_once]]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mine = ((row_of >= first) & (row_of < first + at_once)).nonzero()[:, 0]
        at = row_of[mine] - first
        out[mine.cpu()] = (logits[at, tokens[mine]] - logits.logsumexp(dim=1)[at]).double().cpu()
    return out
