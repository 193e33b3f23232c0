"""Lion and AdamW as torch optimizers whose update of a parameter is one call of an implementation.

A kernel reads the gradient in its own dtype and writes the weights' half-precision copy in the same pass. It also sees
there whether what it writes is finite, and says so in a flag on the device, which nobody has to wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import dispatch, operators
from . import reference

BETAS = {"lion": (0.9, 0.99), "adamw": (0.9, 0.999)}


class Watched(torch.optim.Optimizer):
    """Knows whether its updates have left finite weights and state: each device has a flag, which an update sets."""

    def flag(self, device: torch.device) -> torch.Tensor:
        """(1,) int32: 1 once an update of parameters on `device` has stored a value that is not finite."""
        flags = self.__dict__.setdefault("_flags", {})
        if device not in flags:
            flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return flags[device]

    def flags(self) -> list[torch.Tensor]:
        """The flags of all devices so far; none before the first update."""
        return list(self.__dict__.get("_flags", {}).values())

    def left_finite(self) -> bool:
        """Whether all updates since `reset_flags` have stored finite values alone. Waits for each device once."""
        return not any(int(flag) for flag in self.flags())

    def reset_flags(self) -> None:
        for flag in self.flags():
            flag.zero_()


class Fused(Watched):
    """The part that both share. `_update(group, number, param, grad, half)` updates one parameter."""

    operation: str
    _update: Callable[[dict, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]

    def __init__(self, params, settings: dict, impl: str, seed: int | None):
        lr, betas, weight_decay = settings["lr"], settings["betas"], settings["weight_decay"]
        largest = torch.finfo(torch.float32).max  # a kernel takes fp32
        if (
            not all(0.0 <= beta < 1.0 for beta in betas)
            or not all(0.0 <= number <= largest for number in (lr, weight_decay, lr * weight_decay))
            or not (self.operation == "lion" or lr / (1 - betas[0]) <= largest)
        ):
            raise ValueError(
                f"lr={lr}, betas={tuple(betas)}, weight_decay={weight_decay}: expected lr and weight_decay of at "
                "least 0, with a product and a first step that fp32 holds, and betas within [0, 1)"
            )
        super().__init__(params, {**settings, "betas": tuple(betas), "impl": impl, "seed": seed})
        for group in self.param_groups:
            seed = group["seed"]
            if seed is not None and not 0 <= seed < 2**62:
                raise ValueError(f"seed={seed}: expected 0 to 2**62 - 1")
            for param in group["params"]:
                dtype = param.dtype
                dispatch.resolve(self.operation, group["impl"], param.device, dtype, size=param.numel())
                if seed is not None and dtype != torch.bfloat16:
                    raise TypeError(f"seed={seed}: stochastic rounding is for bfloat16 parameters, this one is {dtype}")

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
        """This step's number, from 1. Kept on the host, so that nothing is read back from a device, and as a float, as
        torch's AdamW keeps it in a checkpoint."""
        number = int(state.get("step", 0)) + 1  # a tensor, once, after a checkpoint
        state["step"] = float(number)
        return number

    def _run(self, group: dict, number: int, tensors: list[torch.Tensor], *values, half, **options) -> None:
        # each parameter has random bits of its own
        seed = None if group["seed"] is None else group["seed"] + number
        chosen, run = implementation(self.operation, tensors[0], group["impl"])
        if chosen != "torch":
            for tensor in (*tensors, *([] if half is None else [half])):
                if not tensor.is_contiguous():
                    raise ValueError(
                        f'{self.operation}: impl="{chosen}" serves contiguous tensors, got strides {tensor.stride()} '
                        f"for {tuple(tensor.shape)}: make the parameter and its gradient contiguous, or use "
                        'impl="torch"'
                    )
        bad = self.flag(tensors[0].device)
        run(*tensors, *values, half=half, seed=seed, bad=bad, **options)
        if chosen != "torch":
            operators.count_write([tensors[0], *tensors[2:], bad, *([] if half is None else [half])])


class Lion(Fused):
    """Lion (arXiv 2302.06675): `p -= lr * (sign(b1*m + (1-b1)*g) + wd*p)`, then `m = b2*m + (1-b2)*g`.

    The momentum has the parameter's dtype, or `state_dtype`. `lr` is the size of every element's step, whatever the
    gradient's. seed: bf16 parameters are rounded stochastically, by bits that depend on seed, step and place alone
    (else to nearest, which loses updates below 2^-9 of a weight). impl: "auto", "cuda", "triton" or "torch".

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


class AdamW(Fused):
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


class TorchAdamW(Watched, torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, one pass over memory too, and a second one that reads, for the flag."""

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._note(param, param)
        return loss

    @torch.no_grad()
    def update(self, grad: torch.Tensor, half: torch.Tensor | None = None) -> None:
        """As `Fused.update`; the gradient is first cast to the parameter's dtype."""
        ((param,),) = (group["params"] for group in self.param_groups)
        param.grad = grad.to(param.dtype)
        super().step()
        if half is not None:
            half.copy_(param)
        self._note(param, param if half is None else half)

    def _note(self, param: torch.Tensor, written: torch.Tensor) -> None:
        # as in `reference.adamw_`
        reference.note_not_finite(self.flag(param.device), written, self.state[param]["exp_avg_sq"])


def implementation(operation: str, param: torch.Tensor, impl: str) -> tuple[str, Callable[..., None]]:
    """The implementation's name, and its update of `operation`."""
    chosen = dispatch.resolve(operation, impl, param.device, param.dtype, size=param.numel())
    if chosen == "torch":
        module = reference
    elif chosen == "cuda":
        from . import cuda as module
    else:
        from . import triton_kernel as module
    return chosen, getattr(module, f"{operation}_")
