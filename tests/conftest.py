"""What all tests share."""

import gc
import os
from pathlib import Path

# No test may depend on a network: what is not on this machine is an error at once, not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: more threads only wait for each other. (On two busy cores the whole suite took 260 s with
# two threads and 35 s with one.) Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a test starts a process

import pytest
import torch
import triton_interpreter

# Triton kernels run on the GPU where there is one, else in Triton's interpreter. Set before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

os.environ.setdefault("KUNBR_PROVE", "0")  # on a GPU "auto" takes torch, whatever was proven there

from kunbr_fast.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_choice_is_remembered():
    """Tests change what can run, and what was proven."""
    dispatch.forget()
    yield
    dispatch.forget()


def pytest_collection_finish():
    """What was imported stays: a collection of garbage (`transformers.Trainer` ends with one, as does each measurement
    of memory) need not look through its million objects each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart():
    """Not before: tests/ptxsim has the kernels compiled, and says so before triton is imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        triton_interpreter.repair()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder shared/data, beside or inside the checkout; where it is missing the test is skipped."""
    for folder in (ROOT.parent / "shared" / "data", ROOT / "shared" / "data"):
        if folder.is_dir():
            return folder
    pytest.skip(f"no question sets: neither {ROOT.parent}/shared/data nor {ROOT}/shared/data exists")
