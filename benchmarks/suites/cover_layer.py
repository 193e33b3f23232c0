"""One decoder layer, forward and backward: a cover layer (frozen, dX alone) and an active one (dX and dW).

The layer is a Llama's (or Qwen's) of the named model's shape, on one sequence of T tokens. ours: the layer as
`kunbr_fast.patched` leaves it. Rivals: the model's own layer, torch.compile of it, and Liger's RMSNorm, SwiGLU and
rotary embedding put into a copy of it (`models.with_liger`: into the instance, not into the process). All share one set
of weights.

Needed FLOPs: matrix products, 2 T a weight for each of forward, dX and (active) dW; attention, 12 a pair of a query and
a key that it sees and entry of a query, 4 of them forward. Needed bytes: weights read once forward and once backward,
(active) dW written once, x, y, dy, dx; nothing that stays between forward and backward. `kept_mib` is what does stay,
without weights and rotary angles.
"""

import dataclasses

import torch

from kunbr_fast.benchmarks.harness import Case, Options, Variant, compiled
from kunbr_fast.benchmarks.models import build, causal_pairs, copied, exact_norms, matrices, with_liger
from kunbr_fast.benchmarks.shapes import MODELS, Shape, odd
from kunbr_fast.model.patch import patched


def layer_flops(shape: Shape, tokens: int, pairs: int, active: bool) -> int:
    """pairs: of a query and a key, in each head."""
    return (6 if active else 4) * matrices(shape) * tokens + 12 * pairs * shape.hidden


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer(Case):
    shape: Shape
    active: bool
    counts_kept = True

    @property
    def flops(self):
        return layer_flops(self.shape, self.tokens, causal_pairs([self.tokens]), self.active)

    @property
    def nbytes(self):
        weights = matrices(self.shape) + 2 * self.shape.hidden
        return ((3 if self.active else 2) * weights + 4 * self.tokens * self.shape.hidden) * self.dtype.itemsize

    def draw(self):
        """(model of one layer, x, dy, rotary angles)"""
        torch.manual_seed(0)
        one = dataclasses.replace(self.shape, layers=1, vocabulary=8)
        model = build(self.model, self.dtype, self.device, one).requires_grad_(self.active)
        x, dy = (torch.randn(1, self.tokens, one.hidden, device=self.device).to(self.dtype) for _ in range(2))
        places = torch.arange(self.tokens, device=self.device)[None]
        return model, x.requires_grad_(), dy, model.model.rotary_emb(x, places)

    def small(self):
        return dataclasses.replace(self, shape=odd(self.shape), tokens=63)

    def known(self, data):
        model, _, _, angles = data
        return [*model.parameters(), *angles]

    def truth(self, data):
        model, x, dy, angles = data
        layer = exact_norms(
            copied(model, {p: torch.nn.Parameter(p.double(), p.requires_grad) for p in model.parameters()})
        )
        wide = x.detach().double().requires_grad_(), dy.double(), tuple(angle.double() for angle in angles)
        return _once(layer.model.layers[0], *wide)()

    def variants(self, data):
        model, *rest = data
        own = model.model.layers[0]

        def ours(impl):
            with patched(model, impl=impl):  # a copy that is made inside keeps the fused forwards
                layer = copied(own)
            return _once(layer, *rest)

        return [
            *self.implemented(ours, "rms_norm", "swiglu", "rotary"),
            Variant("eager", lambda: _once(own, *rest)),
            Variant("torch.compile", lambda: _once(own, *rest, call=compiled(self.options, copied(own)))),
            Variant("liger", lambda: _once(with_liger(copied(own), self.options), *rest)),
        ]


def _once(layer, x, dy, angles, call=None):
    """call: what runs in place of `layer`, with its weights."""
    call = layer if call is None else call
    weights = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def run():
        y = call(x, position_embeddings=angles, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y  # transformers 4
        dx, *dws = torch.autograd.grad(y, [x, *weights.values()], dy)
        return {"y": y.detach(), "dx": dx} | {f"gradient of {name}": dw for name, dw in zip(weights, dws)}

    return run


def cases(options: Options) -> list[Case]:
    return [
        Layer(
            suite="cover_layer", model=model, label=f"{'active' if active else 'cover'}, T={tokens}", tokens=tokens,
            shape=MODELS[model], active=active, options=options,
        )
        for model in options.the_models()
        for tokens in options.the_tokens(quick=[128], cpu=[512], gpu=[1024, 4096])
        for active in (False, True)
    ]  # fmt: skip
