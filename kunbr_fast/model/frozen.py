"""A model of which nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires grad (unless set there) and dropout is off; afterwards requires_grad flags,
    gradients and train/eval modes are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with evaluating(model):
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, flag, grad in before:
                parameter.requires_grad_(flag)
                parameter.grad = grad
