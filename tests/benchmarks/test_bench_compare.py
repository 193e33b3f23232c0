"""Two runs against each other: what counts as slower, and what the machine did. And pytest-benchmark's cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kunbr_fast.benchmarks import compare as comparing
from kunbr_fast.benchmarks.compare import compare
from kunbr_fast.benchmarks.rows import COLUMNS

ROOT = Path(__file__).resolve().parents[2]


def row(variant="triton", ms=1.0, spread=0.05, ours=1, matmul=100.0, copy=1000.0, gflop=0.0, **others):
    """Bounded by its bytes, unless `gflop` is large."""
    found = dict.fromkeys(COLUMNS, "") | {
        "suite": "norms", "model": "m", "case": "c", "tokens": 8, "dtype": "float32", "variant": variant, "ours": ours,
        "ms": ms, "p20_ms": ms and ms * (1 - spread), "p80_ms": ms and ms * (1 + spread), "rounds": 7, "gflop": gflop,
        "mib": 1.0,
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
        (1.03, 0.0, "slower"),
    ],
)
def test_verdict(after, spread, verdict):
    change = only(row(spread=spread), row(ms=after, spread=spread))
    assert change.verdict == verdict and change.ratio == after and change.corrected is None


@pytest.mark.parametrize(
    ("few", "verdicts"),
    [
        ({"p20_ms": "", "p80_ms": ""}, ["within noise", "slower", "within noise", "faster"]),  # measured once
        ({"rounds": 4}, ["within noise", "slower", "within noise", "faster"]),
        ({"rounds": 4, "p80_ms": 1.3}, ["within noise", "within noise", "within noise", "faster"]),  # a wide band stays
        ({"rounds": 5}, ["slower", "slower", "faster", "faster"]),
    ],
)
def test_few_rounds_have_a_band_of_five_percent(few, verdicts):
    found = [only(row(spread=0.01, **few), row(ms=ms, spread=0.001)) for ms in (1.04, 1.06, 0.96, 0.94)]
    assert [change.verdict for change in found] == verdicts


def test_each_row_is_corrected_by_the_rates_of_its_own_rounds():
    names = ("moved", "stood", "unknown", "unbound")
    before = [row(name) for name in names]
    after = [row(name, ms=1.25) for name in names]
    after[0] |= {"copy_gb_per_s": 800.0}
    after[2] |= {"matmul_tflop_per_s": "", "copy_gb_per_s": ""}
    for rows in (before, after):
        rows[3] |= {"copy_gb_per_s": rows[0]["copy_gb_per_s"], "mib": "", "gflop": ""}
    found = compare(before, after)
    by = {change.key["variant"]: (change.verdict, change.corrected) for change in found.changes}
    assert by == {"moved": ("unclear", pytest.approx(1.0)), **dict.fromkeys(names[1:], ("slower", None))}
    assert found.drift == {"matmul": 1.0, "copy": 0.8} and found.moved  # the median of three
    steady = compare([*before, row("more"), row("most")], [*after, row("more"), row("most")])
    assert steady.drift["copy"] == 1.0 and not steady.moved and "(steady)" in comparing.table(steady)
    assert {c.key["variant"]: c.verdict for c in steady.changes}["moved"] == "unclear"


def test_a_machine_that_moved_is_corrected_for_by_the_rate_that_bounds_the_case():
    before = [row(), row("torch", gflop=1e6)]
    after = [row(ms=1.25, copy=800.0), row("torch", ms=1.25, gflop=1e6, copy=800.0)]
    found = compare(before, after)
    assert found.moved and found.drift == {"matmul": 1.0, "copy": 0.8}
    by = {change.key["variant"]: change for change in found.changes}
    assert by["triton"].corrected == pytest.approx(1.0) and by["triton"].verdict == "unclear"
    assert by["torch"].corrected is None and by["torch"].verdict == "slower"
    assert [change.key["variant"] for change in found.changes] == ["torch", "triton"]
    assert [change.key["variant"] for change in found.regressions] == ["torch"]
    text = comparing.table(found)
    assert "matmul +0.0 %, copy -20.0 %" in text and "the machine moved" in text and "corrected" in text


def test_a_machine_that_became_faster_hides_nothing():
    change = only(row(), row(ms=1.0, copy=1250.0))
    assert change.verdict == "unclear" and change.corrected == pytest.approx(1.25)


def test_small_drift_and_no_rates_are_not_corrected_for():
    assert not compare([row()], [row(copy=960.0)]).moved
    nothing = compare([row(matmul="", copy="")], [row(matmul="", copy="")])
    assert nothing.drift == {} and nothing.changes[0].corrected is None
    assert "corrected" not in comparing.table(nothing) and "roofline" not in comparing.table(nothing)


def test_memory_beyond_one_percent_and_one_mebibyte():
    assert only(row(), row(peak_mib=50.9, kept_mib=10.9)).memory == {}
    assert only(row(peak_mib=500.0), row(peak_mib=504.0)).memory == {}
    assert only(row(), row(peak_mib=52.0, kept_mib=8.0)).memory == {"peak_mib": (50.0, 52.0), "kept_mib": (10.0, 8.0)}
    assert only(row(peak_mib=""), row()).memory == {}
    assert "peak memory 50 -> 52 MiB" in comparing.table(compare([row()], [row(peak_mib=52.0)]))


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
    text = comparing.table(found)
    assert "not run: no nvcc" in text and text.endswith("of ours 2 regressed") and "1 runs now" in text
    assert "* norms: m, c, float32, torch" in text and "\n  norms: m, c, float32, liger" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["regressions"]) == 2 and data["changes"][1]["ratio"] == 9.0


def test_one_of_ours_that_is_missing_after_is_a_regression():
    before = [row("torch"), row("triton"), row("cuda", ms=""), row("eager", ours=0)]
    found = compare(before, [row("torch"), row("new")])
    assert [(c.key["variant"], c.verdict, c.note) for c in found.regressions] == [
        ("triton", "no longer runs", "missing in the file after"),
    ]  # fmt: skip
    assert found.only_before == ["norms: m, c, float32, cuda", "norms: m, c, float32, eager"]
    text = comparing.table(found)
    assert "\n* norms: m, c, float32, triton" in text and "\n      missing in the file after" in text
    assert text.endswith("of ours 1 regressed") and "memory" not in text
    assert len(compare(before, []).regressions) == 2 and json.loads(json.dumps(found.to_dict()))["regressions"]


def test_a_case_without_numbers_after_is_a_regression_with_its_reason():
    why = "not run: torch is 1.0e-02 from fp64"
    found = compare(
        [row("torch"), row("eager", ours=0)],
        [row(n, ms="", note=why, ours=int(n == "torch")) for n in ("torch", "eager")],
    )
    assert [(str(c), c.note) for c in found.regressions] == [("norms: m, c, float32, torch", why)]
    assert comparing.table(found).count(why) == 2
    assert compare([row(ms="", note=why)], [row(ms="", note=why)]).changes == []


def test_of_a_whole_run_only_the_total_can_regress_and_candidates_cannot():
    before = [row(suite="end_to_end", case=stage) for stage in ("warm-up", "total")] + [
        row("tile 64x64"),
        row("tile 8x8"),
    ]
    after = [row(ms=2.0, suite="end_to_end", case=stage) for stage in ("warm-up", "total")] + [
        row("tile 64x64", ms=2.0)
    ]
    found = compare(before, after)
    assert len(found.changes) == 4 and {change.verdict for change in found.changes} == {"slower", "no longer runs"}
    assert [str(change) for change in found.regressions] == ["end_to_end: m, total, float32, triton"]


def test_extrapolated_times_are_marked():
    some = {"p20_ms": "", "p80_ms": "", "note": "extrapolated from 2 of 131 steps"}
    text = comparing.table(compare([row()], [row(ms=2.0, **some)]))
    assert text.splitlines()[1] == "~ extrapolated"
    assert text.splitlines()[-3].split()[-4:] == ["1", "~2", "~2.000", "slower"]
    moved = comparing.table(compare([row(**some)], [row(ms=2.0, copy=500.0)]))
    assert moved.splitlines()[-3].split()[-5:] == ["~1", "2", "~2.000", "~1.000", "unclear"]
    assert "~" not in comparing.table(compare([row()], [row(ms=2.0)]))


def test_rows_of_one_file_are_counted_and_named():
    found = compare([row("a", ours=0), row("b")], [row("b"), row("c"), row("d")])
    assert found.only_before == ["norms: m, c, float32, a"] and len(found.only_after) == 2
    text = comparing.table(found)
    assert "only in the file before: 1\n  norms: m, c, float32, a" in text and "only in the file after: 2" in text
    assert "no row is in both files" in comparing.table(compare([row("a", ours=0)], [row("b")]))


def test_another_device_dtype_or_setting_is_said_first():
    text = comparing.table(compare([row()], [row(device="B", dtype="bfloat16", settings="quick")]))
    assert text.splitlines()[:3] == [
        "CAUTION: not the same device: A before, B after",
        "CAUTION: not the same dtype: float32 before, bfloat16 after",
        "CAUTION: not the same settings: none before, quick after",
    ]
    assert "CAUTION" not in comparing.table(compare([row()], [row()]))


def test_table_is_at_most_120_columns_wide():
    before, after = ([row("v" * 99, ms=ms, case="case " * 20, copy=copy)] for ms, copy in ((1.0, 1e3), (98765.4, 3e3)))
    before.append(row("w" * 200))
    assert max(map(len, comparing.table(compare(before, after)).splitlines())) <= 120


@pytest.mark.slow
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
