"""The retain term `hidden_layers`: the NLL, and how far the layers' outputs are from the original's.

    NLL(retain) + coeff * mean over layers l of [house mean over all tokens of |h_l - h_l(M0)|^2 / spread_l]

h_l is the output of layer l, before the final norm; spread_l the mean over retain tokens of |h_l(M0) - its mean|^2, so
that a layer with large states does not count for more. Each output is compared while the pass that makes the NLL goes
through its layer, and the gradient enters there: there is no second forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from kunbr_fast.data import send
from kunbr_fast.files.shown import shown
from kunbr_fast.model.decoder import Tap
from kunbr_fast.objectives.rows import Rows

ALL, UPPER, LAST = WORDS = ("all", "upper", "last")


@dataclasses.dataclass(frozen=True)
class HiddenLayers:
    """At which layers outputs are kept: ALL, the UPPER half, the LAST or some; and their weight beside the NLL."""

    layers: str | Sequence[int] = ALL
    coeff: float = 1.0

    def __str__(self) -> str:
        """What is not the default, by its setting."""
        settings = {"retain_layers": (self.layers, ALL), "hidden_coeff": (self.coeff, 1.0)}
        return ", ".join(f"{name}={shown(value)}" for name, (value, usual) in settings.items() if value != usual)

    def chosen(self, num_layers: int, block: range | None = None) -> list[int]:
        """The layers that count: those below a block that is trained never differ. ValueError where none is left, or
        for one that the model has not."""
        first = 0 if block is None else block.start
        if self.layers in WORDS:
            begin = {ALL: 0, UPPER: num_layers // 2, LAST: num_layers - 1}[self.layers]
            return list(range(max(first, begin), num_layers))
        for layer in self.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(f"{self}: {layer}: the model has layers 0 to {num_layers - 1}: leave it out")
        found = sorted({layer for layer in self.layers if layer >= first})
        if not found:
            raise ValueError(
                f"{self}: all of them are below the block {block.start}-{block.stop - 1}, which cannot change them: "
                f"name one of {first} to {num_layers - 1}, or all"
            )
        return found


class Distances:
    """The layers' part of the retain term of one batch. `taps` go with the pass (`Stretch.taps`), and `found` has
    the part of each layer that has run, a scalar, differentiable."""

    def __init__(self, rows: Rows, layers: Sequence[int], coeff: float):
        self._rows, self._coeff = rows, coeff / max(len(layers), 1)
        self.found: dict[int, torch.Tensor] = {}
        compared = layers if rows.retain.num_samples else ()
        self.taps: dict[int, Tap] = {layer: functools.partial(self._compare, layer) for layer in compared}

    def _compare(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        original, spread = self._rows.retain.original_output(layer)
        hidden, distance = _Compared.apply(hidden, original, self._weights, self._rows.retain.tokens)
        self.found[layer] = distance * (self._coeff / spread)
        return hidden

    @functools.cached_property
    def _weights(self) -> torch.Tensor:
        """(t,) what each retain token counts in the mean over its sample's tokens, then over samples."""
        samples = self._rows.retain.samples
        lengths = torch.tensor(self._rows.packed.lengths[samples.start : samples.stop])
        each = 1 / (lengths.double() * len(samples))
        wide = torch.promote_types(self._rows.head.linear.weight.dtype, torch.float32)
        return send(each.to(wide).repeat_interleave(lengths), self._rows.packed.device)


class _Compared(torch.autograd.Function):
    """(hidden (T, D) itself, sum over t of weights[t] * |hidden[at][t] - original[t]|^2). All that is kept is the
    difference, in the states' own dtype; the backward adds its multiple to the gradient that comes from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, original: torch.Tensor, weights: torch.Tensor, at: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        difference = hidden[at] - original
        ctx.save_for_backward(difference, weights)
        ctx.at, ctx.shape, ctx.dtype = at, hidden.shape, hidden.dtype
        ctx.set_materialize_grads(False)
        squares = torch.linalg.vector_norm(difference, dim=1, dtype=weights.dtype).square()
        return hidden.view_as(hidden), (squares * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: torch.Tensor | None, slope: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if slope is None:
            return above, None, None, None
        difference, weights = ctx.saved_tensors
        total = difference.new_zeros(ctx.shape, dtype=ctx.dtype) if above is None else above.clone()
        total[ctx.at] += difference * (2 * slope * weights)[:, None]
        return total, None, None, None
