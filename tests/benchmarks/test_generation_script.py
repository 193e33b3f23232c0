"""benchmarks/scripts/generation.py at its smallest: all variants give the same, and a row says how long they took."""

import csv

import tiny_text

from kunbr_fast.benchmarks.scripts import generation


def test_rows(tmp_path, capsys):
    tiny_text.workspace(tmp_path)
    given = [tmp_path / "model", tmp_path / "f0.jsonl", "--prompts", "3", "--new-tokens", "5", "--rounds", "2"]
    generation.main([*map(str, given), "--csv", str(tmp_path / "out.csv")])
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["transformers", "transformers, static cache", "kunbr-fast"]
    assert {(row["prompts"], row["new_tokens"], row["equal"], row["rounds"]) for row in rows} == {
        ("3", "5", "1.0", "2")
    }
    assert len({row["made"] for row in rows}) == 1 and float(rows[0]["times_as_fast"]) == 1
    assert "kunbr-fast: " in capsys.readouterr().out
