"""A launch: on the tensors' device, with an allocator where the kernel asks for one, and nothing else changed."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is made for Linux only")

import triton

from kunbr_fast.kernels.launch import Call


class Kernel:
    """What a launch of it saw."""

    def __init__(self, current):
        self.current, self.seen = current, []

    def __getitem__(self, grid):
        def launch(**arguments):
            allocator = triton.runtime._allocation._allocator.get()
            self.seen.append((grid, self.current[-1], allocator, arguments))

        return launch


@pytest.fixture
def devices(monkeypatch):
    """The current devices, the last one now."""
    current, entered = [0], []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted.index)
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    return current, entered


def tensor(where):
    with FakeTensorMode():
        return torch.empty(4, device=where)


@pytest.mark.parametrize("where, entered", (("cuda:0", []), ("cuda:1", [1]), ("cpu", [])))
@pytest.mark.parametrize("scratch", (False, True))
def test_on_the_tensors_device(devices, where, entered, scratch):
    current, changes = devices
    kernel, x = Kernel(current), tensor(where)
    before = triton.runtime._allocation._allocator.get()
    Call(kernel, (2, 3), dict(n=4, x=x), dict(BLOCK=8), 4, 2, scratch=scratch, fma=False).launch()
    ((grid, device, allocator, arguments),) = kernel.seen
    assert grid == (2, 3) and changes == entered and current == [0]
    assert device == (1 if where == "cuda:1" else 0)
    assert arguments == dict(n=4, x=x, BLOCK=8, num_warps=4, num_stages=2, enable_fp_fusion=False)
    assert (allocator is before) == (not scratch) and triton.runtime._allocation._allocator.get() is before


def test_an_empty_grid_is_no_launch(devices):
    kernel = Kernel(devices[0])
    Call(kernel, (2, 0), dict(x=tensor("cuda:0")), {}, 4, 2).launch()
    assert kernel.seen == []
