"""What is proven: the kinds of launches of each operation, and calls that show one right, or time it.

An operation's own are in its folder's `cases.py`: the table that the proof, the tests of the kernels and the
benchmarks' gate share.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from .. import dispatch
from ..verdicts import FOLDERS, Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIMIZERS = ("lion", "adamw")
EPS = torch.finfo(torch.float32).eps
Tensors = dict[str, torch.Tensor]


def named(dtype: torch.dtype) -> str | None:
    """Its short name; None for one that no kernel serves (fp64)."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation on small inputs, with a way through the kernel that no other case has.

    draw(dtype) gives its inputs by name, on the CPU and the same each time. run(impl, inputs) returns the results by
    name; inputs are its own to write to. floors(inputs, results in fp64) gives what each result may be off by beyond
    twice the error of torch in the same dtype: a tensor of its shape, or one number for the norm of the whole result.
    truth(inputs) returns the results in fp64; None: `run("torch", inputs in fp64)`. A result that it does not give has
    to be 0. stranger: what must leave other results as they are.
    """

    name: str
    draw: Callable[[torch.dtype], Tensors]
    run: Callable[[str, Tensors], Tensors]
    floors: Callable[[Tensors, Tensors], Mapping[str, torch.Tensor | float]]
    truth: Callable[[Tensors], Tensors] | None = None
    stranger: Stranger | None = None


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A part of an input that others must not see: `inputs[name][index]` becomes NaN, and each result that `kept` names
    stays the same at its index there."""

    name: str
    index: Any
    kept: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call at the size of a model, to be timed. size: what the operation gives `dispatch.resolve` as its size.

    draw(device, dtype) gives the inputs; run(impl, inputs) is timed, and may write to them.
    """

    size: int
    draw: Callable[[torch.device, torch.dtype], Tensors]
    run: Callable[[str, Tensors], object]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of launch of one implementation: what is right or wrong, fast or slow, as one.

    why_not(device): why this machine never launches it, None if it does. graphs: whether it runs in CUDA graphs too.
    host_ahead: whether it always follows long work on the device, so that what its launch costs the host is no matter.
    """

    operation: str
    impl: str
    cases: Sequence[Case]
    shapes: Sequence[Shape] = ()
    name: str = "all"
    dtypes: Sequence[str] = tuple(DTYPES)
    why_not: Callable[[torch.device], str | None] = lambda device: None
    graphs: bool = True
    host_ahead: bool = False

    def targets(self) -> list[Target]:
        return [Target(self.operation, self.impl, dtype, self.name) for dtype in self.dtypes]


def kinds(operation: str) -> list[Kind]:
    """Of all implementations; none for an operation that others have registered."""
    folder = FOLDERS.get(operation, operation)
    package = __package__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{folder}.cases").kinds(operation)


def targets(
    device: torch.device,
    dtypes: Collection[str] = tuple(DTYPES),
    operations: Sequence[str] = dispatch.OPERATIONS,
    impls: Collection[str] = ("cuda", "triton"),
) -> list[Target]:
    """All that this machine's device may launch of these, in the table's order. Of optimisers those for fp32 too: they
    update fp32 weights, whatever the model's dtype."""
    found = []
    for operation in operations:
        wanted = {*dtypes, "fp32"} if dtypes and operation in OPTIMIZERS else dtypes
        for kind in kinds(operation):
            if kind.impl not in impls or dispatch.why_not(operation, kind.impl, device) is not None:
                continue
            if kind.why_not(device) is None:
                found += [target for target in kind.targets() if target.dtype in wanted]
    return found


def kind_of(target: Target) -> Kind:
    """The table's entry. ValueError for a target that there is not."""
    for kind in kinds(target.operation):
        if target in kind.targets():
            return kind
    raise ValueError(f"no kind of launch {target}")
