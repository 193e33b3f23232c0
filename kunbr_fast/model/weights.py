"""A model's weights by name, whether it is in memory or streamed, and whether they are finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.files.parameters import stored_parameters
from kunbr_fast.files.readback import check_model
from kunbr_fast.files.shards import Shards
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
        if not (is_absent(parameter) or bool(finite(parameter))):
            raise not_finite(name, parameter.detach(), whose, model)


def not_finite(name: str, tensor: torch.Tensor, whose: str = "", model: nn.Module | None = None) -> ValueError:
    """The error for a weight that holds NaN or infinity; model: that it is of, whose files tell the cause."""
    bad, stored = int((~tensor.isfinite()).sum()), None if model is None else weights_of(model).in_files(name)
    why = why_not_finite(stored or [], tensor.dtype)
    if not stored and tensor.dtype == torch.float16 and not bool(tensor.isnan().any()):
        why = f"where it was made float16, which ends at 65504, take bfloat16 or float32; else {DAMAGED}"
    return ValueError(f"{whose}{name}: {bad} of {tensor.numel()} values are NaN or infinite: {why}")


def why_not_finite(stored: Sequence[torch.Tensor], dtype: torch.dtype) -> str:
    """Why values are not finite in `dtype` that the files hold as `stored`, and the cure."""

    def hold(dtype: torch.dtype) -> bool:
        return all(bool(finite(value.to(dtype))) for value in stored)

    if not stored or hold(dtype) or not hold(stored[0].dtype):
        return DAMAGED
    used, own = (str(kind).removeprefix("torch.") for kind in (dtype, stored[0].dtype))
    wider = ["bfloat16"] * (own != "bfloat16" and hold(torch.bfloat16)) + ["float32"] * (own == "float64")
    wider = [name for name in wider if name != used and hold(getattr(torch, name))]
    most = max(float(torch.linalg.vector_norm(value.double(), torch.inf)) for value in stored)
    return (
        f"the files are whole, they hold {own} up to {most:.4g}, which {used} (up to {torch.finfo(dtype).max:.6g}) "
        f"cannot: load the model in {' or '.join([*wider, own])} (--dtype)"
    )


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

    def in_files(self, name: str) -> list[torch.Tensor]:
        """What the files that the model was loaded from hold of a parameter; empty where that is not known."""
        if self.directory is None:
            return []
        try:
            shards = Shards(self.directory)
            return [shards[piece.stored] for piece in stored_parameters(self._model, shards).sources[name]]
        except (ValueError, LookupError, OSError):  # they are others now
            return []

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

    def views(self) -> Mapping[str, torch.Tensor]:
        """The same, without a copy of what is in memory: the tensors themselves, which a later training changes."""
        return self

    @torch.no_grad()
    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """These tensors, by parameter name, become the model's weights."""
        for name in values:
            self._parameters[name].copy_(values[name])

    def check_saved(self, directory: Path, cast: bool = False) -> None:
        """ValueError unless the directory holds the model, as of `files.readback.check_model`."""
        check_model(self._model, directory, cast)

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
