"""Kill it, fill its disk, damage its files: nothing already computed is lost, and the result has the same bits."""

import errno
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text
from helpers import rarely
from kill_runner import POINTS
from safetensors.torch import load_file

from kunbr_fast.cli import command as cli
from kunbr_fast.files import tensors as weights

HERE = Path(__file__).parent.parent
SETTINGS = """--num-blocks 3 --top-k 2 --batch-size 3 --warmup-epochs 2 --warmup-lr 1e-3 --block-epochs 1
    --block-lr 1e-3    --target letter --rtt-lrs 1e-3 --rtt-epochs 1 --checkpoint-every 2 --quiet""".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("faults"))


ADVERSARY = {"independent": [], "cumulative": "--adversary-every 2 --adversary-lrs 1e-3 2e-3".split()}


def arguments(workspace, out, *more):
    return ["unlearn", *tiny_text.inputs(workspace), "--out", str(out), *SETTINGS, *more]


@pytest.fixture(scope="module")
def truth(workspace, tmp_path_factory):
    """An uninterrupted run with either insertion."""

    @functools.cache
    def run(insertion):
        out = tmp_path_factory.mktemp("truth") / "out"
        assert cli.main(arguments(workspace, out, "--insertion", insertion, *ADVERSARY[insertion])) == 0
        return load_file(out / "model.safetensors"), json.loads((out / "report.json").read_text())

    return run


def same(out, truth):
    weights, report = truth
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == weights.keys()
    for name, value in ours.items():
        assert value.equal(weights[name]), name
    found = json.loads((out / "report.json").read_text())
    for key in ("losses", "accuracy", "rtt", "blocks", "density", "recovery"):
        assert found[key] == report[key], key


KILLS = [("independent", p) for p in POINTS] + [("cumulative", p) for p in POINTS if "block" in p]
OFTEN = ["cumulative in the second block"]
KILLS = [pytest.param(*k, marks=() if " ".join(k) in OFTEN else pytest.mark.slow) for k in KILLS]  # also: test_folder


@pytest.mark.parametrize("insertion, point", KILLS)
def test_killed_and_resumed_gives_the_same_bits(insertion, point, workspace, truth, tmp_path):
    out = tmp_path / "out"
    command = arguments(workspace, out, "--insertion", insertion, *ADVERSARY[insertion])
    killed = subprocess.run([sys.executable, HERE / "kill_runner.py", point, *command], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert (out / "kunbr-checkpoints" / "state.json").is_file()
    assert cli.main([*command, "--resume"]) == 0
    same(out, truth(insertion))
    assert not (out / "kunbr-checkpoints").exists()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("full_at", rarely([1, 3, 6], [1]))
def test_a_full_disk_is_said_and_survived(full_at, workspace, truth, tmp_path, monkeypatch, capsys):
    out, real, calls = tmp_path / "out", weights.write_tensor, []

    def full(file, tensor):
        calls.append(file.name)
        if len(set(calls)) >= full_at:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, tensor)

    monkeypatch.setattr(weights, "write_tensor", full)
    assert cli.main(arguments(workspace, out)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(out / "kunbr-checkpoints") in error and "untouched" in error
    assert not list((out / "kunbr-checkpoints").glob(".*.tmp"))
    monkeypatch.undo()
    assert cli.main(arguments(workspace, out, "--resume")) == 0
    same(out, truth("independent"))


@pytest.fixture(scope="module")
def begun(workspace, tmp_path_factory):
    """A run that stopped in the middle of its second block."""
    from kunbr_fast.training import block as reinsertion

    real, calls = reinsertion.BlockTraining.step_packed, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, *args)

    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinsertion.BlockTraining, "step_packed", step)
        assert cli.main(arguments(workspace, out)) == 130
    return out


@pytest.fixture
def interrupted(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "out")


def refusal(capsys, command):
    assert cli.main(command) == 2
    return capsys.readouterr().err


def test_an_unfinished_run_is_not_overwritten(workspace, interrupted, capsys):
    assert "unfinished run: continue it with resume (--resume)" in refusal(capsys, arguments(workspace, interrupted))


def test_resume_refuses_other_data_and_other_models(workspace, interrupted, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(workspace, other)
    tiny_text.write_jsonl(other / "r.jsonl", [tiny_text.question(n) for n in tiny_text.NAMES[13:]])
    assert "belongs to another run" in refusal(capsys, arguments(other, interrupted, "--resume"))
    shutil.rmtree(other)
    shutil.copytree(workspace, other)
    tiny_text.model(seed=1).save_pretrained(other / "model")
    assert "belongs to another run" in refusal(capsys, arguments(other, interrupted, "--resume"))


@pytest.mark.parametrize(
    "option, name",
    [
        ("--warmup-lr", "warmup_lr"),
        pytest.param("--retain-coeff", "retain_coeff", marks=pytest.mark.slow),
        pytest.param("--seed", "seed", marks=pytest.mark.slow),
        ("--scoring", "scoring"),
    ],
)
def test_resume_refuses_settings_that_finished_results_depend_on(option, name, workspace, interrupted, capsys):
    value = "choice" if name == "scoring" else "7"
    assert f"{name} was" in refusal(capsys, arguments(workspace, interrupted, option, value, "--resume"))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_result_of_a_stage_is_found_by_its_checksum(workspace, interrupted, capsys):
    path = interrupted / "kunbr-checkpoints" / "warmup.safetensors"
    damage(path)
    error = refusal(capsys, arguments(workspace, interrupted, "--resume"))
    assert str(path) in error and "damaged (SHA-256" in error


def test_damaged_progress_falls_back_to_the_beginning_of_the_stage(workspace, interrupted, truth, capsys):
    path = interrupted / "kunbr-checkpoints" / "blocks.0.2-4-step-2.safetensors"
    damage(path)
    command = [part for part in arguments(workspace, interrupted, "--resume") if part != "--quiet"]
    assert cli.main(command) == 0
    assert f"{path} is damaged or missing: blocks.0.2-4 goes on from its beginning" in capsys.readouterr().err
    same(interrupted, truth("independent"))


def test_a_damaged_state_file_is_named(workspace, interrupted, capsys):
    (interrupted / "kunbr-checkpoints" / "state.json").write_text("{")
    assert "state.json: damaged" in refusal(capsys, arguments(workspace, interrupted, "--resume"))
    (interrupted / "kunbr-checkpoints" / "state.json").write_text("[]")
    assert "state.json: damaged" in refusal(capsys, arguments(workspace, interrupted, "--resume"))


def test_resume_refuses_other_questions(workspace, interrupted, tmp_path, capsys):
    others = tiny_text.write_jsonl(tmp_path / "q.jsonl", [tiny_text.question(n) for n in tiny_text.NAMES[14:]])
    more = ["--retain-questions", str(others)]
    assert "belongs to another run" in refusal(capsys, arguments(workspace, interrupted, *more, "--resume"))


def test_divergence_keeps_no_state_that_it_destroyed_and_a_lower_rate_rescues(workspace, truth, tmp_path, capsys):
    """The first update destroys the weights, which is seen at the second step: the state between them is no good."""
    out = tmp_path / "out"
    command = arguments(workspace, out, "--checkpoint-every", "1")
    assert cli.main([*command, "--warmup-lr", "1e30"]) == 3
    error = capsys.readouterr().err
    assert "diverged at warm-up, step 1" in error and "warmup_lr=1e+30" in error and error.count("\n") == 1
    assert "A resumed run begins this stage again (--resume)" in error and "checkpoint" not in error
    assert json.loads((out / "kunbr-checkpoints" / "state.json").read_text())["progress"] == {}
    assert not list(out.glob("*.safetensors")) and not list((out / "kunbr-checkpoints").glob("warmup*"))
    assert cli.main([*command, "--resume"]) == 0
    same(out, truth("independent"))


def test_a_collapsed_retain_set_is_divergence_too(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(arguments(workspace, out, "--max-retain-loss", "0.5", "--warmup-epochs", "4")) == 3
    assert "the retain loss is beyond max_retain_loss = 0.50" in capsys.readouterr().err
    # rescued: the limit is lifted for the stage that had not finished
    assert cli.main(arguments(workspace, out, "--max-retain-loss", "100", "--warmup-epochs", "4", "--resume")) == 0
