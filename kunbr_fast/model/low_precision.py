"""Low precision of the cover: the frozen layers above the active block, with fewer bits a weight. Opt-in, and measured.

What changes are the weights W (N, K) of the linear layers (attention and MLP) above the block:

    y = x @ W~.T + b,    dX = dY @ W~,    W~ the nearest that the mode can hold; no dW, nothing is saved for it

    mode         a weight is                                                                    bytes a weight
    none         itself: nothing is installed, not a bit changes                                2 (bf16)
    fp8          e4m3, times its row's scale                                                    1
    int8         -127 ... 127, times its row's scale                                            1
    nf4          one of 16 values, times the scale of its 64 neighbours (QLoRA's NF4, without
                 its second quantisation; needs bitsandbytes)                                   0.56
    fp8_matmul   as fp8, and the rows of x and dY are rounded to e4m3 too, so that tensor cores
                 multiply fp8 with fp8. Faster, not smaller: their instruction takes both
                 operands K-major only, so a GPU holds W and W.T (the same values)              2 (1 on a CPU)

In fp8, int8 and nf4 W~ is written out in x's dtype, one weight at a time, in the forward pass and again in the backward
pass: memory holds the quantised weights and one dense one. Scales are fp32, 4 bytes a row. fp8_matmul goes by
torch._scaled_mm where that runs (bf16, compute capability 8.9), elsewhere by the same products of the same rounded
numbers in fp32. In dX the scales of W's rows are within the sum, so there dY times these is what is rounded.

Around the cover: the block is exact. Layers below it are exact too, whether a prefix cache has their output or they run;
they lie in main memory meanwhile and come one weight at a time if they are needed. The exact weights of the cover go to
main memory as well (ordinary, not pinned, memory: they go and come once a block) and `Cover.exact` runs on them, so that
the gradient can be compared (`gradient_cosine`). On a CPU they stay where they are, beside the quantised ones: there is
nothing to save there, but the results are those of a GPU.

Every block quantises its own cover, from exact weights: with insertion="cumulative" a trained block is rounded where it
is in another one's cover (on a second round; in the first the next blocks lie above it), never twice.

Why not the libraries' own linear layers (measured with torchao 0.18.0 and bitsandbytes 0.50.2, on a CPU; 8 layers of
1024 x 1024, bf16, forward and backward): under torchao's Int8WeightOnlyConfig and Float8WeightOnlyConfig autograd saves
each dense weight for dX, 16 and 24 MB at the peak against 0.1 MB of plain layers, so that training holds more than
without them (and its int4 needs a further package); bitsandbytes' Linear8bitLt rounds x to int8 as well, another
approximation. For 4 bits bitsandbytes has kernels for packing and unpacking on CPU and GPU, and these are what is used.

No GPU has run this.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.kernels.projections import autocast_dtype, no_autocast
from kunbr_fast.model import compat
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.weights import other_names, owners

logger = logging.getLogger(__name__)
COVER_PRECISIONS = ("none", "fp8", "int8", "nf4", "fp8_matmul")
MARK = "_kunbr_cover"  # on the list of layers: the precision that is installed
E4M3_MAX, INT8_MAX = 448.0, 127.0
NF4_BLOCK = 64


# ---------------------------------------------------------------- weights


def _rows(x: torch.Tensor, largest: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, K) -> the values in `dtype`, within +-largest, and the rows' scales (R, 1), in fp32 at least."""
    wide = x.to(_wide(x.dtype))
    scale = wide.abs().amax(-1, keepdim=True) / largest
    scale = scale.masked_fill_(scale == 0, 1.0)
    x = (wide / scale).clamp_(-largest, largest)
    return (x.round_() if dtype == torch.int8 else x).to(dtype), scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Weight(abc.ABC):
    """A frozen weight (N, K) in some form, and the two products with it. nbytes: what it holds on the device."""

    nbytes = 0

    @abc.abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight written out, (N, K)."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., K) -> x @ W.T + bias."""
        return F.linear(x, self.dense(x.dtype), bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """dy (..., N) -> dy @ W."""
        return dy @ self.dense(dy.dtype)


class Exact(Weight):
    """The weight itself, in main memory; it comes to the device for each product."""

    def __init__(self, stored: torch.Tensor, transposed: bool, device: torch.device):
        self.stored, self.transposed, self.device = stored, transposed, device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.stored.to(self.device)
        return (weight.t() if self.transposed else weight).to(dtype)


class RowWise(Weight):
    """Values of one byte and a scale for each of the N rows."""

    def __init__(self, weight: torch.Tensor, largest: float, dtype: torch.dtype):
        self.values, self.scale = _rows(weight, largest, dtype)
        self.nbytes = self.values.nbytes + self.scale.nbytes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype).mul_(self.scale)


class Fp8Matmul(RowWise):
    """e4m3 times e4m3: x and dy are rounded, row by row, as well."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight, E4M3_MAX, torch.float8_e4m3fn)
        self.transposed = self.values.t()
        if weight.is_cuda:
            self.transposed = self.transposed.contiguous()
            self.nbytes += self.transposed.nbytes
        self.aligned = not any(size % 16 for size in weight.shape)  # what _scaled_mm takes

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = self._multiply(x, self.values, self.scale.t(), x.dtype)
        return out if bias is None else out + bias

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        return self._multiply(dy * self.scale.t(), self.transposed, torch.ones_like(self.scale[:1]), dy.dtype)

    def _multiply(self, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x (..., K) rounded, values (N, K), scale (1, N or 1) -> (..., N) in `dtype`."""
        rows, rows_scale = _rows(x.reshape(-1, x.shape[-1]), E4M3_MAX, torch.float8_e4m3fn)
        if self.aligned and dtype == torch.bfloat16 and _has_scaled_mm(x.device):
            scale = scale.expand(1, len(values)).contiguous()
            out = torch._scaled_mm(rows, values.t(), rows_scale, scale, out_dtype=dtype)
        else:
            wide = _wide(dtype)
            out = (rows.to(wide) @ values.to(wide).t()).mul_(rows_scale).mul_(scale).to(dtype)
        return out.view(*x.shape[:-1], len(values))


@functools.cache
def _has_scaled_mm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Nf4(Weight):
    """bitsandbytes' NF4, each block's scale in fp32 (8-bit scales, as in QLoRA, would be wrong for rows of unlike size)."""

    def __init__(self, weight: torch.Tensor):
        from bitsandbytes.functional import quantize_4bit

        self.shape = weight.shape
        flat = weight.reshape(-1)
        flat = flat.float() if weight.dtype == torch.float64 else flat
        flat = F.pad(flat, (0, -len(flat) % NF4_BLOCK))  # releases before 0.50 take whole blocks only
        self.values, self.state = quantize_4bit(flat, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
        self.nbytes = self.values.nbytes + self.state.absmax.nbytes + self.state.code.nbytes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.values, self.state).view(-1)[: self.shape.numel()].view(self.shape).to(dtype)


_WEIGHTS = {
    "fp8": lambda weight: RowWise(weight, E4M3_MAX, torch.float8_e4m3fn),
    "int8": lambda weight: RowWise(weight, INT8_MAX, torch.int8),
    "nf4": Nf4,
    "fp8_matmul": Fp8Matmul,
}


def quantize(weight: torch.Tensor, precision: str) -> Weight:
    """A weight (N, K) in one of the modes (not "none")."""
    return _WEIGHTS[precision](weight.detach())


class _Product(torch.autograd.Function):
    """`weight.forward(x, bias)`, whose backward pass makes dX and keeps nothing but `weight`."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight, ctx.device = weight, x.device.type
        return weight.forward(x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with no_autocast(ctx.device):
            return ctx.weight.backward(dy), None, None


# ---------------------------------------------------------------- in and out


@dataclasses.dataclass(eq=False)
class _Linear:
    """A linear layer of the cover, or of what lies below the block: what its weight was, and what it runs on."""

    module: nn.Module
    original: torch.Tensor
    exact: Exact
    weight: Weight
    use_exact: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype, bias = autocast_dtype(x.device.type), self.module.bias
        if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with no_autocast(x.device.type):
            return _Product.apply(x, bias, self.exact if self.use_exact else self.weight)


@dataclasses.dataclass
class Cover:
    """The cover as it is inside `low_precision_cover`.

    nbytes: what its quantised weights take on the device; exact_nbytes: what they take without.
    """

    precision: str
    linears: list[_Linear] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(linear.weight.nbytes for linear in self.linears)

    @property
    def exact_nbytes(self) -> int:
        return sum(linear.original.nbytes for linear in self.linears if linear.weight is not linear.exact)

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the cover's products are with the exact weights, fetched from main memory one by one. (A backward
        pass belongs where its forward pass was: gradient checkpointing runs layers again.)"""
        for linear in self.linears:
            linear.use_exact = True
        try:
            yield
        finally:
            for linear in self.linears:
                linear.use_exact = False


def check_available(precision: str) -> None:
    """ValueError for an unknown precision, `dispatch.Unavailable` for one whose library is missing."""
    if precision not in COVER_PRECISIONS:
        raise ValueError(f"cover_precision={precision!r}: expected one of {', '.join(COVER_PRECISIONS)}")
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable(
            "cover_precision='nf4' needs bitsandbytes, which is not installed: pip install 'kunbr-fast[nf4]', or take "
            "int8 or fp8"
        )


def check_cover(decoder: Decoder, block: range, precision: str) -> dict[str, nn.Module]:
    """The modules above the block that `low_precision_cover` rounds, by path; its errors, before anything is computed."""
    check_available(precision)
    check_block(block, decoder.num_layers)
    check_exact(decoder, "re-insertion")
    if precision == "none":
        return {}
    if decoder.streamed:
        raise ValueError(
            f"{decoder.name} is streamed: its layers come as they are in the files; set cover_precision none"
        )
    return dict(_linears(decoder, range(block.stop, decoder.num_layers), strict=True))


def check_exact(decoder: Decoder, what: str) -> None:
    """RuntimeError inside `low_precision_cover`: `what` is made of exact weights."""
    if MARK in decoder.layers.__dict__:
        raise RuntimeError(
            f"{what}: this model's cover is in {decoder.layers.__dict__[MARK]} now; do it outside of low_precision_cover "
            "and reinserted"
        )


@contextlib.contextmanager
def low_precision_cover(decoder: Decoder, block: range, precision: str) -> Iterator[Cover | None]:
    """Inside, the linear layers above `block` run on weights in `precision`, and those below lie in main memory.

    Yields the `Cover`, None for "none", which changes nothing. `reinserted(..., cover_precision=)` is this and training.

    The modules stay what they are; their `forward` is replaced, and their weight is a placeholder (one NaN, expanded)
    until the end, when it is what it was, also after an exception. Fused layers (`patched`), gradient checkpointing and
    autocast work as without. state_dict, and with it save_pretrained, raises inside.

    Errors: RuntimeError if it is in use on this model already; ValueError with the module's path for weights above the
    block that it cannot take: of modules other than nn.Linear and transformers' Conv1D (experts that are stacked into one
    tensor, layers that are quantised already), with a forward of their own, tied, or that require grad; and for a
    streamed model. `dispatch.Unavailable` where bitsandbytes is missing.
    """
    above = check_cover(decoder, block, precision)
    if precision == "none":
        yield None
        return
    below = dict(_linears(decoder, range(block.start), strict=False))
    for path, module in above.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{path} requires grad, but cover layers are frozen: requires_grad_(False) before")
    layers, cover = decoder.layers, Cover(precision)
    hook = None
    try:
        layers.__dict__[MARK] = precision
        hook = layers.register_state_dict_pre_hook(_refuse_state)
        for module in below.values():
            _install(cover, module, None)
        for module in above.values():
            _install(cover, module, precision)
        yield cover
    finally:
        while cover.linears:
            _restore(cover.linears.pop())
        if hook is not None:
            hook.remove()
        layers.__dict__.pop(MARK, None)


@torch.no_grad()
def _install(cover: Cover, module: nn.Module, precision: str | None) -> None:
    weight, transposed = module.weight, isinstance(module, compat.Conv1D)
    original = weight.data.cpu()  # on a CPU the weight's own storage
    exact = Exact(original, transposed, weight.device)
    quantized = None if precision is None else quantize(weight.t().contiguous() if transposed else weight, precision)
    cover.linears.append(_Linear(module, original, exact, quantized or exact))
    weight.data = weight.new_full((), torch.nan).expand(weight.shape)
    module.forward = cover.linears[-1]


def _restore(linear: _Linear) -> None:
    module, device = linear.module, linear.exact.device
    module.__dict__.pop("forward", None)
    linear.weight = linear.exact  # what was quantised goes before the weight comes back
    try:
        module.weight.data = linear.original.to(device)
    except torch.OutOfMemoryError:
        module.weight.data = linear.original
        logger.warning(
            "no memory on %s to put a weight back: it is in main memory; model.to(%r) moves it", device, str(device)
        )


def _linears(decoder: Decoder, indices: Iterable[int], strict: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules of these layers whose weights can be taken, by path; strict: ValueError for any other with a matrix."""
    uses = owners(decoder.model)
    for index in indices:
        for inner, module in decoder.layers[index].named_modules():
            path = f"{decoder.layer_path(index)}.{inner}".rstrip(".")
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2:
                    continue
                reason = _why_not(module, name, parameter, other_names(uses, parameter, f"{path}.{name}"))
                if reason is None:
                    yield path, module
                elif strict:
                    raise ValueError(f"{path}: {reason}; set cover_precision none")


def _why_not(module: nn.Module, name: str, parameter: nn.Parameter, others: str) -> str | None:
    if type(module) not in (nn.Linear, compat.Conv1D) or name != "weight":
        return f"low precision takes the weights of nn.Linear and Conv1D, not {name} of {type(module).__name__}"
    if "forward" in module.__dict__:
        return "another tool has put its own forward into this module"
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return f"its weight is {type(parameter).__name__} of {parameter.dtype}, not a plain one"
    if others:
        return f"its weight is tied to {others}"
    return None


def _refuse_state(*args: Any) -> None:
    raise RuntimeError(
        "this model's cover is in low precision now: its state_dict, and what save_pretrained writes, would hold "
        "placeholders; save it outside of low_precision_cover and reinserted"
    )


# ---------------------------------------------------------------- how good it is
