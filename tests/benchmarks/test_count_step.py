"""scripts/count_step.py, the table of docs/results.md: what is counted on the meta device is what a run does."""

import csv
from pathlib import Path

import pytest
import torch
from tiny_models import peak_bytes, random_samples

from kunbr_fast.benchmarks.scripts import count_step
from kunbr_fast.benchmarks.shapes import MODELS, Shape

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"reference": count_step.reference, "kunbr_fast": count_step.ours}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Shape(64, 160, 6, 4, 2, 211))


def data():
    samples = random_samples(8, low=5, high=30, vocab=211)
    return samples[:4], samples[4:]


@pytest.mark.parametrize("side", SIDES)
def test_the_meta_device_counts_what_a_run_does(side):
    found = {}
    for device in ("meta", "cpu"):
        torch.manual_seed(0)
        model = count_step.build("tiny", torch.float32, device)
        found[device] = SIDES[side](model, range(2, 4), *data())
    assert found["meta"]["flops"] == found["cpu"]["flops"] > 0
    # some operators are put together differently on the two devices (a norm's backward, a product's output)
    for name in ("saved_bytes", "peak_bytes", "launches"):
        assert found["meta"][name] == pytest.approx(found["cpu"][name], rel=0.05), name


@pytest.mark.parametrize("side", SIDES)
def test_the_peak_is_the_allocators(side):
    model = count_step.build("tiny", torch.float32, "cpu")
    steps = []
    original, count_step.count = count_step.count, lambda step, known: steps.append(step)
    try:
        SIDES[side](model, range(2, 4), *data())
    finally:
        count_step.count = original
    if side == "kunbr_fast":  # its layers are fused while it is counted only: here the models' own run
        with count_step.fused(model, "torch"):
            counted, seen = _both(steps[0], model)
    else:
        counted, seen = _both(steps[0], model)
    assert counted == pytest.approx(seen, rel=0.15)


def _both(step, model):
    counted = count_step.count(step, list(model.parameters()))["peak_bytes"]
    return counted, peak_bytes(lambda: step().backward())


def test_saved_bytes_and_flops_of_one_product():
    x, w = torch.ones(3, 5, requires_grad=True), torch.ones(7, 5, requires_grad=True)
    found = count_step.count(lambda: torch.nn.functional.linear(x, w).square().sum(), [w])
    assert found["flops"] == 3 * 2 * 3 * 5 * 7  # the product, dX and dW
    assert found["saved_bytes"] == 4 * (3 * 5 + 3 * 7)  # x, and the product for its square; w is known


@pytest.mark.slow
def test_ours_needs_less_and_less_the_higher_the_block():
    ratios = []
    for start in (0, 2):
        counted = {
            s: run(count_step.build("tiny", torch.float32), range(start, start + 2), *data())
            for s, run in SIDES.items()
        }
        for name in ("flops", "saved_bytes", "peak_bytes"):
            assert counted["kunbr_fast"][name] < counted["reference"][name]
        ratios.append(counted["reference"]["flops"] / counted["kunbr_fast"]["flops"])
    assert ratios[1] > ratios[0]


def test_the_committed_table_is_what_is_counted_now():
    """One block of SmolLM2-135M: FLOPs to the last digit the table has, bytes within what torch versions differ by."""
    with open(ROOT / "benchmarks" / "results" / "counted.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["model"] == "SmolLM2-135M" and r["target"] == "all"]
    committed = {r["variant"]: r for r in rows if r["block"] == "24-26"}
    data = count_step.questions(12, MODELS["SmolLM2-135M"].vocabulary, "all")
    for side, run in SIDES.items():
        model = count_step.build("SmolLM2-135M", torch.bfloat16)
        found, row = run(model, range(24, 27), data[:6], data[6:]), committed[side]
        assert found["flops"] / 1e9 == pytest.approx(float(row["gflop"]), rel=1e-3)
        assert found["saved_bytes"] / 2**20 == pytest.approx(float(row["saved_mib"]), rel=0.05)
        assert found["peak_bytes"] / 2**20 == pytest.approx(float(row["peak_mib"]), rel=0.05)
