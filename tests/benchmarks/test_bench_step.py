"""Suite step: its formulas count what a step does, its gate refuses wrong steps, variants leave the model as it is."""

import dataclasses
import functools
import weakref
from pathlib import Path

import graph_emulator
import pytest
import reference_procedure
import torch
from helpers import rarely
from tiny_models import rotary_flops

from kunbr_fast import checkout
from kunbr_fast.benchmarks import harness, reference
from kunbr_fast.benchmarks.models import nbytes
from kunbr_fast.benchmarks.suites import step
from kunbr_fast.kernels import dispatch
from kunbr_fast.model import fused_forwards
from kunbr_fast.training.block import BlockTraining

TRITON = dispatch.why_not("linear_loss", "triton", "cpu") is None  # the interpreter
HERE = ("reference", "frozen eager", "torch")  # what a CPU can run fast


def tiny(target="all", variants=HERE, **options):
    """The gate's sibling."""
    [case] = step.cases(harness.Options(quick=True, variants=variants, **options))
    return dataclasses.replace(case, target=target).small()


def test_needed_flops_are_those_spent_without_waste():
    for target, waste in (("letter", 1e-9), ("all", 0.01)):  # with labels on half of a sample ours runs all of it
        case = tiny(target)
        batch = case.packed
        grid = batch.num_samples * max(batch.lengths) ** 2
        last = (
            batch.num_samples
            * max(batch.lengths)
            * (max(batch.row_counts) if target == "letter" else max(batch.lengths))
        )
        formula = step.step_flops(case.shape, case.block, batch, grid, last)
        side = step.SIDES["torch"](case, case.draw())
        angles = rotary_flops(side.model, batch.num_tokens)
        assert side.flops() - angles == pytest.approx(formula, rel=waste)
        assert 0 < case.flops < formula
        # causal pairs, one by one
        rows, places = batch.rows.tolist(), batch.position_ids.tolist()
        seen = sum(p + 1 for p in places), sum(places[row] + 1 for row in rows)
        assert case.flops == step.step_flops(case.shape, case.block, batch, *seen)


def test_the_others_spend_more():
    case = tiny("letter")
    data = case.draw()
    spent = {name: step.SIDES[name](case, data).flops() for name in HERE}
    assert spent["reference"] == spent["frozen eager"] > 1.5 * spent["torch"]


@pytest.mark.parametrize("dtype", rarely([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_bytes_and_standing_bytes_are_those_of_the_tensors(dtype):
    case = dataclasses.replace(tiny(dtype=dtype), gradients=False)
    data = case.draw()
    model, inside = nbytes(data.model.parameters()), nbytes(data.values.values())
    below = nbytes(p for n, p in data.model.named_parameters() if n.startswith("model.layers.0."))
    embedding = 0 if case.shape.tied else nbytes([data.model.get_input_embeddings().weight])
    entries = inside // dtype.itemsize
    update = entries * (2 + 2 + 2 + 16) if dtype == torch.bfloat16 else entries * 6 * 4
    hidden = case.tokens * case.shape.hidden * dtype.itemsize
    assert case.nbytes == 2 * (model - below - embedding) + update + hidden
    standing = {}
    for variant in case.variants(data):
        if variant.name in HERE:
            variant.make()()
            standing[variant.name] = variant.standing_bytes()
    assert standing["reference"] == 2 * model + 2 * inside  # gradient, momentum
    assert standing["frozen eager"] == model + 3 * inside
    state = 8 * entries if dtype == torch.bfloat16 else inside  # fp32 weights and momentum, or momentum alone
    assert standing["torch"] == model + 2 * inside + state + hidden


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.slow
def test_the_gate_lets_ours_pass(dtype):
    case = tiny("letter", variants=None, dtype=dtype)
    errors, left_out = case.gate()
    assert set(errors) == {*HERE, *(["triton"] if TRITON else [])}
    assert all(0 < error < 0.05 for error in errors.values())
    assert set(left_out) == set(step.SIDES) - set(errors)
    assert "CUDA" in left_out["torch, graph"]


@pytest.mark.parametrize("what", rarely(["retain loss", "layer", "update"], ["update"]))
def test_the_gate_refuses_a_wrong_step(what, monkeypatch):
    case = tiny()
    if what == "retain loss":
        right = step.kf.reinserted
        monkeypatch.setattr(step.kf, "reinserted", lambda *args, **kwargs: right(*args, **kwargs, retain_coeff=1.001))
    elif what == "layer":
        right = fused_forwards.swiglu
        monkeypatch.setattr(fused_forwards, "swiglu", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    else:
        monkeypatch.setitem(step.SIDES, "torch", functools.partial(Hasty, impl="torch"))
    with pytest.raises(harness.Wrong, match="torch is .* from the reference's weights"):
        case.gate()


class Hasty(step.Ours):
    def step(self):
        self.training.flat.param.data.add_(1e-8)
        return super().step()


@pytest.mark.skipif(not TRITON, reason="no triton")
@pytest.mark.slow
def test_the_gate_refuses_a_wrong_kernel(monkeypatch):
    """What only the timed dtype runs is held against fp64 there."""
    right = fused_forwards.swiglu
    monkeypatch.setattr(
        fused_forwards, "swiglu", lambda *args, impl: right(*args, impl=impl) * (1.001 if impl == "triton" else 1)
    )
    with pytest.raises(harness.Wrong, match="triton is .* from fp64"):
        tiny("letter", variants=("triton",)).gate()


def test_the_gate_refuses_a_reference_that_trains_nothing(monkeypatch):
    monkeypatch.setattr(step, "LR", 0.0)
    with pytest.raises(harness.Wrong, match="trained nothing"):
        tiny().gate()


def test_rows_and_the_shared_model():
    case = dataclasses.replace(tiny("letter", variants=(*HERE, "frozen, liger")), gradients=False)
    drawn, draw = [], case.draw
    object.__setattr__(case, "draw", lambda: drawn.append(draw()) or drawn[-1])
    rows = {row["variant"]: row for row in case.rows()}
    assert all(tuple(row) == harness.COLUMNS for row in rows.values())
    assert list(rows) == ["reference", "frozen eager", "frozen, liger", "torch"]
    assert rows["reference"]["speedup"] == 1 and rows["torch"]["ours"] == 1
    for name in HERE:
        assert rows[name]["ms"] > 0 and rows[name]["spent_gflop"] > 0 and rows[name]["standing_mib"] > 0
    assert rows["torch"]["standing_mib"] < rows["reference"]["standing_mib"]
    assert rows["frozen, liger"]["ms"] == "" and rows["frozen, liger"]["note"] == "not run: Liger's kernels need a GPU"
    fresh = case.small().draw()
    assert all(a.equal(b) for a, b in zip(drawn[0].model.parameters(), fresh.model.parameters()))
    assert all(a.equal(b) for a, b in zip(drawn[0].values.values(), fresh.values.values()))


def test_steps_train_and_agree_on_the_losses():
    case = dataclasses.replace(tiny(), gradients=False)
    data = case.draw()
    found = {}
    for name in HERE:
        side = step.SIDES[name](case, data)
        found[name] = [side.step()["losses"] for _ in range(3)]
        assert not any(w.equal(data.values[n]) for n, w in side.weights().items())
    for name in HERE[1:]:
        for a, b in zip(found[name], found["reference"]):
            assert a.tolist() == pytest.approx(b.tolist(), rel=1e-5)


def test_a_graph_gives_the_gradients_of_plain_steps():
    case = tiny()
    data = case.draw()
    plain, graph = (step.SIDES["torch"](case, data) for _ in range(2))
    training = graph.training
    training.use_graphs(graph_emulator.capture)
    truth = plain.gradients()
    for _ in range(2):  # captured, and replayed
        found = graph.gradients()
        assert set(found) == set(truth)
        assert max(harness.relative_error(found[n], truth[n]) for n in found) < 1e-5
    training.use_graphs(None)
    for run in (graph.gradients, graph.step):  # it runs launch by launch then: another variant
        with pytest.raises(harness.Skip, match="captured"):
            run()


@pytest.mark.slow
def test_a_step_in_parts_is_none_of_ours(monkeypatch):
    case = dataclasses.replace(tiny(variants=("torch",)), gradients=False)
    monkeypatch.setattr(step.Step, "gate", lambda self: (dict.fromkeys(("reference", "torch"), 0.0), {}))
    right, sizes = BlockTraining.loss, []

    def loss(self, batch):
        """Memory runs out in the second step."""
        sizes.append(batch.packed.num_tokens)
        if batch.packed.num_tokens == case.tokens and len(sizes) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return right(self, batch)

    monkeypatch.setattr(BlockTraining, "loss", loss)
    rows = {row["variant"]: row for row in case.rows()}
    assert rows["torch"]["note"] == "not run: the step did not fit whole: it went through in parts"
    assert rows["torch"]["ms"] == "" and rows["reference"]["ms"] > 0
    assert sizes[:2] == [case.tokens] * 2 and sum(sizes[2:]) == case.tokens


@pytest.mark.slow
def test_what_failed_holds_nothing(monkeypatch):
    """While the next variant is made, whether it failed as it was made or in its first run."""
    case = dataclasses.replace(tiny(variants=("frozen eager", "frozen, liger", "torch")), gradients=False)
    alive, seen = weakref.WeakSet(), []

    class Fails(step.Frozen):
        def __init__(self, *args):
            alive.add(self)
            super().__init__(*args)

        def step(self):
            raise torch.OutOfMemoryError("out of memory")

    class FailsToBeMade(Fails):
        def prepare(self, case):
            raise torch.OutOfMemoryError("out of memory")

    def counted(*args):
        seen.append(len(alive))
        return step.Ours(*args, impl="torch")

    monkeypatch.setitem(step.SIDES, "frozen eager", Fails)
    monkeypatch.setitem(step.SIDES, "frozen, liger", FailsToBeMade)
    monkeypatch.setitem(step.SIDES, "torch", counted)
    monkeypatch.setattr(step.Step, "gate", lambda self: (dict.fromkeys(v.name for v in self.chosen(None)), {}))
    rows = {row["variant"]: row for row in case.rows()}
    assert seen == [0] and rows["torch"]["ms"] > 0
    assert rows["frozen eager"]["note"] == rows["frozen, liger"]["note"] == "not run: out of memory"


@pytest.mark.slow
def test_layers_are_compiled_each(monkeypatch):
    """torch.compile by a backend that compiles nothing."""
    kinds, real = [], torch.compile

    def compile_(function, **settings):
        kinds.append(settings)
        return real(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", compile_)
    case = tiny(variants=("frozen, torch.compile",), compile=True)
    data = case.draw()
    found = step.SIDES["frozen, torch.compile"](case, data).gradients()
    truth = step.SIDES["frozen eager"](case, data).gradients()
    assert max(harness.relative_error(found[name], truth[name]) for name in truth) < 1e-5
    assert kinds == [{}] + [{"dynamic": True}] * case.shape.layers
    assert not any(module._compiled_call_impl for module in data.model.modules())  # the shared one's own
    with pytest.raises(harness.Skip, match="--compile"):
        step.SIDES["frozen, torch.compile"](tiny(), data)


def test_default_cases():
    found = step.cases(harness.Options(device=torch.device("cuda")))
    assert [(c.block, c.batch, c.target) for c in found] == [
        (range(12, 16), 6, "all"),
        (range(12, 16), 32, "all"),  # before a rented machine's time is over
        *((range(i, i + 4), 6, "all") for i in (0, 24)),
        *((range(i, i + 4), 6, "letter") for i in (0, 12, 24)),
        (range(12, 16), 32, "letter"),
    ]
    once = "layers 12-15, 6+6, all tokens"
    assert [c.label for c in found if "frozen, torch.compile" not in c.left_out] == [once]
    whys = {c.left_out["frozen, torch.compile"] for c in found if c.label != once}
    assert whys == {f"takes minutes to compile: measured at {once}"}
    for case in found:
        big = {"frozen eager", "torch", "torch, graph"} if case.batch > 6 else set()
        assert set(case.left_out) - {"frozen, torch.compile"} == big
        assert all(case.left_out[name] == "not at 32+32, for memory" for name in big)
    found = step.cases(harness.Options())
    assert [c.label for c in found] == [
        "layers 0-2, 6+6, all tokens", "layers 12-14, 6+6, all tokens", "layers 21-23, 6+6, all tokens",
        "layers 21-23, 6+6, the letter",
    ]  # fmt: skip
    assert [c.label for c in found if not c.left_out] == ["layers 12-14, 6+6, all tokens"]
    assert all(c.tokens == sum(c.packed.lengths) and c.model == "SmolLM2-135M" for c in found)
    (quick,) = step.cases(harness.Options(quick=True))
    assert quick.label == "layers 0-1, 2+2, all tokens, narrow" and not quick.left_out


@pytest.mark.slow
def test_what_is_left_out_has_a_row():
    case = dataclasses.replace(
        tiny(variants=("torch", "frozen eager")), gradients=False, left_out={"torch": "too large"}
    )
    rows = {row["variant"]: row for row in case.rows()}
    assert list(rows) == ["reference", "frozen eager", "torch"] and rows["torch"]["note"] == "not run: too large"
    assert rows["torch"]["ms"] == "" and rows["frozen eager"]["ms"] > 0


def test_the_reference_is_found(monkeypatch, tmp_path):
    found = reference.procedure()
    assert Path(found.__file__).read_text() == Path(reference_procedure.__file__).read_text()
    reference.procedure.cache_clear()
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    with pytest.raises(harness.Skip, match="use a checkout"):
        reference.procedure()
    monkeypatch.undo()
    assert reference.procedure().ReferenceLion is not None
