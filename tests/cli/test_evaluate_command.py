"""`kunbr-fast evaluate` as a user meets it: what it prints, what it writes, what it leaves alone."""

import csv
import html
import json
import signal

import pytest
import tiny_text
from helpers import python
from tiny_text import NAMES, write_jsonl, years

from kunbr_fast.cli import command as cli
from kunbr_fast.files.checksums import read_sealed
from kunbr_fast.measures import UNFINISHED, passes
from kunbr_fast.measures.evaluation import COLUMNS
from kunbr_fast.measures.registry import MEASURES
from kunbr_fast.measures.suites import chosen
from kunbr_fast.pages import sources

ATTACK = "--rtt-epochs 1 --rtt-lrs 1e-3".split()


def tofu(name):
    """As TOFU's forget10_perturbed has it."""
    year = years()[name]
    return {
        "question": f"When was {name} born?",
        "answer": f"{name} was born in {year}.",
        "paraphrased_question": f"In which year was {name} born?",
        "paraphrased_answer": f"The year was {year}.",
        "perturbed_answer": [f"{name} was born in {year + n}." for n in (1, 2, 3)],
    }


def verbatim(name):
    """As MUSE's verbmem has it."""
    return {"prompt": f"{name} was", "gt": f" born in {years()[name]}."}


def unknown(number):
    record = tiny_text.question(NAMES[0])
    return record | {"question": f"When was Number {number} born?"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """model, original, retrained; f0, f1 (questions), r, h; and files of TOFU's and MUSE's form."""
    root = tiny_text.workspace(tmp_path_factory.mktemp("evaluate"))
    for seed, name in enumerate(("original", "retrained"), 1):
        tiny_text.model(seed).save_pretrained(root / name)
        tiny_text.tokenizer().save_pretrained(root / name)
    write_jsonl(root / "h.jsonl", [unknown(number) for number in range(4)])
    write_jsonl(root / "tofu_f.jsonl", [tofu(name) for name in NAMES[:4]])
    write_jsonl(root / "tofu_r.jsonl", [tofu(name) for name in NAMES[4:8]])
    write_jsonl(root / "tofu_h.jsonl", [tofu(name) for name in NAMES[8:12]])
    (root / "muse_f.json").write_text(json.dumps([verbatim(name) for name in NAMES[12:15]]))
    return root


def evaluate(workspace, *more, forget=("f0.jsonl", "f1.jsonl"), model="model"):
    files = [str(workspace / name) for name in forget]
    return cli.main(["evaluate", "--model", str(workspace / model), "--forget", *files, "--quiet", *map(str, more)])


def compared(workspace, *names):
    """Options that name what is in the workspace: "--retain", "r.jsonl"."""
    return [name if name.startswith("--") else str(workspace / name) for name in names]


OF_QUESTIONS = ["f0.jsonl", "f1.jsonl"], ["--retain", "r.jsonl", "--holdout", "h.jsonl"]
OF_TOFU = ["tofu_f.jsonl", "muse_f.json"], ["--retain", "tofu_r.jsonl", "--holdout", "tofu_h.jsonl"]
SUITES = {"core": OF_QUESTIONS, "tofu": OF_TOFU, "muse": OF_TOFU, "all": OF_QUESTIONS}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_printed_written_and_shown_on_a_page(suite, workspace, tmp_path, capsys):
    forget, others = SUITES[suite]
    more = compared(workspace, *others, "--original", "original", "--retrained", "retrained")
    out = tmp_path / "eval"
    assert evaluate(workspace, *more, "--suite", suite, "--max-new-tokens", 4, "--out", out, forget=forget) == 0
    printed = capsys.readouterr().out
    found = read_sealed(out / "evaluation.json", "")
    wanted, figures = {one.name for one in chosen(suite)}, found["figures"]
    missing = {one["measure"]: one["why"] for one in found["missing"]}
    assert {one["measure"] for one in figures} | missing.keys() == wanted and missing.keys() < wanted
    assert found["settings"]["measures"] == [one.name for one in chosen(suite)]
    titles = {MEASURES[one["measure"]].title for one in figures}
    assert all(f"| {title} " in printed for title in titles)
    for name, why in missing.items():  # by the option alone
        assert f"not measured: {name}: {why.replace('attack=, ', '')}" in printed
    header = "original  retrained  result".split()
    assert [cell for cell in printed.splitlines()[0].split() if cell in header] == header
    with open(out / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == len(figures)
    for row, one in zip(rows, figures):
        assert [row[name] for name in ("measure", "set", "model")] == [one[n] for n in ("measure", "set", "model")]
        assert float(row["value"]) == one["value"]
        assert row["standard_error"] == ("" if one["standard_error"] is None else str(one["standard_error"]))
    assert found["models"]["original"]["path"] == str(workspace / "original") and found["sets"]["forget"]["records"]
    assert found["sets"]["forget"]["files"] == [str(workspace / name) for name in forget]
    assert not (out / UNFINISHED).exists()
    assert sources.read(out).evaluation == found
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert all(html.escape(title) in page for title in titles)


def test_json_is_what_is_written(workspace, tmp_path, capsys):
    out = tmp_path / "eval"
    assert evaluate(workspace, "--json", "--out", out, "--records", 2) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_sealed(out / "evaluation.json", "")
    assert printed["sets"]["forget"]["records"] == 2 and printed["sets"]["forget"]["of"] == 12
    assert evaluate(workspace, "--json", "--records", 2) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name for name in again if again[name] != printed[name]} == {"seconds", "models"}
    assert again["models"]["result"]["fingerprint"] is None  # nothing is kept of it


def test_an_evaluation_is_replaced_only_when_asked_and_nobody_elses_ever(workspace, tmp_path, capsys):
    assert evaluate(workspace, "--out", tmp_path, "--measures", "probability") == 0
    first = (tmp_path / "evaluation.json").read_bytes()
    assert evaluate(workspace, "--out", tmp_path) == 2
    assert "holds an evaluation: give another directory, or replace it (--overwrite)" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_bytes() == first
    assert evaluate(workspace, "--out", tmp_path, "--overwrite") == 0
    assert (tmp_path / "evaluation.json").read_bytes() != first
    for name, content in (("evaluation.json", '{"mine": 1}'), ("evaluation.csv", "mine\n1\n")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(content)
        capsys.readouterr()
        assert evaluate(workspace, "--out", tmp_path, "--overwrite") == 2
        assert "is left alone" in capsys.readouterr().err and (tmp_path / name).read_text() == content
        (tmp_path / name).write_bytes(before)


def test_in_the_folder_of_the_run_with_its_attacks(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    quick = "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --target letter --quiet".split()
    assert cli.main(["unlearn", *tiny_text.inputs(workspace), "--out", str(out), *quick, *ATTACK]) == 0
    model = (out / "model.safetensors").read_bytes()
    there = {path.name for path in out.iterdir()}
    capsys.readouterr()
    assert evaluate(workspace, "--out", out, model=out) == 0
    assert "accuracy after the strongest attack" in capsys.readouterr().out
    report, found = json.loads((out / "report.json").read_text()), read_sealed(out / "evaluation.json", "")
    (accuracy,) = (one["value"] for one in found["figures"] if one["measure"] == "rtt_accuracy")
    assert accuracy == report["rtt"]["accuracy"] and found["rtt"]["curves"] == report["rtt"]["curves"]
    assert {path.name for path in out.iterdir()} == there | {"evaluation.json", "evaluation.csv"}
    assert (out / "model.safetensors").read_bytes() == model
    assert cli.main(["report", str(out)]) == 0
    # curves of other files say nothing about these
    other = ["--model", str(out), "--forget", str(workspace / "f0.jsonl")]
    capsys.readouterr()
    assert cli.main(["evaluate", *other]) == 0
    said = capsys.readouterr()
    assert "is of ['f0', 'f1'], not of the forget files: it is left out" in said.err
    assert "not measured: rtt_accuracy: needs an attack" in said.out


def test_attacks_are_made_when_asked_in_every_suite(workspace, tmp_path, capsys):
    assert evaluate(workspace, "--attack", *ATTACK, "--suite", "muse", "--max-new-tokens", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"rtt_accuracy", "recovery", "rouge_l_f1"} <= {one["measure"] for one in found["figures"]}
    assert {row["fold"] for row in found["rtt"]["curves"]} == {"f0", "f1"} and found["settings"]["attack"][
        "epochs"
    ] == 1


def test_what_is_wrong_is_one_line(workspace, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(json.dumps(unknown(1)) + "\n" + json.dumps({"question": 1}) + "\n")
    write_jsonl(tmp_path / "same.jsonl", [tiny_text.question(NAMES[2])])
    cases = {
        ("--attack", "one file"): "--attack needs two forget files or more, each a fold: got 1",
        ("--holdout", tmp_path / "bad.jsonl"): "bad.jsonl:2",
        ("--holdout", tmp_path / "same.jsonl"): "same.jsonl:1",
        ("--retain", tmp_path / "same.jsonl"): "same.jsonl:1",
        ("--measures", "mia_loss"): "mia_loss needs records that no model was trained on (--holdout H.jsonl)",
        ("--measures", "probabilty"): "measure 'probabilty': did you mean 'probability'?",
        ("--original", tmp_path / "none"): "none: no such directory",
        ("--resume",): "--resume needs --out",
        ("--lm-eval-limit", "3"): "lm_eval_limit without lm_eval",
        ("--resume", "--out", tmp_path / "new"): "new holds no unfinished evaluation: leave resume out (--resume)",
    }
    for options, message in cases.items():
        options = [option for option in options if option != "one file"]
        assert evaluate(workspace, *options, forget=["f0.jsonl"]) == 2, options
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (options, said)
    assert not (tmp_path / "new").exists()


KILLED = """
import os, signal, sys
from kunbr_fast.cli import command
from kunbr_fast.measures import passes
real, calls = passes.generate, []
def generate(*a, **k):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
passes.generate = generate
sys.exit(command.main(sys.argv[1:]))
"""


def test_killed_in_the_middle_it_goes_on(workspace, tmp_path, capsys, monkeypatch):
    out, more = (
        tmp_path / "out",
        ["--suite", "muse", "--max-new-tokens", "3", "--original", str(workspace / "original")],
    )
    files = [str(workspace / name) for name in ("f0.jsonl", "f1.jsonl")]
    command = ["evaluate", "--model", str(workspace / "model"), "--forget", *files, "--quiet", *more, "--out", str(out)]
    assert python("-c", KILLED, *command).returncode == -signal.SIGKILL
    assert (out / UNFINISHED).is_dir() and not (out / "evaluation.json").exists()
    read = []
    monkeypatch.setattr(passes, "read_all", lambda *a, real=passes.read_all, **k: read.append(1) or real(*a, **k))
    assert cli.main([*command, "--resume"]) == 0
    assert "lock is taken over" not in capsys.readouterr().out
    assert not read and not (out / UNFINISHED).exists()  # both models' likelihoods were there
    assert evaluate(workspace, *more, "--out", tmp_path / "whole") == 0
    one, two = (read_sealed(folder / "evaluation.json", "") for folder in (out, tmp_path / "whole"))
    assert one["figures"] == two["figures"] and len(one["figures"]) > 3


def test_interrupted_it_says_how_to_go_on(workspace, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    more = ["--suite", "muse", "--max-new-tokens", 3, "--out", tmp_path / "out"]
    monkeypatch.setattr(passes, "generate", stop)
    assert evaluate(workspace, *more) == 130
    assert "what was finished is kept, --resume goes on" in capsys.readouterr().err
    assert evaluate(workspace, *more) == 2
    assert "holds an unfinished evaluation: go on with it (--resume), or replace it" in capsys.readouterr().err
