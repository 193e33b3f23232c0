"""Ctrl-C, SIGTERM and SIGHUP at any time: one line, the exit status, and a run that goes on to the same bits."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_text
import torch
from helpers import environment
from safetensors.torch import load_file

from kunbr_fast.cli import command as cli
from kunbr_fast.cli import process

HERE = Path(__file__).parent.parent
SETTINGS = """--dtype float64 --num-blocks 3 --top-k 2 --batch-size 3 --warmup-epochs 2 --warmup-lr 1e-3
    --block-epochs 1 --block-lr 1e-3 --target letter --rtt-lrs 1e-3 --rtt-epochs 1 --checkpoint-every 100
    --quiet""".split()
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
SAID = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated (SIGHUP)"}
KEPT = "; what was finished is kept, --resume goes on"


def as_in_a_terminal():
    """Signals as a shell sets them: a test that runs in the background may have inherited ignored ones."""
    for name in STATUS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def start(*command, **more):
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(**more), start_new_session=True, **how
    )


def ended(process):
    """(exit status, the lines on standard error)"""
    try:
        _, error = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, error.splitlines()


# ---------------------------------------------------------------- imports

# sends itself a signal when a module is about to be imported, and again as it says
IMPORTING = """
import os, signal, sys, threading
kind, wanted, *sys.argv[1:] = sys.argv[1:]
class Sends:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), getattr(signal, kind))
            for _ in range(10**7):  # the handler of another thread's signal runs in the main one
                pass
sys.meta_path.insert(0, Sends())
if wanted == "the exit":
    import atexit
    atexit.register(Sends().find_spec, wanted)
if wanted == "the threads":
    def later():
        threading.main_thread().join()
        Sends().find_spec(wanted)
    threading.Thread(target=later).start()
from kunbr_fast.cli.entry import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "kind, module, command",
    [
        ("SIGINT", "kunbr_fast.cli.command", "plan"),
        pytest.param("SIGINT", "argparse", "unlearn", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "json", "demo", marks=pytest.mark.slow),
        ("SIGINT", "torch", "unlearn"),
        ("SIGTERM", "torch.nn", "density"),
        pytest.param("SIGHUP", "numpy", "plan", marks=pytest.mark.slow),
        pytest.param("SIGINT", "transformers", "demo", marks=pytest.mark.slow),
        ("SIGINT", "the exit", "doctor"),
        ("SIGTERM", "the threads", "doctor"),
    ],
)
def test_a_signal_in_an_import_or_at_the_exit_is_one_line(kind, module, command):
    status, error = ended(start("-c", IMPORTING, kind, module, command))
    assert (status, error) == (STATUS[kind], [f"kunbr-fast: {SAID[kind]}"])


def test_a_signal_while_the_main_thread_is_inside_c():
    """Python cannot run its handler: a thread ends the process."""
    code = (
        "import ctypes; from kunbr_fast.cli import process; process.begin(); print('on', flush=True)\n"
        "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"
    )
    child = start("-c", code)
    assert child.stdout.readline() == "on\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    assert ended(child) == (143, ["kunbr-fast: terminated"])


def test_an_ignored_signal_stays_ignored():
    """nohup's, and a shell's for what runs in the background."""
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + IMPORTING
    status, error = ended(start("-c", code, "SIGHUP", "kunbr_fast.cli.command", "--version"))
    assert (status, error) == (0, [])


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    found = tiny_text.workspace(tmp_path_factory.mktemp("signals"))
    tiny_text.model(seed=1).save_pretrained(found / "unlearned")
    return found


def arguments(workspace, out, *more):
    return ["unlearn", *tiny_text.inputs(workspace), "--out", str(out), *SETTINGS, *more]


@pytest.fixture(scope="module")
def truth(workspace, tmp_path_factory):
    """An undisturbed run of each kind, whose weights and report interrupted ones are to have."""
    found = {}

    def of(*more):
        if more not in found:
            out = tmp_path_factory.mktemp("truth") / "out"
            assert cli.main(arguments(workspace, out, *more)) == 0
            found[more] = load_file(out / "model.safetensors"), json.loads((out / "report.json").read_text())
        return found[more]

    return of


def same(out, truth):
    weights, report = truth
    ours, found = load_file(out / "model.safetensors"), json.loads((out / "report.json").read_text())
    assert [name for name, value in weights.items() if not torch.equal(value, ours[name])] == []
    for key in ("losses", "accuracy", "rtt", "blocks", "density"):
        assert found[key] == report[key], key


def checkpoints(out):
    """The steps of the checkpoint files of an interrupted run."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in out.rglob("*-step-*.safetensors"))


@pytest.mark.parametrize(
    "kind, point, count, step",
    [
        ("SIGTERM", "warm-up", 3, 3),
        pytest.param("SIGHUP", "warm-up", 8, 8, marks=pytest.mark.slow),  # the last step of the stage
        pytest.param("SIGTERM", "block", 6, 2, marks=pytest.mark.slow),  # the second of the second block
        pytest.param("SIGTERM", "checkpoint", 1, None, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "density", 1, None, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "attack", 3, None, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "rename", 4, None, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "rename", 9, None, marks=pytest.mark.slow),
        pytest.param("SIGINT", "block", 2, None, marks=pytest.mark.slow),
        pytest.param("SIGINT", "density", 1, None, marks=pytest.mark.slow),
        pytest.param("SIGINT", "rename", 6, None, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_gets_a_signal(kind, point, count, step, workspace, truth, tmp_path):
    """In a step it finishes it and keeps it. The steps before are not made again, and the result has the same bits."""
    out = tmp_path / "out"
    command = arguments(workspace, out)
    if point == "checkpoint":
        command[command.index("--checkpoint-every") + 1] = "2"
    status, error = ended(start(HERE / "signal_runner.py", kind, point, count, *command))
    assert (status, error) == (STATUS[kind], [f"kunbr-fast: {SAID[kind]}{KEPT}"])
    if step is not None:
        assert checkpoints(out) == [step]
    assert cli.main([*command, "--resume"]) == 0
    same(out, truth())


@pytest.mark.parametrize(
    "kinds",
    ["SIGTERM,SIGTERM", *(pytest.param(k, marks=pytest.mark.slow) for k in ("SIGTERM,SIGINT", "SIGINT,SIGTERM"))],
)
def test_a_second_signal_ends_at_once(kinds, workspace, truth, tmp_path):
    out = tmp_path / "out"
    first, second = kinds.split(",")
    status, error = ended(start(HERE / "signal_runner.py", kinds, "warm-up", 3, *arguments(workspace, out)))
    assert status in (STATUS[second], STATUS[first]) and len(error) == 1 and error[0].startswith("kunbr-fast: ")
    assert checkpoints(out) == []
    assert cli.main([*arguments(workspace, out), "--resume"]) == 0
    same(out, truth())


def test_a_terminal_that_is_gone(workspace, truth, tmp_path):
    """SIGHUP comes as the terminal goes, and what is written there fails: the checkpoint is written all the same."""
    out = tmp_path / "out"
    command = [part for part in arguments(workspace, out) if part != "--quiet"]
    pid, terminal = pty.fork()
    if pid == 0:
        as_in_a_terminal()
        runner = [sys.executable, str(HERE / "signal_runner.py"), "SIGSTOP", "warm-up", "3", *command]
        os.execve(sys.executable, runner, environment())
    stopped = 0
    while not stopped:  # what it shows has to be read
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1000)
        stopped, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
    assert os.WIFSTOPPED(status)
    os.close(terminal)  # the system sends SIGHUP and SIGCONT
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert checkpoints(out) == [3]
    assert cli.main([*arguments(workspace, out), "--resume"]) == 0
    same(out, truth())


# ---------------------------------------------------------------- several processes

CUMULATIVE = ("--insertion", "cumulative")
APART = ("--parallel", "blocks")


@pytest.mark.parametrize(
    "more, points",
    [
        pytest.param((), ("warm-up@0 4", "warm-up@1 2"), marks=pytest.mark.slow),
        # each is asked at another step, within it
        pytest.param(CUMULATIVE, ("block@0 2", "block@1 3"), marks=pytest.mark.slow),
        ((), ("none@0 0", "warm-up@1 3")),  # one alone, which takes the other along
        pytest.param(APART, ("block@0 1", "block@1 3"), marks=pytest.mark.slow),  # each stops at its own step
        pytest.param((), ("rename@0 5", "warm-up@1 1"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_stop_together_and_go_on(more, points, workspace, truth, tmp_path):
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank, point in enumerate(points):
        command = [HERE / "signal_runner.py", "SIGTERM", *point.split(), *arguments(workspace, out, *more)]
        children.append(start(*command, RANK=str(rank), LOCAL_RANK=str(rank), **group))
    for rank, child in enumerate(children):
        status, error = ended(child)
        assert status == 143, (rank, error)
        assert [line for line in error if line.startswith("kunbr-fast")] == [
            f"kunbr-fast, rank {rank} of 2: terminated{KEPT}"
        ]
    assert cli.main([*arguments(workspace, out, *more), "--resume"]) == 0
    weights, report = truth(*more)
    ours = load_file(out / "model.safetensors")
    for name, value in weights.items():  # steps that were shared are equal up to summation order
        assert float((value - ours[name]).norm()) <= 1e-9 * float(value.norm()), name
    assert json.loads((out / "report.json").read_text())["blocks"] == report["blocks"]


# ---------------------------------------------------------------- in somebody's own process


def test_main_gives_the_handlers_back(tmp_path, capsys):
    def handlers():
        return [signal.getsignal(getattr(signal, name)) for name in STATUS], sys.unraisablehook

    before = handlers()
    with process.working() as caught:
        assert signal.getsignal(signal.SIGTERM) is caught
    assert handlers() == before
    assert cli.main(["plan", "--model", str(tmp_path / "none"), "--gpu-memory", "24GiB"]) == 2
    assert handlers() == before and "none" in capsys.readouterr().err


def test_main_works_in_another_thread(tmp_path, capsys):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(cli.main(["plan", "--model", str(tmp_path / "none"), "--gpu-memory", "24GiB"]))
    )
    thread.start()
    thread.join(60)
    assert found == [2] and "none" in capsys.readouterr().err


def test_an_interrupt_that_python_swallows_comes_again():
    """As of a signal in a __del__: Python cannot raise it there."""

    class Closes:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    with process.working() as caught:
        with pytest.raises(KeyboardInterrupt):
            thing = Closes()
            del thing
            time.sleep(10)
        assert caught.number == signal.SIGINT and caught.raised


def test_torchruns_echo_is_no_second_signal(monkeypatch):
    """torchrun passes on what a terminal or a scheduler has sent to its processes too."""
    ends = []
    monkeypatch.setattr(process, "end", ends.append)
    caught = process.Caught()
    caught.stop.awaited = True
    caught(signal.SIGTERM, None)
    assert caught.stop.requested and not ends
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    caught(signal.SIGTERM, None)
    assert not ends
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    caught(signal.SIGTERM, None)
    assert ends == [signal.SIGTERM]


# ---------------------------------------------------------------- at any time


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATUS)
@pytest.mark.parametrize("name", ["unlearn", "density", "plan", "demo", "rtt"])
def test_at_any_time(name, kind, workspace, tmp_path):
    """From 0.3 s on: before Python reaches this package's code nothing can be done."""
    model, forget = str(workspace / "model"), [str(workspace / f"f{i}.jsonl") for i in range(2)]
    commands = {
        "unlearn": [*arguments(workspace, tmp_path / "out"), "--warmup-epochs", "100"],
        "density": ["density", "--model", model, "--forget", *forget, "--num-blocks", "3", "--top-k", "1"],
        "plan": ["plan", "--model", model],
        "demo": ["demo", "--out", str(tmp_path / "demo")],
        "rtt": ["rtt", "--model", model, "--forget", *forget, "--rtt-epochs", "50", "--out", str(tmp_path / "rtt")],
    }
    for i in range(20):
        child = start("-m", "kunbr_fast", *commands[name])
        time.sleep(0.3 + 0.2 * i)
        if child.poll() is None:
            child.send_signal(getattr(signal, kind))
        status, error = ended(child)
        said = [line for line in "\n".join(error).replace("\r", "\n").split("\n") if line.startswith("kunbr-fast")]
        assert status in (0, STATUS[kind]), (i, error)
        assert len(said) == (status > 0) and "Traceback" not in str(error), (i, error)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "rtt").unlink(missing_ok=True)
