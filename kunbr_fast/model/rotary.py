"""Rotary angles that depend on a sample's length, made for each packed sample by itself.

LongRoPE takes one of two sets of frequencies by the length of the sequence; dynamic NTK has a set for each length. In
transformers both look at the longest sequence of a batch, and dynamic NTK at earlier calls too. Packed, a sample's
angles would depend on its neighbours.

Here the model's own module is called once for each length in a batch, with the other samples' positions set to 0, and
each token takes the angles of the call for its sample's length. The calls go to a copy of the module in its first
state: the truth is the sample alone in a model that has run nothing before, and the user's module stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import PackedBatch

FIRST, CURRENT, LONGEST = "original_inv_freq", "inv_freq", "max_seq_len_cached"  # as transformers calls them


def _kinds(module: nn.Module) -> list[str]:
    """A rotary module's kinds: one, or one for each type of layer."""
    kinds = getattr(module, "rope_type", None)
    return [kind for kind in (kinds.values() if isinstance(kinds, Mapping) else [kinds]) if isinstance(kind, str)]


def _same_up_to(module: nn.Module) -> int:
    """The length up to which all samples have the same angles, or a smaller one."""
    config = module.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    owners = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    found = [owner.get("original_max_position_embeddings") for owner in owners]
    found += [getattr(config, "original_max_position_embeddings", None), config.max_position_embeddings]
    return min(int(n) for n in found if n is not None)


def _reset(module: nn.Module) -> None:
    """Puts a rotary module into the state that it was made in."""
    for name, value in [*vars(module).items(), *module._buffers.items()]:
        if name.endswith(FIRST):
            current = name.removesuffix(FIRST) + CURRENT
            setattr(module, current, value.to(getattr(module, current).device, copy=True))  # may be written in place
        elif name.endswith(LONGEST):
            setattr(module, name, module.original_max_seq_len)


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


class RotaryByLength:
    """A model's rotary modules whose angles depend on the length of the sequence.

    same_up_to: the length up to which all samples have the same angles; infinite for a model without such modules.
    unlimited: whether the angles are defined for any length (dynamic NTK).
    """

    def __init__(self, model: nn.Module):
        self._copies: dict[nn.Module, nn.Module] = {}
        self.unlimited = False
        for module in model.modules():
            kinds = _kinds(module)
            dynamic = any("dynamic" in kind for kind in kinds)
            if dynamic or "longrope" in kinds:
                self._copies[module] = copy.copy(module)
                self._copies[module]._buffers = dict(module._buffers)
                self.unlimited |= dynamic
        self.same_up_to = min(map(_same_up_to, self._copies), default=math.inf)

    @contextlib.contextmanager
    def of(self, batch: PackedBatch) -> Iterator[None]:
        """Inside, the model's rotary modules give each of the batch's samples the angles of its own length."""
        with contextlib.ExitStack() as changes:
            for module, own in self._copies.items():
                changes.callback(_put_back, module, vars(module).get("forward"))  # by Accelerate, for example
                module.forward = functools.partial(self._angles, own, batch)
            yield

    def _angles(
        self,
        module: nn.Module,
        batch: PackedBatch,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """position_ids (..., T) -> angles (..., T, d), a tensor or a tuple of them, as the module gives them."""

        def call(positions: torch.Tensor) -> Any:
            _reset(module)
            return type(module).forward(module, x, positions, *args, **kwargs)

        lengths = sorted({max(n, self.same_up_to) for n in batch.lengths})
        if len(lengths) == 1:
            return call(position_ids)
        if position_ids.shape[-1] != batch.num_tokens:
            raise ValueError(
                f"{type(module).__name__} is asked for {position_ids.shape[-1]} angles for {batch.num_tokens} tokens: "
                "this architecture cannot run packed samples"
            )
        own = batch.cu_seqlens.diff()[batch.sample_of_token].clamp(min=self.same_up_to)  # (T,)
        found = call(position_ids.masked_fill(own != lengths[0], 0))
        for length in lengths[1:]:
            mine = own == length
            more = call(position_ids.masked_fill(~mine, 0))
            if isinstance(found, tuple):
                found = tuple(torch.where(mine[:, None], new, old) for new, old in zip(more, found))
            else:
                found = torch.where(mine[:, None], more, found)
        return found
