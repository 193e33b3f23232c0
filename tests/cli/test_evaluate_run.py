"""`kunbr-fast evaluate` in the folder of a run: certificate and page take the figures up."""

import json

import pytest
import tiny_text

from kunbr_fast.cli.command import main
from kunbr_fast.files.checksums import read_sealed

SHORT = (
    "--scoring choice --warmup-epochs 1 --block-epochs 1 --num-blocks 3 --top-k 1 --rtt-lrs 1e-3 --rtt-epochs 1".split()
)


@pytest.fixture
def run(tmp_path):
    root = tiny_text.workspace(tmp_path)
    out = root / "OUT"
    assert main(["unlearn", *tiny_text.inputs(root), "--out", str(out), "--quiet", *SHORT]) == 0
    return root


def evaluate(root, out, *more):
    asked = ["--forget", f"{root}/f0.jsonl", f"{root}/f1.jsonl", "--retain", f"{root}/r.jsonl"]
    how = ["--original", f"{root}/model", "--out", str(out), "--quiet", *more]
    return main(["evaluate", "--model", f"{root}/OUT", *asked, *how])


def test_the_certificate_and_the_page_have_its_figures(run, capsys):
    before = (run / "OUT" / "report.html").read_text()
    assert evaluate(run, run / "OUT") == 0
    certificate = read_sealed(run / "OUT" / "unlearning.json", "")
    evaluation = read_sealed(run / "OUT" / "evaluation.json", "")
    values = {round(one["value"], 12) for one in evaluation["figures"]}
    kept = json.dumps(certificate["evaluation"])
    assert any(str(value)[:12] in kept for value in values)
    assert len((run / "OUT" / "report.html").read_text()) > len(before)
    sets = ["--forget", f"{run}/f0.jsonl", f"{run}/f1.jsonl", "--retain", f"{run}/r.jsonl"]
    capsys.readouterr()
    assert main(["verify", str(run / "OUT"), *sets, "--original", f"{run}/model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checks"]
    assert not [check for check in found if check["result"] == "differs"]
    # the run's own attack stands in for another one
    assert any(one["measure"] == "rtt_accuracy" for one in evaluation["figures"])


def test_a_folder_of_its_own_changes_nothing_of_the_run(run):
    before = {path.name: path.read_bytes() for path in (run / "OUT").iterdir()}
    assert evaluate(run, run / "EVAL") == 0
    assert {path.name: path.read_bytes() for path in (run / "OUT").iterdir()} == before
    assert {path.name for path in (run / "EVAL").iterdir()} == {"evaluation.json", "evaluation.csv"}


def test_a_damaged_certificate_costs_no_evaluation(run, capsys):
    path = run / "OUT" / "unlearning.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    before = path.read_bytes()
    assert evaluate(run, run / "OUT") == 1
    assert path.read_bytes() == before
    assert read_sealed(run / "OUT" / "evaluation.json", "")["figures"]


def test_curves_of_an_edited_report_are_refused(run, capsys):
    """As `kunbr-fast report` refuses them: what an attack brought back would be what was written there."""
    path = run / "OUT" / "report.json"
    report = json.loads(path.read_text())
    for row in report["rtt"]["curves"]:
        row["plain"] = 0.0
    path.write_text(json.dumps(report))
    assert evaluate(run, run / "EVAL") == 2
    assert "report.json: damaged or edited" in capsys.readouterr().err
    assert not (run / "EVAL" / "evaluation.json").exists()
