"""What nvcc makes of the density kernel for sm_90a, executed on the host (tests/ptxsim): its sums, who waits for whom.

The emulator of csrc/tests runs the source, one thread at a time. This runs the compiled PTX, and says of each byte of
shared memory whether all who wrote and read it are ordered by a barrier or a wait.
"""

import ctypes
import itertools
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
from cuda_build import ROOT, build_module
from ptxsim import Fault, Global, Kernel, Machine
from ptxsim.access import load
from ptxsim.machine import BUILD, PARAM, instruction
from ptxsim.parse import Parameter, split_arguments, vector
from ptxsim.values import UNSIGNED_OF_BYTES, num_bytes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
SHARED = 230560  # HOPPER_BYTES
TYPES = {"Bf16": (torch.bfloat16, 10), "Fp16": (torch.float16, 6)}

# ---------------------------------------------------------------- what nvcc writes and Triton does not


@instruction("setmaxnreg")
def registers_change_hands(machine, ins):
    return machine.whole_warps


@instruction("bfi")
def insert_bits(machine, ins):
    value, into, at, count = (machine.operand(arg, "b32") for arg in ins.args[1:])

    def run(mask):
        first = at().astype(np.uint64)
        field = ((np.uint64(1) << count().astype(np.uint64)) - np.uint64(1)) << first
        bits = into().astype(np.uint64) & ~field | value().astype(np.uint64) << first & field
        machine.write(ins.args[0], bits, mask)

    return run


def load_with_structs(machine, ins):
    """`ld`, with addresses of parameters that not all threads have."""
    if "param" not in ins.mods:
        return load(machine, ins)
    names, address, size = vector(ins.args[0]), machine.address(ins.args[1]), num_bytes(ins.mods[-1])

    def run(mask):
        memory, at = machine.params.view(UNSIGNED_OF_BYTES[size]), np.where(mask, address() - PARAM, 0) // size
        for i, name in enumerate(names):
            machine.write(name, memory[at + i], mask)

    return run


class Entry(Kernel):
    """One of a module's entries, whose parameters may be structs."""

    def __init__(self, text, name):
        first, *entries = text.split(".visible .entry")
        (entry,) = (entry for entry in entries if entry.lstrip().startswith(name))
        shared = re.findall(r"^\.extern \.shared[^\n]*$", first, flags=re.M)
        super().__init__("\n".join(shared) + "\n.visible .entry " + entry)

    def _parameters(self, text):
        params, at = {}, 0
        for declared in split_arguments(text):
            found = re.search(r"(?:\.align (\d+) )?\.([busf]\d+)\s+([\w$]+)(?:\[(\d+)\])?$", declared)
            size = num_bytes(found[2]) * int(found[4] or 1)
            alignment = int(found[1] or size)
            at = -(-at // alignment) * alignment
            params[found[3]] = Parameter(at, size, found[2])
            at += size
        self.param_bytes = at
        return params


# ---------------------------------------------------------------- launches


def compiled(folder):
    """PTX of the kernel whose sources lie in folder/csrc."""
    build = build_module()
    try:
        nvcc = build.find_nvcc()
        build.nvcc_version(nvcc)
    except build.Skipped as reason:
        pytest.skip(f"csrc/ is not built: {reason}")
    source, out = folder / "csrc" / "grad_density_sm90.cu", folder / "hopper.ptx"
    flags = [flag for flag in build.FLAGS if not flag.startswith(("-X", "-lineinfo"))]
    subprocess.run([nvcc, *flags, "-arch=sm_90a", "-ptx", source, "-o", out], check=True)
    return out.read_text()


@pytest.fixture(autouse=True)
def structs(monkeypatch):
    monkeypatch.setitem(BUILD, "ld", load_with_structs)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return compiled(folder)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("arguments") / "arguments.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", ROOT / "csrc" / "tests" / "arguments.cpp", "-o", out]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


def tensor_map(address, row_bytes, columns, tokens, kind):
    """As ptxsim keeps them: 64 x 64 boxes, rows of 128 bytes swizzled."""
    out = bytearray(128)
    struct.pack_into("<QII", out, 0, address, columns, max(tokens, 1))
    struct.pack_into("<Q", out, 32, row_bytes)
    struct.pack_into("<HH", out, 64, 64, 64)
    struct.pack_into("<HH", out, 76, 1, 1)
    out[88:92] = bytes([1, kind, 0, 3])  # two dimensions, type, no interleave, swizzle
    return bytes(out)


def operand(columns, tokens, dtype):
    """Rows that are aligned to 16 bytes; NaN beyond the columns and the tokens."""
    rows = torch.full((tokens + 8, -(-columns // 8) * 8), torch.nan, dtype=dtype)
    return rows, rows[:tokens, :columns].copy_(torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)))


def launch(ptx, library, lengths, K, sizes, statistic=0, along=0, blocks=1, strip=32, seed=0, kind="Bf16"):
    """The partial sums, (samples, ...), and x and dys of each sample in fp64."""
    kernel = Entry(ptx, f"_ZN5kunbr13hopper_kernelINS_4{kind}E")
    dtype, number = TYPES[kind]
    memory, starts = Global(), [0, *itertools.accumulate(lengths)]
    operands = [operand(columns, sum(lengths), dtype) for columns in (K, *sizes)]
    at = [memory.add(rows.view(torch.uint8).reshape(-1).numpy()) for rows, _ in operands]
    ranked = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    segments = np.array([(lengths[i], i) for i in ranked], np.int32)
    maps = b"".join(
        tensor_map(address + starts[i] * rows.shape[1] * 2, rows.shape[1] * 2, inside.shape[1], lengths[i], number)
        for i in ranked
        for address, (rows, inside) in zip(at, operands)
    )
    pointers = [memory.add(np.frombuffer(data, np.uint8).copy()) for data in (segments.tobytes(), maps)]

    def arguments(partial):
        out, count = ctypes.create_string_buffer(512), ctypes.c_int64()
        what = ((ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_int64(len(lengths)), statistic, along, strip)
        size = library.hopper_arguments(
            out, ctypes.c_int64(K), len(sizes), *what, ctypes.c_uint64(partial), ctypes.byref(count)
        )
        return out.raw[:size], count.value

    partial = np.full(arguments(0)[1], np.nan, np.float32)
    first = next(iter(kernel.params.values()))
    structure, _ = arguments(memory.add(partial.view(np.uint8)))
    assert first.size == len(structure)
    Machine(kernel, SHARED, seed=seed).launch(blocks, structure + struct.pack("<QQ", *pointers), memory)
    samples = [[inside[a:b].double() for _, inside in operands] for a, b in itertools.pairwise(starts)]
    return partial.reshape(len(lengths), -1), samples


def check(partial, samples, statistic):
    """ALONG_ALL: a sample's partial sums make its statistic over all projections."""
    for mine, (x, *dys) in zip(partial, samples):
        dw = torch.cat([(dy.T @ x).flatten() for dy in dys]).abs()
        truth = [dw.sum(), (dw**2).sum(), dw.max()][statistic]
        ours = mine.max() if statistic == 2 else mine.sum(dtype=np.float64)
        assert ours == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize(
    "lengths, K, sizes, strip",
    [
        ([5, 0, 70], 136, (136, 8), 2),  # an empty sample, a consumer without rows
        ([17, 33, 49, 64], 392, (300,), 2),  # each number of 16-token steps, two tiles of 256 rows
    ],
)
def test_sums(ptx, library, lengths, K, sizes, strip):
    runs = []
    for blocks in (1, 2):
        partial, samples = launch(ptx, library, lengths, K, sizes, blocks=blocks, strip=strip, seed=blocks)
        check(partial, samples, 0)
        runs.append(partial)
    assert np.array_equal(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("statistic, kind", [(0, "Bf16"), (1, "Fp16"), (2, "Bf16")])
@pytest.mark.parametrize(
    "lengths, K, sizes, blocks",
    [
        ([256, 30, 200, 190], 128 * 8, (200,), 1),  # dy's ring full for a whole strip, x's goes round
        ([257, 500, 64], 264, (130,), 2),  # more tokens than dy's ring: dy again for each tile
        ([9, 40], 128 * 33, (257, 1), 1),  # long strips of short samples, three tiles along N
        ([1] * 20, 256, (128,), 2),  # many items
    ],
)
def test_longer_launches(ptx, library, lengths, K, sizes, blocks, statistic, kind):
    partial, samples = launch(ptx, library, lengths, K, sizes, statistic, blocks=blocks, seed=statistic, kind=kind)
    check(partial, samples, statistic)


@pytest.mark.slow
def test_by_row(ptx, library):
    sizes = (257, 8)
    partial, samples = launch(ptx, library, [40, 70], 300, sizes, along=1, blocks=2, strip=2)
    for mine, (x, *dys) in zip(partial, samples):
        truth = torch.cat([(dy.T @ x).abs().sum(1) for dy in dys])
        ours = torch.from_numpy(mine.reshape(-1, sum(sizes))).double().sum(0)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


FAULTS = [
    ("wait(ring.empty(), ring.parity ^ 1);", "wait(ring.empty(), ring.parity);"),
    ("wait(rings.x.full(), rings.x.parity);", ""),
    ("wait(rings.dy.full(), rings.dy.parity);", ""),
    ("wait_products<0>();", "wait_products<1>();"),
    ("!job.keeps_dy() || tile + 1 == tiles;", "true;"),
    ("init_barrier(at.empty(), CONSUMERS * 4);", "init_barrier(at.empty(), 4);"),
    ("if (consumer == 0) take_baton(consumer);", ""),
    ("__syncthreads();", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize("right, wrong", FAULTS)
def test_faults_are_seen(library, right, wrong, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "grad_density_sm90.cuh"
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    with pytest.raises((Fault, AssertionError)):
        partial, samples = launch(compiled(tmp_path), library, [190, 70, 300, 200], 264, (136,))
        check(partial, samples, 0)
