"""Suite cover_layer: its formulas count what a layer does, its gate refuses wrong layers, no rival changes others."""

import dataclasses

import pytest
import torch
from helpers import rarely
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama import modeling_llama

from kunbr_fast.benchmarks import harness, models
from kunbr_fast.benchmarks.shapes import Shape
from kunbr_fast.benchmarks.suites import cover_layer
from kunbr_fast.kernels import dispatch
from kunbr_fast.model import fused_forwards
from kunbr_fast.model.flops import flop_counter

TRITON = dispatch.why_not("rms_norm", "triton", "cpu") is None  # the interpreter


def cases(**options):
    return cover_layer.cases(harness.Options(quick=True, **options))


def tiny(active=False, **options):
    """The gate's sibling of a case whose heads are 16 wide, which has the same."""
    case = next(case for case in cases(**options) if case.active == active)
    return dataclasses.replace(case, shape=Shape(96, 160, 1, 6, 2, 8)).small()


@pytest.mark.parametrize("active", [False, True])
def test_flops_and_bytes_are_counted_ones(active):
    case = tiny(active)
    model, x, dy, angles = case.draw()
    layer = model.model.layers[0]
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:  # without regard to causality
        layer(x, position_embeddings=angles, attention_mask=None).backward(dy)
    T = case.tokens
    assert counter.get_total_flops() == cover_layer.layer_flops(case.shape, T, T * T, active)
    skipped = 12 * T * (T - 1) // 2 * case.shape.hidden
    assert counter.get_total_flops() - skipped == case.flops
    weights = models.nbytes(layer.parameters())
    assert case.nbytes == (3 if active else 2) * weights + 4 * models.nbytes([x])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("active", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gate_lets_ours_pass(active, dtype):
    errors, left_out = tiny(active, dtype=dtype).gate()
    assert set(errors) == {"eager", "torch"} | ({"triton"} if TRITON else set())
    assert all(0 < error < 0.02 for error in errors.values())
    assert set(left_out) == {"torch.compile", "liger"} | (set() if TRITON else {"triton"})


@pytest.mark.parametrize("wrong", rarely(["swiglu", "rms_norm", "apply_rotary", "linears"], ["linears"]))
def test_the_gate_refuses_a_wrong_layer(wrong, monkeypatch):
    right = getattr(fused_forwards, wrong)

    def function(*args, **kwargs):
        out = right(*args, **kwargs)
        return type(out)([out[0] * 1.001, *out[1:]]) if isinstance(out, tuple | list) else out * 1.001

    monkeypatch.setattr(fused_forwards, wrong, function)
    with pytest.raises(harness.Wrong, match="torch is"):
        tiny(True).gate()


def test_gradients_are_of_what_the_role_trains():
    for active in (False, True):
        case = tiny(active)
        data = case.draw()
        for variant in case.variants(data):
            if variant.name not in ("torch", "eager", *(["triton"] if TRITON else [])):
                continue
            found = set(variant.make()())
            names = {f"gradient of {n}" for n, _ in data[0].model.layers[0].named_parameters()} if active else set()
            assert found == {"y", "dx"} | names == set(case.truth(data))


def test_rows():
    rows = tiny(variants=("torch", "torch.compile", "liger")).rows()
    assert all(tuple(row) == harness.COLUMNS for row in rows)
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name) == ["torch", "eager", "torch.compile", "liger"]
    assert by_name["eager"]["speedup"] == 1 and by_name["torch"]["ms"] > 0
    assert 0 < by_name["torch"]["kept_mib"] < by_name["eager"]["kept_mib"]
    for name in ("torch.compile", "liger"):
        assert by_name[name]["ms"] == "" and by_name[name]["note"].startswith("not run: ")


def test_a_copy_shares_weights_and_no_module():
    model = tiny().draw()[0]
    layer = model.model.layers[0]
    copy = models.copied(layer)
    assert all(a is b for a, b in zip(layer.parameters(), copy.parameters()))
    assert not set(layer.modules()) & set(copy.modules())
    one = layer.mlp.up_proj.weight
    other = models.copied(layer, {one: torch.nn.Parameter(one * 2)})
    assert other.mlp.up_proj.weight.equal(one * 2) and other.mlp.gate_proj.weight is layer.mlp.gate_proj.weight


@dataclasses.dataclass(frozen=True)
class OnGpu(harness.Options):
    @property
    def gpu(self):
        return True


def test_liger_is_put_into_the_instance_alone():
    liger = pytest.importorskip("liger_kernel.transformers.rms_norm", exc_type=ImportError)
    before = dict(vars(modeling_llama))
    layer = tiny().draw()[0].model.layers[0]
    copy = models.with_liger(models.copied(layer), OnGpu())
    assert vars(modeling_llama) == before
    assert not any("forward" in module.__dict__ for module in layer.modules())
    assert copy.input_layernorm.forward.__func__ is liger.LigerRMSNorm.forward
    assert copy.mlp.forward.__func__.__qualname__ == "LigerSwiGLUMLP.forward"
    rotary = copy.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert rotary.__name__ == "liger_rotary_pos_emb"


def test_attention_with_another_rotary_embedding():
    case = tiny()
    model, x, dy, angles = case.draw()
    layer, calls = model.model.layers[0], []

    def rotary(*args):
        calls.append(1)
        return modeling_llama.apply_rotary_pos_emb(*args)

    copy = models.copied(layer)
    copy.self_attn.forward = models._rebound(type(copy.self_attn).forward, rotary).__get__(copy.self_attn)
    with torch.no_grad():
        found, own = (m(x, position_embeddings=angles, attention_mask=None) for m in (copy, layer))
    assert found.equal(own) and calls == [1]
    with pytest.raises(harness.Skip, match="apply_rotary_pos_emb"):
        models._rebound(type(layer.mlp).forward, rotary)


def test_exact_norms_are_fp64():
    case = tiny()
    norm = models.copied(case.draw()[0].model.layers[0].input_layernorm).double()
    x = torch.randn(5, case.shape.hidden, dtype=torch.float64)
    truth = torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    assert harness.relative_error(norm(x), truth) > 1e-12
    assert harness.relative_error(models.exact_norms(norm)(x), truth) < 1e-15


def test_default_cases():
    found = cover_layer.cases(harness.Options(device=torch.device("cuda")))
    assert [(c.model, c.label) for c in found] == [
        ("Llama-3-8B", f"{role}, T={tokens}") for tokens in (1024, 4096) for role in ("cover", "active")
    ]
    assert [c.tokens for c in cases(tokens=("64", "ragged"))] == [64, 64]
