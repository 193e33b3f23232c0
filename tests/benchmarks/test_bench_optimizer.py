"""benchmarks/suites/optimizer.py: what it counts, what its gate lets through, and what becomes of rivals."""

import dataclasses
import importlib.util
import operator
import sys

import pytest
import torch
from helpers import rarely

from kunbr_fast.benchmarks import harness
from kunbr_fast.benchmarks.shapes import Shape
from kunbr_fast.benchmarks.suites import optimizer
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.optimizers import reference
from kunbr_fast.training.flat_buffer import FlatBuffer, make_optimizer

TRITON = dispatch.why_not("lion", "triton", "cpu") is None  # the interpreter
TINY = Shape(hidden=16, intermediate=24, layers=1, heads=4, key_value_heads=2, vocabulary=64)
KINDS = ("fp32", "fp32 master", "stochastic")


def case(operation="lion", kind="fp32", **options):
    options = harness.Options(quick=True, **options)
    common = dict(suite="optimizer", model="tiny", label="tiny", tokens=0, options=options)
    return optimizer.Update(shape=TINY, layers=2, operation=operation, kind=kind, **common)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", ("lion", "adamw"))
def test_bytes_are_those_of_the_tensors(operation, kind):
    the_case = case(operation, kind)
    grad, block, _ = the_case.draw()
    assert the_case.numel == 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) == block.param.numel()
    read = [grad, block.param, *block.moments]
    written = [block.param, *block.moments] + ([] if block.half is None else [block.half])
    assert the_case.nbytes == sum(t.nbytes for t in read + written)
    a_weight = {"fp32": (20, 28), "fp32 master": (20, 28), "stochastic": (14, 22)}[kind][operation == "adamw"]
    assert the_case.nbytes == a_weight * the_case.numel
    assert block.nbytes == sum(t.nbytes for t in written)
    assert the_case.flops == 0


def test_the_block_is_the_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    with torch.device("meta"):
        layers = LlamaForCausalLM(config).model.layers
    assert sorted(case().sizes) == sorted(tuple(p.shape) for p in layers.parameters())


@pytest.mark.parametrize("kind", rarely(KINDS, ["fp32 master"]))
@pytest.mark.parametrize("operation", ("lion", "adamw"))
def test_all_that_run_here_pass_the_gate(operation, kind):
    errors, left_out = case(operation, kind).gate()
    expected = {"torch", "eager"}
    if operation == "adamw" and kind != "stochastic":
        expected |= {"torch.optim foreach"}
    if operation == "lion" and kind != "stochastic" and importlib.util.find_spec("lion_pytorch"):
        expected |= {"lion-pytorch", "lion-pytorch foreach"}
    if TRITON:
        expected |= {"triton"}
    assert left_out["cuda"] and "--compile" in left_out["torch.compile"]
    assert expected <= set(errors)
    assert not any("wrong" in reason for reason in left_out.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_sign_is_about_to_turn(kind):
    small = case("lion", kind).small()
    grad, block, _ = small.draw()
    grad, momentum = grad.double(), block.moments[0].double()
    by_gradient = 0
    for _ in range(small.updates):
        old, new = 0.9 * momentum, 0.1 * grad
        assert ((old + new).abs() > 0.049 * (old.abs() + new.abs())).all()
        by_gradient += int(((old + new).sign() != old.sign()).sum())
        momentum = 0.99 * momentum + 0.01 * grad
    # momentum and gradient disagree, and either wins, in much of the vector
    assert 0.1 < by_gradient / (small.updates * small.numel) < 0.4
    assert 0.1 < ((grad.sign() != block.moments[0].sign()).float().mean()) < 0.5


def scaled(place, factor):
    """The reference with one of its arguments scaled."""

    def broken(operation):
        real = getattr(reference, f"{operation}_")
        return lambda *arguments, **named: real(
            *arguments[:place], arguments[place] * factor, *arguments[place + 1 :], **named
        )

    return broken


# Places among the arguments: lr, beta1, beta2, weight decay.
@pytest.mark.parametrize(("place", "factor"), [(3, 1.001), (4, 0.95), (5, 0.999), (6, 0.9)])
@pytest.mark.parametrize("kind", ("fp32", "fp32 master"))
def test_wrong_updates_by_lion_give_no_numbers(place, factor, kind, monkeypatch):
    monkeypatch.setattr(reference, "lion_", scaled(place, factor)("lion"))
    with pytest.raises(harness.Wrong, match="torch is .* from fp64"):
        case("lion", kind, variants=("torch",)).rows()


@pytest.mark.parametrize(
    ("setting", "factors"),
    [("lr", 1.001), ("betas", (0.99, 1)), ("betas", (1, 0.999)), ("weight_decay", 0.9)],
)
@pytest.mark.parametrize("kind", ("fp32", "fp32 master"))
def test_wrong_updates_by_adamw_give_no_numbers(setting, factors, kind, monkeypatch):
    """torch's, so by another setting."""

    def wrong(name, params, **settings):
        right = settings[setting]
        other = tuple(map(operator.mul, right, factors)) if setting == "betas" else right * factors
        return make_optimizer(name, params, **{**settings, setting: other})

    monkeypatch.setattr(optimizer, "make_optimizer", wrong)
    with pytest.raises(harness.Wrong, match="torch is .* from fp64"):
        case("adamw", kind, variants=("torch",)).rows()


@pytest.mark.parametrize("kind", ("fp32", "fp32 master"))
@pytest.mark.parametrize("operation", ("lion", "adamw"))
def test_torch_is_what_training_runs(operation, kind):
    """To the bit, three updates of a block's parameters by `FlatBuffer`."""
    small = case(operation, kind, variants=("torch",)).small()
    data = grad, start, _ = small.draw()
    (variant,) = (v for v in small.variants(data) if v.name == "torch")
    found = variant.make()()
    params = [torch.nn.Parameter(p.to(grad.dtype)) for p in small.cut(start.param.clone())]
    flat = FlatBuffer(params, small.cut(start.param), master=True)
    flat.param.data.copy_(start.param)  # of a master what the half-precision weights do not have
    known = make_optimizer(operation, [flat.param], small.lr, small.betas, optimizer.WEIGHT_DECAY, impl="torch")
    names = ["momentum"] if operation == "lion" else ["exp_avg", "exp_avg_sq"]
    known.state[flat.param] = {name: moment.clone() for name, moment in zip(names, start.moments)}
    known.state[flat.param]["step"] = torch.tensor(float(optimizer.STEPS_BEFORE))
    for _ in range(small.updates):
        flat.grad.copy_(grad)
        flat.step(known)
    assert found["weight"].equal(flat.param)
    assert all(found[f"moment {i}"].equal(known.state[flat.param][name]) for i, name in enumerate(names))
    if kind == "fp32 master":
        assert found["copy"].equal(flat.weights)
        kept = 0 if flat.param.grad is None else flat.param.grad.nbytes
        assert variant.standing_bytes == start.nbytes + kept and kept == (operation == "adamw") * 4 * small.numel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", ("lion", "adamw"))
def test_no_update_at_all_gives_no_numbers(operation, kind, monkeypatch):
    monkeypatch.setattr(reference, f"{operation}_", lambda *arguments, **named: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(harness.Wrong, match="torch is .* from fp64"):
        case(operation, kind, variants=("torch",)).rows()


def test_a_copy_that_is_not_made_gives_no_numbers(monkeypatch):
    real = reference.lion_
    monkeypatch.setattr(reference, "lion_", lambda *arguments, half, **named: real(*arguments, **named))
    with pytest.raises(harness.Wrong):
        case("lion", "fp32 master", variants=("torch",)).rows()


@pytest.mark.parametrize("operation", ("lion", "adamw"))
def test_rounding_to_nearest_is_not_stochastic_rounding(operation, monkeypatch):
    monkeypatch.setattr(reference, "to_bf16", lambda x, bits: x.to(torch.bfloat16))
    with pytest.raises(harness.Wrong):
        case(operation, "stochastic", variants=("torch",)).rows()


@pytest.mark.slow
def test_a_difference_at_the_timed_shape_gives_no_numbers(monkeypatch):
    """Ours are held against each other there: in a sample, after the first update."""
    the_case = case(variants=("torch", "triton"))
    monkeypatch.setattr(optimizer.Update, "gate", lambda self: (dict.fromkeys(("torch", "triton"), 0.0), {}))
    real, calls = optimizer.Update._ours, []

    def second_is_off(self, impl, block, grad):
        calls.append(impl)
        return real(self, "torch", block, grad if len(calls) == 1 else -grad)

    monkeypatch.setattr(optimizer.Update, "_ours", second_is_off)
    with pytest.raises(harness.Wrong, match="triton and .* apart"):
        the_case.rows()


def test_variants_have_their_own_state_and_the_gradient_stays():
    for operation, kind in (("lion", "fp32"), ("adamw", "fp32 master"), ("adamw", "stochastic")):
        the_case = case(operation, kind)
        data = grad, start, _ = the_case.draw()
        before = [t.clone() for t in (grad, start.param, *start.moments)]
        for variant in the_case.variants(data):
            try:
                run = variant.make()
            except harness.Skip:
                continue
            first, second = run(), run()
            assert second is None and not torch.equal(first["weight"], start.param)
            wide = (operation, kind, variant.name) == ("adamw", "fp32 master", "torch")  # its gradient
            assert variant.standing_bytes == start.nbytes + wide * 4 * the_case.numel
        assert all(torch.equal(a, b) for a, b in zip(before, (grad, start.param, *start.moments)))


def test_rows_and_missing_rivals(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    monkeypatch.setitem(sys.modules, "lion_pytorch.foreach", None)
    rivals = ("lion-pytorch", "lion-pytorch foreach", "lion-pytorch triton")
    rows = {row["variant"]: row for row in case(seconds=0.0, variants=("torch", *rivals)).rows()}
    assert set(rows) == {"torch", "eager", *rivals}
    assert all(tuple(row) == harness.COLUMNS for row in rows.values())
    for name in ("torch", "eager"):
        assert rows[name]["ms"] > 0 and rows[name]["note"] == ""
    for name in ("lion-pytorch", "lion-pytorch foreach"):
        assert rows[name]["note"].startswith("not run: lion-pytorch cannot be imported")
    assert rows["lion-pytorch triton"]["ms"] == ""


def test_the_cases():
    for quick, device in ((True, "cpu"), (False, "cpu"), (False, "cuda")):
        found = optimizer.cases(harness.Options(quick=quick, device=torch.device(device)))
        assert len({c.label for c in found}) == len(found) == (2 if quick else 6)
        assert {c.operation for c in found} == {"lion", "adamw"}
    found = optimizer.cases(harness.Options(dtype=torch.bfloat16))
    assert {c.kind for c in found} == {"fp32 master", "stochastic"} and {c.dtype for c in found} == {torch.bfloat16}
    big = dataclasses.replace(found[0], shape=optimizer.MODELS["Llama-3-8B"], layers=4)
    assert big.numel == 4 * 218_112_000  # of config.json's sizes
