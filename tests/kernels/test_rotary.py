"""Rotary embedding: against fp64, against transformers bit for bit, and what it overwrites."""

import importlib

import pytest
import torch
from helpers import poisoned

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.rotary import cases, reference
from kunbr_fast.kernels.rotary.op import apply_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NO_TRITON = pytest.mark.skipif(dispatch.why_not("rotary", "triton", DEVICE) is not None, reason="no triton here")
IMPLS = ["torch", pytest.param("triton", marks=NO_TRITON)]
every_impl = pytest.mark.parametrize("impl", IMPLS)


def values(B=2, heads=(6, 2), T=5, d=8, r=8, dtype=torch.float32, table=None, rows=1, seed=0):
    """q, k as a model views its projections' outputs, and cos, sin: of any size and not the same twice, so that a
    transpose is told from an inverse and the halves from each other."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, H, d, generator=generator).to(DEVICE, dtype).transpose(1, 2) for H in heads)
    cos, sin = (torch.randn(rows, T, r, generator=generator).to(DEVICE, table or dtype) for _ in range(2))
    return q, k, cos, sin


def like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in tensors]


def derivatives(run, q, k, cos, sin, dys):
    """[q', k', dq, dk] of `run` on leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k)]
    out = run(*leaves, cos, sin)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, dys)]


def plain(q, k, cos, sin):
    """The text of the formula, differentiated by autograd."""
    r = cos.shape[-1]

    def rotated(x):
        half = torch.cat((-x[..., r // 2 : r], x[..., : r // 2]), -1)
        return torch.cat((x[..., :r] * cos[:, None] + half * sin[:, None], x[..., r:]), -1).to(x.dtype)

    return rotated(q), rotated(k)


def check(found, q, k, cos, sin, dys):
    """Error at most twice torch's own in the same dtype plus the proof's floor."""
    double = [t.double() for t in (q, k, cos, sin)]
    truth = derivatives(plain, *double, [dy.double() for dy in dys])
    views = [t.transpose(1, 2) for t in (q, k, *dys)]  # as they lie in memory
    given = dict(zip(("q", "k", "dq'", "dk'"), views)) | dict(cos=cos, sin=sin)
    floors = cases.floors(given, dict(zip(("q'", "k'", "dq", "dk"), truth)))
    torchs = derivatives(plain, q, k, cos, sin, dys)
    for mine, other, true, floor in zip(found, torchs, truth, floors.values()):
        if mine is None:
            continue
        assert mine.dtype == q.dtype and mine.shape == true.shape
        allowed = 2 * (other - true).abs() + floor
        assert bool(((mine - true).abs() <= allowed).all()), float(((mine - true).abs() / allowed).max())


# ---------------------------------------------------------------- values


SHAPES = {
    "full": {},
    "grouped": dict(heads=(9, 1)),
    "more keys": dict(heads=(2, 5)),
    "partial": dict(d=12, r=4),
    "two features": dict(d=7, r=2),
    "odd": dict(B=1, heads=(3, 1), T=3, d=63, r=62),
    "one token": dict(B=1, T=1),
    "no token": dict(T=0),
    "no sample": dict(B=0, rows=1),
    "cos of each sample": dict(B=3, rows=3, T=2),
    "wide": dict(B=1, heads=(33, 17), T=1, d=128, r=96),
}


# torch in half precision: see test_is_the_function_of_transformers
@pytest.mark.parametrize(
    "impl, dtype", [("torch", torch.float32), *(pytest.param("triton", dtype, marks=NO_TRITON) for dtype in DTYPES)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(impl, dtype, shape):
    arguments = values(**SHAPES[shape], dtype=dtype)
    dys = like(arguments[:2])
    found = derivatives(lambda *a: apply_rotary(*a, impl=impl), *arguments, dys)
    check(found, *arguments, dys)


MODELS = {
    "torch": ["llama", "phi3", "gpt_neox", "smollm3", "olmo2", "qwen3", "gemma3"],
    "triton": ["llama", "phi3", "olmo2"],  # the others' functions are one of these three
}


@pytest.mark.parametrize(
    "impl, dtype, model",
    [("torch", dtype, model) for dtype in (torch.float64, *DTYPES) for model in MODELS["torch"]]
    + [pytest.param("triton", dtype, model, marks=NO_TRITON) for dtype in DTYPES for model in MODELS["triton"]],
)
def test_is_the_function_of_transformers(impl, dtype, model):
    """The same arguments in the same convention; partial where the model's is; OLMo-2's cos and sin are fp32."""
    theirs = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    r = 4 if model in ("phi3", "gpt_neox") else 8
    table = torch.promote_types(dtype, torch.float32) if model == "olmo2" else dtype
    arguments = values(r=r, dtype=dtype, table=table)
    dys = like(arguments[:2])
    expected = derivatives(theirs, *arguments, dys)
    found = derivatives(lambda *a: apply_rotary(*a, impl=impl), *arguments, dys)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.dtype == b.dtype
        # where fp32 meets bf16, autograd rounds each term of a gradient to bf16, and here their sum is rounded
        if impl == "torch" and (i < 2 or table == dtype):
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@every_impl
def test_wider_cos_and_sin_under_half_precision(impl):
    arguments = values(dtype=torch.bfloat16, table=torch.float32)
    dys = like(arguments[:2])
    check(derivatives(lambda *a: apply_rotary(*a, impl=impl), *arguments, dys), *arguments, dys)


# ---------------------------------------------------------------- gradients asked for


@every_impl
@pytest.mark.parametrize("need_q", [False, True])
@pytest.mark.parametrize("need_k", [False, True])
def test_every_subset_of_gradients(impl, need_q, need_k):
    arguments = values(d=8, r=6)
    q, k, cos, sin = arguments
    leaves = [q.clone().requires_grad_(need_q), k.clone().requires_grad_(need_k)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        saved = []
        out = apply_rotary(*(leaf * 1 for leaf in leaves), cos, sin, impl=impl)
    assert sorted(saved) == sorted([cos.data_ptr(), sin.data_ptr()] if need_q or need_k else [])
    dys = like(out)
    if need_q or need_k:
        torch.autograd.backward(out, dys)
    else:
        assert not out[0].requires_grad and not out[1].requires_grad
    assert (leaves[0].grad is not None, leaves[1].grad is not None) == (need_q, need_k)
    check([*(t.detach() for t in out), leaves[0].grad, leaves[1].grad], *arguments, dys)


@every_impl
@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_no_loss_sees_costs_nothing(impl, used, monkeypatch):
    arguments = values()
    leaves = [t.clone().requires_grad_() for t in arguments[:2]]
    out = apply_rotary(*leaves, *arguments[2:], impl=impl)
    seen = []
    run = reference.rotary
    monkeypatch.setattr(reference, "rotary", lambda x, *a: seen.append(x.shape) or run(x, *a))
    dys = like(out)
    out[used].backward(dys[used])
    assert leaves[1 - used].grad is None
    assert seen == ([out[used].shape] if impl == "torch" else [])
    found = [None, None, leaves[0].grad, leaves[1].grad]
    check(found, *arguments, dys)


@every_impl
def test_no_second_derivative(impl):
    q, k, cos, sin = values()
    q.requires_grad_()
    out = apply_rotary(q, k, cos, sin, impl=impl)
    (grad,) = torch.autograd.grad(out[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


# ---------------------------------------------------------------- in place


def projections(B=2, T=5, d=8, bias=True):
    """q and k as transformers makes them, and the projections."""
    torch.manual_seed(0)
    made = [torch.nn.Linear(7, H * d, bias=bias, device=DEVICE) for H in (6, 2)]
    x = torch.randn(B, T, 7, device=DEVICE)
    return made, lambda: [p(x).view(B, T, -1, d).transpose(1, 2) for p in made]


@every_impl
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [8, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_on_views_of_projections_without_gradients(impl, bias, r, mode):
    _, make = projections(bias=bias)
    cos, sin = values(r=r)[2:]
    with mode():
        q, k = make()
        expected = plain(q, k, cos, sin)
        a, b = apply_rotary(q, k, cos, sin, impl=impl)
    assert a is q and b is k
    for mine, other in zip((q, k), expected):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@every_impl
@pytest.mark.parametrize("bias", [False, True])
def test_views_of_projections_with_gradients(impl, bias):
    """To new tensors; the gradient comes in the layout of the projection's output, so that nothing copies it."""
    made, make = projections(bias=bias)
    cos, sin = values(r=6)[2:]
    weights = [p for m in made for p in m.parameters()]
    found = []
    for run in (plain, lambda *a: apply_rotary(*a, impl=impl)):
        q, k = make()
        held = [q.detach().clone(), k.detach().clone()]
        out = run(q, k, cos, sin)
        assert torch.equal(q, held[0]) and torch.equal(k, held[1])
        grads = torch.autograd.grad(sum(t.pow(3).sum() for t in out), [q, k, *weights])
        found.append(grads[2:])
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads[:2])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@every_impl
def test_in_place_on_results_with_gradients(impl):
    """Through mark_dirty: what the caller holds is the result, with the result's history."""
    q, k, cos, sin = values()
    dys = like((q, k))
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    made = [leaf * 1 for leaf in leaves]
    places = [t.data_ptr() for t in made]
    out = apply_rotary(*made, cos, sin, impl=impl)
    assert [t.data_ptr() for t in out] == places and out[0] is made[0] and out[1] is made[1]
    torch.autograd.backward(made, dys)
    check([*(t.detach() for t in out), *(leaf.grad for leaf in leaves)], q, k, cos, sin, dys)


@every_impl
@pytest.mark.parametrize("flows", [False, True])
def test_an_operation_that_saved_what_is_overwritten_raises(impl, flows):
    q, k, cos, sin = values()
    weight = torch.ones_like(q).requires_grad_()
    q = (q.clone().requires_grad_() if flows else q.clone()) * 1
    product = weight * q  # saves q
    apply_rotary(q, k * 1, cos, sin, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


NOT_OURS = {
    "leaf": lambda q, k: (q.requires_grad_(), k * 1),
    "view of a leaf": lambda q, k: (q.requires_grad_()[:], k * 1),
    "view of a key, where a gradient flows": lambda q, k: (q.requires_grad_() * 1, k[:]),
    "one storage": lambda q, k: torch.cat((q, k), 1).split((6, 2), 1),
    "one tensor twice": lambda q, k: (q, q),
    "expanded": lambda q, k: (q[:, :1].expand(2, 6, 5, 8), k),
}


@every_impl
@pytest.mark.parametrize("case", NOT_OURS)
def test_what_is_not_overwritten(impl, case):
    q, k, cos, sin = values()
    q, k = NOT_OURS[case](q.clone(), k.clone())
    held = [q.detach().clone(), k.detach().clone()]
    out = apply_rotary(q, k, cos, sin, impl=impl)
    assert torch.equal(q, held[0]) and torch.equal(k, held[1])
    for a, b in zip(out, plain(q, k, cos, sin)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_impl
def test_tensors_of_a_graph_are_not_overwritten_under_no_grad(impl):
    """A look at rotated queries in the middle of a forward pass changes nothing."""
    _, make = projections()
    cos, sin = values()[2:]
    q, k = make()
    held = [q.detach().clone(), k.detach().clone()]
    with torch.no_grad():
        apply_rotary(q, k, cos, sin, impl=impl)
        apply_rotary(q[:, :3], k[:, :1], cos, sin, impl=impl)
        parameter = torch.nn.Parameter(held[0].clone())
        apply_rotary(parameter, k, cos, sin, impl=impl)
    with torch.inference_mode():
        apply_rotary(q, k, cos, sin, impl=impl)
    assert torch.equal(q, held[0]) and torch.equal(k, held[1]) and torch.equal(parameter, held[0])


@every_impl
def test_inference_tensors_are_not_overwritten_outside(impl):
    with torch.inference_mode():
        q, k, cos, sin = values()
    held = q.clone()
    assert apply_rotary(q, k, cos, sin, impl=impl)[0] is not q
    assert torch.equal(q, held)


@every_impl
def test_the_incoming_gradient_is_not_overwritten(impl):
    """autograd hands one tensor to both terms of a sum."""
    q, k, cos, sin = values()
    dys = like((q, k))
    held = [dy.clone() for dy in dys]
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    others = [t.clone().requires_grad_() for t in (q, k)]
    out = apply_rotary(*leaves, cos, sin, impl=impl)
    torch.autograd.backward([a + b for a, b in zip(out, others)], dys)
    for dy, before, other in zip(dys, held, others):
        assert torch.equal(dy, before) and torch.equal(other.grad, before)


@every_impl
def test_a_second_backward(impl):
    q, k, cos, sin = values()
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    out = apply_rotary(*(leaf * 1 for leaf in leaves), cos, sin, impl=impl)
    dys = like(out)
    first = torch.autograd.grad(out, leaves, dys, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, leaves, dys)))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, leaves, dys)


# ---------------------------------------------------------------- layouts


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "features first": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "gaps": lambda t: torch.full((*t.shape[:3], 2 * t.shape[3] + 1), torch.nan, device=DEVICE)[..., 1::2].copy_(t),
}


@every_impl
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [8, 4])
def test_layouts(impl, layout, r):
    q, k, cos, sin = values(r=r)
    dys = like((q, k))
    laid = [LAYOUTS[layout](t) for t in (q, k)]
    if layout == "gaps":
        assert not laid[0].is_contiguous() and laid[0].stride(3) == 2
    leaves = [t.detach().requires_grad_() for t in laid]  # leaves with these strides
    out = apply_rotary(*leaves, cos, sin, impl=impl)
    grads = torch.autograd.grad(out, leaves, [LAYOUTS[layout](dy) for dy in dys])
    check([*(t.detach() for t in out), *grads], q, k, cos, sin, dys)
    a, b = apply_rotary(*laid, cos, sin, impl=impl)  # no gradient: in place, whatever the strides
    assert a is laid[0] and b is laid[1]
    assert torch.equal(a, out[0]) and torch.equal(b, out[1])


@every_impl
def test_layouts_differ_between_q_and_k(impl):
    q, k, cos, sin = values()
    out = apply_rotary(LAYOUTS["features first"](q), LAYOUTS["gaps"](k), cos, sin, impl=impl)
    for a, b in zip(out, plain(q, k, cos, sin)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_impl
def test_layouts_of_cos_and_sin(impl):
    q, k, cos, sin = values()
    dys = like((q, k))
    expected = derivatives(lambda *a: apply_rotary(*a, impl=impl), q, k, cos, sin, dys)
    expanded = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    turned = cos, sin.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat((cos, cos), 2)[..., :8], torch.cat((sin, sin), 2)[..., :8]
    for tables in (expanded, turned, sliced, tuple(t.repeat(2, 1, 1) for t in (cos, sin))):
        found = derivatives(lambda *a: apply_rotary(*a, impl=impl), q, k, *tables, dys)
        assert all(map(torch.equal, found, expected))


@every_impl
def test_parts_of_one_product(impl):
    """GPT-NeoX: q, k and v are thirds of each head's part of one projection; v is not touched."""
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(2, 5, 3, 24, generator=generator).to(DEVICE)
    cos, sin = values(r=4)[2:]
    found = []
    for run in (plain, lambda *a: apply_rotary(*a, impl=impl)):
        leaf = product.clone().requires_grad_()
        q, k, v = leaf.mul(1).transpose(1, 2).chunk(3, -1)
        a, b = run(q, k, cos, sin)
        (grad,) = torch.autograd.grad(a.pow(3).sum() + b.pow(3).sum() + v.pow(3).sum(), leaf)
        found.append([a, b, grad])
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@NO_TRITON
def test_samples_far_apart():
    """Offsets past 2^31 elements: memory that is asked for and, but for two rows, never touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided((2, 1, 2, 8), (2**31, 8, 16, 1))
    q, k, cos, sin = values(heads=(1, 2), T=2, dtype=torch.bfloat16)
    near = q.clone()
    far.copy_(q)
    with torch.no_grad():
        apply_rotary(far, k.clone(), cos, sin, impl="triton")
        apply_rotary(near, k.clone(), cos, sin, impl="triton")
    assert torch.equal(far, near)


# ---------------------------------------------------------------- determinism, autocast, torch.compile


@every_impl
def test_equal_bits_twice_on_poisoned_memory(impl):
    arguments = values(B=2, heads=(5, 3), T=3, d=13, r=6, dtype=torch.bfloat16)
    dys = like(arguments[:2])
    with poisoned(DEVICE):
        runs = [derivatives(lambda *a: apply_rotary(*a, impl=impl), *arguments, dys) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and all(bool(t.isfinite().all()) for t in runs[0])
    with torch.no_grad():
        in_place = apply_rotary(*arguments, impl=impl)
    assert all(map(torch.equal, in_place, runs[0][:2]))


@every_impl
def test_autocast(impl):
    """Projections in bf16, cos and sin in the fp32 of the hidden states: the results stay bf16."""
    made, make = projections()
    cos, sin = values()[2:]
    weights = [m.weight for m in made]
    found = []
    for run in (plain, lambda *a: apply_rotary(*a, impl=impl)):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = run(*make(), cos, sin)
            assert [t.dtype for t in out] == [torch.bfloat16] * 2
            found.append([*(t.detach() for t in out), *torch.autograd.grad(sum(t.sum() for t in out), weights)])
    for mine, other in zip(*found):
        # sums of 10 terms of about 2, each with a rounding to bf16 or two
        torch.testing.assert_close(mine, other, rtol=0.03, atol=0.1)


@NO_TRITON
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    q, k, cos, sin = values(d=8, r=6)
    for xs in ([q, k], [k]):
        torch.library.opcheck(torch.ops.kunbr_fast.rotary.default, (xs, cos, sin, transposed))
        torch.library.opcheck(torch.ops.kunbr_fast.rotary_.default, ([x.clone() for x in xs], cos, sin))


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_under_torch_compile(impl, dynamic):
    """dynamic: one graph for every number of tokens."""
    torch._dynamo.reset()
    made, _ = projections(d=8)
    weights = [m.weight for m in made]

    def run(x, cos, sin):
        q, k = (p(x).view(2, -1, p.out_features // 8, 8).transpose(1, 2) for p in made)
        q, k = apply_rotary(q, k, cos, sin, impl=impl)
        return q.pow(3).sum() + k.pow(3).sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    for T in (5, 6) if dynamic else (5,):
        arguments = torch.randn(2, T, 7, device=DEVICE), *values(T=T, r=6)[2:]
        for tensor in arguments if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 1)
        y, expected = compiled(*arguments), run(*arguments)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
        for a, b in zip(torch.autograd.grad(y, weights), torch.autograd.grad(expected, weights)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_impl
def test_under_torch_compile_without_gradients(impl):
    """Not in place there: the compiler plans memory itself."""
    torch._dynamo.reset()
    q, k, cos, sin = values(r=6)
    held = q.clone()
    compiled = torch.compile(lambda *a: apply_rotary(*a, impl=impl), backend="aot_eager", fullgraph=True, dynamic=False)
    found = compiled(q, k, cos, sin)
    assert torch.equal(q, held)
    assert all(map(torch.equal, found, apply_rotary(q, k, cos, sin, impl=impl)))


# ---------------------------------------------------------------- dispatch and errors


def test_auto_takes_torch(monkeypatch):
    seen = []
    run = reference.rotary
    monkeypatch.setattr(reference, "rotary", lambda x, *a, **k: seen.append(x.dtype) or run(x, *a, **k))
    apply_rotary(*values())
    apply_rotary(*values(dtype=torch.float64))
    assert seen == [torch.float32] * 2 + [torch.float64] * 2


Q, K, COS, SIN = values()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((Q, K.double(), COS, SIN), TypeError, "q is torch.float32 and k is torch.float64"),
        ((Q.int(), K.int(), COS, SIN), TypeError, "q is torch.int32"),
        ((Q, K, COS, SIN.double()), TypeError, "cos is torch.float32 and sin is torch.float64"),
        ((Q, K, COS.int(), SIN.int()), TypeError, "expected one floating dtype"),
        ((Q[0], K, COS, SIN), ValueError, r"expected \(B, Hq, T, d\)"),
        ((Q[:, :, :3], K, COS, SIN), ValueError, r"q has shape \(2, 6, 3, 8\)"),
        ((Q, K, COS[0], SIN[0]), ValueError, r"expected \(2 or 1, 5, r\)"),
        ((Q, K, COS.expand(3, 5, 8), SIN.expand(3, 5, 8)), ValueError, r"cos has shape \(3, 5, 8\)"),
        ((Q, K, COS[..., :5], SIN[..., :5]), ValueError, "cos has 5 features"),
        ((Q, K, COS[..., :0], SIN[..., :0]), ValueError, "cos has 0 features"),
        ((Q[..., :4], K[..., :4], COS, SIN), ValueError, "expected an even number, 2 to d = 4"),
        ((Q, K, COS.clone().requires_grad_(), SIN), ValueError, "cos or sin requires grad"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        apply_rotary(*arguments)


def test_errors_of_impl():
    with pytest.raises(dispatch.Unavailable, match="cannot run on"):
        apply_rotary(Q, K, COS, SIN, impl="cuda")
    with pytest.raises(ValueError, match="unknown impl 'cudnn'"):
        apply_rotary(Q, K, COS, SIN, impl="cudnn")
    with pytest.raises(TypeError, match="does not serve float64"):
        apply_rotary(Q.double(), K.double(), COS, SIN, impl="triton")
    with pytest.raises(TypeError, match="does not serve float64"):
        apply_rotary(Q, K, COS.double(), SIN.double(), impl="triton")
