"""GPUs that are not NVIDIA's, and those of NVIDIA's that have less shared memory. None is here: their answers are."""

import logging
from types import SimpleNamespace

import pytest
import torch

from kunbr_fast import proofs
from kunbr_fast.cli import doctor
from kunbr_fast.kernels import dispatch

ROCM = "needs an NVIDIA GPU: parts of the kernels are PTX, and this torch is built for ROCm 6.4"
XPU = "needs an NVIDIA GPU: parts of the kernels are PTX, which xpu devices cannot run"


@pytest.fixture(params=["rocm", "xpu"])
def other(request, monkeypatch):
    """(device, why no Triton kernel runs there)."""
    monkeypatch.delenv("KUNBR_PROVE")
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(proofs, "_seen", set())
    monkeypatch.setattr(proofs, "_told", False)
    if request.param == "xpu":
        return torch.device("xpu", 0), XPU
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose devices call themselves cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    return torch.device("cuda", 0), ROCM


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_kernels_are_refused_and_torch_serves(operation, other, caplog):
    device, why = other
    with pytest.raises(dispatch.Unavailable) as error:
        dispatch.resolve(operation, "triton", device)
    assert f'{operation}: impl="triton" cannot run on {device}: {why}. Use impl="auto"' in str(error.value)
    if operation in dispatch.CUDA_OPERATIONS:
        with pytest.raises(dispatch.Unavailable, match="cannot run on"):
            dispatch.resolve(operation, "cuda", device)
    with caplog.at_level(logging.INFO, logger="kunbr_fast"):
        for _ in range(2):
            assert dispatch.resolve(operation, "auto", device, torch.bfloat16) == "torch"
    (record,) = caplog.records
    assert f"{operation} on {device}: using torch" in record.getMessage() and why in record.getMessage()


def test_a_run_is_told_once_that_no_kernel_serves(other):
    device, why = other
    said = []
    for dtype in (torch.bfloat16, torch.float32):
        proofs.ensure_proven(device, {dtype}, say=said.append)
    assert said == [f'no kernel runs on {device} ({why}): impl="auto" takes torch']


def test_doctor_names_an_amd_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_torch_build", lambda: SimpleNamespace(__version__="2.11.0", cuda=None, hip="6.4"))
    assert doctor._why_no_cuda() == "torch 2.11.0 is built for ROCm 6.4 but sees no device"
    amd = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")
    amd.total_memory = 192 * 1024**3
    found = doctor.doctor() | {"devices": [doctor._cuda_device(0, amd)]}
    assert "cuda:0        AMD Instinct MI300X, gfx942, 192.0 GiB" in doctor.format_doctor(found)
