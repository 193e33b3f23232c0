"""A model's own forward pass on padded batches, with modules' forwards replaced for a while."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.model.decoder import Decoder


@contextlib.contextmanager
def forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Inside, each module's forward is make(its number, the one it had)."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


class OwnForward:
    """The model's own forward pass, in which the layers below the block run once for each padded batch. Their outputs
    (B, L, D) are kept in main memory."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.kept: dict[str, tuple[int, torch.Tensor]] = {}

    @contextlib.contextmanager
    def above(self, start: int) -> Iterator[None]:
        """Inside, calls of the model give what they gave, and run layers `start` and above only, where they can."""
        key, layer, hidden = "", 0, None

        def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal key, layer, hidden
            key = _digest(args, kwargs)
            layer, hidden = self.kept.get(key, (0, None))
            if layer > start:
                layer, hidden = 0, None

        def make(index: int, forward: Callable) -> Callable:
            def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if index < layer:
                    return x
                if index == layer and hidden is not None:
                    x = hidden.to(x.device)
                if index == start and (hidden is None or layer < start):
                    self.kept[key] = start, x.detach().cpu()
                return forward(x, *args, **kwargs)

            return run

        with (
            self.decoder.model.register_forward_pre_hook(begin, with_kwargs=True),
            forwards(self.decoder.layers[: start + 1], make),
        ):
            yield


def _digest(args: tuple, kwargs: dict) -> str:
    """What a call was given, so that the same call is known again."""
    digest = hashlib.sha256()
    for name, item in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous()
            digest.update(repr((name, flat.dtype, tuple(flat.shape))).encode())
            digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr((name, item)).encode())
    return digest.hexdigest()
