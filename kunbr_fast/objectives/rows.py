"""What an objective sees of a batch: its labelled rows and tokens, by forget, alternate and retain samples.

rows.forget.nll                                       # (r,) of the forget samples' labelled rows, differentiable
rows.retain.mean(rows.retain.nll)                     # (b,) each retain sample's mean
rows.forget.each(linear_rows.logit_margin)            # (r,) a function of each row's whole distribution
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from kunbr_fast.data import send
from kunbr_fast.model.decoder import Head
from kunbr_fast.objectives import distributions as linear_rows
from kunbr_fast.objectives.batch import StepBatch
from kunbr_fast.objectives.original import PARTS, OriginalValues


def _sums(x: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sum of x over the entries of each owner. By a mask and not by index_add, whose order of additions
    differs from run to run on a GPU."""
    mine = torch.arange(count, device=x.device)[:, None] == owner
    return torch.where(mine, x, 0).sum(1)


class Part:
    """The forget, the alternate or the retain samples of a batch: b samples, r labelled rows, t tokens, in order.

    tokens: where they are in the batch. nll (r,): differentiable. original_nll (r,): the original model's. states,
    original_states (t, D): the output of the objective's layer (of an objective with `states`), and the original's. All
    in fp32, or fp64 of fp64 models.
    """

    def __init__(self, rows: Rows, samples: range):
        self._rows, self.samples = rows, samples
        counts, lengths = rows.packed.row_counts, rows.packed.lengths
        self.num_samples, before = len(samples), samples.start
        self._at = slice(sum(counts[:before]), sum(counts[: samples.stop]))
        self.tokens = slice(sum(lengths[:before]), sum(lengths[: samples.stop]))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's sum of x (r,) over its labelled rows."""
        return _sums(x, self._rows.packed.row_sample[self._at] - self.samples.start, self.num_samples)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's mean of x (r,) over its labelled rows."""
        return self.sum(x) / self._rows.packed.rows_per_sample[self.samples.start : self.samples.stop]

    def token_mean(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's mean of x (t,) over its tokens, labelled or not."""
        owner = self._rows.packed.sample_of_token[self.tokens] - self.samples.start
        lengths = torch.tensor(self._rows.packed.lengths[self.samples.start : self.samples.stop], dtype=x.dtype)
        return _sums(x, owner, self.num_samples) / send(lengths, x.device)

    @property
    def place(self) -> torch.Tensor:
        """(r,) how many labelled rows of its sample come before each row."""
        number = torch.arange(self._at.start, self._at.stop, device=self._rows.packed.row_sample.device)
        counts = self._rows.packed.rows_per_sample
        first = counts.cumsum(0) - counts
        return number - first[self._rows.packed.row_sample[self._at]]

    @property
    def count(self) -> torch.Tensor:
        """(r,) how many labelled rows each row's sample has."""
        return self._rows.packed.rows_per_sample[self._rows.packed.row_sample[self._at]]

    @property
    def nll(self) -> torch.Tensor:
        return self._rows.nll[self._at]

    @property
    def original_nll(self) -> torch.Tensor:
        return self._original("nll", self._at)

    @property
    def hidden(self) -> torch.Tensor:
        """(r, D) after the final norm."""
        return _wide(self._rows.hidden[self._at])

    @property
    def original_hidden(self) -> torch.Tensor:
        return _wide(self._original("hidden", self._at))

    @property
    def states(self) -> torch.Tensor:
        return _wide(self._rows.states[self.tokens])

    @property
    def original_states(self) -> torch.Tensor:
        return _wide(self._original(f"layer.{self._rows.layer}", self.tokens))

    def original_output(self, layer: int) -> tuple[torch.Tensor, float | torch.Tensor]:
        """(t, D): the original's output of a layer, and the spread of those measured with it."""
        kind = f"layer.{layer}"
        return self._original(kind, self.tokens), self._rows.step.original.spread[kind]

    def each(self, function: Callable[..., Any], original: bool = False) -> torch.Tensor:
        """(r,) `function` of each row's distribution, see `linear_rows`, differentiable; with `original` it sees the
        original's logits too."""
        rows, other = self._rows, self._original("hidden", self._at) if original else None
        hidden, targets = rows.hidden[self._at], rows.packed.targets[self._at]
        return linear_rows.linear_rows(hidden, rows.head, function, targets, other, rows.original_head)

    def each_token(self, function: Callable[..., Any]) -> torch.Tensor:
        """(t,) `function` of the distribution at every token, and of the original's there."""
        rows, other = self._rows, self._original("hidden_all", self.tokens)
        hidden = rows.hidden_all[self.tokens]
        return linear_rows.linear_rows(hidden, rows.head, function, None, other, rows.original_head)

    def _original(self, kind: str, entries: slice) -> torch.Tensor:
        original = self._rows.step.original or OriginalValues({})
        found = original.gathered(kind, self.samples, self._rows.packed.labels.device)
        if len(found) != entries.stop - entries.start:
            raise ValueError(
                f"the original values have {len(found)} rows of {kind} for samples that have "
                f"{entries.stop - entries.start}: give those of this batch's samples, in its order "
                "(OriginalValues.batch)"
            )
        return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclasses.dataclass
class Rows:
    """A packed batch as an objective sees it: `forget`, `alternate` and `retain`, each a `Part`."""

    step: StepBatch
    head: Head
    original_head: Head | None = None
    nll: torch.Tensor | None = None  # (R,)
    hidden: torch.Tensor | None = None  # (R, D)
    hidden_all: torch.Tensor | None = None  # (T, D)
    states: torch.Tensor | None = None  # (T, D), the output of `layer`
    layer: int | None = None

    def __post_init__(self):
        self.packed = self.step.packed
        self.forget, self.alternate, self.retain = (Part(self, getattr(self.step.parts, name)) for name in PARTS)
