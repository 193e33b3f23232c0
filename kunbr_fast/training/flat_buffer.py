"""A block's weights, gradients and optimiser state in flat vectors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence

import torch

from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.kernels.optimizers.op import BETAS, AdamW, Lion, TorchAdamW, Watched

logger = logging.getLogger(__name__)
_warned: set[str] = set()

OPTIMIZERS = ("lion", "adamw")
OPTIMIZER_DEVICES = ("device", "host")
HALF = (torch.float16, torch.bfloat16)


def make_optimizer(
    name: str,
    params: Iterable[torch.Tensor],
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    *,
    impl: str = "auto",
    seed: int | None = None,
) -> Watched:
    """`lion` or `adamw` over `params`; betas default to (0.9, 0.99) and (0.9, 0.999). seed: of stochastic rounding of
    bf16 parameters, whose state is then in fp32.

    Where impl comes to torch, AdamW is `torch.optim.AdamW(fused=True)`, one pass too; it rounds to nearest alone.
    """
    check_optimizer(name)
    params = list(params)
    betas = tuple(betas) if betas is not None else BETAS[name]
    if seed is not None:
        kind = Lion if name == "lion" else AdamW
        return kind(params, lr, betas, weight_decay, state_dtype=torch.float32, seed=seed, impl=impl)
    if name == "lion":
        return Lion(params, lr, betas, weight_decay, impl=impl)
    if impl not in ("cuda", "triton") and all(
        resolve(name, impl, param.device, param.dtype, size=param.numel()) == "torch" for param in params
    ):
        return TorchAdamW(params, lr, betas, weight_decay)
    return AdamW(params, lr, betas, weight_decay, impl=impl)


@torch.no_grad()
def warn_if_updates_vanish(params: Sequence[torch.Tensor], lr: float, cure: str) -> None:
    """Logs, once for each dtype and learning rate, that most updates of half-precision weights will be rounded away.

    Lion and AdamW move a weight by about `lr`. Values of a float format lie at least eps/2 of themselves apart, so what
    is below eps/4 of a weight (2^-9 in bf16) never changes it. Judged by the median weight.
    """
    dtype = params[0].dtype
    if dtype not in HALF:
        return
    stride = 1 + sum(p.numel() for p in params) // 2**20  # a million weights tell the median
    median = float(torch.cat([p.detach().flatten()[::stride] for p in params]).float().abs().median())
    if lr < median * torch.finfo(dtype).eps / 4 and f"{dtype} {lr}" not in _warned:
        _warned.add(f"{dtype} {lr}")
        logger.warning(
            f"learning rate {lr:g}: in {dtype} most of its updates are rounded away (the median weight is "
            f"{median:.2g}), so there is little or no training: {cure}"
        )


def check_optimizer(name: str) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In main memory, with a storage of its own; pinned where the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").copy_(tensor)


class FlatBuffer:
    """The active block's weights as one contiguous vector; its parameters are views of it.

    One optimiser update is then one pass over one vector. Gradients accumulate in a second vector; the parameters'
    `.grad` are views of that. master: with half-precision weights, an fp32 copy that the optimiser updates: at a weight
    of 0.02 bf16 steps are 1.2e-4 wide, so smaller updates would be rounded away.
    mask: for each parameter a bool tensor of its shape, or None for all True. Weights where it is False keep their
    bits, whatever the optimiser (weight decay too). Costs a byte a weight, and a copy of the kept weights.
    optimizer_device: "host" keeps what only the update needs (the weights that the optimiser updates, its state, the
    mask) in main memory. A step copies the gradient there and the weights back, through pinned memory where the model
    is on a GPU. `state` is the same either way.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        values: list[torch.Tensor],
        master: bool,
        mask: Sequence[torch.Tensor | None] | None = None,
        optimizer_device: str = "device",
    ):
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
        # what the update reads and writes: these, or their copies on the host
        self._updated, self._update_grad = self.weights, self.grad
        self.on_host = optimizer_device == "host"
        if self.on_host:
            self._updated, self._update_grad = _host_copy(self.weights), _host_copy(self.grad)
        self.master = self._updated.float() if master and first.dtype in HALF else None
        self.param = torch.nn.Parameter(self._updated if self.master is None else self.master)
        if self.master is None:
            self.param.grad = self._update_grad
        self._fixed: torch.Tensor | None = None  # (numel,) bool: the mask's opposite
        if mask is not None:
            self._fixed = torch.zeros(self.numel, dtype=torch.bool, device=self.param.device)
            for view, part in zip(self.views(self._fixed), mask):
                if part is not None:
                    view.copy_(part).logical_not_()
            self._keep()

    def _keep(self) -> None:
        if self._fixed is not None:
            self._kept = self.param.detach()[self._fixed]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` cut into the parameters' shapes (no copy)."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def step(self, optimizer: Watched) -> None:
        """One update from the accumulated gradient, which is then zero again."""
        grad, half = self._update_grad, None if self.master is None else self._updated
        if self.on_host:
            grad.copy_(self.grad)
        if self._fixed is not None:  # so that no state grows for these weights
            grad.masked_fill_(self._fixed, 0.0)
        optimizer.update(grad, half)
        if self._fixed is not None:  # weight decay asks for no gradient
            self.param.data.masked_scatter_(self._fixed, self._kept)
            if half is not None:
                half.masked_scatter_(self._fixed, self._kept.to(half.dtype))
        if self.on_host:
            self.weights.copy_(self._updated)
        self.grad.zero_()

    def twin(self) -> FlatBuffer:
        """A second set of weights, for the same parameters, gradient and mask; `take` fills it. The parameters stay
        views of the first one's."""
        twin = copy.copy(self)
        twin.weights = torch.empty_like(self.weights)
        twin._updated = _host_copy(self.weights) if self.on_host else twin.weights
        twin.master = None if self.master is None else torch.empty_like(self.master)
        twin.param = torch.nn.Parameter(twin._updated if twin.master is None else twin.master)
        if twin.master is None:
            twin.param.grad = self._update_grad
        return twin

    @torch.no_grad()
    def take(self, other: FlatBuffer) -> None:
        """The other's weights."""
        self.load(other.state())

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides the optimiser's own state."""
        return {"weights": self.weights} if self.master is None else {"weights": self.weights, "master": self.master}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        self._updated.copy_(state["weights"])
        if self.master is not None:
            self.master.copy_(state["master"])
        if self.on_host:
            self.weights.copy_(self._updated)
        self._keep()
