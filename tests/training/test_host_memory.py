"""What can lie in main memory: the optimiser's state and the block, with the same bits; the prefix cache, with a
budget."""

import collections
import dataclasses
import functools
import math

import pytest
import torch
from reinsertion_problem import BLOCK, FORGET, RETAIN, equal, identity, in_block, touched_model, weights
from tiny_models import moved, random_samples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import kunbr_fast as kf
from kunbr_fast import memory
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.sample_rows import RowFormat
from kunbr_fast.training.approximation import cosine
from kunbr_fast.values import parse_bytes

# ---------------------------------------------------------------- the optimiser on the host


def mask_of(model):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters() if "mlp" in n}


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize(
    "dtype, master",
    [(torch.bfloat16, "fp32"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "none")]
    + [pytest.param(dtype, "fp32", marks=pytest.mark.slow) for dtype in (torch.float64, torch.float32)],
)
def test_same_bits_as_on_the_device(dtype, master, optimizer, masked):
    """Also across: what one writes down, the other goes on from."""
    settings = dict(lr=1e-2, optimizer=optimizer, master_weights=master, weight_decay=0.1)
    original = tiny_model(dtype=dtype)
    unlearned = weights(moved(original))
    settings |= {"mask": mask_of(original)} if masked else {}
    results, halves = [], {}
    for where in ("device", "host"):
        mine = dict(unlearned)
        with kf.reinserted(original, mine, BLOCK, optimizer_device=where, **settings) as training:
            for step in range(4):
                if step == 2:
                    halves[where] = copied(training.state())
                training.step(FORGET, RETAIN)
            assert training.flat.on_host == (where == "host")
            results.append((copied(training.state()), mine))
    (state, ours), (other, theirs) = results
    assert equal(state, other) and equal(ours, theirs)
    assert [list(s) for s in (state, halves["host"])] == [list(other), list(halves["device"])]
    for where, other in (("device", "host"), ("host", "device")):
        mine = dict(unlearned)
        with kf.reinserted(original, mine, BLOCK, optimizer_device=where, **settings) as training:
            training.load_state(halves[other], 2)
            for _ in range(2):
                training.step(FORGET, RETAIN)
            assert equal(training.state(), state)
        assert equal(mine, ours)


class Copies(TorchDispatchMode):
    """Counts copies between storages that are named."""

    def __init__(self, **places):
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in places.items()}
        assert len(self.names) == len(places), "two of them share their memory"
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            into, source = (self.names.get(x.untyped_storage().data_ptr()) for x in args[:2])
            self.seen[source, into] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_copies_the_gradient_there_and_the_weights_back(dtype):
    """On a CPU both are main memory, but apart: what the update uses shares no memory with what the model uses."""
    original = tiny_model(dtype=dtype)
    with kf.reinserted(original, weights(moved(original)), BLOCK, lr=1e-2, optimizer_device="host") as training:
        flat = training.flat
        updated = flat._updated
        with Copies(grad=flat.grad, weights=flat.weights, host_grad=flat._update_grad, updated=updated) as copies:
            for _ in range(3):
                training.step(FORGET, RETAIN)
        there_and_back = {k: v for k, v in copies.seen.items() if None not in k}
        assert there_and_back == {("grad", "host_grad"): 3, ("updated", "weights"): 3}
        on_device = {flat.weights.data_ptr(), flat.grad.data_ptr()}
        update = [flat.param, flat._update_grad, updated, *training.optimizer.state[flat.param].values()]
        assert not on_device & {x.data_ptr() for x in update if isinstance(x, torch.Tensor)}
        assert torch.equal(flat.weights, updated) and not flat.grad.any()


@pytest.mark.parametrize("insertion", ["independent", "cumulative"])
def test_the_original_block_waits_on_the_host(insertion):
    original = touched_model()
    unlearned = moved(original)
    before, was = weights(original), identity(original)
    data = {name: p.data for name, p in original.named_parameters()}
    with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, optimizer_device="host", insertion=insertion) as training:
        for name, tensor in data.items():
            assert tensor.untyped_storage().nbytes() == (0 if in_block(name) else tensor.nbytes), name
        training.step(FORGET, RETAIN)
    trained, now = weights(unlearned), weights(original)
    for name in now:
        kept = insertion == "independent" or not in_block(name)
        assert torch.equal(now[name], before[name] if kept else trained[name]), name
    # its objects, flags and gradients are as before; only where its bytes lie may have changed
    ours = identity(original)
    assert [(n, p, flag, grad) for n, p, _, flag, grad in ours[0]] == [(n, p, f, g) for n, p, _, f, g in was[0]]
    assert ours[1:] == was[1:] and all(p.data.data_ptr() == data[n].data_ptr() for n, p in original.named_parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_original_block_comes_back_after_an_exception(error):
    original = tiny_model()
    before = weights(original)
    with pytest.raises(error):
        with kf.reinserted(original, weights(moved(original)), BLOCK, lr=1e-3, optimizer_device="host") as training:
            training.step(FORGET, RETAIN)
            raise error
    assert equal(weights(original), before)
    with pytest.raises(ValueError, match="betas"):
        with kf.reinserted(original, weights(moved(original)), BLOCK, lr=1e-3, betas=(2, 2), optimizer_device="host"):
            pass
    assert equal(weights(original), before)


def test_memory_that_others_may_look_at_stays():
    original = tiny_model()
    name = f"model.layers.{BLOCK.start}.mlp.up_proj.weight"
    parameter = original.get_parameter(name)
    shared = torch.zeros(2 * parameter.numel(), dtype=parameter.dtype)
    shared[: parameter.numel()].copy_(parameter.data.flatten())
    parameter.data = shared[: parameter.numel()].view(parameter.shape)
    expected = shared.clone()
    with kf.reinserted(original, weights(moved(original)), BLOCK, lr=1e-3, optimizer_device="host") as training:
        training.step(FORGET, RETAIN)
        assert torch.equal(shared, expected) and name not in training._away and training._away
    assert torch.equal(shared, expected)


def test_the_originals_values_are_measured_with_the_block_that_is_away():
    original = tiny_model()
    found = []
    for where in ("device", "host"):
        mine = weights(moved(original))
        with kf.reinserted(original, mine, BLOCK, lr=1e-3, objective="npo", optimizer_device=where) as training:
            found.append([training.step(FORGET, RETAIN) for _ in range(3)])
        found.append(mine)
    assert found[0] == found[2] and equal(found[1], found[3])


def test_refusals_of_the_optimiser():
    original = tiny_model()
    with pytest.raises(ValueError, match="optimizer_device='cpu': expected one of device, host"):
        with kf.reinserted(original, weights(original), BLOCK, lr=1e-3, optimizer_device="cpu"):
            pass
    with pytest.raises(ValueError, match="optimizer_device='gpu': expected one of device, host"):
        kf.KUnBRConfig(optimizer_device="gpu")


# ---------------------------------------------------------------- the prefix cache in fewer bytes


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_in_fp8(size, dtype):
    """e4m3: three bits after the first one, down to 2^-6 of the scale; below that steps of 2^-9 of it."""
    x = torch.randn(50, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:25] *= torch.logspace(-20, 20, 25, dtype=torch.float64)[:, None]
    x[30, 3] = 1e4  # one large value
    x[31] = 0
    x[32] = 1e-45
    x = x.to(dtype)
    rows = RowFormat("fp8", size, dtype)
    assert not rows.exact and rows.width == -(-size // 4) * 4 + 4
    held = rows.encode(x)
    assert held.dtype == torch.uint8 and held.shape == (50, rows.width)
    back = rows.decode(held)
    assert back.dtype == dtype and back.shape == x.shape and not back[31].any()
    scale = x.double().abs().amax(1, keepdim=True) / 448
    own = torch.finfo(dtype).eps / 2
    bound = x.double().abs() * (2**-4 * 1.01 + own) + scale * 2**-10 * 1.01 + 1e-44
    assert bool(((back.double() - x.double()).abs() <= bound).all())
    largest = x.double().abs().argmax(1, keepdim=True)
    close = (back.double() / x.double()).gather(1, largest)[:25]
    torch.testing.assert_close(close, torch.ones_like(close), rtol=max(1e-6, own), atol=0)  # it is 448 itself
    assert not rows.decode(rows.encode(torch.full((1, size), math.nan, dtype=dtype))).isfinite().any()


# measured at layer 2 of this model: 0.0029 and 0.044, with a cosine of 0.999994 and 0.998; each advance rounds once
# more
@pytest.mark.parametrize("dtype, nbytes, error", [("none", 4, 0.0), ("bf16", 2, 0.004), ("fp8", 1 + 4 / 32, 0.05)])
@pytest.mark.parametrize("storage", ["device", "file"])
def test_a_smaller_cache_and_its_error(dtype, nbytes, error, storage, tmp_path):
    original = tiny_model(dtype=torch.float32)
    decoder, samples = Decoder(original), random_samples(9, low=4, high=14)
    cache = PrefixCache(decoder, samples, storage, tmp_path, batch_tokens=30, dtype=dtype)
    assert cache.nbytes == sum(len(s["input_ids"]) for s in samples) * 32 * nbytes
    assert cache.is_exact == (dtype == "none")
    for layer in (0, 1, 2):
        cache.advance(layer)
        found = cache.relative_error(range(9))
        assert found <= error + 1e-7 and (found > error / 20 or error == 0), (layer, found)
        assert cache.batch([3]).hidden.dtype == torch.float32
    gradients = []
    with kf.reinserted(decoder, weights(moved(original)), BLOCK, lr=1e-3) as training:
        batch = cache.batch(range(9))
        for hidden in (batch.hidden, cache.exact(range(9))):
            training.accumulate(training.criterion.step_batch(dataclasses.replace(batch, hidden=hidden), 4))
            gradients.append(training.flat.grad.clone())
            training.drop_gradient()
    found = cosine(*gradients)
    assert found >= 1 - error**2 * 4 - 1e-6 and (found < 1 or dtype == "none"), found


# ---------------------------------------------------------------- a budget


def schedule_of(num_forget=20, num_retain=60, epochs=4):
    """The places of each step's samples, as a run makes them."""
    schedule = Schedule(num_forget, num_retain, 4, 4, epochs, seed=5)
    return [[*f, *(num_forget + i for i in r)] for f, r in (schedule[n] for n in range(len(schedule)))]


def lru_hits(batches, room):
    held, hits = collections.OrderedDict(), 0
    for i in (i for batch in batches for i in batch):
        hits += i in held
        held[i] = held.pop(i, None)
        if len(held) > room:
            held.popitem(last=False)
    return hits


def most_hits(batches, room):
    """The most that any policy reaches which may let a sample by: intervals between two uses of a sample, of which at
    most `room` may overlap (of intervals that end first, as many as fit: that choice is optimal)."""
    uses = [i for batch in batches for i in batch]
    last, intervals = {}, []
    for time, i in enumerate(uses):
        if i in last:
            intervals.append((time, last[i]))
        last[i] = time
    busy, hits = [0] * len(uses), 0
    for stop, start in sorted(intervals):
        if all(busy[t] < room for t in range(start, stop)):
            hits += 1
            for t in range(start, stop):
                busy[t] += 1
    return hits


@pytest.mark.parametrize("storage, slower", [("device", "host"), ("host", "file")])
def test_a_budget_is_exact_and_better_than_least_recently_used(storage, slower, tmp_path, monkeypatch):
    decoder = Decoder(tiny_model())
    samples, batches, room = random_samples(80, low=6, high=6), schedule_of(), 25
    size = 6 * 32 * 8
    plain = PrefixCache(decoder, samples)
    cache = PrefixCache(decoder, samples, storage, tmp_path, budget=room * size + 100)
    assert (cache.fast, cache.storage) == (storage, slower)
    for number, layer in enumerate((1, 3)):
        for each in (plain, cache):
            each.advance(layer)
        cache.expect(batches)
        for indices in batches:
            assert torch.equal(cache.batch(indices).hidden, plain.batch(indices).hidden)
            held = {i: part.nbytes for i, part in cache._held.items()}
            assert sum(held.values()) == cache._held_bytes <= cache.budget
        assert len(held) <= room and cache.hits + cache.misses == (number + 1) * sum(map(len, batches))
    hits, lru, best = cache.hits / 2, lru_hits(batches, room), most_hits(batches, room)
    assert hits == best > 3 * lru, (hits, lru, best)


def test_samples_of_all_lengths_steps_left_out_and_batches_that_nobody_told_of(tmp_path):
    decoder, samples, batches = Decoder(tiny_model()), random_samples(80, low=2, high=30), schedule_of()
    plain = PrefixCache(decoder, samples)
    cache = PrefixCache(decoder, samples, "host", tmp_path, budget=plain.nbytes // 3)
    for each in (plain, cache):
        each.advance(2)
    cache.expect(batches)
    asked = [*batches[7:12], [3, 3, 79], *batches[12:15], [0], *batches[17:]]  # resumed, and others between
    for indices in asked:
        assert torch.equal(cache.batch(indices).hidden, plain.batch(indices).hidden)
        assert sum(part.nbytes for part in cache._held.values()) == cache._held_bytes <= cache.budget
    assert cache.hits > lru_hits(asked, 27)
    # without a plan what came first stays
    cache.expect([])
    assert not cache._held
    for indices in batches[:10]:
        assert torch.equal(cache.batch(indices).hidden, plain.batch(indices).hidden)
        assert cache._held_bytes <= cache.budget
    assert set(cache._held) >= set(batches[0])
    cache.advance(4)
    plain.advance(4)
    for indices in batches[:3]:  # nothing of the layer below is left in the fast place
        assert torch.equal(cache.batch(indices).hidden, plain.batch(indices).hidden)


@pytest.mark.parametrize(
    "batches, asked, hits",
    [
        ([0, 1, 2, 0, 1, 0, 1, 2], range(8), 4),  # 2 is used after both that are there: it is not let in
        ([0, 1, 0, 1, 2, 3, 2, 3], (0, 1, 4, 5, 6, 7), 2),  # 0 and 1 will not be used again: they give way
    ],
)
def test_what_gives_way(batches, asked, hits, tmp_path):
    decoder, samples = Decoder(tiny_model()), random_samples(4, low=6, high=6)
    cache = PrefixCache(decoder, samples, "host", tmp_path, budget=2 * 6 * 32 * 8)
    cache.expect([[i] for i in batches])
    for number in asked:
        cache.batch([batches[number]])
    assert (cache.hits, cache.misses) == (hits, len(asked) - hits)


def test_where_a_budget_puts_things(tmp_path, monkeypatch):
    decoder, samples = Decoder(tiny_model()), random_samples(6)
    need = sum(len(s["input_ids"]) for s in samples) * 32 * 8
    make = functools.partial(PrefixCache, decoder, samples, directory=tmp_path)
    assert (make("host", budget=need).fast, make("host", budget=need).storage) == (None, "host")
    assert (make("auto", budget=need - 1).fast, make("auto", budget=need - 1).storage) == ("host", "file")
    assert (make("device", budget=0).fast, make("device", budget=0).storage) == ("device", "host")
    assert make("file", budget=need).storage == "file"
    monkeypatch.setattr(memory, "free_host_bytes", lambda: need)
    assert make("device", budget=need - 1).storage == "file"  # no room in main memory either
    with pytest.raises(ValueError, match="a budget of .* GiB for a prefix cache of .* in a file: there is no slower"):
        make("file", budget=need - 1)
    with pytest.raises(ValueError, match="cache dtype 'int4': expected one of none, bf16, fp8"):
        make("host", dtype="int4")


def test_bytes():
    given = {"8GiB": 8 * 2**30, "1.5 MB": 1_500_000, "2k": 2000, "77": 77, "10 b": 10, 5: 5, 0: 0}
    assert {text: parse_bytes(text, "x") for text in given} == given and parse_bytes(None, "x") is None
    for text in ("much", "-1", -1, "3 parsecs", "", "GiB"):
        with pytest.raises(ValueError, match=f"cache_bytes={text!r}: expected bytes, such as 8GiB"):
            kf.KUnBRConfig(cache_bytes=text)
    with pytest.raises(ValueError, match="no place is slower than cache=file"):
        kf.KUnBRConfig(cache_bytes="1GB", cache="file")


# ---------------------------------------------------------------- a whole run

SETTINGS = dict(
    num_blocks=3, top_k=2, batch_size=3, warmup_epochs=1, warmup_lr=1e-3, block_epochs=2, block_lr=1e-3, rtt=False,
    skip_last_layers=1,
)  # fmt: skip


def run(tmp_path=None, **settings):
    model, said = tiny_model(), []
    forget, retain = random_samples(7, seed=1), random_samples(9, seed=2)
    config = kf.KUnBRConfig(**SETTINGS, **settings)
    report = kf.unlearn(model, forget, retain, config, progress=False, on_stage=said.append)
    return report, weights(model), said


def test_a_run_with_all_of_it_on_the_host_or_beyond_a_budget_has_the_same_bits(monkeypatch):
    plain, expected, _ = run()
    told, real = [], PrefixCache.expect

    def expect(self, batches):
        told.append(list(batches))
        real(self, told[-1])

    monkeypatch.setattr(PrefixCache, "expect", expect)
    report, found, _ = run(optimizer_device="host", cache="host", cache_bytes="6kB")
    assert equal(found, expected) and report.losses == plain.losses
    assert "cache_errors" not in plain.to_dict()
    assert [len(batches) for batches in told] == [0, 6, 6]  # the steps of two blocks


def test_a_run_with_a_smaller_cache_says_what_that_makes():
    report, found, said = run(cache_dtype="fp8")
    errors = report.to_dict()["cache_errors"]
    assert [name.split(".")[0] for name in errors] == ["blocks", "blocks"]
    for error in errors.values():
        assert 0 <= error["relative_error"] < 0.06 and 0.98 < error["gradient_cosine"] <= 1
    assert any(error["relative_error"] > 0.005 and error["gradient_cosine"] < 1 for error in errors.values())
    assert sum(text.startswith("prefix cache in fp8: a relative error of") for text in said) == 2
    assert not equal(found, run()[1])
