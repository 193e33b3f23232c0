"""Head and loss over R labelled rows: the mean NLL and its gradients, logits in chunks or whole.

Every variant returns the mean of the rows' NLL and its gradient in the hidden rows ("frozen": what unlearning asks for,
most of the time) and in the head's weight too ("trained"). Ours takes a weight of any sign for each row, which rivals
do not: here every row weighs 1/R. The largest R is measured with a quarter of the vocabulary too: peak_mib follows V
where logits are whole, and hardly where they are in chunks of a bounded size.

Needed FLOPs: 2*R*D*V for the logits and as many for each gradient; what recomputes logits is given nothing for it.
Needed bytes: hidden and weight read once, each gradient written once. Once, although the gradient needs each row's sum
over the vocabulary: a running maximum and sum, by which what is gathered so far is rescaled, would do it in one pass.

Rivals: plain torch, which holds logits in their dtype and in fp32; torch.compile of it; torch's own chunked
`F.linear_cross_entropy` (it keeps its gradients where kept_mib does not look) in chunks of as many rows as ours has,
for its own choice, of a few, is far slower; Liger's, which makes gradients in the forward as ours does;
cut-cross-entropy, which recomputes the logits. By default that one leaves out tiles of small gradients: as "filtered"
it does, and is no variant where that changes a gradient by more than rivals may differ; else it is asked not to.
"""

import dataclasses

import torch
import torch.nn.functional as F

from kunbr_fast.benchmarks.harness import RIVAL_LIMIT, Case, Options, Skip, Variant, compiled, imported
from kunbr_fast.benchmarks.models import liger
from kunbr_fast.benchmarks.shapes import MODELS
from kunbr_fast.model.decoder import Head
from kunbr_fast.objectives.losses import linear_loss

CHUNK_ROWS = 1024  # of F.linear_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LinearLoss(Case):
    """tokens: R."""

    hidden: int  # D
    vocabulary: int  # V
    trained: bool  # the head
    counts_kept = True

    @property
    def flops(self):
        return 2 * self.tokens * self.hidden * self.vocabulary * (2 + self.trained)

    @property
    def nbytes(self):
        return 2 * self.tokens * self.hidden * self.dtype.itemsize + (1 + self.trained) * self._weight_bytes

    @property
    def _weight_bytes(self):
        return self.vocabulary * self.hidden * self.dtype.itemsize

    def draw(self):
        """(hidden, the head's weight, targets); logits have a variance of 1."""
        generator = torch.Generator(self.device).manual_seed(0)
        kind = dict(generator=generator, device=self.device)
        hidden = torch.randn(self.tokens, self.hidden, **kind).to(self.dtype).requires_grad_()
        weight = torch.randn(self.vocabulary, self.hidden, **kind).mul_(self.hidden**-0.5).to(self.dtype)
        targets = torch.randint(self.vocabulary, (self.tokens,), **kind)
        return hidden, torch.nn.Parameter(weight, requires_grad=self.trained), targets

    def small(self):
        return dataclasses.replace(self, tokens=67, hidden=96, vocabulary=1003)

    def known(self, data):
        return list(data[1:])

    def truth(self, data):
        hidden, weight, targets = data
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
        return self._once(_eager, (*wide, targets))()

    @staticmethod
    def _once(loss_of, data):
        """loss_of(hidden, weight, targets) -> the mean NLL"""
        names = ["gradient of hidden"] + ["gradient of weight"] * data[1].requires_grad

        def run():
            loss = loss_of(*data)
            return {"loss": loss} | dict(zip(names, torch.autograd.grad(loss, data[: len(names)])))

        return run

    def variants(self, data):
        def ours(impl):
            row_weights = torch.full((self.tokens,), 1 / self.tokens, dtype=torch.float64, device=self.device)
            linear = torch.nn.Linear(self.hidden, self.vocabulary, bias=False, device="meta")
            linear.weight = data[1]
            head = Head(linear)
            return self._once(lambda x, _, targets: linear_loss(x, head, targets, row_weights, impl=impl)[0], data)

        return self.implemented(ours, "linear_loss") + [
            Variant("eager", lambda: self._once(_eager, data)),
            Variant("torch.compile", lambda: self._once(compiled(self.options, _eager), data)),
            Variant("F.linear_cross_entropy", lambda: self._once(_torch_chunked(), data)),
            Variant("liger", lambda: self._once(self._liger(), data)),
            Variant("cut-cross-entropy", lambda: self._once(self._cut(None), data)),
            Variant("cut-cross-entropy filtered", lambda: self._filtered(data)),
        ]

    def _liger(self):
        function = liger("ops", self.options).LigerFusedLinearCrossEntropyFunction
        return lambda hidden, weight, targets: function.apply(hidden, weight, targets)[0]

    def _cut(self, filter_eps):
        if not self.options.gpu:
            raise Skip("its kernels need a GPU")
        if self.dtype == torch.float32:
            raise Skip("its backward pass does not serve float32")
        function = imported("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
        return lambda hidden, weight, targets: function(hidden, weight, targets, filter_eps=filter_eps, impl="cce")

    def _filtered(self, data):
        """The gate's vocabulary is too small for any gradient to count as small: it is looked at here, at each
        shape."""
        run = self._once(self._cut("high"), data)
        found, whole = run(), self._once(self._cut(None), data)()
        error = self.error(found, whole)
        if not error <= RIVAL_LIMIT:
            raise Skip(f"its filter changes a gradient by {error:.0%} here")
        return run


def _eager(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def _torch_chunked():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Skip("torch has it since 2.13")
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS, chunking_method=None)
    return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, options=chunks)


def cases(options: Options) -> list[Case]:
    models, counts = options.the_models(), options.the_tokens(quick=[32], cpu=[128, 512], gpu=[256, 2048, 8192])

    def case(model, rows, part=1, trained=False):
        vocabulary = MODELS[model].vocabulary // part
        label = f"head {'trained' if trained else 'frozen'}, R={rows}, V={vocabulary}"
        sizes = dict(tokens=rows, hidden=MODELS[model].hidden, vocabulary=vocabulary)
        return LinearLoss(suite="linear_loss", model=model, label=label, options=options, trained=trained, **sizes)

    if options.quick or not counts:
        return [case(model, rows, 4) for model in models for rows in counts]
    found = []
    for model in models:
        found += [case(model, rows) for rows in counts]
        found += [case(model, max(counts), 4), case(model, counts[(len(counts) - 1) // 2], trained=True)]
    return found
