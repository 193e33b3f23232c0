"""One step of a training, whose samples come in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.model.finite import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.original import Reference
from kunbr_fast.parallel.group import Group
from kunbr_fast.training.diverged import Diverged


class SharedStep:
    """One step of a training, whose samples come in parts: of several processes, of several micro-batches, or both.

    `add` or `add_all` makes the gradient of a part, `gather` sums over the processes. A part's loss is the objective of its
    samples, weighted by their share of the step's forget samples (the retain term by that of the retain samples), so that
    the sum over all parts is the loss of the step: means of samples are made of means of parts.
    """

    def __init__(self, training: Any):
        self._training = training
        self._sums = torch.zeros(6, dtype=torch.float64, device=training.decoder.device)

    def add(
        self,
        batch: PackedBatch,
        num_forget: int,
        reference: Reference | None,
        share: float,
        retain_share: float,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> torch.Tensor:
        """Adds the gradient of a packed batch (as `step_packed` takes it) that has these shares of the step's forget and
        retain samples. Returns its part of the step's loss. autocast: what the forward pass runs in."""
        with self._scaled(share, retain_share) as factor, autocast():
            loss, nll = self._training.loss(batch, num_forget, reference)
        loss = loss * factor
        loss.backward()
        return self._count(batch, num_forget, loss.detach(), nll, retain_share)

    def add_all(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None, share: float, retain_share: float
    ) -> torch.Tensor:
        """`add` of all that this process has of the step, which the training takes through as it does a whole one: in parts
        that fit its memory, layer by layer."""
        criterion = self._training.criterion
        # `share` within the loss: layers that compute in fp32 round alike
        with self._scaled(share, retain_share) as criterion.share:
            try:
                loss, nll = self._training.accumulate(batch, num_forget, reference)
            finally:
                criterion.share = 1.0
        return self._count(batch, num_forget, loss, nll, retain_share)

    @contextlib.contextmanager
    def _scaled(self, share: float, retain_share: float) -> Iterator[float]:
        """Inside, the criterion's loss of a part times the number yielded is what it has in the step's."""
        criterion, factor = self._training.criterion, share or 1.0
        criterion.retain_scale = retain_share / factor
        try:
            yield factor
        finally:
            criterion.retain_scale = 1.0

    def _count(
        self, batch: PackedBatch, num_forget: int, loss: torch.Tensor, nll: torch.Tensor | None, retain_share: float
    ) -> torch.Tensor:
        criterion, sums = self._training.criterion, self._sums
        sums[0] += loss
        if criterion.terms:  # an objective that adapts to its retain term sees the whole step's
            sums[1] += criterion.terms.pop() * retain_share
        if nll is not None:
            found, ranges = losses.mean_nll(batch, nll), criterion.parts(batch, num_forget)
            for at, name in ((2, "forget"), (4, "retain")):
                sums[at] += found[ranges[name].start : ranges[name].stop].sum()
                sums[at + 1] += len(ranges[name])
        return loss

    def gather(self, group: Group, where: str) -> dict[str, float | None]:
        """Sums gradients and losses over the processes, and returns the step's `losses.metrics`. Raises `Diverged`, which
        names `where`, on all processes, if something is not finite; no update is made here."""
        training, sums = self._training, self._sums
        if group.size > 1:
            for parameter in training.parameters.values():  # all have the same ones to sum
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            group.sum([sums, *training.gradients()])
        loss, term, forget, num_forget, retain, num_retain = sums.tolist()
        metrics = {
            "loss": loss,
            "forget_loss": forget / num_forget if num_forget else None,
            "retain_loss": retain / num_retain if num_retain else None,
        }
        if training.criterion.objective.update is not None:
            training.criterion.terms.append(term)
        if not finite(sums, *training.gradients()):
            raise Diverged(where, metrics)
        return metrics
