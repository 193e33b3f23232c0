"""Several projections of one input, such as q/k/v or gate/up: y_p = x @ W_p.T + b_p, one autograd function.

Index letters: T rows (all leading dimensions), K in features, N_p out features of projection p.

    dx   = sum_p dy_p @ W_p     (T, K), the second and later products added into the first one's result
    dW_p = dy_p.T @ x           (N_p, K)
    db_p = sum_T dy_p           (N_p,)

Never materialised: the input gradients of the single projections, which autograd would make one by one and add
(for P projections P - 1 temporaries of T*K values, and 3 (P - 1) T*K values less to read and write). Kept for the
backward pass: x only if some dW is asked for, W_p only if dx is. Only the gradients asked for are computed.

FLOPs: 2 T K sum_p N_p for each of y, dx and dW. Precision: matmuls accumulate in fp32 for half-precision inputs (as
torch's own); the sum over p rounds to x's dtype after each product, as autograd's sum does, but each product itself is
not rounded before it is added. Fixed order, no atomics: the same input twice gives the same bits.

A single projection needs none of this: torch.nn.functional.linear saves x only for dW and W only for dx.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def autocast_dtype(device: str) -> torch.dtype | None:
    """What torch.autocast casts to on such devices now, None if it is off."""
    # torch 2.11 cannot trace the question; where there is no autocast the next one raises, but nothing is compiled
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    on = available and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights_and_biases):
        count = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        ctx.set_materialize_grads(False)
        needs_dx, needs_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1 : 1 + count])
        ctx.save_for_backward(x if needs_dw else None, *(w if needs_dx else None for w in weights))
        ctx.x_shape, ctx.device = x.shape, x.device.type
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases))

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        needs, count = ctx.needs_input_grad, len(dys)
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, dws, dbs = None, [None] * count, [None] * count
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        with no_autocast(ctx.device):  # what is here has one dtype, that of the forward pass
            for p, dy in enumerate(dys):
                if dy is None:  # an output that nothing used
                    continue
                if needs[0]:
                    dx = dy @ weights[p] if dx is None else dx.addmm_(dy, weights[p])
                if needs[1 + p]:
                    dws[p] = dy.t() @ flat
                if needs[1 + count + p]:
                    dbs[p] = dy.sum(0)
        return None if dx is None else dx.reshape(ctx.x_shape), *dws, *dbs


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] | None = None
) -> tuple[torch.Tensor, ...]:
    """`tuple(F.linear(x, w, b) for w, b in zip(weights, biases))`, differentiable (also twice).

    x: (..., K); weights[p]: (N_p, K); biases[p]: (N_p,) or None; biases=None: none at all. Returns (..., N_p) each.
    All of one dtype; under torch.autocast they are cast as F.linear's inputs are.

    Errors: ValueError for no weights, or not as many biases; shapes and dtypes that do not fit raise as in F.linear.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(weights) != len(biases):
        raise ValueError(f"got {len(weights)} weights and {len(biases)} biases: expected one bias (or None) each")
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        # Here, not inside the function: what is saved for the backward pass must be what the forward pass used.
        x, *others = (
            t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)
            for t in (x, *weights, *biases)
        )
        weights, biases = others[: len(weights)], others[len(weights) :]
    return _Linears.apply(x, *weights, *biases)
