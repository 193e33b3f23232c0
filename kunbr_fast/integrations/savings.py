"""What a patched training saves, in FLOPs: counted from the shapes of its model calls, beside those of the plain one.

Products with weights and attention's two products are counted, as torch's FlopCounterMode counts them; a backward pass
is taken to follow each call that makes a graph. Index letters: B sequences, T tokens of each, R rows of the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from kunbr_fast.model.layers import find_layers


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the model. again: the backward pass makes the head's logits a second time."""

    sequences: int
    length: int
    rows: int  # of the head
    layers: int | None = None  # that run; None: all
    reached: int | None = None  # by the backward pass; None: all that run
    backward: bool = True
    head_backward: bool = True
    again: bool = False


def flops(model: nn.Module, call: Call, also: frozenset[int] = frozenset()) -> float:
    """also: ids of parameters that count as trained although they do not require grad."""

    def trained(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad or id(parameter) in also

    tokens, config = call.sequences * call.length, model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * tokens * call.length * config.num_attention_heads * width
    layers = list(find_layers(model)[1])[: call.layers]
    whole = [[p for p in layer.parameters() if len(_shape(p)) == 2] for layer in layers]
    weights = [sum(_shape(p).numel() for p in layer) for layer in whole]
    own = [sum(_shape(p).numel() for p in layer if trained(p)) for layer in whole]
    total = sum(2 * tokens * count + attention for count in weights)
    head = model.get_output_embeddings().weight
    product = 2 * call.rows * _shape(head).numel()
    total += product
    if not call.backward:
        return total
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        total += sum(2 * tokens * count + attention for count in weights[: call.reached])
    below = trained(model.get_input_embeddings().weight)  # whether something before a layer's input is trained
    for count, mine in list(zip(weights, own))[: call.reached]:
        total += 2 * tokens * mine
        if below or 2 * mine > count:
            total += 2 * tokens * count + 2 * attention
        below = below or mine > 0
    if call.head_backward:
        total += product * (below + trained(head) + (call.again and trained(head)))
    return total


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Also of one that DeepSpeed ZeRO-3 has in parts."""
    return getattr(parameter, "ds_shape", parameter.shape)


class Tally:
    """Of one training. `open` while a training step computes its loss; calls at other times are not counted."""

    def __init__(self) -> None:
        self.plain = self.ours = 0.0
        self.positions = self.rows = 0  # of calls whose head need not run at all positions
        self.sequences = self.known = 0  # of the reference model, and those that it was not asked for again
        self.notes: dict[str, None] = {}  # what else is saved
        self.spare: frozenset[int] = frozenset()  # ids of parameters whose gradients the plain trainer makes
        self._counted: dict[tuple, float] = {}  # a step has the same calls again, and counting takes milliseconds
        self._open = self._without_gradients = False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Calls inside have a backward pass in the plain trainer."""
        self._without_gradients = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._without_gradients = False

    def call(
        self, model: nn.Module, shape: torch.Size, *, head: int | None = None, stop: int | None = None,
        ran: int | None = None,
    ) -> None:  # fmt: skip
        """head: rows of the head that ran (None: all); stop: layers that ran; ran: sequences that were
        not known, of a reference model."""
        if not self._open:
            return
        asked, length = shape
        backward, hooked = torch.is_grad_enabled(), stop is not None
        if ran is not None:
            self.sequences += asked
            self.known += asked - ran
        ran, rows = asked if ran is None else ran, asked * length if head is None else head
        if head is not None and not hooked:
            self.positions += asked * length
            self.rows += rows
        if hooked:
            self.notes[f"the first {stop} of {len(find_layers(model)[1])} layers alone"] = None
        ours = Call(ran, length, rows, stop, stop, backward, head_backward=not hooked, again=head is not None)
        theirs = Call(
            asked, length, asked * length, None, stop, backward or self._without_gradients, head_backward=not hooked
        )
        self.ours += self._flops(model, ours)
        self.plain += self._flops(model, theirs, self.spare)

    def _flops(self, model: nn.Module, call: Call, also: frozenset[int] = frozenset()) -> float:
        key = id(model), model.training, call, also
        if key not in self._counted:
            self._counted[key] = flops(model, call, also)
        return self._counted[key]

    def left_out(self, model: nn.Module, shape: torch.Size) -> None:
        """A call that the plain trainer makes, without reading what it gives."""
        self.plain += self._flops(model, Call(*shape, shape.numel(), backward=False))

    def line(self, fused: bool, not_used: list[str]) -> str:
        found = ["fused layers"] if fused else []
        if self.positions:
            found.append(f"head at {self.rows / self.positions:.0%} of positions")
        if self.known:
            found.append(f"reference model not asked again for {self.known / self.sequences:.0%} of its sequences")
        found += self.notes
        saved = "; ".join(found) or "nothing saved"
        share = f": about {self.ours / self.plain:.2f} of the plain FLOPs" if self.plain else ""
        return f"kunbr_fast: {saved}{share}." + (f" Not used: {'; '.join(not_used)}." if not_used else "")
