"""When a relearning adversary starts anew, how it relearns, and which half of the facts.

An adversary is a copy of the weights that are trained. It relearns one half of the facts to be forgotten; the forget
loss is then taken at its weights, on the other half. So what is trained away is not what the model answers, but what it
would answer under attack.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

from kunbr_fast.files.shown import shown
from kunbr_fast.values import COUNT, check, rates


@dataclasses.dataclass(frozen=True)
class AdversarySettings:
    """every: the steps between two forks. At a fork the adversary becomes a copy of the weights that are trained, with
    a fresh AdamW at one of `lrs`, drawn by `seed`, and one half of the facts, drawn too, to relearn.

    steps: of the adversary, at a fork. frozen: it takes none later; else one before each step.
    """

    every: int = 9
    steps: int = 2
    lrs: tuple[float, ...] = (1e-6, 5e-6, 1e-5)
    frozen: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check("adversary_every", self.every, COUNT)
        check("adversary_steps", self.steps, COUNT)
        object.__setattr__(self, "lrs", rates(self.lrs, "adversary_lrs"))
        if not isinstance(self.frozen, bool):
            raise ValueError(f"adversary_frozen={shown(self.frozen)}: expected True or False")

    def forks(self, step: int) -> bool:
        """Whether the adversary starts anew before this step of the training."""
        return step % self.every == 0

    def steps_before(self, step: int) -> int:
        """How many steps it takes between the training's last one and this one."""
        return self.steps if self.forks(step) else int(not self.frozen)

    def lr(self, step: int) -> float:
        """The learning rate of the fork that this step belongs to."""
        return self.lrs[order(len(self.lrs), self.seed, "rate", step // self.every)[0]]

    def halves(self, facts: Sequence[int], step: int) -> tuple[list[int], list[int]]:
        """The samples that the adversary relearns at this step, and those that it is asked about. facts: each sample's;
        those of one fact stay together."""
        known = sorted(set(facts))
        if len(known) < 2:
            raise ValueError(
                f"an adversary relearns one half of the facts and is asked about the other: got {len(facts)} forget "
                f"samples about {len(known)} fact, expected two facts or more (adversary_every=0 does without)"
            )
        shuffled = order(len(known), self.seed, "halves", step // self.every)
        relearned = {known[i] for i in shuffled[: len(known) // 2]}
        return tuple([i for i, fact in enumerate(facts) if (fact in relearned) == side] for side in (True, False))

    def relearned(self, step: int) -> range:
        """The numbers, within their fork, of the batches that the adversary relearns before this step."""
        since = step % self.every
        first = 0 if since == 0 else self.steps + (0 if self.frozen else since - 1)
        return range(first, first + self.steps_before(step))


def order(count: int, seed: int, *what: str | int) -> list[int]:
    """A permutation of `count` numbers, another one for each `what`."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(count, generator=generator).tolist()
