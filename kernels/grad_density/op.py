"""Statistics of each sample's weight gradient as a function and as a `torch.library` operator: checks and dispatch.

`grad_density` checks its arguments, chooses a form and an implementation, and calls reference.py, triton_kernel.py or
cuda.py. Through `torch.ops.kunbr_fast` it runs under `torch.compile(fullgraph=True)`. It is a statistic: gradients do
not flow through it, and inputs that require grad are taken as if detached.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x.
"""

from collections.abc import Sequence

import torch

from .. import dispatch
from ..checks import floating, one_of, same_kind
from . import reference
from .kinds import kinds_of_launch

FORMS = ("auto", "direct", "gram")


def grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    statistic: str = "grad_l1",
    along: str | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> list[torch.Tensor]:
    """A statistic of each sample's weight gradient of `y_p = x @ W_p.T`, with no weight gradient in memory.

    Returns P float64 tensors (B,); with along="row" (B, N_p), each output row's statistic (over K). Equivalent, for
    sample i and projection p:

        dw = dys[p][cu_seqlens[i]:cu_seqlens[i+1]].T @ x[cu_seqlens[i]:cu_seqlens[i+1]]       # (N_p, K)
        grad_l1 = dw.abs().sum()    grad_l2sq = dw.square().sum()    grad_linf = dw.abs().max()

    An empty sample gives 0. Nothing is divided: with a mean loss over a batch, each dw holds that factor.

    x (T, K), dys: P tensors (T, N_p), of one dtype (bf16, fp16, fp32, fp64) and device, any strides. cu_seqlens
    (B+1,) int32 or int64 there, from 0 up to T. Products are summed in fp32 (fp64 for fp64 inputs).
    max_seqlen: length of the longest sample; None reads it from cu_seqlens, on CUDA a wait for the device.
    form: "direct" forms dW in tiles, 2*T*K*sum(N_p) FLOPs; "gram" (grad_l2sq, along=None) forms <X X^T, dY dY^T> of
    samples padded to the longest, 2*B*max_seqlen^2*(K + sum(N_p)) FLOPs; "auto" takes the fewer.
    impl: runs the direct form ("auto", "cuda", "triton", "torch"); the Gram form is plain matrix products, which torch
    runs whatever impl is. impl "torch" and the Gram form read cu_seqlens to the host.

    ValueError or TypeError for arguments that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    What cu_seqlens holds, and that max_seqlen is no smaller than the longest sample, is checked wherever the values
    are on the host. Where they are not (impl="cuda" or "triton" on CUDA, max_seqlen given), a max_seqlen that is too
    small costs speed: the kernel takes each sample's length from cu_seqlens.
    """
    return torch.ops.kunbr_fast.grad_density(
        x.detach(),
        [dy.detach() for dy in dys],
        cu_seqlens,
        max_seqlen,
        statistic,
        along,
        form,
        impl,
    )


# ---------------------------------------------------------------- the operator


@torch.library.custom_op(
    "kunbr_fast::grad_density",
    mutates_args=(),
    schema="(Tensor x, Tensor[] dys, Tensor cu_seqlens, int? max_seqlen, str statistic, str? along, str form, str impl)"
    " -> Tensor[]",
)
def _grad_density(x, dys, cu_seqlens, max_seqlen, statistic, along, form, impl):
    _check(x, dys, cu_seqlens, max_seqlen, statistic, along, form, impl)
    # cu_seqlens is read before anything is chosen where that costs nothing, or there is no other way
    lengths = _lengths(cu_seqlens, x, max_seqlen) if x.device.type == "cpu" or max_seqlen is None else None
    longest = max_seqlen if lengths is None else max(lengths, default=0)
    # an impl that cannot run is refused for either form
    samples = len(cu_seqlens) - 1
    kinds = kinds_of_launch(x, dys, samples, along) if x.device.type == "cuda" else None
    way = dispatch.resolve("grad_density", impl, x.device, x.dtype, kinds, x.shape[0] // max(1, samples))
    if form == "gram" or (form == "auto" and _fewer_in_gram(x, dys, cu_seqlens, longest, statistic, along)):
        way = "gram"
    if way == "triton":
        from .triton_kernel import launch

        return launch(x, dys, cu_seqlens, statistic, along, max_seqlen=longest)
    if way == "cuda":
        from . import cuda

        return cuda.grad_density(x, dys, cu_seqlens, statistic, along)
    if lengths is None:
        lengths = _lengths(cu_seqlens, x, max_seqlen)
    if way == "gram":
        return reference.gram_l2sq(x, dys, lengths)
    return reference.grad_density(x, dys, lengths, statistic, along)


@_grad_density.register_fake
def _(x, dys, cu_seqlens, max_seqlen, statistic, along, form, impl):
    _check(x, dys, cu_seqlens, max_seqlen, statistic, along, form, impl)
    return reference.empty_statistics(x, dys, cu_seqlens.shape[0] - 1, along)


def _gram_serves(statistic: str, along: str | None) -> bool:
    return statistic == "grad_l2sq" and along is None


def _fewer_in_gram(x, dys, cu_seqlens, longest, statistic, along) -> bool:
    """Whether the Gram form serves, with fewer FLOPs."""
    width = sum(dy.shape[1] for dy in dys)
    direct = 2 * x.shape[0] * x.shape[1] * width
    gram = 2 * (len(cu_seqlens) - 1) * longest**2 * (x.shape[1] + width)
    return gram < direct and _gram_serves(statistic, along)


# ---------------------------------------------------------------- checks
#
# Shapes, dtypes and names are also checked while torch.compile traces; what a tensor holds is checked as it runs.


def _check(x, dys, cu_seqlens, max_seqlen, statistic, along, form, impl) -> None:
    one_of("statistic", statistic, reference.STATISTICS)
    one_of("along", along, (None, "row"))
    if not dys:
        raise ValueError("dys is empty: give the output gradient of one projection or more, each (T, N)")
    one_of("form", form, FORMS)
    one_of("impl", impl, ("auto", *dispatch.IMPLEMENTATIONS))
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen={max_seqlen}: expected the length of the longest sample, or None")
    dispatch.check_dtype("grad_density", impl, x.dtype)
    if form == "gram" and not _gram_serves(statistic, along):
        raise ValueError(
            f'form="gram" serves statistic="grad_l2sq" with along=None, not statistic={statistic!r} with '
            f'along={along!r}: use form="direct" or "auto"'
        )
    floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (T, K), samples packed one after the other")
    for p, dy in enumerate(dys):
        same_kind(f"dys[{p}]", dy, "x", x)
        if dy.dim() != 2 or dy.shape[0] != x.shape[0]:
            raise ValueError(
                f"dys[{p}] has shape {tuple(dy.shape)}: expected (T, N) with x's {x.shape[0]} rows, one for each token"
            )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}: expected torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (B+1,), the samples' ends after a 0"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and x on {x.device}: move it there")


def _lengths(cu_seqlens: torch.Tensor, x: torch.Tensor, max_seqlen: int | None) -> list[int]:
    """Reads cu_seqlens, (B+1,), to the host and checks it: the B lengths."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0]:
        raise ValueError(
            f"cu_seqlens goes from {ends[0]} to {ends[-1]}: expected 0 to the number of tokens, {x.shape[0]}"
        )
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    if min(lengths, default=0) < 0:
        i = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"cu_seqlens decreases from {ends[i]} to {ends[i + 1]} at sample {i}: samples must follow each other"
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}: the longest sample has {max(lengths)} tokens")
    return lengths
