"""Losses of single rows, `linear_nll` and `linear_rows`, and the row functions, against plain formulas on full
logits."""

import copy
import functools
import itertools
import math

import linear_loss_problem
import pytest
import torch
import torch.nn.functional as F
from head_problem import problem
from helpers import forbid_waiting
from tiny_models import peak_bytes, random_samples, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kunbr_fast.data import pack
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.linear_loss import reference
from kunbr_fast.model.decoder import Decoder, Head
from kunbr_fast.objectives import distributions as linear_rows
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.distributions import linear_nll

BETA = 1.7


FUNCTIONS = {
    "kl": linear_rows.kl,
    "undial": functools.partial(linear_rows.undial, beta=BETA),
    "ceu": linear_rows.ceu,
    "margin_flattening": linear_rows.margin_flattening,
    "inverted_hinge": linear_rows.inverted_hinge,
    "negative_entropy": linear_rows.negative_entropy,
    "logit_margin": linear_rows.logit_margin,
}
SCALINGS = [(1.0, None), (0.37, None), (2.5, 1.5)]


def row_nll(z, targets, z_original=None):
    return F.cross_entropy(z, targets, reduction="none")


def formula(name, z, target, z_original):
    """One row's value as its paper writes it, with none of the functions that the package uses."""
    p, q = z.exp() / z.exp().sum(), z_original.exp() / z_original.exp().sum()
    others = [v for v in range(len(z)) if v != target]
    if name == "kl":
        return (q * (q / p).log()).sum()
    if name == "undial":
        q = torch.stack([q[v] * math.exp(-BETA) if v == target else q[v] for v in range(len(z))])
        return -(q / q.sum() * p.log()).sum()
    if name == "ceu":
        q = p.detach()[others]
        return -(q / q.sum() * p[others].log()).sum()
    if name == "margin_flattening":
        return (z[int(z.argmax())] - z.sum() / len(z)) ** 2
    if name == "inverted_hinge":
        return 1 + p[target] - max(p[v] for v in others)
    if name == "negative_entropy":
        return (p * p.log()).sum()
    margin = z[target] - z.sum() / len(z)
    return margin if margin > 0 else margin * 0


def by_formula(name, z, targets, z_original):
    return torch.stack([formula(name, *row) for row in zip(z, targets, z_original)])


def logits(hidden, linear, scale=1.0, softcap=None):
    z = F.linear(hidden, linear.weight, linear.bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def teacher_problem(*sizes, **options):
    """(hidden, linear, targets, slopes), and the reference's hidden states and head, which are others."""
    dtype = options.get("dtype", torch.float64)
    mine, theirs = problem(*sizes, **options), problem(*sizes, **{**options, "seed": 1})
    return mine, theirs[0], theirs[1].requires_grad_(False).to(dtype)


def differentiate(value, tensors):
    return torch.autograd.grad(value, tensors) if tensors else ()


def close(ours, truth, rtol=1e-11, atol=1e-13):
    assert len(ours) == len(truth)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- row functions


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("vocab", [2, 13])
def test_row_function_is_its_formula(name, vocab):
    generator = torch.Generator().manual_seed(vocab)
    z, z_original = (torch.randn(9, vocab, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    targets = torch.randint(0, vocab, (9,), generator=generator)
    z.requires_grad_()
    slopes = torch.arange(1.0, 10, dtype=torch.float64)
    ours, truth = FUNCTIONS[name](z, targets, z_original), by_formula(name, z, targets, z_original)
    assert ours.shape == (9,)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    close(differentiate((slopes * ours).sum(), [z]), differentiate((slopes * truth).sum(), [z]), 1e-11, 1e-12)
    if name == "logit_margin":
        assert 0 < int((ours == 0).sum()) < 9  # both sides of the clip
    if name == "kl":
        own = torch.nn.functional.kl_div(
            z.log_softmax(1), z_original.log_softmax(1), log_target=True, reduction="none"
        ).sum(1)
        torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-13)
        assert not linear_rows.kl(z, None, z.detach()).detach().any()
    if name != "ceu":  # which holds a part of itself constant: its gradient is p - q, tested by the formula
        function = FUNCTIONS[name]
        assert torch.autograd.gradcheck(lambda z: function(z, targets, z_original), [z], eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["kl", "undial", "ceu", "inverted_hinge", "negative_entropy"])
def test_forbidden_tokens_are_as_if_they_were_not_there(name):
    """Logits of -inf: the value of the smaller vocabulary, and no NaN in a gradient."""
    generator = torch.Generator().manual_seed(0)
    z, z_original = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 9, (5,), generator=generator)
    forbidden = torch.full((5, 4), -torch.inf, dtype=torch.float64)
    small = z.clone().requires_grad_()
    large = torch.cat([z, forbidden], 1).requires_grad_()
    truth = FUNCTIONS[name](small, targets, z_original)
    ours = FUNCTIONS[name](large, targets, torch.cat([z_original, forbidden], 1))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    (expected,), (found,) = differentiate(truth.sum(), [small]), differentiate(ours.sum(), [large])
    torch.testing.assert_close(found[:, :9], expected, rtol=1e-11, atol=1e-14)
    assert not found[:, 9:].any()


def test_kl_to_a_reference_that_forbids_more_and_less():
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    z_original = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    value = linear_rows.kl(z, None, z_original)
    torch.testing.assert_close(value, torch.tensor([math.log(2)], dtype=torch.float64))
    (found,) = differentiate(value.sum(), [z])
    torch.testing.assert_close(found, torch.tensor([[-0.25, -0.25, 0.25, 0.25]], dtype=torch.float64))
    assert float(linear_rows.kl(z_original, None, z.detach())) == math.inf


def test_of_equal_maxima_the_first_has_the_gradient():
    z = torch.tensor([[3.0, 1.0, 3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    margin = 3 - 7 / 4
    (found,) = differentiate(linear_rows.margin_flattening(z).sum(), [z])
    expected = 2 * margin * torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    (found,) = differentiate(linear_rows.inverted_hinge(z, torch.tensor([3])).sum(), [z])
    p = z.detach().softmax(1)[0]
    one_hot = torch.eye(4, dtype=torch.float64)
    expected = p[3] * (one_hot[3] - p) - p[0] * (one_hot[0] - p)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [0.0, 100.0])
def test_uniform_and_extreme_rows_have_finite_gradients(name, size):
    """fp32 logits all equal, or so far apart that all probabilities but one are 0."""
    z = (torch.arange(7.0).repeat(3, 1) * size).requires_grad_()
    value = FUNCTIONS[name](z, torch.tensor([0, 3, 6]), z.detach().flip(1))
    (found,) = differentiate(value.sum(), [z])
    assert bool(value.isfinite().all()) and bool(found.isfinite().all())


@pytest.mark.parametrize("target", [-100, 13])
@pytest.mark.parametrize("name", ["undial", "ceu", "inverted_hinge", "logit_margin"])
def test_a_target_outside_the_vocabulary_raises(name, target):
    z = torch.randn(2, 13)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        FUNCTIONS[name](z, torch.tensor([1, target]), z)


# ---------------------------------------------------------------- linear_nll


def of_nll(nll, slopes):
    """A loss that no row weights could be given for beforehand."""
    slopes = slopes.to(nll.dtype)
    return (slopes * torch.exp(-0.3 * nll)).sum() + F.logsigmoid((slopes * nll).sum()) - 1.3 * nll[::2].mean()


@pytest.mark.parametrize("scale, softcap", SCALINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, vocab, chunk", [(9, 13, 1 << 23), (9, 13, 13 * 4), (1, 63, 1)])
def test_nll_and_gradients_for_every_subset(scale, softcap, bias, rows, vocab, chunk, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_CHUNK", chunk)
    monkeypatch.setattr(reference, "HEAD_CHUNK", chunk)
    hidden, linear, targets, slopes = problem(rows, 6, vocab, bias=bias)
    tensors = [hidden, *linear.parameters()]
    for wanted in itertools.product([True, False], repeat=len(tensors)):
        for tensor, flag in zip(tensors, wanted):
            tensor.requires_grad_(flag)
        asked = [tensor for tensor, flag in zip(tensors, wanted) if flag]
        nll = linear_nll(hidden, Head(linear, scale, softcap), targets)
        truth = F.cross_entropy(logits(hidden, linear, scale, softcap), targets, reduction="none")
        assert nll.shape == (rows,) and nll.requires_grad == any(wanted)
        torch.testing.assert_close(nll, truth, rtol=1e-13, atol=1e-13)
        if asked:
            close(differentiate(of_nll(nll, slopes), asked), differentiate(of_nll(truth, slopes), asked))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nll_gradcheck(softcap):
    hidden, linear, targets, _ = problem(rows=4, width=3, vocab=5)
    arguments = targets, 0.7, softcap, "torch"
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, linear.weight, linear.bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_rows._LinearNLL.apply(h, w, b, *arguments), inputs, eps=1e-6, atol=1e-8
    )
    frozen = [t.detach() for t in inputs[1:]]
    assert torch.autograd.gradcheck(
        lambda h: linear_rows._LinearNLL.apply(h, *frozen, *arguments), inputs[:1], eps=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nll_target_outside_the_vocabulary(impl):
    hidden, linear, targets, _ = problem(dtype=torch.float32)
    linear.requires_grad_(False)
    hidden.requires_grad_()
    good = linear_nll(hidden, Head(linear), targets)
    targets[3] = 13
    if impl == "torch":
        with pytest.raises((IndexError, RuntimeError)):
            linear_nll(hidden, Head(linear), targets, impl=impl)
        return
    pytest.importorskip("triton")
    nll = linear_nll(hidden, Head(linear), targets, impl=impl)
    (found,) = differentiate(nll.nansum(), [hidden])
    others = torch.arange(9) != 3
    assert bool(nll[3].isnan())
    torch.testing.assert_close(nll[others], good[others])
    assert bool(found[others].isfinite().all())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (2.5, 3.0)])
@pytest.mark.parametrize("trained", [True, False])
def test_nll_by_the_kernel(dtype, scale, softcap, trained):
    pytest.importorskip("triton")
    arguments, _ = linear_loss_problem.problem(dtype=dtype)
    hidden, weight, targets, slopes, bias = arguments
    linear = linear_loss_problem.module(weight, bias).requires_grad_(trained)
    leaf = hidden.clone().requires_grad_()
    nll = linear_nll(leaf, Head(linear, scale, softcap), targets, impl="triton")
    loss = (slopes.float() * nll).sum()
    grads = differentiate(loss, [leaf, *(linear.parameters() if trained else ())])
    linear_loss_problem.check([loss.detach(), nll.detach(), *grads], arguments, scale, softcap)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": lambda t: t[:, :5]}, ValueError, r"hidden is \(9, 5\) and the head's weight \(13, 6\)"),
        ({"hidden": lambda t: t[0]}, ValueError, r"hidden is \(6,\)"),
        ({"hidden": lambda t: t.long()}, TypeError, "hidden is torch.int64: expected one of torch.bfloat16"),
        ({"hidden": lambda t: t.float()}, TypeError, "the head's weight is torch.float64 and hidden is torch.float32"),
        ({"targets": lambda t: t.int()}, TypeError, "targets is torch.int32: expected torch.int64"),
        ({"targets": lambda t: t[1:]}, ValueError, r"targets is \(8,\): expected one for each of hidden's 9 rows"),
        ({"targets": lambda t: t.to("meta")}, ValueError, "targets is on meta and hidden on cpu"),
    ],
)
@pytest.mark.parametrize("which", ["linear_nll", "linear_rows"])
def test_errors_of_both(which, change, error, message):
    hidden, linear, targets, _ = problem()
    arguments = {"hidden": hidden, "targets": targets}
    arguments |= {name: changed(arguments[name]) for name, changed in change.items()}
    more = {} if which == "linear_nll" else {"function": row_nll}
    with pytest.raises(error, match=message):
        getattr(linear_rows, which)(head=Head(linear), **arguments, **more)


def test_nll_impl():
    hidden, linear, targets, _ = problem()
    with pytest.raises(ValueError, match="unknown impl 'cudnn'"):
        linear_nll(hidden, Head(linear), targets, impl="cudnn")
    with pytest.raises(TypeError, match="does not serve float64"):
        linear_nll(hidden, Head(linear), targets, impl="triton")
    with pytest.raises(dispatch.Unavailable, match='linear_loss: impl="cuda" cannot run on cpu'):
        linear_nll(hidden, Head(linear), targets, impl="cuda")


def test_nll_under_torch_compile():
    torch._dynamo.reset()
    for trained in (False, True):
        _, linear, *_ = problem(dtype=torch.float32)
        linear.requires_grad_(trained)

        def step(hidden, targets, slopes, linear=linear):
            return of_nll(linear_nll(hidden * 2, Head(linear, 0.5, 3.0), targets), slopes)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        hidden, _, targets, slopes = problem(dtype=torch.float32)
        hidden.requires_grad_()
        found = [differentiate(run(hidden, targets, slopes), [hidden]) for run in (step, compiled)]
        close(*found, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- linear_rows


def mixed(z, targets, z_original):
    """Several functions, rows of which weigh differently."""
    slopes = (targets + 1).to(z.dtype)
    return slopes * linear_rows.kl(z, targets, z_original) + linear_rows.inverted_hinge(z, targets).square()


@pytest.mark.parametrize("scale, softcap", SCALINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, vocab, chunk", [(9, 13, 1 << 23), (9, 13, 13 * 4), (1, 63, 1)])
def test_values_and_gradients_for_every_subset(scale, softcap, bias, rows, vocab, chunk, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_CHUNK", chunk)
    monkeypatch.setattr(reference, "HEAD_CHUNK", chunk)
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem(rows, 6, vocab, bias=bias)
    tensors = [hidden, *linear.parameters()]
    z_original = logits(theirs, teacher, scale, softcap)
    for wanted in itertools.product([True, False], repeat=len(tensors)):
        for tensor, flag in zip(tensors, wanted):
            tensor.requires_grad_(flag)
        asked = [tensor for tensor, flag in zip(tensors, wanted) if flag]
        head, original_head = Head(linear, scale, softcap), Head(teacher, scale, softcap)
        ours = linear_rows.linear_rows(hidden, head, mixed, targets, theirs, original_head)
        truth = mixed(logits(hidden, linear, scale, softcap), targets, z_original)
        assert ours.shape == (rows,) and ours.dtype == truth.dtype and ours.requires_grad == any(wanted)
        close([ours], [truth], 1e-12)
        if asked:  # through a function of the values, so that what comes in differs from row to row
            close(*(differentiate((v * v.sin()).sum(), asked) for v in (ours, truth)))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("trained", [True, False])
def test_each_row_function(name, trained, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_CHUNK", 3 * 13)
    monkeypatch.setattr(reference, "HEAD_CHUNK", 3 * 13)
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem(rows=7)
    linear.requires_grad_(trained)
    leaves = [hidden.requires_grad_(), *(linear.parameters() if trained else ())]
    head, original_head = Head(linear, 2.5, 3.5), Head(teacher, 0.5)
    ours = linear_rows.linear_rows(hidden, head, FUNCTIONS[name], targets, theirs, original_head)
    truth = by_formula(name, logits(hidden, linear, 2.5, 3.5), targets, logits(theirs, teacher, 0.5))
    close([ours], [truth], 1e-12)
    close(differentiate((slopes * ours).sum(), leaves), differentiate((slopes * truth).sum(), leaves))


def test_the_heads_own_logits_are_the_references_where_no_other_head_is_given():
    hidden, linear, targets, _ = problem()
    linear.requires_grad_(False)
    theirs = (hidden + 1).requires_grad_()
    leaf = hidden.clone().requires_grad_()
    head = Head(linear, 0.7, 2.0)
    ours = linear_rows.linear_rows(leaf, head, linear_rows.kl, None, theirs)
    truth = linear_rows.kl(head(leaf), None, head(theirs).detach())
    close([ours], [truth], 1e-12)
    close(differentiate(ours.sum(), [leaf]), differentiate(truth.sum(), [leaf]))
    assert torch.autograd.grad(linear_rows.linear_rows(leaf, head, linear_rows.kl, None, theirs).sum(), theirs,
                               allow_unused=True) == (None,)  # fmt: skip
    # without targets and without a reference
    entropy = linear_rows.linear_rows(leaf, head, linear_rows.negative_entropy)
    close([entropy], [linear_rows.negative_entropy(head(leaf))], 1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_all_parameters_of_a_model_with_a_reference_from_before(architecture):
    """As in a warm-up: the head is trained too (gemma2: tied to the embedding, with a softcap), M0's is a copy."""
    decoder = Decoder(tiny_model(architecture))
    batch = pack(random_samples(4))
    assert decoder.head.softcap == (3.0 if architecture == "gemma2" else None)
    with torch.no_grad():
        theirs = decoder.final(decoder.run(batch)[batch.rows])
        original = copy.deepcopy(decoder.head)
        z_original = original(theirs)
        for parameter in decoder.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(decoder.model.parameters())
    found = []
    for ours in (True, False):
        hidden = decoder.final(decoder.run(batch)[batch.rows])
        if ours:
            value = linear_rows.linear_rows(hidden, decoder.head, linear_rows.kl, batch.targets, theirs, original)
            nll = linear_nll(hidden, decoder.head, batch.targets)
        else:
            z = decoder.head(hidden)
            value, nll = linear_rows.kl(z, None, z_original), F.cross_entropy(z, batch.targets, reduction="none")
        assert float(value.detach().min()) > 1e-6
        found.append(differentiate(value.mean() + torch.exp(-nll).sum(), parameters))
    close(*found, rtol=1e-9, atol=1e-11)


def test_rows_gradcheck():
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem(rows=4, width=3, vocab=5)
    z_arguments = (theirs, teacher.weight, teacher.bias, 1.0, None)
    rows = linear_rows._Rows(mixed, targets, z_arguments, 0.7, 2.0)
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, linear.weight, linear.bias)]
    frozen = [t.detach() for t in inputs[1:]]
    for function, arguments in (
        (lambda *t: linear_rows._LinearRows.apply(*t, rows), inputs),
        (lambda t: linear_rows._LinearRows.apply(t, *frozen, rows), inputs[:1]),
    ):
        assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"function": lambda z, t, z0: z}, ValueError, r"gave \(9, 13\) for logits \(9, 13\): expected values \(9,\)"),
        ({"function": lambda z, t, z0: z.sum()}, ValueError, r"gave \(\) for logits"),
        ({"function": lambda z, t, z0: t}, ValueError, "does not depend on the logits"),
        ({"original": torch.ones(8, 6).double()}, ValueError, "original has 8 rows and 13 logits each"),
        (
            {"original": torch.ones(9, 5).double()},
            ValueError,
            r"original is \(9, 5\) and the original's head's weight",
        ),
        ({"original": torch.ones(9, 6)}, TypeError, "the original's head's weight is torch.float64 and original is"),
        (
            {"original": torch.ones(9, 4).double(), "original_head": Head(nn.Linear(4, 12).double())},
            ValueError,
            "original has 9 rows and 12 logits each, on cpu: expected hidden's 9 rows and the head's 13",
        ),
    ],
)
def test_errors(change, error, message):
    hidden, linear, targets, _ = problem()
    arguments = {"head": Head(linear.requires_grad_(False)), "function": row_nll, "targets": targets, **change}
    with pytest.raises(error, match=message):
        linear_rows.linear_rows(hidden.requires_grad_(), **arguments)


def test_a_trained_head_is_not_taken_for_the_references():
    hidden, linear, targets, _ = problem()
    with pytest.raises(ValueError, match="give original_head, a copy from before its training"):
        linear_rows.linear_rows(hidden, Head(linear), linear_rows.kl, targets, hidden)
    with torch.no_grad(), pytest.raises(ValueError, match="give original_head"):  # an evaluation on the way, too
        linear_rows.linear_rows(hidden, Head(linear), linear_rows.kl, targets, hidden)
    value = linear_rows.linear_rows(hidden, Head(linear), linear_rows.kl, targets, hidden, copy.deepcopy(Head(linear)))
    assert float(value.detach().abs().max()) < 1e-15


# ---------------------------------------------------------------- both


def both(hidden, head, targets, theirs, original_head):
    """Each one's values, through one more step, so that what comes in is no constant."""
    value = linear_rows.linear_rows(hidden, head, linear_rows.kl, targets, theirs, original_head)
    return [("rows", value), ("nll", linear_nll(hidden, head, targets))]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_low_precision_within_twice_torchs_own_error(dtype, softcap, trained, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_CHUNK", 123 * 20)
    monkeypatch.setattr(reference, "HEAD_CHUNK", 123 * 20)
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem(63, 48, 123, dtype=dtype, size=0.3)
    linear.requires_grad_(trained)
    hidden.requires_grad_()
    wide = copy.deepcopy(linear).double()
    wide_hidden = hidden.detach().double().requires_grad_()
    z0 = logits(theirs.double(), copy.deepcopy(teacher).double(), 1.0, softcap)
    z, wide_z = logits(hidden, linear, 1.0, softcap), logits(wide_hidden, wide, 1.0, softcap)
    natives = (
        linear_rows.kl(z, None, logits(theirs, teacher, 1.0, softcap)),
        F.cross_entropy(z, targets, reduction="none"),
    )
    truths = linear_rows.kl(wide_z, None, z0), F.cross_entropy(wide_z, targets, reduction="none")
    for (name, ours), native, truth in zip(
        both(hidden, Head(linear, 1.0, softcap), targets, theirs, Head(teacher, 1.0, softcap)), natives, truths
    ):
        assert ours.dtype == torch.float32
        results = []
        for values, h, head in ((ours, hidden, linear), (native, hidden, linear), (truth, wide_hidden, wide)):
            loss = (slopes.to(values.dtype) * values).sum()
            leaves = [h, *(head.parameters() if trained else ())]
            results.append([values.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)])
        assert all(g.dtype == dtype for g in results[0][1:])
        for part, a, b, c in zip(("value", "hidden", "weight", "bias"), *results):
            error, torchs = float((a.double() - c).norm()), float((b.double() - c).norm())
            floor = torch.finfo(torch.float32 if part == "value" else dtype).eps * float(c.norm())
            assert error <= 2 * torchs + floor, (name, part, error, torchs)


@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast_the_heads_are_cast_as_a_linear_layer_is(trained):
    (hidden, linear, targets, _), theirs, teacher = teacher_problem(dtype=torch.float32)
    linear.requires_grad_(trained)
    leaves = [hidden.requires_grad_(), *(linear.parameters() if trained else ())]
    with torch.autocast("cpu", torch.bfloat16):
        ours = both(hidden, Head(linear), targets, theirs, Head(teacher))
        z = linear(hidden)
        assert z.dtype == torch.bfloat16
        truths = (
            linear_rows.kl(z.float(), None, teacher(theirs).float()),
            F.cross_entropy(z.float(), targets, reduction="none"),
        )
    for (_, value), truth in zip(ours, truths):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(value.sum(), leaves)
        assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves]
        close(found, torch.autograd.grad(truth.sum(), leaves, retain_graph=True), 2**-6, 2**-6)


@pytest.mark.parametrize("trained", [True, False])
def test_without_rows(trained):
    (hidden, linear, targets, _), theirs, teacher = teacher_problem()
    linear.requires_grad_(trained)
    leaf = hidden[:0].clone().requires_grad_()
    for _, value in both(leaf, Head(linear), targets[:0], theirs[:0], Head(teacher)):
        assert value.shape == (0,)
        value.sum().backward()
        assert leaf.grad.shape == (0, 6) and (not trained or not linear.weight.grad.any())


@pytest.mark.parametrize("trained", [True, False])
def test_same_bits_twice(trained, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_CHUNK", 13 * 7)
    monkeypatch.setattr(reference, "HEAD_CHUNK", 13 * 7)
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem(rows=50, dtype=torch.float32)
    linear.requires_grad_(trained)
    leaves = [hidden.requires_grad_(), *(linear.parameters() if trained else ())]
    results = []
    for _ in range(2):
        values = [value for _, value in both(hidden, Head(linear), targets, theirs, Head(teacher))]
        results.append([*values, *differentiate(sum((slopes * value).sum() for value in values), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_second_derivative_is_refused():
    (hidden, linear, targets, _), theirs, teacher = teacher_problem()
    hidden.requires_grad_()
    for _, value in both(hidden, Head(linear), targets, theirs, Head(teacher)):
        (first,) = torch.autograd.grad(value.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_work(wanted):
    """Products of 2*R*D*V FLOPs. Without autograd one. With a frozen head two in the forward and none in the backward;
    with a trained one one in the forward, and in the backward one and one for each of hidden's and weight's
    gradients."""
    hidden, linear, targets, slopes = problem()
    leaves = [hidden, linear.weight, linear.bias]
    for leaf, flag in zip(leaves, wanted):
        leaf.requires_grad_(flag)
    head, product, trained = Head(linear), 2 * 9 * 6 * 13, any(wanted[1:])

    def products(function):
        with FlopCounterMode(display=False) as counter:
            out = function()
        return counter.get_total_flops() / product, out

    ours = (
        lambda: linear_nll(hidden, head, targets),
        lambda: linear_rows.linear_rows(hidden, head, row_nll, targets),
    )
    for value_of in (*ours, lambda: losses.linear_loss(hidden, head, targets, slopes)[0]):
        with torch.no_grad():
            count, value = products(value_of)
        assert count == 1 and not value.requires_grad
    for value_of in ours:
        count, value = products(value_of)
        assert count == (1 if trained or not any(wanted) else 2)
        if any(wanted):
            count, _ = products(lambda value=value: value.sum().backward())
            assert count == (1 + wanted[0] + wanted[1] if trained else 0)


@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_of_all_logits(trained, monkeypatch):
    """The peak of a step is a few chunks; that of the plain formula is several times (R, V)."""
    monkeypatch.setattr(reference, "LOGITS_CHUNK", 8 * 1009)
    monkeypatch.setattr(reference, "HEAD_CHUNK", 8 * 1009)
    (hidden, linear, targets, _), theirs, teacher = teacher_problem(400, 4, 1009, dtype=torch.float32)
    linear.requires_grad_(trained)
    hidden.requires_grad_()
    chunk, everything = 4 * 8 * 1009, 4 * 400 * 1009

    def step():
        for _, value in both(hidden, Head(linear), targets, theirs, Head(teacher)):
            value.sum().backward()

    step()  # what is made once
    assert peak_bytes(step) < 15 * chunk + 6 * 4 * 1009 * 4 < everything / 2
    plain = lambda: linear_rows.kl(linear(hidden), None, teacher(theirs)).sum().backward()  # noqa: E731
    assert peak_bytes(plain) > 3 * everything


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_waits_for_the_device(trained, monkeypatch):
    pytest.importorskip("triton")
    (hidden, linear, targets, slopes), theirs, teacher = teacher_problem()
    linear.requires_grad_(trained)
    hidden.requires_grad_()
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        for _, value in both(hidden, Head(linear), targets, theirs, Head(teacher)):
            (slopes * value).sum().backward()
        for function in FUNCTIONS.values():
            linear_rows.linear_rows(hidden, Head(linear), function, targets, theirs, original_head=Head(teacher))
    assert hidden.grad.shape == hidden.shape
