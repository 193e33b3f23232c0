"""A causal language model's forward for training loops that read nothing of it but its loss.

`install(model)` puts it into the model, where it is the model's own forward until somebody asks for less:

    with rows.want("loss"):    outputs.loss is the mean NLL of the batch's labelled tokens, as the model's own
    with rows.want("nll"):     outputs.loss (B,) is each sequence's sum of NLL over its labelled tokens
    with rows.want("layers"):  runs the layers below `rows.stop` alone: for losses on hidden states, read by a hook

The head runs for the rows that have a label, in chunks: no logits at all positions, and none that are kept
(`linear_rows.linear_nll`). outputs.logits is None. As it is the model's forward, autocast, DistributedDataParallel and
gradient checkpointing work around it as they do around the model's own.

Index letters: B sequences, T tokens of each, R labelled rows of all, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kunbr_fast.model.decoder import Head, find_head
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.ownership import bare_product
from kunbr_fast.objectives.distributions import linear_nll

logger = logging.getLogger(__name__)
STATE = "_kunbr_rows"
OTHER_LOSSES = {"num_items_in_batch", "shift_labels", "logits_to_keep"}  # inputs that change what the own loss is


class Rows:
    """What is asked of a model's forward. A deep copy of the model has its own."""

    def __init__(self, impl: str):
        self.impl = impl
        self.wanted: str | None = None
        self.stop: int | None = None  # for "layers": the first layer that is not run
        self.known: dict[bytes, torch.Tensor] | None = None  # of a model that is not trained: each sequence's "nll"

    @contextlib.contextmanager
    def want(self, what: str | None) -> Iterator[None]:
        """ "loss", "nll", "layers", or None: the model's own forward. Nests."""
        before, self.wanted = self.wanted, what
        try:
            yield
        finally:
            self.wanted = before


def of(model: nn.Module) -> Rows | None:
    """What `install` has put into a model, or into the one that it wraps."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel and its like
        model = model.module
    return model.__dict__.get(STATE)


def install(model: nn.Module, impl: str = "auto") -> Rows | None:
    """The model's `Rows`; None, with a warning that says why, for a model that this does not fit.

    Before anything else the loss of two short sequences is compared with the model's own.
    """
    if (found := of(model)) is not None:
        found.impl = impl
        return found
    why = _why_not(model, impl)
    if why is not None:
        logger.warning("%s keeps its own head and loss: %s", type(model).__name__, why)
        return None
    model.__dict__[STATE] = Rows(impl)
    model.forward = MethodType(_forward, model)
    return model.__dict__[STATE]


# ---------------------------------------------------------------- the forward


def _forward(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    rows: Rows = model.__dict__[STATE]
    if rows.wanted is None or (rows.wanted == "loss" and not OTHER_LOSSES.isdisjoint(inputs)):
        return type(model).forward(model, *args, **inputs)
    if args:
        raise TypeError(f"{type(model).__name__}: give its inputs by name, as Trainer does")
    labels = inputs.pop("labels", None)
    inputs["use_cache"] = False
    if rows.wanted == "layers":
        with _first_layers(model, rows.stop):
            return CausalLMOutputWithPast(hidden_states=(model.base_model(**inputs)[0],))
    return CausalLMOutputWithPast(loss=_loss(model, find_head(model), inputs, labels, rows.wanted, rows.impl))


def _loss(
    model: PreTrainedModel, head: Head, inputs: dict[str, Any], labels: torch.Tensor, wanted: str, impl: str
) -> torch.Tensor:
    hidden = model.base_model(**inputs)[0]  # (B, T, D), after the final norm
    targets = labels[:, 1:].to(hidden.device)
    sequence, place = (targets != -100).nonzero(as_tuple=True)
    nll = linear_nll(hidden[sequence, place], head, targets[sequence, place], impl=impl)
    if wanted == "loss":
        return nll.mean()
    return nll.new_zeros(len(labels)).index_add(0, sequence, nll)


@contextlib.contextmanager
def _first_layers(model: PreTrainedModel, stop: int) -> Iterator[None]:
    """The model with no more than its first `stop` layers: the very modules, so hooks on them see what they always
    do."""
    path, whole = find_layers(model)
    owner, _, name = path.rpartition(".")
    modules = model.get_submodule(owner)._modules
    modules[name] = whole[:stop]
    try:
        yield
    finally:
        modules[name] = whole


def layers(model: nn.Module) -> nn.ModuleList:
    return find_layers(model)[1]


@torch.no_grad()
def _why_not(model: nn.Module, impl: str) -> str | None:
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return "it is no Hugging Face model with a head"
    if "forward" in model.__dict__:
        return "another tool has put its own forward into it"
    try:
        with evaluating(model):
            head = find_head(model)
            bare_product(head.linear, type(model).__name__)
            device = model.get_input_embeddings().weight.device
            ids = torch.arange(1, 13, device=device).view(2, 6) % model.config.get_text_config().vocab_size
            labels = ids.clone()
            labels[0, :3] = -100
            own = model(input_ids=ids, labels=labels, use_cache=False).loss.double()
            ours = _loss(model, head, {"input_ids": ids, "use_cache": False}, labels, "loss", impl).double()
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        return str(error)
    error, limit = float(abs(ours - own) / abs(own)), 0.05 if head.linear.weight.dtype.itemsize < 4 else 1e-4
    return None if error <= limit else f"its loss differs from that of its head by {error:.1e} relative"


# ---------------------------------------------------------------- what a model that is not trained says once


def sequence_nll(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) each sequence's sum of NLL over its labelled tokens, by `want("nll")`.

    Where `known` is a dict and gradients are off, a sequence that was seen before is not run again: what a model that
    is not trained says of it depends on nothing else, but for rounding.
    """
    rows = of(model)
    with rows.want("nll"):
        grids = all(x.dim() == 2 for x in inputs.values() if torch.is_tensor(x))
        if rows.known is None or torch.is_grad_enabled() or not grids or "attention_mask" not in inputs:
            return model(**inputs).loss
        keys = _keys(inputs)
        new = [number for number, key in enumerate(keys) if key not in rows.known]
        if new:
            part = {name: x[new] if torch.is_tensor(x) else x for name, x in inputs.items()}
            rows.known.update(zip((keys[number] for number in new), model(**part).loss.detach().unbind()))
        return torch.stack([rows.known[key] for key in keys])


def _keys(inputs: dict[str, torch.Tensor]) -> list[bytes]:
    """Each sequence, in all that the model is given of it, without the padding to its right."""
    mask = inputs["attention_mask"].cpu()
    rows = [inputs[name].cpu() for name in sorted(inputs) if torch.is_tensor(inputs[name])]
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    return [
        b"".join(x[number, :end].to(torch.int64).numpy().tobytes() for x in rows) for number, end in enumerate(ends)
    ]
