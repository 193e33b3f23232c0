"""kernels/ is usable without the package around it, under any name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
USE = """
import sys

sys.modules["kunbr_fast"] = None  # whoever imports it now gets an ImportError, wherever it is installed
import torch
from mykernels.grad_density.op import grad_density
from mykernels.linear_loss.op import linear_loss
from mykernels import dispatch

x, dy = torch.ones(3, 2), torch.ones(3, 4)
(found,) = grad_density(x, [dy], torch.tensor([0, 1, 3]))
print(found.tolist())
weight = torch.zeros(5, 2, requires_grad=True)
linear_loss(x, weight, None, torch.zeros(3, dtype=torch.int64), torch.ones(3))[0].backward()
print(weight.grad.sum().item())
print(dispatch.why_not("grad_density", "cuda", "cpu"))
"""


def test_a_copy_under_another_name(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "mykernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    modules = sorted(path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.py"))
    names = [".".join(part for part in module.parts if part != "__init__") for module in modules]
    everything = "\nimport importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in names)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [sys.executable, "-c", USE + everything], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["[8.0, 16.0]", "0.0", "needs a CUDA device"]
