"""Which rank computes what: blocks and samples, dealt out."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

# A shared step takes longer than its share of the work: small batches use a GPU less well, and gradients are summed.
# 1.25 is a guess.
SHARING_COSTS = 1.25
PARALLEL = ("auto", "blocks", "samples")


def block_cost(block: range, num_layers: int) -> float:
    """The cost of a training step, in forward passes of one layer: 3 for each layer of the block (forward, dX, dW), 2
    for each cover layer (forward, dX), 0 for those below (prefix cache)."""
    return 3.0 * len(block) + 2.0 * (num_layers - block.stop)


def spread_blocks(
    costs: Sequence[float], size: int, share: float, parallel: str = "auto"
) -> tuple[list[list[int]], list[int]]:
    """Returns (blocks that each rank trains alone, blocks that all ranks train together), as indices into `costs`.

    share: the busiest rank's part of a step that all ranks share; 1 / size at best. parallel: "blocks" trains all
    blocks alone, "samples" all together, "auto" does what is predicted to end first. Blocks to be trained alone are
    dealt out longest first, each to the rank with the least to do. Where that leaves ranks idle (fewer blocks than
    ranks, or seven on four), "auto" has the cheapest or the costliest ones trained together.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    busy = min(size, len(costs))  # ranks that may get a block

    def dealt(indices: Sequence[int]) -> tuple[float, list[list[int]]]:
        alone: list[list[int]] = [[] for _ in range(busy)]
        loads = [(0.0, rank) for rank in range(busy)]  # a heap
        for index in indices:
            load, rank = loads[0]
            alone[rank].append(index)
            heapq.heapreplace(loads, (load + costs[index], rank))
        return max(load for load, _ in loads), [sorted(part) for part in alone]

    counts = {"auto": range(len(costs) + 1), "blocks": [0], "samples": [len(costs)]}[parallel]
    best = None
    for count in counts:
        for together in (order[:count], order[len(order) - count :]):
            longest, alone = dealt([i for i in order if i not in together])
            time_ = longest + share * SHARING_COSTS * sum(costs[i] for i in together)
            if best is None or time_ < best[0]:
                best = time_, alone, sorted(together)
    return best[1] + [[] for _ in range(size - busy)], best[2]


def homes(steps: Iterable[Sequence[int]], sizes: Sequence[int], ranks: int) -> list[int]:
    """Returns for each sample its home: the rank that always computes it, in steps that all ranks share.

    steps: the samples of each step. sizes: tokens of each sample. With a fixed home only one rank needs the sample's
    cached activations. Homes are balanced over the known steps: longest sample first, each to the rank with the fewest
    tokens in the sample's own steps. At 12 samples a step and 4 ranks, the busiest rank has 1.2 to 1.4 times its fair
    part (index modulo `ranks`: 1.6 times), and less in larger steps.
    """
    where: list[list[int]] = [[] for _ in sizes]
    for number, step in enumerate(steps):
        for i in step:
            where[i].append(number)
    tokens: dict[int, list[int]] = {}  # step -> tokens on each rank
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
    """The busiest rank's part of the tokens, summed over all steps: 1 / ranks at best."""
    most = total = 0
    for step in steps:
        loads = [0] * ranks
        for i in step:
            loads[home[i]] += sizes[i]
        most, total = most + max(loads), total + sum(loads)
    return most / total
