"""Which blocks are trained: by density, by a threshold, or on a Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from kunbr_fast.density.measure import Density
from kunbr_fast.model.blocks import selectable_blocks

RULES = ("top_k", "threshold", "pareto")


def highest(values: Sequence[float], k: int) -> list[int]:
    """The places of the k highest values, from low to high; of equal values the first come first."""
    if not 1 <= k <= len(values):
        raise ValueError(f"k={k}: expected 1 to {len(values)}, the number of values")
    return sorted(sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:k])


def above(values: Sequence[float], threshold: float) -> list[int]:
    """The places of the values above `threshold`, from low to high. May be empty."""
    return [i for i, value in enumerate(values) if float(value) > threshold]


def pareto_front(importance: Sequence[float], alignment: Sequence[float]) -> list[int]:
    """The places where no other has more importance without more |alignment|, from low to high.

    Place j beats i if importance[j] >= importance[i] and |alignment[j]| <= |alignment[i]|, and they are not both equal.
    Lists or tensors, of layers or of matrices: `knowledge_density(statistic="slug", retain=...)` has both for layers.
    SLUG (arXiv 2407.11867) chooses among these; its code lets j beat i only where both are strictly better.
    """
    if len(importance) != len(alignment):
        raise ValueError(
            f"{len(importance)} values of importance and {len(alignment)} of alignment: give as many of each"
        )
    points = [(float(value), abs(float(angle))) for value, angle in zip(importance, alignment)]

    def beaten(point: tuple[float, float]) -> bool:
        return any(a >= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    return [i for i, point in enumerate(points) if not beaten(point)]


def check_order(statistic: str) -> None:
    """ValueError for a statistic of which more is not more knowledge."""
    if statistic == "cosine":
        raise ValueError(
            'statistic="cosine" says how alike two gradients are, not how much a layer holds: measure "slug" with a '
            'retain set, and choose with rule="pareto"'
        )


def select_blocks(
    density: Density,
    num_blocks: int,
    top_k: int | None = None,
    skip_last_layers: int = 2,
    *,
    rule: str = "top_k",
    threshold: float | None = None,
) -> list[range]:
    """Blocks chosen by their layers' density, from low to high (the order in which they are trained).

    A block's density is the sum of its layers' values. A block that holds one of the last `skip_last_layers`
    layers is never chosen: their large gradients come from producing the output (KUnBR, arXiv 2511.11667).
    rule: `top_k`, the `top_k` highest; `threshold`, those above `threshold`; `pareto`, the Pareto front of high density
    and low |alignment| (its mean over the block's layers), for SLUG's importance measured with a retain set.

    ValueError where no block is chosen, for a statistic without an order (cosine), and for arguments that are not the
    rule's.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(RULES)}")
    for name, value, own in (("top_k", top_k, "top_k"), ("threshold", threshold, "threshold")):
        if (value is not None) != (rule == own):
            raise ValueError(f"{name}={value} with rule={rule!r}: rule={own!r} needs {name}, the others do not take it")
    check_order(density.statistic)
    free = selectable_blocks(len(density.per_layer), num_blocks, top_k, skip_last_layers)
    scores = [float(density.per_layer[block.start : block.stop].sum()) for block in free]
    if rule == "top_k":
        chosen = highest(scores, top_k)
    elif rule == "threshold":
        chosen = above(scores, threshold)
        if not chosen:
            raise ValueError(
                f"threshold={threshold}: no block is above it, the highest has {max(scores):.6g}: lower it"
            )
    else:
        if density.alignment is None:
            raise ValueError('rule="pareto" needs alignment: measure statistic="slug" with retain=samples to keep')
        chosen = pareto_front(scores, [float(density.alignment[b.start : b.stop].abs().mean()) for b in free])
    return [free[i] for i in chosen]
