"""A model's weights by name, whether it is in memory or streamed, and whether they are finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.files.tensors import is_absent
from kunbr_fast.kernels.optimizers import reference

CARRIED = "_kunbr_weights"  # on a module of a streamed model: its `Weights`
DAMAGED = "this checkpoint is damaged or its training diverged; load another one"


def finite(*tensors: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, as a tensor (no wait for a device). Judged by the largest of each: unlike a sum
    it cannot overflow. On a CPU a sum, a twentieth of the time, is tried first: it is finite only if all are."""
    left = [t for t in (t.detach() for t in tensors) if not reference.sum_is_finite(t)]
    if not left:
        return torch.tensor(True)
    return torch.stack([torch.linalg.vector_norm(t, torch.inf) for t in left]).isfinite().all()


def check_finite(model: nn.Module, whose: str = "") -> None:
    """ValueError with the path of the first weight in memory that holds NaN or infinity; `whose` goes before it."""
    for name, parameter in model.named_parameters():
        if is_absent(parameter) or bool(finite(parameter)):
            continue
        if bad := int((~parameter.detach().isfinite()).sum()):
            raise ValueError(f"{whose}{name}: {bad} of {parameter.numel()} values are NaN or infinite: {DAMAGED}")


def all_zero(weights: Mapping[str, torch.Tensor]) -> str:
    """For an error: which weights hold only zeros, biases apart; "" where none does."""
    names = [name for name in weights if not name.endswith("bias")]
    zeros = [name for name in names if not bool(weights[name].any())]
    return f", {zeros[0]} holds only zeros ({len(zeros)} of {len(names)} weights do)" if zeros else ""


class Weights:
    """A mapping from the names of a model's parameters to tensors: of a model in memory, its own storage.

    A tied parameter has one of its names. What is set is copied into the model.
    """

    streamed = False
    decoder_class: type | None = None  # what `Decoder(model)` makes, None: a Decoder

    def __init__(self, model: nn.Module):
        self._model = model
        self._parameters = dict(model.named_parameters())

    @property
    def directory(self) -> Path | None:
        """Where the model was loaded from, if that is known."""
        name = getattr(getattr(self._model, "config", None), "name_or_path", None)
        return Path(name) if name and Path(name).is_dir() else None

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def keys(self) -> list[str]:
        return list(self)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.replace({name: value})

    @torch.no_grad()
    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """These tensors, by parameter name, become the model's weights."""
        for name in values:
            self._parameters[name].copy_(values[name])

    def check_target(self, directory: str | Path | None) -> None:
        """ValueError where a result cannot be written to `directory`: the weights are read from there, or a streamed
        model has none."""


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model; of one that `open_streamed` has made, those of its files."""
    for module in model.modules():
        if CARRIED in vars(module):
            return vars(module)[CARRIED]
    return Weights(model)


def owners(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: all its names}, several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def other_names(found: dict[int, list[str]], parameter: nn.Parameter, name: str) -> str:
    """The names that the parameter `name` has besides, for an error; "" where it is not tied. found: from `owners`."""
    return ", ".join(other for other in found[id(parameter)] if other != name)
