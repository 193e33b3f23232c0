"""Rotary position embedding of queries and keys: in place where that is safe and free; only cos and sin are saved.

Forward, without a gradient (torch.no_grad, or neither q nor k requires grad): q and k are overwritten, also if they are
views of a projection's output, as transformers makes them. With a gradient: they are overwritten if they are results
in memory of their own, by way of mark_dirty; else the results are new tensors. (On a view, autograd records an in-place
operation as CopySlices, which costs the backward a clone and two copies of the gradient: more than the buffer saved.)
Never overwritten: leaves that require grad, their views, tensors of a graph seen under no_grad, and q and k in one
storage (parts of one product). Overwriting counts in autograd's version counters: an operation that saved the old
values raises in its backward, unless it saved them under saved-tensor hooks, where autograd checks no versions.

Backward: the gradient is rotated back into a new tensor, because autograd may give the incoming one to other operations
too. Its layout is (B, T, H, d), that of the projection's output, so that the backward of
`.view(B, T, H, d).transpose(1, 2)` copies nothing.

Under torch.compile nothing is overwritten: the compiler plans memory itself.
"""

import functools

import torch
from torch.autograd.function import once_differentiable

from .. import operators
from ..checks import DTYPES, apart, floating, same_kind
from . import reference


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k. What was passed as q and k may be overwritten: use what is returned.

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                                   # transformers' function of
        rotate_half = lambda x: torch.cat((-x[..., r // 2 :], x[..., : r // 2]), -1)    # this name, half-split
        q_r = q[..., :r] * cos + rotate_half(q[..., :r]) * sin;  torch.cat((q_r, q[..., r:]), -1).to(q.dtype)

    q (B, Hq, T, d), k (B, Hkv, T, d): one dtype (bf16, fp16, fp32, fp64) and device, any strides. cos, sin (B or 1, T,
    r), any floating dtype, r even and at most d: the other d - r pass unchanged. Results have q's and k's dtype (where
    cos is wider, as OLMo-2's is and does). cos and sin get no gradient: one that requires grad is refused. The
    interleaved convention of GPT-J and GLM is another function.

    When q and k are overwritten: see the module docstring. The backward runs once: no double backward.
    TypeError, ValueError for arguments that do not fit; `dispatch.Unavailable` for an impl that cannot run here.
    """
    _check(q, k, cos, sin)
    wide = torch.float64 in (q.dtype, cos.dtype)
    triton = operators.choose("rotary", impl, q, torch.float64 if wide else q.dtype) == "triton"
    flows = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    in_place = _may_overwrite(q, flows) and _may_overwrite(k, flows) and apart(q, k)
    if flows:
        return _Rotary.apply(q, k, cos, sin, triton, in_place)
    if in_place:
        _rotate_([q, k], cos, sin, triton)
        return q, k
    q, k = _rotate([q, k], cos, sin, False, triton)
    return q, k


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, triton, in_place):
        ctx.triton = triton
        ctx.set_materialize_grads(False)  # an output that the loss does not see has no gradient to rotate
        ctx.save_for_backward(cos, sin)
        if in_place:
            _rotate_([q, k], cos, sin, triton)
            ctx.mark_dirty(q, k)
            return q, k
        q, k = _rotate([q, k], cos, sin, False, triton)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        ask_q = dq is not None and ctx.needs_input_grad[0]
        ask_k = dk is not None and ctx.needs_input_grad[1]
        dys = [dq] * ask_q + [dk] * ask_k
        found = _rotate(dys, cos, sin, True, ctx.triton) if dys else []
        dq = found[0] if ask_q else None
        dk = found[-1] if ask_k else None
        return dq, dk, None, None, None, None


def _rotate(
    xs: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, transposed: bool, triton: bool
) -> list[torch.Tensor]:
    if triton:
        return _ROTARY(xs, cos, sin, transposed)
    return [reference.rotary(x, cos, sin, transposed) for x in xs]


def _rotate_(xs: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, triton: bool) -> None:
    if triton:
        _ROTARY_(xs, cos, sin)
    else:
        for x in xs:
            reference.rotary(x, cos, sin, out=x)


# ---------------------------------------------------------------- what may be overwritten


def _may_overwrite(x: torch.Tensor, flows: bool) -> bool:
    """`flows`: whether a gradient flows through this rotation. See the module docstring."""
    if torch.compiler.is_compiling() or (x.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    if flows:
        return x._base is None and not (x.is_leaf and x.requires_grad) and _has_own_places(x)
    of_a_graph = x.requires_grad or (x._base is not None and x._base.requires_grad)
    return not of_a_graph and _has_own_places(x)


def _has_own_places(x: torch.Tensor) -> bool:
    """Whether no two elements share a place: each stride reaches past all that the smaller ones span."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride < reach:
            return False
        reach = stride * size
    return True


# ---------------------------------------------------------------- checks


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    floating("rotary: q", q)
    same_kind("rotary: q", q, "k", k)
    if cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        raise TypeError(f"rotary: cos is {cos.dtype} and sin is {sin.dtype}: expected one floating dtype for both")
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"rotary: q has shape {tuple(q.shape)} and k {tuple(k.shape)}: expected (B, Hq, T, d) and (B, Hkv, T, d)"
        )
    B, _, T, d = q.shape
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != T:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected ({B} or 1, {T}, r) for q "
            f"{tuple(q.shape)}"
        )
    if cos.shape[2] % 2 or not 2 <= cos.shape[2] <= d:
        raise ValueError(f"rotary: cos has {cos.shape[2]} features: expected an even number, 2 to d = {d}")
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(f"rotary: q, k, cos, sin are on {q.device}, {k.device}, {cos.device}, {sin.device}: move them")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(
            "rotary: cos or sin requires grad, and none is computed for them: pass cos.detach(), sin.detach()"
        )


# ---------------------------------------------------------------- the operators (impl="triton")


_define = functools.partial(operators.define, __package__)
_ROTARY = _define("rotary", "(Tensor[] xs, Tensor cos, Tensor sin, bool transposed) -> Tensor[]", "rotate")
_ROTARY_ = _define("rotary_", "(Tensor(a!)[] xs, Tensor cos, Tensor sin) -> ()", "rotate_", ("xs",))


@_ROTARY.register_fake
def _(xs, cos, sin, transposed):
    return [reference.empty(x) for x in xs]
