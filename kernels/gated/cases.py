"""What the proof of SwiGLU and GeGLU runs. Sizes are elements of gate; a call is a forward and its backward."""

from __future__ import annotations

import torch

from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op

TIMED_ROWS, TIMED_WIDTH = (512, 2048, 8192), 14336


def kinds(operation: str) -> list[Kind]:
    activations = ("silu",) if operation == "swiglu" else ("gelu_tanh", "gelu_none")
    cases = []
    for activation in activations:
        cases += [
            _case(activation, (3, 5, 123), "new"),
            _case(activation, (40, 1032), "over"),  # written over gate and up
            _case(activation, (3, 1025), "up"),
            _case(activation, (5, 130), "apart"),
            _case(activation, (2, 3, 61), "packed"),
            _case(activation, (9, 512), "packed over"),
        ]
    return [Kind(operation, "triton", cases, [_shape(activations[0], rows) for rows in TIMED_ROWS])]


def _call(activation: str, impl: str, *tensors: torch.Tensor) -> torch.Tensor:
    if activation == "silu":
        return op.swiglu(*tensors, impl=impl)
    return op.geglu(*tensors, approximate=activation.removeprefix("gelu_"), impl=impl)


def _results(activation: str, impl: str, inputs: Tensors, way: str) -> Tensors:
    """way: "new": gradients of leaves; "over": of results, which are overwritten; "up": up's alone; "apart": of a
    gate whose rows lie further apart than up's; "packed": of one
    tensor that holds both."""
    gate, up, dy = inputs["gate"], inputs["up"], inputs["dy"]
    if way.startswith("packed"):
        leaf = torch.cat((gate, up), -1).requires_grad_()
        y = _call(activation, impl, leaf * 1 if way.endswith("over") else leaf)
        dgate, dup = torch.autograd.grad(y, leaf, dy)[0].chunk(2, -1)
        return {"y": y, "dgate": dgate, "dup": dup}
    if way == "up":
        y = _call(activation, impl, gate.detach(), up.requires_grad_())
        return {"y": y, "dup": torch.autograd.grad(y, up, dy)[0]}
    if way == "apart":
        gate = torch.cat((gate, up), -1)[..., : gate.shape[-1]]
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    y = _call(activation, impl, *([leaf * 1 for leaf in leaves] if way == "over" else leaves))
    return dict(zip(("y", "dgate", "dup"), (y, *torch.autograd.grad(y, leaves, dy))))


def _case(activation: str, shape: tuple[int, ...], way: str) -> Case:
    def draw(dtype):
        generator = torch.Generator().manual_seed(0)
        return {name: (2 * torch.randn(shape, generator=generator)).to(dtype) for name in ("gate", "up", "dy")}

    names = ("y", "dup") if way == "up" else ("y", "dgate", "dup")
    return Case(
        f"{activation}, {'x'.join(map(str, shape))}, {way}", draw,
        lambda impl, inputs: _results(activation, impl, inputs, way),
        lambda inputs, truth: floors(activation, inputs, truth), truth=lambda inputs: _truth(activation, inputs, names),
        stranger=Stranger("gate", 0, dict.fromkeys(names, slice(1, None))),
    )  # fmt: skip


def _truth(activation: str, inputs: Tensors, names: tuple[str, ...]) -> Tensors:
    """In fp64. The tanh form by way of a sigmoid, equal but without the difference of nearly equal numbers."""
    gate, up = (inputs[name].detach().double().requires_grad_() for name in ("gate", "up"))
    if activation == "gelu_none":
        act = torch.nn.functional.gelu(gate)
    else:
        z = gate if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        act = gate * torch.sigmoid(z)
    y = act * up
    found = dict(zip(("y", "dgate", "dup"), (y.detach(), *torch.autograd.grad(y, (gate, up), inputs["dy"].double()))))
    return {name: found[name] for name in names}


def floors(activation: str, inputs: Tensors, truth: Tensors) -> Tensors:
    """One rounding of each result to its dtype (a whole eps where Triton's interpreter cuts bf16 off), and that of fp32
    arithmetic: exp(-z) is off by |z| roundings and a few, and so is s = 1 / (1 + exp(-z)), relatively; 1 - s is off by
    as much of s."""
    g, u, d = (inputs[name].detach().double() for name in ("gate", "up", "dy"))
    if activation == "gelu_none":
        phi = torch.exp(-g * g / 2) / (2 * torch.pi) ** 0.5
        act, slope = 4 * EPS * g.abs(), 4 * EPS * (1 + g.abs() * phi * (2 + g * g))
    else:
        z, dz = g, torch.ones_like(g)
        if activation == "gelu_tanh":
            c = 2 * (2 / torch.pi) ** 0.5
            z, dz = c * (g + 0.044715 * g**3), c * (1 + 3 * 0.044715 * g * g)
        off = 4 * EPS * (1 + z.abs()) * torch.sigmoid(z)
        act, slope = off * g.abs(), off * (1 + 2 * (g * dz).abs())
    found = {"y": act * u.abs(), "dgate": slope * (d * u).abs(), "dup": act * d.abs()}
    dtype = inputs["gate"].dtype
    info, rounding = torch.finfo(dtype), 1.0 if dtype == torch.bfloat16 and g.device.type == "cpu" else 0.5
    return {name: found[name] + rounding * info.eps * truth[name].abs() + info.tiny * info.eps for name in truth}


def _shape(activation: str, rows: int) -> Shape:
    def draw(device, dtype):
        return {name: torch.randn(rows, TIMED_WIDTH, device=device).to(dtype) for name in ("gate", "up", "dy")}

    def run(impl, inputs):
        return _results(activation, impl, {name: t.detach() for name, t in inputs.items()}, "new")

    return Shape(rows * TIMED_WIDTH, draw, run)
