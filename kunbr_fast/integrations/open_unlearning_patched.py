"""OpenUnlearning's trainers, faster: the same training, on fused layers and, where losses allow, labelled rows.

What their losses read was derived from its code (commit d3d7cf9). Before a training, each loss that is replaced here is
compared with its own on two short sequences: a checkout of which that is no longer true keeps its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.files.models import reason
from kunbr_fast.integrations import labelled_rows
from kunbr_fast.integrations.labelled_rows import Known, Unfit
from kunbr_fast.integrations.open_unlearning_options import Options, Refused
from kunbr_fast.integrations.savings import Tally
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.patch import fused, left_alone
from kunbr_fast.objectives.distributions import ceu, margin_flattening

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- its functions, by labelled rows


@dataclasses.dataclass(frozen=True)
class Swap:
    """A function of its code, `name`, and ours. settings: the trainer's attributes that both take."""

    name: str
    ours: Callable
    settings: tuple[str, ...] = ()

    def around(self, own: Callable) -> Callable:
        @functools.wraps(own)
        def compute(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            rows = labelled_rows.of(model)
            # A model in training whose trainer wants no outputs, or its reference model, which is never in training.
            if rows is None or (model.training and rows.wanted is None) or (not model.training and rows.known is None):
                return own(model, *args, **kwargs)
            return self.ours(rows, own, model, *args, **kwargs), None

        return compute

    def check(self, trainer: Any) -> None:
        """`Unfit` unless it agrees with its own about two short sequences."""
        compute = getattr(importlib.import_module("trainer.utils"), self.name, None) or next(
            (found for found in (getattr(m, self.name, None) for m in _modules("trainer")) if found), None
        )
        own = getattr(compute, "__wrapped__", None)
        if own is None:
            raise Unfit(f"this checkout has no {self.name}")
        model, settings = trainer.model, {name: getattr(trainer, name, None) for name in self.settings}
        inputs = labelled_rows.probe(labelled_rows.bare(model))
        rows = labelled_rows.of(model)
        _same(self.name, model, lambda: self.ours(rows, own, model, inputs, **settings),
              lambda: own(model, inputs, **settings)[0])  # fmt: skip


def _same(name: str, model: nn.Module, ours: Callable, own: Callable) -> None:
    try:
        with evaluating(model), torch.no_grad():
            error = labelled_rows.apart(ours(), own())
    except Exception as error:  # its arguments, say, are others now
        raise Unfit(f"its {name} cannot be asked as the one it was derived from ({reason(error)})") from error
    if not error <= labelled_rows.rounding(labelled_rows.bare(model)):
        raise Unfit(f"its {name} differs from what it was derived from, by {error:.1e} relative")


def _modules(package: str) -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]


def _tokens(rows: labelled_rows.Rows, model: nn.Module, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(R,) each labelled token's NLL and its probability, a constant."""
    with rows.want("tokens"):
        nll = model(**inputs).loss
    return nll, nll.detach().neg().exp()


def _nll(rows: labelled_rows.Rows, own: Callable, model: nn.Module, inputs: Any) -> torch.Tensor:
    with rows.want("nll"):
        return model(**inputs).loss


def _satimp(
    rows: labelled_rows.Rows, own: Callable, model: nn.Module, inputs: Any, beta1: float, beta2: float
) -> torch.Tensor:
    nll, p = _tokens(rows, model, inputs)
    return -(p**beta1 * (1 - p) ** beta2 * nll).mean()


def _wga(rows: labelled_rows.Rows, own: Callable, model: nn.Module, inputs: Any, beta: float) -> torch.Tensor:
    nll, p = _tokens(rows, model, inputs)
    return -(p**beta * nll).mean()


def _ceu(
    rows: labelled_rows.Rows, own: Callable, model: nn.Module, inputs: Any, ignore_first_n_answer_tokens: int = 1
) -> torch.Tensor:
    labels = inputs["labels"]
    first = (labels != -100).cumsum(-1) <= ignore_first_n_answer_tokens
    with rows.want(ceu):
        return model(**{**inputs, "labels": labels.masked_fill(first, -100)}).loss.mean()


def _undial(
    rows: labelled_rows.Rows, own: Callable, model: nn.Module, reference: nn.Module, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Its mean is over all positions, padding too: the model's logits are needed at all of them."""
    with rows.want(None):
        return own(model, reference, *args, **kwargs)[0]


SWAPS = [
    Swap("compute_batch_nll", _nll),
    Swap("compute_satimp_loss", _satimp, ("beta1", "beta2")),
    Swap("compute_wga_loss", _wga, ("beta",)),
    Swap("compute_batch_ceu", _ceu, ("ignore_first_n_answer_tokens",)),
    Swap("compute_undial_loss", _undial),
]
# Its trainers whose losses are made of outputs.loss, hidden states, and the functions named here; for PDU also of the
# logits of labelled rows. A KL retain loss and UNDIAL read all logits.
READ_LOSSES_ONLY = {
    "GradAscent": "", "GradDiff": "", "NPO": "compute_batch_nll", "SimNPO": "compute_batch_nll",
    "DPO": "compute_batch_nll", "RMU": "", "SatImp": "compute_satimp_loss", "WGA": "compute_wga_loss",
    "CEU": "compute_batch_ceu", "PDU": "", "UNDIAL": "",
}  # fmt: skip
NO_COPY = "no copy of the model, which nothing reads"
NO_REFERENCE = ("SatImp", "WGA")  # make a copy of the model, and read it for a KL retain loss alone


def put_in(package: str) -> None:
    """Ours around its functions, in every module that has imported them."""
    for swap in SWAPS:
        made: dict[Any, Callable] = {}
        for module in _modules(package):
            own = module.__dict__.get(swap.name)
            if own is not None and not hasattr(own, "__wrapped__"):
                setattr(module, swap.name, made.setdefault(own, swap.around(own)))


# ---------------------------------------------------------------- its trainers


class Patched:
    """Before one of its trainers: the same training, on fused layers and, if `reads_losses_only`, labelled rows."""

    options = Options()
    reads_losses_only = False

    def __init__(self, *args: Any, **kwargs: Any):
        model, self._tally, self._not_used = kwargs["model"], Tally(), []
        rows = None
        try:
            if not self.reads_losses_only:
                raise Unfit(f"{type(self).__name__} may read logits")
            rows = labelled_rows.install(model, self.options.impl)
        except Unfit as error:
            self._keeps(error)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise Refused(
                f"patch=true does not train on {self.args.n_gpu} GPUs in one process (DataParallel): start it with "
                f"torchrun --nproc-per-node {self.args.n_gpu}, or with CUDA_VISIBLE_DEVICES=0"
            )
        if rows is None:
            return
        try:
            if self.is_fsdp_enabled:
                raise Unfit("FSDP")
            self._check_losses()
        except Unfit as error:
            self._keeps(error)
            for holder in (model, getattr(self, "ref_model", None)):
                if holder is not None:
                    labelled_rows.remove(holder)
            if self._tally.notes.pop(NO_COPY, "") is None:
                self.ref_model = self._prepare_ref_model(self.model)
            return
        self._begin(rows)

    def _keeps(self, error: Unfit) -> None:
        self._not_used.append(f"labelled rows ({error})")
        if self.reads_losses_only:
            logger.warning("%s keeps its own head and loss: %s", type(self).__name__, error)

    def _check_losses(self) -> None:
        for swap in SWAPS:
            if swap.name == READ_LOSSES_ONLY[type(self).__name__]:
                swap.check(self)
        if hasattr(self, "final_loss_value"):  # PDU
            probe = labelled_rows.probe(labelled_rows.bare(self.model))
            inputs = {"forget": probe, "retain": probe}
            self.final_loss_value = sum
            try:
                _same("PDU.compute_loss", self.model, lambda: self._flattening(self.model, inputs),
                      lambda: super(Patched, self).compute_loss(self.model, inputs))  # fmt: skip
            finally:
                del self.final_loss_value

    def _begin(self, rows: labelled_rows.Rows) -> None:
        rows.tally = self._tally
        reference = getattr(self, "ref_model", None)  # a deep copy of the model, with rows of its own
        if reference is not None:
            its = labelled_rows.of(reference)
            its.known, its.wanted, its.tally = Known(), "logits", self._tally
            if hasattr(self, "model_module"):  # RMU
                rows.stop = its.stop = self._layers_needed()

    def _prepare_ref_model(self, model: nn.Module) -> Any:
        unread = type(self).__name__ in NO_REFERENCE and self.retain_loss_type != "KL"
        if unread and labelled_rows.of(model) is not None:
            self._tally.notes[NO_COPY] = None
            return None
        return super()._prepare_ref_model(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._frozen: list[nn.Parameter] = []
        try:
            with fused(self.model, self.options.impl, spare=True):
                out = super().train(*args, **kwargs)
                alone = left_alone(self.model)
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
        if self.is_world_process_zero():
            not_used = [*self._not_used, *([] if alone is None else [f"fused layers ({alone})"])]
            logger.info("%s", self._tally.line(alone is None, not_used))
        return out

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
            self._frozen, self._tally.spare = spare, frozenset(map(id, spare))
            if spare:
                self._tally.notes["no gradients of weights that are not trained"] = None
            for parameter in spare:
                parameter.requires_grad_(False)
        return out

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any):
        rows = labelled_rows.of(model) if model.training and not return_outputs else None
        if rows is None:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        with self._tally.open(), rows.want("loss"):
            if hasattr(self, "final_loss_value"):
                return self._flattening(model, inputs)
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def _flattening(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """PDU's compute_loss. It takes the logits at places that have a label: not of the tokens before them."""
        forget, retain = (
            {name: inputs[part][name] for name in ("input_ids", "attention_mask", "labels")}
            for part in ("forget", "retain")
        )
        here = F.pad(forget["labels"], (1, 0), value=-100)
        with labelled_rows.of(model).want(margin_flattening):
            value = model(**{**forget, "labels": here}).loss.mean()
        with labelled_rows.of(model).want("loss"):
            return self.final_loss_value([value, self.compute_retain_loss(model=model, retain_inputs=retain)])

    def post_epoch_dual_param_update(self) -> None:
        """PDU's: its retain loss over the whole data."""
        rows = labelled_rows.of(self.model)
        with contextlib.nullcontext() if rows is None else rows.want("loss"), self._tally.open():
            super().post_epoch_dual_param_update()

    def compute_retain_loss(self, model: nn.Module, retain_inputs: Any) -> Any:
        """As its own; without a graph where its weight is 0; and with KL, which wants logits, its own also runs the
        model once for nothing."""
        rows = labelled_rows.of(model)
        if rows is None or rows.wanted is None or self.retain_loss_type not in ("NLL", "KL"):
            return super().compute_retain_loss(model, retain_inputs)
        # PDU changes the weight. Weights above the layer that RMU reads have no other gradient, and of 0 they decay.
        others = hasattr(self, "final_loss_value") or hasattr(self, "model_module")
        idle = getattr(self, "alpha", 1) == 0 and torch.is_grad_enabled() and not others
        with contextlib.ExitStack() as around:
            if idle:
                self._tally.notes["no backward pass of the retain loss, whose weight is 0"] = None
                around.enter_context(self._tally.without_gradients())
            if self.retain_loss_type == "NLL":
                return super().compute_retain_loss(model, retain_inputs)
            around.enter_context(rows.want(None))
            self._tally.left_out(labelled_rows.bare(model), retain_inputs["input_ids"].shape)
            utils = importlib.import_module("trainer.utils")
            return utils.compute_kl_divergence(self.model, self.ref_model, retain_inputs)[0]

    def forward_with_cache(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """RMU's: the layers above the one it reads are not run."""
        ours, its = labelled_rows.of(self.model), labelled_rows.of(model)
        if its is None:
            return super().forward_with_cache(model, *args, **kwargs)
        with its.want("layers" if ours.wanted is not None and its.stop is not None else None):
            return super().forward_with_cache(model, *args, **kwargs)

    def _layers_needed(self) -> int | None:
        holds = [self.model_module in layer.modules() for layer in labelled_rows.layers(self.model)]
        return holds.index(True) + 1 if True in holds else None
