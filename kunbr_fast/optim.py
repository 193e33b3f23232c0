"""Optimisers, and the flat buffer that holds the active block.

Lion is written here because torch has none; AdamW is torch's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from kunbr_fast.kernels import reference

logger = logging.getLogger(__name__)
_warned: set[str] = set()

OPTIMIZERS = ("lion", "adamw")
BETAS = {"lion": (0.9, 0.99), "adamw": (0.9, 0.999)}


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675): `p -= lr * (sign(b1*m + (1-b1)*g) + wd*p)`, then `m = b2*m + (1-b2)*g`.

    The momentum has the parameter's dtype. `lr` is the size of every element's step, whatever the gradient's.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        if not lr >= 0.0 or not weight_decay >= 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={tuple(betas)}, weight_decay={weight_decay}: expected lr and weight_decay of at "
                "least 0, and betas within [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                reference.lion_(
                    param, param.grad, state["momentum"], group["lr"], *group["betas"], group["weight_decay"]
                )
        return loss


def make_optimizer(
    name: str,
    params: Iterable[torch.Tensor],
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`lion` or `adamw` over `params`; betas default to (0.9, 0.99) and (0.9, 0.999)."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    betas = tuple(betas) if betas is not None else BETAS[name]
    if name == "lion":
        return Lion(params, lr, betas, weight_decay)
    return torch.optim.AdamW(params, lr, betas, weight_decay=weight_decay, fused=True)


@torch.no_grad()
def warn_if_updates_vanish(params: Sequence[torch.Tensor], lr: float, cure: str) -> None:
    """Logs, once for each dtype and learning rate, that most updates of half-precision weights will be rounded away.

    Lion and AdamW move a weight by about `lr`. Values of a float format lie at least eps/2 of themselves apart, so what
    is below eps/4 of a weight (2^-9 in bf16) never changes it. Judged by the median weight.
    """
    dtype = params[0].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return
    stride = 1 + sum(p.numel() for p in params) // 2**20  # a million weights tell the median
    median = float(torch.cat([p.detach().flatten()[::stride] for p in params]).float().abs().median())
    if lr < median * torch.finfo(dtype).eps / 4 and f"{dtype} {lr}" not in _warned:
        _warned.add(f"{dtype} {lr}")
        logger.warning(
            f"learning rate {lr:g}: in {dtype} most of its updates are rounded away (the median weight is {median:.2g}), "
            f"so there is little or no training: {cure}"
        )


class FlatBuffer:
    """The active block's weights as one contiguous vector, which its parameters are views of.

    One optimiser update is then one pass over one vector. Gradients accumulate in a second vector of which the
    parameters' `.grad` are views. With half-precision weights `master=True` keeps an fp32 copy that the optimiser
    updates: at a weight of 0.02 bf16 steps are 1.2e-4 wide, so smaller updates would be rounded away.
    """

    def __init__(self, params: list[torch.nn.Parameter], values: list[torch.Tensor], master: bool):
        if len({(p.dtype, p.device) for p in params}) != 1:
            raise ValueError("the block's parameters differ in dtype or device: cast the model to one dtype first")
        first = params[0]
        self.shapes = [p.shape for p in params]
        self.numel = sum(p.numel() for p in params)
        self.weights = torch.empty(self.numel, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.weights)
        for view, value in zip(self.views(self.weights), values):
            view.copy_(value)
        for param, view, grad in zip(params, self.views(self.weights), self.views(self.grad)):
            param.data, param.grad = view, grad
        self.master = self.weights.float() if master and first.dtype in (torch.float16, torch.bfloat16) else None
        self.param = torch.nn.Parameter(self.weights if self.master is None else self.master)
        if self.master is None:
            self.param.grad = self.grad

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` cut into the parameters' shapes (no copy)."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One update from the accumulated gradient, which is then zero again."""
        if self.master is not None:
            self.param.grad = self.grad.float()
        optimizer.step()
        if self.master is not None:
            self.weights.copy_(self.master)
        self.grad.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides the optimiser's own state."""
        return {"weights": self.weights} if self.master is None else {"weights": self.weights, "master": self.master}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.weights.copy_(state["weights"])
        if self.master is not None:
            self.master.copy_(state["master"])
