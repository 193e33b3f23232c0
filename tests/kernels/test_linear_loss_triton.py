"""The Triton kernel of the head and the loss against fp64: on a GPU if there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch
from helpers import forbid_waiting, poisoned
from linear_loss_problem import DEVICE, autograd, check, module, problem
from torch import nn

pytest.importorskip("triton", reason="triton is made for Linux only")

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.linear_loss import reference
from kunbr_fast.kernels.linear_loss import triton_kernel as linear_loss
from kunbr_fast.model.decoder import Head
from kunbr_fast.objectives import losses

# numpy's, in the interpreter, of what lies beyond the vocabulary and is not used, or is infinite on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def run(arguments, **options):
    bias = arguments[4] is not None
    return linear_loss.launch(*arguments, **{"need_weight": True, "need_bias": bias, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.37, None), (2.5, 3.0)])
@pytest.mark.parametrize("bias, capped", [(True, False), (False, True)])
def test_against_fp64(dtype, scale, softcap, bias, capped):
    """Three chunks of rows, of which the last is short; two whole tiles of columns and one that is not."""
    arguments, _ = problem(dtype=dtype, bias=bias)
    cap = None
    if capped:
        nll = autograd(arguments, scale, softcap, None, True)[1]
        cap = nll + torch.tensor([-0.5, 0.5, torch.inf], dtype=torch.float64, device=DEVICE).repeat(3)
    chunk = 4 * 64 * dtype.itemsize
    ours = run(arguments, scale=scale, softcap=softcap, nll_cap=cap, chunk_bytes=chunk, block=16)
    check(ours, arguments, scale, softcap, cap)
    if capped:
        assert bool((ours[2][::3] == 0).all()) and bool((ours[2][1::3] != 0).any(1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "rows, width, vocab, block",
    [(1, 8, 63, None), (5, 63, 123, 32), (3, 1, 64, 64), (4, 8, 1, 16), (3, 8, 2, None), (2, 8, 128, 64)],
)
def test_shapes(dtype, rows, width, vocab, block):
    arguments, _ = problem(rows, width, vocab, dtype)
    check(run(arguments, block=block), arguments)


def test_a_large_odd_vocabulary_a_row_at_a_time():
    arguments, _ = problem(3, 8, 50257, torch.bfloat16, bias=False)
    check(run(arguments, chunk_bytes=1), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_every_subset_of_gradients(dtype):
    arguments, cap = problem(dtype=dtype, capped=True)
    everything = run(arguments, nll_cap=cap)
    check(everything, arguments, nll_cap=cap)
    for needs in itertools.product([True, False], repeat=3):
        ours = linear_loss.launch(*arguments, 1.0, None, cap, *needs)
        for need, mine, true in zip((True, True, *needs), ours, everything):
            assert (mine is not None and torch.equal(mine, true)) if need else mine is None


def test_no_rows():
    arguments, cap = problem(rows=0, capped=True)
    loss, nll, d_hidden, d_weight, d_bias = run(arguments, nll_cap=cap)
    assert float(loss) == 0 and nll.shape == (0,) and d_hidden.shape == (0, 16)
    assert not d_weight.any() and not d_bias.any() and d_weight.shape == (63, 16) and d_bias.shape == (63,)


def test_chunks_and_blocks_do_not_matter():
    """But for the last bits, where rows are added to d_weight; a row's own results have the same bits."""
    arguments, _ = problem(rows=13, dtype=torch.float32)
    whole = run(arguments)
    for chunk, block in ((1, None), (64 * 4 * 5, 16), (None, 64)):
        ours = run(arguments, chunk_bytes=chunk, block=block)
        for a, b in zip(ours, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rows, most, expected",
    [(0, 9, 1), (1, 9, 1), (9, 9, 9), (10, 9, 5), (924, 1046, 924), (1800, 1046, 1024), (5, 0, 1)],
)
def test_rows_of_a_chunk(rows, most, expected):
    found = linear_loss.chunk_rows(rows, 8, most * 8)
    if rows > most and most >= linear_loss.TILE_ROWS:
        assert found == expected and found % linear_loss.TILE_ROWS == 0
    else:
        assert found <= max(most, 1) and -(-rows // found) == -(-rows // max(1, min(most, max(rows, 1))))


def strided(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 3, dtype=t.dtype, device=t.device)
    wide[..., 1:-2:2] = t
    return wide[..., 1:-2:2]


def test_strides():
    (hidden, weight, targets, row_weights, bias), cap = problem(capped=True)
    given = strided(hidden), weight.t().contiguous().t(), strided(targets), strided(row_weights), strided(bias)
    assert not any(t.is_contiguous() for t in given)
    check(run(given, nll_cap=strided(cap), chunk_bytes=64 * 2 * 4), given, nll_cap=cap)


def test_large_logits_stay_finite():
    """Logits of several thousands, where exp overflows without the maximum taken out."""
    arguments, _ = problem(dtype=torch.float32, size=60.0)
    ours = run(arguments, block=16)
    assert float(ours[1].max()) > 1000
    check(ours, arguments)


def test_a_vocabulary_partly_at_minus_infinity():
    """A bias may forbid tokens, whole tiles of them."""
    (hidden, weight, targets, row_weights, bias), _ = problem(dtype=torch.float32)
    bias[:40] = -torch.inf
    arguments = hidden, weight, 40 + targets % 23, row_weights, bias
    ours = run(arguments, block=16, need_bias=True)
    assert all(bool(t.isfinite().all()) for t in ours) and not ours[3][:40].any()
    check(ours, arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_row(bad):
    arguments, cap = problem(dtype=torch.float32, capped=True)
    clean = run(arguments, nll_cap=cap)
    arguments[0][4, 2] = bad
    loss, nll, d_hidden, _, _ = run(arguments, nll_cap=cap)
    others = torch.arange(9, device=DEVICE) != 4
    assert bool(loss.isnan()) and bool(nll[4].isnan()) and bool(d_hidden[4].isnan().any())
    assert torch.equal(nll[others], clean[1][others]) and torch.equal(d_hidden[others], clean[2][others])


@pytest.mark.parametrize("target", [-100, -1, 63, 2**40])
def test_a_target_outside_the_vocabulary_is_nan(target):
    arguments, _ = problem()
    clean = run(arguments)
    arguments[2][3] = target
    loss, nll, d_hidden, _, _ = run(arguments)
    others = torch.arange(9, device=DEVICE) != 3
    assert bool(loss.isnan()) and bool(nll[3].isnan())
    assert torch.equal(nll[others], clean[1][others]) and torch.equal(d_hidden[others], clean[2][others])


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_of_small_and_large_logits(softcap):
    """tanh from its series and from exp, up to where it is 1."""
    for size in (1e-3, 0.3, 1.0, 30.0):
        arguments, _ = problem(dtype=torch.float32, size=size, bias=False)
        check(run(arguments, softcap=softcap), arguments, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nothing_uninitialised_is_read_and_bits_repeat(dtype, softcap):
    """Buffers from torch.empty hold NaN, the columns beyond the vocabulary too; the same input, the same bits."""
    arguments, cap = problem(dtype=dtype, capped=True)
    with poisoned(DEVICE):
        runs = [run(arguments, softcap=softcap, nll_cap=cap, chunk_bytes=4 * 64 * 4, block=32) for _ in range(2)]
    for first, second in zip(*runs):
        assert torch.equal(first, second) and bool(first.isfinite().all())


def test_no_tensor_of_all_logits():
    """Nothing larger than a chunk is allocated: the largest of all tensors made during a call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.largest = max(self.largest, t.untyped_storage().nbytes())
            return out

    arguments, _ = problem(rows=40, width=4, vocab=1000, dtype=torch.float32)
    with Largest() as mode:
        linear_loss.launch(*arguments, chunk_bytes=5 * 1024 * 4)
    # the weights are 1000 * 4 elements, all logits 40 * 1000
    assert mode.largest == 5 * 1024 * 4


def test_nothing_waits_for_the_device(monkeypatch):
    """The launch itself is left out on a CPU: there the interpreter reads tensors."""
    arguments, cap = problem(capped=True, dtype=torch.float32)
    head = Head(nn.Linear(16, 63, device=DEVICE), 0.5, 2.0)
    hidden = arguments[0].clone().requires_grad_()
    if DEVICE == "cpu":
        monkeypatch.setattr(linear_loss.Call, "launch", lambda self: None)
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        loss, _ = losses.linear_loss(hidden, head, arguments[2], arguments[3], cap, impl="triton")
        loss.backward()
    assert hidden.grad.shape == hidden.shape and head.linear.weight.grad.shape == (63, 16)


# ---------------------------------------------------------------- through the package


@pytest.mark.parametrize("bias", [True, False])
def test_the_public_function_runs_the_kernel(bias, monkeypatch):
    launched = []
    monkeypatch.setattr(linear_loss, "launch", lambda *a, run=linear_loss.launch: launched.append(1) or run(*a))
    (hidden, weight, targets, row_weights, b), cap = problem(dtype=torch.float32, bias=bias, capped=True)
    linear = module(weight, b)
    for wanted in itertools.product([True, False], repeat=2 + bias):
        leaves = [hidden, *linear.parameters()]
        results = []
        for impl in ("triton", "torch"):
            for leaf, flag in zip(leaves, wanted):
                leaf.grad = None
                leaf.requires_grad_(flag)
            loss, nll = losses.linear_loss(hidden, Head(linear, 0.7, 2.0), targets, row_weights, cap, impl=impl)
            assert loss.requires_grad == any(wanted) and not nll.requires_grad
            if any(wanted):
                (-1.7 * loss).backward()  # the factor shows that the incoming gradient is used
            assert [leaf.grad is not None for leaf in leaves] == list(wanted)
            results.append([loss.detach(), nll, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for mine, other in zip(*results):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert len(launched) == 2 ** (2 + bias)


def test_dispatch(monkeypatch):
    (hidden, weight, targets, row_weights, bias), _ = problem(dtype=torch.float64)
    head = Head(module(weight, bias))
    with pytest.raises(TypeError, match="does not serve float64.*or float32 inputs"):
        losses.linear_loss(hidden, head, targets, row_weights, impl="triton")
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    dispatch.register("linear_loss", "triton", lambda device: None)  # also where triton comes first
    assert losses.linear_loss(hidden, head, targets, row_weights)[0].dtype == torch.float64
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch.register("linear_loss", "triton", dispatch.triton_why_not)
    with pytest.raises(dispatch.Unavailable, match='linear_loss: impl="triton" cannot run on cpu: needs a CUDA device'):
        losses.linear_loss(hidden.float().cpu(), Head(module(weight, bias).float().cpu()), targets.cpu(),
                           row_weights.cpu(), impl="triton")  # fmt: skip


@pytest.mark.parametrize(
    "dtype, needs, capped",
    [
        (torch.bfloat16, (True, False, False), False),
        (torch.float32, (True, True, True), True),
        (torch.float32, (False, False, False), False),
    ],
)
def test_opcheck(dtype, needs, capped):
    (hidden, weight, targets, row_weights, bias), cap = problem(dtype=dtype, capped=capped)
    arguments = hidden, weight, bias, targets, row_weights, cap, 0.5, 2.0 if capped else None, *needs, "triton"
    torch.library.opcheck(torch.ops.kunbr_fast.linear_loss.default, arguments)


@pytest.mark.parametrize("backend, dynamic", [("eager", None), ("aot_eager", True)])
def test_under_torch_compile(backend, dynamic):
    torch._dynamo.reset()
    (_, weight, *_), _ = problem(dtype=torch.float32)
    linear = module(weight, None).requires_grad_(False)
    head = Head(linear, 0.5, 3.0)

    def step(hidden, targets, row_weights, cap):
        loss, nll = losses.linear_loss(hidden * 2, head, targets, row_weights, cap, impl="triton")
        return loss * 3, nll

    compiled = torch.compile(step, backend=backend, dynamic=dynamic, fullgraph=True)
    for rows in (9, 5, 12):
        (hidden, _, targets, row_weights, _), cap = problem(rows, dtype=torch.float32, capped=True)
        found = []
        for function in (step, compiled):
            leaf = hidden.clone().requires_grad_()
            loss, nll = function(leaf, targets, row_weights, cap)
            loss.backward()
            found.append((loss.detach(), nll, leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found))


# ---------------------------------------------------------------- at full size


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("vocab", [128256, 50257])
def test_full_size(vocab):
    """Llama-3-8B's head in bf16 with and without gradients, in several chunks, and captured as a CUDA graph."""
    arguments, _ = problem(700, 4096, vocab, torch.bfloat16, bias=False, size=0.1)
    ours = linear_loss.launch(*arguments, need_weight=True, chunk_bytes=64 << 20)
    others = reference.linear_loss(*arguments, need_weight=True)
    for mine, other in zip(ours[:4], others[:4]):
        assert float((mine.double() - other.double()).norm()) <= 2**-6 * float(other.double().norm())
    launched, graph = linear_loss.launch(*arguments), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_loss.launch(*arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured[:3], launched[:3]))
