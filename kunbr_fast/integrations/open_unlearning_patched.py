"""OpenUnlearning's trainers, faster: the same training, on fused layers and, where losses allow, labelled rows."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from kunbr_fast.integrations import labelled_rows
from kunbr_fast.integrations.open_unlearning_options import Options
from kunbr_fast.model.patch import fused

logger = logging.getLogger(__name__)
# Its trainers whose losses are made of outputs.loss, compute_batch_nll and hidden states alone.
READ_LOSSES_ONLY = ("GradAscent", "GradDiff", "NPO", "SimNPO", "DPO", "RMU")


class _Patched:
    """Before one of its trainers: the same training, on fused layers and, if `reads_losses_only`, labelled rows."""

    options = Options()
    reads_losses_only = False

    def __init__(self, *args: Any, **kwargs: Any):
        model = kwargs["model"]
        rows = labelled_rows.install(model, self.options.impl) if self.reads_losses_only else None
        super().__init__(*args, **kwargs)
        reference = getattr(self, "ref_model", None)  # a deep copy of the model, with rows of its own
        if rows is not None and reference is not None:
            labelled_rows.of(reference).known = {}
            if hasattr(self, "model_module"):  # RMU
                rows.stop = labelled_rows.of(reference).stop = self._layers_needed()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._frozen: list[nn.Parameter] = []
        try:
            with fused(self.model, self.options.impl):
                return super().train(*args, **kwargs)
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As its own. Where nothing clips their norm, gradients that the optimiser does not take are not made."""
        out = super().create_optimizer(*args, **kwargs)
        taken = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        spare = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        if spare and self.args.max_grad_norm:
            logger.warning(
                "%d parameters are not trained, but their gradients are made, as they count in the norm that is "
                "clipped: trainer.args.max_grad_norm=0 saves them",
                len(spare),
            )
        elif self.accelerator.num_processes == 1:
            self._frozen = spare
            for parameter in spare:
                parameter.requires_grad_(False)
        return out

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any):
        rows = labelled_rows.of(model) if model.training and not return_outputs else None
        with contextlib.nullcontext() if rows is None else rows.want("loss"):
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def compute_retain_loss(self, model: nn.Module, retain_inputs: Any) -> Any:
        """As its own; but with KL, which wants logits, its own also runs the model once for nothing."""
        rows = labelled_rows.of(model)
        if rows is None or rows.wanted is None or self.retain_loss_type != "KL":
            return super().compute_retain_loss(model, retain_inputs)
        with rows.want(None):
            utils = importlib.import_module("trainer.utils")
            return utils.compute_kl_divergence(self.model, self.ref_model, retain_inputs)[0]

    def forward_with_cache(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """RMU's: the layers above the one it reads are not run."""
        ours, its = labelled_rows.of(self.model), labelled_rows.of(model)
        runs = ours is not None and ours.wanted is not None and its is not None and its.stop is not None
        with its.want("layers") if runs else contextlib.nullcontext():
            return super().forward_with_cache(model, *args, **kwargs)

    def _layers_needed(self) -> int | None:
        holds = [self.model_module in layer.modules() for layer in labelled_rows.layers(self.model)]
        return holds.index(True) + 1 if True in holds else None


def _batch_nll(own: Callable) -> Callable:
    """`trainer.utils.compute_batch_nll`, by labelled rows for a model whose trainer has asked for them."""

    @functools.wraps(own)
    def compute(model: nn.Module, inputs: Any) -> Any:
        rows = labelled_rows.of(model)
        # A model in training whose trainer wants no outputs, or its reference model, which is never in training.
        if rows is None or (model.training and rows.wanted is None) or (not model.training and rows.known is None):
            return own(model, inputs)
        return labelled_rows.sequence_nll(model, inputs), None

    return compute
