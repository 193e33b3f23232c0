"""Sequences that grow together, each as it would alone.

Prompts of similar length go through the model together, left-padded, a few thousand tokens at a time, and leave their
keys and values in reserved memory (`key_values`). A step then makes one token of every sequence. Equal prompts are read
once.

Whether a model gives the same when it runs several texts together, and goes on from a cache, is found out by trying:
the logits of three short texts are compared with those of each alone, without a cache. The first of these that agrees:

reserved        keys and values as above.
reserved equal  the same, but only prompts of equal length are read together: nothing is padded.
own             the model's own cache (states of a linear attention, say), prompts left-padded to one batch.
own equal       the same, in batches of equal length.
alone           one prompt after the other, by the model's own `generate`: RWKV, or rotary angles by length.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.memory import is_out_of_memory
from kunbr_fast.model.rotary import RotaryByLength
from kunbr_fast.model.self_check import FAILURES

logger = logging.getLogger(__name__)

SEQUENCES = 256  # a batch: beyond it a step's matrix products gain little, and its logits take memory
PROMPT_TOKENS = 4096  # of prompts that are read together, padding included
SIMILAR = 0.75  # prompts that are read together are at least this share of the longest
PROBED = 16  # tokens of a text that a way is tried with
# Largest relative difference of logits, each text's mean taken off, that is rounding: as of `Decoder.rounding`.
ROUNDING = {torch.float64: 1e-4, torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def block(device: torch.device) -> int:
    """Of columns, which attention reads whole."""
    return 64 if device.type == "cuda" else 1


@dataclasses.dataclass(frozen=True)
class Way:
    """How prompts run together. reserved: in `key_values.Reserved`, else in the model's own cache. padded: prompts of
    different lengths are read together."""

    reserved: bool
    padded: bool

    def cache(self, model: nn.Module, sequences: int, columns: int) -> Any:
        from kunbr_fast.measures.key_values import Own, Reserved  # which import transformers

        device = model.get_input_embeddings().weight.device
        return (Reserved if self.reserved else Own)(model.config, sequences, columns, block(device))

    def read_together(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many of these, the longest first."""
        longest = len(prompts[0])
        if not self.reserved:
            return len(prompts)  # there is no joining its caches
        least = SIMILAR * longest if self.padded else longest
        fit = range(1, max(1, min(len(prompts), PROMPT_TOKENS // longest)))
        return 1 + len(list(itertools.takewhile(lambda i: len(prompts[i]) >= least, fit)))

    def batch(self, prompts: Sequence[Sequence[int]], new: int, at_once: int) -> int:
        """How many of these, the longest first, make a batch."""
        longest = len(prompts[0])
        number = max(1, min(SEQUENCES, at_once // (longest + new), len(prompts)))
        if self.reserved or self.padded:
            return number
        return len(list(itertools.takewhile(lambda prompt: len(prompt) == longest, prompts[:number])))


WAYS = Way(True, True), Way(True, False), Way(False, True), Way(False, False)


class Batch:
    """Sequences that grow together. mask: (B, columns), 1 from a prompt's first token to the last. lengths: (B,) so
    far."""

    def __init__(self, model: nn.Module, way: Way, prompts: Sequence[Sequence[int]], new: int):
        self.model, self.way, self.takes = model, way, _takes(model)
        once = {tuple(prompt): None for prompt in prompts}
        self.once = sorted(once, key=len, reverse=True)
        number = {prompt: i for i, prompt in enumerate(self.once)}
        self.each = torch.tensor([number[tuple(prompt)] for prompt in prompts])  # of each prompt its row in `once`
        self.end = len(self.once[0])  # columns that are filled
        self.cache = way.cache(model, len(self.once), self.end + new)
        self.device = model.get_input_embeddings().weight.device
        self.lengths = torch.tensor([len(prompt) for prompt in self.once], device=self.device)
        columns = torch.arange(self.end + new + block(self.device), device=self.device)
        self.mask = ((columns >= self.end - self.lengths[:, None]) & (columns < self.end)).long()

    def read(self) -> torch.Tensor:
        """Logits (B, V) behind the prompts."""
        found = []
        for rows in self._parts():
            part = self.once[rows]
            width = len(part[0])
            begin = self.end - width
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part], device=self.device)
            mask = self.mask[rows, begin : self.end]
            self.cache.before_prompts(rows, begin)
            found.append(self._call(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)))
        logits = torch.cat(found)
        if len(self.each) > len(self.once) or self.each.tolist() != list(range(len(self.each))):
            self.take(self.each.to(self.device))
            logits = logits[self.each.to(logits.device)]
        return logits

    def _parts(self) -> Iterator[slice]:
        """Rows whose prompts are read together."""
        first = 0
        while first < len(self.once):
            last = first + self.way.read_together(self.once[first:])
            yield slice(first, last)
            first = last

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) behind one more token of each, (B,)."""
        read = self.cache.before_step(self.end)
        self.mask[:, self.end] = 1
        self.end += 1
        self.lengths = self.lengths + 1
        return self._call(tokens[:, None], self.mask[:, :read], self.lengths[:, None] - 1)

    def take(self, rows: torch.Tensor) -> None:
        """These sequences, in this order, are the batch from now on."""
        self.cache.take(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given = dict(attention_mask=mask, position_ids=positions, past_key_values=self.cache.cache, logits_to_keep=1)
        given = {name: value for name, value in given.items() if name in self.takes}
        return self.model(input_ids=ids, use_cache=True, **given).logits[:, -1]


@functools.lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _takes(model: nn.Module) -> frozenset[str]:
    """The arguments of the model's forward, of the one inside of an adapter's."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _parameters(type(inside).forward)


def find_way(model: nn.Module, prompts: Sequence[Sequence[int]], longest: int) -> Way | None:
    """None where only one prompt at a time gives what it gives alone. longest: tokens of a prompt and what follows."""
    device, dtype = (getattr(model.get_input_embeddings().weight, name) for name in ("device", "dtype"))
    rotary, size = RotaryByLength(model), max(1, min(PROBED, longest - 2))
    tokens = list(dict.fromkeys(itertools.chain(max(prompts, key=len), *prompts[:PROBED])))
    # Of these a batch with padding reads two together and one by itself; three more for batches without padding.
    sizes = [size, math.ceil(SIMILAR * size), math.ceil(size / 3), size, size]
    texts = [_text(tokens[i:] + tokens[:i], number) for i, number in enumerate(sizes)]
    truth = []
    with rotary.watching():  # which finds out whether angles depend on the length
        for ids in texts:
            truth.append(model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -3:].double())
    if longest > rotary.same_up_to:
        return None
    reasons = []
    for way in WAYS:
        three = [0, 1, 2] if way.reserved or way.padded else [0, 3, 4]
        try:
            found = _three_logits(model, way, [texts[i] for i in three])
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        off = max(_relative(ours, truth[i]) for ours, i in zip(found, three))
        if off <= ROUNDING.get(dtype, 0.1):
            return way
        reasons.append(f"logits differ by {off:.1e} relative")
    why = f"{type(model).__name__} does not give together what it gives alone ({'; '.join(dict.fromkeys(reasons))})"
    logger.warning("%s: prompts are continued one at a time", why)
    return None


def _text(tokens: Sequence[int], size: int) -> list[int]:
    """`size` tokens, and two that follow."""
    return list(itertools.islice(itertools.cycle(tokens), size + 2))


def _three_logits(model: nn.Module, way: Way, texts: Sequence[list[int]]) -> torch.Tensor:
    """(texts, 3, V) fp64: the logits before each text's last two tokens, between them and after them, from a batch in
    which texts change places after the first."""
    batch, device = Batch(model, way, [ids[:-2] for ids in texts], 2), model.get_input_embeddings().weight.device
    order = torch.arange(len(texts), device=device).roll(1)
    found, last = [batch.read()], torch.tensor([ids[-2:] for ids in texts], device=device)
    found.append(batch.step(last[:, 0]))
    batch.take(order)
    found.append(batch.step(last[order, 1])[order.argsort()])
    return torch.stack(found, dim=1).double()


def _relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Infinite where either is not finite."""
    ours, truth = (x - x.mean(-1, keepdim=True) for x in (ours, truth))
    off = ((ours - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)).max()
    return off.nan_to_num(nan=math.inf).item()
