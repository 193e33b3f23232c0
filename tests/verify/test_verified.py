"""The order of accesses in the compiled kernels is proven, and the proof can fail: `verify_ptx.py` as a test."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checker
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.slow


def rows(*arguments, compilers=()):
    """The command's rows, in a process of its own, where Triton compiles: in these tests it interprets."""
    if checker.executable() is None:
        pytest.skip(f"sentryward is not installed: {checker.HOW}")
    for name in compilers:
        if shutil.which(name) is None:
            pytest.skip(f"no {name} on the path: csrc/ cannot be compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "verify_ptx.py"), "--json", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hopper_density_is_well_synchronised():
    found = rows("--only", "csrc density", compilers=("nvcc", "g++"))
    assert len(found) == 5
    assert all(row["synchronization"] == row["memory"] == "passed" and row["races"] == "none" for row in found)


def test_planted_faults_are_named():
    found = rows("--faults", compilers=("nvcc", "g++"))
    assert sum(row["named"] != "not named" for row in found) == 18
    assert all(row["why"] for row in found)


def test_triton_kernels():
    pytest.importorskip("triton", reason="triton is made for Linux only")
    found = [row for row in rows("--only", "triton") if not row["beyond"]]
    assert {row["architecture"] for row in found} == {"sm_80", "sm_90"}
    assert all(row["synchronization"] == row["memory"] == "passed" for row in found)
