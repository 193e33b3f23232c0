"""One forward and backward pass, and what it yields of the watched parameters' gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import BY_AUTOGRAD, How, Watched
from kunbr_fast.density.taps import Part, Segments, Taps
from kunbr_fast.model.ways import Way

Found = dict[str, torch.Tensor]  # {parameter's path: values as `LayerKind.values` has them}
Add = Callable[[str, torch.Tensor], None]  # (parameter's path, a gradient)


class Again(Exception):
    """The pass is to be run again: `items` ({path: why}) are no modules of their kind, or batches are to have one
    sample."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}
        self.one_by_one = False

    def if_any(self) -> None:
        if self.items or self.one_by_one:
            raise self


def alike(item: Watched) -> tuple[str, type]:
    """The same for a module of all layers and experts."""
    return re.sub(r"\d+", "N", item.path), type(item.module)


def _as_frozen(parameter: nn.Parameter) -> None:
    parameter.grad = None
    parameter.requires_grad_(False)


def _hook(stack: contextlib.ExitStack, item: Watched, taps: Taps, again: Again) -> None:
    """Taps the module, and lets none of its parameters require grad while it runs."""
    parameters = [getattr(item.module, name) for name in item.parameters]
    tap = taps.hook(item)

    def require(needed: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(needed)

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        require(True)
        try:
            return tap(module, args, kwargs, output)
        except ValueError as error:
            again.items[item.path] = str(error)
            return None

    stack.callback(item.module.register_forward_pre_hook(lambda *_: require(False)).remove)
    # before hooks of the user's, which may change what the module gives
    stack.callback(item.module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a backward pass yields: gradients of the whole packed batch, or of each of its samples.

    add: takes the gradients; None: their statistics are kept.
    """

    way: Way
    watched: Sequence[Watched]
    how: How
    whole: bool
    add: Add | None = None

    @contextlib.contextmanager
    def tapped(
        self, batch: PackedBatch, layers: range, found: Found
    ) -> Iterator[tuple[Callable[[], None], list[nn.Parameter]]]:
        """Inside, one forward and backward pass of `layers` is read; statistics go to `found`. Yields a function to
        call between the two, and parameters for which the backward pass is to be asked too.

        A watched parameter requires grad, except where its kind knows what is done with it. So what else is done with
        it comes to light as a gradient, and the module is measured by autograd.
        """
        segments = Segments.of([batch.num_tokens] if self.whole else batch.lengths, batch.device)
        taps = Taps(segments, self.way.places(batch), lambda parts: self._read(parts, batch, found))
        inside = [item for item in self.watched if item.layer in layers]
        again = Again()
        leaves: list[nn.Parameter] = []

        def forward_is_over() -> None:
            again.if_any()
            taps.forward_is_over()

        def arrived(item: Watched, name: str, parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if item.kind is not BY_AUTOGRAD:
                again.items[item.path] = f"{item.path}.{name} is used outside of {type(item.module).__name__} too"
            elif batch.num_samples > 1 and not self.whole:
                again.one_by_one = True
            else:
                self._read([Part(item, segments, (name, ""), dys=(gradient,))], batch, found)

        with contextlib.ExitStack() as stack:
            for item in inside:
                for name in item.parameters:
                    leaves.append(parameter := getattr(item.module, name))
                    stack.callback(_as_frozen, parameter)
                    parameter.requires_grad_(True)
                    on_gradient = functools.partial(arrived, item, name)
                    stack.callback(parameter.register_post_accumulate_grad_hook(on_gradient).remove)
                if item.experts is None and item.kind is not BY_AUTOGRAD:
                    _hook(stack, item, taps, again)
            known = [item for item in inside if item.experts is not None and item.kind is not BY_AUTOGRAD]
            stack.enter_context(experts.watched(known, taps))
            yield forward_is_over, leaves
            taps.finish()
            again.if_any()

    def _read(self, parts: list[Part], batch: PackedBatch, found: Found) -> None:
        kind, how = parts[0].item.kind, self.how
        if self.add is None:
            for part, values in zip(parts, kind.values(parts, how)):
                found.update((f"{part.item.path}.{n}", v) for n, v in values.items() if n in part.item.parameters)
            return
        for part in parts:
            for piece in [part] if self.whole or kind is BY_AUTOGRAD else _by_sample(part, batch.num_samples):
                for name, gradient in kind.gradient(piece, how).items():
                    if name in part.item.parameters:
                        wide = torch.promote_types(gradient.dtype, torch.float32)  # small modules keep their dtype
                        self.add(f"{part.item.path}.{name}", gradient.to(wide))


def _by_sample(part: Part, num_samples: int) -> Iterator[Part]:
    """The part of each sample alone, one segment for each expert (the segments go expert by expert)."""
    pieces = [part.x.split(part.segments.lengths)]
    pieces += [None if dy is None else dy.split(part.segments.lengths) for dy in part.dys]
    for sample in range(num_samples):
        x, *dys = [None if p is None else torch.cat(p[sample::num_samples]) for p in pieces]
        segments = Segments.of(part.segments.lengths[sample::num_samples], x.device)
        yield dataclasses.replace(part, segments=segments, x=x, dys=dys)
