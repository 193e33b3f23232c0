"""One step of a training by several ranks."""

from __future__ import annotations

import torch

from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.parallel.group import Group
from kunbr_fast.stopping import Stop
from kunbr_fast.training.training import Training


class SharedStep:
    """One step of a training, whose samples come in parts: of several ranks, of several micro-batches, or both.

    `add` counts a part whose gradient has been accumulated; by their `shares` all parts sum to the step. `gather` sums
    over the ranks, `apply` updates the weights. stop: a request that is summed too, so that all ranks see it at the
    same step.
    """

    def __init__(self, training: Training, stop: Stop | None = None):
        self._training, self._stop = training, stop or Stop()
        # loss, retain term; of the forget samples the sum of mean NLLs and the number; the same of the retain samples;
        # how many ranks are asked to stop
        self._sums = torch.zeros(8, dtype=torch.float64, device=training.decoder.device)
        self._term: float | None = None

    def add(self, step: StepBatch, part: PartLoss) -> None:
        """Takes the loss of a batch, detached, into the step's sums."""
        sums = self._sums
        sums[0] += part.loss
        if part.retain_term is not None:  # an objective that adapts to its retain term sees the whole step's
            sums[1] += part.retain_term * step.shares.retain
        if part.nll is not None:
            found = losses.mean_nll(step.packed, part.nll)
            for at, samples in ((2, step.parts.forget), (4, step.parts.retain)):
                sums[at] += found[samples.start : samples.stop].sum()
                sums[at + 1] += len(samples)

    def gather(self, group: Group) -> dict[str, float | None]:
        """Sums gradients and losses over the ranks, and returns the step's `losses.metrics`. Raises `Diverged`, on all
        ranks and without the gradient, if something is not finite, also what the update before has stored; no update
        is made here."""
        training, sums = self._training, self._sums
        sums[6] = float(self._stop.requested)
        for flag in training.flags():
            sums[7] += flag[0].to(sums.device)
        if group.size > 1:
            group.sum([sums, *training.unsummed()])
        loss, self._term, forget, num_forget, retain, num_retain, asked, bad = sums.tolist()
        self._stop.agreed = asked > 0
        metrics = {
            "loss": loss,
            "forget_loss": forget / num_forget if num_forget else None,
            "retain_loss": retain / num_retain if num_retain else None,
        }
        training.judge(metrics, training.agreed(bad == 0 and bool(finite(sums, *training.gradients()))))
        return metrics

    def apply(self) -> None:
        """One update from the gathered gradient."""
        self._training.update(self._term)
