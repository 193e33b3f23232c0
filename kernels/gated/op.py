"""Gated activations, y = act(gate) * up: only gate and up are saved, and the backward writes over them.

A model's own `act(gate) * up` saves three tensors (gate, act(gate), up), and its backward makes more. Here the backward
computes act(gate) again and writes dgate over gate and dup over up. Saved per element: two values; one if only up's
gradient is asked for; none if neither is.

The backward overwrites gate and up if
  - they are results, not leaves or views of leaves, each in memory of its own;
  - no saved-tensor hooks are active (autograd checks versions only without hooks; recomputing and offloading use them);
  - both gradients are asked for, and the graph is not retained.
Else dgate and dup are new tensors. Overwriting counts in autograd's version counters: if another operation saved gate,
up or a view of their memory, its later backward raises "modified by an inplace operation". A caller's own references
to gate and up (a forward hook's, say) hold gradients afterwards: clone what you want to look at.

Under torch.compile nothing is overwritten: the compiler plans memory itself.
"""

import functools
import math
import weakref

import torch

from .. import operators
from ..checks import apart, floating, one_of, same_kind
from . import reference


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, impl: str = "auto") -> torch.Tensor:
    """`silu(gate) * up`; with one tensor (..., 2*N), gate in its first half (Phi-3): `silu(g) * u`, (..., N).

        gate, up = gate_up.chunk(2, dim=-1)                       # where `up` is not given
        torch.nn.functional.silu(gate) * up

    gate, up: one shape (..., N), dtype (bf16, fp16, fp32, fp64) and device, any strides. The packed form gives one
    gradient, of the packed tensor, with no concatenation. impl="triton" computes in fp32 and rounds once; "torch"
    rounds each operation, which gives the bits of a model's own MLP.

    The backward may write over gate and up: see the module docstring. It cannot be differentiated again:
    create_graph=True raises RuntimeError. Under torch.autocast nothing changes: both come in one dtype from autocast's
    projections.
    TypeError, ValueError for arguments that do not fit; `dispatch.Unavailable` for an impl that cannot run here.
    """
    return _gated("swiglu", gate, up, "silu", impl)


def geglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "tanh", impl: str = "auto"
) -> torch.Tensor:
    """`gelu(gate, approximate) * up`, as `swiglu` in all else. approximate: "tanh" (gelu_pytorch_tanh) or "none"."""
    one_of("approximate", approximate, ("tanh", "none"))
    return _gated("geglu", gate, up, f"gelu_{approximate}", impl)


def _gated(operation: str, gate: torch.Tensor, up: torch.Tensor | None, activation: str, impl: str) -> torch.Tensor:
    _check(operation, gate, up)
    triton = operators.choose(operation, impl, gate) == "triton"
    if up is None:
        return _Packed.apply(gate, activation, triton)
    return _Gated.apply(gate, up, activation, triton)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, triton):
        need_gate, need_up = ctx.needs_input_grad[:2]
        ctx.activation, ctx.triton = activation, triton
        ctx.saved = _references(gate, up) if need_gate and need_up else ()
        ctx.save_for_backward(gate if need_gate or need_up else None, up if need_gate else None)
        return _forward(gate, up, activation, triton)

    @staticmethod
    def backward(ctx, dy):
        _refuse_create_graph()
        gate, up = ctx.saved_tensors
        need_gate, need_up = ctx.needs_input_grad[:2]
        if _may_overwrite(ctx, dy, gate, up):
            _backward_(dy, gate, up, ctx.activation, ctx.triton)
            return gate.detach(), up.detach(), None, None
        if not ctx.triton:
            return *reference.gated_backward(dy, gate, up, ctx.activation, need_gate, need_up), None, None
        found = _gated_backward(dy, gate, up, ctx.activation, need_gate, need_up)
        return found[0] if need_gate else None, found[-1] if need_up else None, None, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, activation, triton):
        ctx.activation, ctx.triton = activation, triton
        ctx.saved = _references(gate_up) if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(gate_up if ctx.needs_input_grad[0] else None)
        return _forward(*gate_up.chunk(2, -1), activation, triton)

    @staticmethod
    def backward(ctx, dy):
        _refuse_create_graph()
        (gate_up,) = ctx.saved_tensors
        if _may_overwrite(ctx, dy, gate_up):
            _backward_(dy, *gate_up.chunk(2, -1), ctx.activation, ctx.triton)
            return gate_up.detach(), None, None
        if ctx.triton:
            return _gated_packed_backward(dy, gate_up, ctx.activation), None, None
        out = gate_up.clone(memory_format=torch.contiguous_format)
        reference.gated_backward_(dy, *out.chunk(2, -1), ctx.activation)
        return out, None, None


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str, triton: bool) -> torch.Tensor:
    if triton:
        return _gated_forward(gate, up, activation)
    return operators.result(reference.gated(gate, up, activation))


def _backward_(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, triton: bool) -> None:
    if triton:
        _gated_backward_(dy, gate, up, activation)
    else:
        reference.gated_backward_(dy, gate, up, activation)


def _refuse_create_graph() -> None:
    """torch's once_differentiable raises later, and drops second derivatives where dy is a constant."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(
            "swiglu and geglu cannot be differentiated twice: leave out create_graph=True, or use act(gate) * up"
        )


# ---------------------------------------------------------------- what may be overwritten


def _references(*tensors: torch.Tensor) -> tuple:
    """Weak references to inputs that the backward may overwrite, or () if it may not: see the module docstring."""
    if torch.compiler.is_compiling() or not all(map(_is_a_result, tensors)) or not apart(*tensors):
        return ()
    return tuple(map(weakref.ref, tensors))


def _is_a_result(x: torch.Tensor) -> bool:
    """Of an operation, not made by a caller; no two elements in one place, and viewable as (rows, N)."""
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        return False
    rows = _rows_or_none(x)
    return rows is not None and rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]


# torch 2.4 cannot tell, so there nothing is overwritten
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _may_overwrite(ctx, dy: torch.Tensor, *saved: torch.Tensor) -> bool:
    """Asked in the backward. A saved-tensor hook returns another tensor object than the saved one."""
    if not ctx.saved or _keeps_graph():
        return False
    return all(reference() is x for reference, x in zip(ctx.saved, saved)) and apart(dy, *saved)


def _rows_or_none(x: torch.Tensor) -> torch.Tensor | None:
    """x (..., N) as (rows, N) without a copy, or None where its strides do not allow that."""
    try:
        return x.view(math.prod(x.shape[:-1]), x.shape[-1])
    except RuntimeError:
        return None


def _check(operation: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    floating(f"{operation}: gate", gate)
    if gate.dim() == 0:
        raise ValueError(f"{operation}: gate has no dimension, expected (..., N)")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{operation}: one tensor {tuple(gate.shape)} with an odd last dimension: expected (..., 2*N), gate "
                "then up, or give `up` too"
            )
        return
    same_kind(f"{operation}: gate", gate, "up", up)
    if up.shape != gate.shape:
        raise ValueError(f"{operation}: gate is {tuple(gate.shape)} and up {tuple(up.shape)}: expected equal shapes")


# ---------------------------------------------------------------- the operators (impl="triton")


_define = functools.partial(operators.define, __package__)
_gated_forward = _define("gated_forward", "(Tensor gate, Tensor up, str activation) -> Tensor", "forward")
_gated_backward = _define(
    "gated_backward",
    "(Tensor dy, Tensor gate, Tensor? up, str activation, bool need_gate, bool need_up) -> Tensor[]",
    "backward",
)
_gated_packed_backward = _define(
    "gated_packed_backward", "(Tensor dy, Tensor gate_up, str activation) -> Tensor", "packed_backward"
)
_gated_backward_ = _define(
    "gated_backward_", "(Tensor dy, Tensor(a!) gate, Tensor(b!) up, str activation) -> ()", "backward_", ("gate", "up")
)


@_gated_forward.register_fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@_gated_backward.register_fake
def _(dy, gate, up, activation, need_gate, need_up):
    return [gate.new_empty(gate.shape) for _ in range(need_gate + need_up)]


@_gated_packed_backward.register_fake
def _(dy, gate_up, activation):
    return gate_up.new_empty(gate_up.shape)
