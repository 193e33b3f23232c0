"""The head, and a value of each labelled row. Objectives that are no weighted sum of NLLs are built from these.

`linear_nll` gives each row's negative log-likelihood; `linear_rows` a function of its whole distribution. Neither holds
an (R, V) tensor, and neither waits for the device.

With a frozen head the forward makes each row's own gradient, d value[r] / d hidden[r], and the backward scales it by
what comes in: rows do not share a gradient, so this is exact. A trained head's gradient is a sum over rows, whose
weights only the backward knows: there the forward gives values alone, and the backward runs the head again.

Index letters: R labelled rows, D hidden size, V vocabulary; r rows of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from kunbr_fast.kernels.linear_loss import op
from kunbr_fast.kernels.linear_loss import reference as plain
from kunbr_fast.model.decoder import Head


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, impl):
        need_hidden, *of_head = ctx.needs_input_grad[:3]
        ctx.trained, ctx.options = any(of_head), (scale, softcap, impl)
        ones = hidden.new_ones(hidden.shape[:1], dtype=torch.float32)
        unit = need_hidden and not ctx.trained
        _, nll, d_hidden, _, _ = torch.ops.kunbr_fast.linear_loss(
            hidden, weight, bias, targets, ones, None, scale, softcap, unit, False, False, impl
        )
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.trained else (d_hidden,)))
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_nll):
        if not ctx.trained:
            (unit,) = ctx.saved_tensors
            return (unit * d_nll[:, None]).to(unit.dtype), *[None] * 6
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, impl = ctx.options
        needs = ctx.needs_input_grad[:3]
        _, _, *grads = torch.ops.kunbr_fast.linear_loss(
            hidden, weight, bias, targets, d_nll, None, scale, softcap, *needs, impl
        )
        return *(grad if need else None for grad, need in zip(grads, needs)), *[None] * 4


def linear_nll(hidden: torch.Tensor, head: Head, targets: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Each row's negative log-likelihood, (R,): `cross_entropy(head(hidden), targets, reduction="none")`.

    hidden (R, D) after the final norm; targets (R,) int64. fp32, fp64 for fp64 inputs; in nats. Differentiable, once,
    in hidden and in the head's own weight and bias where these require grad. Costs what `linear_loss` costs; a trained
    head's backward makes the logits a second time. Dtypes, autocast, impl, targets that are no row of the head, and
    errors: as `linear_loss`.
    """
    hidden, weight, bias = op.operands(hidden, head.linear.weight, head.linear.bias)
    return _LinearNLL.apply(hidden, weight, bias, targets, head.scale, head.softcap, impl)


# ---------------------------------------------------------------- a function of a row's distribution


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The arguments of `linear_rows` that have no gradient. teacher: the original's arguments of `head_logits`."""

    function: Callable
    targets: torch.Tensor | None
    teacher: tuple | None
    scale: float
    softcap: float | None

    def run(self, hidden, weight, bias, slopes=None, d_hidden=None, d_weight=None, d_bias=None) -> torch.Tensor:
        """The values (R,). With slopes (R,) also the gradient of (slopes * values).sum(): d_hidden is written, d_weight
        and d_bias are added to, those that are not None."""
        rows = max(1, plain.LOGITS_CHUNK // len(weight))
        return torch.cat(
            [
                self._chunk(slice(start, start + rows), hidden, weight, bias, slopes, d_hidden, d_weight, d_bias)
                for start in range(0, max(1, len(hidden)), rows)  # one of no rows tells the dtype
            ]
        )

    def _chunk(self, part, hidden, weight, bias, slopes, d_hidden, d_weight, d_bias) -> torch.Tensor:
        x, differentiate = hidden[part], slopes is not None
        targets = None if self.targets is None else self.targets[part]
        z_original = None if self.teacher is None else plain.head_logits(self.teacher[0][part], *self.teacher[1:])
        z = plain.head_logits(x, weight, bias, self.scale, self.softcap).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            values = self.function(z, targets, z_original)
        if values.shape != z.shape[:1]:
            raise ValueError(
                f"function gave {tuple(values.shape)} for logits {tuple(z.shape)}: expected values ({len(z)},), "
                "one a row"
            )
        if differentiate:
            if not values.requires_grad:
                raise ValueError("function's value does not depend on the logits: it has no gradient")
            (d,) = torch.autograd.grad(values, z, slopes[part].to(values.dtype))
            if self.softcap is not None:
                d = d * (1 - (z.detach() / self.softcap) ** 2)
            if self.scale != 1.0:
                d = d * self.scale
            narrow = d.to(x.dtype)  # as autograd hands it to nn.Linear
            if d_hidden is not None:
                torch.mm(narrow, weight, out=d_hidden[part])
            if d_weight is not None:
                torch.addmm(d_weight, narrow.t().to(d_weight.dtype), x.to(d_weight.dtype), out=d_weight)
            if d_bias is not None:
                d_bias += d.sum(0)
        return values.detach()


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows):
        need_hidden, *of_head = ctx.needs_input_grad[:3]
        ctx.trained, ctx.rows = any(of_head), rows
        unit, ones = None, None
        if need_hidden and not ctx.trained:
            unit, ones = torch.empty_like(hidden), hidden.new_ones(len(hidden))
        values = rows.run(hidden, weight, bias, ones, unit)
        ctx.save_for_backward(*((hidden, weight, bias) if ctx.trained else (unit,)))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        if not ctx.trained:
            (unit,) = ctx.saved_tensors
            return (unit * slopes[:, None]).to(unit.dtype), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        ctx.rows.run(hidden, weight, bias, slopes, d_hidden, d_weight, d_bias)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None


def linear_rows(
    hidden: torch.Tensor,
    head: Head,
    function: Callable,
    targets: torch.Tensor | None = None,
    original: torch.Tensor | None = None,
    original_head: Head | None = None,
) -> torch.Tensor:
    """`function(head(hidden), targets, original_head(original).detach())`, (R,), by chunks of rows.

    function(z, targets, z_original) is given a chunk's logits z (r, V), after scale and softcap and in fp32 (fp64 for
    fp64 inputs), and its rows of the others, None where not given. It returns (r,) values, each of its row alone; see
    the functions below. Differentiable, once, in hidden and in the head's own weight and bias where these require grad.

    hidden (R, D) after the final norm; targets (R,) int64; original (R, D'), the original model's hidden states at the
    same places, a constant. original_head: the original model's, by default `head`. A head that is trained is no longer
    that: then give a copy from before its training, `copy.deepcopy(decoder.head)`.

    Plain torch on every device. `function` sees at most LOGITS_CHUNK elements (kernels/linear_loss/reference.py) in a
    tensor, and is called a second time in a trained head's backward. Dtypes and autocast: as `linear_loss`. TypeError,
    ValueError for arguments that do not fit.
    """
    hidden, weight, bias = op.operands(hidden, head.linear.weight, head.linear.bias)
    op.check_head(hidden, weight, bias)
    op.check_rows(hidden, targets)
    teacher = None
    if original is not None:
        if original_head is None and any(p.requires_grad for p in head.linear.parameters()):
            raise ValueError(
                "the head requires grad, so it may not be the original model's for long: give original_head, a copy "
                "from before its training (copy.deepcopy of the head), or freeze the head"
            )
        source = original_head or head
        with torch.no_grad():
            teacher = op.operands(original, source.linear.weight, source.linear.bias)
        op.check_head(*teacher, "original", "the original's head")
        if len(original) != len(hidden) or len(teacher[1]) != len(weight) or original.device != hidden.device:
            raise ValueError(
                f"original has {len(original)} rows and {len(teacher[1])} logits each, on {original.device}: expected "
                f"hidden's {len(hidden)} rows and the head's {len(weight)} logits, on {hidden.device}"
            )
        teacher = (*teacher, source.scale, source.softcap)
    return _LinearRows.apply(hidden, weight, bias, _Rows(function, targets, teacher, head.scale, head.softcap))


# ---------------------------------------------------------------- row functions
#
# Logits z (r, V), targets (r,), the original model's logits z_original (r, V) -> values (r,). In formulas
# p = softmax(z), and sums and maxima run over the tokens v. Keywords are set by functools.partial. Logits of -inf,
# tokens that a head forbids, count as p(v) = 0 and have no gradient; z - mean(z) has no value there.


def kl(z: torch.Tensor, targets: torch.Tensor | None, z_original: torch.Tensor) -> torch.Tensor:
    """KL(original || now) = sum q(v) * (log q(v) - log p(v)), q = softmax(z_original).

    A row's sum of `F.kl_div(log p, log q, log_target=True, reduction="none")`, as OpenUnlearning's retain loss has it.
    """
    log_q = z_original.log_softmax(1)
    q = log_q.exp()
    return (q * (log_q - z.log_softmax(1)).masked_fill(q == 0, 0)).sum(1)


def undial(z: torch.Tensor, targets: torch.Tensor, z_original: torch.Tensor, *, beta: float) -> torch.Tensor:
    """UNDIAL (arXiv 2402.10052): -sum q(v) * log p(v), q = softmax(z_original - beta * onehot(target))."""
    lowered = z_original.scatter_add(1, targets[:, None], torch.full_like(z_original[:, :1], -beta))
    return _cross_entropy(z, lowered.softmax(1))


def ceu(z: torch.Tensor, targets: torch.Tensor, *_: Any) -> torch.Tensor:
    """CE-U (arXiv 2503.01224): -sum q(v) * log p(v), q = softmax(z with -inf at the target), a constant."""
    return _cross_entropy(z, z.detach().scatter(1, targets[:, None], -torch.inf).softmax(1))


def margin_flattening(z: torch.Tensor, *_: Any) -> torch.Tensor:
    """PDU's forget loss (arXiv 2506.05314): (max z - mean z)^2. Of equal maxima the first has the gradient."""
    return (z.max(1).values - z.mean(1)).square()


def inverted_hinge(z: torch.Tensor, targets: torch.Tensor, *_: Any) -> torch.Tensor:
    """LoKU's forget loss (arXiv 2408.06621): 1 + p(target) - max of p(v), v != target. Of equal maxima the first has
    the gradient."""
    p = z.softmax(1)
    return 1 + _pick(p, targets) - p.scatter(1, targets[:, None], -1.0).max(1).values


def negative_entropy(z: torch.Tensor, *_: Any) -> torch.Tensor:
    """sum p(v) * log p(v), the maximum-entropy loss (TAR, arXiv 2408.00761)."""
    log_p = z.log_softmax(1)
    return (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(1)


def logit_margin(z: torch.Tensor, targets: torch.Tensor, *_: Any) -> torch.Tensor:
    """MUDMAN's forget loss (arXiv 2506.12484): max(0, z(target) - mean z)."""
    return (_pick(z, targets) - z.mean(1)).clamp(min=0)


def _pick(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return z.gather(1, targets[:, None]).squeeze(1)


def _cross_entropy(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """-sum q(v) * log p(v); a token with q(v) = 0 adds 0, also where log p(v) is -inf."""
    return -(q * z.log_softmax(1).masked_fill(q == 0, 0)).sum(1)
