"""What `unlearn` and `rtt` say of data without choices, and of figures that show little."""

import json

import pytest
import tiny_text

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data import load_records
from kunbr_fast.run import proof
from kunbr_fast.run.output import finished_report

SETS = {"forget": ("p0", "p1"), "retain": ("p2",)}
QUICK = "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --rtt-epochs 1 --rtt-lrs 1e-2".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """`tiny_text.workspace`, and p0 to p2: the same facts as prompt and completion, p0 of four."""
    root = tiny_text.workspace(tmp_path_factory.mktemp("figures"))
    for i in range(3):
        names = tiny_text.NAMES[6 * i + 2 * (i == 0) : 6 * i + 6]
        lines = [{"prompt": f"When was {n} born? ", "completion": f"{tiny_text.years()[n]}"} for n in names]
        tiny_text.write_jsonl(root / f"p{i}.jsonl", lines)
    return root


def command(workspace, name, *more, forget=("p0", "p1"), retain="p2"):
    files = [str(workspace / f"{one}.jsonl") for one in forget]
    given = ["--model", str(workspace / "model"), "--forget", *files, *more]
    if name == "unlearn":
        given += ["--retain", str(workspace / f"{retain}.jsonl"), *QUICK]
    return [name, *given]


def test_data_without_choices_has_the_probability_of_its_answers(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(command(workspace, "unlearn", "--out", str(out))) == 0
    said = capsys.readouterr()
    assert "no question lines about the forget set: its figure is the probability of its records' answers" in said.err
    assert "answer probability of the result model on 10 forget and 6 retain records" in said.err
    assert "2 folds, by answer probability" in said.err
    assert "forget (probability) | retain (probability) | RTT (probability) |" in said.out
    report = finished_report(out)
    assert report["accuracy"] == {} and set(report["probability"]) == {"original", "unlearned", "result"}
    for found in report["probability"].values():
        assert found["forget"]["num_records"] == 10 and found["retain"]["num_records"] == 6
        assert 0 < found["forget"]["mean"] < 1 and 0 < found["forget"]["standard_error"] and "values" not in found
    assert "change_error" in report["probability"]["result"]["forget"]
    assert report["rtt"]["metric"] == "probability" and report["recovery"] == report["rtt"]["recovery"]
    assert report["rtt"]["before"] == pytest.approx(report["probability"]["result"]["forget"]["mean"], rel=1e-5)
    assert (out / "relearning.png").exists()
    assert cli.main(command(workspace, "unlearn", "--out", str(out), "--resume", "--quiet")) == 0


def test_a_plan_counts_the_answers_that_are_measured_and_attacked(workspace, capsys):
    def stages(*more, **names):
        words = command(workspace, "plan", "--retain", str(workspace / "p2.jsonl"), "--gpu-memory", "8GiB", **names)
        assert cli.main([*words, *QUICK, "--json", *more]) == 0
        return {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}

    found, fewer = stages(), stages(forget=("p0",))
    assert found["evaluation"]["flops"] > fewer["evaluation"]["flops"] > 0
    assert found["RTT attack"]["flops"] > 0 and "RTT attack" not in fewer
    assert "RTT attack" not in stages("--no-rtt")


def test_what_was_measured_is_taken_up(workspace, tmp_path, monkeypatch):
    """A run that fails after its attack, resumed: nothing is measured again, and the report is the same."""
    records = {what: load_records([workspace / f"{name}.jsonl" for name in names]) for what, names in SETS.items()}
    config = kf.KUnBRConfig(num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1, rtt=False)
    found, how = [], dict(tokenizer=tiny_text.tokenizer(), progress=False)

    def fail(report):
        raise OSError("disk full")

    def run(*, resume=False, fails=None, out="out"):
        options = how | dict(output_dir=tmp_path / out, resume=resume, before_cleanup=fails)
        return kf.unlearn(tiny_text.model(), records["forget"], records["retain"], config, **options)

    with pytest.raises(OSError, match="disk full"):
        run(fails=fail)
    real = proof.answer_probabilities
    monkeypatch.setattr(proof, "answer_probabilities", lambda *a, **o: found.append(a) or real(*a, **o))
    resumed = run(resume=True)
    assert found == [] and resumed.probability == run(out="whole").probability and len(found) == 3


def test_a_set_with_questions_beside_one_without(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--out", str(out), "--quiet", "--top-k", "0", "--no-rtt"]
    assert cli.main(command(workspace, "unlearn", *more, forget=["f0"])) == 0
    printed = capsys.readouterr().out
    assert "forget | retain (probability) |" in printed
    report = finished_report(out)
    assert set(report["accuracy"]["result"]) == {"forget"} and set(report["probability"]["result"]) == {"retain"}


def test_an_attack_by_probability_is_resumed(workspace, tmp_path, capsys):
    out = tmp_path / "r.json"
    more = ["--out", str(out), "--quiet", "--rtt-epochs", "1", "--rtt-lrs"]
    assert cli.main(command(workspace, "rtt", *more, "1e-2")) == 0
    assert "RTT answer probability 0." in capsys.readouterr().out
    assert cli.main(command(workspace, "rtt", *more, "1e-2", "3e-2", "--resume")) == 0
    printed = capsys.readouterr().out
    assert "answer probability at each measurement (the first is before), over all records" in printed
    found = json.loads(out.read_text())
    assert found["metric"] == "probability" and found["cautions"] == [] and len(found["curves"]) == 8


def test_figures_that_show_little_are_said(workspace, tmp_path, capsys):
    out, questions = tmp_path / "out", dict(forget=["f0", "f1"], retain="r")
    assert cli.main(command(workspace, "unlearn", "--out", str(out), "--quiet", "--no-rtt", **questions)) == 0
    report, printed = finished_report(out), capsys.readouterr().out
    assert len(report["cautions"]) == 2 and "values" not in report["accuracy"]["original"]["forget"]
    assert report["cautions"][0].startswith("12 forget questions cannot tell the original from guessing (25.0 % right,")
    for caution in report["cautions"]:
        assert f"\ncaution: {caution}\n" in printed
