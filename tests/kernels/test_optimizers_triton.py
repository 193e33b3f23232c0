"""The Triton kernels of Lion and AdamW against fp64: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from helpers import forbid_waiting, rarely
from torch import nn

pytest.importorskip("triton", reason="triton is made for Linux only")

import triton
import triton.language as tl

from kunbr_fast.kernels import dispatch, rounding
from kunbr_fast.kernels.optimizers import cases, reference
from kunbr_fast.kernels.optimizers import op as optim
from kunbr_fast.kernels.optimizers import triton_kernel as lion
from kunbr_fast.kernels.optimizers.op import AdamW, Lion
from kunbr_fast.training.flat_buffer import FlatBuffer, make_optimizer

# numpy's, in the interpreter, of what is infinite on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# parameter, gradient, state, half-precision copy
DTYPES = [
    (FP32, FP32, FP32, None),
    (FP32, BF16, FP32, BF16),
    (FP32, FP16, FP32, FP16),
    (BF16, BF16, BF16, None),
    (BF16, BF16, FP32, None),
    (BF16, FP32, FP32, None),
    (FP16, FP16, FP32, None),
]
SIZES = [1, 63, 1024, 3 * 1024 + 123]


def random(size, dtype=FP32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def vectors(name, size, dtypes):
    """param, grad and the state (AdamW's second moment is not negative), and the copy."""
    param, grad, state, half = dtypes
    moments = [random(size, state, seed=2, scale=0.1)]
    if name == "adamw":
        moments.append(random(size, state, seed=3, scale=0.1) ** 2)
    copy = None if half is None else torch.full((size,), torch.nan, dtype=half, device=DEVICE)
    return [random(size, param), random(size, grad, seed=1, scale=0.1), *moments], copy


def values(name, weight_decay, step):
    if name == "lion":
        return [1e-2, 0.9, 0.99, weight_decay]
    return [step, 1e-2, 0.9, 0.999, 1e-8, weight_decay]


def run(module, name, tensors, numbers, copy=None, **options):
    """The tensors after one step of `module`'s, of copies of the given ones."""
    tensors = [t.clone() for t in tensors]
    copy = None if copy is None else copy.clone()
    getattr(module, f"{name}_")(*tensors, *numbers, half=copy, **options)
    return [*tensors, copy]


def check(ours, torchs, truth, tensors):
    """Of three runs' tensors: error at most twice torch's own in the same dtypes, plus the proof's floor."""
    named = [dict(zip(("param", "grad", "m", "v"), run[: len(tensors)])) for run in (ours, torchs, truth, tensors)]
    assert torch.equal(named[0]["grad"], named[3]["grad"])  # it is read alone
    wanted = {name: t for name, t in named[2].items() if name != "grad"}
    for name, floor in cases.floors(named[3], wanted).items():
        mine, other, true = (run[name].double() for run in named[:3])
        error, allowed = (mine - true).abs(), 2 * (other - true).abs() + floor
        assert bool((error <= allowed).all()), (name, float((error / allowed).max()))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, weight_decay, step", [("lion", 0.1, 1), ("adamw", 0.0, 1), ("adamw", 0.1, 1000)])
def test_one_step_against_fp64(name, dtypes, size, weight_decay, step):
    tensors, copy = vectors(name, size, dtypes)
    numbers = values(name, weight_decay, step)
    truth = run(reference, name, [t.double() for t in tensors], numbers)
    torchs = run(reference, name, tensors, numbers, copy)
    ours = run(lion, name, tensors, numbers, copy)
    check(ours, torchs, truth, tensors)
    if copy is not None:
        assert torch.equal(ours[-1], ours[0].to(copy.dtype))  # and nothing of it is left as it was


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_no_elements_and_equal_bits(name):
    empty, _ = vectors(name, 0, DTYPES[0])
    assert all(t.numel() == 0 for t in run(lion, name, empty, values(name, 0.1, 1))[:-1])
    tensors, copy = vectors(name, 1500, DTYPES[1])
    first, second = (run(lion, name, tensors, values(name, 0.1, 3), copy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_memory_beyond_the_end_is_left_alone(name):
    """Vectors that end within a program's elements, in the middle of larger ones of NaN."""
    tensors, copy = vectors(name, 1030, DTYPES[1])
    clean = run(lion, name, tensors, values(name, 0.1, 3), copy)
    memory = [torch.full((3000,), torch.nan, dtype=t.dtype, device=DEVICE) for t in (*tensors, copy)]
    views = [m[1:1031] for m in memory]  # and not aligned to 16 bytes
    for view, t in zip(views, tensors):
        view.copy_(t)
    getattr(lion, f"{name}_")(*views[:-1], *values(name, 0.1, 3), half=views[-1])
    for view, m, t in zip(views, memory, clean):
        assert torch.equal(view, t) and bool(m[:1].isnan().all()) and bool(m[1031:].isnan().all())


@pytest.mark.parametrize("make", [Lion, AdamW])
def test_a_step_counts_in_version_counters(make):
    """As torch's: the backward of what saved the weights before it raises."""
    param = nn.Parameter(random(64))
    optimizer, saved, param.grad = make([param], lr=0.1, impl="triton"), (param * param).sum(), random(64, seed=1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_lions_steps():
    """One size whatever the gradient's, none for none, and NaN for NaN."""
    p, m = torch.zeros(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    g = torch.tensor([1e-30, -1e30, 0.0, 3.0, torch.nan], device=DEVICE)
    lion.lion_(p, g, m, 0.25, 0.9, 0.99, 0.0)
    assert p[:4].tolist() == [-0.25, 0.25, 0.0, -0.25] and bool(p[4].isnan()) and bool(m[4].isnan())
    lion.lion_(p, torch.zeros_like(g), m, 0.25, 0.0, 0.99, 0.0)  # beta1 = 0: the sign is the gradient's alone
    assert p[:4].tolist() == [-0.25, 0.25, 0.0, -0.25]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_adamw_shows_what_is_not_finite(bad):
    tensors, _ = vectors("adamw", 40, DTYPES[0])
    clean = run(lion, "adamw", tensors, values("adamw", 0.1, 3))
    tensors[1][7] = bad
    ours = run(lion, "adamw", tensors, values("adamw", 0.1, 3))
    others = torch.arange(40, device=DEVICE) != 7
    assert bool(ours[0][7].isnan()) and torch.equal(ours[0][others], clean[0][others])


# ---------------------------------------------------------------- the flag


def flag(value=0):
    return torch.full((1,), value, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("module", [lion, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("dtypes", rarely(DTYPES, DTYPES[1:4]), ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_the_flag_tells_what_is_not_finite(name, dtypes, module):
    """Wherever it is, whatever it is in; and looking changes no bit."""
    for size in (5, 1024, 2 * 1024 + 123):
        for at in {0, size // 2, size - 1}:
            for what, number in ((0, 1e30), (1, torch.nan), (1, -torch.inf), (2, torch.inf), (-1, torch.inf), (0, 0)):
                tensors, copy = vectors(name, size, dtypes)
                tensors[what][at] = number
                bad = flag()
                ours = run(module, name, tensors, values(name, 0.0, 3), copy, bad=bad)
                same = run(module, name, tensors, values(name, 0.0, 3), copy)
                written = [t for i, t in enumerate(ours) if i != 1 and t is not None]
                assert bool(bad) == any(not bool(t.isfinite().all()) for t in written), (size, at, what, number)
                assert bool(bad) or number in (0, 1e30)
                for a, b in zip(ours, same):
                    assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("module", [lion, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_a_flag_is_never_cleared(name, module):
    tensors, copy = vectors(name, 1030, DTYPES[1])
    bad = flag(1)
    run(module, name, tensors, values(name, 0.1, 3), copy, bad=bad)
    assert int(bad) == 1
    run(module, name, [t[:0] for t in tensors], values(name, 0.1, 3), copy[:0], bad=bad)
    assert int(bad) == 1


def test_what_no_kernel_could_write_is_refused():
    tensors, _ = vectors("lion", 30, DTYPES[0])
    for bad in (torch.zeros(1, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)):
        with pytest.raises(ValueError, match=r"bad: got .*, expected one int32 on"):
            lion.lion_(*tensors, *values("lion", 0.0, 1), bad=bad)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_an_optimiser_knows_whether_it_left_finite_values(name, impl):
    """Also of a copy alone, by torch's own AdamW, and with several parameters."""
    for dtype, copied in ((FP32, None), (FP32, FP16), (FP32, BF16), (BF16, None)):
        param = nn.Parameter(random(40, dtype))
        half = None if copied is None else torch.empty(40, dtype=copied, device=DEVICE)
        optimizer = make_optimizer(name, [param], 1e-3, impl=impl)
        assert optimizer.left_finite() and optimizer.flags() == []
        for _ in range(2):
            optimizer.update(random(40, FP32, seed=1), half)
        assert optimizer.left_finite()
        with torch.no_grad():
            param[39] = 1e5 if copied == FP16 else 3.4e38 if copied == BF16 else torch.inf
        optimizer.update(random(40, FP32, seed=2), half)
        assert bool(param.isfinite().all()) == (copied is not None) and not optimizer.left_finite()
        with torch.no_grad():
            param[39] = 1.0
        optimizer.update(random(40, FP32, seed=3), half)
        assert not optimizer.left_finite()
        optimizer.reset_flags()
        optimizer.update(random(40, FP32, seed=4), half)
        assert optimizer.left_finite()
    params = [nn.Parameter(random(n)) for n in (3, 5)]
    optimizer = make_optimizer(name, params, 1e-3, impl=impl)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.left_finite()
    params[1].grad[2] = torch.nan
    optimizer.step()
    assert not optimizer.left_finite()


# ---------------------------------------------------------------- stochastic rounding


def test_random_bits_are_philox():
    """The known answer of Random123 for a zero key and counter; a function of seed, step and place."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    bits = reference.random_bits(1001, 0, 0)
    assert [b & 0xFFFFFFFF for b in bits[:4].tolist()] == words and bits.dtype == torch.int32 and len(bits) == 1001
    assert torch.equal(reference.random_bits(6, 0, 0), bits[:6])
    for seed, step in ((1, 0), (0, 1), (2**33, 0)):
        same = int((reference.random_bits(1001, seed, step) == bits).sum())
        assert same == 0  # two of 1001 words of 32 bits agree once in 4 million
    counts = torch.stack([(bits >> i) & 1 for i in range(32)]).sum(1)
    assert bool(((counts - 500.5).abs() < 5 * 0.5 * 1001**0.5).all())


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize("seed, step", [(0, 0), (7, 1), (2**31 + 5, 16), (2**61, 2**31 - 1)])
def test_the_kernels_bits_are_torchs(name, seed, step):
    """Where what is rounded has the same fp32 bits: Lion's step from a bf16 weight; for AdamW, first moment zero."""
    tensors, _ = vectors(name, 2500, (BF16, BF16, FP32, None))
    numbers = values(name, 0.0, max(step, 1))
    options = {"seed": seed, "step": step} if name == "lion" else {"seed": seed}
    if name == "adamw":
        tensors[1].zero_()
        tensors[2].zero_()
    ours, torchs = (run(module, name, tensors, numbers, **options) for module in (lion, reference))
    assert torch.equal(ours[0], torchs[0]) and (name == "adamw" or not torch.equal(ours[0], tensors[0]))
    assert torch.equal(ours[0], run(lion, name, tensors, numbers, **options)[0])  # reproducible
    if name == "lion":
        for other in ({"seed": seed + 1, "step": step}, {"seed": seed, "step": step ^ 1}):
            assert not torch.equal(ours[0], run(lion, name, tensors, numbers, **other)[0])


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize("lr", [1e-3, 3e-5])
def test_rounding_is_unbiased(name, lr):
    """Weights of 1 less a step far below bf16's 2^-8 spacing: one of two neighbours, and over all seeds, places and
    steps the fraction of the lower one is lr / spacing within four standard errors."""
    spacing, seeds, size = 2.0**-8, 24, 1024
    lower = 0
    for seed in range(seeds):
        p = torch.ones(size, dtype=BF16, device=DEVICE)
        g = torch.ones(size, device=DEVICE)
        state = [torch.zeros(size, device=DEVICE) for _ in range(1 + (name == "adamw"))]
        if name == "lion":
            lion.lion_(p, g, *state, lr, 0.9, 0.99, 0.0, seed=seed, step=seed % 3)
        else:
            lion.adamw_(p, g, *state, 1, lr, 0.9, 0.999, 0.0, 0.0, seed=seed)  # the first step has size lr
        down = p == 1 - spacing
        assert bool((down | (p == 1)).all())
        lower += int(down.sum())
    q, n = lr / spacing, seeds * size
    assert abs(lower / n - q) <= 4 * (q * (1 - q) / n) ** 0.5


@triton.jit
def nearest_kernel(x, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, rounding.narrow(tl.load(x + places), out.dtype.element_ty))


@triton.jit
def round_kernel(x, bits, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    rounded = rounding.narrow_stochastically(tl.load(x + places), tl.load(bits + places))
    tl.store(out + places, rounding.narrow(rounded, out.dtype.element_ty))


def test_rounding_of_what_is_exact_or_not_finite():
    """A bf16 value stays what it is; so do infinities and NaN, also a GPU's NaN of all ones, whose bits could carry
    over into a number."""
    words = [0x3F800000, 0, 0x7F800000, -0x00800000, 0x00800000, 0x7FC00000, 0x7FFFFFFF, -1]
    x = torch.tensor(words, dtype=torch.int32).view(FP32).to(DEVICE)
    for seed in range(20):
        bits = reference.random_bits(8, seed, 0, DEVICE)
        ours = torch.empty(8, dtype=BF16, device=DEVICE)
        round_kernel[(1,)](x, bits, ours, 8)
        for rounded in (ours, reference.to_bf16(x, bits)):
            assert rounded[:5].tolist() == [1.0, 0.0, torch.inf, -torch.inf, float(x[4])]
            assert bool(rounded[5:].isnan().all())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: str(d)[6:])
def test_rounding_to_nearest(dtype):
    """Ties to even, carries into the exponent and beyond the largest number: `x.to(dtype)`, bit for bit."""
    words = [0x3F808000, 0x3F818000, 0x3F808001, 0x3FFFFFFF, 0x7F7FFFFF, -0x00800001, 0x7F800000, 0x38801000]
    x = torch.tensor(words, dtype=torch.int32).view(FP32).to(DEVICE)
    if dtype == FP16:
        x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -3.3, 7e4, -torch.inf, 2 - 2**-12, 0.1], device=DEVICE)
    out = torch.empty(8, dtype=dtype, device=DEVICE)
    nearest_kernel[(1,)](x, out, 8)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.slow
def test_small_steps_add_up_on_average():
    """200 steps of 1e-4 at bf16 weights of 1: lost by rounding to nearest."""
    finals = []
    for seed in (None, 1):
        param = nn.Parameter(torch.ones(1024, dtype=BF16, device=DEVICE))
        optimizer = Lion([param], 1e-4, seed=seed, state_dtype=FP32, impl="triton")
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        finals.append(float(param.detach().double().mean()))
    assert finals[0] == 1.0
    # 200 steps for each of 1024 weights, each a draw between neighbours 2^-8 apart
    assert abs(finals[1] - (1 - 200 * 1e-4)) <= 4 * (200 * 1e-4 / 2**-8) ** 0.5 * 2**-8 / 1024**0.5


# ---------------------------------------------------------------- through the package


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("master", [True, False])
def test_the_flat_buffer_steps_in_one_launch(name, dtype, master, monkeypatch):
    launched = []
    launch = lion.Call.launch
    monkeypatch.setattr(lion.Call, "launch", lambda self: launched.append(self.kernel) or launch(self))
    final = []
    for impl in ("triton", "torch"):
        params = [nn.Parameter(random(n, dtype, seed=n)) for n in (300, 5, 1200)]
        flat = FlatBuffer(params, [p.detach().clone() for p in params], master)
        optimizer = {"lion": Lion, "adamw": AdamW}[name]([flat.param], 1e-2, weight_decay=0.1, impl=impl)
        for step in range(5):
            flat.grad.copy_(random(1505, dtype, seed=100 + step))
            flat.step(optimizer)
            assert not flat.grad.any()
        if flat.master is not None:
            assert torch.equal(flat.weights, flat.master.to(dtype))
            assert flat.param.grad is None  # no gradient in fp32
        assert params[0].data_ptr() == flat.weights.data_ptr()
        final.append(flat.param.detach().double())
    assert len(launched) == 5
    eps = torch.finfo(flat.param.dtype).eps
    # five steps of one rounding or two each; torch rounds AdamW's ratio and the decay of bf16 weights as well
    assert float((final[0] - final[1]).abs().max()) <= 5 * 3 * eps * (float(final[1].abs().max()) + 1e-2)


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_a_loaded_state_goes_on_with_the_same_bits(name):
    """Also fp32 state of bf16 parameters, and a step that was saved as a tensor."""

    def make(params):
        return {"lion": Lion, "adamw": AdamW}[name](params, 1e-2, seed=3, state_dtype=FP32, impl="triton")

    def step(params, optimizer, number):
        for i, p in enumerate(params):
            p.grad = random(40, BF16, seed=10 * number + i)
        optimizer.step()

    params = [nn.Parameter(random(40, BF16, seed=i)) for i in range(2)]
    optimizer = make(params)
    for number in range(3):
        step(params, optimizer, number)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    again = make(copies)
    again.load_state_dict(optimizer.state_dict())
    for p in copies:
        again.state[p]["step"] = torch.tensor(again.state[p]["step"])
    for number in range(3, 5):
        step(params, optimizer, number)
        step(copies, again, number)
    for a, b in zip(params, copies):
        assert torch.equal(a.detach(), b.detach())
        for key, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[b][key])), key
            assert key == "step" or value.dtype == FP32
    assert not torch.equal(params[0].detach(), params[1].detach())


def test_each_parameter_has_random_bits_of_its_own():
    params = [nn.Parameter(torch.ones(500, dtype=BF16, device=DEVICE)) for _ in range(2)]
    optimizer = Lion(params, 1e-3, seed=0, impl="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(params[0].detach(), params[1].detach())


def test_nothing_waits_for_the_device(monkeypatch):
    """The launch itself is left out on a CPU: there the interpreter reads tensors."""
    if DEVICE == "cpu":
        monkeypatch.setattr(lion.Call, "launch", lambda self: None)
    param = nn.Parameter(random(100, BF16))
    flat = FlatBuffer([param], [param.detach().clone()], True)
    optimizers = [Lion([flat.param], 1e-3, impl="triton"), AdamW([flat.param], 1e-3, impl="triton")]
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        for optimizer in optimizers:
            for _ in range(3):
                flat.step(optimizer)
    assert optimizers[1].state[flat.param]["step"] == 3


def test_strides_are_refused():
    param = nn.Parameter(random(12).view(3, 4).t())
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r'lion: impl="triton" serves contiguous tensors, got strides \(1, 4\)'):
        Lion([param], 1e-3, impl="triton").step()


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_choice(name, monkeypatch):
    single, double = nn.Parameter(random(3)), nn.Parameter(random(3, torch.float64))
    with pytest.raises(TypeError, match=f'{name}: impl="triton" does not serve float64'):
        make_optimizer(name, [double], 1e-3, impl="triton")
    assert isinstance(make_optimizer(name, [single], 1e-3, impl="triton"), (Lion, AdamW))
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    dispatch.register(name, "triton", lambda device: None)  # also where triton comes first
    assert optim.implementation(name, double, "auto")[0] == "torch"
    assert optim.implementation(name, single, "auto") == ("triton", getattr(lion, f"{name}_"))
    kind = {"lion": Lion, "adamw": AdamW}[name]
    assert type(make_optimizer(name, [single], 1e-3)) is kind
    assert type(make_optimizer(name, [double], 1e-3)) is (Lion if name == "lion" else optim.TorchAdamW)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch.register(name, "triton", dispatch.triton_why_not)
    with pytest.raises(dispatch.Unavailable, match=f'{name}: impl="triton" cannot run on cpu: needs a CUDA device'):
        make_optimizer(name, [nn.Parameter(torch.zeros(3))], 1e-3, impl="triton")


# ---------------------------------------------------------------- at full size


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_addresses_beyond_32_bits(name):
    size = 2**31 + 1030
    tensors = [torch.zeros(size, dtype=BF16, device=DEVICE) for _ in range(3 + (name == "adamw"))]
    tensors[1][-5:] = 1.0
    getattr(lion, f"{name}_")(*tensors, *values(name, 0.0, 1))
    assert bool((tensors[0][-5:] < 0).all()) and not tensors[0][:-5].any()
