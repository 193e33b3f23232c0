"""Passes in which all micro-batches pass a layer before the next one: memory of one, and what crosses the bus.

H layers, of which n are streamed, through two buffers. A pass up and down leaves two layers in place where it turns
around, so it loads 2 n - 2, and the next one finds the lowest two: 2 n - 4 (`steps`). Where layers are trained, each
comes once more than its update goes back, but the top one (`updates`).
"""

from __future__ import annotations

import dataclasses

from kunbr_fast.planning.costs import Architecture, Batch, Step, backward_extra, head, kept

BUFFERS = 2


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a streamed model's layers that cross the bus, by the names of `LayerStream.traffic`."""

    weights_in: float = 0.0
    weights_out: float = 0.0
    state_in: float = 0.0
    state_out: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def times(self, factor: float) -> Traffic:
        return Traffic(*(factor * amount for amount in dataclasses.astuple(self)))

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def loads(streamed: int, steps: float = 1) -> float:
    """How many layers steps load that train none of the streamed ones."""
    again = max(0, 2 * (streamed - BUFFERS))
    return again * steps + min(streamed, BUFFERS)


def update_traffic(streamed: int, weights: int, state: int, steps: int) -> Traffic:
    """Of steps that train every layer. weights, state: bytes of a layer."""
    comes = max(0, 2 * streamed - 1) * weights
    return Traffic(steps * comes, steps * streamed * weights, (steps - 1) * streamed * state, steps * streamed * state)


def pass_memory(
    a: Architecture,
    batch: Batch,
    block: range | None,
    *,
    torch: bool,
    many: bool,
    taps: bool = False,
    fused: bool = True,
) -> dict[str, int]:
    """The largest point of one micro-batch's passes, without what waits between two layers: as of `Step.memory`.

    block: the layers that are trained, None for every parameter; many: there are more micro-batches, whose gradients
    of what is outside the layers add up meanwhile; taps, fused: as of `Step`.
    """
    b, T, full = a.itemsize, batch.tokens, block is None and not taps
    between = T * a.hidden * b
    shared = 2 * T * (a.queries // a.heads) * b if a.name != "gpt2" else 0  # cos, sin
    table = a.vocabulary * a.hidden * b * full
    keeps, extra = head(a, batch.rows, torch=torch, train=full)
    step = Step(a, batch, block, torch=torch, start=a.layers - 1, fused=fused, taps=taps)
    top, before = shared + between + step.saved(a.layers - 1), table * many
    points = [dict(activations=top, head=keeps + extra, gradient=before, workspace=0)]
    if full:  # the head's gradient is scaled into a new tensor
        points.append(dict(activations=top, head=keeps, gradient=before + table, workspace=0))
    for active in {full, full or block is not None and len(block) > 0} - {None}:
        saved = kept(a, batch, active=active, fused=fused, taps=taps)
        made = table + full * a.layer * b
        made_too = backward_extra(a, batch, active=active, fused=False, torch=torch)
        points.append(dict(activations=shared + between + saved, head=0, gradient=made, workspace=made_too))
    if full:
        gradient = (a.outside + a.layer) * b
        points.append(dict(activations=shared + between, head=0, gradient=gradient, workspace=table))
    return max(points, key=lambda point: sum(point.values()))
