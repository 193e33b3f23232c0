"""The relearning adversary of a training: a second set of the trained weights, and the AdamW that relearns with it.

    fork            A <- W, a fresh AdamW
    relearn         A <- AdamW(A, gradient at A of the NLL of what it relearns)
    attacked pass   the gradient at A of the forget loss, added to W's (first order: as if A moved as W does)

The parameters' storage is swapped, not the parameters: a gradient that is taken at A accumulates where W's does. So the
adversary needs no gradient of its own, and costs one more copy of what is trained and AdamW's two moments.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from kunbr_fast.data.adversary import AdversarySettings
from kunbr_fast.kernels.optimizers.op import Watched
from kunbr_fast.training.flat_buffer import FlatBuffer, make_optimizer

PREFIX = "adversary."  # of its entries in a training's state


class Adversary(abc.ABC):
    """settings: when it forks and how it relearns; impl: of its AdamW; seed: of stochastic rounding of what is in bf16,
    None for none. Nothing is allocated before the first fork."""

    def __init__(self, settings: AdversarySettings, impl: str, seed: int | None):
        self.settings, self.impl, self.seed, self.lr = settings, impl, seed, 0.0
        self.optimizer: Watched | None = None

    @torch.no_grad()
    def fork(self, step: int) -> None:
        """Starts anew from the trained weights, before this step."""
        self.optimizer = None  # before the new one's moments
        self.lr = self.settings.lr(step)
        self._copy()
        self.optimizer = self._made()

    def _made(self) -> Watched:
        params = self._updated()
        seed = self.seed if all(param.dtype == torch.bfloat16 for param in params) else None
        return make_optimizer("adamw", params, self.lr, impl=self.impl, seed=seed)

    @property
    def forked(self) -> bool:
        """Whether it has weights of its own."""
        return self.optimizer is not None

    def left_finite(self) -> bool:
        """Whether the updates since the fork have stored finite values alone. Waits for the device."""
        return self.optimizer is None or self.optimizer.left_finite()

    def flags(self) -> list[torch.Tensor]:
        return [] if self.optimizer is None else self.optimizer.flags()

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights and moments, once it has forked. The tensors themselves."""
        if self.optimizer is None:
            return {}
        found = {f"{PREFIX}lr": torch.tensor(self.lr, dtype=torch.float64), **self._weights()}
        for number, param in enumerate(self._updated()):
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{PREFIX}{key}.{number}"] = torch.as_tensor(value)
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a `state()`; other entries are not looked at."""
        self.optimizer = None
        if f"{PREFIX}lr" not in state:
            return
        self.lr = float(state[f"{PREFIX}lr"])
        self._copy()  # which allocates
        self._load(state)
        params = self._updated()
        self.optimizer = self._made()
        for key, value in state.items():
            slot, _, number = key.removeprefix(PREFIX).rpartition(".")
            if key.startswith(PREFIX) and slot in ("step", "exp_avg", "exp_avg_sq"):
                param = params[int(number)]
                self.optimizer.state[param][slot] = value.to(param.device, copy=True)  # updated in place

    # ------------------------------------------------ of each kind of training

    @abc.abstractmethod
    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's parameters have the adversary's weights."""

    def relearning(self) -> contextlib.AbstractContextManager[None]:
        """`inside`, and what AdamW updates requires grad."""
        return self.inside()

    @abc.abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """What AdamW's next step reads, on each rank the same tensors to sum."""

    @abc.abstractmethod
    def update(self) -> None:
        """One step of AdamW by the accumulated gradient, which is then zero again. Not `inside`."""

    @abc.abstractmethod
    def _copy(self) -> None:
        """The trained weights, copied."""

    @abc.abstractmethod
    def _updated(self) -> list[torch.nn.Parameter]:
        """What AdamW updates."""

    @abc.abstractmethod
    def _weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside AdamW's state, under the names it has there."""

    @abc.abstractmethod
    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up its `_weights` from a state."""


class FlatAdversary(Adversary):
    """Of a block: a second `FlatBuffer` for the same parameters, which shares the first one's gradient."""

    def __init__(
        self,
        settings: AdversarySettings,
        impl: str,
        seed: int | None,
        flat: FlatBuffer,
        parameters: Sequence[torch.nn.Parameter],
    ):
        super().__init__(settings, impl, seed)
        self._trained, self._parameters = flat, list(parameters)
        self.flat: FlatBuffer | None = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        for parameter, view in zip(self._parameters, self.flat.views(self.flat.weights)):
            parameter.data = view
        try:
            yield
        finally:
            for parameter, view in zip(self._parameters, self._trained.views(self._trained.weights)):
                parameter.data = view

    def gradients(self) -> list[torch.Tensor]:
        return [self.flat.grad]

    def update(self) -> None:
        self.flat.step(self.optimizer)

    def _copy(self) -> None:
        if self.flat is None:
            self.flat = self._trained.twin()
        self.flat.take(self._trained)

    def _updated(self) -> list[torch.nn.Parameter]:
        return [self.flat.param]

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"{PREFIX}{name}": value for name, value in self.flat.state().items()}

    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.flat.load({name: state[PREFIX + name] for name in self.flat.state()})


class FullAdversary(Adversary):
    """Of all parameters, by name, also where only a block of them is trained. drop: forgets the gradients that the
    training itself does not hold as it holds its own."""

    def __init__(
        self,
        settings: AdversarySettings,
        impl: str,
        seed: int | None,
        parameters: Mapping[str, torch.nn.Parameter],
        drop: Callable[[], None],
    ):
        super().__init__(settings, impl, seed)
        self._parameters, self._drop = parameters, drop
        self._own: list[torch.nn.Parameter] = []

    @contextlib.contextmanager
    def relearning(self) -> Iterator[None]:
        flags = [parameter.requires_grad for parameter in self._parameters.values()]
        try:
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            with self.inside():
                yield
        finally:
            for parameter, flag in zip(self._parameters.values(), flags):
                parameter.requires_grad_(flag)

    def gradients(self) -> list[torch.Tensor]:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters.values()]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        trained = [parameter.data for parameter in self._parameters.values()]
        for parameter, own in zip(self._parameters.values(), self._own):
            parameter.data = own.data
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters.values(), trained):
                parameter.data = data

    def update(self) -> None:
        for parameter, own in zip(self._parameters.values(), self._own):
            own.grad = parameter.grad
        self.optimizer.step()
        for own in self._own:
            own.grad = None
        self._drop()

    def _copy(self) -> None:
        if not self._own:
            self._own = [torch.nn.Parameter(p.data.clone()) for p in self._parameters.values()]
        for parameter, own in zip(self._parameters.values(), self._own):
            own.data.copy_(parameter.data)

    def _updated(self) -> list[torch.nn.Parameter]:
        return self._own

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"{PREFIX}weights.{name}": own.data for name, own in zip(self._parameters, self._own)}

    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, weights in self._weights().items():
            weights.copy_(state[name])
