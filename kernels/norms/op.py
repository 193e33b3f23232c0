"""RMSNorm and LayerNorm, with the residual add before them: autograd functions with a forward and a backward each.

They save h (x itself without a residual: no copy), each row's statistics (fp32) and the weight, each only if a
requested gradient needs it:

    gradient of x or residual    h, weight, statistics
    gradient of weight           h, statistics
    gradient of bias             nothing

With a residual, the gradient of h from the residual stream is added to the norm's in the same pass. An output that no
loss depends on costs nothing and gives the weight no gradient, as in unfused torch. A frozen weight costs no reduction
over the rows.

Backward is once differentiable: a second derivative raises RuntimeError. Under torch.autocast the results have the
dtypes that the unfused modules have: `rms_norm` does not depend on it, `layer_norm` gives fp32 on CUDA.

Which modules of transformers these are (checked bit for bit in the tests; fp64 aside, which transformers rounds to fp32
in its RMSNorms and which stays fp64 here):

    cast="llama"              Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi3, SmolLM3, Granite, Glm4
    cast="gemma", offset=1    Gemma, Gemma2, Gemma3
    cast="gemma", offset=0    Olmo2, Olmo3
    layer_norm                nn.LayerNorm (GPT-2, GPT-NeoX), CohereLayerNorm
"""

from collections.abc import Callable

import torch

from .. import dispatch
from ..checks import DTYPES
from . import reference

# Of impl="triton": a program keeps whole rows in registers.
MAX_WIDTH = 8192


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "llama",
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last dimension: y, or with a residual (y, h), h = x + residual. Equivalent, h = x without:

        x_hat = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)
        cast="llama":  y = (offset + weight) * x_hat.to(h.dtype)              # bf16 h, fp32 weight: fp32 y
        cast="gemma":  y = (x_hat * (offset + weight.float())).to(h.dtype)

    x (..., D) of any strides (query and key norms: D = head_dim), residual of x's shape, weight (D,); bf16, fp16, fp32,
    or all fp64, which is computed in fp64. Gradients have the dtype of their tensor and are computed if it requires
    grad; sums in fp32. impl="triton" copies a tensor whose last dimension has a stride, or with more than three
    leading dimensions of unrelated strides; it serves no fp64 and D <= 8192 ("auto" takes torch for these).

    TypeError, ValueError for arguments that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    """
    if cast not in reference.CASTS:
        raise ValueError(f"unknown cast {cast!r}: expected one of {', '.join(reference.CASTS)}")
    impl = _choose("rms_norm", impl, x, {"residual": residual}, {"weight": weight})
    eps, offset = float(eps), float(offset)
    return _apply(impl, x, residual, lambda x, residual: _RMSNorm.apply(x, residual, weight, eps, offset, cast, impl))


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension: y, or with a residual (y, h), h = x + residual. Equivalent, h = x without:

        y = torch.nn.functional.layer_norm(h.float(), (D,), weight.float(), bias.float(), eps).to(h.dtype)

    (without the last cast on CUDA under torch.autocast, where torch's own layer_norm returns fp32). x (..., D),
    residual, weight (D,), bias (D,) or None: all else, and the errors, as in `rms_norm`.
    """
    impl = _choose("layer_norm", impl, x, {"residual": residual}, {"weight": weight, "bias": bias})
    eps = float(eps)
    keeps_fp32 = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    dtype = torch.float32 if keeps_fp32 else None
    return _apply(impl, x, residual, lambda x, residual: _LayerNorm.apply(x, residual, weight, bias, eps, dtype, impl))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, cast, impl):
        if impl == "triton":
            y, rstd, *added = torch.ops.kunbr_fast.rms_norm_forward(x, residual, weight, eps, offset, cast)
            h = x if residual is None else added[0]
        else:
            y, h, rstd = reference.rms_norm(x, weight, eps, offset, cast, residual)
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        compute_dx = need_x or need_residual
        reads_h = compute_dx or need_weight
        ctx.save_for_backward(h if reads_h else None, weight if compute_dx else None, rstd if reads_h else None)
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.impl = offset, impl
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype, weight.dtype
        if residual is None:
            return y
        if not compute_dx:
            ctx.mark_non_differentiable(h)  # or a reader of h would compute a gradient that nobody wants
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        compute_dx = need_x or need_residual
        dw = None
        if dy is None:
            dx = dh
        else:
            h, weight, rstd = ctx.saved_tensors
            arguments = dy, dh, h, weight, rstd, ctx.offset, compute_dx, need_weight
            if ctx.impl == "triton":
                found = iter(torch.ops.kunbr_fast.rms_norm_backward(*arguments))
                dx, dw = (next(found) if asked else None for asked in arguments[-2:])
            else:
                dx, dw = reference.rms_norm_backward(*arguments)
        grads = dx if need_x else None, dx if need_residual else None, dw
        return *_cast(grads, ctx.dtypes), None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, out_dtype, impl):
        if impl == "triton":
            forward = torch.ops.kunbr_fast.layer_norm_forward
            y, rstd, mean, *added = forward(x, residual, weight, bias, eps, out_dtype)
            h = x if residual is None else added[0]
        else:
            y, h, mean, rstd = reference.layer_norm(x, weight, bias, eps, residual, out_dtype)
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad[:4]
        compute_dx = need_x or need_residual
        saved = (h, mean, rstd) if compute_dx or need_weight else (None, None, None)
        ctx.save_for_backward(*saved, weight if compute_dx else None)
        ctx.set_materialize_grads(False)
        ctx.impl = impl
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias))
        if residual is None:
            return y
        if not compute_dx:
            ctx.mark_non_differentiable(h)  # or a reader of h would compute a gradient that nobody wants
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        compute_dx = need_x or need_residual
        dw = db = None
        if dy is None:
            dx = dh
        else:
            h, mean, rstd, weight = ctx.saved_tensors
            arguments = dy, dh, h, weight, mean, rstd, compute_dx, need_weight, need_bias
            if ctx.impl == "triton":
                found = iter(torch.ops.kunbr_fast.layer_norm_backward(*arguments))
                dx, dw, db = (next(found) if asked else None for asked in arguments[-3:])
            else:
                dx, dw, db = reference.layer_norm_backward(*arguments)
        grads = dx if need_x else None, dx if need_residual else None, dw, db
        return *_cast(grads, ctx.dtypes), None, None, None


# ---------------------------------------------------------------- the operators that run the kernels
#
# Opaque to torch.compile. The lists hold what is asked for, in the order of triton_kernel.py's launchers.


@torch.library.custom_op(
    "kunbr_fast::rms_norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, float eps, float offset, str cast) -> Tensor[]",
)
def _rms_norm_forward(x, residual, weight, eps, offset, cast):
    from .triton_kernel import forward

    dtype = _rms_norm_dtype(x, residual, weight, cast)
    return forward(x, residual, weight, None, eps, offset, False, cast == "llama", dtype)


@_rms_norm_forward.register_fake
def _(x, residual, weight, eps, offset, cast):
    return _fake_forward(x, residual, _rms_norm_dtype(x, residual, weight, cast), 1)


@torch.library.custom_op(
    "kunbr_fast::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float offset, bool compute_dx, "
    "bool compute_dw) -> Tensor[]",
)
def _rms_norm_backward(dy, dh, h, weight, rstd, offset, compute_dx, compute_dw):
    from .triton_kernel import backward

    return backward(dy, dh, h, weight, None, rstd, offset, compute_dx, compute_dw, False)


@_rms_norm_backward.register_fake
def _(dy, dh, h, weight, rstd, offset, compute_dx, compute_dw):
    return _fake_backward(dy, h, compute_dx, compute_dw)


@torch.library.custom_op(
    "kunbr_fast::layer_norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, ScalarType? out_dtype) -> Tensor[]",
)
def _layer_norm_forward(x, residual, weight, bias, eps, out_dtype):
    from .triton_kernel import forward

    return forward(x, residual, weight, bias, eps, 0.0, True, False, out_dtype or _h_dtype(x, residual))


@_layer_norm_forward.register_fake
def _(x, residual, weight, bias, eps, out_dtype):
    return _fake_forward(x, residual, out_dtype or _h_dtype(x, residual), 2)


@torch.library.custom_op(
    "kunbr_fast::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dh, Tensor? h, Tensor? weight, Tensor? mean, Tensor? rstd, bool compute_dx, "
    "bool compute_dw, bool compute_db) -> Tensor[]",
)
def _layer_norm_backward(dy, dh, h, weight, mean, rstd, compute_dx, compute_dw, compute_db):
    from .triton_kernel import backward

    return backward(dy, dh, h, weight, mean, rstd, 0.0, compute_dx, compute_dw, compute_db)


@_layer_norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, compute_dx, compute_dw, compute_db):
    return _fake_backward(dy, h, compute_dx, compute_dw, compute_db)


def _h_dtype(x, residual):
    return x.dtype if residual is None else torch.result_type(x, residual)


def _rms_norm_dtype(x, residual, weight, cast):
    h = _h_dtype(x, residual)
    return torch.promote_types(h, weight.dtype) if cast == "llama" else h


def _fake_forward(x, residual, dtype, statistics):
    found = [_empty_as(x, dtype)]
    found += [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(statistics)]
    return found if residual is None else [*found, _empty_as(x, _h_dtype(x, residual))]


def _fake_backward(dy, h, compute_dx, *sums):
    dx = [_empty_as(h, h.dtype)] if compute_dx else []
    return dx + [dy.new_empty(dy.shape[-1:], dtype=torch.float32) for asked in sums if asked]


def _empty_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`triton_kernel.empty_as`, where triton may be missing."""
    out = torch.empty_like(x, dtype=dtype)
    return out if out.stride(-1) == 1 else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- arguments


def _apply(impl: str, x: torch.Tensor, residual: torch.Tensor | None, function: Callable):
    """`function(x, residual)`, for impl="triton" with shapes and strides that the kernels take: see `rms_norm`."""
    if impl != "triton":
        return function(x, residual)
    lead = x.shape[:-1]
    if len(lead) > 3:
        x, residual = (None if t is None else t.flatten(0, -4) for t in (x, residual))
    x, residual = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    found = function(x, residual)
    if len(lead) <= 3:
        return found
    return tuple(t.unflatten(0, lead[:-2]) for t in found) if residual is not None else found.unflatten(0, lead[:-2])


def _cast(grads, dtypes):
    """Each gradient in its tensor's dtype."""
    return (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes))


def _choose(operation: str, impl: str, x: torch.Tensor, alike: dict, vectors: dict) -> str:
    """Checks the tensors, `alike` x (..., D) or `vectors` (D,), each or None, and returns "triton" or "torch"."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}: expected (..., D) with D of 1 or more")
    shapes = {"x": (x, x.shape)} | {name: (t, x.shape) for name, t in alike.items()}
    shapes |= {name: (t, x.shape[-1:]) for name, t in vectors.items()}
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise TypeError(f"{operation}: {name} is {t.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if (t.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{operation}: {name} is {t.dtype} and x {x.dtype}: float64 goes with float64 alone")
        if t.shape != shape:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(t.shape)}: expected {tuple(shape)} beside x {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"{operation}: {name} is on {t.device} and x on {x.device}: move one there")
    serves = x.dtype != torch.float64 and x.shape[-1] <= MAX_WIDTH
    if impl == "auto" and not serves:
        return "torch"
    if impl == "triton" and x.dtype == torch.float64:
        raise TypeError(f'{operation}: impl="triton" serves no float64: use impl="torch" or "auto", or float32 inputs')
    if impl == "triton" and not serves:
        raise ValueError(f'{operation}: impl="triton" serves D <= {MAX_WIDTH}, not {x.shape[-1]}: use impl="torch"')
    return _resolve(operation, impl, x.device)


# While torch.compile traces, the choice is made once: it logs, which cannot be traced.
_resolve = torch.compiler.assume_constant_result(dispatch.resolve)
