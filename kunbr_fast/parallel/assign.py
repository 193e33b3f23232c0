"""Who computes what: blocks and samples, dealt out to processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# What a step shared by all costs beyond its part: small batches use a GPU less well, and gradients are summed. A guess.
SHARING_COSTS = 1.25


PARALLEL = ("auto", "blocks", "samples")


def block_cost(block: range, num_layers: int) -> float:
    """What a step of a block's training takes, in forward passes of one layer: 3 for each of its own layers (forward, dX,
    dW), 2 for each above (forward, dX). Those below are in the prefix cache."""
    return 3.0 * len(block) + 2.0 * (num_layers - block.stop)


def spread_blocks(
    costs: Sequence[float], size: int, share: float, parallel: str = "auto"
) -> tuple[list[list[int]], list[int]]:
    """(the blocks that each process trains alone, those that all train together), as indices into `costs`.

    share: the part of a step that the busiest process has where all train together. parallel: "blocks" for all alone,
    "samples" for all together, "auto" for whatever is predicted to end first: the blocks alone are dealt out longest
    first, each to the process with the least to do; and where that leaves some idle (fewer blocks than processes, or
    seven on four), the cheapest or the costliest ones are trained together by all.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def dealt(indices: Sequence[int]) -> tuple[float, list[list[int]]]:
        alone: list[list[int]] = [[] for _ in range(size)]
        loads = [0.0] * size
        for index in indices:
            rank = min(range(size), key=lambda r: (loads[r], r))
            alone[rank].append(index)
            loads[rank] += costs[index]
        return max(loads), [sorted(part) for part in alone]

    counts = {"auto": range(len(costs) + 1), "blocks": [0], "samples": [len(costs)]}[parallel]
    best = None
    for count in counts:
        for together in (order[:count], order[len(order) - count :]):
            longest, alone = dealt([i for i in order if i not in together])
            time_ = longest + share * SHARING_COSTS * sum(costs[i] for i in together)
            if best is None or time_ < best[0]:
                best = time_, alone, sorted(together)
    return best[1], best[2]


def homes(steps: Iterable[Sequence[int]], sizes: Sequence[int], ranks: int) -> list[int]:
    """For each sample the process that it always goes to, in steps that all processes share.

    steps: each one's samples; sizes: of each sample, in tokens. A fixed home means that one process alone needs the sample's
    activations. The steps are known beforehand, so homes are chosen, longest sample first, where the sample meets the
    fewest tokens of its own steps (an index modulo `ranks` leaves the busiest process with 1.6 times its part at 12 samples
    a step on 4 processes; this with 1.2 to 1.4 times, and less in larger steps).
    """
    where: list[list[int]] = [[] for _ in sizes]
    for number, step in enumerate(steps):
        for i in step:
            where[i].append(number)
    tokens: dict[int, list[int]] = {}  # of a step, on each process
    held = [0] * ranks
    home = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        loads = [tokens.setdefault(number, [0] * ranks) for number in where[i]]
        best = min(range(ranks), key=lambda r: (sum(load[r] for load in loads), held[r], r))
        home[i] = best
        held[best] += sizes[i]
        for load in loads:
            load[best] += sizes[i]
    return home


def busiest_share(steps: Iterable[Sequence[int]], sizes: Sequence[int], home: Sequence[int], ranks: int) -> float:
    """The part of all steps' tokens that the busiest process of each step has: 1 / ranks at best."""
    most = total = 0
    for step in steps:
        loads = [0] * ranks
        for i in step:
            loads[home[i]] += sizes[i]
        most, total = most + max(loads), total + sum(loads)
    return most / total
