"""The Triton kernels of gradient density against fp64: on the GPU where there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch
from helpers import poisoned, rarely
from tiny_models import random_samples, tiny_model

pytest.importorskip("triton", reason="triton is made for Linux only")

import kunbr_fast as kf
from kunbr_fast.kernels import tiles as config
from kunbr_fast.kernels.grad_density import cases, reference
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.kernels.grad_density import triton_kernel as grad_density
from kunbr_fast.kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATISTICS = ("grad_l1", "grad_l2sq", "grad_linf")
DIMS = {None: (1, 2), "row": (2,)}
EPS = torch.finfo(torch.float32).eps


def batch(lengths, K, sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    x, *dys = (torch.randn(T, n, generator=generator).to(DEVICE, dtype) for n in (K, *sizes))
    return x, dys, cumulative(lengths)


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def gradients(x, dy, lengths):
    """(B, N, K) fp64: each sample's weight gradient."""
    return torch.stack([b.T @ a for a, b in zip(x.double().split(lengths), dy.double().split(lengths))])


def truth_of(dw, along, statistic):
    magnitude, dims = dw.abs(), DIMS[along]
    if statistic == "grad_linf":
        return magnitude.amax(dims)
    return (magnitude if statistic == "grad_l1" else magnitude.square()).sum(dims)


def every(run, *arguments, statistics=STATISTICS, **options):
    """run(statistic, *arguments) for each statistic, stacked: P tensors (S, B) or (S, B, N)."""
    return [torch.stack(values) for values in zip(*(run(name, *arguments, **options) for name in statistics))]


def launch(x, dys, cu, along=None, tile=None, statistics=STATISTICS, max_seqlen=None):
    def run(name):
        return grad_density.launch(x, dys, cu, name, along, tile, max_seqlen)

    return every(run, statistics=statistics)


def check(ours, x, dys, lengths, along, statistics=STATISTICS):
    """Error at most twice torch's own in the same dtype, plus the proof's floor."""
    torchs = every(lambda name: reference.grad_density(x, dys, lengths, name, along), statistics=statistics)
    floors = every(lambda name: cases.floors_of(x, dys, lengths, name, along), statistics=statistics)
    for dy, mine, other, floor in zip(dys, ours, torchs, floors):
        dw = gradients(x, dy, lengths)
        truth = torch.stack([truth_of(dw, along, name) for name in statistics])
        assert mine.dtype == torch.float64 and mine.shape == truth.shape
        allowed = 2 * (other.to(truth.device) - truth).abs() + floor
        assert bool(((mine - truth).abs() <= allowed).all()), float(((mine - truth).abs() / allowed).max())


TILES = sorted({tile for (_, kind), tiles in config.TABLE.items() for tile in tiles}, key=str)


# How a tile is loaded and multiplied does not depend on the statistic, and interpreting is slow: two launches for each
# dtype of a tile (all six on a GPU). So every half-precision tile has each statistic once, grad_l1 both ways; fp32 has
# what is left.
LAUNCHES = {
    torch.bfloat16: ((None, "grad_l1"), ("row", "grad_linf")),
    torch.float16: ((None, "grad_l2sq"), ("row", "grad_l1")),
    torch.float32: ((None, "grad_linf"), ("row", "grad_l2sq")),
}


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", rarely(LAUNCHES, [torch.bfloat16, torch.float32]), ids=lambda d: str(d)[6:])
def test_every_tile_of_the_table(tile, dtype):
    """Samples for each way through the kernel: none, one token, up to 32, 64 and 128, and longer. A tile and a part of
    the next, both ways."""
    if (dtype == torch.float32) != (tile == config.TABLE[90, "fp32"][0]):
        pytest.skip("never chosen by the table")
    lengths = [1, 40, 0, 70, 131, 32]
    x, dys, cu = batch(lengths, tile.BK + 8, (tile.BN + 8, 40, 8), dtype)
    for along, statistic in LAUNCHES[dtype] if DEVICE == "cpu" else itertools.product(DIMS, STATISTICS):
        check(launch(x, dys, cu, along, tile, [statistic]), x, dys, lengths, along, [statistic])


@pytest.mark.parametrize("along", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_odd_shapes(dtype, along):
    lengths = [7, 0, 33]
    x, dys, cu = batch(lengths, 63, (123, 1), dtype)
    check(launch(x, dys, cu, along), x, dys, lengths, along)
    check(launch(x, dys, cu.long(), along), x, dys, lengths, along)


@pytest.mark.parametrize("projections", rarely([1, 2, 3, 5], [1, 5]))
def test_projections_equal_one_at_a_time(projections):
    x, dys, cu = batch([9, 20], 64, range(16, 16 + 8 * projections, 8), torch.bfloat16)
    for along in DIMS:
        together = launch(x, dys, cu, along)
        assert len(together) == projections
        for dy, out in zip(dys, together):
            (alone,) = launch(x, [dy], cu, along)
            assert torch.equal(out, alone)


def strided(kind, t):
    """The same values, laid out otherwise."""
    if kind == "gaps":
        wide = torch.full((t.shape[0], t.shape[1] + 9), torch.nan, dtype=t.dtype, device=t.device)
        wide[:, 3:-6] = t
        return wide[:, 3:-6]
    return t.t().contiguous().t()


@pytest.mark.parametrize("kinds", [("gaps", "gaps"), ("transposed", "gaps"), ("gaps", "transposed")])
def test_strides(kinds):
    lengths = [9, 20]
    x, dys, cu = batch(lengths, 40, (24,), torch.bfloat16)
    dys = [strided(kinds[1], dy) for dy in dys]
    x = strided(kinds[0], x)
    assert not (x.is_contiguous() and dys[0].is_contiguous())
    for along in DIMS:
        check(launch(x, dys, cu, along), x, dys, lengths, along)


def test_expanded_gradient():
    """What the gradient of a sum is: one number, with strides of zero."""
    x, _, cu = batch([9, 20], 40, (24,), torch.bfloat16)
    dy = torch.full((1, 1), 0.5, dtype=torch.bfloat16, device=DEVICE).expand(29, 24)
    assert dy.stride() == (0, 0)
    check(launch(x, [dy], cu), x, [dy], [9, 20], None)
    dy = torch.randn(1, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16).expand(29, 24)
    assert dy.stride() == (0, 1) and not config.aligned(dy) and config.aligned(dy.contiguous())
    check(launch(x, [dy], cu), x, [dy], [9, 20], None)


def test_one_token_is_a_product_of_norms():
    x, (dy,), cu = batch([1] * 5, 96, (80,), torch.bfloat16)
    (out,) = launch(x, [dy], cu)
    a, b = x.double().abs(), dy.double().abs()
    expected = torch.stack([a.sum(1) * b.sum(1), a.square().sum(1) * b.square().sum(1), a.amax(1) * b.amax(1)])
    torch.testing.assert_close(out, expected, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_neighbour_never_leaks(tile):
    """NaN in one sample's rows, and in all memory around the batch, shows in that sample alone: in a sum of all, and in
    each row's maximum."""
    lengths = [5, 30, 33, 1]
    x, dys, cu = batch(lengths, 64, (72,), torch.bfloat16)
    clean = launch(x, dys, cu, None, tile, ["grad_l1"])[0]

    def poisoned(t, rows):
        memory = torch.full((t.shape[0] + 200, t.shape[1]), torch.nan, dtype=t.dtype, device=DEVICE)
        memory[64:-136] = t
        memory[64:-136][rows] = torch.nan
        return memory[64:-136]

    for which in range(4):
        rows = slice(sum(lengths[:which]), sum(lengths[: which + 1]))
        arguments = poisoned(x, rows), [poisoned(dys[0], rows)], cu
        for along, statistic in ((None, "grad_l1"), ("row", "grad_linf")):
            (out,) = launch(*arguments, along, tile, [statistic])
            assert bool(out[:, which].isnan().all())
            others = [i for i in range(4) if i != which]
            assert bool(out[:, others].isfinite().all())
            if along is None:
                assert torch.equal(out[:, others], clean[:, others])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(bad):
    """As NaN or infinity: in a tile that reaches beyond N, an infinite x meets zeros."""
    x, dys, cu = batch([4, 4], 32, (32,), torch.bfloat16)
    x[1, 3] = bad
    (out,) = launch(x, dys, cu)
    assert not bool(out[:, 0].isfinite().any()) and bool(out[:, 1].isfinite().all())


@pytest.mark.parametrize("along", DIMS)
def test_nothing_uninitialised_is_read_and_bits_repeat(along):
    """Buffers from torch.empty hold NaN; the same input twice gives the same bits."""
    x, dys, cu = batch([3, 0, 70, 0], 136, (40, 72), torch.bfloat16)
    with poisoned(DEVICE):
        runs = [launch(x, dys, cu, along) for _ in range(2)]
    for first, second in zip(*runs):
        assert torch.equal(first, second) and bool(first.isfinite().all())
        assert bool((first[:, [1, 3]] == 0).all()) and bool((first[:, [0, 2]] > 0).any(dim=-1).all())


def test_no_samples_and_no_tokens():
    x, dys, cu = batch([], 32, (16,), torch.bfloat16)
    assert launch(x, dys, cu)[0].shape == (3, 0)
    x, dys, cu = batch([0], 32, (16,), torch.bfloat16)
    assert torch.equal(launch(x, dys, cu)[0].cpu(), torch.zeros(3, 1, dtype=torch.float64))


def test_addresses_beyond_32_bits():
    """Rows 2^30 elements apart: the last one begins 5 * 2^30 elements after the first, beyond what an int32 holds."""
    try:
        memory = torch.empty(5 * 2**30 + 64, dtype=torch.bfloat16, device=DEVICE)  # on a CPU only touched pages exist
    except (MemoryError, RuntimeError) as error:
        pytest.skip(f"10 GiB of addresses: {error}")
    x = memory.as_strided((6, 64), (2**30, 1))
    x.copy_(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))
    _, dys, cu = batch([2, 4], 64, (16,), torch.bfloat16)
    near = x.contiguous()  # for the truth: cuBLAS itself fails with an illegal access at such a stride
    check(launch(x, dys, cu), near, dys, [2, 4], None)
    swapped = launch(dys[0], [x], cu)
    check(swapped, dys[0], [near], [2, 4], None)


MIXED = [0, 1, 64, 65, 600, 128, 129, 0]


def small(short, **options):
    """A tile with few columns, so that a program has several of them, and several blocks of a long sample."""
    return Tile(64, 32, 64, 4, 2, short=short, group=2, **options)


@pytest.mark.parametrize(
    "short, K, along, statistic",
    [
        pytest.param(0, 197, "row", "grad_l1", marks=pytest.mark.slow),
        (32, 200, None, "grad_l2sq"),
        pytest.param(64, 197, None, "grad_l1", marks=pytest.mark.slow),
        (128, 200, "row", "grad_linf"),
        pytest.param(128, 197, None, "grad_l1", marks=pytest.mark.slow),
    ],
)
def test_several_tiles_a_program(short, K, along, statistic):
    """Seven tiles along K in one strip. Samples of each way through the kernel beside each other, three projections."""
    x, dys, cu = batch(MIXED, K, (72, 8, 40), torch.bfloat16)
    tile = small(short, tma=K == 200)
    call = grad_density.call_grad_density(x, dys, cu, statistic, along, tile, 1)
    assert (call.arguments["strips"], call.arguments["strip_tiles"]) == (1, 7)
    out = launch(x, dys, cu, along, tile, [statistic])
    check(out, x, dys, MIXED, along, [statistic])
    for first, second in zip(out, launch(x, dys, cu, along, tile, [statistic])):
        assert torch.equal(first, second)


@pytest.mark.parametrize("which", [i for i, tokens in enumerate(MIXED) if tokens])
def test_a_neighbour_never_leaks_from_tile_to_tile(which):
    """NaN in one sample: the long way goes from a tile's last, partial block to the first of the next tile."""
    x, dys, cu = batch(MIXED, 72, (24,), torch.bfloat16)
    tile = small(64, tma=True)
    clean = launch(x, dys, cu, None, tile, ["grad_l1"])[0]
    rows = slice(int(cu[which]), int(cu[which + 1]))
    for t in (x, *dys):
        t[rows] = torch.nan
    out = launch(x, dys, cu, None, tile, ["grad_l1"])[0]
    others = [i for i in range(len(MIXED)) if i != which]
    assert bool(out[:, which].isnan().all()) and torch.equal(out[:, others], clean[:, others])


@pytest.mark.parametrize("max_seqlen, kind", [(None, "short"), (1, "short 32"), (40, "short 64"), (600, "short")])
def test_max_seqlen_chooses_and_never_decides(monkeypatch, max_seqlen, kind):
    """The longest sample has 200 tokens: what the caller says of it costs time where it is wrong, never a value."""
    lengths = [10, 0, 200, 33, 70]
    tiles = {"short 32": small(32), "short 64": small(64), "short": small(128)}
    seen = []

    def choose(device, kind, shape, run):
        seen.append(kind)
        return tiles[kind]

    monkeypatch.setattr(config, "choose", choose)
    x, dys, cu = batch(lengths, 40, (24,), torch.bfloat16)
    check(launch(x, dys, cu, max_seqlen=max_seqlen), x, dys, lengths, None)
    assert set(seen) == {kind}


@pytest.mark.parametrize("short", [0, 128])
def test_strips_do_not_matter(monkeypatch, short):
    """Into how many strips K is cut depends on the GPU's size; the result does not, but for the last bits. Seven tiles:
    strips of 4 and 2 tiles do not divide them."""
    lengths = [20, 9, 150]
    x, dys, cu = batch(lengths, 200, (40,), torch.bfloat16)
    found = []
    for strips in ((1, 7), (2, 4), (4, 2), (7, 1)):
        monkeypatch.setattr(grad_density, "_strips", lambda *arguments, strips=strips: strips)
        found.append(launch(x, dys, cu, tile=small(short, tma=True))[0])
        check([found[-1]], x, dys, lengths, None)
        torch.testing.assert_close(found[0], found[-1], rtol=8 * EPS, atol=0)


def test_strips_of_an_h200():
    """14336 x 4096, 2048 tokens, 132 multiprocessors: 896 programs of equal length in 7 rounds, but for short samples,
    of which there are enough."""
    for samples, strips in ((64, 1), (32, 1), (16, 1), (8, 1), (4, 2), (2, 4), (1, 8)):
        kind = "short" if samples > 8 else "long"
        tile = config.TABLE[90, kind][0]
        x, dy = (torch.empty(2048, n, dtype=torch.bfloat16, device="meta") for n in (4096, 14336))
        cu = torch.empty(samples + 1, dtype=torch.int32, device="meta")
        call = grad_density.call_grad_density(x, [dy], cu, "grad_l1", None, tile, 132)
        assert call.arguments["strips"] == strips, samples
        assert kind == "short" or call.grid == (896,)


# ---------------------------------------------------------------- the choice of tiles


def test_every_architecture_has_every_kind():
    kinds = {"short 32", "short 64", "short", "long", "any", "fp32"}
    assert {a for a, _ in config.TABLE} == set(config.ARCHITECTURES) == {80, 90, 100}
    for architecture in config.ARCHITECTURES:
        assert {kind for a, kind in config.TABLE if a == architecture} == kinds
    for (architecture, kind), tiles in config.TABLE.items():
        assert all(not tile.tma for tile in tiles) or (architecture >= 90 and kind not in ("any", "fp32"))
        tokens = {"short 32": 32, "short 64": 64, "short": 128}.get(kind, 0)
        assert all(tile.short == tokens for tile in tiles)


@pytest.mark.parametrize(
    "capability, entry", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)]
)
def test_architecture_of_a_device(monkeypatch, capability, entry):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert config.architecture(torch.device("cuda", 0)) == entry


@pytest.mark.parametrize(
    "kind, tokens, K, dtype, along",
    [
        ("short", 100, 64, torch.bfloat16, None),
        ("long", 300, 64, torch.bfloat16, "row"),
        ("short", 100, 64, torch.float16, "row"),
        ("any", 100, 63, torch.bfloat16, None),
        ("fp32", 100, 64, torch.float32, None),
    ],
)
def test_kind_of_a_launch(monkeypatch, kind, tokens, K, dtype, along):
    seen = []

    def choose(device, kind, shape, run):
        seen.append(kind)
        return Tile(16, 16, 16, 4, 1, group=8)

    monkeypatch.setattr(config, "choose", choose)
    x, dys, cu = batch([tokens], K, (16,), dtype)
    check(launch(x, dys, cu, along, statistics=["grad_l1"]), x, dys, [tokens], along, ["grad_l1"])
    assert seen == [kind]


def test_autotune_takes_the_fastest_and_remembers(monkeypatch):
    """Timings are made up here; what is measured and remembered is not."""
    cuda, runs = torch.device("cuda", 0), []
    candidates = config.TABLE[90, "short"]
    monkeypatch.setattr(config, "architecture", lambda device: 90)
    monkeypatch.setattr(config, "_tuned", {})

    def timed(function, return_mode):
        function()
        return {candidates[0]: 2.0, candidates[1]: 1.0}[runs[-1]]

    monkeypatch.setattr("triton.testing.do_bench", timed)
    assert config.choose(cuda, "short", "a shape", runs.append) == candidates[0] and not runs
    monkeypatch.setenv("KUNBR_AUTOTUNE", "1")
    for _ in range(2):
        assert config.choose(cuda, "short", "a shape", runs.append) == candidates[1]
    assert runs == list(candidates)
    assert config.choose(cuda, "short", "another", runs.append) == candidates[1] and len(runs) == 4


# ---------------------------------------------------------------- through the package


def test_the_operator_runs_the_kernel():
    x, dys, cu = batch([9, 20], 64, (24, 40), torch.bfloat16)
    for along in DIMS:
        ours = every(
            lambda name, along=along: operators.grad_density(
                x, dys, cu, statistic=name, along=along, form="direct", impl="triton"
            )
        )
        check(ours, x, dys, [9, 20], along)


def test_the_gram_form_is_chosen_by_flops_for_triton_too(monkeypatch):
    """T=29 in 2 samples, K=64: with N=64 the Gram form of 2*2*20^2*128 FLOPs is cheaper than 2*29*64*64."""
    launched = []
    run = grad_density.launch
    monkeypatch.setattr(grad_density, "launch", lambda *a, **k: launched.append(1) or run(*a, **k))
    x, dys, cu = batch([9, 20], 64, (64,), torch.bfloat16)
    gram, direct = (
        operators.grad_density(x, dys, cu, statistic="grad_l2sq", form=form, impl="triton")[0]
        for form in ("auto", "direct")
    )
    assert launched == [1]
    torch.testing.assert_close(gram, direct, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "architecture, statistic",
    [
        ("llama", "grad_l1"),
        pytest.param("gpt2", "grad_linf", marks=pytest.mark.slow),
        *itertools.product(("llama", "gpt2"), ("grad_l2", "grad_l2sq")),
    ],
)
def test_knowledge_density(architecture, statistic):
    model = tiny_model(architecture, dtype=torch.float32).to(DEVICE)
    samples = random_samples(4)
    ours, torchs = (
        kf.knowledge_density(model, samples, "all", statistic, batch_tokens=20, impl=impl)
        for impl in ("triton", "torch")
    )
    assert ours.per_module.keys() == torchs.per_module.keys()
    torch.testing.assert_close(ours.per_layer, torchs.per_layer, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- at full size


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [40, 128, 700])
def test_full_size(tokens):
    """Llama-3-8B's MLP in bf16, against torch's fp32 products of the same values."""
    lengths = [tokens, tokens - 3, 1]
    x, dys, cu = batch(lengths, 4096, (14336, 14336), torch.bfloat16)
    for along in DIMS:
        check(launch(x, dys, cu, along), x, dys, lengths, along)
