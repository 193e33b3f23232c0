"""The cover of a streamed model in low precision: on the device, read once, with the bits of the model in memory."""

import importlib.util

import pytest
import torch
from streamed_models import folders_of_models, streamed, whole
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.model import low_precision
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.weights import weights_of
from kunbr_fast.training.approximation import gradient_cosine

NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)
BLOCK, ABOVE = range(1, 3), {3, 4, 5}
FORGET, RETAIN = random_samples(4, seed=1), random_samples(5, seed=2)
HOW = dict(lr=1e-3, optimizer="adamw", micro_batch_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_of_models(tmp_path_factory)


def values_of(architecture="llama"):
    return {name: p.detach().clone() for name, p in tiny_model(architecture, torch.float32, 1).named_parameters()}


def in_place(decoder, layers):
    """The names of the parameters that are no placeholders."""
    found = []
    for index in layers:
        for name, p in decoder.layers[index].named_parameters():
            if set(p.stride()) != {0}:
                found.append(name)
            else:
                assert p.flatten()[0].isnan()
    return found


@pytest.mark.parametrize(
    "precision, architecture, dtype, insertion",
    [
        ("int8", "llama", None, "independent"),
        ("fp8", "gpt2", None, "independent"),  # Conv1D, biases
        pytest.param(*NF4.values, "llama", None, "independent", marks=NF4.marks),
        ("int8", "gemma2", "bfloat16", "cumulative"),
    ],
)
def test_the_bits_of_the_model_in_memory(precision, architecture, dtype, insertion, folder):
    settings, found = dict(HOW, insertion=insertion, cover_precision=precision), []
    for opening in (whole, streamed):
        model, values = opening(folder(architecture), dtype), values_of(architecture)
        with kf.reinserted(model, values, BLOCK, **settings) as training:
            step = training.criterion.pack(FORGET, RETAIN)
            before = gradient_cosine(training, step)
            metrics = [training.step(FORGET, RETAIN) for _ in range(3)]
            after = gradient_cosine(training, step)
            nbytes = training.cover.nbytes
        with torch.no_grad():
            logits = Decoder(model).logits(pack(FORGET))
        found.append((values, metrics, before, after, nbytes, logits))
    ours, truth = found[1], found[0]
    assert all(torch.equal(ours[0][name], truth[0][name]) for name in truth[0])
    assert ours[1:5] == truth[1:5] and 0.97 < ours[2] < 1 and ours[2] != ours[3]
    assert torch.equal(ours[5], truth[5])


def test_a_layer_of_the_cover_is_read_once_and_steps_read_nothing(folder):
    decoder = Decoder(streamed(folder()))
    stream, cache = decoder.weights, PrefixCache(decoder, FORGET + RETAIN)
    cache.advance(BLOCK.start)
    stream.release()
    stream.loads.clear()
    stream.reads.clear()
    with kf.reinserted(decoder, values_of(), BLOCK, cover_precision="int8", **HOW) as training:
        assert stream.loads == stream.reads == dict.fromkeys(ABOVE, 1)
        others = in_place(decoder, ABOVE)
        assert len(others) == 2 * 3 and all("norm" in name for name in others)  # no dense weight
        batch = cache.batch(range(len(FORGET + RETAIN)))
        step = training.criterion.step_batch(batch, len(FORGET))
        for _ in range(3):
            training.step_packed(step)
        assert stream.loads == dict.fromkeys(ABOVE, 1) and "_slots" not in stream.__dict__  # nor a buffer
        gradient_cosine(training, step)  # up and down, once in all at the turn, where two buffers hold two layers
        assert dict(stream.loads) == {3: 3, 4: 2, 5: 2} and in_place(decoder, ABOVE) == others
        training.step_packed(step)
        assert dict(stream.loads) == {3: 3, 4: 2, 5: 2} and "_slots" not in stream.__dict__
        training.step(FORGET, RETAIN)  # no cache: the layers below the block run
        assert dict(stream.loads) == {0: 1, 3: 3, 4: 2, 5: 2}


def test_nothing_is_left_behind(folder, monkeypatch):
    model = streamed(folder())
    decoder, stream = Decoder(model), weights_of(model)
    with torch.no_grad():
        before = decoder.logits(pack(FORGET))

    def untouched():
        stream.release()
        assert not in_place(decoder, range(6)) and not stream._held
        assert not any("forward" in module.__dict__ for module in model.modules())
        with torch.no_grad():
            assert torch.equal(decoder.logits(pack(FORGET)), before)

    def training():
        return kf.reinserted(decoder, values_of(), BLOCK, cover_precision="int8", **HOW)

    with pytest.raises(KeyError, match="stop"):
        with training():
            raise KeyError("stop")
    untouched()
    with training() as inside:
        with pytest.raises(KeyError, match="stop"):
            with inside.cover.exact():
                raise KeyError("stop")
        with pytest.raises(RuntimeError, match="re-insertion: this model's cover is in int8 now"):
            with training():
                raise AssertionError
        inside.step(FORGET, RETAIN)
    untouched()
    real, calls = low_precision.quantize, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 9:  # in the second layer
            raise MemoryError("no")
        return real(*args)

    monkeypatch.setattr(low_precision, "quantize", fails)
    with pytest.raises(MemoryError):
        with training():
            raise AssertionError
    untouched()


def test_what_it_cannot_take_is_named(folder):
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\w+: low precision takes .* not weight of MixtralTop"):
        with kf.reinserted(streamed(folder("mixtral")), {}, range(0, 1), lr=1e-3, cover_precision="int8"):
            raise AssertionError
