"""The fused linear loss against the plain formulas, through a head as a decoder has one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from head_problem import problem
from torch import nn

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.linear_loss import op, reference
from kunbr_fast.model.decoder import Head
from kunbr_fast.objectives import losses


def plain(hidden, linear, targets, weights, scale=1.0, softcap=None, cap=None):
    logits = F.linear(hidden, linear.weight, linear.bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    capped = nll if cap is None else torch.minimum(nll, cap)
    return (weights.to(nll.dtype) * capped).sum(), nll


def grads(loss, tensors):
    for tensor in tensors:
        tensor.grad = None
    loss.backward()
    return [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.37, None), (1.0, 1.5), (2.5, 1.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1 << 23, 13 * 4, 1])
@pytest.mark.parametrize("capped", [False, True])
def test_value_and_gradients_for_every_subset(scale, softcap, bias, chunk, capped, monkeypatch):
    monkeypatch.setattr(reference, "HEAD_CHUNK", chunk)
    hidden, linear, targets, weights = problem(bias=bias)
    cap = None
    if capped:
        nll = plain(hidden, linear, targets, weights, scale, softcap)[1].detach()
        cap = torch.full_like(nll, float(nll.median()) + 1e-3)
        cap[::3] = torch.inf
        assert bool((nll > cap).any()) and bool((nll < cap).any())
    tensors = [hidden, linear.weight, *([linear.bias] if bias else [])]
    for wanted in itertools.product([True, False], repeat=len(tensors)):
        for tensor, flag in zip(tensors, wanted):
            tensor.requires_grad_(flag)
            tensor.grad = None
        asked = [tensor for tensor, flag in zip(tensors, wanted) if flag]
        loss, nll = losses.linear_loss(hidden, Head(linear, scale, softcap), targets, weights, cap)
        truth, true_nll = plain(hidden, linear, targets, weights, scale, softcap, cap)
        torch.testing.assert_close(loss, truth, rtol=1e-13, atol=1e-13, check_stride=False)
        torch.testing.assert_close(nll, true_nll.detach(), rtol=1e-13, atol=1e-13)
        assert loss.requires_grad == any(wanted) and not nll.requires_grad and loss.shape == ()
        if not asked:
            continue
        # the factor shows that the incoming gradient is used
        ours, theirs = grads(-1.7 * loss, asked), grads(-1.7 * truth, asked)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        for tensor, flag in zip(tensors, wanted):
            if not flag:
                assert tensor.grad is None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, linear, targets, weights = problem(rows=4, width=3, vocab=5)
    cap = torch.tensor([torch.inf, 0.01, 50.0, torch.inf], dtype=torch.float64)

    def function(h, w, b):
        return op._LinearLoss.apply(h, w, b, targets, weights, 0.7, softcap, cap, "torch")[0]

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, linear.weight, linear.bias)]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8)


def test_without_autograd_and_without_rows():
    hidden, linear, targets, weights = problem()
    with torch.no_grad():
        loss, nll = losses.linear_loss(hidden, Head(linear), targets, weights)
    truth, true_nll = plain(hidden, linear, targets, weights)
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-13, atol=1e-13)
    empty = hidden[:0].requires_grad_()
    loss, nll = losses.linear_loss(empty, Head(linear), targets[:0], weights[:0])
    loss.backward()
    assert float(loss.detach()) == 0 and nll.shape == (0,) and empty.grad.shape == (0, 6)
    assert float(linear.weight.grad.abs().sum()) == 0


def test_large_logits_stay_finite_and_exact():
    """Logits of several thousands, where exp overflows without the maximum taken out."""
    hidden, linear, targets, weights = problem(size=60.0)
    hidden.requires_grad_()
    loss, nll = losses.linear_loss(hidden, Head(linear), targets, weights)
    truth, true_nll = plain(hidden, linear, targets, weights)
    assert float(true_nll.detach().max()) > 1000
    torch.testing.assert_close(nll, true_nll.detach(), rtol=1e-12, atol=1e-9)
    (ours,), (theirs,) = grads(loss, [hidden]), grads(truth, [hidden])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_low_precision_within_twice_torchs_own_error(dtype, softcap):
    hidden, linear, targets, weights = problem(rows=63, width=48, vocab=123, dtype=dtype, size=0.3)
    wide = nn.Linear(48, 123, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in linear.state_dict().items()})
    wide_hidden = hidden.double().requires_grad_()
    hidden.requires_grad_()
    loss, nll = losses.linear_loss(hidden, Head(linear, 1.0, softcap), targets, weights)
    ours = [loss.detach(), nll, *grads(loss, [hidden, linear.weight, linear.bias])]
    value, native_nll = plain(hidden, linear, targets, weights, softcap=softcap)
    native = [value.detach(), native_nll.detach(), *grads(value, [hidden, linear.weight, linear.bias])]
    value, true_nll = plain(wide_hidden, wide, targets, weights, softcap=softcap)
    truth = [value.detach(), true_nll.detach(), *grads(value, [wide_hidden, wide.weight, wide.bias])]
    assert ours[0].dtype == ours[1].dtype == torch.float32 and all(g.dtype == dtype for g in ours[2:])
    floor = torch.finfo(dtype).eps  # one rounding of a tensor of the truth's own size
    for name, a, b, c in zip(("loss", "nll", "hidden", "weight", "bias"), ours, native, truth):
        error, torchs = float((a.double() - c).norm()), float((b.double() - c).norm())
        assert error <= 2 * torchs + floor * float(c.norm()), (name, error, torchs)


def test_same_bits_twice():
    hidden, linear, targets, weights = problem(rows=50, dtype=torch.float32)
    hidden.requires_grad_()
    results = []
    for _ in range(2):
        loss, nll = losses.linear_loss(hidden, Head(linear), targets, weights)
        results.append([loss.detach(), nll, *(g.clone() for g in grads(loss, [hidden, linear.weight]))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast_the_head_is_cast_as_a_linear_layer_is(given):
    hidden, linear, targets, weights = problem(dtype=torch.float32)
    hidden = hidden.to(given).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll = losses.linear_loss(hidden, Head(linear), targets, weights)
        logits = linear(hidden)
        assert logits.dtype == torch.bfloat16
        truth = (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    leaves = [hidden, linear.weight, linear.bias]
    for a, b, leaf in zip(grads(loss, leaves), grads(truth, leaves), leaves):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)
    wide, linear, targets, weights = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = losses.linear_loss(wide, Head(linear), targets, weights)
    assert torch.equal(loss, losses.linear_loss(wide, Head(linear), targets, weights)[0])  # which does not cast fp64


def test_a_second_derivative_is_refused():
    hidden, linear, targets, weights = problem()
    hidden.requires_grad_()
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for scaled, message in ((factor, "once_differentiable"), (1.0, "does not require grad")):
        loss, _ = losses.linear_loss(hidden, Head(linear), targets, weights)
        (first,) = torch.autograd.grad(loss * scaled, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            first.sum().backward()


def test_a_cap_of_another_dtype_leaves_the_losss():
    hidden, linear, targets, weights = problem(dtype=torch.float32)
    loss, nll = losses.linear_loss(hidden, Head(linear), targets, weights, torch.full_like(weights, 2.0))
    assert loss.dtype == nll.dtype == torch.float32 and bool((nll > 2).any())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": lambda t: t[:, :5]}, ValueError, r"hidden is \(9, 5\) and the head's weight \(13, 6\)"),
        ({"hidden": lambda t: t[0]}, ValueError, r"hidden is \(6,\)"),
        ({"hidden": lambda t: t.long()}, TypeError, "hidden is torch.int64: expected one of torch.bfloat16"),
        ({"hidden": lambda t: t.float()}, TypeError, "the head's weight is torch.float64 and hidden is torch.float32"),
        ({"targets": lambda t: t.int()}, TypeError, "targets is torch.int32: expected torch.int64"),
        ({"targets": lambda t: t[1:]}, ValueError, r"targets is \(8,\): expected one for each of hidden's 9 rows"),
        ({"row_weights": lambda t: t[:, None]}, ValueError, r"row_weights is \(9, 1\)"),
        ({"nll_cap": lambda t: torch.ones(8)}, ValueError, r"nll_cap is \(8,\)"),
        ({"row_weights": lambda t: t.to("meta")}, ValueError, "row_weights is on meta and hidden on cpu"),
        ({"row_weights": lambda t: t.requires_grad_()}, ValueError, "row_weights requires grad, but"),
        ({"impl": lambda t: "cudnn"}, ValueError, "unknown impl 'cudnn'"),
        ({"impl": lambda t: "triton"}, TypeError, "does not serve float64"),
        ({"impl": lambda t: "cuda"}, dispatch.Unavailable, 'linear_loss: impl="cuda" cannot run on cpu'),
    ],
)
def test_errors(change, error, message):
    hidden, linear, targets, weights = problem()
    arguments = {"hidden": hidden, "targets": targets, "row_weights": weights, "nll_cap": None, "impl": "auto"}
    arguments |= {name: changed(arguments[name]) for name, changed in change.items()}
    with pytest.raises(error, match=message):
        losses.linear_loss(head=Head(linear), **arguments)


@pytest.mark.parametrize("need_hidden", [False, True])
@pytest.mark.parametrize("need_weight", [False, True])
def test_its_flops_are_counted(need_hidden, need_weight):
    from torch.utils.flop_counter import FlopCounterMode

    head = torch.nn.Linear(8, 11, bias=False).requires_grad_(need_weight)
    hidden = torch.randn(5, 8, requires_grad=need_hidden)
    with FlopCounterMode(display=False) as counter:
        losses.linear_loss(hidden, Head(head), torch.zeros(5, dtype=torch.int64), torch.ones(5))
    assert counter.get_total_flops() == 2 * 5 * 8 * 11 * (1 + need_hidden + need_weight)
