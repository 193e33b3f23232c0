"""The CUDA kernels of csrc/ on a GPU, against fp64 and torch, by the checks of the Triton kernels' tests.

Skipped without a GPU; tests/csrc/test_cuda_host.py runs the same kernels in an emulator.
"""

import itertools

import pytest
import torch

from kunbr_fast.kernels import cuda_library
from kunbr_fast.kernels.grad_density import cuda as cuda_density
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.kernels.grad_density import reference
from kunbr_fast.kernels.optimizers import cuda as cuda_optimizers
from kunbr_fast.kernels.optimizers import op as optim
from kunbr_fast.kernels.optimizers import reference as optimizers_reference
from kunbr_fast.training.flat_buffer import FlatBuffer

WHY_NOT = cuda_library.why_not(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason="no GPU, or csrc/ is not built: see kunbr-fast doctor"),
]
if WHY_NOT is None:
    import test_grad_density_triton as density  # their batches, truths and tolerances
    import test_optimizers_triton as optimizers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def variants(dtype=BF16):
    hopper = torch.cuda.get_device_capability() == (9, 0) and dtype != FP32
    return ("portable", "hopper", "fastest") if hopper else ("portable", "fastest")


def run(x, dys, cu, along=None, variant="fastest"):
    return density.every(lambda name: cuda_density.grad_density(x, dys, cu, name, along, variant))


# ---------------------------------------------------------------- gradient density


@pytest.mark.parametrize("along", [None, "row"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("lengths", [[1, 40, 0, 70, 131, 32], [600, 3, 513], [1] * 9], ids=str)
def test_density(lengths, dtype, along):
    x, dys, cu = density.batch(lengths, 1160, (136, 264, 8), dtype)
    for variant, index in itertools.product(variants(dtype), (torch.int32, torch.int64)):
        out = run(x, dys, cu.to(index), along, variant)
        density.check(out, x, dys, lengths, along)
        again = run(x, dys, cu.to(index), along, variant)
        assert all(torch.equal(a, b) for a, b in zip(out, again))


@pytest.mark.parametrize("along", [None, "row"])
def test_odd_shapes_and_strides(along):
    lengths = [7, 0, 33]
    for dtype in (BF16, FP32):
        x, dys, cu = density.batch(lengths, 63, (123, 1), dtype)
        density.check(run(x, dys, cu, along), x, dys, lengths, along)
        for kinds in (("gaps", "gaps"), ("transposed", "gaps"), ("gaps", "transposed")):
            a, b = density.strided(kinds[0], x), [density.strided(kinds[1], dy) for dy in dys]
            density.check(run(a, b, cu, along), a, b, lengths, along)


def test_many_samples():
    lengths = [i % 7 for i in range(9000)]  # more than are sorted
    x, dys, cu = density.batch(lengths, 64, (24,), BF16)
    for variant in variants():
        (every,) = run(x, dys, cu, None, variant)
        (truth,) = density.every(lambda name: reference.grad_density(x, dys, lengths, name))
        torch.testing.assert_close(every, truth.to(every.device), rtol=1e-4, atol=1e-5)


def test_a_neighbour_never_leaks():
    lengths = [5, 30, 33, 1, 130]
    x, dys, cu = density.batch(lengths, 264, (72,), BF16)
    for variant in variants():
        (clean,) = run(x, dys, cu, None, variant)
        for which in range(5):
            bad = x.clone()
            bad[sum(lengths[:which]) : sum(lengths[: which + 1])] = torch.nan
            (out,) = run(bad, dys, cu, None, variant)
            others = [i for i in range(5) if i != which]
            assert bool(out[:, which].isnan().all()) and torch.equal(out[:, others], clean[:, others])


def test_addresses_beyond_32_bits():
    memory = torch.empty(5 * 2**30 + 64, dtype=BF16, device="cuda")
    x = memory.as_strided((6, 64), (2**30, 1))
    x.copy_(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))
    _, dys, cu = density.batch([2, 4], 64, (16,), BF16)
    for variant in variants():
        out = run(x, dys, cu, None, variant)
        density.check(out, x.contiguous(), dys, [2, 4], None)  # cuBLAS fails at such a stride


def test_the_operator_takes_it_by_name():
    x, dys, cu = density.batch([9, 20], 64, (24, 40), BF16)
    ours = density.every(lambda name: operators.grad_density(x, dys, cu, statistic=name, form="direct", impl="cuda"))
    density.check(ours, x, dys, [9, 20], None)


def test_full_size():
    """The shapes of the benchmark: T=128, 14336 x 4096, eight samples; against the product in fp32."""
    lengths = [128, 77, 44, 200, 13, 64, 110, 31]
    x, dys, cu = density.batch(lengths, 4096, (14336,), BF16)
    (truth,) = density.every(lambda name: reference.grad_density(x, dys, lengths, name))
    for variant in variants():
        (out,) = run(x, dys, cu, None, variant)
        torch.testing.assert_close(out, truth, rtol=2e-5, atol=0)


# ---------------------------------------------------------------- optimisers


def cases():
    for name, weight_decay, step in (("lion", 0.1, 1), ("adamw", 0.0, 1), ("adamw", 0.1, 1000)):
        for size in (1, 63, 1024, 3 * 16384 + 123):
            yield name, weight_decay, step, size


@pytest.mark.parametrize("name, weight_decay, step, size", list(cases()))
def test_one_step_against_fp64(name, weight_decay, step, size):
    for dtypes in optimizers.DTYPES:
        tensors, copy = optimizers.vectors(name, size, dtypes)
        numbers = optimizers.values(name, weight_decay, step)
        truth = optimizers.run(optimizers_reference, name, [t.double() for t in tensors], numbers)
        torchs = optimizers.run(optimizers_reference, name, tensors, numbers, copy)
        ours = optimizers.run(cuda_optimizers, name, tensors, numbers, copy)
        assert torch.equal(ours[1], tensors[1])
        size_of = tensors[1].double().abs() + tensors[2].double().abs()
        moved, eps = (truth[0] - tensors[0].double()).abs(), torch.finfo(FP32).eps
        floors = [4 * eps * tensors[0].double().abs() + 8 * eps * moved + 4 * eps * 1e-2, None, 4 * eps * size_of]
        floors.append(4 * eps * size_of**2)
        for place in (0, *range(2, len(tensors))):
            optimizers.close(ours[place], torchs[place], truth[place], floors[place])
        if copy is not None:
            assert torch.equal(ours[-1], ours[0].to(copy.dtype))


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_vectors_that_begin_anywhere(name):
    """The same bits with narrow accesses as with wide ones, and nothing beyond the ends is touched."""
    tensors, copy = optimizers.vectors(name, 1030, optimizers.DTYPES[1])
    clean = optimizers.run(cuda_optimizers, name, tensors, optimizers.values(name, 0.1, 3), copy)
    memory = [torch.full((3000,), torch.nan, dtype=t.dtype, device="cuda") for t in (*tensors, copy)]
    views = [m[1:1031] for m in memory]
    for view, t in zip(views, tensors):
        view.copy_(t)
    getattr(cuda_optimizers, f"{name}_")(*views[:-1], *optimizers.values(name, 0.1, 3), half=views[-1])
    for view, m, t in zip(views, memory, clean):
        assert torch.equal(view, t) and bool(m[:1].isnan().all()) and bool(m[1031:].isnan().all())


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_random_bits_are_the_references(name):
    for seed, step in ((0, 0), (7, 1), (2**61, 2**31 - 1)):
        tensors, _ = optimizers.vectors(name, 2500, (BF16, BF16, FP32, None))
        numbers = optimizers.values(name, 0.0, max(step, 1))
        options = {"seed": seed, "step": step} if name == "lion" else {"seed": seed}
        if name == "adamw":
            tensors[1].zero_()
            tensors[2].zero_()
        ours, torchs = (
            optimizers.run(module, name, tensors, numbers, **options)
            for module in (cuda_optimizers, optimizers_reference)
        )
        assert torch.equal(ours[0], torchs[0])


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_through_the_flat_buffer(name):
    final = []
    for impl in ("cuda", "torch"):
        params = [torch.nn.Parameter(optimizers.random(n, BF16, seed=n)) for n in (300, 5, 1200)]
        flat = FlatBuffer(params, [p.detach().clone() for p in params], master=True)
        kind = {"lion": optim.Lion, "adamw": optim.AdamW}[name]
        optimizer = kind([flat.param], 1e-2, weight_decay=0.1, impl=impl)
        for step in range(5):
            flat.grad.copy_(optimizers.random(1505, BF16, seed=100 + step))
            flat.step(optimizer)
        assert torch.equal(flat.weights, flat.master.to(BF16))
        final.append(flat.param.detach().double())
    assert float((final[0] - final[1]).abs().max()) <= 15 * torch.finfo(FP32).eps * (float(final[1].abs().max()) + 1e-2)
