"""torch.library operators, and how they are called without their price.

An operator makes a kernel opaque to torch.compile and visible to what looks at operators: fake tensors, FLOP counters,
tensor subclasses. torch's wrapper around one costs 25 us of the host's time a call, several times what the launch's
description costs. So a call that nobody looks at runs the function itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import dispatch

# While torch.compile traces, a choice is made once: it logs and reads files, which cannot be traced.
_resolve = torch.compiler.assume_constant_result(dispatch.resolve)


def choose(operation: str, impl: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """`dispatch.resolve` for a call on x, of its size in elements (of any size, while torch.compile traces)."""
    size = None if torch.compiler.is_compiling() else x.numel()
    return _resolve(operation, impl, x.device, dtype or x.dtype, None, size)


def count_write(tensors: Iterable[torch.Tensor]) -> None:
    """Counts a kernel's write to each in autograd's version counters, which does not see it."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None), bool, int, float, str, torch.dtype}


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN or (type(x) is list and all(type(item) in _TENSORS for item in x))


class Operator:
    """torch.ops.kunbr_fast.NAME: `run`, with the arguments of `schema`. mutates: the names of those that it writes to.

    Called, it is that operator, also for autograd's version counters, but takes the short way where it can.
    """

    def __init__(self, name: str, schema: str, mutates: tuple[str, ...], run: Callable[..., Any]):
        def operator(*arguments):  # torch wants a plain function
            return run(*arguments)

        definition = torch.library.custom_op(f"kunbr_fast::{name}", operator, mutates_args=mutates, schema=schema)
        self.register_fake = definition.register_fake
        self.overload = getattr(torch.ops.kunbr_fast, name).default
        self._run = run
        names = [argument.name for argument in self.overload._schema.arguments]
        self._mutated = [names.index(name) for name in mutates]

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not all(map(_is_plain, arguments)):
            return self.overload(*arguments)
        for index in self._mutated:
            one = arguments[index]
            count_write(one if isinstance(one, list) else [one])
        return self._run(*arguments)


def custom_op(name: str, schema: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an operator of a function."""
    return functools.partial(Operator, name, schema, mutates)


def define(package: str, name: str, schema: str, function: str, mutates: tuple[str, ...] = ()) -> Operator:
    """The operator that runs `function` of the package's triton_kernel.py.

    The module, and with it triton, is imported when the operator first runs.
    """
    found = []

    def run(*arguments):
        if not found:
            found.append(importlib.import_module(f"{package}.triton_kernel"))
        return getattr(found[0], function)(*arguments)

    return Operator(name, schema, mutates, run)


def result(x: torch.Tensor) -> torch.Tensor:
    """x, which the forward of an autograd function returns, so that it has a gradient under torch.compile too.

    torch 2.11 traces a forward's plain operations as well. A result that was written in place, or that is the outcome
    of a conversion to the dtype that it has, gets no gradient there, silently; another tensor of the same memory does.
    torch 2.13 needs none of this.
    """
    return x.detach() if torch.compiler.is_compiling() else x
