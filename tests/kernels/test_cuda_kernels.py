"""The CUDA kernels of csrc/ on a GPU, against fp64 and torch, beyond the proof's table, which test_proof_cases.py runs:
other strides, sizes of a model and beyond 32 bits, the library's own choice, random bits, and their callers.

Skipped without a GPU; tests/csrc/test_cuda_host.py runs the same kernels in an emulator.
"""

import pytest
import torch

from kunbr_fast.kernels import cuda_library
from kunbr_fast.kernels.grad_density import cuda as cuda_density
from kunbr_fast.kernels.grad_density import kinds, reference
from kunbr_fast.kernels.grad_density import op as operators
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
def test_the_librarys_choice_is_the_kind_that_is_proven(dtype, along):
    """Which dispatch expects of it: the same bits."""
    for K, sizes in ((392, (136, 24)), (63, (123, 1))):
        x, dys, cu = density.batch([1, 40, 0, 70, 131], K, sizes, dtype)
        kind = kinds.kinds_of_launch(x, dys, 5, along)["cuda"].partition(" ")[0]
        assert kind == ("hopper" if "hopper" in variants(dtype) and K == 392 else "portable")
        chosen, expected = (run(x, dys, cu, along, variant) for variant in ("fastest", kind))
        assert all(map(torch.equal, chosen, expected))


@pytest.mark.parametrize("along", [None, "row"])
def test_strides(along):
    lengths = [7, 0, 33]
    for dtype in (BF16, FP32):
        x, dys, cu = density.batch(lengths, 63, (123, 1), dtype)
        for laid in (("gaps", "gaps"), ("transposed", "gaps"), ("gaps", "transposed")):
            a, b = density.strided(laid[0], x), [density.strided(laid[1], dy) for dy in dys]
            density.check(run(a, b, cu, along), a, b, lengths, along)


def test_many_samples():
    lengths = [i % 7 for i in range(9000)]  # more than are sorted
    x, dys, cu = density.batch(lengths, 64, (24,), BF16)
    for variant in variants():
        (every,) = run(x, dys, cu, None, variant)
        (truth,) = density.every(lambda name: reference.grad_density(x, dys, lengths, name))
        torch.testing.assert_close(every, truth.to(every.device), rtol=1e-4, atol=1e-5)


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


def test_full_size_by_row():
    """Strips of many tiles, which small shapes do not have."""
    lengths = [128, 44, 200]
    x, dys, cu = density.batch(lengths, 4096, (14336,), BF16)
    for variant in variants():
        density.check(run(x, dys, cu, "row", variant), x, dys, lengths, "row")


# ---------------------------------------------------------------- optimisers


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
