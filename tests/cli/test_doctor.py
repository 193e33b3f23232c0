"""The choice of an implementation, and the description of the machine."""

import json
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import kunbr_fast
from kunbr_fast.cli.doctor import doctor, format_doctor
from kunbr_fast.kernels import dispatch


@pytest.fixture
def registry(monkeypatch):
    """A registry that a test may add to."""
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_torch_runs_every_operation(operation):
    assert dispatch.resolve(operation) == "torch" or dispatch.why_not(operation, "torch", "cuda") is None
    assert dispatch.resolve(operation, "torch") == "torch"


def test_auto_prefers_the_fastest_that_can_run_there(registry):
    dispatch.register("lion", "triton", lambda device: None if device.type == "cuda" else "needs a GPU")
    assert dispatch.resolve("lion", "auto", "cuda:0") == "triton"
    assert dispatch.resolve("lion", "auto", "cpu") == "torch"
    dispatch.register("lion", "cuda", lambda device: None)
    assert dispatch.resolve("lion", "auto", torch.device("cuda", 0)) == "cuda"


def test_auto_logs_its_choice_once(registry, caplog):
    dispatch.register("lion", "triton", lambda device: "needs a GPU")
    with caplog.at_level(logging.INFO, logger="kunbr_fast"):
        for _ in range(3):
            dispatch.resolve("lion", "auto", "cpu")
    (record,) = caplog.records
    assert "lion on cpu: using torch" in record.getMessage() and "triton: needs a GPU" in record.getMessage()


def test_auto_passes_by_what_can_only_be_named(registry, caplog):
    only_on_cpu = lambda request, impl: "no GPU has run it yet" if request.device.type == "cuda" else 2.0  # noqa: E731
    dispatch.register("lion", "triton", lambda device: None, only_on_cpu)
    with caplog.at_level(logging.INFO, logger="kunbr_fast"):
        assert dispatch.resolve("lion", "auto", "cuda") == "torch"
    assert "; triton: no GPU has run it yet)" in caplog.records[0].getMessage()
    assert dispatch.resolve("lion", "triton", "cuda") == "triton"
    assert dispatch.resolve("lion", "auto", "cpu") == "triton"
    dispatch.register("lion", "triton", lambda device: "needs a GPU", lambda request, impl: "slow")
    assert dispatch.why_not_auto("lion", "triton") == "needs a GPU"
    assert dispatch.why_not_auto("lion", "torch") is None


def test_a_named_implementation_is_never_replaced(registry):
    dispatch.register("lion", "triton", lambda device: "needs a GPU")
    with pytest.raises(dispatch.Unavailable, match='lion: impl="triton" cannot run on cpu: needs a GPU'):
        dispatch.resolve("lion", "triton", "cpu")
    with pytest.raises(ValueError, match="unknown impl 'cudnn': expected one of auto, cuda, triton, torch"):
        dispatch.resolve("lion", "cudnn")
    with pytest.raises(ValueError, match="unknown operation 'adam': expected one of"):
        dispatch.resolve("adam")


def test_an_implementation_that_is_not_registered(registry, monkeypatch):
    monkeypatch.delitem(dispatch._registry, ("adamw", "cuda"), raising=False)
    with pytest.raises(dispatch.Unavailable, match="not in this release"):
        dispatch.resolve("adamw", "cuda", "cuda")


def test_doctor_describes_this_machine():
    found = doctor()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["cpu"]["cores"] >= 1 and found["memory_bytes"] > 0
    names = [device["device"] for device in found["devices"]]
    assert names == ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    assert (found["no_cuda"] is None) == torch.cuda.is_available()
    for operation in dispatch.OPERATIONS:
        on_cpu = found["operations"][operation]["cpu"]
        assert {on_cpu["auto"], *on_cpu["unavailable"], *on_cpu["by_name"]} <= set(dispatch.IMPLEMENTATIONS)
        assert on_cpu["auto"] not in {**on_cpu["unavailable"], **on_cpu["by_name"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch is asked about the devices")
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"OMP_NUM_THREADS": "3"}, marks=pytest.mark.slow),
        {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "1"},
        {"TRITON_INTERPRET": "1"},
    ],
    ids=str,
)
def test_doctor_says_the_same_without_torch(environment):
    code = "import json; from kunbr_fast.cli.doctor import doctor; print(json.dumps(doctor()))"
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")
    }
    inherited["PYTHONPATH"] = str(Path(kunbr_fast.__file__).parents[1])
    found = []
    for before in ("", "import torch; "):
        command = [sys.executable, "-c", before + code]
        done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]


def test_doctor_names_each_unmet_requirement(monkeypatch):
    wanted = ["torch>=999", "no-such-package>=1; python_version >= '3'"]
    does_not_apply = ["no-such-package; python_version < '3'", "no-such-package; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted + does_not_apply)
    found = doctor()
    torch_problem, missing_problem = found["problems"]
    assert torch_problem.startswith(f"torch {metadata.version('torch')} is not supported")
    assert missing_problem == "no-such-package is not installed: pip install 'no-such-package>=1'"
    assert "PROBLEM: no-such-package is not installed" in format_doctor(found)


def test_doctor_as_text():
    found = doctor()
    text = format_doctor(found)
    assert f"torch         {found['versions']['torch']}" in text
    for operation in dispatch.OPERATIONS:
        assert operation in text


def test_doctor_as_text_with_a_gpu():
    found = doctor()
    found["devices"].append(
        {"device": "cuda:0", "name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 139 * 1024**3}
    )
    assert "cuda:0        NVIDIA H200, sm_90, 139.0 GiB" in format_doctor(found)
