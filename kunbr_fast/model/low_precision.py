"""Low precision of the cover: the frozen layers above the active block, with fewer bits a weight. Opt-in, and measured.

Of the linear layers (attention and MLP) above the block the weights W (N, K) become W~, the nearest that a mode holds:

    y = x @ W~.T + b,    dX = dY @ W~,    no dW, nothing is saved for it

    mode    a weight is                                                             bytes a weight
    none    itself: nothing is installed, not a bit changes                         2 (bf16)
    fp8     e4m3, times its row's scale                                             1
    int8    -127 ... 127, times its row's scale                                     1
    nf4     one of 16 values, times the scale of its 64 neighbours (QLoRA's NF4     0.56
            without its second quantisation; needs bitsandbytes)

W~ is written out in x's dtype, one weight at a time, in the forward pass and again in the backward pass: memory holds
the quantised weights and one dense one. Scales are fp32, 4 bytes a row.

The block is exact. So are the layers below it: they lie in main memory meanwhile, and come one weight at a time if they
run at all (a prefix cache has their output). The cover's exact weights go to main memory too (not pinned: they go and
come once a block); `Cover.exact` runs on them, to compare gradients. On a CPU nothing is saved, but the results are
those of a GPU. Every block quantises its own cover from exact weights, so none is rounded twice.

Of a streamed model each layer of the cover is read once, and is on the device until the block is trained: quantised
weights, and the other parameters as they are. Steps read nothing of it. `Cover.exact` reads it again, as it is in the
files; the layers below come from the files as without a cover.

Why not the libraries' own linear layers: under torchao 0.18.0's Int8WeightOnlyConfig and Float8WeightOnlyConfig
autograd saves each dense weight for dX, so training holds more than without them; bitsandbytes' Linear8bitLt rounds x
to int8 as well. For 4 bits bitsandbytes' kernels pack and unpack.

On a GPU only int8 of a streamed model has run (an H200, a tiny model).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.files.tensors import placeholder
from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.kernels.projections import autocast_dtype, no_autocast
from kunbr_fast.model import compat
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.weights import other_names, owners

logger = logging.getLogger(__name__)
COVER_PRECISIONS = ("none", "fp8", "int8", "nf4")
MARK = "_kunbr_cover"  # on the list of layers: the precision that is installed
NF4_BLOCK = 64


# ---------------------------------------------------------------- weights


class Exact:
    """The weight itself, in main memory; it comes to the device for each product. nbytes, as of the other forms: what
    it holds on the device; dense: the weight written out, (N, K)."""

    nbytes = 0

    def __init__(self, stored: torch.Tensor, transposed: bool, device: torch.device):
        self.stored, self.transposed, self.device = stored, transposed, device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.stored.to(self.device)
        return (weight.t() if self.transposed else weight).to(dtype)


class RowWise:
    """Values of one byte, within +-largest, and a scale for each of the N rows, in fp32 at least."""

    def __init__(self, weight: torch.Tensor, largest: float, dtype: torch.dtype):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scale = wide.abs().amax(-1, keepdim=True) / largest
        self.scale = scale.masked_fill_(scale == 0, 1.0)
        values = (wide / self.scale).clamp_(-largest, largest)
        self.values = (values.round_() if dtype == torch.int8 else values).to(dtype)
        self.nbytes = self.values.nbytes + self.scale.nbytes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype).mul_(self.scale)


class Nf4:
    """bitsandbytes' NF4 with fp32 scales (QLoRA's 8-bit ones would be wrong for rows of unlike size)."""

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


class Streamed:
    """The weight itself, where its layer's stream has put it for the moment."""

    nbytes = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return _matrix(self.module).to(dtype)


Weight = Exact | Streamed | RowWise | Nf4


def _matrix(module: nn.Module) -> torch.Tensor:
    """(N, K), as nn.Linear has it."""
    weight = module.weight.detach()
    return weight.t() if isinstance(module, compat.Conv1D) else weight


def quantize(weight: torch.Tensor, precision: str) -> Weight:
    """A weight (N, K) in one of the modes (not "none")."""
    if precision == "nf4":
        return Nf4(weight.detach())
    return RowWise(weight.detach(), *{"fp8": (448.0, torch.float8_e4m3fn), "int8": (127.0, torch.int8)}[precision])


class _Product(torch.autograd.Function):
    """x @ W~.T + bias; the backward pass makes dX and needs nothing but `weight`."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight, ctx.device = weight, x.device.type
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with no_autocast(ctx.device):
            return dy @ ctx.weight.dense(dy.dtype), None, None


# ---------------------------------------------------------------- in and out


@dataclasses.dataclass(eq=False)
class _Linear:
    """A linear layer of the cover, or of what lies below the block, and what it runs on."""

    module: nn.Module
    exact: Exact | Streamed
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
    """The cover as it is inside `low_precision_cover`. nbytes: what its quantised weights take on the device."""

    precision: str
    linears: list[_Linear] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(linear.weight.nbytes for linear in self.linears)

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

    def take_out(self) -> None:
        """All as it was before."""
        while self.linears:
            _restore(self.linears.pop())


class StreamedCover(Cover):
    """The cover of a streamed model: all of it on the device, and nothing of it read until `exact`."""

    def __init__(self, decoder: Decoder, layers: range, linears: Iterable[nn.Module], precision: str):
        """linears: the modules of `layers` that are rounded."""
        super().__init__(precision)
        self.decoder, self.layers = decoder, layers
        self._others: list[tuple[nn.Parameter, torch.Tensor]] = []  # norms and biases
        self._resident = contextlib.ExitStack()
        of = {id(module.weight): module for module in linears}
        for index in decoder.visit(layers):
            for parameter in decoder.layers[index].parameters():
                if (module := of.get(id(parameter))) is None:
                    self._others.append((parameter, parameter.detach().clone()))
                else:
                    weight = quantize(_matrix(module).contiguous(), precision)
                    self.linears.append(_Linear(module, Streamed(module), weight))
        self._put_in()
        for linear in self.linears:
            linear.module.forward = linear

    def _put_in(self) -> None:
        self.decoder.weights.release()  # the buffers: steps need none
        self._resident.enter_context(self._held())

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Inside, the stream leaves the cover alone."""
        with self.decoder.held(self.layers):
            absent = [parameter.data for parameter, _ in self._others]
            for parameter, value in self._others:
                parameter.data = value
            try:
                yield
            finally:
                for (parameter, _), value in zip(self._others, absent):
                    parameter.data = value

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """As of `Cover`; the layers of the cover come from the files, as they do without it."""
        self._resident.close()
        try:
            with super().exact():
                yield
        finally:
            self._put_in()

    def take_out(self) -> None:
        for linear in self.linears:
            linear.module.__dict__.pop("forward", None)
        self._resident.close()
        self.linears, self._others = [], []


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
    """The modules that `low_precision_cover` rounds, by path. Raises its errors, before anything is computed."""
    check_available(precision)
    check_block(block, decoder.num_layers)
    check_exact(decoder, "re-insertion")
    if precision == "none":
        return {}
    return dict(_linears(decoder, range(block.stop, decoder.num_layers), strict=True))


def check_exact(decoder: Decoder, what: str) -> None:
    """RuntimeError inside `low_precision_cover`: `what` is made of exact weights."""
    if MARK in decoder.layers.__dict__:
        raise RuntimeError(
            f"{what}: this model's cover is in {decoder.layers.__dict__[MARK]} now; do it outside of "
            "low_precision_cover and reinserted"
        )


@contextlib.contextmanager
def low_precision_cover(decoder: Decoder, block: range, precision: str) -> Iterator[Cover | None]:
    """Inside, the linear layers above `block` run on weights in `precision`, and those below lie in main memory (of a
    streamed model: in its files). Yields the `Cover`, None for "none", which changes nothing.

    The modules stay what they are; their `forward` is replaced, and their weight is a placeholder until the end, when
    it is what it was. Fused layers (`patched`), gradient checkpointing and autocast work as without. state_dict, and
    with it save_pretrained, raises inside.

    Errors: RuntimeError if it is in use on this model already; ValueError with the module's path for weights above the
    block that it cannot take: of modules other than nn.Linear and transformers' Conv1D (experts that are stacked into
    one tensor, layers that are quantised already), with a forward of their own, tied, or that require grad.
    `dispatch.Unavailable` where bitsandbytes is missing.
    """
    above = check_cover(decoder, block, precision)
    if precision == "none":
        yield None
        return
    for path, module in above.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{path} requires grad, but cover layers are frozen: requires_grad_(False) before")
    layers, cover = decoder.layers, Cover(precision)
    layers.__dict__[MARK] = precision
    hook = layers.register_state_dict_pre_hook(_refuse_state)
    try:
        if decoder.streamed:
            cover = StreamedCover(decoder, range(block.stop, decoder.num_layers), above.values(), precision)
        else:
            for _, module in _linears(decoder, range(block.start), strict=False):
                _install(cover, module, None)
            for module in above.values():
                _install(cover, module, precision)
        yield cover
    finally:
        cover.take_out()
        hook.remove()
        layers.__dict__.pop(MARK, None)


@torch.no_grad()
def _install(cover: Cover, module: nn.Module, precision: str | None) -> None:
    weight, transposed = module.weight, isinstance(module, compat.Conv1D)
    exact = Exact(weight.data.cpu(), transposed, weight.device)  # on a CPU the weight's own storage
    quantized = None if precision is None else quantize(_matrix(module).contiguous(), precision)
    cover.linears.append(_Linear(module, exact, quantized or exact))
    weight.data = placeholder(weight.shape, weight.dtype, weight.device)
    module.forward = cover.linears[-1]


def _restore(linear: _Linear) -> None:
    module, device = linear.module, linear.exact.device
    module.__dict__.pop("forward", None)
    linear.weight = linear.exact  # what was quantised goes before the weight comes back
    try:
        module.weight.data = linear.exact.stored.to(device)
    except torch.OutOfMemoryError:
        module.weight.data = linear.exact.stored
        logger.warning(
            "no memory on %s to put a weight back: it is in main memory; model.to(%r) moves it", device, str(device)
        )


def _linears(decoder: Decoder, indices: Iterable[int], strict: bool) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that can be rounded, by path; strict: ValueError for any other module with a matrix."""
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
