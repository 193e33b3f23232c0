"""benchmarks/suites/linear_loss.py: what it counts, what its gate lets through, and what becomes of rivals."""

import dataclasses
import sys

import pytest
import torch
from helpers import rarely

from kunbr_fast.benchmarks import harness, measure
from kunbr_fast.benchmarks.suites import linear_loss
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.linear_loss import reference

TRITON = dispatch.why_not("linear_loss", "triton", "cpu") is None  # the interpreter
OPTIONS = harness.Options(quick=True)


def case(trained=False, dtype=None, **options):
    options = dataclasses.replace(OPTIONS, dtype=dtype, **options)
    common = dict(suite="linear_loss", model="tiny", label="tiny", tokens=24, options=options)
    return linear_loss.LinearLoss(hidden=16, vocabulary=100, trained=trained, **common)


@pytest.mark.parametrize("trained", (False, True))
def test_flops_and_bytes(trained):
    the_case = case(trained)
    hidden, weight, targets = the_case.draw()
    with measure.flop_counter() as counter:
        linear_loss._eager(hidden, weight, targets).backward()
    assert the_case.flops == counter.get_total_flops()
    read_and_written = [hidden, weight, hidden.grad] + [weight.grad] * trained
    assert the_case.nbytes == sum(t.nbytes for t in read_and_written)
    assert weight.grad is None or trained


@pytest.mark.parametrize("dtype", rarely((torch.float32, torch.bfloat16), [torch.bfloat16]))
@pytest.mark.parametrize("trained", (False, True))
def test_all_that_run_here_pass_the_gate(trained, dtype):
    errors, left_out = case(trained, dtype).gate()
    assert {"torch", "eager"} <= set(errors)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "F.linear_cross_entropy" in errors
    assert ("triton" in errors) == TRITON
    assert "--compile" in left_out["torch.compile"] and "GPU" in left_out["liger"]
    assert not any("wrong" in reason for reason in left_out.values())


def test_the_mean_nll_and_its_gradients():
    the_case = case(trained=True)
    data = hidden, weight, targets = the_case.draw()
    truth = the_case.truth(data)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(1)
    onehot = torch.nn.functional.one_hot(targets, 100)
    d_logits = (log_p.exp() - onehot) / 24
    torch.testing.assert_close(truth["loss"], -(log_p * onehot).sum() / 24)
    torch.testing.assert_close(truth["gradient of hidden"], d_logits @ weight.double())
    torch.testing.assert_close(truth["gradient of weight"], d_logits.t() @ hidden.double())


def test_a_frozen_head_gets_no_gradient():
    the_case = case()
    found = {v.name: v for v in the_case.variants(the_case.draw())}["torch"].make()()
    assert set(found) == {"loss", "gradient of hidden"}


@pytest.mark.parametrize("what", ("loss", "d_hidden", "d_weight"))
def test_wrong_results_give_no_numbers(what, monkeypatch):
    real = reference.linear_loss
    place = {"loss": 0, "d_hidden": 2, "d_weight": 3}[what]

    def broken(*arguments):
        found = list(real(*arguments))
        found[place] = found[place] * 1.0001
        return tuple(found)

    monkeypatch.setattr(reference, "linear_loss", broken)
    with pytest.raises(harness.Wrong, match="torch is .* from fp64"):
        case(trained=True, variants=("torch",)).rows()


def test_rows_and_missing_rivals(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    rivals = ("F.linear_cross_entropy", "liger", "cut-cross-entropy", "cut-cross-entropy filtered")
    rows = {row["variant"]: row for row in case(seconds=0.0, variants=("torch", *rivals)).rows()}
    assert all(tuple(row) == harness.COLUMNS for row in rows.values())
    assert rows["torch"]["ms"] > 0 and rows["torch"]["note"] == ""
    assert rows["torch"]["kept_mib"] == pytest.approx(24 * 16 * 4 / 2**20, rel=1e-3)  # the gradient of hidden
    assert rows["F.linear_cross_entropy"]["note"] == "not run: torch has it since 2.13"
    assert set(rows) == {"torch", "eager", *rivals}
    for name in rivals:
        assert rows[name]["ms"] == "" and rows[name]["note"].startswith("not run: ")


def test_rivals_of_a_gpu_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(harness.Options, "gpu", property(lambda self: True))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    the_case = case(dtype=torch.bfloat16)
    with pytest.raises(harness.Skip, match="liger-kernel cannot be imported"):
        the_case._liger()
    with pytest.raises(harness.Skip, match="cut-cross-entropy cannot be imported"):
        the_case._cut(None)
    with pytest.raises(harness.Skip, match="float32"):
        case(dtype=torch.float32)._cut(None)


@pytest.mark.skipif(not TRITON, reason="the rival's kernel runs in the interpreter")
@pytest.mark.parametrize("trained", (False, True))
def test_liger_is_called_as_it_asks(trained, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(harness.Options, "gpu", property(lambda self: True))
    the_case = case(trained, torch.float32)
    data = the_case.draw()
    found, truth = the_case._once(the_case._liger(), data)(), the_case.truth(data)
    assert set(found) == set(truth)
    assert all(harness.relative_error(found[name], truth[name]) < 1e-5 for name in truth)


@pytest.mark.parametrize(("change", "runs"), ((1.01, True), (2.0, False)))
def test_a_filter_that_changes_the_gradient_is_no_variant(change, runs, monkeypatch):
    """cut-cross-entropy by a stand-in."""

    def cut(self, filter_eps):
        scale = 1.0 if filter_eps is None else change
        return lambda hidden, weight, targets: linear_loss._eager(hidden * scale, weight, targets) / scale

    monkeypatch.setattr(linear_loss.LinearLoss, "_cut", cut)
    the_case = case()
    variant = the_case.variants(the_case.draw())[-1]
    assert variant.name == "cut-cross-entropy filtered"
    if runs:
        assert set(variant.make()()) == {"loss", "gradient of hidden"}
    else:
        with pytest.raises(harness.Skip, match="its filter changes"):
            variant.make()


def test_the_cases():
    for quick, device in ((True, "cpu"), (False, "cpu"), (False, "cuda")):
        found = linear_loss.cases(harness.Options(quick=quick, device=torch.device(device)))
        assert len({c.label for c in found}) == len(found)
        if quick:
            assert [(c.tokens, c.vocabulary) for c in found] == [(32, 49152 // 4)]
            continue
        assert {c.trained for c in found} == {False, True}
        most = max(c.tokens for c in found)
        whole, quarter = (c for c in found if c.tokens == most and not c.trained)
        assert whole.vocabulary == 4 * quarter.vocabulary
    assert linear_loss.cases(harness.Options(tokens=("ragged",))) == []
    (one, *_) = linear_loss.cases(harness.Options(models=("Qwen2.5-7B",), tokens=("ragged", "40")))
    assert (one.model, one.tokens, one.hidden, one.vocabulary) == ("Qwen2.5-7B", 40, 3584, 152064)
