"""Packed tokens to the places of a padded grid and back, and some rows of many.

torch's own backward of a gather adds every row of the gradient to the row that it came from: on a GPU by atomics, all
of a sample's padding to one row, and after a sort for `x[:, rows]`. Here each item has one place of its own, and the
gradient of padding is 0: the backward of a gather is the gather of the way back. It adds nothing, and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch


class _ToPlaces(torch.autograd.Function):
    """Of each x (T, ...) its rows at `index` (P,). pairs: (index, back), as in `to_places`."""

    @staticmethod
    def forward(ctx: Any, pairs: tuple, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*(back for _, back in pairs))
        ctx.set_materialize_grads(False)
        return tuple(x.index_select(0, index) for x, (index, _) in zip(xs, pairs))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *(None if d is None else d.index_select(0, back) for d, back in zip(grads, ctx.saved_tensors))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return d.new_zeros(ctx.shape).index_copy_(ctx.dim, index, d), None, None


def to_places(*items: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]) -> list[torch.Tensor]:
    """Of each (x (T, ...), index (P,), back (T,)): `x[index]`, the rows of x at P places; x itself without an index.

    back: the place of each row, `index[back[t]] == t`, each place once. Other places are padding: what they hold must
    have a gradient of 0, which is not added to any row.
    """
    moved = [item for item in items if item[1] is not None]
    found = iter(_ToPlaces.apply([item[1:] for item in moved], *(item[0] for item in moved)) if moved else ())
    return [item[0] if item[1] is None else next(found) for item in items]


def take(x: torch.Tensor, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`x.index_select(dim, index)`, for an index that names no row twice."""
    return _Take.apply(x, index, dim)
