"""y = act(gate) * up in plain torch: the truth for the kernels, and the path on a CPU.

In the inputs' dtype, each operation rounded as a model's own MLP rounds it: the same bits.
"""

from __future__ import annotations

import torch


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate) * up`, all of one shape and dtype. activation: "silu", "gelu_tanh" or "gelu_none"."""
    return _activated(gate, activation).mul_(up)


def gated_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    need_gate: bool = True,
    need_up: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dgate, dup) = (dy * up * act'(gate), dy * act(gate)); None for the one not asked for. Only dgate needs `up`."""
    dgate = _activation_backward(dy * up, gate, activation) if need_gate else None
    dup = _activated(gate, activation).mul_(dy) if need_up else None
    return dgate, dup


def gated_backward_(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """Writes dgate over gate and dup over up: one temporary of their size."""
    dup = _activated(gate, activation).mul_(dy)
    _activation_backward(up.mul_(dy), gate, activation, out=gate)
    up.copy_(dup)


def _activated(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate=activation.removeprefix("gelu_"))


def _activation_backward(
    dy: torch.Tensor, gate: torch.Tensor, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    if activation == "silu":
        run, options = torch.ops.aten.silu_backward, {}
    else:
        run, options = torch.ops.aten.gelu_backward, {"approximate": activation.removeprefix("gelu_")}
    return run(dy, gate, **options) if out is None else run.grad_input(dy, gate, **options, grad_input=out)
