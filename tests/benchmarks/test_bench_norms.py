"""benchmarks/suites/norms.py: what its rivals are given, and that one rival's writing is nobody else's input.

Its gate and its bytes are in test_bench.py.
"""

import dataclasses
import inspect

import pytest
import torch

from kunbr_fast.benchmarks import harness, measure
from kunbr_fast.benchmarks.suites import norms
from kunbr_fast.kernels import dispatch

TRITON = dispatch.why_not("rms_norm", "triton", "cpu") is None  # the interpreter
KINDS = ["RMSNorm, frozen", "RMSNorm, trained", "residual", "LayerNorm", "SwiGLU", "rotary"]


def case(kind, **options):
    """The gate's sibling, with heads as small as there are."""
    (found,) = (c for c in norms.cases(harness.Options(tokens=("31",), **options)) if c.label.startswith(kind))
    return dataclasses.replace(found, shape=dataclasses.replace(found.shape, heads=18)).small()


def everything(data):
    return [tensor.detach().clone() for part in data for tensor in part]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_that_writes_over_all_it_gets_harms_nobody(kind, monkeypatch):
    found = case(kind, variants=("torch", "rival"))

    def overwriting(self):
        class Rival(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                ctx.inputs = inputs
                return tuple(torch.zeros_like(dy) for dy in data[1])

            @staticmethod
            def backward(ctx, *dys):
                for tensor in (*ctx.inputs, *dys):
                    if tensor.dim() > 1 and tensor.dtype == found.dtype and not known(tensor):
                        tensor.detach().fill_(7.0)
                return tuple(torch.zeros_like(x) if x.requires_grad else None for x in ctx.inputs)

        return {"rival": lambda: Rival.apply}

    def known(tensor):
        return any(tensor.data_ptr() == other.data_ptr() for other in found.known(data))

    monkeypatch.setattr(type(found), "rivals", overwriting)
    data = found.draw()
    before = everything(data)
    (rival,) = (v for v in found.variants(data) if v.name == "rival")
    run = rival.make()
    assert all(value.eq(0).all() for value in run().values())
    assert all(torch.equal(a, b) for a, b in zip(before, everything(data)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rivals_own_inputs_are_as_the_others(kind):
    found = case(kind)
    data = found.draw()
    own = found._own(data)
    assert all(a.equal(b) for a, b in zip(everything(data), everything(own)))
    for a, b in zip([*data[0], *data[1]], [*own[0], *own[1]]):
        assert a.stride() == b.stride() and a.requires_grad == b.requires_grad
    shared = [a is b for a, b in zip(data[0], own[0])]
    assert shared == [any(t is k for k in found.known(data)) for t in data[0]] and not any(
        a is b for a, b in zip(data[1], own[1])
    )


def test_gradients_of_rotary_lie_as_attention_leaves_them():
    inputs, dys = case("rotary").draw()
    q, k, v = (t.detach().clone().requires_grad_() for t in (*inputs[:2], inputs[1]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out.transpose(1, 2).reshape(1, q.shape[2], -1).sum(), [q, k])
    assert [t.stride() for t in grads] == [dy.stride() for dy in dys]
    assert all(dy.transpose(1, 2).is_contiguous() for dy in dys)


@pytest.mark.skipif(not TRITON, reason="the rival's kernel runs in the interpreter")
def test_ligers_rotary_is_right_and_harms_nobody(monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(harness.Options, "gpu", property(lambda self: True))
    found = case("rotary", dtype=torch.float32)
    data = found.draw()
    before, truth = everything(data), found.truth(data)
    (liger,) = (v for v in found.variants(data) if v.name == "liger")
    run = liger.make()
    assert found.error(run(), truth) < 1e-5
    assert found.error(run(), truth) > 0.1  # it has rotated its inputs where they lie
    assert all(torch.equal(a, b) for a, b in zip(before, everything(data)))
    assert measure.kept_bytes(run, found.known(data)) == 0


# its other kernels take what the interpreter does not: how they are called
@pytest.mark.skipif(not TRITON, reason="liger_kernel.ops asks for triton")
@pytest.mark.parametrize("kind", KINDS)
def test_liger_is_called_as_it_asks(kind, monkeypatch):
    ops = pytest.importorskip("liger_kernel.ops", exc_type=ImportError)
    monkeypatch.setattr(harness.Options, "gpu", property(lambda self: True))
    found, asked = case(kind), []

    def one(module, options):
        class Ops:
            def __getattr__(self, name):
                asked.append(inspect.unwrap(getattr(ops, name).forward))
                return type("Function", (), {"apply": staticmethod(lambda *given: given)})

        return Ops()

    monkeypatch.setattr(norms, "liger", one)
    data = found.draw()
    given = found.rivals()["liger"]()(*data[0])
    bound = inspect.signature(asked[0]).bind(None, *given)
    bound.apply_defaults()
    settings = {name: value for name, value in bound.arguments.items() if not isinstance(value, torch.Tensor)}
    if isinstance(found, norms.Norm):
        assert settings["eps"] == norms.EPS
    if isinstance(found, norms.Norm) and not found.layer:
        assert settings["casting_mode"] == "llama" and settings["offset"] == 0.0
        assert settings["in_place"] is not found.residual  # Liger's defaults
    tensors = [value for value in bound.arguments.values() if isinstance(value, torch.Tensor)]
    assert all(a is b for a, b in zip(tensors, data[0], strict=True))
