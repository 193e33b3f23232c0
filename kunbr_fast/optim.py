"""Optimisers, and the flat buffer that holds the active block.

Lion and AdamW are written here, with one launch a step where a kernel serves them: the gradient is read in its own
dtype, and the weights' half-precision copy written, in the same pass. Without a kernel AdamW is torch's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from kunbr_fast import dispatch
from kunbr_fast.kernels import reference

logger = logging.getLogger(__name__)
_warned: set[str] = set()

OPTIMIZERS = ("lion", "adamw")
OPTIMIZER_DEVICES = ("device", "host")
BETAS = {"lion": (0.9, 0.99), "adamw": (0.9, 0.999)}


class _Fused(torch.optim.Optimizer):
    """An optimiser whose update of one parameter is one call, `_update(group, number, param, grad, half)`."""

    operation: str
    _update: Callable[[dict, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]

    def __init__(self, params, settings: dict, impl: str, seed: int | None):
        lr, betas, weight_decay = settings["lr"], settings["betas"], settings["weight_decay"]
        if not lr >= 0.0 or not weight_decay >= 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={tuple(betas)}, weight_decay={weight_decay}: expected lr and weight_decay of at "
                "least 0, and betas within [0, 1)"
            )
        super().__init__(params, {**settings, "betas": tuple(betas), "impl": impl, "seed": seed})
        for group in self.param_groups:
            for param in group["params"]:
                _check(self.operation, param, group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(group, number, param, param.grad, None)
                number += 1
        return loss

    @torch.no_grad()
    def update(self, grad: torch.Tensor, half: torch.Tensor | None = None) -> None:
        """`step` for the one parameter that this optimiser has, from a gradient of any dtype. half: becomes a copy of
        the parameter in its own dtype."""
        ((param,),) = (group["params"] for group in self.param_groups)
        self._update(self.param_groups[0], 0, param, grad, half)

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's casts the state to the parameter's dtype; here it keeps its own."""
        super().load_state_dict(state_dict)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, params):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)

    def _count(self, state: dict) -> int:
        """This step's number, from 1. Kept on the host, which needs it and reads nothing back from a device; as a float,
        which torch's AdamW goes on with after a checkpoint."""
        number = int(state.get("step", 0)) + 1  # a tensor, once, after a checkpoint
        state["step"] = float(number)
        return number

    def _run(self, group: dict, number: int, tensors: list[torch.Tensor], *values, half, **options) -> None:
        # each parameter has random bits of its own
        seed = None if group["seed"] is None else group["seed"] + number
        run = _implementation(self.operation, tensors[0], group["impl"])
        if run is not None:
            chosen = "cuda" if run.__module__ == "kunbr_fast.cuda_library" else "triton"
            for tensor in (*tensors, *([] if half is None else [half])):
                if not tensor.is_contiguous():
                    raise ValueError(
                        f'{self.operation}: impl="{chosen}" serves contiguous tensors, got strides {tensor.stride()} for '
                        f'{tuple(tensor.shape)}: make the parameter and its gradient contiguous, or use impl="torch"'
                    )
        else:
            run = getattr(reference, f"{self.operation}_")
        run(*tensors, *values, half=half, seed=seed, **options)


class Lion(_Fused):
    """Lion (arXiv 2302.06675): `p -= lr * (sign(b1*m + (1-b1)*g) + wd*p)`, then `m = b2*m + (1-b2)*g`.

    The momentum has the parameter's dtype, or `state_dtype`. `lr` is the size of every element's step, whatever the
    gradient's. seed: bf16 parameters are rounded stochastically, by bits that depend on seed, step and place alone
    (else to nearest, where updates of less than a 2^-9 of a weight are lost). impl: "auto", "cuda", "triton" or "torch".

    ValueError, TypeError for settings that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    """

    operation = "lion"

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = BETAS["lion"],
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        impl: str = "auto",
    ):
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, settings, impl, seed)

    def _update(self, group, number, param, grad, half):
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, dtype=group["state_dtype"])
        # the step's number matters for random bits alone: without them it is no part of the state
        step = 0 if group["seed"] is None else self._count(state)
        tensors = [param, grad, state["momentum"]]
        self._run(group, number, tensors, group["lr"], *group["betas"], group["weight_decay"], half=half, step=step)


class AdamW(_Fused):
    """AdamW (arXiv 1711.05101), as `torch.optim.AdamW`:

        p -= lr * wd * p        m = b1*m + (1-b1)*g        v = b2*v + (1-b2)*g^2
        p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    The moments have the parameter's dtype, or `state_dtype`. All else as in `Lion`.
    """

    operation = "adamw"

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = BETAS["adamw"],
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-8,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        impl: str = "auto",
    ):
        if not eps >= 0.0:
            raise ValueError(f"eps={eps}: expected at least 0")
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "state_dtype": state_dtype}
        super().__init__(params, settings, impl, seed)

    def _update(self, group, number, param, grad, half):
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=group["state_dtype"])
        tensors = [param, grad, state["exp_avg"], state["exp_avg_sq"]]
        values = self._count(state), group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        self._run(group, number, tensors, *values, half=half)


def _check(operation: str, param: torch.Tensor, group: dict) -> None:
    impl, seed = group["impl"], group["seed"]
    dispatch.resolve(operation, impl, param.device, param.dtype)
    if seed is None:
        return
    if param.dtype != torch.bfloat16:
        raise TypeError(f"seed={seed}: stochastic rounding is for bfloat16 parameters, this one is {param.dtype}")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed={seed}: expected 0 to 2**62 - 1")


def _implementation(operation: str, param: torch.Tensor, impl: str) -> Callable[..., None] | None:
    """The kernel's update of `operation`, or None for torch."""
    chosen = dispatch.resolve(operation, impl, param.device, param.dtype)
    if chosen == "torch":
        return None
    if chosen == "cuda":
        from kunbr_fast import cuda_library as lion
    else:
        from kunbr_fast.kernels import lion

    return getattr(lion, f"{operation}_")


def make_optimizer(
    name: str,
    params: Iterable[torch.Tensor],
    lr: float,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    *,
    impl: str = "auto",
) -> torch.optim.Optimizer:
    """`lion` or `adamw` over `params`; betas default to (0.9, 0.99) and (0.9, 0.999).

    Where impl comes to torch, AdamW is `torch.optim.AdamW(fused=True)`, one pass too.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    params = list(params)
    betas = tuple(betas) if betas is not None else BETAS[name]
    if name == "lion":
        return Lion(params, lr, betas, weight_decay, impl=impl)
    if impl not in ("cuda", "triton") and all(_implementation(name, param, impl) is None for param in params):
        return torch.optim.AdamW(params, lr, betas, weight_decay=weight_decay, fused=True)
    return AdamW(params, lr, betas, weight_decay, impl=impl)


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


def check_optimizer_device(where: str) -> None:
    if where not in OPTIMIZER_DEVICES:
        raise ValueError(f"optimizer_device={where!r}: expected one of {', '.join(OPTIMIZER_DEVICES)}")


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In main memory, with a storage of its own; pinned where the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").copy_(tensor)


class FlatBuffer:
    """The active block's weights as one contiguous vector, which its parameters are views of.

    One optimiser update is then one pass over one vector. Gradients accumulate in a second vector of which the
    parameters' `.grad` are views. With half-precision weights `master=True` keeps an fp32 copy that the optimiser
    updates: at a weight of 0.02 bf16 steps are 1.2e-4 wide, so smaller updates would be rounded away.
    mask: for each parameter a bool tensor of its shape, or None for all True; weights where it is False keep their bits,
    whatever the optimiser (weight decay too). Costs a byte a weight, and a copy of the weights that are kept.
    optimizer_device: "host" keeps all that only the update needs (the weights that the optimiser updates, its state, the
    mask) in main memory. A step copies the gradient there and the weights back, through pinned memory where the model is
    on a GPU; weights and gradient are all that stays on the device. `state` is the same either way.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        values: list[torch.Tensor],
        master: bool,
        mask: Sequence[torch.Tensor | None] | None = None,
        optimizer_device: str = "device",
    ):
        check_optimizer_device(optimizer_device)
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
        weights, self._update_grad = self.weights, self.grad
        self.on_host = optimizer_device == "host"
        if self.on_host:
            weights, self._update_grad = _host_copy(self.weights), _host_copy(self.grad)
        self.master = weights.float() if master and first.dtype in (torch.float16, torch.bfloat16) else None
        self._update_half = None if self.master is None else weights
        self.param = torch.nn.Parameter(weights if self.master is None else self.master)
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

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One update from the accumulated gradient, which is then zero again."""
        grad, half = self._update_grad, self._update_half
        if self.on_host:
            grad.copy_(self.grad)
        if self._fixed is not None:  # so that no state grows for these weights
            grad.masked_fill_(self._fixed, 0.0)
        if isinstance(optimizer, _Fused):
            optimizer.update(grad, half)
        elif half is None:
            optimizer.step()
        else:
            self.param.grad = grad.float()
            optimizer.step()
            half.copy_(self.master)
        if self._fixed is not None:  # weight decay asks for no gradient
            self.param.data.masked_scatter_(self._fixed, self._kept)
            if half is not None:
                half.masked_scatter_(self._fixed, self._kept.to(half.dtype))
        if self.on_host:
            self._send()
        self.grad.zero_()

    @torch.no_grad()
    def _send(self) -> None:
        """The updated weights to where the model is."""
        self.weights.copy_(self.param if self._update_half is None else self._update_half)

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides the optimiser's own state."""
        return {"weights": self.weights} if self.master is None else {"weights": self.weights, "master": self.master}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        weights = self.param if self._update_half is None else self._update_half
        weights.copy_(state["weights"])
        if self.master is not None:
            self.master.copy_(state["master"])
        if self.on_host:
            self._send()
        self._keep()
