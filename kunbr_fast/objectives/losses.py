"""Losses that are a weighted sum of the labelled rows' NLL (negative log-likelihood, in nats), and a step's metrics.

A sample's loss is the mean NLL over its labelled tokens; a batch's loss is the mean over its samples.
"""

from __future__ import annotations

import dataclasses

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.kernels.linear_loss import op
from kunbr_fast.kernels.linear_loss.op import Logits
from kunbr_fast.model.decoder import Decoder, Head, Stretch
from kunbr_fast.objectives.batch import PartLoss, StepBatch


def linear_loss(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    nll_cap: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.linear_loss.op.linear_loss` of a decoder's head: loss, a scalar, and nll (R,), detached."""
    linear, logits = head.linear, Logits(head.scale, head.softcap)
    return op.linear_loss(hidden, linear.weight, linear.bias, targets, row_weights, nll_cap, logits, impl)


@dataclasses.dataclass(frozen=True)
class RowWeights:
    """What one step optimises: loss = sum over rows of weight * min(nll, cap)."""

    weight: torch.Tensor  # (R,)
    cap: torch.Tensor | None = None  # (R,), infinite where a row is not capped


def check_labelled(batch: PackedBatch) -> None:
    """ValueError for a sample without a labelled token, which has no mean."""
    if 0 in batch.row_counts:
        number = batch.row_counts.index(0)
        raise ValueError(
            f"sample {number} of the batch has no token with a loss (its first token is never predicted): leave it out"
        )


def weighted_pass(
    decoder: Decoder, batch: PackedBatch, rows: RowWeights, stretch: Stretch, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_loss` of a packed batch through the layers of a stretch."""
    final = decoder.final(decoder.run(batch, stretch, rows=True))
    return linear_loss(final, decoder.head, batch.targets, rows.weight, rows.cap, impl=impl)


def _per_sample_mean(batch: PackedBatch, sample_weight: torch.Tensor) -> torch.Tensor:
    check_labelled(batch)
    return (sample_weight / batch.rows_per_sample)[batch.row_sample]


def likelihood(batch: PackedBatch) -> RowWeights:
    """Minimise the sum over samples of each sample's mean NLL."""
    ones = torch.ones(batch.num_samples, dtype=torch.float64, device=batch.device)
    return RowWeights(_per_sample_mean(batch, ones))


def gradient_difference(
    batch: PackedBatch, num_forget: int, retain_coeff: float, forget_loss_cap: float | None = None
) -> RowWeights:
    """Minimise -L_forget + retain_coeff * L_retain (arXiv 2203.12817), where the batch's first `num_forget` samples are
    to be forgotten.

    A row of a forget sample weighs -1 / (B_forget * rows of that sample), one of a retain sample retain_coeff /
    (B_retain * rows of that sample). forget_loss_cap: a forget token whose NLL is beyond it gets no further push.
    """
    num_retain, kind = batch.num_samples - num_forget, dict(dtype=torch.float64, device=batch.device)
    forget = torch.full((num_forget,), -1.0 / max(num_forget, 1), **kind)
    retain = torch.full((num_retain,), retain_coeff / max(num_retain, 1), **kind)
    weight = _per_sample_mean(batch, torch.cat([forget, retain]))
    if forget_loss_cap is None:
        return RowWeights(weight)
    infinite = torch.full_like(weight, float("inf"))
    return RowWeights(weight, torch.where(batch.row_sample < num_forget, forget_loss_cap, infinite))


def mean_nll(batch: PackedBatch, nll: torch.Tensor) -> torch.Tensor:
    """(B,) each sample's mean NLL, from the (R,) NLL of the labelled rows."""
    total = torch.zeros(batch.num_samples, dtype=nll.dtype, device=nll.device)
    return total.index_add_(0, batch.row_sample, nll) / batch.rows_per_sample


def metrics(step: StepBatch, part: PartLoss) -> dict[str, float | None]:
    """What is reported of a step, from before its update: `loss` (as optimised), `tokens`, `forget_loss` and
    `retain_loss` (mean over samples of `mean_nll`, in nats, uncapped). None where the batch has no such sample, or no
    head ran. Alternates count in neither."""
    packed, parts = step.packed, step.parts
    per_sample = part.loss.new_empty(0) if part.nll is None else mean_nll(packed, part.nll)
    forget, retain = (per_sample[at.start : at.stop] for at in (parts.forget, parts.retain))
    found = {"loss": part.loss.detach()}
    found |= {name: x.mean() for name, x in (("forget_loss", forget), ("retain_loss", retain)) if len(x)}
    numbers = torch.stack([x.double() for x in found.values()]).tolist()  # one wait for all
    return {"forget_loss": None, "retain_loss": None, **dict(zip(found, numbers)), "tokens": packed.num_tokens}
