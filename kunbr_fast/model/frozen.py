"""A model of which nothing is trained."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_CONSTANTS = WeakIdKeyDictionary()  # of each model that was asked for: its `constants`
_FLAGS = WeakIdKeyDictionary()  # of each parameter inside `frozen`: requires_grad as it was outside of the outermost


@contextlib.contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards all train/eval modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode (no dropout); afterwards all train/eval modes are as before."""
    with same_modes(model):
        model.eval()
        yield


def owners_flag(parameter: nn.Parameter) -> bool:
    """Whether the owner of a parameter has it require grad, also where it is `frozen` meanwhile."""
    return _FLAGS.get(parameter, parameter.requires_grad)


def constants(model: nn.Module) -> frozenset[str]:
    """The parameters that the model's own class makes without requires_grad: sinusoidal positions, or the bias by which
    a router balances its experts. No training of the model changes them.

    The model's own flags do not tell: `from_pretrained` sets that of all it reads, and a stream's are all off.
    """
    if model not in _CONSTANTS:
        _CONSTANTS[model] = _made_constant(model)
    return _CONSTANTS[model] & {name for name, _ in model.named_parameters()}


def _made_constant(model: nn.Module) -> frozenset[str]:
    config = getattr(model, "config", None)
    try:
        with torch.device("meta"):
            made = type(model)(copy.deepcopy(config))
    except Exception:  # a class of the user's own, made in some other way
        return frozenset()
    return frozenset(name for name, parameter in made.named_parameters() if not parameter.requires_grad)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires grad (unless set there) and dropout is off; afterwards requires_grad flags,
    gradients and train/eval modes are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    outermost = [(p, flag) for p, flag, _ in before if p not in _FLAGS]
    with evaluating(model):
        _FLAGS.update(outermost)
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, _ in outermost:
                _FLAGS.pop(parameter, None)
            for parameter, flag, grad in before:
                parameter.requires_grad_(flag)
                parameter.grad = grad
