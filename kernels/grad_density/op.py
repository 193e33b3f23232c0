"""Statistics of each sample's weight gradient as functions and as `torch.library` operators: checks and dispatch.

The functions check their arguments, choose a form and an implementation, and call `kernels/reference.py`,
`kernels/grad_density.py` or `kunbr_fast/cuda_library.py`. Through `torch.ops.kunbr_fast` they run under `torch.compile(fullgraph=True)`. They are
statistics: gradients do not flow through them, and inputs that require grad are taken as if detached.

Index letters: B samples, T tokens, N out features, K in features, P projections that share x, S statistics.
"""

from collections.abc import Sequence

import torch

from .. import dispatch
from ..checks import DTYPES, one_of, same_kind
from . import reference

STATISTICS = reference.STATISTICS
ALONG = (None, "row", "column")
FORMS = ("auto", "direct", "gram")
_READ = -1  # in an operator's max_seqlen: read it from cu_seqlens


def grad_density(
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    statistics: Sequence[str] = ("grad_l1",),
    along: str | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> list[dict[str, torch.Tensor]]:
    """Statistics of each sample's weight gradient of `y_p = x @ W_p.T`, with no weight gradient in memory.

    Returns P dicts {statistic: float64 tensor}, (B,); with along="row" (B, N_p), each output row's statistic (over K);
    with along="column" (B, K), each input column's (over N_p). Equivalent, for sample i and projection p:

        dw = dys[p][cu_seqlens[i]:cu_seqlens[i+1]].T @ x[cu_seqlens[i]:cu_seqlens[i+1]]       # (N_p, K)
        grad_l1 = dw.abs().sum()    grad_l2sq = dw.square().sum()    grad_linf = dw.abs().max()

    An empty sample gives 0. Nothing is divided: with a mean loss over a batch, each dw holds that factor.

    x (T, K), dys: P tensors (T, N_p), of one dtype (bf16, fp16, fp32, fp64) and device, any strides. cu_seqlens
    (B+1,) int32 or int64 there, from 0 up to T. Products are summed in fp32 (fp64 for fp64 inputs).
    max_seqlen: length of the longest sample; None reads it from cu_seqlens, on CUDA a wait for the device.
    form: "direct" forms dW in tiles, 2*T*K*sum(N_p) FLOPs; "gram" (grad_l2sq alone, along=None) forms
    <X X^T, dY dY^T> of samples padded to the longest, 2*B*max_seqlen^2*(K + sum(N_p)) FLOPs; "auto" takes the fewer.
    impl: who runs the direct form ("auto", "cuda", "triton", "torch"); the Gram form is plain matrix products, which torch runs
    whatever impl is. impl "torch" and the Gram form read cu_seqlens to the host.

    ValueError or TypeError for arguments that do not fit, `dispatch.Unavailable` for an impl that cannot run here.
    What cu_seqlens holds, and that max_seqlen is no smaller than the longest sample, is checked wherever the values
    are on the host. Where they are not (impl="cuda" or "triton" on CUDA, max_seqlen given), a max_seqlen that is too small
    costs speed: the kernel takes each sample's length from cu_seqlens.
    """
    if isinstance(statistics, str):
        raise TypeError(f'statistics={statistics!r}: expected a sequence of names, such as ("{statistics}",)')
    names = tuple(dict.fromkeys(statistics))
    found = torch.ops.kunbr_fast.grad_density(
        x.detach(),
        [dy.detach() for dy in dys],
        cu_seqlens,
        _READ if max_seqlen is None else max_seqlen,
        ",".join(names),
        "" if along is None else along,
        form,
        impl,
    )
    return [dict(zip(names, out)) for out in found]


def grad_alignment(
    x: torch.Tensor,
    dy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    other_x: torch.Tensor,
    other_dy: torch.Tensor,
    other_cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> dict[str, torch.Tensor]:
    """Inner products of the weight gradients of two packed batches, sample i of the one with sample i of the other.

    Returns {"dot", "l2sq", "other_l2sq"}, each (B,) float64: `(dw * other_dw).sum()`, `dw.square().sum()`,
    `other_dw.square().sum()`, dw as in `grad_density`; the cosine is dot / (l2sq * other_l2sq).sqrt().

    x (T, K), dy (T, N), cu_seqlens (B+1,); other_x (T', K), other_dy (T', N), other_cu_seqlens (B+1,); max_seqlen: the
    longest sample of both batches. FLOPs: direct 2*(T+T')*N*K, gram 6*B*max_seqlen^2*(K+N). All else, and the errors,
    as in `grad_density`.
    """
    found = torch.ops.kunbr_fast.grad_alignment(
        x.detach(),
        dy.detach(),
        cu_seqlens,
        other_x.detach(),
        other_dy.detach(),
        other_cu_seqlens,
        _READ if max_seqlen is None else max_seqlen,
        form,
        impl,
    )
    return dict(zip(("dot", "l2sq", "other_l2sq"), found))


# ---------------------------------------------------------------- the operators


@torch.library.custom_op(
    "kunbr_fast::grad_density",
    mutates_args=(),
    schema="(Tensor x, Tensor[] dys, Tensor cu_seqlens, int max_seqlen, str statistics, str along, str form, str impl)"
    " -> Tensor[]",
)
def _grad_density(x, dys, cu_seqlens, max_seqlen, statistics, along, form, impl):
    names, along = _check_density(x, dys, cu_seqlens, max_seqlen, statistics, along, form, impl)
    lengths = _lengths("cu_seqlens", cu_seqlens, x, max_seqlen) if _on_host(x, max_seqlen) else None
    longest = max_seqlen if lengths is None else max(lengths, default=0)
    width = sum(dy.shape[1] for dy in dys)
    direct = 2 * x.shape[0] * x.shape[1] * width
    gram = 2 * (len(cu_seqlens) - 1) * longest**2 * (x.shape[1] + width)
    way = _way(x, form, impl, fewer_in_gram=gram < direct and _gram_serves(names, along))
    if way == "triton":
        from .triton_kernel import launch

        return launch(x, dys, cu_seqlens, names, along)
    if way == "cuda":
        from . import cuda

        return cuda.grad_density(x, dys, cu_seqlens, names, along)
    if lengths is None:
        lengths = _lengths("cu_seqlens", cu_seqlens, x, max_seqlen)
    return (
        reference.gram_l2sq(x, dys, lengths) if way == "gram" else reference.grad_density(x, dys, lengths, names, along)
    )


@_grad_density.register_fake
def _(x, dys, cu_seqlens, max_seqlen, statistics, along, form, impl):
    names, along = _check_density(x, dys, cu_seqlens, max_seqlen, statistics, along, form, impl)
    return reference.empty_statistics(x, dys, cu_seqlens.shape[0] - 1, len(names), along)


@torch.library.custom_op(
    "kunbr_fast::grad_alignment",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, Tensor cu_seqlens, Tensor other_x, Tensor other_dy, Tensor other_cu_seqlens, "
    "int max_seqlen, str form, str impl) -> Tensor",
)
def _grad_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens, max_seqlen, form, impl):
    _check_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens, max_seqlen, form, impl)
    lengths = None
    if _on_host(x, max_seqlen):
        lengths = _lengths("cu_seqlens", cu_seqlens, x, max_seqlen)
        other_lengths = _lengths("other_cu_seqlens", other_cu_seqlens, other_x, max_seqlen)
    longest = max_seqlen if lengths is None else max([*lengths, *other_lengths], default=0)
    direct = 2 * (x.shape[0] + other_x.shape[0]) * x.shape[1] * dy.shape[1]
    gram = 6 * (len(cu_seqlens) - 1) * longest**2 * (x.shape[1] + dy.shape[1])
    way = _way(x, form, impl, fewer_in_gram=gram < direct)
    if way == "triton":
        from .triton_kernel import launch_alignment

        return launch_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens)
    if way == "cuda":
        from . import cuda

        return cuda.grad_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens)
    if lengths is None:
        lengths = _lengths("cu_seqlens", cu_seqlens, x, max_seqlen)
        other_lengths = _lengths("other_cu_seqlens", other_cu_seqlens, other_x, max_seqlen)
    run = reference.gram_alignment if way == "gram" else reference.grad_alignment
    return run(x, dy, lengths, other_x, other_dy, other_lengths)


@_grad_alignment.register_fake
def _(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens, max_seqlen, form, impl):
    _check_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens, max_seqlen, form, impl)
    return x.new_empty((3, cu_seqlens.shape[0] - 1), dtype=torch.float64)


# ---------------------------------------------------------------- the choice


def _gram_serves(statistics: tuple[str, ...], along: str | None) -> bool:
    return statistics == ("grad_l2sq",) and along is None


def _way(x: torch.Tensor, form: str, impl: str, fewer_in_gram: bool) -> str:
    """ "gram", or who runs the direct form: "cuda", "triton" or "torch"."""
    # an impl that cannot run is refused for either form
    chosen = dispatch.resolve("grad_density", impl, x.device, x.dtype)
    return "gram" if form == "gram" or (form == "auto" and fewer_in_gram) else chosen


# ---------------------------------------------------------------- checks
#
# Shapes, dtypes and names are also checked while torch.compile traces; what a tensor holds is checked as it runs.


def _check_density(x, dys, cu_seqlens, max_seqlen, statistics, along, form, impl) -> tuple[tuple[str, ...], str | None]:
    """The names of the statistics and `along`, as the reference takes them."""
    names, along = tuple(statistics.split(",")) if statistics else (), along or None
    if not names:
        raise ValueError(f"statistics is empty: name one or more of {', '.join(STATISTICS)}")
    for name in names:
        one_of("statistic", name, STATISTICS)
    one_of("along", along, ALONG)
    if not dys:
        raise ValueError("dys is empty: give the output gradient of one projection or more, each (T, N)")
    _check_choice(x, max_seqlen, form, impl)
    if form == "gram" and not _gram_serves(names, along):
        raise ValueError(
            f'form="gram" serves statistics=("grad_l2sq",) with along=None, not statistics={names} with '
            f'along={along!r}: use form="direct" or "auto"'
        )
    _check_pair(x, "x", dys, [f"dys[{p}]" for p in range(len(dys))], cu_seqlens, "cu_seqlens")
    return names, along


def _check_alignment(x, dy, cu_seqlens, other_x, other_dy, other_cu_seqlens, max_seqlen, form, impl) -> None:
    _check_choice(x, max_seqlen, form, impl)
    _check_pair(x, "x", [dy], ["dy"], cu_seqlens, "cu_seqlens")
    same_kind("other_x", other_x, "x", x)
    _check_pair(other_x, "other_x", [other_dy], ["other_dy"], other_cu_seqlens, "other_cu_seqlens")
    if other_x.shape[1] != x.shape[1] or other_dy.shape[1] != dy.shape[1]:
        raise ValueError(
            f"other_x {tuple(other_x.shape)} and other_dy {tuple(other_dy.shape)} belong to another layer than "
            f"x {tuple(x.shape)} and dy {tuple(dy.shape)}: their last dimensions must be equal"
        )
    if len(other_cu_seqlens) != len(cu_seqlens):
        raise ValueError(
            f"other_cu_seqlens names {len(other_cu_seqlens) - 1} samples and cu_seqlens {len(cu_seqlens) - 1}: "
            "samples are paired by index, so give as many of each"
        )


def _check_choice(x: torch.Tensor, max_seqlen: int, form: str, impl: str) -> None:
    one_of("form", form, FORMS)
    one_of("impl", impl, ("auto", *dispatch.IMPLEMENTATIONS))
    if max_seqlen < _READ:
        raise ValueError(f"max_seqlen={max_seqlen}: expected the length of the longest sample, or None")
    dispatch.check_dtype("grad_density", impl, x.dtype)


def _check_pair(
    x: torch.Tensor,
    x_name: str,
    dys: Sequence[torch.Tensor],
    dy_names: Sequence[str],
    cu_seqlens: torch.Tensor,
    cu_name: str,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{x_name} is {x.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
    if x.dim() != 2:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}: expected (T, K), samples packed one after the other")
    for name, dy in zip(dy_names, dys):
        same_kind(name, dy, x_name, x)
        if dy.dim() != 2 or dy.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(dy.shape)}: expected (T, N) with {x_name}'s {x.shape[0]} rows, one for each token"
            )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{cu_name} is {cu_seqlens.dtype}: expected torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{cu_name} has shape {tuple(cu_seqlens.shape)}: expected (B+1,), the samples' ends after a 0")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{cu_name} is on {cu_seqlens.device} and {x_name} on {x.device}: move it there")


def _on_host(x: torch.Tensor, max_seqlen: int) -> bool:
    """Whether cu_seqlens is read before anything is chosen: where that costs nothing, or where there is no other way."""
    return x.device.type == "cpu" or max_seqlen == _READ


def _lengths(name: str, cu_seqlens: torch.Tensor, x: torch.Tensor, max_seqlen: int) -> list[int]:
    """Reads cu_seqlens, (B+1,), to the host and checks it: the B lengths."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0]:
        raise ValueError(f"{name} goes from {ends[0]} to {ends[-1]}: expected 0 to the number of tokens, {x.shape[0]}")
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    if min(lengths, default=0) < 0:
        i = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{name} decreases from {ends[i]} to {ends[i + 1]} at sample {i}: samples must follow each other"
        )
    if max_seqlen != _READ and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}: the longest sample has {max(lengths)} tokens")
    return lengths
