"""The proof of kernels on a machine, off a GPU: fake kernels, the files of verdicts, and what "auto" makes of them."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_kernels
import pytest
import torch
from helpers import HERE, environment

from kunbr_fast import proofs
from kunbr_fast.kernels import dispatch, verdicts
from kunbr_fast.kernels.proof import prove
from kunbr_fast.kernels.proof.prove import Prover
from kunbr_fast.kernels.verdicts import Target, Timing, Verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COMMAND = (sys.executable, str(HERE / "fake_kernels.py"))
KEY = {"gpu": "NVIDIA Fake 100", "capability": "9.0", "multiprocessors": "3", "driver": "1.2", "torch": "2"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Verdicts of this test's own."""
    monkeypatch.setenv("KUNBR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU can be asked about, and which our kernels can run on."""
    monkeypatch.delenv("KUNBR_PROVE")
    monkeypatch.setattr(verdicts, "_gpu", lambda device: dict(KEY) if device.type == "cuda" else {"gpu": "cpu"})
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    for operation in dispatch.OPERATIONS:
        for impl in ("cuda", "triton") if operation in dispatch.CUDA_OPERATIONS else ("triton",):
            dispatch.register(operation, impl, lambda device: None, dispatch.proven)


def target(kind="right", impl="triton"):
    return Target("doubling", impl, "fp32", kind)


def targets(*kinds):
    return [target(kind) for kind in kinds]


def prover(**options):
    return Prover(CPU, **{"command": COMMAND, "workers": 2, "limit": 60.0, **options})


def verdict_on(operation, impl="triton", dtype="bf16", kind="all", why=None, times=(), device=GPU):
    return Verdict(Target(operation, impl, dtype, kind), why, 1e-7, 1e-6, times, verdicts.key(operation, impl, device))


def timing(size, speed, mode="eager"):
    return Timing(size, mode, speed, 1.0)


# ---------------------------------------------------------------- the prover

WHY = {
    "right": None, "slow": None, "one element": r"wrong values: y is off by 0\.5, allowed 3\.5e-07 \(all\)",
    "dies": "crashed: SIGSEGV", "exits": "crashed: exit code 3, no such instruction",
    "changes": r"not deterministic \(all\)", "leaks": r"a neighbour leaks in \(all\)",
    "beyond": r"writes beyond an output \(all\)", "unwritten": "wrong values: y is off by nan",
    "raises": "crashed: ValueError: no such tile", "wrong shape": r"wrong values: y has shape \(999,\)",
}  # fmt: skip


@pytest.mark.slow
def test_each_way_of_being_wrong_is_seen():
    told, parts = [], []
    found, none = prover(on_verdict=told.append, progress=lambda *now: parts.append(now)).prove(
        targets(*(way for way in fake_kernels.WAYS if way not in ("hangs", "long")))
    )
    assert found == told and {v.target.kind for v in found} == set(WHY)
    for verdict in found:
        expected = WHY[verdict.target.kind]
        assert verdict.right == (expected is None)
        if expected is not None:
            assert re.match(expected, verdict.why) and not verdict.times, verdict
        assert verdict.key == verdicts.key("doubling", "triton", CPU)
    why = {"out of memory": "out of memory", "too large to time": "right, but not timed: out of memory"}
    assert none == {target(kind): text for kind, text in why.items()}
    fast, slow = (next(v for v in found if v.target.kind == kind) for kind in ("right", "slow"))
    assert fast.speed(4096, "eager") > 1.05 > slow.speed(4096, "eager")
    assert str(fast).startswith("right, ") and str(slow).startswith("slower than torch: 0.")
    assert {part for part, *_ in parts} == {"checked", "timed"}
    assert ("checked", 13, 13) in {(part, done, of) for part, done, of, _ in parts}


def test_what_hangs_is_ended_with_its_group():
    begin = time.monotonic()
    found, none = prover(limit=3.0).prove(targets("hangs", "right"))
    assert [(v.target.kind, v.why) for v in found if not v.right] == [("hangs", "hung (nothing for 3 s)")]
    assert [v.target.kind for v in found if v.right] == ["right"] and not none
    assert time.monotonic() - begin < 200
    assert not _processes("fake_kernels.py")


@pytest.mark.slow
def test_what_takes_long_is_no_hang():
    """Three cases of three seconds: each is a sign of life."""
    found, none = prover(limit=7.0).prove(targets("long"))
    assert [v.why for v in found] == [None] and not none


def _processes(text):
    """Ids of living processes whose command holds `text`, of this test's own cache folder."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            mine = f"KUNBR_CACHE={os.environ['KUNBR_CACHE']}\0" in (process / "environ").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if text in command and state != "Z" and mine:
            found.append(int(process.name))
    return found


def test_a_killed_parent_takes_its_children_along():
    code = (
        f"import sys, torch; sys.path.insert(0, {str(HERE)!r})\n"
        "from kunbr_fast.kernels.proof.prove import Prover\n"
        "from kunbr_fast.kernels.verdicts import Target\n"
        f"Prover(torch.device('cpu'), command={COMMAND!r}).prove([Target('doubling', 'triton', 'fp32', 'hangs')])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment(KUNBR_CACHE=os.environ["KUNBR_CACHE"]))
    _wait_until(lambda: _processes(COMMAND[1] + "\0"))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait_until(lambda: not _processes(COMMAND[1] + "\0"))


def _wait_until(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def test_the_current_gpu_has_an_index(monkeypatch):
    """`kunbr-fast prove` is for "cuda", which torch.cuda.set_device refuses."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Prover(torch.device("cuda")).device == torch.device("cuda", 1)
    assert Prover(torch.device("cuda", 0)).device == GPU and Prover(CPU).device == CPU


def test_a_command_that_cannot_start_is_no_verdict():
    broken = dataclasses.replace(prover(), command=(sys.executable, "-c", "raise SystemExit('no such module')"))
    found, none = broken.prove(targets("right", "slow"))
    assert not found and set(none) == set(targets("right", "slow"))
    assert none[target()] == "its process did not start: crashed: exit code 1, no such module"


@pytest.mark.slow
def test_the_real_kernels_through_it():
    """In Triton's interpreter, without the shapes of a model."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    wanted = [Target("lion", "triton", "fp32", "all"), Target("geglu", "triton", "bf16", "all")]
    code = (
        "import dataclasses; from kunbr_fast.kernels.proof import cases, child\n"
        "child.main(lambda target: dataclasses.replace(cases.kind_of(target), shapes=()))"
    )
    real = Prover(CPU, command=(sys.executable, "-c", code), limit=250.0)
    found, none = real.prove(wanted)
    assert [(v.target, v.why, str(v)) for v in found] == [(t, None, "right, not timed") for t in wanted] and not none
    assert all(0 <= v.error <= v.bound for v in found)


def test_the_process_that_users_get():
    """Started as a proof starts it, with nothing to do."""
    job = json.dumps({"work": "gate", "device": "cpu", "targets": []}) + "\n"
    paths = os.pathsep.join([str(prove.ROOT), os.environ["PYTHONPATH"]])
    options = dict(cwd=prove.ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=250)
    done = subprocess.run(prove.COMMAND, input=job, **options)
    assert (done.returncode, done.stdout) == (0, '{"bye": true}\n'), done.stderr


# ---------------------------------------------------------------- what is kept


def test_proven_once_and_kept(cache):
    said, wanted = [], targets("right", "one element", "out of memory")
    found, none = prove.ensure(wanted, prover(), said.append)
    assert {v.target.kind for v in found} == {"right", "one element"} and list(none) == [wanted[2]] and not said
    assert [verdicts.find(t, CPU) is not None for t in wanted] == [True, True, False]
    verdicts.forget()  # another process reads the file
    assert [v.right for t in wanted if (v := verdicts.find(t, CPU))] == [True, False]
    never = dataclasses.replace(prover(), command=("/no/such/program",))
    assert prove.ensure(wanted[:2], never) == ([], {})
    assert [path.name for path in sorted((cache / "proofs").iterdir()) if path.suffix == ".json"] == ["cpu.json"]


def test_two_processes_at_once_prove_once():
    code = (
        f"import sys, torch; sys.path.insert(0, {str(HERE)!r})\n"
        "from kunbr_fast.kernels import verdicts\n"
        "from kunbr_fast.kernels.proof import prove\n"
        f"target, command = verdicts.Target('doubling', 'triton', 'fp32', 'right'), {COMMAND!r}\n"
        "found, none = prove.ensure([target], prove.Prover(torch.device('cpu'), command=command), print)\n"
        "print(len(found), verdicts.find(target, torch.device('cpu')).right)"
    )
    env = environment(KUNBR_CACHE=os.environ["KUNBR_CACHE"])
    pair = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = [process.communicate(timeout=280)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sorted(text.splitlines()[-1] for text in said) == ["0 True", "1 True"]


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KUNBR_CACHE", str(tmp_path / "file"))
    said = []
    found, _ = prove.ensure(targets("right"), prover(), said.append)
    assert len(found) == 1 and verdicts.find(target(), CPU) == found[0]
    assert len(said) == 1 and "could not be kept" in said[0] and "set KUNBR_CACHE" in said[0]


@pytest.mark.slow
def test_nobody_has_a_home(monkeypatch):
    """An id that no user has, as containers give."""

    def expanduser(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KUNBR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    assert verdicts.find(target(), CPU) is None
    said = []
    found, _ = prove.ensure(targets("right"), prover(), said.append)
    assert len(found) == 1 and len(said) == 1 and "set KUNBR_CACHE" in said[0]


def test_files_are_read_back_and_merged(tmp_path):
    first = verdict_on("lion", times=(timing(64, 2.5), timing(4096, 0.5, "graph")), device=CPU)
    second = verdict_on("adamw", why="wrong values", device=CPU)
    path = tmp_path / "a" / "b.json"
    verdicts.write(path, [first])
    verdicts.write(path, [second])
    assert verdicts.read(path) == [first, second]
    other = dataclasses.replace(first, why="hung", times=())
    verdicts.write(path, [other])
    assert verdicts.read(path) == [other, second]
    elsewhere = dataclasses.replace(first, key={**first.key, "driver": "3"})
    verdicts.write(path, [elsewhere])
    assert verdicts.read(path) == [other, second, elsewhere]
    killed, others = f".{path.name}.0123456789ab.tmp", (f".{path.name}.x.tmp", ".c.json.0123456789ab.tmp", "notes.tmp")
    for name in (killed, *others):
        (path.parent / name).write_bytes(b"half")
    verdicts.write(path, [])
    assert {p.name for p in path.parent.iterdir() if p.suffix == ".tmp"} == {*others}


def _changed(text, change):
    found = json.loads(text)
    change(found)
    return json.dumps(found)


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "binary": lambda text: "\0\1",
    "a list": lambda text: "[1, 2]",
    "another format": lambda text: _changed(text, lambda found: found.update(format=99)),
    "a verdict turned": lambda text: _changed(text, lambda found: found["verdicts"][0].update(right=False)),
    "a time changed": lambda text: _changed(text, lambda found: found["verdicts"][0]["times"][0].update(ours_ms=1e-9)),
    "no checksum": lambda text: _changed(text, lambda found: found.pop("checksum")),
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_counts_as_missing(damage, tmp_path, caplog):
    path = tmp_path / "x.json"
    verdicts.write(path, [verdict_on("lion", times=(timing(64, 2.5),), device=CPU)])
    path.write_text(DAMAGES[damage](path.read_text()))
    assert verdicts.read(path) == []
    assert str(path) in caplog.text and "kunbr-fast prove" in caplog.text
    verdicts.write(path, [verdict_on("adamw", device=CPU)])
    assert len(verdicts.read(path)) == 1


def test_a_checksum_is_not_enough_for_nonsense(tmp_path):
    path = tmp_path / "x.json"
    verdicts.write(path, [verdict_on("lion", times=(timing(64, 2.5),), device=CPU)])
    for change in (dict(right=False), dict(why=3), dict(times=[{}]), dict(operation=None), dict(key=["a"])):
        found = json.loads(path.read_text())
        found["verdicts"][0].update(change)
        found["checksum"] = verdicts._checksum(found["verdicts"])
        path.with_name("y.json").write_text(json.dumps(found))
        assert verdicts.read(path.with_name("y.json")) == [], change


def test_a_verdict_counts_for_its_own_key_alone(gpu, monkeypatch):
    mine = verdict_on("lion", times=(timing(64, 2.0),))
    verdicts.write(verdicts.path_of(GPU), [mine])
    assert verdicts.path_of(GPU).name == "nvidia-fake-100.json"
    assert verdicts.find(mine.target, GPU) == mine
    for name in ("driver", "torch", "capability", "multiprocessors"):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, "_gpu", lambda device, name=name: KEY | {name: "another"})
            assert verdicts.find(mine.target, GPU) is None
    for what in ("sources", "_version"):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, what, lambda name: "another")
            assert verdicts.find(mine.target, GPU) is None
    assert verdicts.find(mine.target, GPU) == mine


def test_the_sources_of_an_operation(monkeypatch, tmp_path):
    for name in ("launch.py", "norms/op.py", "rotary/op.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(verdicts, "KERNELS", tmp_path)

    def hashes():
        verdicts.sources.cache_clear()
        return verdicts.sources("norms"), verdicts.sources("rotary")

    try:
        first = hashes()
        (tmp_path / "norms/op.py").write_text("2")
        second = hashes()
        assert second[0] != first[0] and second[1] == first[1]
        (tmp_path / "launch.py").write_text("2")
        third = hashes()
        assert third[0] != second[0] and third[1] != second[1]
    finally:
        verdicts.sources.cache_clear()


def test_packaged_verdicts_count_without_a_proof(gpu, tmp_path):
    packaged = verdict_on("lion", times=(timing(64, 2.0),))
    verdicts.write(tmp_path / "packaged" / "fake.json", [packaged])
    assert verdicts.find(packaged.target, GPU) == packaged
    own = dataclasses.replace(packaged, why="hung", times=())
    verdicts.forget()
    verdicts.write(verdicts.path_of(GPU), [own])
    assert verdicts.find(packaged.target, GPU) == own


# ---------------------------------------------------------------- what "auto" takes


def choose(operation="lion", dtype=torch.bfloat16, **request):
    return dispatch.resolve(operation, "auto", GPU, dtype, **request)


def test_auto_takes_what_is_right_and_fast(gpu, caplog):
    assert choose() == "torch"
    assert dispatch.why_not_auto("lion", "triton", GPU) == "not proven on this GPU: run `kunbr-fast prove`"
    verdicts.adopt([verdict_on("lion", times=(timing(64, 1.05),))], GPU)
    assert choose() == "triton" and choose(dtype=torch.float32) == "torch" and choose("adamw") == "torch"
    verdicts.adopt([verdict_on("lion", times=(timing(64, 1.04),))], GPU)
    assert choose() == "torch" and dispatch.why_not_auto("lion", "triton", GPU) == "slower than torch: 1x"
    verdicts.adopt([verdict_on("lion")], GPU)
    assert choose() == "torch" and dispatch.why_not_auto("lion", "triton", GPU) == "right, but not timed on this GPU"
    verdicts.adopt([verdict_on("lion", why="hung (nothing for 9 s)")], GPU)
    assert choose() == "torch" and dispatch.why_not_auto("lion", "triton", GPU) == "hung (nothing for 9 s)"
    assert dispatch.resolve("lion", "triton", GPU, torch.bfloat16) == "triton"  # by name all the same
    assert choose(dtype=torch.float64) == "torch"


def test_auto_takes_the_fastest(gpu):
    verdicts.adopt([verdict_on("lion", "cuda", times=(timing(64, 1.5),))], GPU)
    verdicts.adopt([verdict_on("lion", "triton", times=(timing(64, 1.4),))], GPU)
    assert choose() == "cuda"
    verdicts.adopt([verdict_on("lion", "triton", times=(timing(64, 1.6),))], GPU)
    assert choose() == "triton"
    verdicts.adopt([verdict_on("lion", "triton", why="wrong values")], GPU)
    assert choose() == "cuda"


def test_by_kind_and_size(gpu):
    """Hopper right, by row slower; Triton faster for short samples."""
    verdicts.adopt(
        [
            verdict_on("grad_density", "cuda", kind="hopper", times=(timing(32, 1.2), timing(512, 3.0))),
            verdict_on("grad_density", "cuda", kind="hopper by row", times=(timing(32, 0.8), timing(512, 0.9))),
            verdict_on("grad_density", "triton", kind="short", times=(timing(32, 2.0), timing(128, 1.1))),
            verdict_on("grad_density", "triton", kind="long", why="wrong values"),
        ],
        GPU,
    )

    def at(size, cuda="hopper", triton="short"):
        return choose("grad_density", kinds={"cuda": cuda, "triton": triton}, size=size)

    assert at(40) == "triton" and at(400) == "cuda" and at(400, triton="long") == "cuda"
    assert at(400, "hopper by row", "long") == "torch" and at(40, "hopper by row") == "triton"
    assert at(400, "portable", "any") == "torch"


def test_in_graphs_the_hosts_time_does_not_count(gpu):
    verdicts.adopt([verdict_on("rms_norm", times=(timing(4096, 0.5), timing(4096, 3.0, "graph")))], GPU)
    assert choose("rms_norm", size=4096) == "torch"
    with dispatch.in_graphs():
        assert choose("rms_norm", size=4096) == "triton"
    assert choose("rms_norm", size=4096) == "torch"


@pytest.mark.parametrize("sizes", [(70, 90), (90, 70)])
def test_the_first_size_decides_for_no_other(sizes, gpu):
    """80 is as far from one timed size as from the other. A resumed run may begin with either of these."""
    verdicts.adopt([verdict_on("swiglu", times=(timing(40, 0.5), timing(160, 2.0)))], GPU)
    assert {size: choose("swiglu", size=size) for size in sizes} == {70: "torch", 90: "torch"}


def test_switched_off(gpu, monkeypatch):
    verdicts.adopt([verdict_on("lion", times=(timing(64, 2.0),))], GPU)
    monkeypatch.setenv("KUNBR_PROVE", "0")
    assert choose() == "torch"
    assert dispatch.why_not_auto("lion", "triton", GPU) == "proofs are off (KUNBR_PROVE=0)"


def test_a_choice_is_remembered(gpu):
    asked = []
    dispatch.register("swiglu", "triton", lambda device: asked.append(device))
    for size in (2897, 4096, 5792):  # nearest to one power of two
        assert choose("swiglu", size=size) == "triton"
        assert dispatch.resolve("swiglu", "triton", GPU, torch.bfloat16, size=size) == "triton"
    assert len(asked) == 2
    choose("swiglu", size=5793)
    assert len(asked) == 3
    dispatch.register("swiglu", "triton", lambda device: "gone")
    assert choose("swiglu", size=4096) == "torch"


# ---------------------------------------------------------------- before the first pass


@pytest.fixture
def ensured(gpu, monkeypatch):
    """[(device, targets) that were proven], without a proof."""
    calls = []

    def ensure(wanted, prover, say):
        calls.append((prover.device, list(wanted)))
        made = [Verdict(t, None, 0.0, 1.0, (timing(64, 2.0),), verdicts.key(t.operation, t.impl, GPU)) for t in wanted]
        verdicts.adopt(made, GPU)
        return made, {}

    monkeypatch.setattr(prove, "ensure", ensure)
    monkeypatch.setattr(proofs, "_seen", set())
    monkeypatch.setattr(proofs, "_told", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: KEY["gpu"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return calls


def test_proven_before_the_first_pass_and_once(ensured):
    said = []
    for _ in range(2):
        proofs.ensure_proven(GPU, {torch.bfloat16}, say=said.append)
    ((device, wanted),) = ensured
    assert device == GPU
    assert {t.dtype for t in wanted if t.operation in ("lion", "adamw")} == {"bf16", "fp32"}
    assert {t.dtype for t in wanted if t.operation not in ("lion", "adamw")} == {"bf16"}
    assert {t.operation for t in wanted} == set(dispatch.OPERATIONS)
    assert {t.kind for t in wanted if t.impl == "cuda"} == {"all", "portable", "portable by row"}  # no Hopper here
    assert said[0].startswith("proving the kernels on NVIDIA Fake 100: a minute or two") and "KUNBR_PROVE=0" in said[0]
    assert f"{len(wanted)} of {len(wanted)} are right" in said[1] and len(said) == 2
    assert choose("swiglu", size=64) == "triton"


def test_an_interrupted_proof_begins_anew(ensured, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prove, "ensure", interrupted)
        proofs.ensure_proven(GPU, {torch.bfloat16}, say=lambda text: None)
    proofs.ensure_proven(GPU, {torch.bfloat16}, say=lambda text: None)
    assert len(ensured) == 1


@pytest.mark.parametrize("why", ["cpu", "named", "off", "capturing", "compiling", "fp64"])
def test_where_nothing_is_proven(why, ensured, monkeypatch):
    device, dtype, impl, said = GPU, torch.bfloat16, "auto", []
    if why == "cpu":
        device = CPU
    elif why == "named":
        impl = "triton"
    elif why == "off":
        monkeypatch.setenv("KUNBR_PROVE", "0")
    elif why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        dtype = torch.float64
    for _ in range(2):
        proofs.ensure_proven(device, {dtype}, impl, say=said.append)
    assert not ensured
    assert said == ['proofs of kernels are off (KUNBR_PROVE=0): impl="auto" takes torch'] * (why == "off")


class Ranks:
    """Two ranks, of which this is one; `told` is what rank 0 says to rank 1."""

    size = 2

    def __init__(self, rank, told=None):
        self.first, self.told = rank == 0, told

    def gather(self, value):
        self.told = value if self.first else self.told
        return [self.told, None]


def test_rank_0_proves_and_tells(ensured, monkeypatch):
    first = Ranks(0)
    proofs.ensure_proven(GPU, {torch.bfloat16}, group=first, say=lambda text: None)
    assert len(ensured) == 1 and len(first.told) == len(ensured[0][1])
    monkeypatch.setattr(verdicts, "_known", {})  # the other process, which sees no file
    monkeypatch.setattr(proofs, "_seen", set())
    proofs.ensure_proven(GPU, {torch.bfloat16}, group=Ranks(1, json.loads(json.dumps(first.told))))
    assert len(ensured) == 1
    assert verdicts.find(ensured[0][1][0], GPU).right


def test_wrong_kernels_are_said(gpu, ensured, monkeypatch):
    def ensure(wanted, prover, say):
        wrong = Verdict(wanted[0], "wrong values", 1.0, 0.5, (), {})
        return [wrong], {wanted[1]: "out of memory"}

    monkeypatch.setattr(prove, "ensure", ensure)
    said = []
    proofs.ensure_proven(GPU, {torch.bfloat16}, say=said.append)
    assert any("is not used on this GPU: wrong values" in text for text in said)
    assert any('could not be proven: out of memory; impl="auto" takes torch' in text for text in said)


@pytest.mark.slow
def test_a_killed_proof_keeps_what_it_found():
    code = (
        f"import sys, torch; sys.path.insert(0, {str(HERE)!r})\n"
        "from kunbr_fast.kernels.proof import prove\n"
        "from kunbr_fast.kernels.verdicts import Target\n"
        "targets = [Target('doubling', 'triton', 'fp32', kind) for kind in ('raises', 'right', 'hangs')]\n"
        f"prove.ensure(targets, prove.Prover(torch.device('cpu'), command={COMMAND!r}, workers=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(KUNBR_CACHE=os.environ["KUNBR_CACHE"]))
    _wait_until(lambda: len(verdicts.read(verdicts.path_of(CPU))) == 2)
    process.kill()
    process.wait()
    wrong, right = verdicts.read(verdicts.path_of(CPU))
    assert wrong.target == target("raises") and not wrong.right
    assert right.target == target() and str(right) == "right, not timed"
    assert prove.missing(targets("raises", "right"), CPU) == [target()]
    found, _ = prove.ensure(targets("raises", "right"), prover(command=timed_only()))  # not checked again
    assert [v.target for v in found] == [target()] and found[0].times and found[0].error == right.error


def timed_only():
    """A child that times, and dies when it has to check."""
    code = (
        f"import io, json, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import fake_kernels; from kunbr_fast.kernels.proof import child\n"
        "line = sys.stdin.readline(); assert json.loads(line)['work'] == 'time'\n"
        "sys.stdin = io.StringIO(line); child.main(fake_kernels.find)"
    )
    return (sys.executable, "-c", code)


def test_a_bound_that_is_not_finite_passes_nothing():
    """Where torch's own result overflows, nothing can be said of ours."""
    from kunbr_fast.kernels.proof import cases, gate

    floors = lambda inputs, truth: {"y": 1e-3 * truth["y"].abs()}  # noqa: E731
    case = cases.Case("overflow", lambda dtype: {"x": torch.full((4,), 300.0, dtype=dtype)},
                      lambda impl, inputs: {"y": inputs["x"] * inputs["x"]}, floors)  # fmt: skip
    assert gate.judge_case(case, "triton", torch.float32, CPU).why is None
    assert "wrong values: y is off by inf" in gate.judge_case(case, "triton", torch.float16, CPU).why
