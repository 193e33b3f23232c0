"""`kunbr-fast demo`, with fewer people and epochs."""

import json

import pytest
import torch

from kunbr_fast.cli import command as cli
from kunbr_fast.cli.demo import WRITES
from kunbr_fast.files.target import Target, check
from kunbr_fast.run import demo


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "GROUPS", {"forget": 24, "retain": 24, "bystanders": 12})
    monkeypatch.setattr(demo, "UNREHEARSED", ("nf4",))
    monkeypatch.setattr(demo, "TEACHING", {**demo.TEACHING, "batch_size": 20, "epochs": 14})
    monkeypatch.setattr(
        demo, "CONFIG", demo.dataclasses.replace(demo.CONFIG, batch_size=12, rtt_epochs=2, rtt_lrs=1e-3)
    )


def test_demo_writes_a_table_a_report_and_plots(small, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["taught", "warm-up (M_u)", "KUnBR", "robust", "gradient difference", "never saw them"]
    assert all(f"| {method} " in printed for method in rows)
    assert rows["taught"]["forget"] >= 0.9 and rows["taught"]["retain"] >= 0.9
    assert rows["KUnBR"]["forget"] <= rows["taught"]["forget"] - 0.3
    assert set(report["rtt"]["robust"]["attacks"]) == {"full", "nf4"} and " nf4 |" in report["attacks"]
    assert report["robust"]["adversary_every"] == 9 and report["attacks"] in printed
    assert rows["never saw them"]["forget"] <= 0.6 and rows["never saw them"]["retain"] >= 0.9
    for method, row in rows.items():
        if method != "taught":
            assert report["rtt"][method]["accuracy"] == row["rtt"]
    assert len(report["blocks"]) == 2 and [6, 8] not in report["blocks"]
    for name in ("density.png", "relearning.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    check([Target("--out", str(tmp_path), WRITES["out"])])  # known for ours: the next demo may replace them


def test_the_same_seed_makes_the_same_people_and_another_other_ones():
    assert demo.people(3) == demo.people(3)
    first, second = demo.people(3), demo.people(4)
    names = [name for group in first.values() for name, _ in group]
    assert len(names) == len(set(names)) == sum(demo.GROUPS.values())
    assert first != second


def test_every_word_of_the_demo_is_in_its_vocabulary():
    tokenizer = demo.tokenizer()
    for group in demo.people(0).values():
        for line in demo.facts(group):
            ids = tokenizer(f"{line['prompt']}{line['completion']}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.convert_ids_to_tokens(ids)[-1] == line["completion"]
    for question in demo.questions(demo.people(0)["forget"], 0):
        assert len(set(question["choices"])) == 4


def test_all_methods_take_as_many_steps():
    """The baseline is not handicapped: its epochs are the warm-up's and the blocks' together."""
    config = demo.CONFIG
    assert demo.BASELINE["epochs"] == config.warmup_epochs + config.top_k * config.block_epochs * config.rounds
    assert demo.ROBUST.warmup_epochs == demo.BASELINE["epochs"] and demo.ROBUST.top_k == 0
    assert (demo.ROBUST.batch_size, demo.ROBUST.retain_coeff) == (config.batch_size, config.retain_coeff)
