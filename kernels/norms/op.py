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

import torch

from .. import operators
from ..checks import floating, one_of
from ..tiles import MAX_NORM_WIDTH
from . import reference


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
    one_of("cast", cast, ("llama", "gemma"))
    impl = _choose("rms_norm", impl, x, residual, weight, None)
    dtype, llama = _h_dtype(x, residual), cast == "llama"
    if llama:
        dtype = torch.promote_types(dtype, weight.dtype)
    return _apply(x, residual, weight, None, float(eps), float(offset), False, llama, dtype, impl)


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
    impl = _choose("layer_norm", impl, x, residual, weight, bias)
    keeps_fp32 = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    dtype = torch.float32 if keeps_fp32 else _h_dtype(x, residual)
    return _apply(x, residual, weight, bias, float(eps), 0.0, True, False, dtype, impl)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, offset, center, llama, out_dtype, impl):
        arguments = x, residual, weight, bias, eps, offset, center, llama, out_dtype
        if impl == "triton":
            y, rstd, *others = _norm_forward(*arguments)
            mean = others[0] if center else None
            h = x if residual is None else others[-1]
        else:
            y, h, mean, rstd = reference.norm(*arguments)
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad[:4]
        compute_dx = need_x or need_residual
        saved = (h, mean, rstd) if compute_dx or need_weight else (None, None, None)
        ctx.save_for_backward(*saved, weight if compute_dx else None)
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.impl = offset, impl
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias))
        y = operators.result(y)
        if residual is None:
            return y
        h = operators.result(h)
        if not compute_dx:
            ctx.mark_non_differentiable(h)  # or a reader of h would compute a gradient that nobody wants
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        dx, dw, db = dh, None, None
        if dy is not None:
            h, mean, rstd, weight = ctx.saved_tensors
            asked = need_x or need_residual, need_weight, need_bias
            arguments = dy, dh, h, weight, mean, rstd, ctx.offset, *asked
            if ctx.impl == "triton":
                found = iter(_norm_backward(*arguments))
                dx, dw, db = (next(found) if one else None for one in asked)
            else:
                dx, dw, db = reference.norm_backward(*arguments)
        grads = dx if need_x else None, dx if need_residual else None, dw, db
        grads = (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes))
        return *grads, None, None, None, None, None, None


# ---------------------------------------------------------------- the operators (impl="triton")
#
# The lists hold what is asked for, in the order of triton_kernel.py's launchers.


_norm_forward = operators.define(
    __package__,
    "norm_forward",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, float offset, bool center, bool llama, "
    "ScalarType out_dtype) -> Tensor[]",
    "forward",
)
_norm_backward = operators.define(
    __package__,
    "norm_backward",
    "(Tensor dy, Tensor? dh, Tensor? h, Tensor? weight, Tensor? mean, Tensor? rstd, float offset, bool compute_dx, "
    "bool compute_dw, bool compute_db) -> Tensor[]",
    "backward",
)


@_norm_forward.register_fake
def _(x, residual, weight, bias, eps, offset, center, llama, out_dtype):
    found = [reference.empty_as(x, out_dtype)]
    found += [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(1 + center)]
    return found if residual is None else [*found, reference.empty_as(x, _h_dtype(x, residual))]


@_norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, offset, compute_dx, compute_dw, compute_db):
    dx = [reference.empty_as(h, h.dtype)] if compute_dx else []
    return dx + [dy.new_empty(dy.shape[-1:], dtype=torch.float32) for _ in range(compute_dw + compute_db)]


# ---------------------------------------------------------------- arguments


def _apply(x: torch.Tensor, residual: torch.Tensor | None, *others):
    """`_Norm.apply`, for impl="triton" with shapes and strides that the kernels take: see `rms_norm`."""
    lead = x.shape[:-1]
    if others[-1] != "triton":
        return _Norm.apply(x, residual, *others)
    if len(lead) > 3:
        x, residual = (None if t is None else t.flatten(0, -4) for t in (x, residual))
    x, residual = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    found = _Norm.apply(x, residual, *others)
    if len(lead) <= 3:
        return found
    return found.unflatten(0, lead[:-2]) if residual is None else tuple(t.unflatten(0, lead[:-2]) for t in found)


def _h_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _choose(operation: str, impl: str, x, residual, weight, bias) -> str:
    """Checks the tensors, residual as x (..., D), weight and bias (D,), and returns "triton" or "torch"."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}: expected (..., D) with D of 1 or more")
    wide, D = x.dtype == torch.float64, x.shape[-1]
    for name, t in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        floating(f"{operation}: {name}", t)
        if (t.dtype == torch.float64) != wide:
            raise TypeError(f"{operation}: {name} is {t.dtype} and x {x.dtype}: float64 goes with float64 alone")
        shape = (D,) if name in ("weight", "bias") else x.shape
        if t.shape != shape:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(t.shape)}: expected {tuple(shape)} beside x {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"{operation}: {name} is on {t.device} and x on {x.device}: move one there")
    if impl == "auto" and (wide or D > MAX_NORM_WIDTH):
        return "torch"
    if impl == "triton" and wide:
        raise TypeError(f'{operation}: impl="triton" serves no float64: use impl="torch" or "auto", or float32 inputs')
    if impl == "triton" and D > MAX_NORM_WIDTH:
        raise ValueError(f'{operation}: impl="triton" serves D <= {MAX_NORM_WIDTH}, not {D}: use impl="torch"')
    return operators.choose(operation, impl, x)
