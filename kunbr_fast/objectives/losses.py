"""Gradient difference, as one weight per labelled row on one fused linear loss. Other objectives: `objectives`.

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

from kunbr_fast.data import PackedBatch
from kunbr_fast.kernels import dispatch, reference
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Decoder, Head, Stretch


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
    hidden, weight, bias = operands(hidden, head)
    return _LinearLoss.apply(hidden, weight, bias, targets, row_weights, head.scale, head.softcap, nll_cap, impl)


def operands(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hidden, the head's weight and bias as its operations take them: cast as nn.Linear casts them under
    torch.autocast, and detached where gradients are off, so that none is made."""
    weight, bias = head.linear.weight, head.linear.bias
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return hidden, weight, bias


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
        from kunbr_fast.kernels.linear_loss.triton_kernel import launch as run
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
    if hidden.dtype not in operators.DTYPES:
        raise TypeError(f"{name} is {hidden.dtype}: expected one of {', '.join(str(d) for d in operators.DTYPES)}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} is {tuple(hidden.shape)} and {whose}'s weight {tuple(weight.shape)}: expected (R, D), the rows "
            "that have a label, and (V, D)"
        )
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            operators.same_kind(f"{whose}'s {part}", tensor, name, hidden)
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


@dataclasses.dataclass(frozen=True)
class RowWeights:
    """What one step optimises: loss = sum over rows of weight * min(nll, cap)."""

    weight: torch.Tensor  # (R,)
    cap: torch.Tensor | None  # (R,), infinite where a row is not capped


def check_labelled(batch: PackedBatch) -> None:
    """ValueError for a sample without a labelled token, which has no mean."""
    if 0 in batch.row_counts:
        number = batch.row_counts.index(0)
        raise ValueError(
            f"sample {number} of the batch has no token with a loss (its first token is never predicted): leave it out"
        )


def weighted_pass(
    decoder: Decoder,
    batch: PackedBatch,
    rows: RowWeights,
    stretch: Stretch = FROM_EMBEDDINGS,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_loss` of a packed batch through the layers of a stretch."""
    final = decoder.final(decoder.run(batch, stretch, rows=True))
    return linear_loss(final, decoder.head, batch.targets, rows.weight, rows.cap, impl=impl)


def _per_sample_mean(batch: PackedBatch, sample_weight: torch.Tensor) -> torch.Tensor:
    check_labelled(batch)
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
    num_retain, kind = batch.num_samples - num_forget, dict(dtype=torch.float64, device=batch.device)
    forget = torch.full((num_forget,), -1.0 / max(num_forget, 1), **kind)
    retain = torch.full((num_retain,), retain_coeff / max(num_retain, 1), **kind)
    weight = _per_sample_mean(batch, torch.cat([forget, retain]))
    if forget_loss_cap is None:
        return RowWeights(weight, None)
    infinite = torch.full_like(weight, float("inf"))
    return RowWeights(weight, torch.where(batch.row_sample < num_forget, forget_loss_cap, infinite))


def mean_nll(batch: PackedBatch, nll: torch.Tensor) -> torch.Tensor:
    """(B,) each sample's mean NLL, from the (R,) NLL of the labelled rows."""
    total = torch.zeros(batch.num_samples, dtype=nll.dtype, device=nll.device)
    return total.index_add_(0, batch.row_sample, nll) / batch.rows_per_sample


def metrics(
    batch: PackedBatch, num_forget: int, loss: torch.Tensor, nll: torch.Tensor | None, num_alternate: int = 0
) -> dict[str, float | None]:
    """What is reported of a step, from before its update: `loss` (as optimised), `tokens`, `forget_loss` and
    `retain_loss` (mean over samples of `mean_nll`, in nats, uncapped; None where the batch has no such sample, or where
    nll is None because no head ran). The `num_alternate` samples after the forget ones count in neither."""
    per_sample = loss.new_empty(0) if nll is None else mean_nll(batch, nll)
    forget, retain = per_sample[:num_forget], per_sample[num_forget + num_alternate :]
    found = {"loss": loss.detach()}
    found |= {name: x.mean() for name, x in (("forget_loss", forget), ("retain_loss", retain)) if len(x)}
    numbers = torch.stack([x.double() for x in found.values()]).tolist()  # one wait for all
    return {"forget_loss": None, "retain_loss": None, **dict(zip(found, numbers)), "tokens": batch.num_tokens}
