"""The kinds of attack: how somebody might bring back what was unlearned. One entry each, in `ATTACKS`.

`full` is the attack that a method may have been rehearsed against. The others ask whether forgetting lasts where nobody
has looked. Each has its own learning rates, made of those that are given (`lrs`), and its own curve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.files.shown import shown
from kunbr_fast.model import compat
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.low_precision import NF4_BLOCK, quantize

Rates = tuple[float, ...]
NO_RATE = 0.0  # of an attack without training


def _times(*factors: float) -> Callable[[Rates], list[float]]:
    return lambda lrs: [lr * factor for factor in factors for lr in lrs]


@dataclass(frozen=True)
class Kind:
    """says: in a few words. rates: its learning rates, of those that are given. optimizer: None for the one that is
    given. passes: over the data, for each epoch that is given; measured after so many. adapters: trains LoRA's, not the
    weights. others: teaches facts that are not in the forget set. rounds: to which precision the weights are rounded;
    nothing is trained then.
    """

    says: str
    rates: Callable[[Rates], Sequence[float]] = tuple
    optimizer: str | None = None
    passes: int = 1
    adapters: bool = False
    others: bool = False
    rounds: str | None = None

    @property
    def at_once(self) -> bool:
        """Whether one attack is for all folds, as it uses none of them."""
        return self.others or self.rounds is not None

    @property
    def trains_all(self) -> bool:
        """Whether it trains the weights themselves."""
        return not self.adapters and self.rounds is None

    def lrs(self, given: Rates) -> Rates:
        """Different ones, in three digits."""
        return (
            tuple(given)
            if self.rates is tuple
            else tuple(dict.fromkeys(float(f"{lr:.3g}") for lr in self.rates(given)))
        )

    def measured(self, epochs: int) -> range:
        """The epochs at which it is measured; 0 is before it."""
        return range(2) if self.rounds else range(0, epochs * self.passes + 1, self.passes)


ATTACKS = {
    "full": Kind("all weights, on the other folds"),
    "wide": Kind("the same, at rates beyond the list", lambda lrs: [min(lrs) / 3, 3 * max(lrs)]),
    "lion": Kind("the same, by Lion, whose rates are lower", _times(1 / 10, 1 / 3), optimizer="lion"),
    "long": Kind("the same, four times as long", passes=4),
    "lora": Kind("LoRA on linear layers, at ten times the rates", _times(10), optimizer="adamw", adapters=True),
    "other_facts": Kind("all weights, on other facts of the same form; asks all folds", others=True),
    "int8": Kind("weights rounded to 8 bits, nothing trained", lambda lrs: [NO_RATE], rounds="int8"),
    "nf4": Kind("weights rounded to 4 bits, nothing trained", lambda lrs: [NO_RATE], rounds="nf4"),
}  # fmt: skip


def chosen_attacks(value: Any, name: str = "attacks") -> tuple[str, ...]:
    """The kinds that a setting called `name` asks for: one, several or "all". ValueError for others."""
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if found == ("all",):
        return tuple(ATTACKS)
    for one in found:
        if not isinstance(one, str) or one not in ATTACKS:
            raise ValueError(f"{name}={shown(one)}: expected some of {', '.join(ATTACKS)}, or all alone")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name}={shown(found)}: expected one or more different ones of {', '.join(ATTACKS)}, or all")
    return found


# QLoRA's 16 values (arXiv 2305.14314, appendix E), for blocks of 64 weights whose largest is 1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@contextlib.contextmanager
def rounded(decoder: Decoder, precision: str) -> Iterator[None]:
    """Inside, each matrix of the decoder's layers is what it is after quantisation to `precision` and back: "int8" with
    a scale for each row, "nf4" with one for 64 neighbours (arXiv 2410.16454). Embeddings and head stay. A model in
    memory keeps it so, a streamed one's weights are as before."""

    def change(number: int) -> None:
        _round(decoder.layers[number], precision)

    if decoder.streamed:
        with decoder.weights.transformed(change):
            yield
        return
    for number in range(decoder.num_layers):
        change(number)
    yield


@torch.no_grad()
def _round(layer: nn.Module, precision: str) -> None:
    to_grid = {"int8": lambda weight: quantize(weight, "int8").dense(weight.dtype), "nf4": _nf4}[precision]
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() >= 2:
                own = weight.t() if isinstance(module, compat.Conv1D) else weight
                own.copy_(to_grid(own.contiguous()))


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.to(wide).flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4, dtype=wide, device=weight.device)
    nearest_one = torch.bucketize(blocks / largest.masked_fill(largest == 0, 1.0), (values[1:] + values[:-1]) / 2)
    return (values[nearest_one] * largest).flatten()[: len(flat)].view(weight.shape).to(weight.dtype)
