"""The suite end_to_end: stages and their sum, what is extrapolated, needed FLOPs, and the gate."""

import csv
import dataclasses
import importlib

import pytest
import torch

import kunbr_fast as kf
from kunbr_fast.benchmarks import harness, measure, rows
from kunbr_fast.benchmarks.shapes import Shape
from kunbr_fast.benchmarks.suites import end_to_end
from kunbr_fast.benchmarks.suites.end_to_end import Clock, EndToEnd

QUICK = harness.Options(quick=True, variants=("torch",))
# heads and embedding are untied, so that each matrix stands once
SHAPE = Shape(hidden=64, intermediate=96, layers=4, heads=4, key_value_heads=2, vocabulary=61)


def case(options=QUICK, **sizes):
    sizes = dict(shape=SHAPE, questions=14, num_blocks=4, visits=2) | sizes
    return EndToEnd(
        suite="end_to_end", model="Llama-3-8B", label="end to end: total", tokens=0, options=options, **sizes
    )


@pytest.fixture(scope="module")
def quick():
    ((found, measured, why),) = harness.run(end_to_end.cases(QUICK))
    assert why is None
    return found, measured


def test_a_quick_run_has_all_stages_and_their_sum(quick, tmp_path):
    found, measured = quick
    assert found.stages == ["warm-up", "density", "prefix cache", "layers 0-0", "layers 1-1", "merge", "rest"]
    assert [row["case"] for row in measured[::2]] == [f"end to end: {stage}" for stage in [*found.stages, "total"]]
    for name in ("reference", "torch"):
        mine = {row["case"][12:]: row for row in measured if row["variant"] == name}
        total = mine.pop("total")
        times = [row["ms"] for row in mine.values() if row["ms"] != ""]
        assert all(ms > 0 for ms in times)
        assert total["ms"] == pytest.approx(sum(times), rel=2e-3)  # four digits each
        assert total["peak_mib"] > 0 and total["standing_mib"] > 0
        assert {stage for stage, row in mine.items() if row["ms"] == ""} == (
            {"prefix cache", "merge"} if name == "reference" else set()
        )
        assert all(row["note"] in ("", "not run: the procedure has no such stage") for row in mine.values())
        assert (mine["warm-up"]["rounds"], mine["layers 0-0"]["rounds"], mine["density"]["rounds"]) == (6, 6, 12)
    assert all(list(row) == [*harness.COLUMNS, *measure.about()] for row in measured)
    assert {key: str(value) for key, value in found.identity().items()}.items() <= {
        key: str(value) for key, value in measured[-1].items()
    }.items()  # by which --resume knows that the case is done
    assert measured[-1]["speedup"] == pytest.approx(measured[-2]["ms"] / measured[-1]["ms"], rel=1e-2)
    rows.write_rows(tmp_path / "a.csv", tmp_path / "a.json", measured)
    with open(tmp_path / "a.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(measured) == 16


def test_the_gate_is_exact(quick):
    errors = {row["variant"]: float(row["error"]) for row in quick[1] if row["error"]}
    assert errors["torch"] <= end_to_end.SAME < errors["reference"] < 0.02  # fp64, and fp32


def test_a_share_of_the_steps_is_extrapolated():
    told = []
    few = case(dataclasses.replace(QUICK, seconds=0.0, say=told.append), questions=27)
    assert few.steps == 5
    for name in ("reference", "torch"):
        side = few._measured(name)
        notes = {stage: found.note for stage, found in side.stages.items()}
        assert notes["warm-up"] == "extrapolated from 6 of 15 steps"
        assert notes["layers 0-0"] == notes["layers 1-1"] == "extrapolated from 4 of 10 steps"
        assert notes["density"] == "extrapolated from 12 of 27 samples"
        assert notes["total"] == "extrapolated from 2 of 5 steps an epoch"
        assert notes["rest"] == notes.get("merge", "") == ""
        stages = dict(side.stages)
        assert stages.pop("total").ms == pytest.approx(sum(stage.ms for stage in stages.values()))
        assert sum(stage.ms for stage in stages.values()) > 1e3 * side.clocked
    assert notes["prefix cache"] == "extrapolated from 24 of 57 samples"
    assert any("reference, layers 1-1" in text for text in told) and any("round 2 of 2" in text for text in told)


def test_with_enough_time_a_second_run_takes_all_steps(monkeypatch):
    runs = []

    def run(this, name, steps):
        runs.append(steps)
        return end_to_end.Side({}, clocked=4.0, peak=None, others=None)

    monkeypatch.setattr(EndToEnd, "_run", run)
    for seconds, expected in ((0.0, [2]), (7.9, [2, 3]), (1e6, [2, 131])):
        runs.clear()
        case(dataclasses.replace(QUICK, seconds=seconds), questions=785)._measured("torch")
        assert runs == expected
    runs.clear()
    case(dataclasses.replace(QUICK, seconds=None, device=torch.device("cuda")), questions=785)._measured("triton")
    assert runs == [131]


def test_a_first_step_counts_once():
    clock = Clock(torch.device("cpu"))
    clock.first["warm-up"], clock.later["warm-up"] = [5.0, 7.0], [1.0, 2.0, 3.0]
    assert clock.extrapolated("warm-up", 10) == 12 + 8 * 2
    assert clock.extrapolated("warm-up", 5) == clock.total("warm-up") == 18
    clock.first["warm-up"], clock.later["warm-up"] = [5.0], []
    assert clock.extrapolated("warm-up", 10) == 50


def test_shares_of_the_questions_have_their_lengths():
    whole = case(questions=785)
    (forget, retain), (some, more) = whole.lengths(), whole.lengths(10)
    assert (len(forget), len(retain), len(some), len(more)) == (785, 786, 60, 60)
    assert (min(forget), max(forget)) == (20, 224) and sum(forget) / 785 == pytest.approx(77, rel=0.04)
    assert sum(some) / 60 == pytest.approx(sum(forget) / 785, rel=0.02)
    assert sum(more) / 60 == pytest.approx(sum(retain) / 786, rel=0.02)


# the seconds of ours' density are the report's; the reference runs the layers below a block at each step
@pytest.mark.parametrize(
    "side, stages",
    [
        ("ours", {"warm-up", "prefix cache", "layers 0-0", "layers 1-1"}),
        ("reference", {"warm-up", "density", "layers 0-0"}),
    ],
)
def test_needed_flops_are_those_that_torch_counts(side, stages):
    """Products with weights, counted while both sides run; attention is no part of them."""
    found = case(visits=1)
    equal = [[40] * 14, [40] * 18]  # the reference pads nothing

    class Counted(Clock):
        def _now(self):
            counts = counter.get_flop_counts().get("Global", {})
            return sum(n for op, n in counts.items() if str(op).split(".")[1] in ("mm", "addmm", "addmm_"))

    def lengths(this, steps=None):
        return equal

    with pytest.MonkeyPatch.context() as patch, measure.flop_counter() as counter:
        patch.setattr(EndToEnd, "lengths", lengths)
        clock = Counted(torch.device("cpu"))
        found._work("torch" if side == "ours" else side)(found.draw(), 3, clock)
        for stage in found.stages:
            if stage in stages:
                assert clock.total(stage) == pytest.approx(found.flops_of(stage), rel=0.05), stage
        assert found.flops == sum(found.flops_of(stage) for stage in found.stages)


def test_what_stands_by_hand():
    found = case(dataclasses.replace(QUICK, dtype=torch.bfloat16))
    model = found.draw()
    every = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert found.standing("reference") == max(2 * every + 2 * block, 4 * every)
    cache = 2 * 64 * sum(map(sum, found.lengths()))
    assert found.standing("torch") == max(every + 2 * block + 4 * block + cache, 3 * every)


@pytest.fixture
def short_gate(monkeypatch):
    small = EndToEnd.small
    monkeypatch.setattr(EndToEnd, "small", lambda this: dataclasses.replace(small(this), questions=5, visits=1))


def test_another_learning_rate_of_ours_is_wrong(short_gate, monkeypatch):
    config = EndToEnd.config
    broken = lambda this, impl: dataclasses.replace(config(this, impl), block_lr=1.01 * this.lr)  # noqa: E731
    monkeypatch.setattr(EndToEnd, "config", broken)  # which ours alone goes by
    with pytest.raises(harness.Wrong, match="torch is .* from the reference .limit 1.0e-09."):
        case().rows()


def test_a_wrong_density_is_wrong(short_gate, monkeypatch):
    density = kf.knowledge_density

    def broken(*args, **kwargs):
        found = density(*args, **kwargs)
        return dataclasses.replace(found, per_layer=found.per_layer * (1 + 1e-6))

    monkeypatch.setattr(importlib.import_module("kunbr_fast.unlearn"), "knowledge_density", broken)
    with pytest.raises(harness.Wrong, match="torch is 1.0e-06 from the reference"):
        case().gate()


def test_without_the_reference_nothing_is_measured(monkeypatch):
    def none():
        raise harness.Skip("no reference procedure here")

    monkeypatch.setattr(end_to_end, "procedure", none)
    measured = case().rows()
    assert {row["note"] for row in measured} == {"not run: no reference procedure here"}
    assert all(row["ms"] == "" and list(row) == list(harness.COLUMNS) for row in measured)
    assert {row["variant"] for row in measured} == {"reference", "torch"}
