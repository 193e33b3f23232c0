"""Steps in parts: the same sums from less memory.

A step's loss is a sum over its samples of their shares in it, so its batch can go through in parts (micro-batches) whose
gradients add up. A part with b_f of the B_f forget samples and b_r of the B_r retain samples has

    b_f / B_f * (forget term of the part) + retain_coeff * b_r / B_r * (retain term of the part)

in the loss, which is what `Criterion.retain_scale` makes of one call. The result is that of the whole up to the order of
additions. What is between samples (a forget sample and its alternate) stays together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from kunbr_fast.data import PackedBatch, send
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import OutOfMemory, is_out_of_memory, release
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import Reference

logger = logging.getLogger(__name__)


class MicroBatches:
    """Takes the batches of a training's steps through it, whole or in parts of at most `tokens` tokens (None: whole).

    When memory runs out the step is begun again, in parts half the size of the one that failed, and so are the steps after
    it: `tokens` is lowered, `halvings` counts. name: of the training, for the log. refusal(tokens, said): makes the error
    for one sample that does not fit by itself, or (tokens None) for an update; a method of the training.
    """

    def __init__(self, tokens: int | None, name: str, refusal: Callable[[int | None, str], OutOfMemory]):
        if tokens is not None and tokens < 1:
            raise ValueError(f"micro_batch_tokens={tokens}: expected at least 1")
        self.tokens, self.halvings = tokens, 0
        # weakly: a training that holds this one must go, with its weights, when nobody uses it, not at some later collection
        self._name, self._refusal = name, weakref.WeakMethod(refusal)

    def run(
        self,
        batch: PackedBatch,
        parts: Mapping[str, range],
        one: Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor | None]] | None,
        reset: Callable[[], None],
        together: Callable[[list[MicroBatch]], Iterable[tuple[torch.Tensor, torch.Tensor | None]]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward of a batch: (loss, the rows' NLL (R,), or None if there are none), detached.

        parts: as from `Criterion.parts`. one(micro): adds a part's gradient, returns its share of the loss, and its rows'
        NLL. reset(): makes what has been accumulated 0 again; called on any exception. together(parts): does what `one` does
        for all of them, where they go through side by side.
        """
        before = self.halvings
        while True:
            micros = self._cut(batch, parts)
            found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
            try:
                for loss, nll in map(one, micros) if together is None else together(micros):
                    if len(micros) > 1:  # a CUDA graph's are overwritten by the next replay
                        loss, nll = loss.clone(), None if nll is None else nll.clone()
                    found.append((loss.detach(), nll))
                break
            except BaseException as error:
                reset()
                if not is_out_of_memory(error):
                    raise
                failed = micros[len(found)] if together is None else max(micros, key=lambda m: m.batch.num_tokens)
                said = str(error)
            del micros, found
            release()
            pairs = len(failed.samples) == 2 and failed.num_forget == 1 and len(parts["alternate"]) > 0
            if len(failed.samples) == 1 or pairs:
                raise self._refusal()(failed.batch.num_tokens, said)
            self.tokens = failed.batch.num_tokens // 2
            self.halvings += 1
        if self.halvings > before:
            logger.warning(
                f"{self._name}: memory ran out, so a step's {batch.num_tokens} tokens go through in {len(micros)} parts, of at "
                f"most {self.tokens} tokens, from here on; the step's sums are the same (micro_batch_tokens: {self.tokens} "
                "does so from the start)"
            )
        if len(micros) == 1:
            return found[0]
        total = torch.stack([loss for loss, _ in found]).sum()
        if found[0][1] is None:
            return total, None
        rows, values = (torch.cat(tensors) for tensors in ([m.rows for m in micros], [nll for _, nll in found]))
        return total, torch.empty_like(values).index_copy_(0, rows, values)

    def update(self, apply: Callable[[], None]) -> None:
        """apply(), with an error that says what to change where memory runs out."""
        try:
            return apply()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        raise self._refusal()(None, said)

    def _cut(self, batch: PackedBatch, parts: Mapping[str, range]) -> list[MicroBatch]:
        if self.tokens is None or batch.num_tokens <= self.tokens:
            return [MicroBatch(batch, list(range(batch.num_samples)), slice(None), len(parts["forget"]))]
        return micro_batches(batch, parts, self.tokens)


@contextlib.contextmanager
def share_of(criterion: Criterion, parts: Mapping[str, range], micro: MicroBatch) -> Iterator[float]:
    """Inside, the criterion's loss of the part times the number yielded is what the part has in the whole batch's (in the
    step's, of which the batch may be a part itself: `Criterion.share`). An objective that adapts to its retain term finds that of the whole, once all parts are through."""
    share = micro.num_forget / len(parts["forget"]) if micro.num_forget else 1.0
    retained = sum(i in parts["retain"] for i in micro.samples) / max(len(parts["retain"]), 1)
    scale, earlier = criterion.retain_scale, criterion.terms
    criterion.retain_scale, criterion.terms = scale * retained / share, []
    try:
        yield share * criterion.share
    finally:
        terms, criterion.terms, criterion.retain_scale = criterion.terms, earlier, scale
    if terms:
        criterion.terms = [sum(earlier) + retained * sum(terms)]


def add_part(
    criterion: Criterion,
    parts: Mapping[str, range],
    micro: MicroBatch,
    reference: Reference | None,
    loss: Callable[[PackedBatch, int, Reference | None], tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backward of a part's share in the step: (its share of the loss, its rows' NLL), detached.

    reference: of the whole batch. loss(batch, num_forget, reference): the criterion's, of the part alone.
    """
    with share_of(criterion, parts, micro) as share:
        given = None if reference is None else reference.batch(micro.samples)
        value, nll = loss(micro.batch, micro.num_forget, given)
    value = value if share == 1.0 else value * share
    value.backward()
    return value.detach(), nll


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch. samples: which of the whole's; rows (R,): which of its labelled rows; num_forget: how many
    of its own samples, the first ones, are to be forgotten."""

    batch: PackedBatch
    samples: list[int]
    rows: torch.Tensor
    num_forget: int


def micro_batches(batch: PackedBatch, parts: Mapping[str, range], max_tokens: int | None) -> list[MicroBatch]:
    """A packed batch in parts of at most `max_tokens` tokens (None: in one), none of them empty.

    parts: as from `Criterion.parts`; a forget sample and its alternate stay together, so each part is a batch of the
    same form: forget, alternate, retain samples.
    """
    alternates = parts["alternate"] or [None] * len(parts["forget"])
    units = [[i for i in pair if i is not None] for pair in zip(parts["forget"], alternates)]
    units += [[i] for i in parts["retain"]]
    sizes = [sum(batch.lengths[i] for i in unit) for unit in units]
    host, device = batch.host, batch.device
    first_token = list(itertools.accumulate(batch.lengths, initial=0))
    first_row = list(itertools.accumulate(batch.row_counts, initial=0))
    found = []
    for indices in token_batches(sizes, sum(sizes) if max_tokens is None else max_tokens):
        samples = sorted(i for index in indices for i in units[index])
        tokens = [slice(first_token[i], first_token[i + 1]) for i in samples]
        taken = (torch.cat([x[at] for at in tokens]) for x in (host.input_ids, host.labels, host.position_ids))
        hidden = None if batch.hidden is None else torch.cat([batch.hidden[at] for at in tokens])
        part = PackedBatch(*taken, [batch.lengths[i] for i in samples], layer=batch.layer).to(device)
        part.hidden = hidden
        rows = torch.cat([torch.arange(first_row[i], first_row[i + 1]) for i in samples])
        found.append(MicroBatch(part, samples, send(rows, device), sum(i in parts["forget"] for i in samples)))
    return found
