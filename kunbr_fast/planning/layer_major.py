"""Passes in which all micro-batches pass a layer before the next one: memory of one, and what crosses the bus.

H layers, of which n are streamed, through two buffers. A pass up and down leaves two layers in place where it turns
around, so it loads 2 n - 2, and the next one finds the lowest two: 2 n - 4. Where layers are trained their state comes
once, from the second step on, and weights and state go once.
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


def one_pass(streamed: int) -> int:
    """How many layers come to the device in a pass up and down, where none is there."""
    return max(0, 2 * (streamed - BUFFERS)) + min(streamed, BUFFERS)


def loads(streamed: int, steps: float, trainings: int = 1) -> float:
    """How many layers the steps of so many trainings bring to the device, each with a look at what its last step has
    left (`Training.check`)."""
    return max(0, 2 * (streamed - BUFFERS)) * (steps + trainings) + min(streamed, BUFFERS) * trainings


def update_traffic(streamed: int, weights: int, state: int, steps: int, trainings: int = 1) -> Traffic:
    """Of steps that train every layer. weights, state: bytes of a layer."""
    comes, goes = (steps - trainings) * streamed * state, steps * streamed * state
    return Traffic(loads(streamed, steps, trainings) * weights, steps * streamed * weights, comes, goes)


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
    between, shared = T * a.hidden * b, 2 * T * (a.queries // a.heads) * b if a.name != "gpt2" else 0  # cos, sin
    table, layer = full * a.vocabulary * a.hidden * b, full * a.layer * b
    tied, untied = table * a.tied, table * (not a.tied)
    keeps, extra = head(a, batch.rows, torch=torch, train=full)
    # of micro-batches before this one; those of tied weights wait in main memory
    before = (layer + untied) * many
    step = Step(a, batch, block, torch=torch, start=a.layers - 1, fused=fused, taps=taps)
    top = shared + between + step.saved(a.layers - 1)
    points = [dict(activations=top, head=keeps + extra, gradient=before, workspace=0)]
    if full:
        # the head's gradient is scaled into a new tensor; from the top layer on down it is gone, unless it is tied
        points.append(dict(activations=top, head=keeps, gradient=before + table, workspace=0))
        extra = backward_extra(a, batch, active=True, fused=False, torch=torch)
        points.append(dict(activations=top, head=0, gradient=layer + table + untied * many, workspace=extra))
    for active in {full, full or bool(block)}:
        saved = kept(a, batch, active=active, fused=fused, taps=taps)
        extra = backward_extra(a, batch, active=active, fused=False, torch=torch)
        gradient = layer + tied * (not many)
        points.append(dict(activations=shared + between + saved, head=0, gradient=gradient, workspace=extra))
    if full:  # embeddings
        points.append(dict(activations=shared + between, head=0, gradient=table * (1 + many), workspace=table))
    return max(points, key=lambda point: sum(point.values()))
