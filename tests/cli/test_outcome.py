"""How a command ends: one line for what is not a bug, quiet where its reader has gone, a traceback for a bug."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
import torch
from helpers import environment, rarely

from kunbr_fast.cli import command as cli
from kunbr_fast.cli import process
from kunbr_fast.cli.outcome import outcome
from kunbr_fast.memory import OutOfMemory
from kunbr_fast.parallel.group import ProcessGone
from kunbr_fast.stopping import Stopped

# ---------------------------------------------------------------- the command line's words


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "kunbr-fast: error: no command: kunbr-fast demo shows"),
        ("unlern", "kunbr-fast: error: unknown command 'unlern' (did you mean unlearn"),
        ("--verson", "kunbr-fast: error: unknown option --verson (did you mean --version?)"),
        ("--out x unlearn", "kunbr-fast: error: unknown option --out"),
        ("unlearn --modle x", "kunbr-fast unlearn: error: unknown option --modle (did you mean"),
        ("unlearn --block_lr=1e-3", "kunbr-fast unlearn: error: unknown option --block_lr (did you mean --block-lr"),
        ("density", "kunbr-fast density: error: the following arguments are required: --model, --forget"),
        ("density --model", "kunbr-fast density: error: argument --model: expected one argument (one that begins"),
        ("density --dtype float31", "argument --dtype: unknown 'float31' (did you mean float32"),
        ("density --mo x", "kunbr-fast density: error: ambiguous option: --mo could match --model, --modules"),
        ("doctor now", "kunbr-fast doctor: error: unexpected 'now'"),
        ("merge --alpha x", "kunbr-fast merge: error: argument --alpha: "),
        ("unlearn --dpo-\x1b[31m\x9bx", "unknown option --dpo-\\x1b[31m\\x9bx"),
        ("unlearn \u202e\x07", "unexpected '\\u202e\\x07'"),
        (f"unlearn {'x' * 9000}", "kunbr-fast unlearn: error: "),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_command_line_is_one_line(line, message, capsys):
    if "unexpected '\\u" in message:
        line = line.replace("unlearn", "doctor")
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split(" ") if line else [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.endswith("--help shows all\n")
    assert error[:-1].isprintable() and len(error) < 3000


def test_a_value_may_look_like_an_option_after_an_equals_sign(capsys):
    command = ["plan", "--model", "none", "--gpu-memory", "24GiB", "--block-lr=-1e-5"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "argument --block-lr: '-1e-5': expected a number" in capsys.readouterr().err


# ---------------------------------------------------------------- exceptions


def ended_by(error, **more):
    arguments = argparse.Namespace(command="unlearn", resume=False, out="out", **more)
    try:
        raise error
    except BaseException as caught:
        return outcome(caught, arguments, process.Caught(), True)


KEPT = "what was finished is kept, --resume goes on"


@pytest.mark.parametrize(
    "error, status, text",
    [
        (ValueError("x: wrong"), 2, "x: wrong"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\x1bb"), 2, "a\\x1bb: No such file"),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, f"interrupted; {KEPT}"),
        (Stopped(), 143, f"terminated; {KEPT}"),
        (ProcessGone("stopped, since rank 1 failed", True), 4, "stopped, since rank 1 failed"),
        (OutOfMemory("out of memory with one sample"), 2, "out of memory with one sample What was finished is kept"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 2, "out of memory: CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "Cures: smaller batches"),
        (MemoryError(), 2, "out of memory: "),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
        (OverflowError("Overflow when unpacking long long"), 2, "a number that was given is too large"),
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"), 2, "install it"),
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with ..."), 2, "launch failure: the device"),
        (RuntimeError("Invalid device string: 'banana'"), 2, "the device cannot be used"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "the device cannot be used"),
        (NotImplementedError("Cannot copy out of meta tensor; no data!"), 2, "the device cannot be used"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None, ""),
        (AssertionError("this is ours"), None, ""),
        (ImportError("no name", name="kunbr_fast.x"), None, ""),
        (KeyError("bug"), None, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exceptions(error, status, text, monkeypatch):
    monkeypatch.setattr("kunbr_fast.cli.outcome.resumes", lambda arguments: True)
    found, said = ended_by(error)
    assert found == status and text in said


def test_text_that_is_not_utf8():
    with pytest.raises(UnicodeDecodeError) as found:
        b"\xff".decode()
    status, text = ended_by(found.value)
    assert status == 2 and "is not UTF-8 text" in text and "0xff" in text


def test_whatever_goes_wrong_after_an_interrupt_has_its_cause_there():
    caught = process.Caught()
    caught.number, caught.raised = 15, True
    arguments = argparse.Namespace(command="density", out=None)
    assert outcome(RuntimeError("Failed to import x"), arguments, caught, True) == (143, "terminated")
    caught.raised = False  # within a step, which goes on
    assert outcome(RuntimeError("Failed to import x"), arguments, caught, True) == (None, "")
    assert outcome(ProcessGone("gone", False), arguments, caught, True) == (143, "terminated")


def test_a_message_is_one_line_without_control_characters(monkeypatch, capsys):
    def fails(arguments):
        raise ValueError("model \x1b[2J\x9b31m\r\nkunbr-fast: all is well\n\u202e\u2028" + "x" * 10000)

    monkeypatch.setattr("kunbr_fast.cli.doctor.run", fails)
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error[:-1].isprintable() and error.startswith("kunbr-fast: model \\x1b[2J\\x9b31m kunbr-fast: all is well")
    assert len(error) < 5000


def test_a_package_that_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    done = run("density", "--model", "x", PYTHONPATH=os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]]))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "kunbr-fast density: a package that it needs cannot be imported: libcudart.so.13: cannot open shared object "
        "file: repair the installation"
    ]


# ---------------------------------------------------------------- standard streams


def run(*command, before="", **more):
    env = environment(**{k: v for k, v in more.items() if k.isupper()})
    how = {k: v for k, v in more.items() if k.islower()}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    line = f'exec "$0" -m kunbr_fast "$@" {before}'
    return subprocess.run(["bash", "-c", line, sys.executable, *command], env=env, text=True, timeout=100, **how)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", rarely(["doctor", "doctor --json", "--help", "--version", "unlearn --help"], ["doctor", "--help"])
)
def test_standard_output_that_is_full(command, unbuffered):
    done = run(*command.split(), before="> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["kunbr-fast: standard output: No space left on device"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["doctor", "--help"])
def test_a_reader_that_has_gone(command, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = run(command, stdout=writing, PYTHONUNBUFFERED=unbuffered)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams(tmp_path):
    done = run("doctor", before=">&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "standard output: it is closed" in done.stderr
    done = run("doctor", before="2>&- <&-")
    assert done.returncode == 0 and "grad_density" in done.stdout
    done = run("unlern", before="2>&-")
    assert (done.returncode, done.stdout) == (2, "")  # an error is no result
    assert run("doctor", before="<&- >&- 2>&-").returncode == 2
    assert run("unlern", before="2> /dev/full").returncode == 2


def test_an_encoding_that_lacks_a_character():
    done = run("plan", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii()
    code = "from kunbr_fast.cli import process; process.begin(); print('\\u00b1\\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "\\xb1\\udcff\n")
