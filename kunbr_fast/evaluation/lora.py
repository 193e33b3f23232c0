"""Fine-tuning by LoRA (arXiv 2106.09685) on any decoder of ours, with no PEFT.

A linear layer of the decoder (of a mixture neither router nor experts, which are no linear layers) has W = W0 + s B A
with A (r, K) and B (N, r), of which A and B are trained. The model runs on W itself, one dense matrix, so every forward
and backward pass is what it is without LoRA. From the gradient of W come those of A and B, exactly:

    dA = s B^T dW,    dB = s dW A^T

That costs the memory of dW, which LoRA elsewhere saves, and leaves every kernel and every kind of layer as it is. A and
B begin as in PEFT: A uniform in +-1 / sqrt(K), B 0; no dropout. In half precision W0 + s B A is rounded to W's dtype at
each step; A, B and their gradients are in fp32.

Of a streamed model W is made of W0 each time that a layer has come into place, and dW of one layer at a time is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.density.roles import in_attention
from kunbr_fast.files.shown import shown
from kunbr_fast.memory import Place, gibibytes
from kunbr_fast.model import compat
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.fine_tune import fine_tune
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import Execution, FullSettings
from kunbr_fast.training.streamed import GradientsOnTheWay
from kunbr_fast.training.training import Training
from kunbr_fast.training.updates import Updates

SCALE = 2.0  # s = alpha / r, of alpha = 2 r
GROUPS = ("all", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank: r. targets: which linear layers have an adapter: of GROUPS, or names such as q_proj."""

    rank: int = 8
    targets: tuple[str, ...] = ("all",)

    def linears(self, decoder: Decoder) -> list[tuple[int, nn.Module]]:
        """Those of the decoder that are meant, with the number of their layer. ValueError for a target that is none."""
        known = [
            (number, path, module)
            for number, layer in enumerate(decoder.layers)
            for path, module in layer.named_modules()
            if type(module) in (nn.Linear, compat.Conv1D)
        ]
        if not known:
            raise ValueError(f"{decoder.name}: LoRA takes nn.Linear and Conv1D, and its layers have none")
        found: dict[int, tuple[int, nn.Module]] = {}  # a tied weight has one adapter
        for number, path, module in known:
            if any(_names(target, decoder.layers[number], path) for target in self.targets):
                found.setdefault(id(module.weight), (number, module))
        for target in self.targets:
            if not any(_names(target, decoder.layers[number], path) for number, path, _ in known):
                names = dict.fromkeys(path.rpartition(".")[2] for _, path, _ in known)
                raise ValueError(
                    f"lora_targets={shown(target)}: {decoder.name}'s layers have no linear layer of that name: "
                    f"expected some of {', '.join((*GROUPS, *names))}"
                )
        return list(found.values())


def _names(target: str, layer: nn.Module, path: str) -> bool:
    """Whether a target means the linear layer at `path` in its decoder layer."""
    if target in GROUPS:
        return target == "all" or in_attention(layer, path) == (target == "attention")
    return f".{path}".endswith(f".{target}")


def chosen_targets(value: Any, name: str = "lora_targets") -> tuple[str, ...]:
    """Of a setting called `name`: one target or several. ValueError for others; which names there are a model says."""
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not found or not all(isinstance(one, str) and one for one in found) or len(set(found)) < len(found):
        raise ValueError(
            f"{name}={shown(value)}: expected one or more different ones of {', '.join(GROUPS)}, or names of linear "
            "layers such as q_proj"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Of a linear layer's parameter, in the decoder layer of that number."""

    layer: int
    parameter: nn.Parameter
    transposed: bool
    a: nn.Parameter
    b: nn.Parameter

    @classmethod
    def of(cls, layer: int, module: nn.Module, rank: int, generator: torch.Generator) -> Adapter:
        transposed, weight = isinstance(module, compat.Conv1D), module.weight
        (rows, columns), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
        if transposed:
            rows, columns = columns, rows
        a = torch.rand(rank, columns, generator=generator, dtype=dtype).mul_(2).sub_(1).div_(columns**0.5)
        b = torch.zeros(rows, rank, dtype=dtype, device=weight.device)
        return cls(layer, weight, transposed, nn.Parameter(a.to(weight.device)), nn.Parameter(b))

    @property
    def weight(self) -> torch.Tensor:
        """(N, K), of the parameter as it is now a view."""
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    @torch.no_grad()
    def take_gradient(self) -> None:
        """From the parameter's, which is gone then."""
        grad = self.parameter.grad.t() if self.transposed else self.parameter.grad
        grad, self.parameter.grad = grad.to(self.a.dtype), None
        self.a.grad, self.b.grad = SCALE * (self.b.t() @ grad), SCALE * (grad @ self.a.t())

    @torch.no_grad()
    def merge(self, base: torch.Tensor) -> None:
        """The parameter becomes `base`, W0, with the adapter."""
        self.weight.copy_(base.to(self.a.dtype) + SCALE * (self.b @ self.a))


class LoraTraining(FullTraining):
    """AdamW on adapters. The weights have them merged in, at any time."""

    def __init__(self, decoder: Decoder, lr: float, seed: int = 0, lora: Lora = Lora(), place: Place | None = None):
        execution = Execution(place=place or Place())
        Training.__init__(self, decoder, Criterion(), FullSettings(lr), execution, "training of LoRA adapters")
        self.criterion.fit(decoder.num_layers)
        self.original_head = None
        generator = torch.Generator().manual_seed(seed)
        self.adapters = [Adapter.of(*at, lora.rank, generator) for at in lora.linears(decoder)]
        self.parameters = {f"{number}": adapter.parameter for number, adapter in enumerate(self.adapters)}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        matrices = {
            f"{number}.{k}": x for number, each in enumerate(self.adapters) for k, x in enumerate((each.a, each.b))
        }
        self.updates = Updates(matrices, self.settings, self.execution.impl)
        self.optimizer = self.updates.optimizer
        self._begin()

    def _begin(self) -> None:
        self._bases = [adapter.weight.clone() for adapter in self.adapters]

    def drop_gradient(self) -> None:
        for parameter in (*self.parameters.values(), *self.updates.parameters.values()):
            parameter.grad = None

    def _update(self) -> None:
        for adapter in self.adapters:
            if adapter.parameter.grad is not None:
                adapter.take_gradient()
        self.updates.step()
        for adapter, base in zip(self.adapters, self._bases):
            adapter.merge(base)

    def _memory(self) -> tuple[str, list[str]]:
        adapters = sum(x.nbytes for x in self.updates.parameters.values())
        what = f"LoRA adapters {gibibytes(adapters)}, their optimiser state, and the gradients of the weights"
        return what, ["shorter samples (max_length)", "a lower rank"]

    def state(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError("an attack is made again, not resumed")


class StreamedLora(GradientsOnTheWay, LoraTraining):
    """`LoraTraining` of a streamed model, layer by layer: W0 comes twice a step, nothing goes. The same bits.

    changed: to be called when the adapters are others (of `transformed`).
    """

    changed: Callable[[], None]

    def _begin(self) -> None:
        """A layer's W0 comes with it."""

    def merge(self, layer: int) -> None:
        """Into the weights of a layer that have come into place."""
        for adapter in self._of(layer):
            adapter.merge(adapter.weight)

    def _of(self, layer: int) -> list[Adapter]:
        return [adapter for adapter in self.adapters if adapter.layer == layer]

    def _passes(self, steps: list[StepBatch]) -> list[PartLoss]:
        lowest = min(adapter.layer for adapter in self.adapters)
        return self._layer_by_layer(steps, lowest, leave=self._leave)[0]

    def _probe(self, step: StepBatch) -> PartLoss:
        return self._passes([step])[0]

    def _leave(self, layer: int) -> None:
        """The gradients of this layer's weights are whole."""
        for adapter in self._of(layer):
            if adapter.parameter.grad is not None:
                self._look([adapter.parameter.grad])
                adapter.take_gradient()

    def _update(self) -> None:
        self.updates.step()
        self.changed()


@contextlib.contextmanager
def _training(decoder: Decoder, *how: Any) -> Iterator[LoraTraining]:
    if not decoder.streamed:
        yield LoraTraining(decoder, *how)
        return
    training = StreamedLora(decoder, *how)
    with decoder.weights.transformed(training.merge) as training.changed:
        yield training


def train_lora(
    decoder: Decoder, samples: Sequence[Any], *, lr: float, lora: Lora = Lora(), place: Place | None = None, **how: Any
) -> None:
    """`train_all` by LoRA. how: of `fine_tune`. A streamed model has the adapters until this returns, one in memory
    keeps them."""
    with frozen(decoder.model), _training(decoder, lr, how.get("seed", 0), lora, place) as training:
        fine_tune(training, samples, **how)
