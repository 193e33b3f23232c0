"""Which samples go together: in the steps of a training, and in one pass over all samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from kunbr_fast.data.adversary import AdversarySettings, order

MOST_SEEDS = 2**42  # torch's generator takes 64 bits, and each epoch has a seed of its own


@dataclasses.dataclass(frozen=True)
class Schedule:
    """schedule[step] is (forget samples, retain samples), by number. A resumed run needs nothing but the step.

    An epoch is one pass over the forget set, in a new order each time. The retain set is an endless shuffled stream.

    adversary: forget samples are then an endless shuffled stream of one half of the facts, from fork to fork another
    one, and `relearned` has the other half's; an epoch has as many steps as without. facts: each forget sample's fact,
    a number (default: each has one of its own).
    """

    num_forget: int
    num_retain: int
    batch_size: int
    retain_batch_size: int
    epochs: int
    seed: int
    adversary: AdversarySettings | None = None
    facts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MOST_SEEDS:
            raise ValueError(f"a data order's seed has {self.seed.bit_length()} bits or a sign: expected 0 to 2^42 - 1")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_forget // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> tuple[list[int], list[int]]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        forget = self._forget(step) if self.adversary is None else self._asked(step)
        if not self.num_retain:
            return forget, []
        places = range(step * self.retain_batch_size, (step + 1) * self.retain_batch_size)
        passes = {p // self.num_retain for p in places}
        order = {number: _permutation(self.num_retain, self._seed(1, number)) for number in passes}
        return forget, [order[p // self.num_retain][p % self.num_retain] for p in places]

    def relearned(self, step: int) -> list[list[int]]:
        """The forget samples of each batch that the adversary relearns before this step; none without one."""
        if self.adversary is None:
            return []
        relearned, _ = self._halves(step)
        return [self._stream(relearned, step, "relearned", number) for number in self.adversary.relearned(step)]

    def _forget(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        forget = _permutation(self.num_forget, self._seed(0, epoch))
        return forget[index * self.batch_size : (index + 1) * self.batch_size]

    def _asked(self, step: int) -> list[int]:
        _, asked = self._halves(step)
        return self._stream(asked, step, "asked", step % self.adversary.every)

    def _halves(self, step: int) -> tuple[list[int], list[int]]:
        facts = range(self.num_forget) if self.facts is None else self.facts
        return self.adversary.halves(facts, step)

    def _stream(self, samples: list[int], step: int, what: str, number: int) -> list[int]:
        """Batch `number` of an endless shuffled stream of `samples`, another one for each fork."""
        size, fork, found = min(self.batch_size, len(samples)), step // self.adversary.every, []
        for place in range(number * size, (number + 1) * size):
            turn, index = divmod(place, len(samples))
            if not found or index == 0:
                shuffled = order(len(samples), self.seed, what, fork, turn)
            found.append(samples[shuffled[index]])
        return found

    def _seed(self, stream: int, number: int) -> int:
        return (self.seed * 1_000_003 + number) * 2 + stream


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def token_batches(lengths: Sequence[int], max_tokens: float) -> list[list[int]]:
    """Consecutive sample indices, at most `max_tokens` tokens a batch (a longer sample stands alone)."""
    result: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if not result or tokens + length > max_tokens:
            result.append([])
            tokens = 0
        result[-1].append(index)
        tokens += length
    return result
