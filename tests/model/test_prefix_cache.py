"""The prefix cache: exact, in every storage, each layer computed once for each sample."""

import errno
import os

import pytest
import torch
from tiny_models import ARCHITECTURES, random_samples, tiny_model

from kunbr_fast import memory
from kunbr_fast.data import pack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.prefix_cache import PrefixCache

STORAGES = ("device", "host", "file")


def count_tokens(decoder):
    """{layer: tokens that went through its attention's input projection}, filled in as the decoder runs."""
    counts = {i: 0 for i in range(decoder.num_layers)}
    handles = []
    for i, layer in enumerate(decoder.layers):

        def hook(module, args, kwargs, i=i):
            counts[i] += (args[0] if args else kwargs["hidden_states"]).shape[:-1].numel()

        handles.append(layer.mlp.register_forward_pre_hook(hook, with_kwargs=True))
    return counts, handles


def truth(decoder, sample, layer):
    with torch.no_grad():
        return decoder.run(pack([sample]), stop=layer)


@pytest.mark.parametrize(
    "storage, architecture",
    [("file", architecture) for architecture in ARCHITECTURES]
    + [
        pytest.param(storage, architecture, marks=() if architecture == "llama" else pytest.mark.slow)
        for storage in ("device", "host")
        for architecture in ARCHITECTURES
    ],
)
def test_exact_with_random_access(architecture, storage, tmp_path):
    decoder, samples = Decoder(tiny_model(architecture)), random_samples(9, low=2, high=14)
    cache = PrefixCache(decoder, samples, storage, tmp_path, batch_tokens=30)
    assert cache.storage == storage and cache.nbytes == sum(len(s["input_ids"]) for s in samples) * 32 * 8
    for layer in (0, 2, 3, 6):
        cache.advance(layer)
        assert cache.layer == layer
        for indices in ([5], [8, 0, 3], [2, 2], list(range(9)), list(reversed(range(9)))):
            batch = cache.batch(indices)
            expected = pack([samples[i] for i in indices])
            assert batch.layer == layer and batch.lengths == expected.lengths
            assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
            hidden = torch.cat([truth(decoder, samples[i], layer) for i in indices])
            torch.testing.assert_close(
                batch.hidden, hidden, rtol=1e-6 if architecture == "gemma2" else 1e-11, atol=1e-9
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_storages_hold_the_same_bits_as_the_layers_put_out(dtype, tmp_path):
    decoder, samples = Decoder(tiny_model(dtype=dtype)), random_samples(6)
    caches = [PrefixCache(decoder, samples, s, tmp_path, batch_tokens=10_000) for s in STORAGES]
    for layer in (0, 1, 5):
        with torch.no_grad():
            whole = decoder.run(pack(samples), stop=layer)
        for cache in caches:
            cache.advance(layer)
            hidden = cache.batch(range(6)).hidden
            assert hidden.dtype == dtype and torch.equal(hidden, whole)


def test_rolling_is_the_same_bits_as_from_scratch():
    decoder, samples = Decoder(tiny_model("qwen3")), random_samples(8)
    rolled = PrefixCache(decoder, samples, batch_tokens=25)
    for layer in range(7):
        rolled.advance(layer)
        fresh = PrefixCache(decoder, samples, batch_tokens=25)
        fresh.advance(layer)
        assert torch.equal(rolled.batch(range(8)).hidden, fresh.batch(range(8)).hidden)


def test_each_layer_runs_once_for_each_sample_in_a_whole_run():
    decoder, samples = Decoder(tiny_model()), random_samples(10)
    tokens = sum(len(s["input_ids"]) for s in samples)
    counts, handles = count_tokens(decoder)
    cache = PrefixCache(decoder, samples, batch_tokens=20)
    assert len(cache._batches) > 2
    for layer in (1, 3, 3, 4):  # asking again for the same layer is free
        cache.advance(layer)
        for i in range(10):
            cache.batch([i, (3 * i) % 10])
    for handle in handles:
        handle.remove()
    assert counts == {0: tokens, 1: tokens, 2: tokens, 3: tokens, 4: 0, 5: 0}


def test_going_back_starts_again_through_what_is_in_place():
    decoder, samples = Decoder(tiny_model()), random_samples(5)
    cache = PrefixCache(decoder, samples)
    cache.advance(4)
    with torch.no_grad():
        decoder.layers[1].mlp.up_proj.weight.mul_(1.5)
    stale = cache.batch(range(5)).hidden
    cache.advance(3)  # back: recomputed
    assert torch.equal(cache.batch(range(5)).hidden, decoder.run(pack(samples), stop=3).detach())
    cache.reset()
    assert cache.layer == 0
    cache.advance(4)
    assert not torch.equal(cache.batch(range(5)).hidden, stale)


def test_a_batch_is_a_copy():
    decoder, samples = Decoder(tiny_model()), random_samples(3)
    cache = PrefixCache(decoder, samples, "host")
    cache.advance(2)
    before = cache.batch([1]).hidden.clone()
    cache.batch([1]).hidden.zero_()
    assert torch.equal(cache.batch([1]).hidden, before)
    assert not cache.batch([1]).hidden.requires_grad


def test_an_interrupted_advance_is_not_taken_for_a_finished_one():
    """After Ctrl-C some samples are at the new layer and some at the old one: no batch may come from that."""
    decoder, samples = Decoder(tiny_model()), random_samples(8)
    cache = PrefixCache(decoder, samples, batch_tokens=20)
    cache.advance(1)
    seen = []

    def interrupt(*args):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    handle = decoder.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.advance(3)
    handle.remove()
    with pytest.raises(ValueError, match="interrupted.*advance"):
        cache.batch([0])
    cache.advance(3)
    fresh = PrefixCache(decoder, samples, batch_tokens=20)
    fresh.advance(3)
    assert torch.equal(cache.batch(range(8)).hidden, fresh.batch(range(8)).hidden)


def test_the_file_is_gone_and_does_not_come_back(tmp_path):
    decoder, samples = Decoder(tiny_model()), random_samples(4)
    cache = PrefixCache(decoder, samples, "file", tmp_path)
    assert list(tmp_path.iterdir()) == []
    cache.advance(3)
    assert list(tmp_path.iterdir()) == [] and bool(cache.batch([0]).hidden.isfinite().all())
    mapped = open("/proc/self/maps").read()
    assert f"{tmp_path}/prefix-cache-" in mapped and "(deleted)" in mapped  # it really is a file
    del cache
    assert f"{tmp_path}/prefix-cache-" not in open("/proc/self/maps").read()


def test_too_little_disk_is_an_error_at_once(tmp_path, monkeypatch):
    decoder, samples = Decoder(tiny_model()), random_samples(4)

    def full(handle, offset, size):
        assert size == sum(len(s["input_ids"]) for s in samples) * 32 * 8
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as error:
        PrefixCache(decoder, samples, "file", tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert f"GiB in {tmp_path}: No space left on device; free space there" in str(error.value)
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == handles


def test_auto_takes_the_file_when_memory_is_short(tmp_path, monkeypatch):
    decoder, samples = Decoder(tiny_model()), random_samples(4)
    need = sum(len(s["input_ids"]) for s in samples) * 32 * 8
    for free, expected in ((4 * need, "host"), (4 * need - 1, "file")):
        monkeypatch.setattr(memory, "free_host_bytes", lambda free=free: free)
        assert PrefixCache(decoder, samples, "auto", tmp_path).storage == expected


def test_refusals(tmp_path):
    model = tiny_model()
    decoder, samples = Decoder(model), random_samples(2)
    with pytest.raises(ValueError, match="storage='disk': expected one of auto, device, host, file"):
        PrefixCache(decoder, samples, "disk")
    for storage in STORAGES:
        with pytest.raises(ValueError, match="no samples"):
            PrefixCache(decoder, [], storage, tmp_path)
    cache = PrefixCache(decoder, samples)
    for layer in (-1, 7):
        with pytest.raises(ValueError, match=f"layer {layer}: expected 0 to 6"):
            cache.advance(layer)
    with pytest.raises(ValueError, match="an empty batch"):
        cache.batch([])
    for index in (2, -1):
        with pytest.raises(IndexError):
            cache.batch([0, index])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        PrefixCache(decoder, samples)
