"""Rotary angles that depend on a sample's length, made for each packed sample by itself.

LongRoPE takes one of two sets of frequencies by the length of the sequence; dynamic NTK has a set for each length. In
transformers both look at the longest sequence of a batch, and dynamic NTK at earlier calls too. Packed, a sample's
angles would depend on its neighbours.

Here the model's own module is called once for each length in a batch, with the other samples' positions set to 0, and
each token takes the angles of the call for its sample's length. The calls go to copies of the module in its first
state: the truth is the sample alone in a model that has run nothing before, and the user's module stays as it is.

Which modules these are is known of transformers' (by `rope_type`); any other one is found out by asking it for the
angles of a short sample beside a far position.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from inspect import signature, unwrap
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import PackedBatch

# As transformers calls them: frequencies of the first state, those in use, those of long samples, the longest so far.
FIRST, CURRENT, LONG, LONGEST = "original_inv_freq", "inv_freq", "long_inv_freq", "max_seq_len_cached"
FAR = 1 << 17  # a position beyond those that models were trained with


def _kinds(module: nn.Module) -> list[str]:
    """The kinds of a rotary module of transformers: one, or one for each type of layer."""
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


def _first_state(module: nn.Module) -> nn.Module:
    """A copy of a rotary module in the state that it was made in."""
    own = copy.copy(module)
    own._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    for name, value in [*vars(own).items(), *own._buffers.items()]:
        if name.endswith(FIRST):
            current = name.removesuffix(FIRST) + CURRENT
            setattr(own, current, value.to(getattr(own, current).device, copy=True))  # it may be written in place
        elif name.endswith(LONGEST) and hasattr(own, "original_max_seq_len"):
            setattr(own, name, own.original_max_seq_len)
    return own


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module gives in its first state."""
    own = _first_state(module)
    found = type(own).forward(own, *args, **kwargs)
    # made once, by a copy from the host, which a CUDA graph could not capture
    vars(module).update((name, value) for name, value in vars(own).items() if name.endswith(LONG))
    return found


def _integral(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _counts_up(x: Any) -> bool:
    """Whether these are the positions of a sample by itself."""
    return _integral(x) and x.dim() > 0 and bool((x == torch.arange(x.shape[-1], device=x.device)).all())


def _may_be_rotary(module: nn.Module) -> bool:
    """Whether it takes positions, and has no weights, nor tables, which a far position would be outside of."""
    if "forward" in vars(module) or not any("position" in name for name in signature(type(module).forward).parameters):
        return False
    tensors = [*module.buffers(), *(x for x in vars(module).values() if isinstance(x, torch.Tensor))]
    has_weights = any(True for _ in (*module.children(), *module.parameters()))
    return not has_weights and all(x.dim() < 2 for x in tensors)


def _call_at(change: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """`_call` with other positions: these are the integers among the arguments."""
    new = {name: change(x) if _integral(x) else x for name, x in {**dict(enumerate(args)), **kwargs}.items()}
    return _call(module, *(new.pop(number) for number in range(len(args))), **new)


def _tensors(found: Any) -> tuple[torch.Tensor, ...]:
    """The angles, (..., T, d): one tensor, or cosines and sines."""
    return found if isinstance(found, tuple) else (found,)


def _looks_at_the_longest(module: nn.Module, args: tuple, kwargs: dict, found: Any) -> bool:
    """Whether what the module gave for a short sample is another beside a far position."""
    more = _call_at(lambda x: torch.cat([x, torch.full_like(x[..., :1], FAR)], -1), module, args, kwargs)
    pairs = zip(_tensors(found), _tensors(more), strict=True)
    return not all(torch.allclose(x, y[..., : x.shape[-2], :], rtol=1e-3, atol=1e-3) for x, y in pairs)


def _redirect(changes: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Sets a module's forward; `changes` puts back what was there (of Accelerate, for example)."""
    before = vars(module).get("forward")
    changes.callback(*((setattr, module, "forward", before) if before else (delattr, module, "forward")))
    module.forward = forward


class RotaryByLength:
    """A model's rotary modules whose angles depend on the length of the sequence.

    same_up_to: the length up to which all samples have the same angles; infinite for a model without such modules.
    unlimited: whether the angles are defined for any length (dynamic NTK).
    """

    def __init__(self, model: nn.Module):
        self._copies: dict[nn.Module, nn.Module] = {}
        self.same_up_to, self.unlimited = math.inf, False
        self._others: dict[nn.Module, nn.Module] = {}  # which may be such, too
        for module in model.modules():
            kinds = _kinds(module)
            dynamic = any("dynamic" in kind for kind in kinds)
            if dynamic or "longrope" in kinds:
                self._copies[module] = _first_state(module)
                self.same_up_to = min(self.same_up_to, _same_up_to(module))
                self.unlimited |= dynamic
            elif _may_be_rotary(module):
                self._others[module] = _first_state(module)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model runs short samples by themselves. Modules that are not known are tried out on these."""
        calls: dict[nn.Module, tuple[tuple, dict, Any]] = {}

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = _call(module, *args, **kwargs)
            if any(map(_counts_up, (*args, *kwargs.values()))):
                calls.setdefault(module, (args, kwargs, found))
            return found

        with contextlib.ExitStack() as changes:
            for module, own in (self._copies | self._others).items():
                _redirect(changes, module, functools.partial(noted, own))
            yield
        for module, own in self._others.items():
            with contextlib.suppress(Exception):  # it is something else
                if own in calls and _looks_at_the_longest(own, *calls[own]):
                    self._copies[module], self.same_up_to = own, 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the model's own forward, of one sample or of several of one length, is that of a model that has run
        nothing before."""
        with contextlib.ExitStack() as changes:
            for module, own in self._copies.items():
                _redirect(changes, module, functools.partial(_call, own))
            yield

    @contextlib.contextmanager
    def of(self, batch: PackedBatch) -> Iterator[None]:
        """Inside, the model's rotary modules give each of the batch's samples the angles of its own length."""
        with contextlib.ExitStack() as changes:
            for module, own in self._copies.items():
                _redirect(changes, module, functools.partial(self._angles, own, batch))
            yield

    def _angles(self, module: nn.Module, batch: PackedBatch, *args: Any, **kwargs: Any) -> Any:
        """Angles (..., T, d), a tensor or a tuple of them, for positions (..., T) among the arguments."""
        lengths = sorted({max(n, self.same_up_to) for n in batch.lengths})
        if lengths == [self.same_up_to]:  # without the look at the lengths, for which the host would wait
            with torch.no_grad():
                return unwrap(type(module).forward)(_first_state(module), *args, **kwargs)
        if len(lengths) == 1:
            return _call(module, *args, **kwargs)
        counts = {x.shape[-1] for x in (*args, *kwargs.values()) if _integral(x)}
        if counts != {batch.num_tokens}:
            raise ValueError(
                f"{type(module).__name__} is asked for the angles of {sorted(counts)} tokens, expected "
                f"{batch.num_tokens}: this architecture cannot run packed samples"
            )
        own = batch.cu_seqlens.diff()[batch.sample_of_token].clamp(min=self.same_up_to)  # (T,)
        found: tuple[torch.Tensor, ...] | None = None
        for mine in [own == length for length in lengths]:
            more = _call_at(functools.partial(torch.mul, mine), module, args, kwargs)
            one = not isinstance(more, tuple)
            pairs = zip(_tensors(more), found or _tensors(more))
            found = tuple(torch.where(mine[:, None], new, old) for new, old in pairs)
        return found[0] if one else found
