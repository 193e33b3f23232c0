"""A causal language model's forward for training loops that read nothing of it but its loss.

`install(model)` puts it into the model, where it is the model's own forward until somebody asks for less:

    with rows.want("loss"):    outputs.loss is the mean NLL of the batch's labelled tokens, as the model's own
    with rows.want("nll"):     outputs.loss (B,) is each sequence's sum of NLL over its labelled tokens
    with rows.want("tokens"):  outputs.loss (R,) is the NLL of each labelled token, sequence after sequence
    with rows.want(function):  outputs.loss (R,) is a function of each labelled token's logits, as `linear_rows` has it
    with rows.want("layers"):  runs the layers below `rows.stop` alone: for losses on hidden states, read by a hook
    with rows.want("logits"):  the model's own logits, at all positions

The head runs for the rows that have a label, in chunks: no logits at all positions, and none that are kept
(`linear_rows`). outputs.logits is None, but for "logits". As it is the model's forward, autocast, gradient
checkpointing, DistributedDataParallel, DeepSpeed and torch.compile work around it as they do around the model's own;
what comes after the layers is not compiled.

Of a model that is not trained, `rows.known` keeps what it says of a sequence ("nll", and hidden states for "logits"):
that depends on nothing else, but for rounding.

Index letters: B sequences, T tokens of each, R labelled rows of all, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kunbr_fast.integrations.savings import Tally
from kunbr_fast.model.decoder import Head, find_head
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.model.gather import take
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.ownership import bare_product, uncompiled
from kunbr_fast.objectives.distributions import linear_nll, linear_rows

STATE = "_kunbr_rows"
OTHER_LOSSES = {"num_items_in_batch", "shift_labels", "logits_to_keep"}  # inputs that change what the own loss is
LIMIT = 2 << 30  # bytes of hidden states that a reference model's `known` may hold


class Unfit(ValueError):
    """A model that keeps its own head and loss; the message says why."""


@dataclasses.dataclass
class Known:
    """What a model that is not trained has said. Hidden states lie in the host's memory."""

    nll: dict[bytes, torch.Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)  # ids (T,), (T, D)
    bytes: int = 0


class Rows:
    """What is asked of a model's forward. A deep copy of the model has its own."""

    def __init__(self, impl: str):
        self.impl = impl
        self.wanted: str | Callable | None = None
        self.stop: int | None = None  # for "layers": the first layer that is not run
        self.known: Known | None = None  # of a model that is not trained
        self.tally: Tally | None = None

    def __deepcopy__(self, memo: dict) -> Rows:
        return Rows(self.impl)

    @contextlib.contextmanager
    def want(self, what: str | Callable | None) -> Iterator[None]:
        """One of the above, or None: the model's own forward. Nests."""
        before, self.wanted = self.wanted, what
        try:
            yield
        finally:
            self.wanted = before


def of(model: nn.Module) -> Rows | None:
    """What `install` has put into a model, or into the one that it wraps."""
    return bare(model).__dict__.get(STATE)


def bare(model: nn.Module) -> nn.Module:
    """The model inside what DistributedDataParallel, DeepSpeed and torch.compile have made of it."""
    while STATE not in model.__dict__:
        inner = [uncompiled(model), getattr(model, "module", None)]
        inner = [m for m in inner if isinstance(m, nn.Module) and m is not model]
        if not inner:
            break
        model = inner[0]
    return model


def install(model: nn.Module, impl: str = "auto") -> Rows:
    """The model's `Rows`. `Unfit`, with the reason, for a model that this does not fit.

    Before anything else the loss of two short sequences is compared with the model's own.
    """
    model = bare(model)
    if (found := of(model)) is None:
        _check(model, impl)
        found = model.__dict__[STATE] = Rows(impl)
        model.forward = MethodType(_forward, model)
    found.impl = impl
    return found


def remove(model: nn.Module) -> None:
    model = bare(model)
    if model.__dict__.pop(STATE, None) is not None:
        del model.forward


# ---------------------------------------------------------------- the forward


# Not compiled itself, as it looks at a batch's labels; the layers that it calls are.
@functools.partial(torch.compiler.disable, recursive=False)
def _forward(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    rows: Rows = model.__dict__[STATE]
    wanted = rows.wanted
    other = inputs.get("labels") is None or not OTHER_LOSSES.isdisjoint(inputs)
    own = wanted is None or (wanted == "loss" and other)
    if own or (wanted == "logits" and not _known(rows, inputs)):
        _count(model, rows, inputs)
        return type(model).forward(model, *args, **inputs)
    if args:
        raise TypeError(f"{type(model).__name__}: give its inputs by name, as Trainer does")
    labels = inputs.pop("labels", None)
    inputs["use_cache"] = False
    if wanted == "layers":
        _count(model, rows, inputs, head=0, stop=rows.stop)
        return CausalLMOutputWithPast(hidden_states=(_first_layers(model, rows.stop, inputs),))
    if wanted == "logits":
        return CausalLMOutputWithPast(logits=_known_logits(model, rows, inputs))
    if wanted == "nll" and _known(rows, inputs):
        return CausalLMOutputWithPast(loss=_known_nll(model, rows, inputs, labels))
    return CausalLMOutputWithPast(loss=_run(model, rows, inputs, labels, wanted))


def _run(
    model: PreTrainedModel, rows: Rows, inputs: dict[str, Any], labels: torch.Tensor, wanted: str | Callable
) -> torch.Tensor:
    hidden = model.base_model(**inputs)[0]  # (B, T, D), after the final norm
    loss, count = _of_rows(hidden, find_head(model), labels, wanted, rows.impl)
    _count(model, rows, inputs, head=count)
    return loss


@torch.compiler.disable
def _of_rows(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, wanted: str | Callable, impl: str
) -> tuple[torch.Tensor, int]:
    """What is wanted, and the number of rows that it took."""
    targets = labels[:, 1:].to(hidden.device)
    sequence, place = (targets != -100).nonzero(as_tuple=True)
    picked = take(hidden.flatten(0, 1), sequence * hidden.shape[1] + place)
    targets = targets[sequence, place]
    if callable(wanted):
        values = linear_rows(picked, head, wanted, targets)
    else:
        values = linear_nll(picked, head, targets, impl=impl)
    if wanted == "nll":
        values = values.new_zeros(len(labels)).index_add(0, sequence, values)
    return values.mean() if wanted == "loss" else values, len(targets)


@torch.compiler.disable
def _count(model: PreTrainedModel, rows: Rows, inputs: dict[str, Any], **call: Any) -> None:
    if rows.tally is not None and torch.is_tensor(inputs.get("input_ids")):
        rows.tally.call(model, inputs["input_ids"].shape, **call)


@torch.compiler.disable  # a hook that is put in for one call would not run in compiled code
def _first_layers(model: PreTrainedModel, stop: int, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's layers up to `stop`: the very modules, so hooks on them see what they always do."""
    path, whole = find_layers(model)
    owner, _, name = path.rpartition(".")
    modules = model.get_submodule(owner)._modules
    modules[name] = whole[:stop]
    try:
        return model.base_model(**inputs)[0]
    finally:
        modules[name] = whole


def layers(model: nn.Module) -> nn.ModuleList:
    return find_layers(bare(model))[1]


@torch.no_grad()
def _check(model: nn.Module, impl: str) -> None:
    """`Unfit` unless the loss of two short sequences is the model's own."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise Unfit("it is no Hugging Face model with a head")
    if "forward" in model.__dict__:
        raise Unfit("another tool has put its own forward into it")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise Unfit("its weights are in parts (DeepSpeed ZeRO-3) before the trainer is made")
    try:
        with evaluating(model):
            head = find_head(model)
            bare_product(head.linear, type(model).__name__)
            batch = probe(model)
            own = model(**batch, use_cache=False)
            labels = batch.pop("labels")
            hidden = model.base_model(**batch, use_cache=False)[0]
            pairs = (_of_rows(hidden, head, labels, "loss", impl)[0], own.loss), (head(hidden), own.logits)
            error = max(apart(ours, theirs) for ours, theirs in pairs)
    except (ValueError, TypeError, AttributeError, LookupError) as failed:
        raise Unfit(str(failed)) from failed
    if not error <= rounding(model):
        raise Unfit(f"its loss differs from that of its head by {error:.1e} relative")


def probe(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two short sequences, on the model's device."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 13, device=device).view(2, 6) % model.config.get_text_config().vocab_size
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def apart(ours: torch.Tensor, own: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value."""
    return float((ours.double() - own.double()).abs().max() / own.double().abs().max())


def rounding(model: nn.Module) -> float:
    """The largest relative difference of two losses that is taken for rounding."""
    return 0.05 if model.get_output_embeddings().weight.dtype.itemsize < 4 else 1e-4


# ---------------------------------------------------------------- what a model that is not trained says once


@torch.compiler.disable
def _known_nll(model: PreTrainedModel, rows: Rows, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """(B,) each sequence's sum of NLL over its labelled tokens; a sequence that was seen before is not run again."""
    keys, known = _keys({**inputs, "labels": labels}), rows.known.nll
    new = [number for number, key in enumerate(keys) if key not in known]
    if new:
        part = {name: x[new] if torch.is_tensor(x) else x for name, x in inputs.items()}
        loss, count = _of_rows(model.base_model(**part)[0], find_head(model), labels[new], "nll", rows.impl)
        known.update(zip((keys[number] for number in new), loss.unbind()))
    _count(model, rows, inputs, head=count if new else 0, ran=len(new))
    return torch.stack([known[key] for key in keys])


@torch.compiler.disable
def _known_logits(model: PreTrainedModel, rows: Rows, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own logits; the layers are not run again for a sequence that was seen before.

    A causal model's hidden states depend on nothing to their right, so a batch with less padding takes the first of
    those that are known. Not with a sliding window: padding further than that from all tokens attends to the whole row.
    """
    head, ids, keys, known = find_head(model), inputs["input_ids"], _keys(inputs), rows.known
    on_host, width = ids.cpu(), ids.shape[1]
    windows = getattr(model.config.get_text_config(), "sliding_window", None) is not None

    def seen(number: int) -> bool:
        before = known.hidden.get(keys[number])
        return before is not None and torch.equal(before[0][: None if windows else width], on_host[number])

    new = [number for number in range(len(ids)) if not seen(number)]
    found = {}
    if new:
        part = {name: x[new] if torch.is_tensor(x) else x for name, x in inputs.items()}
        found = dict(zip(new, model.base_model(**part)[0]))
    for number, hidden in found.items():
        if known.bytes + hidden.nbytes <= LIMIT:
            before = known.hidden.pop(keys[number], None)
            known.bytes += hidden.nbytes - (0 if before is None else before[1].nbytes)
            known.hidden[keys[number]] = on_host[number], hidden.cpu()
    rest = [n for n in range(len(ids)) if n not in found]
    found |= {n: known.hidden[keys[n]][1][:width].to(head.linear.weight.device) for n in rest}
    _count(model, rows, inputs, ran=len(new))
    return head(torch.stack([found[number] for number in range(len(ids))]))


def _known(rows: Rows, inputs: dict[str, Any]) -> bool:
    """Whether what is known of a sequence can be told from the inputs: a batch of rows, with nothing but a mask."""
    tensors = {name for name, x in inputs.items() if torch.is_tensor(x) and x.dim() == 2} - {"labels"}
    return (
        rows.known is not None
        and not torch.is_grad_enabled()
        and tensors == {"input_ids", "attention_mask"}
        and inputs.keys() <= {*tensors, "labels", "use_cache"}
    )


def _keys(inputs: dict[str, torch.Tensor]) -> list[bytes]:
    """Each sequence, in all that the model is given of it, without the padding to its right."""
    mask = inputs["attention_mask"].cpu()
    rows = [inputs[name].cpu() for name in sorted(inputs) if torch.is_tensor(inputs[name])]
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    return [
        b"".join(x[number, :end].to(torch.int64).numpy().tobytes() for x in rows) for number, end in enumerate(ends)
    ]
