"""Parameters, and the optimiser that updates them, with a state that goes by the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from kunbr_fast.files.tensors import placeholder
from kunbr_fast.kernels.optimizers.op import Fused, Watched
from kunbr_fast.training.flat_buffer import HALF
from kunbr_fast.training.settings import FullSettings

PREFIX = "optimizer."  # of the optimiser's entries in a training's state
MASTER = "master."  # of the masters


class OneByOne(Watched):
    """An optimiser for each parameter, and what they have together: groups and state."""

    def __init__(self, each: Sequence[Watched]):  # torch's own would want parameters
        self.param_groups = [group for one in each for group in one.param_groups]
        self.state = each[0].state
        for one in each:
            one.state = self.state


class Updates:
    """settings: of the optimiser, and what half-precision parameters have beside them (`FullSettings.master_weights`).
    numbers: of the parameters in the whole model, by name, where these are not all of them: each has random bits of its
    own, the same ones wherever it is updated.

    An fp32 master is made from its parameter at the first update.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: FullSettings,
        impl: str,
        numbers: Mapping[str, int] | None = None,
    ):
        self.parameters = dict(parameters)
        numbers = numbers or {name: number for number, name in enumerate(self.parameters)}
        half = {name: p for name, p in self.parameters.items() if p.dtype in HALF}
        masters = half if settings.master_weights == "fp32" else {}
        self._masters = {name: nn.Parameter(_nothing(p)) for name, p in masters.items()}
        self._made: set[str] = set()  # whose masters are there
        self._updated = {**self.parameters, **self._masters}
        self._each: dict[str, Watched] = {}
        if half and settings.master_weights != "none":
            for name, updated in self._updated.items():
                self._each[name] = settings.make_optimizer([updated], impl, numbers[name])
            self.optimizer: Watched = OneByOne(list(self._each.values()))
            self.share_flags(self)
        else:
            self.optimizer = settings.make_optimizer(list(self.parameters.values()), impl)

    def share_flags(self, other: Updates) -> None:
        """From now on both have one flag a device (`Watched.flag`)."""
        flags = other.optimizer.__dict__.setdefault("_flags", {})
        for optimizer in (self.optimizer, *self._each.values()):
            optimizer.__dict__["_flags"] = flags

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' gradients, which are then gone. What has none is not updated."""
        if not self._each:
            self.optimizer.step()
            self.optimizer.zero_grad()
            return
        for name, updated in self._updated.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                if name in self._masters and name not in self._made:
                    updated.data = parameter.detach().float()
                    self._made.add(name)
                self._each[name].update(parameter.grad, parameter.data if name in self._masters else None)
                updated.grad = parameter.grad = None

    # ------------------------------------------------ state

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's, by names "optimizer.KEY.PARAMETER", and the masters, "master.PARAMETER". The tensors
        themselves."""
        return {entry: torch.as_tensor(value) for entry, value in self._values()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of `state` what are tensors already: numbers that an optimiser keeps on the host stay with it."""
        return {entry: value for entry, value in self._values() if isinstance(value, torch.Tensor)}

    def _values(self) -> Iterator[tuple[str, torch.Tensor | float]]:
        for name, updated in self._updated.items():
            if name in self._made:
                yield MASTER + name, updated.data
            for key, value in self.optimizer.state.get(updated, {}).items():
                yield f"{PREFIX}{key}.{name}", value

    def let_go(self) -> None:
        """Of `tensors`."""
        for values in self.optimizer.state.values():
            for key in [key for key, value in values.items() if isinstance(value, torch.Tensor)]:
                del values[key]
        for name in self._made:
            self._masters[name].data = _nothing(self._masters[name])
        self._made.clear()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up `tensors()` that were let go, or that `begin` has named: the tensors themselves, which later steps
        change."""
        for entry, value in tensors.items():
            key, name = _parts(entry)
            if key is None:
                self._masters[name].data = value
                self._made.add(name)
            else:
                self.optimizer.state[self._updated[name]][key] = value

    def forget(self) -> None:
        """Nothing was updated yet."""
        self.let_go()
        self.optimizer.state.clear()

    def begin(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Forgets everything, and takes up the numbers of a training's state, on the host. The names of what there is
        for `take`."""
        self.forget()
        found = []
        for entry in state:
            key, name = _parts(entry)
            if name not in (self._masters if key is None else self.parameters):
                continue
            if key == "step" and isinstance(self._each.get(name, self.optimizer), Fused):
                self.optimizer.state[self._updated[name]][key] = float(state[entry])
            else:
                found.append(entry)
        return found


def of_parameter(entry: str) -> str:
    """The parameter that an entry is of."""
    return _parts(entry)[1]


def _parts(entry: str) -> tuple[str | None, str]:
    """(key, parameter) of an entry; key None: of a master. No parameter where it is another's."""
    if entry.startswith(MASTER):
        return None, entry.removeprefix(MASTER)
    key, _, name = entry.removeprefix(PREFIX).partition(".") if entry.startswith(PREFIX) else ("", "", "")
    return key, name


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """In the place of a master: its shape, without the memory."""
    return placeholder(like.shape, torch.float32, like.device)
