"""The arithmetic and index code of csrc/ on the host: unit tests under sanitizers, and an emulation of the kernels."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import rarely
from torch.testing import assert_close

from kunbr_fast.kernels.grad_density import reference as density
from kunbr_fast.kernels.optimizers import reference

TESTS = Path(__file__).resolve().parents[2] / "csrc" / "tests"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
EMULATOR = ["-O2", "-shared", "-fPIC", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
EMULATOR += ["-Wno-unknown-pragmas", "-Wno-clobbered"]  # nvcc's; and swapcontext's, which returns once alone
SEED, STEP = 2**33 + 5, 7
EPS = torch.finfo(torch.float32).eps


def compiled(source, output, *flags):
    command = [COMPILER, *FLAGS, *flags, "-isystem", str(TESTS / "stub"), str(TESTS / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "-fsanitize=address,undefined" in flags and "cannot find -l" in done.stderr:
        pytest.skip(f"g++ has no sanitizers: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("source", sorted(path.name for path in TESTS.glob("test_*.cpp")))
def test_on_the_host_under_sanitizers(source, tmp_path):
    flags = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compiled(source, tmp_path / "test", *flags)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_header_is_c(tmp_path):
    """C99 with nothing else included, and C++."""
    (tmp_path / "user.c").write_text('#include "kunbr.h"\nint main(void) { return kunbr_message == 0; }\n')
    for language in (["-x", "c", "-std=c99"], ["-x", "c++", "-std=c++11"]):
        command = [
            COMPILER,
            *language,
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-Wno-address",
            f"-I{TESTS.parent}",
        ]
        done = subprocess.run([*command, "-fsyntax-only", tmp_path / "user.c"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return ctypes.CDLL(str(compiled("emulate.cpp", tmp_path_factory.mktemp("emulate") / "emulate.so", *EMULATOR)))


def address(tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(*values):
    return [ctypes.c_double(value) for value in values]


def random(size, seed=0, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- optimisers


def test_random_bits_are_the_references(emulator):
    for seed, step in ((0, 0), (SEED, STEP), (2**64 - 1, 2**32 - 1)):
        ours = torch.empty(1001, dtype=torch.int32)
        emulator.emulate_random_bits(address(ours), ctypes.c_int64(1001), ctypes.c_uint64(seed), ctypes.c_uint32(step))
        assert torch.equal(ours, reference.random_bits(1001, seed, step))


def test_rounding_is_torchs(emulator):
    """All of bf16's exponents, ties, carries, infinities; NaN stays NaN."""
    words = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    words = torch.cat([words, words & -65536 | 0x8000, words & -65536 | 0x7FFF])
    x, ours = words.view(torch.float32), torch.empty(len(words), dtype=torch.bfloat16)
    emulator.emulate_to_bf16(address(ours), address(x), ctypes.c_int64(len(words)))
    assert torch.equal(ours.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(ours[number].view(torch.int16), x.bfloat16()[number].view(torch.int16))


FP32, BF16 = torch.float32, torch.bfloat16


def step_of(emulator, name, tensors, half, values, step, seed=None, wide=1, bad=None):
    """One step by the kernel, in place."""
    types = [int(tensors[i].dtype == BF16) for i in (0, 1, 2)] + [int(half is not None and half.dtype == BF16)]
    half = None if half is None else ctypes.c_void_p(half.data_ptr())
    vectors = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    size, types = ctypes.c_int64(tensors[0].numel()), (ctypes.c_int * 4)(*types)
    rounding = (int(seed is not None), ctypes.c_uint64(seed or 0))
    number, bad = ctypes.c_uint32(step), None if bad is None else ctypes.c_void_p(bad.data_ptr())
    if name == "lion":
        arguments = (*vectors, half, types, size, *numbers(*values), *rounding, number, bad, wide)
    else:
        arguments = (*vectors, half, types, size, number, *numbers(*values), *rounding, bad, wide)
    assert getattr(emulator, f"emulate_{name}")(*arguments) == 0


def vectors_of(name, size, dtypes):
    """Parameter, gradient and state; and what is to become the copy."""
    param, grad, state, half = dtypes
    tensors = [random(size).to(param), random(size, 1, 0.1).to(grad), random(size, 2, 0.1).to(state)]
    if name == "adamw":
        tensors.append((random(size, 3, 0.1) ** 2).to(state))
    return tensors, None if half is None else torch.full((size,), torch.nan, dtype=half)


VALUES = {"lion": (1e-2, 0.9, 0.99, 0.1), "adamw": (1e-2, 0.9, 0.999, 1e-8, 0.1)}


@pytest.mark.parametrize("size", [1, 1003, 16384 + 77])
@pytest.mark.parametrize("name, step", [("lion", 3), ("adamw", 1), ("adamw", 1000)])
def test_a_step_is_the_references(emulator, name, step, size):
    (tensors, _), values = vectors_of(name, size, (FP32, FP32, FP32, None)), VALUES[name]
    ours, truth = ([t.clone().to(dtype) for t in tensors] for dtype in (FP32, torch.float64))
    step_of(emulator, name, ours, None, values, step)
    getattr(reference, f"{name}_")(*truth, *((step,) if name == "adamw" else ()), *values)
    assert torch.equal(ours[1], tensors[1])
    moved = (truth[0] - tensors[0]).abs()
    floor = 4 * EPS * tensors[0].abs() + 8 * EPS * moved + 4 * EPS * 1e-2
    assert bool(((ours[0] - truth[0]).abs() <= floor).all())
    for mine, true in zip(ours[2:], truth[2:]):
        assert_close(mine.double(), true, rtol=4 * EPS, atol=4 * EPS * 0.1)


@pytest.mark.parametrize(
    "dtypes", [(FP32, BF16, FP32, BF16), (BF16, BF16, BF16, None), (BF16, FP32, FP32, BF16)], ids=str
)
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_types_of_vectors(emulator, name, dtypes):
    """One rounding for each value: as the step of fp32 vectors, then rounded. Narrow accesses have the same bits."""
    tensors, half = vectors_of(name, 1003, dtypes)
    wide = [t.to(FP32, copy=True) for t in tensors]
    step_of(emulator, name, wide, None, VALUES[name], 5)
    for aligned in (1, 0):
        ours, copy = [t.clone() for t in tensors], None if half is None else half.clone()
        step_of(emulator, name, ours, copy, VALUES[name], 5, wide=aligned)
        for mine, true in zip(ours, wide):
            assert torch.equal(mine, true.to(mine.dtype))
        assert copy is None or torch.equal(copy, ours[0].to(copy.dtype))


def spoiled(name, size, at, what):
    """Vectors of one step, one value of which will not be finite where it is stored: bf16 copy of an fp32 weight."""
    tensors, half = vectors_of(name, size, (FP32, FP32, FP32, BF16))
    if what == "copy":
        tensors[0][at] = 3.4e38  # finite in fp32, rounded up to infinity in bf16
    elif what == "gradient":
        tensors[1][at] = torch.nan
    else:  # the state alone: beyond fp32 with AdamW; Lion's sign hides what its momentum shows
        tensors[1][at] = 3e38 if name == "adamw" else torch.inf
    return tensors, half


@pytest.mark.parametrize("what", ["copy", "gradient", "state"])
@pytest.mark.parametrize("at", [0, 16383, 16384 + 76], ids=["first", "last of a block", "last"])
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_what_is_not_finite_sets_the_flag(emulator, name, at, what):
    size, dtypes = 16384 + 77, (FP32, FP32, FP32, BF16)
    for aligned in (1, 0):
        for spoil in (what, None):
            tensors, half = spoiled(name, size, at, spoil) if spoil else vectors_of(name, size, dtypes)
            plain, bad = [[t.clone() for t in (*tensors, half)] for _ in range(2)], torch.zeros(1, dtype=torch.int32)
            step_of(emulator, name, plain[0][:-1], plain[0][-1], VALUES[name], 3, wide=aligned)
            step_of(emulator, name, plain[1][:-1], plain[1][-1], VALUES[name], 3, wide=aligned, bad=bad)
            for ours, theirs in zip(*plain):  # looking changes no bit
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
            written = [t for number, t in enumerate(plain[1]) if number != 1]
            assert any(bool((~t.isfinite()).any()) for t in written) == (spoil is not None) == bool(bad)
    bad.fill_(1)  # a step that is fine does not clear it
    tensors, half = vectors_of(name, 40, dtypes)
    step_of(emulator, name, tensors, half, VALUES[name], 3, bad=bad)
    assert int(bad) == 1


@pytest.mark.parametrize("wide", [1, 0])
def test_stochastic_rounding_has_the_references_bits(emulator, wide):
    """Where what is rounded has the same fp32 bits: Lion's step from bf16 weights."""
    (param, grad, momentum), _ = vectors_of("lion", 16384 + 1003, (BF16, BF16, FP32, None))
    truth = [param.clone(), grad, momentum.clone()]
    reference.lion_(*truth, 1e-2, 0.9, 0.99, 0.0, seed=SEED, step=STEP)
    step_of(emulator, "lion", [param, grad, momentum], None, (1e-2, 0.9, 0.99, 0.0), STEP, SEED, wide=wide)
    assert torch.equal(param, truth[0])


# ---------------------------------------------------------------- gradient density
#
# The kernels themselves, each thread a fiber, the instructions in csrc/tests/gpu_emulator.h. Batches lie within memory
# full of NaN, partial sums and shared memory begin as NaN, and copies come early or late by chance.


def batch(lengths, K, sizes, dtype=torch.bfloat16, gap=0, seed=0):
    """x, dys and cu_seqlens; gap: NaN between the rows, which are then not aligned to 16 bytes."""
    generator, T = torch.Generator().manual_seed(seed), sum(lengths)

    def make(columns):
        rows = torch.full((T + 40, columns + gap), torch.nan, dtype=dtype)[20 : T + 20, gap:]
        return rows.copy_(torch.randn(T, columns, generator=generator))

    x, *dys = map(make, (K, *sizes))
    return x, dys, torch.tensor([0, *itertools.accumulate(lengths)])


def array(kind, values):
    return (kind * len(values))(*values)


def strides(*tensors):
    return array(ctypes.c_int64, [stride for t in tensors for stride in t.stride()])


def pointers(tensors):
    return array(ctypes.c_void_p, [t.data_ptr() for t in tensors])


def emulate(emulator, x, dys, cu, lengths, along=None, names=density.STATISTICS, blocks=0, strip=16, seed=0):
    """The worst code, and the statistics, stacked."""
    codes, found = [], []
    for name in names:
        outs = [out.fill_(torch.nan) for out in density.empty_statistics(x, dys, len(lengths), along)]
        code = emulator.emulate_grad_density(
            ctypes.c_void_p(x.data_ptr()),
            *(strides(x), ctypes.c_int64(x.shape[1]), len(dys), pointers(dys), strides(*dys)),
            *(array(ctypes.c_int64, [dy.shape[1] for dy in dys]), int(x.dtype == torch.bfloat16)),
            *(ctypes.c_void_p(cu.data_ptr()), ctypes.c_int64(len(lengths))),
            *(density.STATISTICS.index(name), [None, "row"].index(along)),
            *(pointers(outs), blocks, strip, seed),
        )
        codes.append(code)
        found.append(outs)
    return max(codes), [torch.stack(values) for values in zip(*found)]


def check(emulator, lengths, K, sizes, along=None, names=density.STATISTICS, dtype=torch.bfloat16, gap=0, **options):
    x, dys, cu = batch(lengths, K, sizes, dtype, gap)
    code, outs = emulate(emulator, x, dys, cu, lengths, along, names, **options)
    assert code == 0, {1: "a partial sum is NaN", 2: "the emulator stopped: see stderr"}[code]
    for number, name in enumerate(names):
        truth = density.grad_density(x.double(), [dy.double() for dy in dys], lengths, name, along)
        for mine, true in zip(outs, truth):
            assert_close(mine[number], true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("along", [None, "row"])
def test_the_portable_kernel(emulator, along):
    check(emulator, [5, 0, 70], 140, (130, 8), along)
    check(emulator, [3, 33], 63, (70, 1), along, dtype=torch.float32)
    check(emulator, [5, 33], 63, (70, 1), along, gap=3)  # any strides
    check(emulator, [40], 136, (8,), along, names=("grad_linf",))


def test_the_portable_kernel_walks_over_strips(emulator):
    check(emulator, [33, 150], 128 * 8 + 40, (24,), None, names=("grad_l1", "grad_linf"), strip=3)


@pytest.mark.parametrize("seed", rarely([0, 1], [1]))
@pytest.mark.parametrize(
    "lengths, K, sizes, blocks",
    [
        ([5, 0, 70], 136, (136, 8), 2),  # dy stays, two tiles of K, an empty sample, a consumer without rows
        ([70, 64, 1], 392, (300,), 1),  # two tiles of 256 rows
        ([256, 30], 128 * 8, (200,), 1),  # dy's ring full for the whole strip, x's goes round
        ([257, 500], 264, (130,), 1),  # more tokens than dy's ring: dy again for each tile
        ([9], 128 * 33, (40,), 2),  # two strips, 17 and 16 tiles
    ],
)
def test_the_kernel_for_sm_90a(emulator, lengths, K, sizes, blocks, seed):
    names = density.STATISTICS if sum(lengths) < 200 else density.STATISTICS[seed : seed + 1]
    check(emulator, lengths, K, sizes, "row" if seed else None, names, blocks=blocks, strip=32, seed=seed)


@pytest.mark.slow
def test_equal_bits_whatever_the_timing(emulator):
    x, dys, cu = batch([40, 70], 264, (136,))
    for blocks in (0, 1):
        runs = [emulate(emulator, x, dys, cu, [40, 70], blocks=blocks, seed=seed)[1][0] for seed in range(3)]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], emulate(emulator, x, dys, cu, [40, 70], blocks=2)[1][0])  # nor how many processors


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_neighbour_never_leaks(emulator, blocks):
    """NaN in one sample shows in that sample alone, in all its statistics."""
    lengths = [5, 30, 33]
    x, dys, cu = batch(lengths, 136, (72,))
    clean = emulate(emulator, x, dys, cu, lengths, blocks=blocks)[1][0]
    for which in range(3):
        x, dys, cu = batch(lengths, 136, (72,))
        x[sum(lengths[:which]) : sum(lengths[: which + 1])] = torch.nan
        code, (out,) = emulate(emulator, x, dys, cu, lengths, blocks=blocks)
        assert code == 1 and bool(out[:, which].isnan().all())
        others = [i for i in range(3) if i != which]
        assert torch.equal(out[:, others], clean[:, others])


FAULTS = [  # what each would be on a GPU: a copy not waited for, a stage overwritten, a phase that never comes
    ("grad_density_sm80.cuh", "wait_copies<PORTABLE_STAGES - 2>", "wait_copies<PORTABLE_STAGES - 1>"),
    ("grad_density_sm80.cuh", "load(step + PORTABLE_STAGES - 1)", "load(step + PORTABLE_STAGES)"),
    ("grad_density_sm90.cuh", "wait(ring.empty(), ring.parity ^ 1);", "wait(ring.empty(), ring.parity);"),
    ("grad_density_sm90.cuh", "wait(rings.x.full(), rings.x.parity);", ""),
    ("grad_density_sm90.cuh", "!job.keeps_dy() || tile + 1 == tiles;", "true;"),
    ("grad_density_sm90.cuh", "if (drops_dy) arrive", "if (drops_dy || block == 0) arrive"),
    ("grad_density_sm90.cuh", "if (job.keeps_dy()) rings.dy =", "if (tile < 0) rings.dy ="),
    ("grad_density_sm90.cuh", "if (job.keeps_dy()) tiles = 1;", ""),
    ("grad_density_sm90.cuh", "init_barrier(at.empty(), CONSUMERS * 4);", "init_barrier(at.empty(), 4);"),
    ("grad_density_sm90.cuh", "if (consumer == 0) take_baton(consumer);", ""),
    ("grad_density_sm90.cuh", "wait_products<0>();", "wait_products<1>();"),
]


@pytest.mark.slow
@pytest.mark.parametrize("file, right, wrong", FAULTS)
def test_the_emulator_finds_faults(file, right, wrong, tmp_path):
    shutil.copytree(TESTS.parent, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "csrc" / file).write_text(text.replace(right, wrong))
    emulator = ctypes.CDLL(
        str(compiled(tmp_path / "csrc" / "tests" / "emulate.cpp", tmp_path / "faulty.so", *EMULATOR))
    )
    blocks = 1 if "sm90" in file else 0
    lengths = [70, 190, 300, 200]
    x, dys, cu = batch(lengths, 264, (136,))
    truth = density.grad_density(x.double(), [dy.double() for dy in dys], lengths, "grad_l1", None)
    for seed in range(2):
        code, (ours,) = emulate(emulator, x, dys, cu, lengths, names=("grad_l1",), blocks=blocks, seed=seed)
        if code or not torch.allclose(ours[0], truth[0], rtol=1e-5):
            return
    raise AssertionError("not noticed")
