"""benchmarks/scripts/patched_trainers.py runs, at its smallest, and says what its columns promise."""

import csv
import os
import subprocess
import sys

import pytest

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
from kunbr_fast.benchmarks.scripts import patched_trainers  # noqa: E402
from kunbr_fast.checkout import ROOT  # noqa: E402

SMALLEST = ["--steps", "2", "--rounds", "1", "--rows", "1"]


def test_fine_tuning_without_a_checkout(tmp_path):
    file = tmp_path / "rows.csv"
    rows = patched_trainers.main([*SMALLEST, "--cases", "fine-tuning, layers 4 to 7", "--csv", str(file)])
    with open(file, newline="") as lines:
        (written,) = csv.DictReader(lines)
    assert written["trainer"] == "fine-tuning, layers 4 to 7" and float(written["ratio"]) == rows[0]["ratio"] > 0
    assert rows[0]["tflop_ratio"] == 1.0  # the same products, summed in place
    assert rows[0]["kept_mib_ratio"] < 1


def test_weights_apart_in_bf16():
    options = ["--weights", "--model", "tiny", "--steps", "2", "--rows", "1", "--cases", "fine-tuning"]
    (row,) = patched_trainers.main(options)
    assert 0 < float(row["patched_from_plain"]) < 1 and 0 < float(row["bf16_from_fp32"]) < 1


def test_its_trainers_need_a_checkout(capsys):
    with pytest.raises(SystemExit):
        patched_trainers.main(["--cases", "NPO"])
    assert "NPO is OpenUnlearning's: --checkout FOLDER names its checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_its_trainers(tmp_path):
    if not (checkout := os.environ.get("KUNBR_OPEN_UNLEARNING")):
        pytest.skip("KUNBR_OPEN_UNLEARNING names no checkout of OpenUnlearning")
    script = ROOT / "benchmarks" / "scripts" / "patched_trainers.py"
    command = [sys.executable, script, "--checkout", checkout, *SMALLEST, "--csv", tmp_path / "rows.csv"]
    subprocess.run(command, check=True)
    with open(tmp_path / "rows.csv", newline="") as lines:
        rows = {row["trainer"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(patched_trainers.CASES)
    assert all(float(row["kept_mib_ratio"]) < 1 for row in rows.values())
    assert all(
        float(rows[name]["tflop_ratio"]) < 1 for name in ("GradAscent", "GradDiff", "NPO", "SimNPO", "DPO", "RMU")
    )
