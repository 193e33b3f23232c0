"""The language-model head and a weighted negative log-likelihood (NLL, in nats) as one operation: `linear_loss`.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)       (no softcap: scale * ...)
    nll    = cross_entropy(logits, targets, reduction="none")
    loss   = (row_weights * nll.clamp(max=nll_cap)).sum()

Index letters: R labelled rows, D hidden size, V vocabulary. An (R, V) tensor is never in memory.
"""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch, operators
from ..checks import floating, one_of, same_kind
from ..projections import autocast_dtype
from . import reference


class Logits(NamedTuple):
    """How a head's products become logits: `softcap * tanh(scale * products / softcap)`, or `scale * products`."""

    scale: float = 1.0
    softcap: float | None = None


PRODUCTS = Logits()  # as they are


class _LinearLoss(torch.autograd.Function):
    """The forward makes and saves the gradients that are asked for; the backward scales them. Once differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, scale, softcap, nll_cap, impl):
        needs = ctx.needs_input_grad[:3]
        loss, nll, *grads = _linear_loss(
            hidden, weight, bias, targets, row_weights, nll_cap, scale, softcap, *needs, impl
        )
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs)))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        grads = [None if grad is None else grad * d_loss for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    nll_cap: torch.Tensor | None = None,
    logits: Logits = PRODUCTS,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head and the loss in one pass: loss, a scalar, and nll (R,), as in the module docstring.

    hidden (R, D) after the final norm; weight (V, D), bias (V,) or None: the head; targets (R,) int64; row_weights (R,)
    of any sign; nll_cap (R,) or None. Differentiable, once, in hidden, weight and bias where these require grad. nll is
    detached, and -nll is each target's log-probability. loss and nll are fp32, fp64 for fp64 inputs, which "auto"
    gives to torch.

    Nothing waits for the device. A target that is no row of the head raises IndexError or RuntimeError with torch; with
    impl="triton" its row's nll and gradient, and the loss, are NaN. Under torch.autocast hidden, weight and bias are
    cast as nn.Linear casts them.

    TypeError, ValueError for arguments that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    """
    for name, tensor in (("row_weights", row_weights), ("nll_cap", nll_cap)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but the loss is differentiable in hidden and the head: detach it")
    hidden, weight, bias = operands(hidden, weight, bias)
    return _LinearLoss.apply(hidden, weight, bias, targets, row_weights, *logits, nll_cap, impl)


def operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The three as the operation takes them: cast as nn.Linear casts them under torch.autocast, and detached where
    gradients are off, so that none is made."""
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return hidden, weight, bias


@operators.custom_op(
    "linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor row_weights, Tensor? nll_cap, float scale, "
    "float? softcap, bool need_hidden, bool need_weight, bool need_bias, str impl) "
    "-> (Tensor loss, Tensor nll, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)
def _linear_loss(
    hidden, weight, bias, targets, row_weights, nll_cap, scale, softcap, need_hidden, need_weight, need_bias, impl
):
    """`reference.linear_loss`, by whom `impl` says. A gradient not asked for is an empty tensor."""
    _check(hidden, weight, bias, targets, row_weights, nll_cap, need_bias, impl)
    if dispatch.resolve("linear_loss", impl, hidden.device, hidden.dtype, size=len(hidden)) == "triton":
        from .triton_kernel import launch as run
    else:
        run = reference.linear_loss
    loss, nll, *grads = run(
        hidden, weight, targets, row_weights, bias, scale, softcap, nll_cap, need_hidden, need_weight, need_bias
    )
    return loss, nll, *(hidden.new_empty(0) if grad is None else grad for grad in grads)


@register_flop_formula(torch.ops.kunbr_fast.linear_loss)
def _(hidden, weight, *others, out_shape=None, **kwargs):
    """For torch's FlopCounterMode, which does not look into an operator: 2*R*D*V for each product asked for."""
    need_hidden, need_weight = others[6:8]
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + need_hidden + need_weight)


@_linear_loss.register_fake
def _(hidden, weight, bias, targets, row_weights, nll_cap, scale, softcap, need_hidden, need_weight, need_bias, impl):
    _check(hidden, weight, bias, targets, row_weights, nll_cap, need_bias, impl)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, nll = hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)
    asked = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return loss, nll, *(torch.empty_like(like) if need else hidden.new_empty(0) for like, need in asked)


def _check(hidden, weight, bias, targets, row_weights, nll_cap, need_bias, impl) -> None:
    """Shapes, dtypes and devices; also while torch.compile traces."""
    one_of("impl", impl, ("auto", *dispatch.IMPLEMENTATIONS))
    dispatch.check_dtype("linear_loss", impl, hidden.dtype)
    check_head(hidden, weight, bias)
    if need_bias and bias is None:
        raise ValueError("need_bias=True, but the head has no bias")
    check_rows(hidden, targets, row_weights=row_weights, nll_cap=nll_cap)


def check_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str = "hidden", whose: str = "the head"
) -> None:
    """TypeError, ValueError unless hidden is (R, D), weight (V, D) and bias (V,) or None, of one dtype and device.

    name, whose: what messages call hidden and the owner of weight and bias.
    """
    floating(name, hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} is {tuple(hidden.shape)} and {whose}'s weight {tuple(weight.shape)}: expected (R, D), the rows "
            "that have a label, and (V, D)"
        )
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            same_kind(f"{whose}'s {part}", tensor, name, hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{whose}'s bias is {tuple(bias.shape)}: expected ({weight.shape[0]},), one for each row of it"
        )


def check_rows(hidden: torch.Tensor, targets: torch.Tensor | None, **others: torch.Tensor | None) -> None:
    """TypeError, ValueError unless targets is int64 and it and the others are (R,) and on hidden's device, or None."""
    if targets is not None and targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}: expected torch.int64")
    for name, tensor in {"targets": targets, **others}.items():
        if tensor is None:
            continue
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: expected one for each of hidden's {len(hidden)} rows")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move it there")
