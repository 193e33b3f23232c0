"""What a training minimises: an objective with its retain term, as the loss of one packed batch of all samples.

loss = objective(rows) + retain_coeff * retain term
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kunbr_fast.data import PackedBatch, as_samples, pack, with_alternates
from kunbr_fast.data.batch import join
from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Decoder, Head, Stretch
from kunbr_fast.model.gather import take
from kunbr_fast.objectives import distributions as linear_rows
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import WHOLE, PartLoss, Shares, StepBatch
from kunbr_fast.objectives.hidden_layers import WORDS, Distances, HiddenLayers
from kunbr_fast.objectives.methods import OBJECTIVES, RETAIN_LOSSES, check_options, retain_states
from kunbr_fast.objectives.original import EVERY, Needs, OriginalValues, Parts
from kunbr_fast.objectives.rows import Rows

EVERY_LAYER = HiddenLayers()


class Criterion:
    """An objective with its options and its retain term.

        criterion = Criterion("npo", {"beta": 0.1}, retain_loss="kl")
        values = OriginalValues.of(decoder, {"forget": forget, "retain": retain}, criterion.needs)
        step = criterion.pack(forget, retain, values)          # samples or padded batches
        part = criterion(decoder, step).backward(); optimizer.step(); criterion.advance(part.retain_term)

    forget_loss_cap: as the option of that name. block: the layers that are trained, None for all of them. hidden: of
    retain_loss="hidden_layers", which layers and how much (default: all, 1).

    Errors: ValueError for names and options that do not exist or do not fit together.
    """

    def __init__(
        self,
        objective: str = "gradient_difference",
        options: Mapping[str, Any] | None = None,
        *,
        retain_loss: str = "nll",
        retain_coeff: float = 1.0,
        forget_loss_cap: float | None = None,
        block: range | None = None,
        hidden: HiddenLayers = EVERY_LAYER,
    ):
        self.options = check_options(objective, options)
        self.objective = OBJECTIVES[objective]
        if retain_loss not in RETAIN_LOSSES:
            raise ValueError(f"retain_loss={retain_loss!r}: expected one of {', '.join(RETAIN_LOSSES)}")
        if retain_loss != "nll" and (self.objective.states or not self.objective.retain):
            own = "has its own retain term" if self.objective.states else "has no retain term"
            raise ValueError(f"retain_loss={retain_loss!r}: {objective} {own}: leave retain_loss out")
        if retain_loss != "hidden_layers" and hidden != EVERY_LAYER:
            raise ValueError(f"{hidden}: retain_loss={retain_loss!r} has none: leave it out, or take hidden_layers")
        if forget_loss_cap is not None:
            if "forget_loss_cap" not in self.options:
                raise ValueError(f"forget_loss_cap={forget_loss_cap}: {objective} has none: leave it out")
            self.options["forget_loss_cap"] = forget_loss_cap
        self.retain_loss, self.retain_coeff = retain_loss, retain_coeff if self.objective.retain else 0.0
        self.hidden = hidden if retain_loss == "hidden_layers" else None
        self.layers: list[int] | None = None  # those of `hidden` in the model, once `fit` knows it
        self.layer: int | None = None  # that an objective of hidden states is taken at
        if self.objective.states:
            if self.options["layer"] is None and block is None:
                raise ValueError(
                    f"{objective} on all layers: say at which one, by the option layer (objective_options={{'layer': "
                    "7}, --objective-option layer=7)"
                )
            if self.options["layer"] is None:
                self.options["layer"] = block.stop - 1
            self.layer = self.options["layer"]

    @property
    def alternate(self) -> str | None:
        """Which second answer each forget sample must bring, one of data.ALTERNATES, or None."""
        return self.objective.alternate

    @property
    def needs(self) -> Needs:
        """What the loss needs of the original model, as `OriginalValues.of` takes it; empty for most objectives."""
        needs: dict[str, list[str]] = {}
        if self.objective.original is not None:
            needs[self.objective.original] = ["forget", "alternate"] if self.alternate else ["forget"]
        kind = f"layer.{self.layer}" if self.objective.states else RETAIN_LOSSES[self.retain_loss][1]
        if kind is not None:
            needs[kind] = [*needs.get(kind, []), "retain"]
        if self.hidden is not None:
            layers = self.hidden.layers if self.layers is None else self.layers
            needs |= {kind: ["retain"] for kind in (map("layer.{}".format, layers) if layers not in WORDS else [EVERY])}
        return {kind: tuple(parts) for kind, parts in needs.items()}

    def copy_of_head(self, head: Head) -> Head | None:
        """What a training that changes the head keeps of the original's, if the loss needs the original's logits."""
        if self.objective.original == "hidden" or self.retain_loss in ("kl", "kl_all"):
            return dataclasses.replace(head, linear=copy.deepcopy(head.linear).requires_grad_(False))
        return None

    def step_batch(
        self, packed: PackedBatch, num_forget: int, original: OriginalValues | None = None, shares: Shares = WHOLE
    ) -> StepBatch:
        """A packed batch, first `num_forget` forget samples, then (if the objective takes them) their alternates, then
        retain samples."""
        alternate = num_forget if self.alternate else 0
        if packed.num_samples < num_forget + alternate:
            raise ValueError(
                f"{self.objective.name}: a batch of {packed.num_samples} samples, {num_forget} of them to forget: "
                "expected an alternate of each right after them"
            )
        parts = Parts.of(num_forget, alternate, packed.num_samples - num_forget - alternate)
        return StepBatch(packed, parts, original, shares)

    def pack(
        self,
        forget: Any,
        retain: Any = None,
        original: OriginalValues | None = None,
        *,
        alternate: Any = None,
        device: torch.device | str = "cpu",
    ) -> StepBatch:
        """Samples, padded or packed batches as a step's batch on `device`. Alternates that are not given come from
        forget (`data.with_alternates`)."""
        if self.alternate is None:
            alternate = None
        elif alternate is None:
            if isinstance(forget, PackedBatch):
                raise ValueError(f"{self.objective.name} needs alternates: give them packed, as alternate_batch")
            forget, alternate = with_alternates(forget)
            if alternate is None:
                raise ValueError(
                    f"{self.objective.name} needs a second answer ({self.alternate}) to each forget sample: give "
                    'records, or samples with an "alternate"'
                )
        given = [part for part in (forget, alternate, retain) if part is not None]
        parts = [(part if isinstance(part, PackedBatch) else pack(as_samples(part))).to(device) for part in given]
        return self.step_batch(functools.reduce(join, parts), parts[0].num_samples, original)

    def __call__(
        self,
        decoder: Decoder,
        step: StepBatch,
        stretch: Stretch = FROM_EMBEDDINGS,
        *,
        impl: str = "auto",
        original_head: Head | None = None,
    ) -> PartLoss:
        """The loss of a batch on the decoder's device, its part of the step's by `step.shares`.

        impl: who computes the NLL (whole distributions are plain torch, see `linear_rows`). original_head: the original
        model's, where it is not the decoder's.
        """
        packed, rows = step.packed, Rows(step, decoder.head, original_head, layer=self.layer)
        if self.objective.states:
            rows.states = decoder.run(packed, stretch, self.layer + 1)
            return self._total(rows, retain_states)
        distances = self.distances(decoder, step)
        stretch = dataclasses.replace(stretch, taps=distances.taps)
        if (known := self._nll_weights(step)) is not None:
            loss, nll = losses.weighted_pass(decoder, packed, known, stretch, impl=impl)
            part = PartLoss(_times(loss, step.shares.factor), nll)
        else:
            losses.check_labelled(packed)
            every = "hidden_all" in self.needs
            final = decoder.final(decoder.run(packed, stretch, rows=not every))
            rows.hidden, rows.hidden_all = (take(final, packed.rows), final) if every else (final, None)
            rows.nll = linear_rows.linear_nll(rows.hidden, decoder.head, packed.targets, impl=impl)
            part = self._total(rows, RETAIN_LOSSES[self.retain_loss][0])
        for layer in sorted(distances.found, reverse=True):  # as a streamed model comes by them
            part = part.plus(self.layer_part(step, distances.found[layer]))
        return part

    def distances(self, decoder: Decoder, step: StepBatch) -> Distances:
        """What compares the layers' outputs with the original's, as the batch goes through them: none unless the
        retain term is of hidden layers."""
        if self.hidden is None:
            return Distances(Rows(step, decoder.head), (), 0.0)
        layers = self.hidden.chosen(decoder.num_layers) if self.layers is None else self.layers
        return Distances(Rows(step, decoder.head), layers, self.hidden.coeff)

    def layer_part(self, step: StepBatch, distance: torch.Tensor) -> PartLoss:
        """What one layer's part of the retain term, of `distances`, adds to the loss."""
        coeff = self.retain_coeff * step.shares.retain_scale
        term = None if self.objective.update is None else float(distance.detach())
        return PartLoss(_times(coeff * distance, step.shares.factor), None, term)

    def weights(self, step: StepBatch) -> losses.RowWeights | None:
        """The rows' weights where the loss is a sum of NLLs whose weights are known before the pass, else None. They do
        not hold `step.shares.factor`."""
        return self._nll_weights(step) if self.hidden is None or not step.parts.retain else None

    def _nll_weights(self, step: StepBatch) -> losses.RowWeights | None:
        """`weights`, of the loss without its layers' part."""
        of_nll = RETAIN_LOSSES[self.retain_loss][0] is RETAIN_LOSSES["nll"][0] or not step.parts.retain
        if not (self.objective.weighted and of_nll):
            return None
        coeff = self.retain_coeff * step.shares.retain_scale
        return losses.gradient_difference(step.packed, len(step.parts.forget), coeff, self.options["forget_loss_cap"])

    def _total(self, rows: Rows, term: Callable[[Rows], torch.Tensor]) -> PartLoss:
        """The objective plus its retain term; a side without samples has no part."""
        shares, total, retain = rows.step.shares, [], None
        coeff = self.retain_coeff * shares.retain_scale
        if rows.forget.num_samples:
            total.append(self.objective.function(rows, **self.options))
        if rows.retain.num_samples and self.objective.retain:
            retain = term(rows)
            total.append(coeff * retain)
            if limit := self.options.get("retain_loss_eps"):
                total.append(-coeff * limit)
        adapts = retain is not None and self.objective.update is not None
        return PartLoss(
            _times(sum(total[1:], total[0]), shares.factor),
            None if rows.nll is None else rows.nll.detach(),
            float(retain.detach()) if adapts else None,
        )

    def fit(self, num_layers: int, block: range | None = None) -> None:
        """Takes up how many layers the model has, and which are trained (None: all). ValueError if a layer that the
        loss is taken at does not exist, or lies below the block."""
        self.layers = None if self.hidden is None else self.hidden.chosen(num_layers, block)
        name, layer = self.objective.name, self.layer
        if layer is not None and not 0 <= layer < num_layers:
            raise ValueError(f"{name}: layer={layer}: the model has layers 0 to {num_layers - 1}")
        if layer is not None and block is not None and layer < block.start:
            raise ValueError(
                f"{name}: layer={layer} is below the block {block.start}-{block.stop - 1}, which would get no "
                "gradient: leave it out for the block's last layer, or name a higher one"
            )

    # ------------------------------------------------ state

    def advance(self, retain_term: float | None) -> None:
        """To be called after each step that was taken, with the step's retain term (`PartLoss`): an objective with an
        `update` gets its next retain_coeff."""
        if self.objective.update is not None and retain_term is not None:
            self.retain_coeff = self.objective.update(self.retain_coeff, retain_term, **self.options)

    def state(self) -> dict[str, torch.Tensor]:
        """What changes from step to step, for a checkpoint; empty for most objectives."""
        if self.objective.update is None:
            return {}
        return {"objective.retain_coeff": torch.tensor([self.retain_coeff], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a `state()`; other entries are not looked at."""
        if self.objective.update is not None:
            self.retain_coeff = float(state["objective.retain_coeff"])


def _times(loss: torch.Tensor, factor: float) -> torch.Tensor:
    return loss if factor == 1.0 else loss * factor
