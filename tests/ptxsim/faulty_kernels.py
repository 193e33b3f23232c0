"""Triton kernels with a fault each, which the simulator must name. Run by test_ptx.py, under the plugin alone."""

import pytest
import torch
import triton
import triton.language as tl

from ptxsim import Fault


@triton.jit
def copy_kernel(x, y, size, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    places = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    inside = places < (size if MASKED else size + 1)
    tl.store(y + places, tl.load(x + places, mask=inside), mask=inside)


def copy(size, masked=True, stride=128, gap=0):
    x = torch.arange(size * (1 + gap), dtype=torch.float32)[: size * (1 + gap) : 1 + gap]
    y = torch.full((size,), torch.nan)
    copy_kernel[(triton.cdiv(size, 128),)](x, y, size, stride, 128, masked)
    return x, y


@pytest.mark.parametrize("size", [200, 256])
def test_right(size):
    x, y = copy(size)
    assert torch.equal(x, y)


def test_a_mask_that_lets_one_more_through():
    with pytest.raises(Fault, match="copy_kernel, .*ld.global.*beyond a tensor"):
        copy(200, masked=False)


def test_a_stride_that_is_forgotten():
    with pytest.raises(Fault, match="copy_kernel, .*ld.global.*beyond a tensor"):
        copy(200, gap=1)


def test_programs_that_overlap():
    with pytest.raises(Fault, match="copy_kernel, .*program 1 writes what program 0 wrote"):
        copy(200, stride=64)
