"""Unlearning objectives by name. Each is one short function from a batch's labelled rows to a scalar.

    @objective(reference="nll")
    def npo(rows, *, beta=0.1):
        forget = rows.forget
        ratio = forget.sum(forget.reference_nll - forget.nll)          # log pi - log pi_reference, (samples,)
        return -2 / beta * F.logsigmoid(-beta * ratio).mean()

is all there is to one: its name, what it needs, its options with their defaults. A `Criterion` makes the loss of it,

    loss = objective(rows) + retain_coeff * retain term

with a retain term from RETAIN_LOSSES. Forget, alternate and retain samples go through the model as one packed batch.

Reductions. House rule: a sample's loss is the mean over its labelled tokens, a batch's the mean over its samples. Where a
method is defined otherwise (NPO sums over the tokens) its docstring says so. OpenUnlearning (github
locuslab/open-unlearning) often averages over all labelled tokens of a batch instead, which weighs long samples more;
where its class does something else beyond that, the docstring says so.

No second model. What an objective needs of the original model is a `Reference`: for each sample its rows' NLL, or their
hidden states below the head (the head is then applied chunk by chunk). It is computed once, or for each batch with the
block's original weights put back (`reinserted` does that when it is given none).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kunbr_fast import linear_rows, losses
from kunbr_fast.data import PackedBatch, Sample, pack, send, with_alternates
from kunbr_fast.decoder import Decoder, Head
from kunbr_fast.layer_major import forward_to
from kunbr_fast.schedule import token_batches
from kunbr_fast.streaming import layer_stream

PARTS = ("forget", "alternate", "retain")
Needs = dict[str, tuple[str, ...]]  # of the original model: for each kind of value, which PARTS it is needed of
AboveZero = Annotated[float, "above 0"]


# ---------------------------------------------------------------- what the original model gives


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the original model gives for some samples: for each kind one tensor a sample, None where it is not needed.

    Kinds: `nll` (R_i,), of the labelled rows, fp32 (fp64 of an fp64 model); `hidden` (R_i, D), theirs after the final
    norm; `hidden_all` (T_i, D), that at all tokens; `layer.N` (T_i, D), the output of layer N at all tokens.
    """

    values: dict[str, list[torch.Tensor | None]]

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        samples: Mapping[str, Sequence[Sample]],
        needs: Needs,
        *,
        impl: str = "auto",
        batch_tokens: int = 4096,
        storage: str = "auto",
        directory: str | Path | None = None,
        progress: bool = False,
    ) -> Reference:
        """One forward pass of the original model over those of `samples` (lists by PARTS, one after the other in the
        order of the mapping) that `needs` names; the values are kept in main memory. Of a streamed model each layer is read
        once for all of them; storage, directory: where their activations wait between two layers, as in `PrefixCache`."""
        sizes = [len(part) for part in samples.values()]
        first = dict(zip(samples, itertools.accumulate(sizes, initial=0)))
        values: dict[str, list[torch.Tensor | None]] = {kind: [None] * sum(sizes) for kind in needs}
        jobs = [
            (part, indices)
            for part in samples
            if any(part in parts for parts in needs.values())
            for indices in token_batches([len(s["input_ids"]) for s in samples[part]], batch_tokens)
        ]

        def packed(job: tuple[str, list[int]]) -> PackedBatch:
            part, indices = job
            return pack([samples[part][i] for i in indices]).to(decoder.device)

        def keep(job: tuple[str, list[int]], batch: PackedBatch, kinds: Iterable[str], **state: Any) -> None:
            part, indices = job
            mine = {kind: (part,) for kind in kinds if part in needs[kind]}
            found = measure(decoder, batch, {part: range(len(indices))}, mine, impl=impl, **state)
            for kind, tensors in found.values.items():
                for i, tensor in zip(indices, tensors):
                    values[kind][first[part] + i] = tensor.cpu()

        bar = tqdm(jobs, desc="reference", unit="batch", leave=False, disable=not progress)
        if layer_stream(decoder) is None:
            for job in bar:
                keep(job, packed(job), needs)
            return cls(values)
        stops: dict[int, list[str]] = {}  # what can be had of the input of a layer, that and the next one in its buffer
        for kind in needs:
            layer = int(kind.partition(".")[2]) if kind.startswith("layer.") else decoder.num_layers - 1
            stops.setdefault(layer, []).append(kind)
        batches = [packed(job) for job in jobs]
        with bar:
            for layer, number, hidden in forward_to(decoder, batches, stops, storage, directory):
                keep(jobs[number], batches[number], stops[layer], start=layer, hidden=hidden)
                bar.update(layer == max(stops))
        return cls(values)

    def batch(self, indices: Iterable[int]) -> Reference:
        """The values of the samples `indices`, in their order."""
        indices = list(indices)
        return Reference({kind: [tensors[i] for i in indices] for kind, tensors in self.values.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as flat tensors, for a file; `from_tensors` reads them."""
        flat = {}
        for kind, tensors in self.values.items():
            flat[kind] = torch.cat([t for t in tensors if t is not None])
            flat[f"{kind}:rows"] = torch.tensor([0 if t is None else len(t) for t in tensors])
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, torch.Tensor]) -> Reference:
        values = {}
        for kind in (name for name in flat if not name.endswith(":rows")):
            rows = flat[f"{kind}:rows"].tolist()
            values[kind] = [part if count else None for part, count in zip(flat[kind].split(rows), rows)]
        return cls(values)


@torch.no_grad()
def measure(
    decoder: Decoder,
    batch: PackedBatch,
    parts: Mapping[str, range],
    needs: Needs,
    *,
    start: int = 0,
    hidden: torch.Tensor | None = None,
    impl: str = "auto",
) -> Reference:
    """The `Reference` values of one packed batch from the weights that the decoder has now. parts: which of its samples
    are the forget, alternate and retain ones; start, hidden: as in `Decoder.run`."""
    values: dict[str, list[torch.Tensor | None]] = {kind: [None] * batch.num_samples for kind in needs}

    def keep(kind: str, tensors: Sequence[torch.Tensor]) -> None:
        for part in needs.get(kind, ()):
            for i in parts.get(part, ()):
                values[kind][i] = tensors[i]

    for layer in sorted(int(kind.partition(".")[2]) for kind in needs if kind.startswith("layer.")):
        hidden = decoder.run(batch, start, layer + 1, hidden)
        start = layer + 1
        keep(f"layer.{layer}", hidden.split(batch.lengths))
    if needs.keys() & {"nll", "hidden", "hidden_all"}:
        every = "hidden_all" in needs
        final = decoder.final(decoder.run(batch, start, None, hidden, rows=not every))
        if every:
            keep("hidden_all", final.split(batch.lengths))
            final = final[batch.rows]
        keep("hidden", final.split(batch.row_counts))
        if "nll" in needs:
            nll = linear_rows.linear_nll(final, decoder.head, batch.targets, impl=impl)
            keep("nll", nll.split(batch.row_counts))
    return Reference(values)


# ---------------------------------------------------------------- what an objective sees


def _sums(x: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sum of x over the entries of each owner. By a mask and not by index_add, whose order of additions
    differs from run to run on a GPU."""
    mine = torch.arange(count, device=x.device)[:, None] == owner
    return torch.where(mine, x, 0).sum(1)


class Part:
    """The forget, the alternate or the retain samples of a batch: b samples, r labelled rows, t tokens, in order.

    nll (r,): differentiable. reference_nll (r,): the original model's. states, reference_states (t, D): the output of
    the objective's layer (of an objective with `states`), and the original's. All in fp32, or fp64 of fp64 models.
    """

    def __init__(self, rows: Rows, samples: range):
        self._rows, self.samples = rows, samples
        counts, lengths = rows.batch.row_counts, rows.batch.lengths
        self.num_samples, before = len(samples), samples.start
        self._at = slice(sum(counts[:before]), sum(counts[: samples.stop]))
        self._tokens = slice(sum(lengths[:before]), sum(lengths[: samples.stop]))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's sum of x (r,) over its labelled rows."""
        return _sums(x, self._rows.batch.row_sample[self._at] - self.samples.start, self.num_samples)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's mean of x (r,) over its labelled rows."""
        return self.sum(x) / self._rows.batch.rows_per_sample[self.samples.start : self.samples.stop]

    def token_mean(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) each sample's mean of x (t,) over its tokens, labelled or not."""
        owner = self._rows.batch.sample_of_token[self._tokens] - self.samples.start
        lengths = torch.tensor(self._rows.batch.lengths[self.samples.start : self.samples.stop], dtype=x.dtype)
        return _sums(x, owner, self.num_samples) / send(lengths, x.device)

    @property
    def place(self) -> torch.Tensor:
        """(r,) how many labelled rows of its sample come before each row."""
        number = torch.arange(self._at.start, self._at.stop, device=self._rows.batch.row_sample.device)
        counts = self._rows.batch.rows_per_sample
        first = counts.cumsum(0) - counts
        return number - first[self._rows.batch.row_sample[self._at]]

    @property
    def count(self) -> torch.Tensor:
        """(r,) how many labelled rows each row's sample has."""
        return self._rows.batch.rows_per_sample[self._rows.batch.row_sample[self._at]]

    @property
    def nll(self) -> torch.Tensor:
        return self._rows.nll[self._at]

    @property
    def reference_nll(self) -> torch.Tensor:
        return self._reference("nll", self._at)

    @property
    def hidden(self) -> torch.Tensor:
        """(r, D) after the final norm."""
        return _wide(self._rows.hidden[self._at])

    @property
    def reference_hidden(self) -> torch.Tensor:
        return _wide(self._reference("hidden", self._at))

    @property
    def states(self) -> torch.Tensor:
        return _wide(self._rows.states[self._tokens])

    @property
    def reference_states(self) -> torch.Tensor:
        return _wide(self._reference(f"layer.{self._rows.layer}", self._tokens))

    def each(self, function: Callable[..., Any], reference: bool = False) -> torch.Tensor:
        """(r,) `function` of each row's whole distribution (a row function of `linear_rows`), differentiable; with
        `reference` it sees the original's logits too."""
        rows, other = self._rows, self._reference("hidden", self._at) if reference else None
        return self._distributions(function, rows.hidden[self._at], rows.batch.targets[self._at], other)

    def each_token(self, function: Callable[..., Any]) -> torch.Tensor:
        """(t,) `function` of the distribution at every token, and of the original's there."""
        other = self._reference("hidden_all", self._tokens)
        return self._distributions(function, self._rows.hidden_all[self._tokens], None, other)

    def _distributions(self, function, hidden, targets, reference) -> torch.Tensor:
        rows = self._rows
        (value,) = linear_rows.linear_rows(
            hidden, rows.head, function, targets, reference, reference_head=rows.reference_head
        )
        return value

    def _reference(self, kind: str, entries: slice) -> torch.Tensor:
        values = {} if self._rows.reference is None else self._rows.reference.values
        found = [values[kind][i] for i in self.samples] if kind in values else [None]
        if any(tensor is None for tensor in found):
            raise ValueError(f"the original model's {kind} of these samples is needed: give reference=")
        found = torch.cat(found)
        if len(found) != entries.stop - entries.start:
            raise ValueError(
                f"the reference has {len(found)} rows of {kind} for samples that have {entries.stop - entries.start}: "
                "give the Reference of this batch's samples, in its order (Reference.batch)"
            )
        return found.to(self._rows.batch.labels.device, non_blocking=True)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclasses.dataclass
class Rows:
    """A packed batch as an objective sees it: `forget`, `alternate` (a second answer to each forget prompt, in the same
    order) and `retain`, each a `Part`; `retain_coeff`, the weight that the retain term has in this step."""

    batch: PackedBatch
    parts: Mapping[str, range]
    retain_coeff: float
    head: Head
    nll: torch.Tensor | None = None  # (R,)
    hidden: torch.Tensor | None = None  # (R, D)
    hidden_all: torch.Tensor | None = None  # (T, D)
    states: torch.Tensor | None = None  # (T, D), the output of `layer`
    layer: int | None = None
    reference: Reference | None = None
    reference_head: Head | None = None

    def __post_init__(self):
        self.forget, self.alternate, self.retain = (Part(self, self.parts[name]) for name in PARTS)


# ---------------------------------------------------------------- the registry


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective's function and what it needs.

    options: the function's keyword arguments and their defaults. reference: what it needs of the original model for the
    forget samples (and their alternates): "nll" or "hidden". alternate: which second answer it needs, one of
    data.ALTERNATES. retain: whether it has a retain term. weighted: with retain_loss="nll" it is a sum of NLLs whose
    weights are known beforehand (`losses.gradient_difference`). states: it is a function of the output of layer
    options["layer"], and nothing above that layer runs; its retain term is its own. update(retain_coeff, retain_term,
    **options) -> retain_coeff of the next step.
    """

    name: str
    function: Callable[..., torch.Tensor]
    options: Mapping[str, Any]
    reference: str | None = None
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
        near = difflib.get_close_matches(str(name), OBJECTIVES, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"objective={name!r}: {hint}expected one of {', '.join(OBJECTIVES)}")
    found = OBJECTIVES[name]
    hints = get_type_hints(found.function, include_extras=True)
    result = dict(found.options)
    for option, value in (options or {}).items():
        if option not in result:
            known = f"its options are {', '.join(result)}" if result else "it has none"
            raise ValueError(f"{name}: unknown option {option!r}: {known}")
        result[option] = _number(f"{name}: {option}", value, hints[option])
    return result


def _number(what: str, value: Any, hint: Any) -> Any:
    above = get_origin(hint) is Annotated
    kinds = (get_args(hint)[0],) if above else (get_args(hint) or (hint,))
    if value is None and type(None) in kinds:
        return None
    if float in kinds and not isinstance(value, bool):
        try:  # YAML reads 1e-5 as a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (number > 0 or not above):
            return number
    elif int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    expected = "an integer" if int in kinds else "a number above 0" if above else "a finite number"
    raise ValueError(f"{what}={value!r}: expected {expected}" + (" or null" if type(None) in kinds else ""))


# ---------------------------------------------------------------- objectives of the NLL


@objective(retain=False, weighted=True)
def ga(rows: Rows, *, forget_loss_cap: float | None = None) -> torch.Tensor:
    """Gradient ascent: -mean NLL of the forget samples, and nothing else (retain samples are measured only).

    A token whose NLL is beyond forget_loss_cap gets no further push. arXiv 2210.01504; OpenUnlearning GradAscent.
    """
    nll = rows.forget.nll if forget_loss_cap is None else rows.forget.nll.clamp(max=forget_loss_cap)
    return -rows.forget.mean(nll).mean()


@objective(weighted=True)
def gradient_difference(rows: Rows, *, forget_loss_cap: float | None = None) -> torch.Tensor:
    """`ga` with a retain term: KUnBR's own objective. arXiv 2203.12817; OpenUnlearning GradDiff."""
    return ga(rows, forget_loss_cap=forget_loss_cap)


@objective(reference="nll")
def npo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Negative preference optimisation: mean over samples of -2/beta log sigmoid(-beta (log pi - log pi_ref)).

    log pi is the sum over the sample's labelled tokens, not their mean. arXiv 2404.05868; OpenUnlearning NPO.
    """
    ratio = rows.forget.sum(rows.forget.reference_nll - rows.forget.nll)
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


@objective(reference="nll")
def npo_token(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """`npo` for each labelled token by itself (TNPO): house mean of -2/beta log sigmoid(-beta (log p - log p_ref)).
    arXiv 2502.19301."""
    ratio = rows.forget.reference_nll - rows.forget.nll
    return rows.forget.mean(-2 / beta * F.logsigmoid(-beta * ratio)).mean()


@objective(reference="nll", alternate="given")
def dpo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """Direct preference optimisation, the alternate preferred to the forget answer: mean over samples of
    -2/beta log sigmoid(beta (log pi/pi_ref of the alternate - log pi/pi_ref of the answer)), sums over labelled tokens.

    arXiv 2305.18290, with the factor 2/beta of NPO; OpenUnlearning DPO (QAwithAlternateDataset).
    """
    wins = rows.alternate.sum(rows.alternate.reference_nll - rows.alternate.nll)
    loses = rows.forget.sum(rows.forget.reference_nll - rows.forget.nll)
    return -2 / beta * F.logsigmoid(beta * (wins - loses)).mean()


@objective(reference="nll", alternate="refusal")
def idk_dpo(rows: Rows, *, beta: AboveZero = 0.1) -> torch.Tensor:
    """`dpo` whose alternate is a refusal ("I do not know."). arXiv 2404.05868; OpenUnlearning DPO (QAwithIdkDataset)."""
    return dpo(rows, beta=beta)


@objective()
def simnpo(rows: Rows, *, beta: AboveZero = 4.5, delta: float = 0.0) -> torch.Tensor:
    """NPO without a reference, by mean NLL: mean over samples of -2/beta log sigmoid(beta (mean NLL - delta)).

    The paper's gamma is beta * delta. arXiv 2410.07163; OpenUnlearning SimNPO.
    """
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
    """Saturation and importance: -house mean of p^beta1 (1 - p)^beta2 NLL, the weight without gradient.
    arXiv 2505.11953; OpenUnlearning SatImp."""
    nll = rows.forget.nll
    p = (-nll.detach()).exp()
    return -rows.forget.mean(p**beta1 * (1 - p) ** beta2 * nll).mean()


@objective(alternate="wrong")
def ria(rows: Rows) -> torch.Tensor:
    """Random incorrect answer: house mean NLL of a wrong answer to each forget question. arXiv 2410.08827.

    The forget samples run too, for the forget_loss that is reported; they have no part in the loss.
    """
    return rows.alternate.mean(rows.alternate.nll).mean()


def _flat(
    rows: Rows, g: Callable[[torch.Tensor], torch.Tensor], conjugate: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """FLAT: mean over samples of f*(g(P_forget)) - g(P_alternate), where P is the mean probability of a sample's
    labelled tokens, g the optimal variational function of an f-divergence, and `conjugate` is f*(g(.)).

    Minimising it maximises the f-divergence between a template answer (the alternate) and the forget answer.
    arXiv 2410.11143, whose method has no retain term: retain_coeff=0 is it.
    """
    good = rows.alternate.mean((-rows.alternate.nll).exp())
    bad = rows.forget.mean((-rows.forget.nll).exp())
    return (conjugate(bad) - g(good)).mean()


@objective(alternate="refusal")
def flat_kl(rows: Rows) -> torch.Tensor:
    """FLAT by the KL divergence: g(P) = P, f*(u) = exp(u - 1). arXiv 2410.11143; reduction: see `_flat`."""
    return _flat(rows, lambda p: p, lambda p: (p - 1).exp())


@objective(alternate="refusal")
def flat_tv(rows: Rows) -> torch.Tensor:
    """FLAT by total variation: g(P) = tanh(P) / 2, f*(u) = u. arXiv 2410.11143; reduction: see `_flat`."""
    return _flat(rows, lambda p: p.tanh() / 2, lambda p: p.tanh() / 2)


@objective(alternate="refusal")
def flat_js(rows: Rows) -> torch.Tensor:
    """FLAT by the Jensen-Shannon divergence: g(P) = log 2 - log(1 + exp(-P)), f*(u) = -log(2 - exp(u)).
    arXiv 2410.11143; reduction: see `_flat`."""
    return _flat(rows, lambda p: math.log(2) - F.softplus(-p), lambda p: p + F.softplus(-p) - math.log(2))


@objective(alternate="refusal")
def flat_pearson(rows: Rows) -> torch.Tensor:
    """FLAT by the Pearson divergence: g(P) = P, f*(u) = u^2 / 4 + u. arXiv 2410.11143; reduction: see `_flat`."""
    return _flat(rows, lambda p: p, lambda p: p**2 / 4 + p)


# ---------------------------------------------------------------- objectives of whole distributions


@objective(reference="hidden")
def undial(rows: Rows, *, beta: float = 10.0) -> torch.Tensor:
    """Self-distillation on adjusted logits: house mean of the cross entropy with softmax(original's logits - beta at the
    label). arXiv 2402.10052; OpenUnlearning UNDIAL (which averages over all positions, prompt and padding too)."""
    function = functools.partial(linear_rows.undial, beta=beta)
    return rows.forget.mean(rows.forget.each(function, reference=True)).mean()


@objective()
def ceu(rows: Rows, *, skip_first: int = 1) -> torch.Tensor:
    """Cross entropy unlearning: house mean of the cross entropy with the model's own distribution, the label taken out
    of it (its logit at -infinity, without gradient).

    A sample's first `skip_first` labelled tokens are left out of the mean, but never its last one.
    arXiv 2503.01224; OpenUnlearning CEU (ignore_first_n_answer_tokens).
    """
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
    """House mean of sum p log p, which is least for a uniform distribution. arXiv 2408.00761 (TAR), 2506.12484."""
    return rows.forget.mean(rows.forget.each(linear_rows.negative_entropy)).mean()


@objective()
def logit_margin(rows: Rows) -> torch.Tensor:
    """House mean of max(0, the label's logit - the mean logit). arXiv 2506.12484 (MUDMAN)."""
    return rows.forget.mean(rows.forget.each(linear_rows.logit_margin)).mean()


def _dual_update(retain_coeff: float, retain_term: float, *, retain_loss_eps: float, dual_step_size: float) -> float:
    return max(0.0, retain_coeff + dual_step_size * (retain_term - retain_loss_eps))


@objective(update=_dual_update)
def pdu(rows: Rows, *, retain_loss_eps: float = 0.0, dual_step_size: float = 1.0) -> torch.Tensor:
    """Primal-dual unlearning: flatten the forget samples' logits subject to retain term <= retain_loss_eps.

    The Lagrangian: house mean of (largest logit - mean logit)^2, plus lambda * (retain term - retain_loss_eps).
    lambda begins at retain_coeff (anew at each block) and after every step becomes
    max(0, lambda + dual_step_size * (that step's retain term - retain_loss_eps)).
    arXiv 2506.05314; OpenUnlearning PDU with primal_dual, dual_update_upon="step" and no dual warm-up (its forget loss is
    taken at the positions that hold a label, not at those that predict one).
    """
    # retain_loss_eps comes with the retain term, of which a part of a batch has its share
    return rows.forget.mean(rows.forget.each(linear_rows.margin_flattening)).mean()


# ---------------------------------------------------------------- an objective of hidden states


@objective(states=True)
def rmu(rows: Rows, *, layer: int | None = None, steering_coeff: float = 6.5, seed: int = 0) -> torch.Tensor:
    """Representation misdirection: mean squared error of layer `layer`'s output to steering_coeff * u, where u is a fixed
    random direction of length 1 (entries uniform in [0, 1), from `seed`).

    Its retain term is the mean squared error of the retain samples' states to the original's. Both: mean over the D
    entries, over all tokens of a sample, over samples. Nothing above the layer runs, so there is no NLL to report.
    layer: a block's last one where none is given. arXiv 2403.03218; OpenUnlearning RMU with EMBED_DIFF (at labelled
    tokens only).
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
    return rows.retain.mean(rows.retain.each(linear_rows.kl, reference=True)).mean()


def _retain_kl_all(rows: Rows) -> torch.Tensor:
    """KL(original || now), mean over all tokens of each sample, labelled or not, then over samples."""
    return rows.retain.token_mean(rows.retain.each_token(linear_rows.kl)).mean()


def _retain_hidden(rows: Rows) -> torch.Tensor:
    """House mean of the squared error, mean over the D entries, of the hidden states after the final norm."""
    return rows.retain.mean((rows.retain.hidden - rows.retain.reference_hidden).square().mean(1)).mean()


def _retain_states(rows: Rows) -> torch.Tensor:
    """Of objectives with `states`: mean squared error of the layer's output, over all tokens."""
    return rows.retain.token_mean((rows.retain.states - rows.retain.reference_states).square().mean(1)).mean()


# name -> (the term, what it needs of the original model)
RETAIN_LOSSES: dict[str, tuple[Callable[[Rows], torch.Tensor], str | None]] = {
    "nll": (_retain_nll, None),
    "kl": (_retain_kl, "hidden"),
    "kl_all": (_retain_kl_all, "hidden_all"),
    "hidden_mse": (_retain_hidden, "hidden"),
}


# ---------------------------------------------------------------- the criterion


class Criterion:
    """An objective with its options and its retain term: what a training minimises.

        criterion = Criterion("npo", {"beta": 0.1}, retain_loss="kl")
        batch, num_forget = criterion.pack(forget, retain)          # samples or padded batches
        loss, nll = criterion(decoder, batch.to(decoder.device), num_forget, reference=reference)
        loss.backward(); optimizer.step(); criterion.advance()

    `needs` tells what `reference` must hold of the batch's samples (nothing, where it is empty); see `Reference.of`.
    forget_loss_cap: as the option of that name. block: the layers that are trained, None for all of them.

    Errors: ValueError for names and options that do not exist or do not fit together.
    """

    def __init__(
        self,
        objective: str = "gradient_difference",
        options: Mapping[str, Any] | None = None,
        *,
        retain_loss: str = "nll",
        retain_coeff: float = 1.0,
        forget_loss_cap: float | None = None,
        block: range | None = None,
    ):
        self.options = check_options(objective, options)
        self.objective = OBJECTIVES[objective]
        if retain_loss not in RETAIN_LOSSES:
            raise ValueError(f"retain_loss={retain_loss!r}: expected one of {', '.join(RETAIN_LOSSES)}")
        if retain_loss != "nll" and (self.objective.states or not self.objective.retain):
            own = "has its own retain term" if self.objective.states else "has no retain term"
            raise ValueError(f"retain_loss={retain_loss!r}: {objective} {own}: leave retain_loss out")
        if forget_loss_cap is not None:
            if "forget_loss_cap" not in self.options:
                raise ValueError(f"forget_loss_cap={forget_loss_cap}: {objective} has none: leave it out")
            self.options["forget_loss_cap"] = forget_loss_cap
        self.retain_loss, self.retain_coeff = retain_loss, retain_coeff if self.objective.retain else 0.0
        self.retain_scale = (
            1.0  # for a part of a batch, whose share of the retain samples is not that of the forget ones
        )
        self.share = 1.0  # what this process's part is of a step that several share (`micro_batching.share_of`)
        self.layer: int | None = None  # that an objective of hidden states is taken at
        if self.objective.states:
            if self.options["layer"] is None and block is None:
                raise ValueError(f"{objective} on all layers: say at which one, by the option layer")
            if self.options["layer"] is None:
                self.options["layer"] = block.stop - 1
            self.layer = self.options["layer"]
        self.terms: list[float] = []  # the retain term of each loss since the last step

    @property
    def alternate(self) -> str | None:
        """Which second answer each forget sample must bring, one of data.ALTERNATES, or None."""
        return self.objective.alternate

    @property
    def needs(self) -> Needs:
        """What the loss needs of the original model, as `Reference.of` and `measure` take it."""
        needs: dict[str, list[str]] = {}
        if self.objective.reference is not None:
            parts = ["forget", "alternate"] if self.alternate else ["forget"]
            needs[self.objective.reference] = parts
        kind = f"layer.{self.layer}" if self.objective.states else RETAIN_LOSSES[self.retain_loss][1]
        if kind is not None:
            needs[kind] = [*needs.get(kind, []), "retain"]
        return {kind: tuple(parts) for kind, parts in needs.items()}

    def copy_of_head(self, head: Head) -> Head | None:
        """What a training that changes the head keeps of the original's, if the loss needs the original's logits."""
        if self.objective.reference == "hidden" or self.retain_loss in ("kl", "kl_all"):
            linear = copy.deepcopy(head.linear).requires_grad_(False)
            return dataclasses.replace(head, linear=linear)
        return None

    def parts(self, batch: PackedBatch, num_forget: int) -> dict[str, range]:
        """Which samples of a batch are which: forget, then (if the objective takes them) alternate, then retain."""
        second = num_forget * (2 if self.alternate else 1)
        if batch.num_samples < second:
            raise ValueError(
                f"{self.objective.name}: a batch of {batch.num_samples} samples, {num_forget} of them to forget: expected "
                "an alternate of each right after them"
            )
        return {
            "forget": range(num_forget),
            "alternate": range(num_forget, second),
            "retain": range(second, batch.num_samples),
        }

    def pack(self, forget: Any, retain: Any = None) -> tuple[PackedBatch, int]:
        """Samples or padded batches as one packed batch, and the number of its samples that are to be forgotten.
        The alternates come from forget (`data.with_alternates`)."""
        samples, alternates = self.split(forget)
        retain = [] if retain is None else with_alternates(retain)[0]
        return pack([*samples, *alternates, *retain]), len(samples)

    def split(self, forget: Any) -> tuple[list[Sample], list[Sample]]:
        """The forget samples, and the alternates where the objective takes them. ValueError where they are missing."""
        samples, alternates = with_alternates(forget)
        if self.alternate is None:
            return samples, []
        if alternates is None:
            raise ValueError(
                f"{self.objective.name} needs a second answer ({self.alternate}) to each forget sample: give records, or "
                'samples with an "alternate"'
            )
        return samples, alternates

    def __call__(
        self,
        decoder: Decoder,
        batch: PackedBatch,
        num_forget: int,
        *,
        start: int = 0,
        hidden: torch.Tensor | None = None,
        checkpoint: bool = False,
        impl: str = "auto",
        reference: Reference | None = None,
        reference_head: Head | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss (scalar, differentiable) of a packed batch, and its rows' NLL (R,), detached (None where no head runs).

        batch: on the decoder's device, samples in the order of `parts`. start, hidden, checkpoint: as in `Decoder.run`.
        impl: who computes the NLL (whole distributions are plain torch, see `linear_rows`).
        reference: of this batch's samples, in its order. reference_head: the original's, where it is not the decoder's.
        """
        rows = Rows(
            batch,
            self.parts(batch, num_forget),
            self.retain_coeff * self.retain_scale,
            decoder.head,
            layer=self.layer,
            reference=reference,
            reference_head=reference_head,
        )
        if self.objective.states:
            rows.states = decoder.run(batch, start, self.layer + 1, hidden, checkpoint)
            return self._total(rows, _retain_states), None
        if (known := self.weights(batch, num_forget)) is not None:
            return losses.weighted_pass(
                decoder, batch, known, start=start, hidden=hidden, checkpoint=checkpoint, impl=impl
            )
        losses.check_labelled(batch)
        every = "hidden_all" in self.needs
        final = decoder.final(decoder.run(batch, start, None, hidden, checkpoint, rows=not every))
        rows.hidden, rows.hidden_all = (final[batch.rows], final) if every else (final, None)
        rows.nll = linear_rows.linear_nll(rows.hidden, decoder.head, batch.targets, impl=impl)
        return self._total(rows, RETAIN_LOSSES[self.retain_loss][0]), rows.nll.detach()

    def weights(self, batch: PackedBatch, num_forget: int) -> losses.RowWeights | None:
        """The rows' weights where the loss is a sum of NLLs whose weights are known before the pass, else None."""
        if not self.objective.weighted or self.retain_loss != "nll":
            return None
        coeff = self.retain_coeff * self.retain_scale
        return losses.gradient_difference(batch, num_forget, coeff, self.options["forget_loss_cap"])

    def _total(self, rows: Rows, term: Callable[[Rows], torch.Tensor]) -> torch.Tensor:
        """The objective plus its retain term; a side without samples has no part."""
        total = []
        if rows.forget.num_samples:
            total.append(self.objective.function(rows, **self.options))
        if rows.retain.num_samples and self.objective.retain:
            retain = term(rows)
            total.append(rows.retain_coeff * retain)
            if limit := self.options.get("retain_loss_eps"):
                total.append(-rows.retain_coeff * limit)
            if self.objective.update is not None:
                self.terms.append(float(retain.detach()))
        return sum(total[1:], total[0])

    def check_layer(self, num_layers: int, block: range | None = None) -> None:
        """ValueError if the layer that the objective is taken at does not exist, or lies below the block."""
        name, layer = self.objective.name, self.layer
        if layer is not None and not 0 <= layer < num_layers:
            raise ValueError(f"{name}: layer={layer}: the model has layers 0 to {num_layers - 1}")
        if layer is not None and block is not None and layer < block.start:
            raise ValueError(
                f"{name}: layer={layer} is below the block {block.start}-{block.stop - 1}, which would get no gradient: "
                "leave it out for the block's last layer, or name a higher one"
            )

    def metrics(
        self, batch: PackedBatch, num_forget: int, loss: torch.Tensor, nll: torch.Tensor | None
    ) -> dict[str, float | None]:
        """`losses.metrics` of what a call gave."""
        return losses.metrics(batch, num_forget, loss, nll, len(self.parts(batch, num_forget)["alternate"]))

    # ------------------------------------------------ state

    def advance(self) -> None:
        """To be called after each step that was taken: an objective with an `update` gets its next retain_coeff, from
        the mean retain term of the losses since the last step."""
        if self.objective.update is not None and self.terms:
            term = sum(self.terms) / len(self.terms)
            self.retain_coeff = self.objective.update(self.retain_coeff, term, **self.options)
        self.drop()

    def drop(self) -> None:
        """To be called where the losses since the last step lead to none."""
        self.terms = []

    def state(self) -> dict[str, torch.Tensor]:
        """What changes from step to step, for a checkpoint; empty for most objectives."""
        if self.objective.update is None:
            return {}
        return {"objective.retain_coeff": torch.tensor([self.retain_coeff], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a `state()`; other entries are not looked at."""
        if self.objective.update is not None:
            self.retain_coeff = float(state["objective.retain_coeff"])
