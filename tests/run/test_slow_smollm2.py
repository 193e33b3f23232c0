"""A real pretrained model, taught, made to forget and attacked: `make test-slow` (needs pip, minutes on a CPU)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "forget_birthdays.py"


@pytest.mark.slow
def test_smollm2_learns_and_forgets(shared_data, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'kunbr-fast[gguf]'")
    command = [
        sys.executable, EXAMPLE, "--out", tmp_path, "--data", shared_data / "random_birthdays", "--people", "12",
        "--teach-epochs", "8", "--baseline-lr", "1e-5", "--", "--quiet", "--top-k", "1", "--rtt-lrs", "5e-5",
        "--rtt-epochs", "2",
    ]  # fmt: skip
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "unlearned" / "report.json").read_text())
    accuracy = {name: values["forget"]["plain"] for name, values in report["accuracy"].items()}
    assert accuracy["original"] >= 0.8  # it was taught
    assert accuracy["result"] <= accuracy["original"] - 0.25  # and forgot
    assert report["accuracy"]["result"]["retain"]["plain"] >= 0.6  # but not all of it
    assert {row["epoch"] for row in report["rtt"]["curves"]} == {0, 1, 2}
    baseline = json.loads((tmp_path / "baseline-1e-05.json").read_text())
    assert baseline["forget"] <= accuracy["original"] - 0.25 and 0 <= baseline["rtt"] <= 1
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned").config.num_hidden_layers == 30
