"""Unlearning objectives by name. Each is one short function from a batch's labelled rows to a scalar.

    @objective(original="nll")
    def npo(rows, *, beta=0.1):
        forget = rows.forget
        ratio = forget.sum(forget.original_nll - forget.nll)          # log pi - log pi_reference, (samples,)
        return -2 / beta * F.logsigmoid(-beta * ratio).mean()

is a whole one: its name, what it needs, its options with their defaults. It sees the batch as `rows.Rows`; a
`criterion.Criterion` makes the loss of it, with a retain term from RETAIN_LOSSES.

"House mean": over a sample's labelled tokens, then over samples. OpenUnlearning (github locuslab/open-unlearning) often
averages over all labelled tokens of a batch instead, which weighs long samples more; docstrings name other differences.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F

from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import meant
from kunbr_fast.objectives import distributions as linear_rows
from kunbr_fast.objectives.rows import Rows
from kunbr_fast.values import ABOVE_ZERO, ANY, ANY_WHOLE, check

AboveZero = Annotated[float, "above 0"]


# ---------------------------------------------------------------- the registry


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective's function and what it needs.

    options: the function's keywords and their defaults. original: what it needs of the original model for the forget
    samples (and their alternates): "nll" or "hidden". alternate: which second answer it needs, one of data.ALTERNATES.
    retain: whether it has a retain term. weighted: with retain_loss="nll" it is a sum of NLLs whose weights are known
    beforehand (`losses.gradient_difference`). states: it is a function of the output of layer options["layer"], above
    which nothing runs; its retain term is its own. update(retain_coeff, retain_term, **options) -> the next step's
    retain_coeff.
    """

    name: str
    function: Callable[..., torch.Tensor]
    options: Mapping[str, Any]
    original: str | None = None
    alternate: str | None = None
    retain: bool = True
    weighted: bool = False
    states: bool = False
    update: Callable[..., float] | None = None


OBJECTIVES: dict[str, Objective] = {}


def objective(**needs: Any) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Registers a function (rows, *, options) -> scalar under its own name; `needs`: fields of `Objective`."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        OBJECTIVES[function.__name__] = Objective(function.__name__, function, options, **needs)
        return function

    return register


def check_options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The objective's options, with its defaults where none is given. ValueError for an objective or an option that
    does not exist, and for a value that does not fit."""
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective={shown(name)}{meant(name, OBJECTIVES) or ':'} expected one of {', '.join(OBJECTIVES)}"
        )
    found = OBJECTIVES[name]
    hints = get_type_hints(found.function, include_extras=True)
    result = dict(found.options)
    for option, value in (options or {}).items():
        if option not in result:
            known = f"its options are {', '.join(result)}" if result else "it has none"
            raise ValueError(f"{name}: unknown option {shown(option)}: {known}")
        result[option] = _number(f"{name}: {option}", value, hints[option])
    return result


def _number(what: str, value: Any, hint: Any) -> Any:
    above = get_origin(hint) is Annotated
    kinds = (get_args(hint)[0],) if above else (get_args(hint) or (hint,))
    kind = ANY_WHOLE if int in kinds else ABOVE_ZERO if above else ANY
    return check(what, value, kind, null=type(None) in kinds)


# ---------------------------------------------------------------- objectives of the NLL


@objective(retain=False, weighted=True)
def ga(rows: Rows, *, forget_loss_cap: float | None = None) -> torch.Tensor:
    """Gradient ascent: -mean NLL of the forget samples; retain samples are measured only. A token whose NLL is beyond
    forget_loss_cap gets no further push. arXiv 2210.01504; OpenUnlearning GradAscent."""
    nll = rows.forget.nll if forget_loss_cap is None else rows.forget.nll.clamp(max=forget_loss_cap)
    return -rows.forget.mean(nll).mean()


@objective(weighted=True)
def gradient_difference(rows: Rows, *, forget_loss_cap: float | None = None) -> torch.Tensor:
    """Gradient difference: `ga` with a retain term, KUnBR's own objective. arXiv 2203.12817; OpenUnlearning
    GradDiff."""
    return ga(rows, forget_loss_cap=forget_loss_cap)


@objective(original="nll")
def npo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Negative preference optimisation (NPO): mean over samples of -2/beta log sigmoid(-beta (log pi - log pi_ref)),
    where log pi is a sum over the sample's labelled tokens. arXiv 2404.05868; OpenUnlearning NPO."""
    ratio = rows.forget.sum(rows.forget.original_nll - rows.forget.nll)
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


@objective(original="nll")
def npo_token(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Token-wise negative preference optimisation (TNPO): `npo` for each labelled token by itself, house mean of
    -2/beta log sigmoid(-beta (log p - log p_ref)). arXiv 2502.19301."""
    ratio = rows.forget.original_nll - rows.forget.nll
    return rows.forget.mean(-2 / beta * F.logsigmoid(-beta * ratio)).mean()


@objective(original="nll", alternate="given")
def dpo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Direct preference optimisation: the alternate preferred to the forget answer, mean over samples of
    -2/beta log sigmoid(beta (log pi/pi_ref of the alternate - log pi/pi_ref of the answer)), sums over labelled tokens.
    arXiv 2305.18290, with the factor 2/beta of NPO; OpenUnlearning DPO (QAwithAlternateDataset)."""
    wins = rows.alternate.sum(rows.alternate.original_nll - rows.alternate.nll)
    loses = rows.forget.sum(rows.forget.original_nll - rows.forget.nll)
    return -2 / beta * F.logsigmoid(beta * (wins - loses)).mean()


@objective(original="nll", alternate="refusal")
def idk_dpo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Direct preference optimisation on refusals: `dpo` whose alternate is a refusal ("I do not know.").
    arXiv 2404.05868; OpenUnlearning DPO (QAwithIdkDataset)."""
    return dpo(rows, beta=beta)


@objective()
def simnpo(rows: Rows, *, beta: AboveZero = 4.5, delta: float = 0.0) -> torch.Tensor:
    """SimNPO: NPO without a reference, by mean NLL, mean over samples of -2/beta log sigmoid(beta (mean NLL - delta)).
    The paper's gamma is beta * delta. arXiv 2410.07163; OpenUnlearning SimNPO."""
    nll = rows.forget.mean(rows.forget.nll)
    return -2 / beta * F.logsigmoid(beta * (nll - delta)).mean()


@objective()
def wga(rows: Rows, *, beta: float = 1.0) -> torch.Tensor:
    """Weighted gradient ascent: -house mean of p^beta NLL, where p is the token's probability, as a weight without
    gradient. arXiv 2502.19301; OpenUnlearning WGA."""
    nll = rows.forget.nll
    return -rows.forget.mean((-beta * nll.detach()).exp() * nll).mean()


@objective()
def satimp(rows: Rows, *, beta1: float = 5.0, beta2: float = 1.0) -> torch.Tensor:
    """Saturation and importance (SatImp): -house mean of p^beta1 (1 - p)^beta2 NLL, the weight without gradient.
    arXiv 2505.11953; OpenUnlearning SatImp."""
    nll = rows.forget.nll
    p = (-nll.detach()).exp()
    return -rows.forget.mean(p**beta1 * (1 - p) ** beta2 * nll).mean()


@objective(alternate="wrong")
def ria(rows: Rows) -> torch.Tensor:
    """Random incorrect answer: house mean NLL of a wrong answer to each forget question. arXiv 2410.08827. The forget
    samples run for the reported forget_loss only."""
    return rows.alternate.mean(rows.alternate.nll).mean()


def _flat(
    rows: Rows, g: Callable[[torch.Tensor], torch.Tensor], conjugate: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """FLAT: mean over samples of f*(g(P_forget)) - g(P_alternate), where P is the mean probability of a sample's
    labelled tokens, g the optimal variational function of an f-divergence, and `conjugate` is f*(g(.)). It maximises
    the f-divergence between a template answer (the alternate) and the forget answer.

    The paper's method has no retain term: retain_coeff=0 is it.
    """
    good = rows.alternate.mean((-rows.alternate.nll).exp())
    bad = rows.forget.mean((-rows.forget.nll).exp())
    return (conjugate(bad) - g(good)).mean()


@objective(alternate="refusal")
def flat_kl(rows: Rows) -> torch.Tensor:
    """FLAT by the KL divergence: `_flat` with g(P) = P, f*(u) = exp(u - 1). arXiv 2410.11143."""
    return _flat(rows, lambda p: p, lambda p: (p - 1).exp())


@objective(alternate="refusal")
def flat_tv(rows: Rows) -> torch.Tensor:
    """FLAT by total variation: `_flat` with g(P) = tanh(P) / 2, f*(u) = u. arXiv 2410.11143."""
    return _flat(rows, lambda p: p.tanh() / 2, lambda p: p.tanh() / 2)


@objective(alternate="refusal")
def flat_js(rows: Rows) -> torch.Tensor:
    """FLAT by the Jensen-Shannon divergence: `_flat` with g(P) = log 2 - log(1 + exp(-P)),
    f*(u) = -log(2 - exp(u)). arXiv 2410.11143."""
    return _flat(rows, lambda p: math.log(2) - F.softplus(-p), lambda p: p + F.softplus(-p) - math.log(2))


@objective(alternate="refusal")
def flat_pearson(rows: Rows) -> torch.Tensor:
    """FLAT by the Pearson divergence: `_flat` with g(P) = P, f*(u) = u^2 / 4 + u. arXiv 2410.11143."""
    return _flat(rows, lambda p: p, lambda p: p**2 / 4 + p)


# ---------------------------------------------------------------- objectives of whole distributions


@objective(original="hidden")
def undial(rows: Rows, *, beta: float = 10.0) -> torch.Tensor:
    """Self-distillation on adjusted logits (UNDIAL): house mean of the cross entropy with softmax(original's logits -
    beta at the label). arXiv 2402.10052; OpenUnlearning UNDIAL (which averages over all positions, prompt and padding
    too)."""
    function = functools.partial(linear_rows.undial, beta=beta)
    return rows.forget.mean(rows.forget.each(function, original=True)).mean()


@objective()
def ceu(rows: Rows, *, skip_first: int = 1) -> torch.Tensor:
    """Cross entropy unlearning (CE-U): house mean of the cross entropy with the model's own distribution, the label
    taken out of it. A sample's first `skip_first` labelled tokens are left out of the mean, but never its last one.
    arXiv 2503.01224; OpenUnlearning CEU (ignore_first_n_answer_tokens)."""
    forget = rows.forget
    counts = (forget.place >= skip_first) | (forget.place == forget.count - 1)
    value = torch.where(counts, forget.each(linear_rows.ceu), 0)
    return (forget.sum(value) / forget.sum(counts)).mean()


@objective()
def inverted_hinge(rows: Rows) -> torch.Tensor:
    """LoKU's inverted hinge: house mean of 1 + p(label) - the largest p of another token. arXiv 2408.06621."""
    return rows.forget.mean(rows.forget.each(linear_rows.inverted_hinge)).mean()


@objective()
def negative_entropy(rows: Rows) -> torch.Tensor:
    """Negative entropy: house mean of sum p log p, which is least for a uniform distribution. arXiv 2408.00761 (TAR),
    2506.12484."""
    return rows.forget.mean(rows.forget.each(linear_rows.negative_entropy)).mean()


@objective()
def logit_margin(rows: Rows) -> torch.Tensor:
    """Logit margin: house mean of max(0, the label's logit - the mean logit). arXiv 2506.12484 (MUDMAN)."""
    return rows.forget.mean(rows.forget.each(linear_rows.logit_margin)).mean()


def _dual_update(retain_coeff: float, retain_term: float, *, retain_loss_eps: float, dual_step_size: float) -> float:
    return max(0.0, retain_coeff + dual_step_size * (retain_term - retain_loss_eps))


@objective(update=_dual_update)
def pdu(rows: Rows, *, retain_loss_eps: float = 0.0, dual_step_size: float = 1.0) -> torch.Tensor:
    """Primal-dual unlearning (PDU): flatten the forget samples' logits subject to retain term <= retain_loss_eps.

    House mean of (largest logit - mean logit)^2, plus lambda * (retain term - retain_loss_eps). lambda begins at
    retain_coeff (anew at each block) and after every step becomes
    max(0, lambda + dual_step_size * (that step's retain term - retain_loss_eps)).
    arXiv 2506.05314; OpenUnlearning PDU with primal_dual, dual_update_upon="step" and no dual warm-up (its forget loss
    is taken at the positions that hold a label, not at those that predict one).
    """
    # retain_loss_eps comes with the retain term, of which a part of a batch has its share
    return rows.forget.mean(rows.forget.each(linear_rows.margin_flattening)).mean()


# ---------------------------------------------------------------- an objective of hidden states


@objective(states=True)
def rmu(rows: Rows, *, layer: int | None = None, steering_coeff: float = 6.5, seed: int = 0) -> torch.Tensor:
    """Representation misdirection (RMU): mean squared error of layer `layer`'s output to steering_coeff * u, where u is
    a fixed random direction of length 1 (entries uniform in [0, 1), from `seed`).

    Mean over the D entries, over all tokens of a sample, over samples; so is its retain term, see `retain_states`.
    layer: a block's last one where none is given. Nothing above it runs, so there is no NLL to report.
    arXiv 2403.03218; OpenUnlearning RMU with EMBED_DIFF (at labelled tokens only).
    """
    states = rows.forget.states
    generator = torch.Generator().manual_seed(seed)
    direction = torch.rand(states.shape[1], generator=generator, dtype=torch.float64)
    target = (direction * (steering_coeff / direction.norm())).to(states)
    return rows.forget.token_mean((states - target).square().mean(1)).mean()


# ---------------------------------------------------------------- retain terms


def _retain_nll(rows: Rows) -> torch.Tensor:
    """House mean of the NLL."""
    return rows.retain.mean(rows.retain.nll).mean()


def _retain_kl(rows: Rows) -> torch.Tensor:
    """House mean of KL(original || now)."""
    return rows.retain.mean(rows.retain.each(linear_rows.kl, original=True)).mean()


def _retain_kl_all(rows: Rows) -> torch.Tensor:
    """KL(original || now), mean over all tokens of each sample, labelled or not, then over samples."""
    return rows.retain.token_mean(rows.retain.each_token(linear_rows.kl)).mean()


def _retain_hidden(rows: Rows) -> torch.Tensor:
    """House mean of the squared error, mean over the D entries, of the hidden states after the final norm."""
    return rows.retain.mean((rows.retain.hidden - rows.retain.original_hidden).square().mean(1)).mean()


def retain_states(rows: Rows) -> torch.Tensor:
    """Of objectives with `states`: mean squared error of the layer's output to the original's."""
    return rows.retain.token_mean((rows.retain.states - rows.retain.original_states).square().mean(1)).mean()


# name -> (the term, what it needs of the original model)
RETAIN_LOSSES: dict[str, tuple[Callable[[Rows], torch.Tensor], str | None]] = {
    "nll": (_retain_nll, None),
    "kl": (_retain_kl, "hidden"),
    "kl_all": (_retain_kl_all, "hidden_all"),
    "hidden_mse": (_retain_hidden, "hidden"),
    "hidden_layers": (_retain_nll, None),  # and the layers' part, see hidden_layers.py
}
