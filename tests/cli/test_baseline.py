"""`kunbr-fast baseline` and `--method` of an objective: the same run, without blocks and without settings of blocks."""

import json

import pytest
import tiny_text

from kunbr_fast.cli import command as cli
from kunbr_fast.objectives.methods import OBJECTIVES
from kunbr_fast.run.methods import methods

QUICK = "--objective npo --epochs 1 --lr 1e-3 --target letter --rtt-epochs 1 --rtt-lrs 1e-3 --quiet".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("baseline"))


@pytest.fixture(scope="module")
def done(workspace):
    assert cli.main(baseline(workspace, workspace / "out", *QUICK)) == 0
    return workspace / "out"


def baseline(workspace, out, *more, command="baseline"):
    return [command, *tiny_text.inputs(workspace), "--out", str(out), *more]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_an_objective_alone_is_measured_and_attacked(done, workspace, capsys):
    report = json.loads((done / "report.json").read_text())
    found = {name: report["config"][name] for name in ("objective", "top_k", "warmup_epochs", "warmup_lr")}
    assert found == {"objective": "npo", "top_k": 0, "warmup_epochs": 1, "warmup_lr": 1e-3}
    assert report["blocks"] == [] and len(report["losses"]["warmup"]) == 1
    assert report["rtt"] and set(report["accuracy"]["result"]) == {"forget", "retain"}
    assert (done / "density.png").exists() and (done / "relearning.png").exists()
    assert weights(done) != weights(workspace / "model")
    # its settings are read back
    assert cli.main(baseline(workspace, done, "--config", str(done / "run.yaml"), "--resume", "--quiet")) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_it_is_unlearn_by_that_method_streamed_too(done, workspace, tmp_path, capsys):
    same = [word.replace("--objective", "--method") for word in QUICK]
    same = [{"--epochs": "--warmup-epochs", "--lr": "--warmup-lr"}.get(word, word) for word in same]
    assert cli.main(baseline(workspace, tmp_path / "a", *same, "--no-rtt", command="unlearn")) == 0
    table = capsys.readouterr().out
    assert "| npo " in table and "warm-up (M_u)" not in table
    assert cli.main(baseline(workspace, tmp_path / "b", *QUICK, "--no-rtt", "--stream")) == 0
    assert weights(tmp_path / "a") == weights(done)
    assert weights(tmp_path / "b") == weights(done)


@pytest.mark.parametrize(
    "text, message",
    [
        ("top_k: 6", "top_k: 6: a baseline trains no blocks: leave the line out, or run `kunbr-fast unlearn`"),
        ("block_lr: 1e-5", "block_lr: 1e-05: a baseline trains no blocks"),
        ("method: kunbr", "method: 'kunbr': a baseline trains no blocks"),
        ("warmup_objective: ga", "warmup_objective: 'ga': a baseline trains no blocks"),
        ("cache_bytes: 8GiB", "cache_bytes: '8GiB': a baseline trains no blocks"),
        ("top_k: 0\nrounds: 2", "rounds=2: no block is trained (top_k=0): leave it out, or take a top_k above 0"),
    ],
)
def test_a_file_s_line_about_blocks_is_an_error(text, message, workspace, tmp_path, capsys):
    (path := tmp_path / "run.yaml").write_text(text + "\n")
    assert cli.main(baseline(workspace, tmp_path / "out", *QUICK, "--config", str(path))) == 2
    said = capsys.readouterr().err
    assert f"{path}: " in said and message in said and said.count("\n") == 1


def test_an_option_about_blocks_is_not_there(workspace, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(baseline(workspace, tmp_path / "out", *QUICK, "--top-k", "2"))
    assert "unknown option --top-k" in capsys.readouterr().err
    for method, name in (("robust", "--block-lr"), ("npo", "--block-lr")):
        words = ["--method", method, name, "1e-5", "--quiet"]
        assert cli.main(baseline(workspace, tmp_path / "out", *words, command="unlearn")) == 2
        assert "block_lr=1e-05: no block is trained (top_k=0): leave it out" in capsys.readouterr().err
    assert cli.main(baseline(workspace, tmp_path / "out", *QUICK, "--cache-dtype", "bf16")) == 2
    assert "leave it out, or take retain_loss=hidden_layers" in capsys.readouterr().err
    words = ["--method", "npo", "--rule", "threshold", "--threshold", "1", "--num-blocks", "2"]
    assert cli.main(baseline(workspace, tmp_path / "out", *words, command="unlearn")) == 2
    assert (
        "rule='threshold': no block is trained (top_k=0): leave it out; or leave out top_k" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_help_says_what_each_objective_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["baseline", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in OBJECTIVES:
        text = methods()[name].text
        assert text.endswith(", on all parameters") and "arXiv" in text
        assert f"{name}: {text.removesuffix(', on all parameters')}" in said
    assert "--top-k" not in said and "--block" not in said and "--lr LR, --warmup-lr LR" in said
