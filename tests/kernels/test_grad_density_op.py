"""The operation `grad_density`: checks, choice of form, dispatch, torch.library."""

import importlib.util

import pytest
import torch

from kunbr_fast.cli.doctor import doctor, format_doctor
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.checks import DTYPES
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.kernels.grad_density import reference

grad_density = operators.grad_density
LENGTHS = [1, 5, 0, 4]
ALL = reference.STATISTICS


def batch(lengths=LENGTHS, dtype=torch.float64, k=63, widths=(123, 7), seed=0):
    """x, dys, cu_seqlens"""
    generator = torch.Generator().manual_seed(seed)
    x, *dys = (torch.randn(sum(lengths), n, generator=generator, dtype=torch.float64).to(dtype) for n in (k, *widths))
    return x, dys, ends(lengths)


def ends(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def every(x, dys, cu, **options):
    """Each statistic of each projection, stacked."""
    found = [grad_density(x, dys, cu, statistic=name, **options) for name in ALL]
    return [torch.stack(values) for values in zip(*found)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", (None, "row"))
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_grad_density_is_the_reference(dtype, along, index):
    x, dys, cu = batch(dtype=dtype)
    for statistic in ALL:
        found = grad_density(x, dys, cu.to(index), statistic=statistic, along=along, form="direct")
        wanted = reference.grad_density(x, dys, LENGTHS, statistic, along)
        assert len(found) == 2
        for values, out in zip(found, wanted):
            assert values.dtype == torch.float64 and torch.equal(values, out)


def test_inputs_that_require_grad_are_taken_as_if_detached():
    x, dys, cu = batch()
    wanted = grad_density(x, dys, cu)[0]
    weight = torch.randn(123, 63, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    found = grad_density(x, [(x @ weight.T) * 0 + dys[0]], cu)[0]
    assert not found.requires_grad and torch.equal(found, wanted)


# ---------------------------------------------------------------- the choice of a form


@pytest.fixture
def calls(monkeypatch):
    """The names of the reference's functions that ran."""
    seen = []
    for name in ("grad_density", "gram_l2sq"):
        run = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args, name=name, run=run: (seen.append(name), run(*args))[1])
    return seen


# T = 8 in 2 samples, K = 12, one N = 12: direct 2*8*12*12 = 2304; gram 2*2*L^2*24 is 1536 at L = 4 and 2400 at L = 5
@pytest.mark.parametrize(
    "lengths, max_seqlen, statistic, along, impl, expected",
    [
        ([4, 4], None, "grad_l2sq", None, "auto", "gram_l2sq"),
        ([4, 4], 4, "grad_l2sq", None, "torch", "gram_l2sq"),
        ([5, 3], None, "grad_l2sq", None, "auto", "grad_density"),
        ([4, 4], 5, "grad_l2sq", None, "auto", "gram_l2sq"),  # the longest is known: what is padded counts
        ([4, 4], None, "grad_l2sq", "row", "auto", "grad_density"),
        ([4, 4], None, "grad_l1", None, "auto", "grad_density"),
    ],
)
def test_auto_takes_the_form_of_fewer_flops(lengths, max_seqlen, statistic, along, impl, expected, calls):
    x, dys, cu = batch(lengths, k=12, widths=(12,))
    found = grad_density(x, dys, cu, max_seqlen=max_seqlen, statistic=statistic, along=along, impl=impl)
    assert calls == [expected]
    direct = grad_density(x, dys, cu, statistic=statistic, along=along, form="direct")
    assert calls[1] == "grad_density"
    torch.testing.assert_close(found[0], direct[0], rtol=1e-12, atol=0)


def test_every_projection_counts(calls):
    # one sample of 7, K = 12: N = 12 alone, direct 2*7*144 = 2016, gram 2*49*24 = 2352
    x, dys, cu = batch([7], k=12, widths=(12, 12))
    grad_density(x, dys[:1], cu, statistic="grad_l2sq")
    # with both, direct 4032 and gram 2*49*36 = 3528: X X^T is shared
    grad_density(x, dys, cu, statistic="grad_l2sq")
    grad_density(x, dys[:1], cu, statistic="grad_l2sq", form="gram")
    assert calls == ["grad_density", "gram_l2sq", "gram_l2sq"]


# ---------------------------------------------------------------- errors


X, DYS, CU = batch()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"statistic": "grad_l3"}, ValueError, "unknown statistic 'grad_l3': expected one of grad_l1"),
        ({"along": "rows"}, ValueError, "unknown along 'rows': expected one of None, row$"),
        ({"form": "outer"}, ValueError, "unknown form 'outer'"),
        ({"impl": "cudnn"}, ValueError, "unknown impl 'cudnn': expected one of auto, cuda, triton, torch"),
        ({"impl": "cuda"}, dispatch.Unavailable, 'impl="cuda" cannot run on cpu'),
        ({"dys": []}, ValueError, "dys is empty"),
        ({"x": X[None]}, ValueError, r"x has shape \(1, 10, 63\): expected \(T, K\)"),
        ({"x": X.long()}, TypeError, r"x is torch.int64: expected one of torch.bfloat16"),
        ({"dys": [DYS[0], DYS[1].float()]}, TypeError, r"dys\[1\] is torch.float32 and x is torch.float64"),
        ({"dys": [DYS[0], DYS[1][:9]]}, ValueError, r"dys\[1\] has shape \(9, 7\): expected \(T, N\) with x's 10 rows"),
        ({"dys": [DYS[0][:, 0]]}, ValueError, r"dys\[0\] has shape \(10,\)"),
        ({"dys": [DYS[0].to("meta")]}, ValueError, r"dys\[0\] is on meta and x on cpu"),
        ({"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens is on meta and x on cpu"),
        ({"cu_seqlens": CU.double()}, TypeError, "cu_seqlens is torch.float64: expected torch.int32 or torch.int64"),
        ({"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens has shape \(1, 5\): expected \(B\+1,\)"),
        ({"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens has shape \(0,\)"),
        ({"cu_seqlens": CU[1:]}, ValueError, "cu_seqlens goes from 1 to 10: expected 0 to the number of tokens, 10"),
        ({"cu_seqlens": CU[:-1]}, ValueError, "cu_seqlens goes from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10])}, ValueError, "cu_seqlens decreases from 6 to 4 at sample 1"),
        ({"max_seqlen": 4}, ValueError, "max_seqlen=4: the longest sample has 5 tokens"),
        ({"max_seqlen": -3}, ValueError, "max_seqlen=-3: expected"),
        ({"form": "gram"}, ValueError, 'form="gram" serves statistic="grad_l2sq"'),
        ({"form": "gram", "statistic": "grad_linf"}, ValueError, 'use form="direct" or "auto"'),
        ({"form": "gram", "statistic": "grad_l2sq", "along": "row"}, ValueError, "with along='row'"),
        ({"impl": "triton"}, TypeError, "does not serve float64.*or float32 inputs"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        grad_density(**{"x": X, "dys": DYS, "cu_seqlens": CU, **arguments})


# ---------------------------------------------------------------- dispatch


def test_triton_can_be_named_and_auto_passes_it_by(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.why_not("grad_density", "triton", "cpu") in ("needs a CUDA device", "triton is not installed")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "triton" else find_spec(name))
    assert dispatch.why_not("grad_density", "triton", "meta") == "needs a CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("grad_density", "triton", "cpu") == "triton"
    assert dispatch.resolve("grad_density", "auto", "cpu") == "torch"
    assert dispatch.why_not_auto("grad_density", "triton", "cpu") == "the interpreter is for tests"
    on_cpu = doctor()["operations"]["grad_density"]["cpu"]
    assert on_cpu["by_name"] == {"triton": "the interpreter is for tests"} and "triton" not in on_cpu["unavailable"]
    assert 'triton: runs with impl="triton", the interpreter is for tests' in format_doctor(doctor())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert dispatch.why_not("grad_density", "triton", "cpu") == "triton is not installed"


def test_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    expected = "needs compute capability 8.0 or newer, this is 7.5"
    assert dispatch.why_not("grad_density", "triton", "cuda:0") == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.resolve("grad_density", "triton", "cuda:0") == "triton"
    assert dispatch.resolve("grad_density", "auto", "cuda:0") == "torch"
    assert dispatch.why_not_auto("grad_density", "triton", "cuda:0") == "proofs are off (KUNBR_PROVE=0)"


def test_auto_takes_torch_for_float64(monkeypatch, calls):
    """Also where triton comes first."""
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    dispatch.register("grad_density", "triton", lambda device: None)
    assert dispatch.resolve("grad_density", "auto", "cpu") == "triton"
    grad_density(X, DYS, CU)
    assert calls == ["grad_density"]


# ---------------------------------------------------------------- torch.library and torch.compile


@pytest.mark.parametrize("along", [None, "row"])
@pytest.mark.parametrize("statistic", ALL)
def test_opcheck_of_grad_density(along, statistic):
    x, dys, cu = batch(dtype=torch.float32)
    arguments = (x, dys, cu, None, statistic, along, "auto", "auto")
    torch.library.opcheck(torch.ops.kunbr_fast.grad_density.default, arguments)
    torch.library.opcheck(
        torch.ops.kunbr_fast.grad_density.default, (x.bfloat16(), [dys[1].bfloat16()], *arguments[2:])
    )


@pytest.mark.parametrize("form", operators.FORMS)
def test_opcheck_of_the_gram_form(form):
    x, dys, cu = batch(dtype=torch.float32)
    torch.library.opcheck(torch.ops.kunbr_fast.grad_density.default, (x, dys, cu, 5, "grad_l2sq", None, form, "auto"))


@pytest.mark.parametrize("backend, dynamic", [("eager", None), ("aot_eager", None), ("aot_eager", True)])
def test_under_torch_compile(backend, dynamic):
    torch._dynamo.reset()

    def rows(x, dys, cu, scale):
        return [values * 2 for values in every(x * scale, dys, cu, along="row")]

    compiled = torch.compile(rows, backend=backend, dynamic=dynamic, fullgraph=True)
    for lengths in (LENGTHS, [4, 2, 7], [3] * 6):
        x, dys, cu = batch(lengths)
        for a, b in zip(compiled(x, dys, cu, 3.0), rows(x, dys, cu, 3.0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


def test_dynamic_shapes_are_compiled_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda x, dy, cu: grad_density(x, [dy], cu)[0], backend=counter, dynamic=True, fullgraph=True
    )
    for lengths in (LENGTHS, [4, 2, 7], [3] * 6):
        x, (dy, _), cu = batch(lengths)
        assert torch.equal(compiled(x, dy, cu), reference.grad_density(x, [dy], lengths)[0])
    assert counter.frame_count == 1


def test_errors_show_while_torch_compile_traces():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: grad_density(*a), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"dys\[1\] has shape \(9, 7\)"):
        compiled(X, [DYS[0], DYS[1][:9]], CU)


def test_fake_tensors_on_another_device():
    """Shapes, dtype and device with no data at all."""
    x, dys, cu = (torch.empty(10, 63, device="meta"), [torch.empty(10, 7, device="meta")], CU.to("meta"))
    for along, shape in ((None, (4,)), ("row", (4, 7))):
        (out,) = torch.ops.kunbr_fast.grad_density(x, dys, cu, None, "grad_l1", along, "auto", "auto")
        assert (out.shape, out.dtype, out.device.type) == (shape, torch.float64, "meta")


def test_twice_the_same_bits():
    x, dys, cu = batch(dtype=torch.bfloat16)
    for first, again in zip(*(every(x, dys, cu) for _ in range(2))):
        assert torch.equal(first, again)
