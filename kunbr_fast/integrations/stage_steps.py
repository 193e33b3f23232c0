"""Which of a Trainer's steps are of which stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kunbr_fast.run.config import KUnBRConfig


@dataclasses.dataclass(frozen=True)
class Span:
    """The driver's steps `first` to `stop` (exclusive) of a stage. Number 0 is the warm-up, n the n-th visit of a
    block. steps: as many were planned, for which the learning rate has its schedule; something may end it earlier."""

    number: int
    first: int
    stop: int
    steps: int


def epochs_of_stages(config: KUnBRConfig, warm_up: bool) -> list[int]:
    """Of the warm-up (0 without one) and of each visit of a block."""
    return [config.warmup_epochs * warm_up, *[config.block_epochs] * (config.rounds * config.top_k)]


def share_steps(max_steps: int, steps: Mapping[int, int]) -> dict[int, int]:
    """`max_steps` shared over stages of `steps`, by their numbers: each has one at least, and of the rest its part."""
    rest, whole = max_steps - len(steps), sum(steps.values()) - len(steps)
    found = {number: 1 + (rest * (n - 1) // whole if whole else 0) for number, n in steps.items()}
    # what rounding down has left goes to those that it took most from
    lost = sorted(steps, key=lambda number: -(rest * (steps[number] - 1) % max(whole, 1)))
    for number in lost[: max_steps - sum(found.values())]:
        found[number] += 1
    return found


def shared_out(max_steps: int, steps: Mapping[int, int]) -> tuple[dict[int, int], str]:
    """`share_steps`, and what to tell of it. ValueError for more than there are, or fewer than one a stage."""
    if max_steps > (whole := sum(steps.values())):
        raise ValueError(
            f"max_steps={max_steps}: all stages have {whole} steps; leave it out, or lower it, and they share it"
        )
    if max_steps < len(steps):
        raise ValueError(
            f"max_steps={max_steps}: {len(steps)} stages (the warm-up, if there is one, and each visit of a block) "
            f"have one step at least: raise it to {len(steps)}, or lower rounds or top_k, or leave it out"
        )
    shared = share_steps(max_steps, steps)
    parts = [(shared[number], steps[number]) for number in steps if number]
    said = [f"{shared[0]} of {steps[0]} steps of the warm-up"] if 0 in steps else []
    said += [f"{' or '.join(map(str, sorted({n for n, _ in parts})))} of {parts[0][1]} of each of {len(parts)} "
             "visits of blocks"] if parts else []  # fmt: skip
    text = f"max_steps={max_steps} of {whole}, shared over the stages: {', '.join(said)}"
    return shared, text
