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

from kunbr_fast.data import PackedBatch
from kunbr_fast.decoder import Head
from kunbr_fast.kernels import reference


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, scale, softcap, nll_cap):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        loss, nll, *grads = reference.linear_loss(
            hidden, weight, targets, row_weights, bias, scale, softcap, nll_cap, need_hidden, need_weight, need_bias
        )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        return *(None if grad is None else grad * d_loss for grad in ctx.saved_tensors), None, None, None, None, None


def linear_loss(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    nll_cap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head and the loss in one pass: `loss = (row_weights * nll.clamp(max=nll_cap)).sum()` and nll (R,).

    hidden (R, D) after the final norm; targets (R,) int64; row_weights (R,) of any sign; nll_cap (R,) or None.
    Equals cross_entropy(head(hidden), targets, reduction="none") weighted and summed; logits are never held whole.
    Differentiable in hidden and in the head's own weight and bias where these require grad; nll is detached.
    """
    linear = head.linear
    return _LinearLoss.apply(
        hidden, linear.weight, linear.bias, targets, row_weights, head.scale, head.softcap, nll_cap
    )


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
