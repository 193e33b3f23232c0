"""Every option that names what is written: nothing that is not ours is replaced, and it is known before the work."""

import argparse
import contextlib
import importlib
import os
import socket
import stat
from pathlib import Path

import pytest
import torch

from kunbr_fast.benchmarks.report import write_report
from kunbr_fast.benchmarks.rows import COLUMNS, write_rows
from kunbr_fast.cli import command as cli
from kunbr_fast.cli.argument_types import path_name
from kunbr_fast.cli.outputs import INPUTS, KEPT, check_outputs
from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation import figures
from kunbr_fast.files import target
from kunbr_fast.files.checksums import write_sealed
from kunbr_fast.files.target import FileKind, FolderKind, Target, check
from kunbr_fast.run.config import KUnBRConfig

MODULES = {name: importlib.import_module(f"kunbr_fast.cli.{name}") for name in cli.COMMANDS}
WRITES = {name: getattr(module, "WRITES", {}) for name, module in MODULES.items()}
# a run's folder: tests/run; an evaluation's, which may be the model's: tests/cli/test_evaluate_command.py
ELSEWHERE = {("unlearn", "out"), ("baseline", "out"), ("evaluate", "out")}
COMMANDS = {
    "density": "--model M --forget f.jsonl",
    "rtt": "--model M --forget f.jsonl g.jsonl",
    "plan": "--model M --gpu-memory 24GiB --forget f.jsonl --retain g.jsonl",
    "merge": "--base M --models N --mode add",
    "demo": "",
    "report": "folder",
    "bench": "norms --quick",
    "prove": "",
}
OPTIONS = [(command, name) for command, writes in WRITES.items() for name in writes]
OF_FILES = [(c, n) for c, n in OPTIONS if isinstance(WRITES[c][n], FileKind)]
OF_FOLDERS = [(c, n) for c, n in OPTIONS if isinstance(WRITES[c][n], FolderKind)]


def actions(command):
    chosen = cli.parser([command])
    (commands,) = (action for action in chosen._actions if action.dest == "command")
    return commands.choices[command]._actions


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_option_that_names_a_path_is_known(command):
    """As one that is read, or one that is written: a new option has to be added to one of the two. (Arguments without
    an option name what is read.)"""
    paths = {action.dest for action in actions(command) if action.type is path_name and action.option_strings}
    words = ("DIR", "FILE", ".json", ".csv", ".png", ".yaml")
    named = {
        action.dest
        for action in actions(command)
        if action.option_strings and any(word in str(action.metavar) for word in words)
    }
    assert paths == named
    written = set(WRITES[command]) | {name for c, name in ELSEWHERE if c == command}
    assert paths == written | (paths & {*INPUTS}) and not written & {*INPUTS}
    assert (command in KEPT) == any(action.dest == "resume" for action in actions(command))


def test_all_that_write_are_tried_here():
    assert {command for command, _ in OPTIONS} == {*COMMANDS} and len(OPTIONS) >= 9


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Inputs that nothing reads before the targets are looked at; a socket, a pipe, links, foreign files."""
    monkeypatch.chdir(tmp_path)
    for model in ("M", "N", "other"):
        (tmp_path / model / "sub").mkdir(parents=True)
        (tmp_path / model / "config.json").write_text("{}")
        (tmp_path / model / "model.safetensors").write_bytes(b"weights")
    for name in ("f.jsonl", "g.jsonl", "notes"):
        Path(name).write_text("{}\n")
    os.link("f.jsonl", "hard.jsonl")
    Path("soft.jsonl").symlink_to("f.jsonl")
    Path("to-M").symlink_to("M")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind("socket")
    yield tmp_path


def state(folder):
    def of(path):
        about = os.lstat(path)
        content = path.read_bytes() if stat.S_ISREG(about.st_mode) else os.readlink(path) if path.is_symlink() else None
        return about.st_mode, about.st_ino, content

    return {str(path): of(path) for path in folder.rglob("*")}


def refused(command, name, given, capsys, desk, said=""):
    """Exit status 2, one line that names the option and what was given, and all files as they were."""
    before = state(desk)
    assert cli.main([command, *COMMANDS[command].split(), f"--{name}", given, "--quiet"]) == 2, given
    error = capsys.readouterr().err
    assert error.startswith(f"kunbr-fast: --{name} {given}") and said in error and error.count("\n") == 1, error
    assert state(desk) == before and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("command, name", OF_FILES)
def test_a_file_that_is_not_ours_to_write(command, name, desk, capsys):
    kind = WRITES[command][name]
    suffix = kind.suffixes[0]

    def no(given, said):
        refused(command, name, given, capsys, desk, said)

    reads = command != "report"  # which reads a folder that its page may lie in
    for given in ("f.jsonl", "hard.jsonl", "soft.jsonl", "folder/../f.jsonl", str(desk / "f.jsonl"), "./f.jsonl"):
        no(given, "is what --forget names, and would be replaced" if reads else "")
    for given in (f"M/new{suffix}", f"to-M/new{suffix}", f"M/sub/deep/new{suffix}", f"N/../M/x{suffix}") * reads:
        no(given, "lies in the folder of --model")
    no("folder", "is a folder")
    no("pipe", "is a device, a pipe or a socket")
    no("socket", "is a device, a pipe or a socket")
    no("/dev/null", "is a device, a pipe or a socket")
    for link in ("/dev/stdout", "/dev/stderr"):
        if os.path.islink(link):
            no(link, "is a symbolic link")
    Path(f"link{suffix}").symlink_to("nowhere")
    no(f"link{suffix}", "is a symbolic link")
    for given in ("new", "new.txt", "r.jsonl", f"new{suffix}.bak"):
        no(given, f"expected a name that ends in {suffix}")
    no(f"new{suffix}/", "expected the name of a file")
    no(f"notes/new{suffix}", "notes is not a folder")
    no(f"notes/deep/new{suffix}", "notes is not a folder")
    no("n" * 245 + suffix, "")
    no(f"/proc/new{suffix}", "cannot be written")


OTHERS = {
    "empty": b"", "text": b"mine", "binary": bytes(range(256)), "an object": b'{"a": 1}', "a list": b"[1, 2]",
    "nested": b"[" * 3000, "settings": b"seed: 3\n", "a report": b'{"kunbr_fast": "1", "config": {}, "seconds": {}}',
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\x00IEND\xaeB`\x82", "half a picture": b"\x89PNG\r\n\x1a\n\xff",
    "a density with notes": b'{"per_layer": [1], "per_module": {}, "num_weights": [1], "num_samples": 1, "notes": ""}',
    "an attack with notes": b'{"belongs_to": {}, "curves": [], "notes": "mine"}',
    "edited settings": target.signed("seed: 3\n").encode() + b"block_lr: 1.0\n",
}  # fmt: skip


@pytest.mark.parametrize("command, name", OF_FILES)
def test_a_file_that_we_did_not_write_stays(command, name, desk, capsys):
    kind = WRITES[command][name]
    for number, content in enumerate(OTHERS.values()):
        given = f"mine{number}{kind.suffixes[0]}"
        Path(given).write_bytes(content)
        refused(command, name, given, capsys, desk, f"exists and is not {kind.what} of kunbr-fast: it is left alone")


@pytest.mark.parametrize("command, name", OF_FOLDERS)
def test_a_folder_that_is_not_ours_to_write(command, name, desk, capsys):
    def no(given, said):
        refused(command, name, given, capsys, desk, said)

    if command == "merge":
        for given in ("M", "to-M", "folder/../M", str(desk / "M"), "M/"):
            no(given, "is what --base names, and would be replaced")
        no("N", "is what --models names")
        no("M/sub", "lies in the folder of --base")
        no("to-M/sub/new", "lies in the folder of --base")
    no("other", "holds a model (config.json), which is left alone")
    (desk / "other" / "config.json").unlink()
    no("other", "holds a model (model.safetensors)")
    for given in ("notes", "pipe", "socket", "/dev/null", "notes/"):
        no(given, "")
    Path("link").symlink_to("nowhere")
    no("link", "is not a folder")
    no("notes/new", "notes is not a folder")
    no("/proc/new", "cannot be written")


OURS = {
    "demo": ("report.json", "density.png", "relearning.png"),
    "bench": ("results.csv", "results.json", "report.html", "end_to_end.png", "time_norms_2.png"),
}


@pytest.mark.parametrize("command, file", [(command, file) for command, files in OURS.items() for file in files])
def test_a_file_in_a_folder_that_is_named_like_ours_stays(command, file, desk, capsys):
    for make in (
        lambda path: path.write_bytes(b"mine"),
        lambda path: path.write_bytes(b""),
        lambda path: path.symlink_to(desk / "notes"),
        lambda path: path.mkdir(),
        os.mkfifo,
    ):
        out = desk / f"folder/{len(os.listdir(desk / 'folder'))}"
        out.mkdir()
        make(out / file)
        before = state(desk)
        assert cli.main([command, *COMMANDS[command].split(), "--out", str(out), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"kunbr-fast: --out {out / file}: ") and error.count("\n") == 1, error
        assert state(desk) == before


def test_a_report_of_rows_leaves_what_is_not_a_report(desk, capsys):
    rows = [dict.fromkeys(COLUMNS, "") | {"suite": "norms", "variant": "torch", "ours": 0, "case": "c"}]
    write_rows("folder/results.csv", "folder/results.json", rows)
    before = state(desk)
    assert cli.main(["bench", "--report", "folder/results.csv", "--out", "folder"]) == 0  # in the folder of its rows
    assert cli.main(["bench", "--report", "folder/results.csv", "--out", "folder"]) == 0  # and once more
    after = state(desk)
    assert {name: after[name] for name in before} == before
    Path("folder/report.html").write_text("<html>mine")
    assert cli.main(["bench", "--report", "folder/results.csv", "--out", "folder"]) == 2
    assert "report.html: exists and is not a report of kunbr-fast" in capsys.readouterr().err


def test_our_own_earlier_results_are_known(tmp_path):
    """By what really writes them."""
    values = torch.ones(3, dtype=torch.float64)
    Density(values, {"x": 1.0}, torch.ones(3, dtype=torch.int64), 4).save(tmp_path / "d.json")
    figures.save(figures.single()[0], tmp_path / "p.png")
    KUnBRConfig().save(tmp_path / "s.yaml")
    rows = [dict.fromkeys(COLUMNS, "") | {"suite": "norms", "variant": "torch", "ours": 0, "case": "c"}]
    write_rows(tmp_path / "results.csv", tmp_path / "results.json", rows)
    write_report(rows, tmp_path)
    write_sealed(tmp_path / "r.json", {"belongs_to": {}, "curves": [], "other_curves": []})
    check(
        [
            Target("--out", str(tmp_path / "d.json"), WRITES["density"]["out"]),
            Target("--plot", str(tmp_path / "p.png"), WRITES["density"]["plot"]),
            Target("--out", str(tmp_path / "s.yaml"), WRITES["plan"]["out"]),
            Target("--out", str(tmp_path / "r.json"), WRITES["rtt"]["out"]),
            Target("--out", str(tmp_path), WRITES["bench"]["out"]),
        ]
    )
    with pytest.raises(ValueError, match="r.json: exists and is not a density file"):  # hours of another command
        check([Target("--out", str(tmp_path / "r.json"), WRITES["density"]["out"])])
    (tmp_path / "d.json").chmod(0o444)
    with pytest.raises(ValueError, match="d.json: is read-only: it is left alone"):
        check([Target("--out", str(tmp_path / "d.json"), WRITES["density"]["out"])])


def test_two_targets_that_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "to-here").symlink_to(".")
    for one, other in (("x.png", "./x.png"), ("x.png", "to-here/x.png"), ("new/x.png", "new/../new/x.png")):
        with pytest.raises(ValueError, match="is also --out: one would replace the other; give two names"):
            check([Target("--out", one, target.PICTURE), Target("--plot", other, target.PICTURE)])
    check([Target("--out", "x.png", target.PICTURE), Target("--plot", "y.png", target.PICTURE)])
    assert os.listdir(tmp_path) == ["to-here"]


@pytest.mark.parametrize("given", ["x.png", "new/x.png", "a/b/c/x.png", "ü 1.png", "-x.png", ".x.png"])
def test_a_place_that_can_be_written_is_left_as_it_was(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check([Target("--plot", given, target.PICTURE)])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_one_that_writes_looks(first, tmp_path):
    (tmp_path / "x.png").write_bytes(b"mine")
    group = argparse.Namespace(first=first)
    with contextlib.nullcontext() if not first else pytest.raises(ValueError, match="exists and is not a picture"):
        check_outputs(argparse.Namespace(group=group, plot=str(tmp_path / "x.png")), {"plot": target.PICTURE})


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def mkdir(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)  # root may do everything
    with pytest.raises(ValueError, match=r"--plot .*x.png: cannot be written: Permission denied: give another place"):
        check([Target("--plot", str(tmp_path / "x.png"), target.PICTURE)])


def test_a_name_is_shown_without_what_a_terminal_obeys(tmp_path):
    with pytest.raises(ValueError) as error:
        check([Target("--plot", str(tmp_path / "\x1b[31m\nx.txt"), target.PICTURE)])
    assert str(error.value).isprintable()
