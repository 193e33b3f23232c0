"""Parameters, and the optimiser that updates them, with a state that goes by the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kunbr_fast.training.settings import FullSettings

PREFIX = "optimizer."  # of the optimiser's entries in a training's state


class Updates:
    """cure: what is logged where most updates would be rounded away, None for no such look."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: FullSettings, impl: str, cure: str | None):
        self.parameters = dict(parameters)
        self.optimizer = settings.make_optimizer(list(self.parameters.values()), impl, cure)

    def share_flags(self, other: Updates) -> None:
        """From now on both have one flag a device (`Watched.flag`)."""
        self.optimizer.__dict__["_flags"] = other.optimizer.__dict__.setdefault("_flags", {})

    def step(self) -> None:
        """One update from the parameters' gradients, which are then gone. What has none is not updated."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's, by names "optimizer.KEY.PARAMETER". The tensors themselves."""
        return {
            f"{PREFIX}{key}.{name}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of `state` what are tensors already: numbers that an optimiser keeps on the host stay with it."""
        found = {}
        for name, parameter in self.parameters.items():
            values = self.optimizer.state.get(parameter, {})
            found |= {f"{PREFIX}{key}.{name}": x for key, x in values.items() if isinstance(x, torch.Tensor)}
        return found

    def let_go(self) -> None:
        """Of `tensors`."""
        for values in self.optimizer.state.values():
            for key in [key for key, value in values.items() if isinstance(value, torch.Tensor)]:
                del values[key]

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a `state()`, or `tensors()` that were let go: the tensors themselves, which later steps change.
        Other entries are not looked at."""
        for entry in state:
            if entry.startswith(PREFIX):
                key, _, name = entry.removeprefix(PREFIX).partition(".")
                if name in self.parameters:
                    self.optimizer.state[self.parameters[name]][key] = state[entry]
