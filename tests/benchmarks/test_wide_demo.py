"""scripts/wide_demo.py, the small whole run of device_suite.sh, with fewer people and epochs."""

import dataclasses
import json
from importlib import metadata

import pytest
import torch

from kunbr_fast.benchmarks.scripts import wide_demo
from kunbr_fast.run import demo
from kunbr_fast.run.reporter import Reporter


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(demo, "GROUPS", {"forget": 12, "retain": 12, "bystanders": 6})
    monkeypatch.setattr(demo, "TEACHING", {**demo.TEACHING, "batch_size": 10, "epochs": 14})
    config = dataclasses.replace(demo.CONFIG, batch_size=12, rtt_epochs=1, rtt_lrs=1e-3)
    monkeypatch.setattr(demo, "CONFIG", config)
    return wide_demo.Wide(2, torch.device("cpu"), 0, Reporter())


@pytest.mark.slow  # tests/run/test_demo.py runs the same parts
def test_a_wider_world_is_taught_and_made_to_forget(world, tmp_path, capsys):
    out = tmp_path / "evidence.json"
    assert wide_demo.run(world, out, float("inf"))
    found = json.loads(out.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["taught", "warm-up (M_u)", "KUnBR", "gradient difference", "never saw them"]
    assert rows["taught"]["forget"] >= 0.9 and rows["taught"]["retain"] >= 0.9
    assert rows["KUnBR"]["forget"] <= rows["taught"]["forget"] - 0.3
    assert [name for name, row in rows.items() if "rtt" in row] == list(rows)[2:]
    assert found["table"] in capsys.readouterr().out and found["width"] == 2
    assert found["about"]["torch"] == metadata.version("torch") and found["config"]["cuda_graphs"] is False


def test_learning_rates_go_down_as_the_width_goes_up(world):
    config = world.config
    assert (config.warmup_lr, config.block_lr, config.rtt_lrs) == (
        demo.CONFIG.warmup_lr / 2, demo.CONFIG.block_lr / 2, tuple(lr / 2 for lr in demo.CONFIG.rtt_lrs),
    )  # fmt: skip


def test_what_is_there_is_kept_and_no_method_begins_late(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TEACHING", {**demo.TEACHING, "epochs": 1})
    assert not wide_demo.run(world, tmp_path / "evidence.json", 0.01)  # KUnBR's row is missing
    (row,) = json.loads((tmp_path / "evidence.json").read_text())["rows"]
    assert row["method"] == "taught" and "warm-up (M_u): left out after" in capsys.readouterr().out


def test_the_model_is_so_many_times_as_wide(world, monkeypatch):
    monkeypatch.setattr(demo, "TEACHING", {**demo.TEACHING, "epochs": 1})
    small, wide = demo.new_model(len(world.tokenizer), 0).config, world.teach(("forget",)).config
    assert wide.hidden_size == 2 * small.hidden_size and wide.intermediate_size == 2 * small.intermediate_size
    assert wide.hidden_size == wide.num_attention_heads * wide.head_dim
    assert (wide.num_hidden_layers, wide.vocab_size) == (small.num_hidden_layers, small.vocab_size)
