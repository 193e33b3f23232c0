"""What a killed or failed command leaves, and what is said of it."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import tiny_text
import torch
from safetensors.torch import save_file

from kunbr_fast.cli import command as cli
from kunbr_fast.files import atomic
from kunbr_fast.files.scratch import scratch

KILLED = """
import os, signal, sys
from kunbr_fast.cli import command as cli
from kunbr_fast.evaluation import rtt
def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
rtt.train_all = killed
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("left"))


def rtt(workspace, *more):
    files = [str(workspace / name) for name in ("model", "f0.jsonl", "f1.jsonl")]
    options = ["--rtt-lrs", "1e-3", "--rtt-epochs", "1", "--quiet", *more]
    return ["rtt", "--model", files[0], "--forget", *files[1:], *options]


def test_the_copy_of_the_model_that_a_killed_attack_left_goes_with_the_next_one(workspace, tmp_path, monkeypatch):
    """A living one's stays, and so does what only has such a name."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    done = subprocess.run([sys.executable, "-c", KILLED, *rtt(workspace)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.glob("kunbr-*")
    assert [path.name for path in left.iterdir() if path.suffix == ".safetensors"] == ["rtt-weights.safetensors"]
    mine = tmp_path / "kunbr-fast-0123456789ab"
    mine.mkdir()
    (mine / "thesis").write_bytes(b"mine")
    with scratch("kunbr-fast-") as living:
        (living / "rtt-weights.safetensors").write_bytes(b"weights")
        left.mkdir(exist_ok=True)
        assert cli.main(rtt(workspace)) == 0
        assert {*tmp_path.glob("kunbr-*")} == {mine, living} and len([*living.iterdir()]) == 2
    assert [*tmp_path.glob("kunbr-*")] == [mine] and (mine / "thesis").read_bytes() == b"mine"


# ---------------------------------------------------------------- full disks


def raw_model(path, value):
    path.mkdir()
    save_file({"x": torch.full((1000,), value), "y": torch.zeros(3)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return str(path)


def failing(monkeypatch, at, code):
    """The `at`-th flush fails, and all that follow."""
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) >= at:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


GOES_ON = "what was finished is kept, --resume goes on"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_a_disk_that_is_full_or_fails_says_what_was_written_and_whether_resume_goes_on(
    code, tmp_path, monkeypatch, capsys
):
    base, other = (raw_model(tmp_path / name, value) for name, value in (("b", 1.0), ("o", 2.0)))
    command = ["merge", "--base", base, "--models", other, "--mode", "add", "--quiet", "--out"]
    for at, file, goes_on in (
        (1, "merge.partial.json", False),
        (3, "model.safetensors", True),
        (7, "config.json", True),
    ):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patch:
            failing(patch, at, code)
            assert cli.main([*command, str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"kunbr-fast: could not write {out / file}: {os.strerror(code)}"), error
        assert error.count("\n") == 1 and (GOES_ON in error) == goes_on
        full = file == "model.safetensors" and code in atomic.FULL
        assert ("MiB needed, " in error) == full, error
        assert cli.main([*command, str(out), "--resume"]) == 0  # also where nothing was kept: the folder is empty
        capsys.readouterr()


def test_what_has_no_resume_does_not_speak_of_it(workspace, tmp_path, monkeypatch, capsys):
    out = tmp_path / "d.json"
    failing(monkeypatch, 1, errno.ENOSPC)
    command = ["density", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl")]
    assert cli.main([*command, "--num-blocks", "3", "--top-k", "2", "--quiet", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"could not write {out}: No space left on device" in error and "--resume" not in error


def test_an_attack_goes_on_where_one_is_kept(workspace, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        failing(patch, 5, errno.ENOSPC)  # the copy of the weights and the first attack are there
        assert cli.main(rtt(workspace, "--out", str(out))) == 2
    error = capsys.readouterr().err
    assert f"could not write {out}: No space left on device" in error and GOES_ON in error
    kept = json.loads(out.read_text())["curves"]
    assert {row["fold"] for row in kept} == {"f0"}
    assert cli.main(rtt(workspace, "--out", str(out), "--resume")) == 0
    assert json.loads(out.read_text())["curves"][: len(kept)] == kept
