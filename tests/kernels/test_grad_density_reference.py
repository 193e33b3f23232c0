"""The plain-torch statistics of weight gradients against a loop over samples in fp64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kunbr_fast.kernels.grad_density import reference

LENGTHS = [1, 5, 0, 9, 1, 0]
K, WIDTHS = 63, (123, 7)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALONG = (None, "row")


def batch(lengths=LENGTHS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, *dys = (
        torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64).to(dtype) for width in (K, *WIDTHS)
    )
    return x, dys


def gradients(x, dy, lengths):
    """Each sample's (N, K) in fp64, by autograd through a batch of one."""
    out = []
    for a, b in zip(x.double().split(lengths), dy.double().split(lengths)):
        weight = torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
        (a @ weight.T).backward(b)
        out.append(weight.grad)
    return out


def truth(x, dy, lengths, statistics=reference.STATISTICS, along=None):
    dim = {None: (0, 1), "row": 1}[along]
    of = {
        "grad_l1": lambda dw: dw.abs().sum(dim),
        "grad_l2sq": lambda dw: dw.square().sum(dim),
        "grad_linf": lambda dw: dw.abs().amax(dim),
    }
    dws = gradients(x, dy, lengths)
    return torch.stack([torch.stack([of[name](dw) for dw in dws]) for name in statistics])


def density(x, dys, lengths, statistics=reference.STATISTICS, along=None, tile_bytes=None):
    """Several statistics, stacked."""
    found = [reference.grad_density(x, dys, lengths, name, along, tile_bytes) for name in statistics]
    return [torch.stack(values) for values in zip(*found)]


def rounding(dtype):
    """Relative to a sum of absolute values: products summed over a sample's tokens, then a tile's pairwise sum."""
    return 4 * max(LENGTHS) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("tile_bytes", [None, 1, 8 * 100, 8 * 5000])
def test_every_statistic_of_every_projection(dtype, along, tile_bytes):
    x, dys = batch(dtype=dtype)
    if tile_bytes == 1:  # tiles of one number
        x, dys = x[:, :5], [dy[:, :6] for dy in dys]
    ours = density(x, dys, LENGTHS, along=along, tile_bytes=tile_bytes)
    for dy, out in zip(dys, ours):
        wanted = truth(x, dy, LENGTHS, along=along)
        assert out.dtype == torch.float64 and out.shape == wanted.shape
        # the sums that dW's entries are: of |terms|, per entry, so that cancelled entries have a limit too
        size = truth(x.abs(), dy.abs(), LENGTHS, along=along)
        assert bool(((out - wanted).abs() <= rounding(dtype) * size).all())
        assert not out[:, [2, 5]].any()


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("statistic", reference.STATISTICS)
def test_a_projection_is_what_it_is_among_others(statistic, along):
    """The same bits."""
    x, dys = batch(dtype=torch.float32)
    alone = [reference.grad_density(x, [dy], LENGTHS, statistic, along)[0] for dy in dys]
    for a, b in zip(alone, reference.grad_density(x, dys, LENGTHS, statistic, along)):
        assert torch.equal(a, b)


def test_rows_sum_to_the_whole():
    x, dys = batch()
    for out, parts in zip(density(x, dys, LENGTHS), density(x, dys, LENGTHS, along="row")):
        torch.testing.assert_close(parts[:2].sum(2), out[:2], rtol=1e-12, atol=0)
        assert torch.equal(parts[2].amax(1), out[2])


def test_the_gradient_of_one_token_has_rank_one():
    x, (dy, _) = batch()
    ones = [1] * len(x)
    l1, l2sq, linf = density(x, [dy], ones)[0]
    for out, norm in ((l1, 1), (l2sq.sqrt(), 2), (linf, math.inf)):
        wanted = torch.linalg.vector_norm(x, norm, 1) * torch.linalg.vector_norm(dy, norm, 1)
        torch.testing.assert_close(out, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("along", ALONG)
def test_no_tokens_at_all(along):
    x, dys = batch([0])
    for out in density(x, dys, [0], along=along):
        assert out.shape[:2] == (3, 1) and not out.any()
    assert not reference.gram_l2sq(x, dys, [0])[0].any()
    assert reference.gram_l2sq(x, dys, [])[0].shape == reference.grad_density(x, dys, [])[0].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    x, (dy, _) = batch(dtype=dtype)
    ours = density(x, [dy], LENGTHS)[0]
    wide = torch.full((len(x), 3 * 123), math.nan, dtype=dtype)
    for view in (wide[:, 40:163], wide[:, ::3], wide.T.contiguous()[::3].T):
        view.copy_(dy)
        every_second = torch.full((2 * len(x), K), math.nan, dtype=dtype)[::2].copy_(x)
        out = density(every_second, [view], LENGTHS)[0]
        torch.testing.assert_close(out, ours, rtol=rounding(dtype), atol=0)  # BLAS may sum another way


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_nan_shows_in_its_own_sample_and_in_no_other(where, along):
    x, (dy, _) = batch(dtype=torch.float32)
    clean = density(x, [dy], LENGTHS, along=along)[0]
    (x if where == "x" else dy)[3, 2] = math.nan  # in sample 1
    for tile_bytes in (None, 4 * 100):
        out = density(x, [dy], LENGTHS, along=along, tile_bytes=tile_bytes)[0]
        # dW has one column (from x) or one row (from dy) of NaN
        hit = out[:, 1, 2] if (where, along) == ("dy", "row") else out[:, 1]
        assert bool(hit.isnan().all())
        assert int(out.isnan().sum()) == hit.numel()
    others = [0, 2, 3, 4, 5]
    out = density(x, [dy], LENGTHS, along=along)[0]
    assert torch.equal(out[:, others], clean[:, others])
    gram = reference.gram_l2sq(x, [dy], LENGTHS)[0].isnan()
    assert gram.tolist() == [False, True, False, False, False, False]


def test_a_factor_of_minus_four():
    x, (dy, _) = batch(dtype=torch.float32)
    once, scaled = (density(x, [s * dy], LENGTHS)[0] for s in (1, -4))
    assert torch.equal(scaled, once * torch.tensor([4.0, 16.0, 4.0], dtype=torch.float64)[:, None])


def test_the_order_of_samples_does_not_matter():
    x, (dy, _) = batch(dtype=torch.float32)
    order = [3, 5, 0, 2, 1, 4]
    parts = [[t.split(LENGTHS)[i] for i in order] for t in (x, dy)]
    moved = [LENGTHS[i] for i in order]
    ours = density(x, [dy], LENGTHS)[0]
    out = density(torch.cat(parts[0]), [torch.cat(parts[1])], moved)[0]
    torch.testing.assert_close(out, ours[:, order], rtol=rounding(torch.float32), atol=0)  # rows lie at other addresses


@pytest.mark.parametrize("chunk", [1, 500, 1 << 24])
def test_the_gram_form_equals_the_direct_form(chunk, monkeypatch):
    monkeypatch.setattr(reference, "GRAM_CHUNK", chunk)
    x, dys = batch()
    for gram, direct in zip(reference.gram_l2sq(x, dys, LENGTHS), reference.grad_density(x, dys, LENGTHS, "grad_l2sq")):
        torch.testing.assert_close(gram, direct, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gram_form_of_half_precision_is_as_exact_as_torch(dtype):
    """No further off than twice what autograd in that dtype is, by which each gradient is rounded to it."""
    lengths = [n or 2 for n in LENGTHS]
    x, dys = batch(lengths, dtype)
    for gram, dy in zip(reference.gram_l2sq(x, dys, lengths), dys):
        wanted = truth(x, dy, lengths, ("grad_l2sq",))
        rounded = [(b.T @ a).double().square().sum() for a, b in zip(x.split(lengths), dy.split(lengths))]
        error = (torch.stack(rounded) - wanted[0]).abs()
        assert bool(((gram - wanted[0]).abs() <= 2 * error + rounding(torch.float32) * wanted[0]).all())


def test_twice_the_same_bits():
    x, dys = batch(dtype=torch.bfloat16)
    for run in (
        lambda: torch.cat(density(x, dys, LENGTHS)),
        lambda: torch.cat(reference.gram_l2sq(x, dys, LENGTHS)),
    ):
        assert torch.equal(run(), run())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes or fills."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("along", ALONG)
def test_nothing_is_larger_than_a_tile_or_one_sample(dtype, along):
    generator = torch.Generator().manual_seed(0)
    lengths, tile = [3, 4, 0, 2], 4 * 1000
    x, dy = (torch.randn(9, width, generator=generator).to(dtype) for width in (190, 200))
    with Largest() as direct:
        for statistic in reference.STATISTICS:
            reference.grad_density(x, [dy], lengths, statistic, along, tile)
    out = 8 * len(lengths) * {None: 1, "row": 200}[along]
    one_sample = 4 * 200 * max(lengths) if dtype != torch.float32 else 0  # cast to fp32
    assert tile / 2 < direct.bytes <= max(tile, out, one_sample)


def test_the_gram_form_pads_no_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(reference, "GRAM_CHUNK", 1000)
    lengths = [1, 1, 8, 1, 1, 1, 0, 9, 2, 20, 1]
    x, dys = batch(lengths)
    largest = max(lengths) * 123  # the longest sample alone; its chunk would be 11 * 20 * 123 with all others in it
    with Largest() as seen:
        reference.gram_l2sq(x, dys, lengths)
    assert seen.bytes <= 8 * largest
    for first, last in reference._chunks(lengths, 130):
        longest = max(lengths[first:last])
        assert last == first + 1 or (last - first) * longest * (130 + longest) <= 1000


@pytest.mark.parametrize("shape", [(63, 123), (1, 123), (63, 1), (1, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("tile_bytes", [1, 300, 4 * 2000, None])
def test_tiles_cover_the_gradient_once(shape, tile_bytes):
    k, n = shape
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(5, k, generator=generator), torch.randn(5, n, generator=generator)
    covered = torch.zeros(n, k)
    for rows, columns, tile in reference.weight_gradient_tiles(x, dy, tile_bytes):
        assert tile.is_contiguous() and tile.nbytes <= max(4, tile_bytes or reference.TILE_BYTES_CPU)
        covered[rows, columns] += tile
        tile.fill_(math.nan)
    torch.testing.assert_close(covered, dy.T @ x, rtol=1e-5, atol=1e-5)
