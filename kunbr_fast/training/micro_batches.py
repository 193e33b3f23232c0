"""Micro-batches: a step in parts, the same sums from less memory.

A step's loss is a sum over its samples (`objectives.batch.Shares`), so the gradients of its micro-batches add up to the
whole batch's, up to summation order. A forget sample and its alternate stay together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

from kunbr_fast.data import PackedBatch, send
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.objectives.batch import PartLoss, Role, Shares, StepBatch
from kunbr_fast.objectives.original import Parts
from kunbr_fast.parallel.assign import homes


def kept(part: PartLoss) -> PartLoss:
    """With tensors of its own: a CUDA graph's are overwritten by the next replay."""
    return dataclasses.replace(part, loss=part.loss.clone(), nll=None if part.nll is None else part.nll.clone())


def summed(packed: PackedBatch, micros: list[MicroBatch], found: list[PartLoss]) -> PartLoss:
    """The loss of the batch that the micro-batches are cut from; found: theirs."""
    terms = [m.step.shares.retain * p.retain_term for m, p in zip(micros, found) if p.retain_term is not None]
    total, term = torch.stack([part.loss for part in found]).sum(), sum(terms) if terms else None
    if found[0].nll is None:
        return PartLoss(total, None, term)
    rows = send(torch.cat([rows_of(packed, micro.samples) for micro in micros]), packed.device)
    values = torch.cat([part.nll for part in found])
    return PartLoss(total, torch.empty_like(values).index_copy_(0, rows, values), term)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """A part of a batch, and which of the batch's samples it holds."""

    step: StepBatch
    samples: list[int]


def micro_batches(step: StepBatch, max_tokens: int | None, attacked: bool = False) -> list[MicroBatch]:
    """A batch in micro-batches of at most `max_tokens` tokens (None: whole), none of them empty, each a batch of the
    same form: forget, alternate, retain samples.

    attacked: forget samples are evaluated at an adversary's weights, so that none of the micro-batches has samples of
    both sides.
    """
    packed, number = step.packed, len(step.parts.forget)
    limit = math.inf if max_tokens is None else max_tokens
    if packed.num_tokens <= limit and not (attacked and number):
        return [MicroBatch(step, list(range(packed.num_samples)))]
    units = _units(step.parts)
    sides = [(units[:number], Role.ATTACKED), (units[number:], step.role)] if attacked else [(units, step.role)]
    found = []
    for side, role in sides:
        sizes = [sum(packed.lengths[i] for i in unit) for unit in side]
        for part in token_batches(sizes, limit):
            samples = sorted(i for index in part for i in side[index])
            found.append(MicroBatch(_cut(step, samples, role), samples))
    return found


def one_of(step: StepBatch) -> StepBatch:
    """One sample of a batch (and its alternate), a batch of the same form."""
    return _cut(step, _units(step.parts)[0], step.role)


def dealt(step: StepBatch, ranks: int, rank: int) -> StepBatch | None:
    """A rank's part of a batch, by tokens about as much as the others'; None where there is none for it."""
    units = _units(step.parts)
    sizes = [sum(step.packed.lengths[i] for i in unit) for unit in units]
    home = homes([range(len(units))], sizes, ranks)
    samples = sorted(i for unit, its in zip(units, home) if its == rank for i in unit)
    return _cut(step, samples, step.role) if samples else None


def _units(parts: Parts) -> list[list[int]]:
    """The samples that stay together."""
    alternates = parts.alternate or [None] * len(parts.forget)
    units = [[i for i in pair if i is not None] for pair in zip(parts.forget, alternates)]
    return units + [[i] for i in parts.retain]


def rows_of(packed: PackedBatch, samples: list[int]) -> torch.Tensor:
    """Which of a batch's labelled rows are those of `samples`; on the host."""
    first = list(itertools.accumulate(packed.row_counts, initial=0))
    return torch.cat([torch.arange(first[i], first[i + 1]) for i in samples])


def _cut(step: StepBatch, samples: list[int], role: Role) -> StepBatch:
    """Some samples of a batch, in its order."""
    packed, parts, host = step.packed, step.parts, step.packed.host
    first = list(itertools.accumulate(packed.lengths, initial=0))
    tokens = [slice(first[i], first[i + 1]) for i in samples]
    taken = (torch.cat([x[at] for at in tokens]) for x in (host.input_ids, host.labels, host.position_ids))
    part = PackedBatch(*taken, [packed.lengths[i] for i in samples], layer=packed.layer).to(packed.device)
    part.hidden = None if packed.hidden is None else torch.cat([packed.hidden[at] for at in tokens])
    forget, alternate, retain = (sum(i in of for i in samples) for of in (parts.forget, parts.alternate, parts.retain))
    shares = Shares(forget / max(len(parts.forget), 1), retain / max(len(parts.retain), 1), step.shares)
    original = None if step.original is None else step.original.batch(samples)
    return StepBatch(part, Parts.of(forget, alternate, retain), original, shares, role)
