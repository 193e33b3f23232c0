"""Objectives, as one weight per labelled row on one fused linear loss.

A sample's loss is the mean negative log-likelihood (NLL, in nats) over its labelled tokens; a batch's loss is the
mean over its samples. Gradient difference (arXiv 2203.12817; the warm-up and re-insertion objective of KUnBR) is

    -L_forget + retain_coeff * L_retain

so a row of a forget sample weighs -1 / (B_forget * rows of that sample), a row of a retain sample
retain_coeff / (B_retain * rows of that sample), and forget and retain go through the model as one packed batch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import register_flop_formula

from kunbr_fast import dispatch
from kunbr_fast.data import PackedBatch
from kunbr_fast.decoder import Head
from kunbr_fast.kernels import operators, reference


class _LinearLoss(torch.autograd.Function):
    """The gradients that are asked for are made in the forward and saved; the backward scales them. Backward is once
    differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, scale, softcap, nll_cap, impl):
        needs = ctx.needs_input_grad[:3]
        loss, nll, *grads = torch.ops.kunbr_fast.linear_loss(
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
    head: Head,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    nll_cap: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head and the loss in one pass: `loss = (row_weights * nll.clamp(max=nll_cap)).sum()` and nll (R,).

    hidden (R, D) after the final norm; targets (R,) int64; row_weights (R,) of any sign; nll_cap (R,) or None.
    Equals cross_entropy(head(hidden), targets, reduction="none") weighted and summed; logits are never held whole.
    Differentiable, once, in hidden and in the head's own weight and bias where these require grad; nll is detached, and
    -nll is each target's log-probability. loss and nll are fp32, fp64 for fp64 inputs, which "auto" gives to torch.

    Nothing waits for the device. A target that is no row of the head raises IndexError or RuntimeError with torch; with
    impl="triton" its row's nll and gradient, and the loss, are NaN. Under torch.autocast hidden, weight and bias are
    cast as nn.Linear casts them.

    TypeError, ValueError for arguments that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    """
    for name, tensor in (("row_weights", row_weights), ("nll_cap", nll_cap)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but the loss is differentiable in hidden and the head: detach it")
    weight, bias = head.linear.weight, head.linear.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearLoss.apply(hidden, weight, bias, targets, row_weights, head.scale, head.softcap, nll_cap, impl)


@torch.library.custom_op(
    "kunbr_fast::linear_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor row_weights, Tensor? nll_cap, "
    "float scale, float? softcap, bool need_hidden, bool need_weight, bool need_bias, str impl) "
    "-> (Tensor loss, Tensor nll, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)
def _linear_loss(
    hidden, weight, bias, targets, row_weights, nll_cap, scale, softcap, need_hidden, need_weight, need_bias, impl
):
    """`reference.linear_loss`, by whom `impl` says. A gradient not asked for is an empty tensor."""
    _check(hidden, weight, bias, targets, row_weights, nll_cap, need_bias, impl)
    if dispatch.resolve("linear_loss", impl, hidden.device, hidden.dtype) == "triton":
        from kunbr_fast.kernels.linear_loss import launch as run
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
    operators.one_of("impl", impl, ("auto", *dispatch.IMPLEMENTATIONS))
    if hidden.dtype not in operators.DTYPES:
        raise TypeError(f"hidden is {hidden.dtype}: expected one of {', '.join(str(d) for d in operators.DTYPES)}")
    dispatch.check_dtype("linear_loss", impl, hidden.dtype)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and the head's weight {tuple(weight.shape)}: expected (R, D), the rows "
            "that have a label, and (V, D)"
        )
    for name, tensor in (("the head's weight", weight), ("the head's bias", bias)):
        if tensor is not None:
            operators.same_kind(name, tensor, "hidden", hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"the head's bias is {tuple(bias.shape)}: expected ({weight.shape[0]},), one for each row of it"
        )
    if need_bias and bias is None:
        raise ValueError("need_bias=True, but the head has no bias")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}: expected torch.int64")
    for name, tensor in (("targets", targets), ("row_weights", row_weights), ("nll_cap", nll_cap)):
        if tensor is None:
            continue
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: expected one for each of hidden's {len(hidden)} rows")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move it there")


@dataclasses.dataclass(frozen=True)
class RowWeights:
    """What one step optimises: loss = sum over rows of weight * min(nll, cap)."""

    weight: torch.Tensor  # (R,)
    cap: torch.Tensor | None  # (R,), infinite where a row is not capped


def _per_sample_mean(batch: PackedBatch, sample_weight: torch.Tensor) -> torch.Tensor:
    if not bool(batch.rows_per_sample.all()):
        number = batch.rows_per_sample.tolist().index(0)
        raise ValueError(
            f"sample {number} of the batch has no token with a loss (its first token is never predicted): leave it out"
        )
    return (sample_weight / batch.rows_per_sample)[batch.row_sample]


def likelihood(batch: PackedBatch, reduction: str = "mean") -> RowWeights:
    """Minimise the mean (or, with reduction="sum", the sum) over samples of each sample's mean NLL.

    ValueError, here and below, for a sample without a labelled token, which has no mean.
    """
    ones = torch.ones(batch.num_samples, dtype=torch.float64, device=batch.input_ids.device)
    return RowWeights(_per_sample_mean(batch, ones / batch.num_samples if reduction == "mean" else ones), None)


def gradient_difference(
    batch: PackedBatch, num_forget: int, retain_coeff: float, forget_loss_cap: float | None = None
) -> RowWeights:
    """Minimise -L_forget + retain_coeff * L_retain, where the batch's first `num_forget` samples are to be forgotten.

    forget_loss_cap: a forget token whose NLL is beyond it gets no further push (off, as published, where None).
    """
    device, num_retain = batch.input_ids.device, batch.num_samples - num_forget
    forget = torch.full((num_forget,), -1.0 / max(num_forget, 1), dtype=torch.float64)
    retain = torch.full((num_retain,), retain_coeff / max(num_retain, 1), dtype=torch.float64)
    weight = _per_sample_mean(batch, torch.cat([forget, retain]).to(device))
    if forget_loss_cap is None:
        return RowWeights(weight, None)
    infinite = torch.full_like(weight, float("inf"))
    return RowWeights(weight, torch.where(batch.row_sample < num_forget, forget_loss_cap, infinite))


def mean_nll(batch: PackedBatch, nll: torch.Tensor) -> torch.Tensor:
    """(B,) each sample's mean NLL, from the (R,) NLL of the labelled rows."""
    total = torch.zeros(batch.num_samples, dtype=nll.dtype, device=nll.device)
    return total.index_add_(0, batch.row_sample, nll) / batch.rows_per_sample


def metrics(batch: PackedBatch, num_forget: int, loss: torch.Tensor, nll: torch.Tensor) -> dict[str, float | None]:
    """What is reported of a step, from before its update: `loss` (as optimised), `tokens`, `forget_loss` and
    `retain_loss` (mean over samples of `mean_nll`, in nats, uncapped; None where the batch has no such sample)."""
    per_sample = mean_nll(batch, nll)
    forget, retain = per_sample[:num_forget], per_sample[num_forget:]
    return {
        "loss": float(loss.detach()),
        "forget_loss": float(forget.mean()) if len(forget) else None,
        "retain_loss": float(retain.mean()) if len(retain) else None,
        "tokens": batch.num_tokens,
    }
