"""Micro-batches: a step in parts, the same sums from less memory.

A step's loss is a sum over its samples (`objectives.batch.Shares`), so its batch can go through in micro-batches whose
gradients add up. The result is that of the whole batch up to summation order. A forget sample and its alternate stay
together.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable

import torch

from kunbr_fast.data import PackedBatch, send
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import OutOfMemory, is_out_of_memory, release
from kunbr_fast.objectives.batch import PartLoss, Shares, StepBatch
from kunbr_fast.objectives.original import Parts

logger = logging.getLogger(__name__)


class MicroBatches:
    """Takes the batches of a training's steps through it, whole or in micro-batches of at most `tokens` tokens.

    When memory runs out the step is begun again, in micro-batches of half the tokens of the one that failed, and so are
    the steps after it: `tokens` is lowered, `halvings` counts. name: of the training, for the log. refusal(tokens,
    said): makes the error for one sample that does not fit by itself, or (tokens None) for an update; a method of the
    training.
    """

    def __init__(self, tokens: int | None, name: str, refusal: Callable[[int | None, str], OutOfMemory]):
        if tokens is not None and tokens < 1:
            raise ValueError(f"micro_batch_tokens={tokens}: expected at least 1")
        self.tokens, self.halvings = tokens, 0
        # weakly: a training must go, with its weights, when nobody uses it, not at some later collection
        self._name, self._refusal = name, weakref.WeakMethod(refusal)

    def run(
        self,
        step: StepBatch,
        one: Callable[[StepBatch], PartLoss] | None,
        reset: Callable[[], None],
        together: Callable[[list[StepBatch]], Iterable[PartLoss]] | None = None,
    ) -> PartLoss:
        """Forward and backward of a batch; its loss, detached.

        one(batch): accumulates a micro-batch's gradient, and returns its loss. together(batches): does the same for all
        of them side by side. reset(): makes the accumulated gradient 0 again; called on any exception.
        """
        before = self.halvings
        while True:
            micros = micro_batches(step, self.tokens)
            found: list[PartLoss] = []
            try:
                batches = [micro.step for micro in micros]
                for part in map(one, batches) if together is None else together(batches):
                    found.append(_kept(part) if len(micros) > 1 else part)
                break
            except BaseException as error:
                reset()
                if not is_out_of_memory(error):
                    raise
                tokens = [micro.step.packed.num_tokens for micro in micros]
                failed = len(found) if together is None else tokens.index(max(tokens))
                said = str(error)
            parts, tokens = micros[failed].step.parts, tokens[failed]
            del micros, batches, found
            release()
            if len(parts.forget) + len(parts.retain) == 1:
                raise self._refusal()(tokens, said)
            self.tokens = tokens // 2
            self.halvings += 1
        if self.halvings > before:
            logger.warning(
                f"{self._name}: memory ran out, so a step's {step.packed.num_tokens} tokens go through in "
                f"{len(micros)} "
                f"parts, of at most {self.tokens} tokens, from here on; the step's sums are the same "
                f"(micro_batch_tokens: {self.tokens} does so from the start)"
            )
        return found[0] if len(micros) == 1 else _sum(step.packed, micros, found)

    def update(self, apply: Callable[[], None]) -> None:
        """apply(), with an error that says what to change where memory runs out."""
        try:
            return apply()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        raise self._refusal()(None, said)


def _kept(part: PartLoss) -> PartLoss:
    """With tensors of its own: a CUDA graph's are overwritten by the next replay."""
    return dataclasses.replace(part, loss=part.loss.clone(), nll=None if part.nll is None else part.nll.clone())


def _sum(packed: PackedBatch, micros: list[MicroBatch], found: list[PartLoss]) -> PartLoss:
    """The loss of the batch that the micro-batches are cut from."""
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


def micro_batches(step: StepBatch, max_tokens: int | None) -> list[MicroBatch]:
    """A batch in micro-batches of at most `max_tokens` tokens (None: whole), none of them empty, each a batch of the
    same form: forget, alternate, retain samples."""
    packed, parts = step.packed, step.parts
    if max_tokens is None or packed.num_tokens <= max_tokens:
        return [MicroBatch(step, list(range(packed.num_samples)))]
    alternates = parts.alternate or [None] * len(parts.forget)
    units = [[i for i in pair if i is not None] for pair in zip(parts.forget, alternates)]
    units += [[i] for i in parts.retain]
    sizes = [sum(packed.lengths[i] for i in unit) for unit in units]
    groups = [sorted(i for index in part for i in units[index]) for part in token_batches(sizes, max_tokens)]
    return [MicroBatch(_cut(step, samples), samples) for samples in groups]


def rows_of(packed: PackedBatch, samples: list[int]) -> torch.Tensor:
    """Which of a batch's labelled rows are those of `samples`; on the host."""
    first = list(itertools.accumulate(packed.row_counts, initial=0))
    return torch.cat([torch.arange(first[i], first[i + 1]) for i in samples])


def _cut(step: StepBatch, samples: list[int]) -> StepBatch:
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
    return StepBatch(part, Parts.of(forget, alternate, retain), original, shares)
