"""SwiGLU and GeGLU: against fp64, against the MLPs of transformers bit for bit, and what the backward overwrites."""

import copy
import itertools

import pytest
import torch
from helpers import poisoned
from torch.nn.functional import gelu, silu
from torch.utils.checkpoint import checkpoint

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.gated import cases, reference
from kunbr_fast.kernels.gated import op as activations
from kunbr_fast.kernels.gated.op import geglu, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FUNCTIONS = {
    "silu": lambda *a, **k: swiglu(*a, **k),
    "gelu_tanh": lambda *a, **k: geglu(*a, **k),
    "gelu_none": lambda *a, **k: geglu(*a, approximate="none", **k),
}
PLAIN = {
    "silu": lambda g, u: silu(g) * u,
    "gelu_tanh": lambda g, u: gelu(g, approximate="tanh") * u,
    "gelu_none": lambda g, u: gelu(g) * u,
}
NO_TRITON = pytest.mark.skipif(dispatch.why_not("swiglu", "triton", DEVICE) is not None, reason="no triton here")
IMPLS = ["torch", pytest.param("triton", marks=NO_TRITON)]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_activation = pytest.mark.parametrize("activation", FUNCTIONS)


def values(*shape, dtype=torch.float32, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for _ in range(count)]


def results(*tensors):
    """Leaves that require grad, and results of an operation on them that nothing else holds."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return leaves, [leaf * 1 for leaf in leaves]


def derivatives(run, gate, up, dy):
    """[y, dgate, dup] of `run` on results of its own."""
    leaves, (g, u) = results(gate, up)
    y = run(g, u)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(found, activation, gate, up, dy):
    """Error at most twice torch's own in the same dtype plus the proof's floor, element by element."""
    truth = derivatives(PLAIN[activation], *(t.double() for t in (gate, up)), dy.double())
    torchs = derivatives(PLAIN[activation], gate, up, dy)
    floors = cases.floors(activation, dict(gate=gate, up=up, dy=dy), dict(zip(("y", "dgate", "dup"), truth)))
    for mine, other, true, floor in zip(found, torchs, truth, floors.values()):
        if mine is None:
            continue
        assert mine.dtype == gate.dtype and mine.shape == true.shape
        allowed = 2 * (other - true).abs() + floor
        assert bool(((mine - true).abs() <= allowed).all()), float(((mine - true).abs() / allowed).max())


# ---------------------------------------------------------------- values


@every_impl
@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_against_fp64(impl, activation, dtype):
    for shape in ((3, 5, 123), (1, 1, 63), (2, 1025), (7,), (4, 1)):
        gate, up, dy = values(*shape, dtype=dtype)
        check(derivatives(lambda g, u: FUNCTIONS[activation](g, u, impl=impl), gate, up, dy), activation, gate, up, dy)


@every_impl
@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_packed_against_fp64(impl, activation, dtype):
    for shape in ((2, 3, 61), (1, 8)):
        gate, up, dy = values(*shape, dtype=dtype)
        (leaf,), (packed,) = results(torch.cat((gate, up), -1))
        y = FUNCTIONS[activation](packed, impl=impl)
        found = [y.detach(), *torch.autograd.grad(y, leaf, dy)[0].chunk(2, -1)]
        check(found, activation, gate, up, dy)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=lambda d: str(d)[6:])
def test_torch_gives_the_bits_of_plain_torch(activation, dtype):
    gate, up, dy = values(3, 5, 17, dtype=dtype)
    expected = derivatives(PLAIN[activation], gate, up, dy)
    leaves, (g, u) = results(gate, up)
    y = FUNCTIONS[activation](g, u)
    assert torch.equal(y, expected[0])
    for retain in (True, False):  # to new tensors, in place
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, dy, retain_graph=retain), expected[1:]))

    in_one = []
    for run in (FUNCTIONS[activation], lambda packed: PLAIN[activation](*packed.chunk(2, -1))):
        (leaf,), (packed,) = results(torch.cat((gate, up), -1))
        y = run(packed)
        in_one.append([y.detach(), *torch.autograd.grad(y, leaf, dy)])
    assert all(map(torch.equal, *in_one))


@every_impl
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_is_the_mlp_of_transformers(kind, impl):
    """The conventions: which of the two is activated, gelu_pytorch_tanh, Phi-3's gate in the first half."""
    from transformers import Gemma2Config, LlamaConfig, Phi3Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    torch.manual_seed(0)
    makers = {"llama": (LlamaMLP, LlamaConfig), "gemma2": (Gemma2MLP, Gemma2Config), "phi3": (Phi3MLP, Phi3Config)}
    make, config = makers[kind]
    model = make(config(hidden_size=24, intermediate_size=46, num_attention_heads=4, pad_token_id=0)).to(DEVICE)
    ours = {
        "llama": lambda m, x: m.down_proj(swiglu(m.gate_proj(x), m.up_proj(x), impl=impl)),
        "gemma2": lambda m, x: m.down_proj(geglu(m.gate_proj(x), m.up_proj(x), impl=impl)),
        "phi3": lambda m, x: m.down_proj(swiglu(m.gate_up_proj(x), impl=impl)),
    }[kind]
    found = []
    for run in (lambda m, x: m(x), ours):
        m = copy.deepcopy(model)
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = run(m, x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*found):
        if impl == "torch":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # Triton's interpreter: exp(200) is infinite, as meant
@every_impl
@every_activation
def test_extreme_values(impl, activation):
    """As torch: no overflow where torch has none, NaN where it has NaN."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20, -20, 90, -90, 200, -200, 3e4, -3e4, torch.nan], device=DEVICE)
    up, dy = torch.full_like(gate, 2.0), torch.full_like(gate, -3.0)
    found = derivatives(lambda g, u: FUNCTIONS[activation](g, u, impl=impl), gate, up, dy)
    for a, b in zip(found, derivatives(PLAIN[activation], gate, up, dy)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------- gradients asked for


@every_impl
@every_activation
@pytest.mark.parametrize("need_gate, need_up", list(itertools.product((False, True), repeat=2)))
def test_every_subset_of_gradients(impl, activation, need_gate, need_up):
    gate, up, dy = values(3, 21)
    g, u = gate.clone().requires_grad_(need_gate), up.clone().requires_grad_(need_up)
    y = FUNCTIONS[activation](g * 1, u * 1, impl=impl)
    assert y.requires_grad == (need_gate or need_up)
    if y.requires_grad:
        saved = [t is not None for t in y.grad_fn.saved_tensors]
        assert saved == [True, need_gate]  # up's gradient does not need up
        y.backward(dy)
    assert (g.grad is not None, u.grad is not None) == (need_gate, need_up)
    check([y.detach(), g.grad, u.grad], activation, gate, up, dy)


@every_impl
def test_saves_two_tensors_where_a_model_saves_three(impl):
    def saved(run):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            y = run(*inputs)
        return sum(sizes.values()), y

    gate, up = values(4, 32, count=2)
    _, inputs = results(gate, up)
    assert saved(PLAIN["silu"])[0] == 3 * gate.numel()
    assert saved(lambda g, u: swiglu(g, u, impl=impl))[0] == 2 * gate.numel()
    with torch.no_grad():
        assert saved(lambda g, u: swiglu(g, u, impl=impl))[0] == 0


# ---------------------------------------------------------------- what is overwritten, and what is not


@every_impl
@every_activation
def test_backward_overwrites_what_it_saved(impl, activation):
    gate, up, dy = values(3, 21)
    expected = derivatives(lambda g, u: FUNCTIONS[activation](g, u, impl=impl), gate, up, dy)
    leaves, (g, u) = results(gate, up)
    seen = []
    for t in (g, u):
        t.register_hook(lambda grad: seen.append(grad.data_ptr()))
    y = FUNCTIONS[activation](g, u, impl=impl)
    y.backward(dy)
    assert sorted(seen) == sorted([g.data_ptr(), u.data_ptr()])  # no other memory
    assert torch.equal(g, expected[1]) and torch.equal(u, expected[2])
    assert torch.equal(leaves[0].grad, expected[1]) and torch.equal(leaves[1].grad, expected[2])
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward(dy)


@every_impl
def test_backward_overwrites_the_packed_product(impl):
    gate, up, dy = values(3, 21)
    (leaf,), (packed,) = results(torch.cat((gate, up), -1))
    y = swiglu(packed, impl=impl)
    y.backward(dy)
    assert torch.equal(packed, leaf.grad)
    check([y.detach(), *leaf.grad.chunk(2, -1)], "silu", gate, up, dy)
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward(dy)


@every_impl
@pytest.mark.parametrize("bias", [False, True])
def test_projections_outputs_are_overwritten(impl, bias):
    """With a bias, torch makes the output of a linear layer a view of a matrix product."""
    projections = [torch.nn.Linear(5, 8, bias=bias, device=DEVICE) for _ in range(2)]
    g, u = (p(torch.ones(2, 3, 5, device=DEVICE)) for p in projections)
    before = g.detach().clone()
    swiglu(g, u, impl=impl).sum().backward()
    assert not torch.equal(g, before)


def keep(t):
    return t


NOT_OURS = {
    "leaves": lambda g, u: (g, u),
    "views of leaves": lambda g, u: (g.view(-1, 3, 7), u.view(-1, 3, 7)),
    "one leaf": lambda g, u: (g * 1, u),
    "halves of one product": lambda g, u: torch.cat((g, u), -1).chunk(2, -1),
    "one tensor twice": lambda g, u: (g + u,) * 2,
    "expanded": lambda g, u: ((g[:1] * 1).expand(3, 21), u * 1),
    "transposed": lambda g, u: ((g * 1).t(), (u * 1).t()),
}


@every_impl
@pytest.mark.parametrize("case", NOT_OURS)
def test_what_is_not_overwritten(impl, case):
    gate, up, dy = values(3, 21)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    g, u = NOT_OURS[case](*leaves)
    held = [t.detach().clone() for t in (g, u)]
    y = swiglu(g, u, impl=impl)
    dy = dy.view(y.shape) if y.numel() == dy.numel() and case != "transposed" else torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(g, held[0]) and torch.equal(u, held[1])
    expected = [t.clone().requires_grad_() for t in (gate, up)]
    PLAIN["silu"](*NOT_OURS[case](*expected)).backward(dy)
    for a, b in zip(leaves, expected):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("packed", [False, True])
def test_retained_graphs_are_not_overwritten(impl, packed):
    gate, up, dy = values(3, 21)
    leaves, (g, u) = results(gate, up)
    y = swiglu(torch.cat((g, u), -1), impl=impl) if packed else swiglu(g, u, impl=impl)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)  # in place
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, leaves, dy)


@every_impl
def test_the_gradient_itself_is_not_overwritten_nor_read_too_late(impl):
    gate, up, _ = values(3, 21)
    leaves, (g, u) = results(gate, up)
    torch.autograd.backward(swiglu(g, u, impl=impl), u.detach())  # dy is up's own memory
    assert torch.equal(u, up)
    check([None, leaves[0].grad, leaves[1].grad], "silu", gate, up, up)


@every_impl
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("view", [False, True])
def test_another_user_of_gate_or_up_raises_rather_than_reads_what_is_left(impl, packed, which, view):
    """One that runs later in the backward; one that ran before saw the values, and both gradients are right."""
    gate, up, _ = values(3, 20)
    if packed:
        gate, up = torch.cat((gate, up), -1), None
        which = 0

    def loss(run, later):
        leaves, made = results(*(t for t in (gate, up) if t is not None))
        other = made[which].view(-1, 2)[:, 0] if view else made[which]
        if later:  # made before, so differentiated after
            extra = other.square().sum()
            return leaves, run(*made).sum() + extra
        y = run(*made).sum()
        return leaves, y + other.square().sum()

    def plain(g, u=None):
        return PLAIN["silu"](*g.chunk(2, -1)) if u is None else PLAIN["silu"](g, u)

    leaves, total = loss(lambda *a: swiglu(*a, impl=impl), later=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    leaves, total = loss(lambda *a: swiglu(*a, impl=impl), later=False)
    total.backward()
    expected, total = loss(plain, later=True)
    total.backward()
    for a, b in zip(leaves, expected):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@every_impl
def test_a_sum_with_another_branch(impl):
    """Gradients that meet gate's elsewhere are added, not lost in the memory that is both gate and dgate."""
    gate, up, dy = values(3, 21)
    expected = derivatives(lambda g, u: PLAIN["silu"](g, u) + 3 * g - u, gate, up, dy)
    found = derivatives(lambda g, u: swiglu(g, u, impl=impl) + 3 * g - u, gate, up, dy)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("hooks", [(keep, keep), (lambda t: t.clone(), keep)], ids=["identity", "copy"])
def test_saved_tensor_hooks(impl, hooks):
    """With hooks autograd checks no versions: nothing is overwritten, and other users of gate see it whole."""
    gate, up, dy = values(3, 21)
    expected = derivatives(lambda g, u: g.square() + PLAIN["silu"](g, u), gate, up, dy)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        found = derivatives(lambda g, u: g.square() + swiglu(g, u, impl=impl), gate, up, dy)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(impl, use_reentrant):
    gate, up, dy = values(3, 21)

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (gate, up)]
        y = checkpoint(lambda g, u: function(g * 2, u * 2), *leaves, use_reentrant=use_reentrant)
        y.backward(dy)
        return [t.grad for t in leaves]

    for a, b in zip(run(lambda g, u: swiglu(g, u, impl=impl)), run(PLAIN["silu"])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_impl
def test_no_second_derivative(impl):
    """Refused, also where the gradient that comes in is a constant."""
    for made in (values(3, 6, count=2), values(3, 6, count=1)):
        leaves = [t.requires_grad_() for t in made]
        y = swiglu(*leaves, impl=impl)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(y.sum(), leaves, create_graph=True)


# ---------------------------------------------------------------- layouts


@every_impl
def test_layouts(impl):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 4, 12, generator=generator).to(DEVICE)
    for gate in (
        base.transpose(0, 1),
        base.transpose(0, 2),
        base[:, ::2],
        base[..., ::2],
        base[..., 3:10],
        base[:, :0],
    ):
        up = torch.randn(gate.shape, generator=generator).to(DEVICE)
        for dy in (
            torch.randn(gate.shape, generator=generator).to(DEVICE),
            torch.ones((), device=DEVICE).expand(gate.shape),
        ):
            leaves = [gate.clone(memory_format=torch.preserve_format).requires_grad_(), up.clone().requires_grad_()]
            g, u = (torch.as_strided(leaves[0] * 1, gate.shape, leaves[0].stride()), leaves[1] * 1)
            y = swiglu(g, u, impl=impl)
            found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
            check(found, "silu", gate, up, dy)
        plain = swiglu(gate, up, impl=impl)  # the strides as they are
        torch.testing.assert_close(plain, found[0], rtol=1e-6, atol=1e-6)


@NO_TRITON
def test_rows_far_apart():
    """Offsets past 2^31 elements: memory that is asked for and, but for two rows, never touched."""
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=DEVICE)
    gate = memory.as_strided((2, 8), (2**31, 1))
    gate.copy_(torch.arange(16.0).view(2, 8))
    up = torch.ones(2, 8, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(swiglu(gate, up, impl="triton"), swiglu(gate.clone(), up, impl="triton"))


# ---------------------------------------------------------------- determinism, autocast, torch.compile


@every_impl
@every_activation
def test_equal_bits_twice_on_poisoned_memory(impl, activation):
    gate, up, dy = values(5, 123, dtype=torch.bfloat16)
    with poisoned(DEVICE):
        runs = [derivatives(lambda g, u: FUNCTIONS[activation](g, u, impl=impl), gate, up, dy) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and all(bool(t.isfinite().all()) for t in runs[0])
    leaf = torch.cat((gate, up), -1).requires_grad_()  # a leaf: not in place
    packed = [torch.autograd.grad(FUNCTIONS[activation](leaf, impl=impl), leaf, dy)[0] for _ in range(2)]
    assert torch.equal(*packed) and bool(packed[0].isfinite().all())


@every_impl
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(impl, inside):
    torch.manual_seed(0)
    a, b = (torch.nn.Linear(6, 10, bias=False, device=DEVICE) for _ in range(2))
    x = torch.randn(4, 6, device=DEVICE)

    def gradients(run):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = run(a(x), b(x))
            assert y.dtype == torch.bfloat16
            if inside:
                return [y.detach(), *torch.autograd.grad(y.sum(), [a.weight, b.weight])]
        return [y.detach(), *torch.autograd.grad(y.sum(), [a.weight, b.weight])]

    for mine, plain in zip(gradients(lambda g, u: swiglu(g, u, impl=impl)), gradients(PLAIN["silu"])):
        assert mine.dtype == plain.dtype
        # sums of 4 terms, each with a few roundings to bf16
        torch.testing.assert_close(mine, plain, rtol=0.03, atol=0.03)


@NO_TRITON
@every_activation
def test_opcheck(activation):
    gate, up, dy = values(3, 10)
    ops = torch.ops.kunbr_fast
    torch.library.opcheck(ops.gated_forward.default, (gate, up, activation))
    for need_gate, need_up in ((True, True), (True, False), (False, True)):
        arguments = (dy, gate, up if need_gate else None, activation, need_gate, need_up)
        torch.library.opcheck(ops.gated_backward.default, arguments)
    torch.library.opcheck(ops.gated_packed_backward.default, (dy[:, :5], gate, activation))
    torch.library.opcheck(ops.gated_backward_.default, (dy, gate, up, activation))


@every_impl
@pytest.mark.parametrize("dynamic", [None, True])
def test_under_torch_compile(impl, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 12, device=DEVICE)
    x = torch.randn(2, 3, 5, device=DEVICE)

    def run(x):
        gate, up = linear(x).chunk(2, -1)
        return swiglu(gate, up, impl=impl).sum() + geglu(linear(x + 1), impl=impl).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    y, plain = compiled(x), run(x)
    assert torch.equal(y, plain)
    found, expected = (torch.autograd.grad(t, [linear.weight, linear.bias]) for t in (y, plain))
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(compiled(x), run(x))


# ---------------------------------------------------------------- dispatch and errors


def test_auto_takes_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "gated", lambda *a: seen.append(a[2]) or a[0])
    swiglu(*values(2, 4, count=2))
    geglu(*values(2, 4, count=2, dtype=torch.float64), approximate="none")
    assert seen == ["silu", "gelu_none"]


ONE = torch.ones(2, 4)


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda: swiglu(ONE, ONE.double()), TypeError, "gate is torch.float32 and up is torch.float64"),
        (lambda: swiglu(ONE.int(), ONE.int()), TypeError, "gate is torch.int32"),
        (lambda: geglu(ONE, ONE[:1]), ValueError, r"gate is \(2, 4\) and up \(1, 4\)"),
        (lambda: swiglu(ONE[:, :3]), ValueError, r"\(2, 3\) with an odd last dimension"),
        (lambda: swiglu(ONE[0, 0]), ValueError, "has no dimension"),
        (lambda: geglu(ONE, ONE, approximate="sigmoid"), ValueError, "unknown approximate 'sigmoid'"),
        (lambda: swiglu(ONE, ONE, impl="cuda"), dispatch.Unavailable, "cannot run on cpu"),
        (lambda: swiglu(ONE, ONE, impl="cudnn"), ValueError, "unknown impl 'cudnn'"),
        (lambda: swiglu(ONE.double(), ONE.double(), impl="triton"), TypeError, "does not serve float64"),
    ],
)
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()


@NO_TRITON
def test_in_place_refuses_strides_it_cannot_write_through():
    from kunbr_fast.kernels.gated import triton_kernel as kernels

    gate, up, dy = (t.transpose(0, 1) for t in values(2, 3, 4))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        kernels.backward_(dy, gate, up, "silu")
    assert activations._rows_or_none(gate) is None
