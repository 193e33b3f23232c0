"""Taps: where, in the backward pass, a layer's input and the gradient of its output meet.

A tap is an identity on a layer's output. It saves the layer's input as any operation would (so gradient checkpointing
drops and recomputes it). Its backward hands input and gradient to a measurement, after which they are free. Layers with
the very same input (gate and up; queries, keys and values) are measured together, once all have their gradient.

Index letters: B samples, T tokens, R rows (T, or T times the heads), N out features, K in features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from kunbr_fast.model.ways import Places


@dataclasses.dataclass(frozen=True)
class Segments:
    """Rows to be measured apart: segment i is rows cu_seqlens[i]:cu_seqlens[i+1], lengths[i] of them, perhaps none."""

    lengths: list[int]
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Segments:
        return cls(lengths, torch.tensor([0, *lengths]).cumsum(0).to(device))

    @functools.cached_property
    def longest(self) -> int:
        return max(self.lengths)

    def times(self, rows: int) -> Segments:
        """The same segments of a tensor that has `rows` rows for each of ours."""
        return self if rows == 1 else Segments([n * rows for n in self.lengths], self.cu_seqlens * rows)


@dataclasses.dataclass
class Part:
    """One tap's x (R, K), and dys, the gradients of its outputs, each (R, N) or None.

    names: of the weight and the bias of a matrix product; places: of the outputs in the tuple that the module returned.
    """

    item: Any  # the watched module: a layer_kinds.Watched
    segments: Segments
    names: tuple[str, str] = ("weight", "bias")
    places: Sequence[int] = (0,)
    x: torch.Tensor | None = None
    dys: Sequence[torch.Tensor | None] = ()

    @property
    def dy(self) -> torch.Tensor:
        return self.dys[0]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arrive, in_place, x, *outputs):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.arrive = arrive
        if in_place:  # nothing is written, but only so may the model go on to change the output in place
            ctx.mark_dirty(*outputs)
            return outputs
        return tuple(output.clone() for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        arrive, ctx.arrive = ctx.arrive, None
        if arrive is not None and any(dy is not None for dy in dys):
            arrive(*ctx.saved_tensors, dys)
        return None, None, None, *dys


class _Group:
    """The parts that share an input. `size` is known once the forward pass is over."""

    def __init__(self) -> None:
        self.size = 0
        self.arrived: dict[int, Part] = {}


class Taps:
    """The taps of one forward and backward pass over a batch whose tokens stand in `places`, and belong to `segments`.

    `measure(parts)` is called within the backward pass, with parts that share x. Register `hook(item)` as a forward
    hook with kwargs, call `forward_is_over()` after the forward pass and `finish()` after the backward pass.

    Errors (ValueError with the module's path): a module that runs twice, takes or returns what is not understood, or
    does not see the packed tokens in order.
    """

    def __init__(self, segments: Segments, places: Places, measure: Callable[[list[Part]], None]):
        self.segments = segments
        self.places = places
        self._measure = measure
        self._groups = WeakIdKeyDictionary()  # by input, which must not be kept alive
        self._waiting: dict[_Group, None] = {}  # groups with some of their gradients, in order of arrival
        self._seen: set[str] = set()
        self._recording = True

    def hook(self, item: Any) -> Callable:
        def on_forward(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            self.enter(item)
            inputs = (*args, *kwargs.values())
            outputs = output if isinstance(output, tuple) else (output,)
            if len(inputs) != 1 or not all(isinstance(o, torch.Tensor) for o in outputs):
                raise ValueError(
                    f"{item.path}: {type(module).__name__} takes {len(inputs)} arguments and returns "
                    f"{', '.join(type(o).__name__ for o in outputs)}: expected one tensor in and tensors out"
                )
            (x,) = inputs
            across, rows = self._layout(item, x)
            places = [place for place, o in enumerate(outputs) if o.requires_grad]
            part = Part(item, self.segments.times(rows), places=places)
            tapped = self.tap(part, x, [outputs[place] for place in places], across, item.kind.shares_input)
            outputs = list(outputs)
            for place, o in zip(places, tapped):
                outputs[place] = o
            return tuple(outputs) if isinstance(output, tuple) else outputs[0]

        return on_forward

    def enter(self, item: Any) -> None:
        """To be called once per module and forward pass; a recomputation in the backward pass does not count."""
        if self._recording and item.path in self._seen:
            raise ValueError(f"{item.path} runs twice in one forward pass: its gradient is not one product")
        self._seen.add(item.path)

    def tap(
        self,
        part: Part,
        x: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        across: bool = False,
        shares_input: bool = False,
        sorted_rows: bool = False,
    ) -> Sequence[torch.Tensor]:
        """The outputs, tapped; to be used instead of `outputs`. sorted_rows: they are in the order of the part's
        segments, (R, ...), and not in the batch's places."""
        if not outputs:  # nothing of it requires a gradient
            return outputs
        arrive = None
        if self._recording:
            group = self._groups.setdefault(x, _Group()) if shares_input else _Group()
            index, group.size = group.size, group.size + 1

            def arrive(x: torch.Tensor, dys: Sequence[torch.Tensor | None]) -> None:
                part.x = x if sorted_rows else self.places.rows(x, across)
                part.dys = [dy if dy is None or sorted_rows else self.places.rows(dy, across) for dy in dys]
                self._arrive(group, index, part)

        # Marking says "written to", which would be wrong for a router's outputs, saved by the operations that made
        # them, and costs two copies in the backward pass for a view. So these are copied.
        in_place = len(outputs) == 1 and not outputs[0]._is_view()
        return _Tap.apply(arrive, in_place, x.detach(), *outputs)

    def forward_is_over(self) -> None:
        """From here on a module that runs is recomputed in the backward pass."""
        self._recording = False
        self._groups.clear()

    def finish(self) -> None:
        """Measures groups of which some layers got no gradient."""
        for group in list(self._waiting):
            self._complete(group)

    def _arrive(self, group: _Group, index: int, part: Part) -> None:
        group.arrived[index] = part
        self._waiting[group] = None
        if len(group.arrived) == group.size:
            self._complete(group)

    def _complete(self, group: _Group) -> None:
        del self._waiting[group]
        parts = [group.arrived[index] for index in sorted(group.arrived)]
        group.arrived = {}
        try:
            self._measure(parts)
        finally:
            for part in parts:
                part.x, part.dys = None, ()

    def _layout(self, item: Any, x: torch.Tensor) -> tuple[bool, int]:
        """Whether x is (B, heads, L, d), and how many rows it has for each place."""
        (samples, length), count = self.places.shape, self.places.count
        rows, rest = divmod(x.shape[:-1].numel(), count)
        fits = x.dim() == 2 or (x.dim() in (3, 4) and (x.shape[0] == samples or x.shape[:2].numel() == count))
        if rest or not rows or not fits or (x.dim() == 4 and length not in x.shape[1:3]):
            raise ValueError(
                f"{item.path}: its input has the shape {tuple(x.shape)}, expected all {samples} x {length} tokens in "
                "order: what it computes cannot be told apart by sample"
            )
        if x.dim() == 4 and x.shape[1] == x.shape[2]:
            # with L heads the shape does not tell: projections write token after token, so tokens lie further apart
            return x.stride(2) > x.stride(1), rows
        return x.dim() == 4 and x.shape[2] == length, rows
