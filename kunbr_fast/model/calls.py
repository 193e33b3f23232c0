"""What a model's own forward hands to its layers, and what it does after them, by watching it run.

`Seen` is a run of the model itself, sample by sample: the truth of a self-check. `Anatomy` is what can be known from
it: which layers run, what form their results have, and the modules between the last layer and the head. `record` runs
the model's own forward with recorders in place of its layers, for the layers' arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class _Stop(Exception):
    """Ends a forward once all is known that was asked for."""


class Call(NamedTuple):
    """A layer's further arguments, after its hidden states."""

    args: tuple
    kwargs: dict


def hidden_of(output: Any) -> Any:
    """The hidden states among what a layer gives."""
    return output[0] if isinstance(output, (tuple, list)) else output


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an argument of this name, or any."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def run(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The module's forward on these inputs, without a cache."""
    further = {"use_cache": False} if takes(module, "use_cache") else {}
    return module(**inputs, **further)


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T, V): the model's own, of one sample (T,)."""
    out = run(model, {"input_ids": ids[None]})
    return (out.logits if hasattr(out, "logits") else out[0])[0]


def entry(model: nn.Module, layers_path: str) -> nn.Module:
    """The innermost module around the layers that takes input_ids."""
    names = layers_path.split(".")[:-1]
    for end in range(len(names), -1, -1):
        module = model.get_submodule(".".join(names[:end]))
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return model


@dataclasses.dataclass
class Seen:
    """A model's own runs on some samples, each by itself.

    logits: (T, V) of each sample. inputs, outputs: {layer: each sample's hidden states}, without the batch dimension;
    calls: {layer: each sample's `Call`}. after: of each sample, the modules that ran after the last layer, with what
    they took and gave. forms: {layer: how many values it gives in a tuple, None for a tensor}.
    """

    logits: list[torch.Tensor] = dataclasses.field(default_factory=list)
    inputs: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    outputs: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    calls: dict[int, list[Call]] = dataclasses.field(default_factory=dict)
    after: list[list[tuple[nn.Module, Any, Any]]] = dataclasses.field(default_factory=list)
    forms: dict[int, int | None] = dataclasses.field(default_factory=dict)


def _around(model: nn.Module, layers_path: str) -> Iterator[nn.Module]:
    """The modules beside the way from the model to its layers."""
    names = layers_path.split(".")
    for end in range(len(names)):
        module = model.get_submodule(".".join(names[:end]))
        yield from (child for name, child in module.named_children() if name != names[end])


@torch.no_grad()
def watch(model: nn.Module, layers_path: str, samples: Sequence[torch.Tensor]) -> Seen:
    """The model's own runs on samples (T,), each by itself."""
    seen, layers = Seen(), model.get_submodule(layers_path)
    hooks: list[Any] = []

    def enters(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), args)
            if not isinstance(hidden, torch.Tensor) or len(hidden) != 1:
                shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
                raise ValueError(f"{layers_path}.{index} takes {shape} of one sample, expected hidden states (1, T, D)")
            seen.inputs.setdefault(index, []).append(hidden[0].clone())
            seen.calls.setdefault(index, []).append(Call(args, kwargs))

        return hook

    def leaves(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen.forms[index] = len(output) if isinstance(output, (tuple, list)) else None
            seen.outputs.setdefault(index, []).append(hidden_of(output)[0].clone())
            seen.after[-1].clear()

        return hook

    def ran(module: nn.Module, args: tuple, output: Any) -> None:
        seen.after[-1].append((module, args[0] if args else None, output))

    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(enters(index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(leaves(index)))
    hooks += [module.register_forward_hook(ran) for module in _around(model, layers_path)]
    try:
        for number, ids in enumerate(samples):
            seen.after.append([])
            seen.logits.append(logits_of(model, ids))
            often = [index for index, found in seen.inputs.items() if len(found) > number + 1]
            if often:
                raise ValueError(f"{layers_path}.{often[0]} runs several times in one forward pass")
    finally:
        for hook in hooks:
            hook.remove()
    if not seen.outputs:
        raise ValueError(f"no layer of {layers_path} has run in the model's own forward")
    if list(seen.outputs) != sorted(seen.outputs):
        raise ValueError(f"the layers of {layers_path} run in the order {list(seen.outputs)}")
    return seen


def tail_of(seen: Seen, head: nn.Module) -> list[nn.Module]:
    """The modules that the last layer's output goes through, one by one, before the head; one that holds the head
    comes last."""
    hidden, tail = seen.outputs[max(seen.outputs)][-1], []
    for module, taken, given in seen.after[-1]:
        if module is head:
            break
        if (
            not isinstance(taken, torch.Tensor)
            or taken[0].shape != hidden.shape
            or not bool((taken[0] == hidden).all())
        ):
            continue
        tail.append(module)
        if any(inner is head for inner in module.modules()) or not isinstance(given, torch.Tensor):
            break
        hidden = given[0]
    return tail


def through(tail: Sequence[nn.Module], head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """(R, D) -> (R, K), the input of the head."""
    for module in tail:
        if any(inner is head for inner in module.modules()):
            return _input_of(head, module, hidden)
        hidden = module(hidden)
    return hidden


def _input_of(head: nn.Module, owner: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple) -> None:
        found.append(args[0])
        raise _Stop

    hook = head.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Stop):
            owner(hidden)
    finally:
        hook.remove()
    return found[0]


def record(
    model: nn.Module, layers: nn.ModuleList, forms: Mapping[int, int | None], inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[int, Call]]:
    """The hidden states at the first layer's input, and what each layer that runs (the keys of `forms`) gets besides.

    model: that takes `inputs`. forms: as of `Seen`.
    """
    calls: dict[int, Call] = {}
    first: list[torch.Tensor] = []

    def recorder(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            first.append(hidden)
            calls[index] = Call(args, kwargs)
            if len(calls) == len(forms):
                raise _Stop
            size = forms[index]
            return hidden if size is None else (hidden, *[None] * (size - 1))

        forward.computes_nothing = True  # so that no weights are fetched for it (streaming)
        return forward

    patched = {index: layers[index].__dict__.get("forward") for index in forms}  # by Accelerate, for example
    for index in forms:
        layers[index].forward = recorder(index)
    try:
        with contextlib.suppress(_Stop):
            run(model, inputs)
    finally:
        for index, forward in patched.items():
            del layers[index].forward
            if forward is not None:
                layers[index].forward = forward
    return first[0], calls
