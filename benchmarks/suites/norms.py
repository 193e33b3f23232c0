"""RMSNorm, LayerNorm, SwiGLU and rotary embedding: forward and backward, bound by memory.

Cases: RMSNorm and LayerNorm of a cover layer (weight frozen: gradient of x alone) and of an active one (and of the
weight), RMSNorm with the residual add before it, SwiGLU, rotary embedding of queries and keys. Rivals: plain torch as
transformers has it, torch's own `rms_norm`, torch.compile, Liger's kernels. Needed bytes, in units of T x width:

    RMSNorm, LayerNorm    5   forward x -> y; backward dy, x -> dx
    with residual         8   forward x, r -> h, y; backward dy, dh, h -> dx
    SwiGLU                8   forward gate, up -> y; backward dy, gate, up -> d_gate, d_up
    rotary                4   forward and backward, each in and out

Some of Liger's functions write their results over their inputs, as a model lets them. So each rival has inputs and
output gradients of its own; from its second run on its numbers are others, which its time does not depend on.
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F

from kunbr_fast.benchmarks.harness import Case, Options, Variant, compiled
from kunbr_fast.benchmarks.models import liger
from kunbr_fast.benchmarks.shapes import MODELS, Shape, odd
from kunbr_fast.kernels.gated.op import swiglu
from kunbr_fast.kernels.grad_density import op as operators  # noqa: F401  registers its kernels
from kunbr_fast.kernels.norms.op import layer_norm, rms_norm
from kunbr_fast.kernels.rotary.op import apply_rotary

EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Elementwise(Case):
    """run(*inputs) -> outputs; gradients of those inputs that require grad, from fixed output gradients."""

    shape: Shape
    operation = ""
    counts_kept = True

    flops = 0

    def draw(self):
        """(inputs, output gradients)"""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*size):
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        return self._draw(random)

    def small(self):
        return dataclasses.replace(self, shape=odd(self.shape), tokens=63)

    def known(self, data):
        return [t for t in data[0] if t.dim() == 1]

    def truth(self, data):
        inputs, dys = data
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        return self._once(self.eager, wide, tuple(dy.double() for dy in dys))()

    def _once(self, function, inputs, dys):
        wanted = [t for t in inputs if t.requires_grad]

        def run():
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad(outputs, wanted, dys)
            return {f"output {i}": y for i, y in enumerate(outputs)} | {f"gradient {i}": g for i, g in enumerate(grads)}

        return run

    def variants(self, data):
        inputs, dys = data

        found = self.implemented(lambda impl: self._once(partial(self.ours, impl), inputs, dys), self.operation)
        found.append(Variant("eager", lambda: self._once(self.eager, inputs, dys)))
        found.append(Variant("torch.compile", lambda: self._once(compiled(self.options, self.eager), inputs, dys)))
        for name, function in self.rivals().items():
            found.append(Variant(name, lambda function=function: self._once(function(), *self._own(data))))
        return found

    def _own(self, data):
        """Copies, of the same strides, of what a rival might write to."""
        inputs, dys = data
        known = {id(t) for t in self.known(data)}
        own = (t if id(t) in known else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        return tuple(own), tuple(dy.clone() for dy in dys)

    def liger(self, name):
        return getattr(liger("ops", self.options), name).apply


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Norm(_Elementwise):
    trained: bool  # the weight
    residual: bool = False
    layer: bool = False  # LayerNorm

    @property
    def operation(self):
        return "layer_norm" if self.layer else "rms_norm"

    @property
    def nbytes(self):
        return (8 if self.residual else 5) * self.tokens * self.shape.hidden * self.dtype.itemsize

    def _draw(self, random):
        size = self.tokens, self.shape.hidden
        weight = random(size[1]).requires_grad_(self.trained)
        inputs = [random(*size).requires_grad_() for _ in range(1 + self.residual)]
        bias = [random(size[1]).requires_grad_(self.trained)] if self.layer else []
        return (*inputs, weight, *bias), tuple(random(*size) for _ in range(1 + self.residual))

    def eager(self, x, *others):
        if self.layer:
            return F.layer_norm(x, x.shape[-1:], *others, EPS)
        *residual, weight = others
        h = x + residual[0] if residual else x
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)
        return (y, h) if residual else y

    def ours(self, impl, x, *others):
        if self.layer:
            return layer_norm(x, *others, EPS, impl=impl)
        *residual, weight = others
        return rms_norm(x, weight, EPS, residual=residual[0] if residual else None, impl=impl)

    def rivals(self):
        if self.layer:
            return {"liger": lambda: _with(self.liger("LigerLayerNormFunction"), EPS)}
        if self.residual:
            return {
                "F.rms_norm": lambda: lambda x, r, w: (F.rms_norm(h := x + r, h.shape[-1:], w, EPS), h),
                "liger": lambda: _with(self.liger("LigerFusedAddRMSNormFunction"), EPS),
            }
        return {
            "F.rms_norm": lambda: lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS),
            "liger": lambda: _with(self.liger("LigerRMSNormFunction"), EPS),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SwiGLU(_Elementwise):
    operation = "swiglu"

    @property
    def nbytes(self):
        return 8 * self.tokens * self.shape.intermediate * self.dtype.itemsize

    def _draw(self, random):
        size = self.tokens, self.shape.intermediate
        return (random(*size).requires_grad_(), random(*size).requires_grad_()), (random(*size),)

    @staticmethod
    def eager(gate, up):
        return F.silu(gate) * up

    @staticmethod
    def ours(impl, gate, up):
        return swiglu(gate, up, impl=impl)

    def rivals(self):
        return {"liger": lambda: self.liger("LigerSiLUMulFunction")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rotary(_Elementwise):
    operation = "rotary"

    @property
    def nbytes(self):
        heads = self.shape.heads + self.shape.key_value_heads
        return 4 * self.tokens * heads * (self.shape.hidden // self.shape.heads) * self.dtype.itemsize

    def known(self, data):
        return list(data[0][2:])

    def _draw(self, random):
        width = self.shape.hidden // self.shape.heads
        # as projections leave them, and attention their gradients: (1, T, heads, width), seen as (1, heads, T, width)
        q, k, dq, dk = (
            random(1, self.tokens, n, width).transpose(1, 2) for n in (self.shape.heads, self.shape.key_value_heads) * 2
        )
        places = torch.arange(self.tokens, device=self.device)[:, None]
        angles = places / 10000 ** (torch.arange(0, width, 2, device=self.device) / width)
        angles = torch.cat((angles, angles), -1)[None]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return (q.requires_grad_(), k.requires_grad_(), cos, sin), (dq, dk)

    @staticmethod
    def eager(q, k, cos, sin):
        def half(x):
            return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

        cos, sin = cos[:, None], sin[:, None]
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    @staticmethod
    def ours(impl, q, k, cos, sin):
        return apply_rotary(q, k, cos, sin, impl=impl)

    def rivals(self):
        return {"liger": lambda: self.liger("LigerRopeFunction")}


def _with(function, *settings):
    return lambda *inputs: function(*inputs, *settings)


def cases(options: Options) -> list[Case]:
    found = []
    for model in options.the_models():
        for tokens in options.the_tokens(quick=[256], cpu=[512], gpu=[1024, 8192]):
            common = dict(suite="norms", model=model, tokens=tokens, shape=MODELS[model], options=options)
            found += [
                Norm(label=f"RMSNorm, frozen, T={tokens}", trained=False, **common),
                Norm(label=f"RMSNorm, trained, T={tokens}", trained=True, **common),
                Norm(label=f"residual + RMSNorm, frozen, T={tokens}", trained=False, residual=True, **common),
                Norm(label=f"LayerNorm, frozen, T={tokens}", trained=False, layer=True, **common),
                SwiGLU(label=f"SwiGLU, T={tokens}", **common),
                Rotary(label=f"rotary, T={tokens}", **common),
            ]
    return found[:1] + found[4:] if options.quick else found
