"""The suite end_to_end: stages and their sum, what is extrapolated, needed FLOPs, and the gate."""

import csv
import dataclasses
import importlib
import re

import pytest
import torch

import kunbr_fast as kf
from kunbr_fast import data
from kunbr_fast.benchmarks import harness, measure, rows
from kunbr_fast.benchmarks.clock import Clock, Side, StageTime
from kunbr_fast.benchmarks.shapes import MODELS, Shape
from kunbr_fast.benchmarks.suites import end_to_end
from kunbr_fast.benchmarks.suites.end_to_end import EndToEnd
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.prefix_cache import PrefixCache

QUICK = harness.Options(quick=True, variants=("torch",))
# heads and embedding are untied, so that each matrix stands once
SHAPE = Shape(hidden=64, intermediate=96, layers=4, heads=4, key_value_heads=2, vocabulary=61)


def case(options=QUICK, **sizes):
    sizes = dict(shape=SHAPE, questions=14, num_blocks=4, visits=2) | sizes
    return EndToEnd(suite="end_to_end", model="Llama-3-8B", label="total", tokens=0, options=options, **sizes)


@pytest.fixture(scope="module")
def quick():
    ((found, measured, why),) = harness.run(end_to_end.cases(QUICK))
    assert why is None
    return found, measured


@pytest.mark.slow
def test_a_quick_run_has_all_stages_and_their_sum(quick, tmp_path):
    found, measured = quick
    assert found.stages == ["warm-up", "density", "prefix cache", "layers 0-0", "layers 1-1", "merge", "rest"]
    assert [row["case"] for row in measured[::2]] == [*found.stages, "total"]
    assert {row["model"] for row in measured} == {"SmolLM2-135M, narrow"}
    for name in ("reference", "torch"):
        mine = {row["case"]: row for row in measured if row["variant"] == name}
        total = mine.pop("total")
        times = [row["ms"] for row in mine.values() if row["ms"] != ""]
        assert all(ms > 0 for ms in times)
        assert total["ms"] == pytest.approx(sum(times), rel=2e-3)  # four digits each
        assert total["peak_mib"] > 0 and total["standing_mib"] > 0
        assert {stage for stage, row in mine.items() if row["ms"] == ""} == (
            {"prefix cache", "merge"} if name == "reference" else set()
        )
        assert all(row["note"] in ("", "not run: the procedure has no such stage") for row in mine.values())
        assert all(row["error"] == row["p20_ms"] == row["p80_ms"] == "" for row in mine.values())
        assert total["note"] == ("error of a small model in float64" if name == "torch" else "")
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


@pytest.mark.slow
def test_a_share_of_the_steps_is_extrapolated():
    told = []
    few = case(dataclasses.replace(QUICK, say=told.append), questions=27)
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


@pytest.mark.slow
def test_with_enough_time_a_second_run_takes_all_steps(monkeypatch):
    runs = []

    def run(this, name, steps):
        runs.append(steps)
        return Side({}, clocked=4.0, peak=None, others=None)

    monkeypatch.setattr(EndToEnd, "_run", run)

    def steps(name, **options):
        runs.clear()
        case(harness.Options(**options), questions=785)._measured(name)
        return [*runs]

    assert steps("torch") == steps("torch", seconds=1.0) == [2, 30]  # of 60 seconds, whatever rounds take
    assert steps("torch", quick=True) == [2]
    gpu = torch.device("cuda")
    assert steps("triton", device=gpu) == steps("triton", device=gpu, seconds=1.0) == [131]
    assert steps("torch", device=gpu) == steps("reference", device=gpu) == [2, 30]
    for seconds, expected in ((7.9, [2, 3]), (1e6, [2, 131])):
        monkeypatch.setattr(end_to_end, "SECONDS", seconds)
        assert steps("torch") == expected


def test_a_step_is_clocked_from_its_samples_on(monkeypatch):
    """What gathers a step's samples counts as the step, of a visit and of the warm-up."""
    ticks = [0]

    class Ticking(Clock):
        def _now(self):
            return ticks[0]

    def counted(function):
        def run(*args, **kwargs):
            ticks[0] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(PrefixCache, "batch", counted(PrefixCache.batch))
    monkeypatch.setattr(importlib.import_module("kunbr_fast.run.steps"), "pack", counted(data.pack))
    found, clock = case(), Ticking(torch.device("cpu"))
    found._work("torch")(found.draw(), found.steps, clock)
    assert clock.total("warm-up") == clock.steps("warm-up") == 3 * found.steps
    for block in ("layers 0-0", "layers 1-1"):
        assert clock.total(block) == clock.steps(block) == 2 * found.steps
        assert len(clock.first[block]) == 2


@pytest.mark.slow
def test_on_a_gpu_the_best_of_ours_is_run(monkeypatch):
    """Triton's, and torch's where it is named. There is no GPU here: nothing is run."""
    stages = {"total": StageTime(1.0)}
    monkeypatch.setattr(EndToEnd, "_measured", lambda this, name: Side(stages, 1.0, None, None))
    monkeypatch.setattr(end_to_end, "measure_rounds", lambda *args: ({}, (1e12, 1e12), None))
    monkeypatch.setattr(EndToEnd, "gate", lambda this: (dict(errors), dict(left_out)))

    def notes(**options):
        rows = case(harness.Options(device=torch.device("cuda"), **options)).rows()
        return {row["variant"]: row["note"][:7] for row in rows if row["case"] == "total"}

    errors, left_out = dict.fromkeys(("reference", "torch", "triton"), 0.0), {}
    assert notes() == {"reference": "error o", "torch": "not run", "triton": "error o"}
    assert notes(variants=("torch",)) == {"reference": "error o", "torch": "error o"}
    assert notes(quick=True)["torch"] == "error o"
    errors, left_out = dict.fromkeys(("reference", "torch"), 0.0), {"triton": "not installed"}
    assert notes() == {"reference": "error o", "torch": "error o", "triton": "not run"}


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
        pytest.param("reference", {"warm-up", "density", "layers 0-0"}, marks=pytest.mark.slow),
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


def test_the_prediction_is_the_docstrings():
    whole = case(harness.Options(), shape=MODELS["Llama-3-8B"], questions=785, num_blocks=8, visits=3)
    predicted = whole.predicted()
    text = " ".join(end_to_end.__doc__.split()).partition("in seconds: ")[2]
    stated = dict(re.findall(r"([a-z][a-z -]*(?: \d+-\d+)?) (\d+\.\d)[,;]", text))
    assert float(stated.pop("together")) == pytest.approx(sum(predicted.values()), abs=0.05)
    assert stated == {stage: f"{seconds:.1f}" for stage, seconds in predicted.items()} and len(stated) == 10
    assert (len(whole.blocks), len(whole.blocks) * 3 * whole.steps + 3 * whole.steps) == (7, 3144)
    weights = sum(p.numel() for p in end_to_end.build("Llama-3-8B", torch.bfloat16).parameters())
    assert round(2 * 2 * weights / 1e9) == int(re.search(r"in bf16 (\d+) GB", end_to_end.__doc__)[1])


def test_the_folder_takes_the_weights_twice(tmp_path, monkeypatch):
    sizes, restore = [], WeightSnapshot.restore

    def watched(this, model):  # the original, when the warm-up's weights have been written
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
        return restore(this, model)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(WeightSnapshot, "restore", watched)
    found = case(visits=1)
    model = found.draw()
    found._work("torch")(model, 1, Clock(torch.device("cpu")))
    weights = sum(p.nbytes for p in model.parameters())
    assert 2 <= max(sizes) / weights < 2.1 and not list(tmp_path.iterdir())


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

    monkeypatch.setattr(importlib.import_module("kunbr_fast.run.stages"), "knowledge_density", broken)
    with pytest.raises(harness.Wrong, match="torch is 1.0e-06 from the reference"):
        case().gate()


def test_without_the_reference_nothing_is_measured(monkeypatch):
    def none():
        raise harness.Skip("no reference procedure here")

    monkeypatch.setattr(end_to_end, "procedure", none)
    ((_, measured, why),) = harness.run([case()])
    assert isinstance(why, harness.Skip)
    assert {row["note"] for row in measured} == {"not run: no reference procedure here"}
    assert all(row["ms"] == "" and row["case"] == "total" for row in measured)
    assert {row["variant"] for row in measured} == {"reference", "torch"}
