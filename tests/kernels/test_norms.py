"""RMSNorm and LayerNorm, both implementations: against fp64, and against the modules that they stand in for."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import poisoned, rarely

pytest.importorskip("triton", reason="triton is made for Linux only")

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels import tiles as config
from kunbr_fast.kernels.norms import cases
from kunbr_fast.kernels.norms import op as norms
from kunbr_fast.kernels.norms import triton_kernel as rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("llama", "gemma", "olmo", "layer", "layer without bias")
RMS = {"llama": dict(cast="llama"), "gemma": dict(cast="gemma", offset=1.0), "olmo": dict(cast="gemma")}
EPS = 1e-5
FP32 = 64 * torch.finfo(torch.float32).eps  # between two fp32 results: sums of up to 64 terms
OPERATORS = torch.ops.kunbr_fast

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def named(dtype):
    return str(dtype)[6:]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(shape, dtype, kind, residual=True, seed=0):
    """{name: tensor}, in the order x, residual, weight, bias; those that the kind has."""
    found = {"x": randn(*shape, dtype=dtype, seed=seed)}
    if residual:
        found["residual"] = randn(*shape, dtype=dtype, seed=seed + 1)
    found["weight"] = randn(shape[-1], dtype=dtype, seed=seed + 2)
    if kind == "layer":
        found["bias"] = randn(shape[-1], dtype=dtype, seed=seed + 3)
    return found


def ours(kind, impl, x, weight, residual=None, bias=None):
    if kind in RMS:
        return norms.rms_norm(x, weight, EPS, residual=residual, impl=impl, **RMS[kind])
    return norms.layer_norm(x, weight, bias, EPS, residual=residual, impl=impl)


def unfused(kind, x, weight, residual=None, bias=None):
    """As transformers and torch.nn write it, for autograd; in fp64 it stays in fp64 and is the truth."""
    h = x if residual is None else x + residual
    if kind in RMS:
        wide = h.double() if h.dtype == torch.float64 else h.float()
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        w = weight.to(wide.dtype) + (kind == "gemma")
        y = weight * x_hat.to(h.dtype) if kind == "llama" else (x_hat * w).to(h.dtype)
    else:
        y = F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return y if residual is None else (y, h)


def run(function, given, grads, require=None):
    """{"y", "h", "d" + name of what requires grad: tensor}; `grads`: {"y", "h": gradient}, those that flow."""
    given = {k: t.detach().requires_grad_(require is None or k in require) for k, t in given.items()}
    out = function(**given)
    out = dict(zip(("y", "h"), out if isinstance(out, tuple) else (out,)))
    asked = {k: t for k, t in given.items() if t.requires_grad}
    flows = [k for k in grads if k in out and out[k].requires_grad]
    found = torch.autograd.grad(
        [out[k] for k in flows], list(asked.values()), [grads[k] for k in flows], allow_unused=True
    )
    return {k: t.detach() for k, t in out.items()} | {"d" + k: t for k, t in zip(asked, found)}


def both(shape, dtype, seed=9):
    return {"y": randn(*shape, dtype=dtype, seed=seed), "h": randn(*shape, dtype=dtype, seed=seed + 1)}


def check(kind, impl, given, dtype):
    """Error at most twice that of the unfused form in the same dtype, plus the proof's floor."""
    shape = given["x"].shape
    grads = both(shape, dtype)
    mine = run(functools.partial(ours, kind, impl), given, grads)
    other = run(functools.partial(unfused, kind), given, grads)
    wide = {k: t.double() for k, t in given.items()}
    truth = run(functools.partial(unfused, kind), wide, {k: t.double() for k, t in grads.items()})
    floors = cases.floors(kind, given | {"d" + k: t for k, t in grads.items()}, truth)
    assert mine.keys() == truth.keys()
    for name, t in mine.items():
        assert t.dtype == dtype and t.shape == truth[name].shape
        allowed = 2 * (other[name].double() - truth[name]).abs() + floors[name]
        excess = float(((t.double() - truth[name]).abs() / allowed).max())
        assert excess <= 1, (name, excess)


# ---------------------------------------------------------------- values


@each_impl
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("residual", [False, True])
def test_against_fp64(impl, kind, dtype, residual):
    check(kind, impl, inputs((2, 5, 63), dtype, kind, residual), dtype)


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 123), (40, 1), (33, 128), (1, 1, 1, 1, 7), (2, 2, 3, 2, 24), (7,), (3, 4096)]
)
def test_shapes(impl, kind, shape):
    check(kind, impl, inputs(shape, torch.bfloat16, kind), torch.bfloat16)


@pytest.mark.parametrize("kind", ["gemma", "layer"])
def test_the_widest(kind):
    check(kind, "triton", inputs((1, config.MAX_NORM_WIDTH), torch.float32, kind), torch.float32)
    wider = inputs((1, config.MAX_NORM_WIDTH + 1), torch.float32, kind)
    with pytest.raises(ValueError, match="serves D <= 8192, not 8193"):
        ours(kind, "triton", **wider)
    assert torch.equal(ours(kind, "auto", **wider)[0], ours(kind, "torch", **wider)[0])


@each_kind
def test_gradcheck(kind):
    for residual in (False, True):
        given = {k: t.double().requires_grad_() for k, t in inputs((3, 7), torch.float32, kind, residual).items()}
        names = tuple(given)
        call = functools.partial(lambda names, *t: ours(kind, "auto", **dict(zip(names, t))), names)
        assert torch.autograd.gradcheck(call, tuple(given.values()))


@each_impl
@each_kind
def test_no_rows(impl, kind):
    given, grads = inputs((0, 24), torch.bfloat16, kind), both((0, 24), torch.bfloat16)
    found = run(functools.partial(ours, kind, impl), given, grads)
    assert found["y"].shape == found["h"].shape == found["dx"].shape == (0, 24)
    assert torch.equal(found["dweight"], torch.zeros_like(given["weight"]))
    if kind == "layer":
        assert torch.equal(found["dbias"], torch.zeros_like(given["bias"]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_a_row_that_is_not_finite_stays_alone(impl, kind):
    given, grads = inputs((20, 63), torch.bfloat16, kind), both((20, 63), torch.bfloat16)
    clean = run(functools.partial(ours, kind, impl), given, grads)
    given["x"][3, 5], given["x"][9, 62] = torch.nan, torch.inf
    found = run(functools.partial(ours, kind, impl), given, grads)
    rest = [i for i in range(20) if i not in (3, 9)]
    for name in ("y", "h", "dx"):
        assert bool(found[name][[3, 9]].isfinite().logical_not().any(1).all())
        assert torch.equal(found[name][rest], clean[name][rest])


# ---------------------------------------------------------------- as transformers casts


def modules():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

    llama = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Phi3RMSNorm, SmolLM3RMSNorm)
    found = [(kind, "llama") for kind in llama]
    found += [(Gemma2RMSNorm, "gemma"), (Gemma3RMSNorm, "gemma"), (Olmo2RMSNorm, "olmo")]
    return found + [(CohereLayerNorm, "layer without bias"), (torch.nn.LayerNorm, "layer")]


def test_the_dtypes_and_bits_of_transformers():
    """impl="torch": the RMSNorms' bits, in every pair of dtypes of x and weight. impl="triton" and LayerNorm, whose
    sums torch orders otherwise, may take the neighbour of a value in its dtype; the weight may double that."""
    once = set()
    for (kind, name), dtype, weight in itertools.product(modules(), DTYPES, DTYPES):
        if (name, dtype, weight) in once and not dtype == weight == torch.bfloat16:
            continue  # one of the modules that are alike
        once.add((name, dtype, weight))
        module = kind(63, eps=EPS).to(DEVICE, weight)
        given = inputs((2, 9, 63), dtype, name, residual=False)
        with torch.no_grad():
            for k, parameter in module.named_parameters():
                given[k] = parameter.copy_(given[k]).detach()
            if kind is torch.nn.LayerNorm and dtype != weight:
                expected = F.layer_norm(given["x"].float(), (63,), given["weight"].float(), given["bias"].float(), EPS)
                expected = expected.to(dtype)  # torch has this pair on some devices alone
            else:
                expected = module(given["x"])
            for impl in IMPLS:
                y = ours(name, impl, **given)
                assert y.dtype == expected.dtype, (kind, dtype, weight)
                if impl == "torch" and name in RMS:
                    assert torch.equal(y, expected), (kind, dtype, weight)
                elif dtype == torch.float32:
                    torch.testing.assert_close(y, expected, rtol=FP32, atol=FP32)
                else:
                    size = cases.magnitudes(name, given | {"dy": y})["y"]
                    off = (y.double() - expected.double()).abs() / (2.01 * torch.finfo(dtype).eps * size)
                    assert float(off.max()) <= 1 and float((off > 0).double().mean()) < 0.01, (kind, dtype, weight)


@each_impl
def test_offset_in_the_llama_cast(impl):
    """offset + weight is rounded to the weight's dtype, as the expression of the docstring does."""
    x, weight = randn(9, 63, dtype=torch.bfloat16), randn(63, dtype=torch.bfloat16, seed=1)
    x_hat = norms.rms_norm(x, torch.ones_like(weight), EPS, impl=impl)
    assert torch.equal(norms.rms_norm(x, weight, EPS, offset=1, impl=impl), (1.0 + weight) * x_hat)


@each_impl
def test_mixed_dtypes(impl):
    """A narrow branch added to a wide stream, and a wide weight: torch's promotion, gradients in each dtype."""
    given = inputs((4, 63), torch.bfloat16, "layer")
    given |= dict(residual=given["residual"].float(), weight=given["weight"].float())
    grads = both((4, 63), torch.float32)
    for kind in ("llama", "layer"):
        mine = {k: t for k, t in given.items() if kind == "layer" or k != "bias"}
        found = run(functools.partial(ours, kind, impl), mine, grads)
        assert found["y"].dtype == found["h"].dtype == torch.float32
        assert all(found["d" + k].dtype == t.dtype for k, t in mine.items())
        assert torch.equal(found["h"], given["x"] + given["residual"])
        assert torch.equal(found["dx"], found["dresidual"].bfloat16())
        wide = run(functools.partial(unfused, kind), {k: t.float() for k, t in mine.items()}, grads)
        torch.testing.assert_close(found["y"], wide["y"], rtol=FP32, atol=FP32)
        torch.testing.assert_close(found["dweight"], wide["dweight"], rtol=FP32, atol=FP32)


# ---------------------------------------------------------------- what is asked for


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_every_subset_of_gradients_and_flows(impl, kind):
    """The bits of the full backward for what requires grad, None where nothing flows, nothing for what does not."""
    for residual in (True, False):
        given, grads = inputs((9, 63), torch.bfloat16, kind, residual), both((9, 63), torch.bfloat16)
        for flows in (("y",), ("h",), ("y", "h")) if residual else (("y",),):
            some = {k: grads[k] for k in flows}
            full = run(functools.partial(ours, kind, impl), given, some)
            if flows == ("h",):
                assert torch.equal(full["dx"], grads["h"]) and full["dweight"] is None
            else:
                assert all(full["d" + k] is not None for k in given)
            for count in range(1, len(given)):
                for require in itertools.combinations(given, count):
                    if flows == ("h",) and not {"x", "residual"} & set(require):
                        continue  # h depends on nothing that requires grad: see the next test
                    found = run(functools.partial(ours, kind, impl), given, some, require)
                    assert found.keys() == {"y", *("h",) * residual, *("d" + k for k in require)}
                    for name, t in found.items():
                        same = full[name]
                        assert same is None and t is None or torch.equal(t, same), (name, require, flows)


@each_impl
def test_the_flows_add_up(impl):
    given, grads = inputs((20, 63), torch.float32, "llama"), both((20, 63), torch.float32)
    through_y, through_h, together = (
        run(functools.partial(ours, "llama", impl), given, {k: grads[k] for k in flows})["dx"]
        for flows in (("y",), ("h",), ("y", "h"))
    )
    torch.testing.assert_close(together, through_y + through_h, rtol=1e-6, atol=1e-6)


@each_impl
def test_what_requires_grad(impl):
    """h depends on x and residual alone: with both frozen it is constant, or its readers would compute gradients."""
    given = inputs((4, 63), torch.float32, "layer")
    given["weight"].requires_grad_()
    for kind in ("llama", "layer"):
        mine = {k: t for k, t in given.items() if kind == "layer" or k != "bias"}
        y, h = ours(kind, impl, **mine)
        assert y.requires_grad and not h.requires_grad
        y, h = ours(kind, impl, **mine | {"residual": given["residual"].clone().requires_grad_()})
        assert y.requires_grad and h.requires_grad
        y, h = ours(kind, impl, **{k: t.detach() for k, t in mine.items()})
        assert not y.requires_grad and not h.requires_grad


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_saved(impl, kind, residual):
    """h (x itself, not a copy, without a residual), the weight for dx alone, fp32 statistics."""
    given = inputs((20, 63), torch.bfloat16, kind, residual)
    for count in range(len(given) + 1):
        for require in itertools.combinations(given, count):
            saved = []
            tensors = {k: t.detach().requires_grad_(k in require) for k, t in given.items()}
            with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
                out = ours(kind, impl, **tensors)
            h, weight = out[1] if residual else tensors["x"], tensors["weight"]
            dx, dw = bool({"x", "residual"} & set(require)), "weight" in require
            expected = [h.data_ptr()] * (dx or dw) + [weight.data_ptr()] * dx
            known = [t.data_ptr() for t in saved if t.data_ptr() in (h.data_ptr(), weight.data_ptr())]
            assert sorted(known) == sorted(expected)
            statistics = [t for t in saved if t.data_ptr() not in known]
            assert len(statistics) == (dx or dw) * (2 if kind == "layer" else 1)
            assert all(t.dtype == torch.float32 and t.numel() == 20 for t in statistics)


# ---------------------------------------------------------------- where things lie


def laid_out(how, shape, dtype, seed):
    """A tensor of that shape, values by seed; it lies in memory as `how` says."""
    t = randn(*shape, dtype=dtype, seed=seed)
    if how == "a slice of q, k, v":  # (B, T, H, d), the last H of 3H heads
        wide = torch.full((*shape[:-2], 3 * shape[-2], shape[-1]), torch.nan, dtype=dtype, device=DEVICE)
        wide[..., -shape[-2] :, :] = t
        return wide[..., -shape[-2] :, :]
    if how == "transposed heads":  # (B, H, T, d) of (B, T, H, d)
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "by columns":
        return t.mT.contiguous().mT
    if how == "every other":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]
    if how == "expanded":
        return t[:1].expand(shape)
    return t


LAYOUTS = ("a slice of q, k, v", "transposed heads", "by columns", "every other", "expanded", "as it is")


@pytest.mark.parametrize("kind", ["llama", "layer"])
@pytest.mark.parametrize(
    "how", [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and LAYOUTS[5] in (a, b) or a == b != LAYOUTS[5]]
)
def test_layouts(kind, how):
    """(of x, of the gradients): the same bits as from contiguous tensors by the kernel, and both within tolerance."""
    shape = (2, 5, 3, 24)
    given = inputs(shape, torch.bfloat16, kind)
    given |= {k: laid_out(how[0], shape, torch.bfloat16, i) for i, k in enumerate(("x", "residual"))}
    grads = {k: laid_out(how[1], shape, torch.bfloat16, 9 + i) for i, k in enumerate(("y", "h"))}
    assert how[0] == LAYOUTS[5] or not given["x"].is_contiguous()
    assert how[1] == LAYOUTS[5] or not grads["y"].is_contiguous()
    found = run(functools.partial(ours, kind, "triton"), given, grads)
    whole = run(
        functools.partial(ours, kind, "triton"),
        {k: t.contiguous() for k, t in given.items()},
        {k: t.contiguous() for k, t in grads.items()},
    )
    for name, t in found.items():
        assert torch.equal(t, whole[name]), name
    for impl in IMPLS:
        check(kind, impl, given, torch.bfloat16)


def test_results_lie_as_x_does():
    """So that heads that were transposed before their norm come back without a copy."""
    x = laid_out("transposed heads", (2, 5, 3, 24), torch.bfloat16, 0)
    found = run(
        functools.partial(ours, "llama", "triton"), dict(x=x, weight=randn(24).bfloat16()), both(x.shape, x.dtype)
    )
    assert found["y"].stride() == found["dx"].stride() == x.stride()


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 24), (2, 1, 3, 2, 2, 24)])
def test_many_leading_dimensions_of_any_strides(shape):
    order = (*reversed(range(len(shape) - 1)), len(shape) - 1)
    given = inputs(shape, torch.bfloat16, "llama")
    given["x"] = given["x"].permute(order).contiguous().permute(order)
    assert not given["x"].is_contiguous()
    check("llama", "triton", given, torch.bfloat16)


def test_addresses_beyond_32_bits():
    """Rows 2^30 elements apart: the last one begins 5 * 2^30 elements after the first, beyond what an int32 holds."""
    try:
        memory = torch.empty(5 * 2**30 + 512, dtype=torch.bfloat16, device=DEVICE)  # on a CPU only touched pages exist
    except (MemoryError, RuntimeError) as error:
        pytest.skip(f"10 GiB of addresses: {error}")
    far = memory.as_strided((6, 2, 2, 64), (2**30, 64, 128, 1))  # dimensions that do not merge
    orders = (0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3)
    for name, order in [*zip(("x", "residual", "y", "h"), (orders[0],) * 4), *itertools.product("xy", orders[1:])]:
        there = far.permute(order)
        given, grads = inputs(there.shape, torch.bfloat16, "layer"), both(there.shape, torch.bfloat16)
        near = run(functools.partial(ours, "layer", "triton"), given, grads)
        tensors = given if name in given else grads
        tensors[name] = there.copy_(tensors[name])
        found = run(functools.partial(ours, "layer", "triton"), given, grads)
        assert all(torch.equal(found[k], near[k]) for k in near)


# ---------------------------------------------------------------- bits


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_nothing_uninitialised_is_read_and_bits_repeat(impl, kind):
    """Buffers from torch.empty hold NaN; the same input twice gives the same bits."""
    given, grads = inputs((70, 63), torch.bfloat16, kind), both((70, 63), torch.bfloat16)
    with poisoned(DEVICE):
        first, second = (run(functools.partial(ours, kind, impl), given, grads) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]) and bool(t.isfinite().all()), name


def test_programs_do_not_matter(monkeypatch):
    """How many programs share the rows depends on the GPU's size; dw only in its last bits, and dx not at all."""
    given, grads = inputs((150, 63), torch.float32, "layer"), both((150, 63), torch.float32)
    dx = []
    for warps in (4, 32, 4000):  # 1, 5 and 10 programs for 10 blocks of rows
        monkeypatch.setattr(config, "NORM_SUM_WARPS", warps)
        check("layer", "triton", given, torch.float32)
        dx.append(run(functools.partial(ours, "layer", "triton"), given, grads)["dx"])
    assert torch.equal(dx[0], dx[1]) and torch.equal(dx[0], dx[2])


def test_frozen_weight_costs_no_partial_sums():
    given = inputs((150, 63), torch.float32, "layer")
    dy, stats = given["x"], randn(150, 1)

    def call(*compute):
        return rms_norm.call_backward(dy, dy, dy, given["weight"], stats, stats, 0.0, *compute, processors=1)

    frozen, full = call(True, False, False), call(True, True, True)
    assert frozen.grid == (10,) and full.grid == (5,)  # a block of rows each; 8 programs of 2 blocks, 5 that have any
    assert frozen.arguments["dw"] is dy and frozen.arguments["db"] is dy
    assert full.arguments["dw"].shape == full.arguments["db"].shape == (5, 63)


# ---------------------------------------------------------------- autograd, autocast, compile


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_double_backward_is_refused(impl, kind):
    given = {k: t.requires_grad_() for k, t in inputs((4, 63), torch.float32, kind).items()}
    y, h = ours(kind, impl, **given)
    (dx,) = torch.autograd.grad((y.square() + h).sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@each_impl
def test_h_changed_in_place_is_refused(impl):
    given = {k: t.requires_grad_() for k, t in inputs((4, 63), torch.float32, "llama").items()}
    y, h = ours("llama", impl, **given)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_impl
@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Gemma2RMSNorm", "Olmo2RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_autocast(impl, name, dtype):
    """The bits that there are without it, with a backward inside too; the dtypes that the module has under it."""
    module, kind = next((m(63).to(DEVICE, dtype), kind) for m, kind in modules() if m.__name__ == name)
    given = inputs((4, 63), dtype, kind, residual=False)
    grads = both((4, 63), dtype)
    outside = run(functools.partial(ours, kind, impl), given, grads)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run(functools.partial(ours, kind, impl), given, grads)
        theirs = run(lambda x, **t: module(x), given, grads, ("x",))
    assert inside["y"].dtype == theirs["y"].dtype and inside["dx"].dtype == theirs["dx"].dtype
    for k, t in outside.items():  # a GPU's autocast makes LayerNorm's output fp32: the bits of the narrower dtype
        narrow = min(t.dtype, inside[k].dtype, key=lambda dtype: dtype.itemsize)
        assert torch.equal(inside[k].to(narrow), t.to(narrow)), k


def test_layer_norm_under_autocast_on_cuda():
    """There torch's own runs in fp32 and returns fp32, on a CPU not: hence `out_dtype`, which is tested here."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("aten::layer_norm", "AutocastCUDA") and not has("aten::layer_norm", "AutocastCPU")
    given = inputs((4, 63), torch.bfloat16, "layer", residual=False)
    wide = OPERATORS.norm_forward(
        given["x"], None, given["weight"], given["bias"], EPS, 0.0, True, False, torch.float32
    )[0]
    assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), ours("layer", "triton", **given))
    fp32 = ours("layer", "triton", **{k: t.float() for k, t in given.items()})
    assert torch.equal(wide, fp32)


@each_impl
@pytest.mark.parametrize("kind", ["llama", "layer"])
@pytest.mark.parametrize("dtype", rarely([torch.bfloat16, torch.float32], [torch.bfloat16]))
def test_compiled_whole(impl, kind, dtype):
    """fullgraph: no break, neither in the forward nor in the backward; "auto" (torch) too, and another length."""
    torch._dynamo.reset()
    impl = "auto" if impl == "torch" else impl
    require = ("x", "weight"), ("weight",)
    for names in require:

        def function(x, residual, weight, bias=None):
            y, h = ours(kind, impl, x, weight, residual, bias)
            return y * 2, h + 1

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for rows in (5, 6):
            given, grads = inputs((2, rows, 63), dtype, kind), both((2, rows, 63), dtype)
            expected, found = (run(f, given, grads, names) for f in (function, compiled))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    shape = (2, 5, 3, 24)
    x, dy = (laid_out("transposed heads", shape, torch.bfloat16, seed) for seed in (0, 1))
    added = dy if residual else None
    weight, rstd = randn(24), randn(2, 5, 3, 1)
    some = dict(test_utils=("test_schema", "test_faketensor"))
    forward, backward = OPERATORS.norm_forward.default, OPERATORS.norm_backward.default
    rms, layer, bf16 = (False, True), (True, False), torch.bfloat16
    torch.library.opcheck(forward, (x, added, weight, None, EPS, 1.0, *rms, torch.float32))
    torch.library.opcheck(forward, (x, added, weight, None, EPS, 1.0, False, False, bf16), **some)
    torch.library.opcheck(forward, (x, added, weight, weight, EPS, 0.0, *layer, bf16))
    torch.library.opcheck(forward, (x, added, weight, None, EPS, 0.0, *layer, torch.float32), **some)
    for compute in ((True, True), (True, False), (False, True)):
        which = {} if all(compute) else some
        w = weight if compute[0] else None
        torch.library.opcheck(backward, (dy, added, x, w, None, rstd, 0.0, *compute, False), **which)
        torch.library.opcheck(backward, (dy, added, x, w, rstd, rstd, 0.0, *compute, compute[1]), **which)
    torch.library.opcheck(backward, (dy, None, None, None, None, None, 0.0, False, False, True), **some)


# ---------------------------------------------------------------- the choice, and what is refused


def test_auto_takes_torch():
    assert {"rms_norm", "layer_norm"} <= set(dispatch.OPERATIONS)
    for operation in ("rms_norm", "layer_norm"):
        assert dispatch.resolve(operation, "auto", DEVICE) == "torch"
        assert dispatch.resolve(operation, "triton", DEVICE) == "triton"
    given = inputs((4, 63), torch.float32, "llama")
    assert torch.equal(ours("llama", "auto", **given)[0], ours("llama", "torch", **given)[0])


def test_refusals():
    x, w = randn(4, 6), randn(6)
    for error, message, call in (
        (ValueError, "unknown cast 'mistral'", lambda: norms.rms_norm(x, w, EPS, cast="mistral")),
        (ValueError, "unknown impl 'cpu'", lambda: norms.rms_norm(x, w, EPS, impl="cpu")),
        (dispatch.Unavailable, "not in this release", lambda: norms.layer_norm(x, w, w, EPS, impl="cuda")),
        (TypeError, "serves no float64", lambda: norms.rms_norm(x.double(), w.double(), EPS, impl="triton")),
        (TypeError, "weight is torch.float32 and x torch.float64", lambda: norms.rms_norm(x.double(), w, EPS)),
        (TypeError, "x is torch.int64", lambda: norms.rms_norm(x.long(), w, EPS)),
        (
            ValueError,
            r"weight has shape \(5,\): expected \(6,\) beside x \(4, 6\)",
            lambda: norms.rms_norm(x, w[:5], EPS),
        ),
        (ValueError, r"bias has shape \(1,\)", lambda: norms.layer_norm(x, w, w[:1], EPS)),
        (ValueError, r"residual has shape \(6,\)", lambda: norms.layer_norm(x, w, w, EPS, residual=w)),
        (ValueError, r"x has shape \(4, 0\)", lambda: norms.rms_norm(x[:, :0], w[:0], EPS)),
        (ValueError, "weight is on meta", lambda: norms.rms_norm(x, w.to("meta"), EPS)),
    ):
        with pytest.raises(error, match=message):
            call()
