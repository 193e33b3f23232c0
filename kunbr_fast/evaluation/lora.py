"""Fine-tuning by LoRA (arXiv 2106.09685) on any decoder of ours, with no PEFT.

Each linear layer of the decoder (of a mixture neither router nor experts, which are no linear layers) has W = W0 +
s B A with A (r, K) and B (N, r), of which A and B are trained. The model runs on W itself, one dense matrix, so every
forward and backward pass is what it is without LoRA. From the gradient of W come those of A and B, exactly:

    dA = s B^T dW,    dB = s dW A^T

That costs the memory of dW, which LoRA elsewhere saves, and leaves every kernel and every kind of layer as it is. A and
B begin as in PEFT: A uniform in +-1 / sqrt(K), B 0; no dropout. In half precision W0 + s B A is rounded to W's dtype at
each step; A, B and their gradients are in fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from kunbr_fast.model import compat
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training.fine_tune import fine_tune
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import Execution, FullSettings
from kunbr_fast.training.training import Training
from kunbr_fast.training.updates import Updates

RANK, SCALE = 8, 2.0  # s = alpha / r, of alpha = 16


@dataclasses.dataclass
class Adapter:
    """Of a linear layer's parameter. weight, base: (N, K), of the parameter a view, and a copy of what it was."""

    parameter: nn.Parameter
    transposed: bool
    weight: torch.Tensor
    base: torch.Tensor
    a: nn.Parameter
    b: nn.Parameter

    @classmethod
    def of(cls, module: nn.Module, generator: torch.Generator) -> Adapter:
        transposed = isinstance(module, compat.Conv1D)
        weight = module.weight.detach()
        weight = weight.t() if transposed else weight
        (rows, columns), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
        a = torch.rand(RANK, columns, generator=generator, dtype=dtype).mul_(2).sub_(1).div_(columns**0.5)
        b = torch.zeros(rows, RANK, dtype=dtype, device=weight.device)
        trained = nn.Parameter(a.to(weight.device)), nn.Parameter(b)
        return cls(module.weight, transposed, weight, weight.clone(), *trained)

    @torch.no_grad()
    def take_gradient(self) -> None:
        """From the parameter's, which is gone then."""
        grad = self.parameter.grad.t() if self.transposed else self.parameter.grad
        grad, self.parameter.grad = grad.to(self.a.dtype), None
        self.a.grad, self.b.grad = SCALE * (self.b.t() @ grad), SCALE * (grad @ self.a.t())

    @torch.no_grad()
    def write(self) -> None:
        self.weight.copy_(self.base.to(self.a.dtype) + SCALE * (self.b @ self.a))


class LoraTraining(FullTraining):
    """AdamW on adapters of every linear layer. The weights have them merged in, at any time."""

    def __init__(self, decoder: Decoder, lr: float, seed: int = 0):
        Training.__init__(self, decoder, Criterion(), FullSettings(lr), Execution(), "training of LoRA adapters")
        self.criterion.fit(decoder.num_layers)
        self.original_head = None
        generator = torch.Generator().manual_seed(seed)
        linears = [module for module in decoder.layers.modules() if type(module) in (nn.Linear, compat.Conv1D)]
        if not linears:
            raise ValueError(f"{decoder.name}: LoRA takes nn.Linear and Conv1D, and its layers have none")
        different = {id(module.weight): module for module in linears}.values()  # a tied weight has one adapter
        self.adapters = [Adapter.of(module, generator) for module in different]
        self.parameters = {f"{number}": adapter.parameter for number, adapter in enumerate(self.adapters)}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        matrices = [matrix for adapter in self.adapters for matrix in (adapter.a, adapter.b)]
        trained = {f"{number}": matrix for number, matrix in enumerate(matrices)}
        self.updates = Updates(trained, self.settings, self.execution.impl)
        self.optimizer = self.updates.optimizer

    def _update(self) -> None:
        used = [adapter for adapter in self.adapters if adapter.parameter.grad is not None]
        for adapter in used:
            adapter.take_gradient()
        super()._update()
        for adapter in used:
            adapter.write()

    def state(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError("an attack is made again, not resumed")


def train_lora(decoder: Decoder, samples: Any, *, lr: float, **how: Any) -> None:
    """`train_all` by LoRA. how: of `fine_tune`."""
    with frozen(decoder.model):
        fine_tune(LoraTraining(decoder, lr, how.get("seed", 0)), samples, **how)
