"""Two runs against each other: what counts as slower, and what the machine did. And pytest-benchmark's cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kunbr_fast.benchmarks import compare as comparing
from kunbr_fast.benchmarks import harness
from kunbr_fast.benchmarks.compare import compare

ROOT = Path(__file__).resolve().parent.parent


def row(variant="triton", ms=1.0, spread=0.05, ours=1, matmul=100.0, copy=1000.0, gflop=0.0, **others):
    """Bounded by its bytes, unless `gflop` is large."""
    found = dict.fromkeys(harness.COLUMNS, "") | {
        "suite": "norms", "model": "m", "case": "c", "tokens": 8, "dtype": "float32", "variant": variant, "ours": ours,
        "ms": ms, "p20_ms": ms and ms * (1 - spread), "p80_ms": ms and ms * (1 + spread), "gflop": gflop, "mib": 1.0,
        "matmul_tflop_per_s": matmul, "copy_gb_per_s": copy, "peak_mib": 50.0, "kept_mib": 10.0, "device": "A",
        "threads": 1,
    }  # fmt: skip
    return found | others


def only(before, after):
    (change,) = compare([before], [after]).changes
    return change


@pytest.mark.parametrize(
    ("after", "spread", "verdict"),
    [
        (1.0, 0.05, "within noise"),
        (1.2, 0.05, "slower"),
        (0.8, 0.05, "faster"),
        (1.09, 0.05, "within noise"),  # the bands meet
        (0.92, 0.05, "within noise"),
        (1.015, 0.001, "within noise"),  # apart, but too little
        (0.985, 0.001, "within noise"),
        (1.03, 0.001, "slower"),
        (0.97, 0.001, "faster"),
        (1.09, 0.0, "within noise"),  # measured once: a band of 5 % on either side
        (1.12, 0.0, "slower"),
    ],
)
def test_verdict(after, spread, verdict):
    change = only(row(spread=spread), row(ms=after, spread=spread))
    assert change.verdict == verdict and change.ratio == after and change.corrected is None


def test_a_machine_that_moved_is_corrected_for_by_the_rate_that_bounds_the_case():
    before = [row(), row("torch", gflop=1e6)]
    after = [row(ms=1.25, copy=800.0), row("torch", ms=1.25, gflop=1e6, copy=800.0)]
    found = compare(before, after)
    assert found.moved and found.drift == {"matmul": 1.0, "copy": 0.8}
    by = {change.key["variant"]: change for change in found.changes}
    assert by["triton"].corrected == pytest.approx(1.0) and by["triton"].verdict == "unclear"
    assert by["torch"].corrected == pytest.approx(1.25) and by["torch"].verdict == "slower"
    assert [change.key["variant"] for change in found.changes] == ["torch", "triton"]
    assert [change.key["variant"] for change in found.regressions] == ["torch"]
    text = comparing.format(found)
    assert "matmul +0.0 %, copy -20.0 %" in text and "the machine moved" in text and "corrected" in text


def test_a_machine_that_became_faster_hides_nothing():
    change = only(row(), row(ms=1.0, copy=1250.0))
    assert change.verdict == "unclear" and change.corrected == pytest.approx(1.25)


def test_small_drift_and_no_rates_are_not_corrected_for():
    assert not compare([row()], [row(copy=960.0)]).moved
    nothing = compare([row(matmul="", copy="")], [row(matmul="", copy="")])
    assert nothing.drift == {} and nothing.changes[0].corrected is None
    assert "corrected" not in comparing.format(nothing) and "roofline" not in comparing.format(nothing)


def test_memory_beyond_one_percent_and_one_mebibyte():
    assert only(row(), row(peak_mib=50.9, kept_mib=10.9)).memory == {}
    assert only(row(peak_mib=500.0), row(peak_mib=504.0)).memory == {}
    assert only(row(), row(peak_mib=52.0, kept_mib=8.0)).memory == {"peak_mib": (50.0, 52.0), "kept_mib": (10.0, 8.0)}
    assert only(row(peak_mib=""), row()).memory == {}
    assert "peak memory 50 -> 52 MiB" in comparing.format(compare([row()], [row(peak_mib=52.0)]))


def test_only_ours_regress_and_what_no_longer_runs_comes_first():
    before = [row("torch"), row("cuda"), row("liger", ours=0), row("eager", ours=0), row("new", ms="")]
    after = [
        row("torch", ms=1.5), row("cuda", ms="", note="not run: no nvcc"), row("liger", ms=9.0, ours=0),
        row("eager", ours=0), row("new", ms=1.0),
    ]  # fmt: skip
    found = compare(before, after)
    assert [change.key["variant"] for change in found.changes][:3] == ["cuda", "liger", "torch"]
    assert [(change.key["variant"], change.verdict) for change in found.regressions] == [
        ("cuda", "no longer runs"), ("torch", "slower"),
    ]  # fmt: skip
    text = comparing.format(found)
    assert "not run: no nvcc" in text and text.endswith("of ours 2 regressed") and "1 runs now" in text
    assert "* norms: m, c, float32, torch" in text and "\n  norms: m, c, float32, liger" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["regressions"]) == 2 and data["changes"][1]["ratio"] == 9.0


def test_rows_of_one_file_are_counted_and_named():
    found = compare([row("a"), row("b")], [row("b"), row("c"), row("d")])
    assert found.only_before == ["norms: m, c, float32, a"] and len(found.only_after) == 2
    text = comparing.format(found)
    assert "only in the file before: 1\n  norms: m, c, float32, a" in text and "only in the file after: 2" in text
    assert "no row is in both files" in comparing.format(compare([row("a")], [row("b")]))


def test_another_device_or_dtype_is_said_first():
    text = comparing.format(compare([row()], [row(device="B", dtype="bfloat16")]))
    assert text.splitlines()[:2] == [
        "CAUTION: another device: A before, B after",
        "CAUTION: another dtype: float32 before, bfloat16 after",
    ]
    assert "CAUTION" not in comparing.format(compare([row()], [row()]))


def test_table_is_at_most_120_columns_wide():
    before, after = ([row("v" * 99, ms=ms, case="case " * 20, copy=copy)] for ms, copy in ((1.0, 1e3), (98765.4, 3e3)))
    before.append(row("w" * 200))
    assert max(map(len, comparing.format(compare(before, after)).splitlines())) <= 120


def test_pytest_benchmark_runs_the_cases():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-k", "norms and RMSNorm", "--benchmark-disable", "-q", "-rA",
         "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for variant in ("torch", "eager", "F.rms_norm"):
        assert f"frozen, T=256, {variant}]" in done.stdout
    assert "passed" in done.stdout and "failed" not in done.stdout
