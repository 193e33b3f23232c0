"""`kunbr-fast prove`, and what doctor shows of it, with fake kernels on a CPU."""

import functools
import json
import sys

import pytest
import torch
from helpers import HERE, environment

from kunbr_fast.cli.command import main
from kunbr_fast.cli.doctor import doctor, format_doctor
from kunbr_fast.kernels import verdicts
from kunbr_fast.kernels.proof import cases, prove
from kunbr_fast.kernels.verdicts import Target

KINDS = ["right", "one element", "out of memory"]


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    """A machine whose GPU is its CPU, and whose kernels are the fake ones."""
    monkeypatch.setenv("KUNBR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds = list(KINDS)
    monkeypatch.setattr(cases, "targets", lambda *of: [Target("doubling", "triton", "fp32", kind) for kind in kinds])
    command = (sys.executable, str(HERE / "fake_kernels.py"))
    monkeypatch.setattr(prove, "Prover", functools.partial(prove.Prover, command=command))
    return kinds


def run(capsys, *words):
    status = main(["prove", "--device", "cpu", *words])
    return status, *capsys.readouterr()


def test_a_table_and_a_status(capsys, fakes, tmp_path, monkeypatch):
    status, out, err = run(capsys, "--quiet", "--out", str(tmp_path / "kept"))
    assert status == 1
    lines = {line.split()[3]: line for line in out.splitlines()[1:] if line.startswith("doubling")}
    assert "right, " in lines["right"] and "x torch at 4.1k" in lines["right"]
    assert "wrong values: y is off by 0.5, allowed" in lines["one"]
    assert out.splitlines()[-1] in ("1 right, 1 WRONG", "1 WRONG, 1 right")
    assert "no verdict on doubling triton fp32 out of memory: out of memory" in err
    assert len(verdicts.read(tmp_path / "kept" / "cpu.json")) == 2
    fakes[:] = ["right"]  # proven: nothing is run again
    monkeypatch.setattr(prove, "Prover", functools.partial(prove.Prover, command=("/no/such/program",)))
    status, out, err = run(capsys)
    assert status == 0 and out.splitlines()[-1] == "1 right" and not err.strip()


def test_no_verdict_is_no_success(capsys, fakes):
    fakes[:] = ["out of memory"]
    status, out, err = run(capsys, "--quiet")
    assert status == 1 and "no verdict on doubling triton fp32 out of memory" in err


@pytest.mark.slow
def test_lines_for_programs(capsys, fakes):
    fakes[:] = ["right"]
    for words in (["--json", "--quiet"], ["--json", "--again", "--limit", "100", "lion"]):
        status, out, _ = run(capsys, *words)
        (found,) = map(json.loads, out.splitlines())
        assert status == 0 and found["right"] is True and found["why"] is None
        assert found.keys() >= {"operation", "impl", "dtype", "kind", "error", "bound", "times", "key"}
        assert found["times"][0].keys() == {"size", "mode", "torch_ms", "ours_ms"}


def test_what_is_refused(capsys, monkeypatch):
    assert run(capsys, "lino")[0] == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys)
    assert status == 2 and not out and "prove needs a GPU" in err and "kunbr-fast doctor" in err


def test_doctor_lists_verdicts(capsys, monkeypatch, fakes):
    fakes[:] = KINDS[:2]
    run(capsys, "--quiet")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor()
    assert found["proofs"] == {}  # there is no GPU
    found["proofs"] = {"cuda:0": [verdict.as_json() for verdict in verdicts.current(torch.device("cpu"))]}
    text = format_doctor(json.loads(json.dumps(found)))
    assert 'proofs on cuda:0 (what impl="auto" goes by)' in text
    assert "wrong values" in text and "right, " in text
