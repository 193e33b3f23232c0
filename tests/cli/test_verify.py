"""`kunbr-fast verify`: what is as the certificate says, what is not, and what was not looked at. Nothing is written."""

import hashlib
import json
import shutil

import pytest
import tiny_text
import torch

from kunbr_fast.cli import command as cli
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.run.certificate import NAME, Figure, refresh
from kunbr_fast.run.verify import tolerance

QUICK = (
    "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --target letter --rtt-epochs 1 --rtt-lrs 1e-3 --quiet"
).split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def finished(workspace):
    """Do not write there: copy it."""
    assert cli.main(["unlearn", *tiny_text.inputs(workspace), "--out", str(workspace / "out"), *QUICK]) == 0
    return workspace / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def look(workspace, capsys):
    def looked(out, *more, files=("f1", "f0"), retain=("r",), status=None):
        """{check: result} of a verification with all that it can be given; its exit status says whether any differs."""
        given = ["--original", workspace / "model", *more]
        given += ["--forget", *(workspace / f"{name}.jsonl" for name in files)] if files else []
        given += ["--retain", *(workspace / f"{name}.jsonl" for name in retain)] if retain else []
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        capsys.readouterr()
        found = cli.main(["verify", str(out), "--quiet", "--json", *map(str, given)])
        checks = json.loads(capsys.readouterr().out)["checks"]
        assert found == any(check["result"] == "differs" for check in checks)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        return {check["check"]: check["result"] for check in checks}

    return looked


def edit(out, change):
    """The certificate with other values, under a seal that fits: what anybody can write."""
    values = read_sealed(out / NAME, "x")
    change(values)
    write_sealed(out / NAME, values)


ALL = (
    "certificate", "report.json", "run.yaml", "figures, settings", "result model", "original model", "forget set",
    "retain set", "accuracy, forget set", "calibrated accuracy, forget set", "accuracy, retain set",
    "calibrated accuracy, retain set",
)  # fmt: skip


def test_all_is_as_it_was(out, look):
    assert look(out, "--measures") == dict.fromkeys(ALL, "ok")
    (out / "density.png").unlink()  # what only shows is no part of it
    (out / "report.html").unlink()
    (out / "notes.txt").write_text("mine")
    assert set(look(out).values()) == {"ok", "not checked"}


def test_what_was_not_given_was_not_checked(finished, capsys):
    capsys.readouterr()
    assert cli.main(["verify", str(finished)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ok           certificate: it has the SHA-256 that it names; made 20")
    assert said[-5:] == [
        "not checked  original model: give --original DIR",
        "not checked  forget set: give --forget FILES (12 records)",
        "not checked  retain set: give --retain FILES (12 records)",
        "not checked  measures: give --measures, with --forget and --retain",
        "9 checks: 0 differ, 4 not made",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "report.json", "run.yaml"])
def test_a_changed_bit_is_found_in_every_file(name, out, look):
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    found = look(out, "--measures")
    what = name if name in ("report.json", "run.yaml") else f"result model: {name}"
    assert {check for check, result in found.items() if result == "differs"} == {what}
    assert found["measures"] == "not checked"  # a model that differs is not measured
    (out / name).unlink()
    assert {check for check, result in look(out).items() if result == "differs"} == {what}
    (out / name).symlink_to("nowhere")
    assert {check for check, result in look(out).items() if result == "differs"} == {what}


def test_a_file_that_would_be_read_with_the_model_is_found(out, look):
    (out / "adapter_config.json").write_text("{}")
    (out / "added_tokens.json").write_text('{"x": 400}')
    differing = {check for check, result in look(out).items() if result == "differs"}
    assert differing == {"result model: adapter_config.json", "result model: added_tokens.json"}


def test_another_original_is_found(out, workspace, tmp_path, look):
    other = shutil.copytree(workspace / "model", tmp_path / "other")
    tiny_text.model(seed=1).save_pretrained(other)
    found = look(out, "--original", other)
    assert found["original model: model.safetensors"] == "differs"
    assert "original model: config.json" not in found and found["result model"] == "ok"


def test_other_sets_are_found(out, workspace, look):
    assert look(out, files=("f0",))["forget set"] == "differs"
    assert look(out, files=("f0", "f1", "r"), retain=())["forget set"] == "differs"
    lines = (workspace / "f1.jsonl").read_text()
    (workspace / "g1.jsonl").write_text(lines.replace("Bo Ek", "Bo Eh"))
    found = look(out, "--measures", files=("f0", "g1"))
    assert (found["forget set"], found["retain set"], found["measures"]) == ("differs", "ok", "not checked")
    records = [json.loads(line) for line in lines.splitlines()][::-1]
    named = [{"id": i, **{key: record[key] for key in sorted(record)}} for i, record in enumerate(records)]
    (workspace / "h1.jsonl").write_text(json.dumps(named))  # the same, written otherwise
    assert look(out, files=("f0", "h1"))["forget set"] == "ok"


def test_a_broken_seal_is_the_end_of_it(out, capsys):
    text = (out / NAME).read_text()
    for changed in (text.replace('"value": ', '"value": 0'), text[:-3], "", "{}", "\x80"):
        (out / NAME).write_text(changed)
        assert cli.main(["verify", str(out)]) == 1
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("differs      certificate: ") and said[1:] == ["1 checks: 1 differ, 0 not made"]
        assert "it was edited, or is damaged: nothing in it counts" in said[0] or "empty" in said[0]


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda values: values["figures"][0].update(value=0.0), "figures, settings"),
        (lambda values: values["attacks"].clear(), "figures, settings"),
        (lambda values: values["cautions"].clear(), "figures, settings"),
        (lambda values: values["settings"].update(seed=3), "figures, settings"),
        (lambda values: values.update(method="magic"), "figures, settings"),
        (lambda values: values["files"].update({"report.json": "0" * 64}), "report.json"),
        (lambda values: values["files"].update({"../x": "0" * 64}), "../x"),
        (lambda values: values["files"].pop("report.json"), "figures, settings"),
        (
            lambda values: values.update(evaluation={"suite": "", "sets": {}, "figures": [], "attacks": []}),
            "figures, settings",
        ),
        (lambda values: values["result"].update({"config.json": "0" * 64}), "result model: config.json"),
        (lambda values: values["result"].update({"../../x": "0" * 64}), "result model: ../../x"),
        (lambda values: values["sets"]["forget"].update(salt="0" * 64), "forget set"),
        (lambda values: values["sets"]["forget"].update(records=13), "forget set"),
    ],
)
def test_a_certificate_that_was_edited_and_sealed_again(change, what, out, look):
    """The seal is no signature. What is beside the certificate tells."""
    edit(out, change)
    assert {check for check, result in look(out).items() if result == "differs"} == {what}


def test_figures_of_another_model_are_found_by_measuring(out, workspace, look):
    """Report and certificate both edited, and sealed: only the model itself knows better."""
    report = json.loads((out / "report.json").read_text())
    report["accuracy"]["result"]["forget"]["plain"] = 0.75
    (out / "report.json").write_text(json.dumps(report))
    digest = hashlib.sha256((out / "report.json").read_bytes()).hexdigest()
    edit(out, lambda values: values["files"].update({"report.json": digest}))

    def better(values):
        (figure,) = (
            f for f in values["figures"] if (f["measure"], f["set"], f["model"]) == ("accuracy", "forget", "result")
        )
        figure.update(value=0.75, standard_error=(0.75 * 0.25 / 12) ** 0.5)

    edit(out, better)
    assert set(look(out).values()) == {"ok", "not checked"}
    differing = {check for check, result in look(out, "--measures").items() if result == "differs"}
    assert differing == {"accuracy, forget set"}


def test_measures_of_one_set_and_of_answers(workspace, tmp_path, look):
    for i in range(3):
        names = tiny_text.NAMES[6 * i : 6 * i + 6]
        lines = [{"prompt": f"When was {n} born?", "completion": f" {tiny_text.years()[n]}"} for n in names]
        tiny_text.write_jsonl(workspace / f"p{i}.jsonl", lines)
    files = [str(workspace / f"p{i}.jsonl") for i in range(3)]
    out, quick = tmp_path / "out", [word.replace("letter", "answer") for word in QUICK]
    command = ["unlearn", "--model", str(workspace / "model"), "--forget", *files[:2], "--retain", files[2]]
    assert cli.main([*command, "--out", str(out), "--no-rtt", *quick]) == 0
    found = look(out, "--measures", files=("p0", "p1"), retain=())
    assert found["probability of the answer, forget set"] == "ok"
    assert found["retain set"] == found["measures, retain set"] == "not checked"
    assert "probability of the answer, retain set" not in found


def test_questions_in_files_of_their_own(workspace, tmp_path, look, capsys):
    for i in range(2):
        names = tiny_text.NAMES[6 * i : 6 * i + 6]
        lines = [{"text": f"{n} was born in {tiny_text.years()[n]}."} for n in names]
        tiny_text.write_jsonl(workspace / f"c{i}.jsonl", lines)
    corpus, questions = ([str(workspace / f"{kind}{i}.jsonl") for i in range(2)] for kind in "cf")
    out, quick = tmp_path / "out", [word.replace("letter", "number") for word in QUICK]
    command = ["unlearn", "--model", str(workspace / "model"), "--forget", *corpus, "--forget-questions", *questions]
    assert cli.main([*command, "--retain", str(workspace / "r.jsonl"), "--out", str(out), "--no-rtt", *quick]) == 0
    found = look(out, "--measures", "--forget-questions", *questions, files=("c0", "c1"))
    assert found["forget questions"] == found["forget set"] == found["accuracy, forget set"] == "ok"
    assert look(out, "--forget-questions", questions[0], files=("c0", "c1"))["forget questions"] == "differs"
    capsys.readouterr()
    assert cli.main(["verify", str(out), "--forget", *corpus, "--measures"]) == 2
    assert "the run's questions were in files of their own: give --forget-questions" in capsys.readouterr().err


def test_an_evaluation_that_is_certified_is_looked_at(out, look):
    figure = {"measure": "probability", "set": "forget", "model": "result", "value": 0.2, "standard_error": None}
    value = {
        "kunbr_fast": "0.1.0", "format": 1, "suite": "core", "models": {"result": {"path": str(out)}}, "sets": {},
        "figures": [figure | {"number": 12}],
    }  # fmt: skip
    write_sealed(out / "evaluation.json", value)
    refresh(out)
    found = look(out)
    assert found["evaluation.json"] == found["figures, settings"] == "ok"
    edit(out, lambda values: values["evaluation"]["figures"][0].update(value=0.1))
    assert look(out)["figures, settings"] == "differs"
    write_sealed(out / "evaluation.json", value | {"suite": "tofu"})
    assert look(out)["evaluation.json"] == "differs"


def test_bad_input_is_another_exit_status(workspace, out, tmp_path, capsys):
    def refused(message, *words):
        assert cli.main(["verify", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    refused("unlearning.json: no such file: `kunbr-fast unlearn` and `baseline` write one", tmp_path / "none")
    refused("nowhere: no such directory", out, "--original", tmp_path / "nowhere")
    refused("--unlearned: the run was given none", out, "--unlearned", workspace / "model")
    refused("--forget-questions: the certificate has no such set", out, "--forget-questions", workspace / "f0.jsonl")
    refused("--measures needs what is measured", out, "--measures")
    refused("no such file", out, "--forget", tmp_path / "f.jsonl")
    edit(out, lambda values: values.update(format=2))
    refused("no certificate of format 1, which this version reads", out)
    (out / NAME).unlink()
    (out / NAME).mkdir()
    refused("got a directory, expected a file", out)


def test_what_rounding_may_change():
    share = Figure("accuracy", "forget", "result", 0.5, None, 1000)
    assert tolerance(share, torch.float32) == pytest.approx(0.01) and tolerance(share, torch.bfloat16) == pytest.approx(
        0.05
    )
    assert tolerance(Figure("accuracy", "forget", "result", 0.5, None, 10), torch.float32) == pytest.approx(0.1)
    found = tolerance(Figure("probability of the answer", "forget", "result", 0.5, None, 10), torch.float32)
    assert found == pytest.approx(0.0005)
