"""Streamed models and the layer-major schedule: the bits of the model in memory, and what is read when."""

import contextlib
import copy
import json
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny_text
import torch
from helpers import python, rarely
from safetensors.torch import load_file
from streamed_models import HEADROOM, changed, memory, streamed, whole, write_large
from tiny_models import MIXTURES, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.streamed import LayerMajor
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import check_finite, weights_of
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.layer_states import LayerStates
from kunbr_fast.objectives.methods import OBJECTIVES
from kunbr_fast.objectives.original import OriginalValues, Parts
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.micro_batches import micro_batches, rows_of
from kunbr_fast.training.streamed import LayerMajorTraining

BLOCK = range(1, 3)
FORGET, RETAIN = random_samples(4, seed=1), random_samples(5, seed=2)
SAMPLES = FORGET + RETAIN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(architecture, seed): a directory with that random model, fp32, in several files."""
    made = {}

    def make(architecture="llama", seed=0):
        if (architecture, seed) not in made:
            path = tmp_path_factory.mktemp(f"{architecture}-{seed}")
            tiny_model(architecture, torch.float32, seed).save_pretrained(path, max_shard_size="70KB")
            assert len(list(path.glob("*.safetensors"))) > 2
            made[architecture, seed] = path
        return made[architecture, seed]

    return make


def layers_of(model):
    return find_layers(model)[1]


def is_placeholder(parameter):
    return set(parameter.stride()) == {0} and bool(parameter.flatten()[:1].isnan())


def state(model):
    """What a call may not change."""
    return (
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()],
        set(weights_of(model)._held),
    )


# ---------------------------------------------------------------- opening and running


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt2", "gpt_neox", *MIXTURES])
def test_the_same_outputs_as_the_whole_model(architecture, folder):
    """Tied embeddings, sliding layers, layers of different kinds and sizes, other names in the files, experts apart."""
    path, batch = folder(architecture), pack(SAMPLES)
    for dtype in (None, "float64") if architecture in MIXTURES else (None, "bfloat16", "float64"):
        ours, truth = streamed(path, dtype), whole(path, dtype)
        assert [(n, p.shape, p.dtype, p.device) for n, p in ours.named_parameters()] == [
            (n, p.shape, p.dtype, p.device) for n, p in truth.named_parameters()
        ]
        for (name, a), (other, b) in zip(ours.named_buffers(), truth.named_buffers(), strict=True):
            assert name == other and a.dtype == b.dtype and torch.equal(a, b)
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
        stream = weights_of(ours)
        assert not stream.loads and all(is_placeholder(p) for p in layers_of(ours).parameters())
        decoder, other = Decoder(ours), Decoder(truth)
        assert decoder.device == other.device and decoder.dtype == other.dtype
        with torch.no_grad():
            ids = batch.input_ids[None, :9]
            assert torch.equal(ours(input_ids=ids).logits, truth(input_ids=ids).logits)
            assert torch.equal(decoder.logits(batch), other.logits(batch))
            hidden = other.run(batch, stop=1)
            assert torch.equal(*(d.logits(batch, batch.rows, Stretch(1, hidden)) for d in (decoder, other)))
        assert sum(any(not is_placeholder(p) for p in layer.parameters()) for layer in layers_of(ours)) <= 2
        stream.release()
        assert all(is_placeholder(p) for p in layers_of(ours).parameters())
        check_finite(ours)  # what is in memory


def test_one_file_and_a_base_models_file(tmp_path):
    model = tiny_model("gpt2", torch.float32)
    model.save_pretrained(tmp_path / "one")
    model.transformer.save_pretrained(tmp_path / "base")  # its tensors are named "h.0...", not "transformer.h.0..."
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    batch = pack(SAMPLES)
    for name in ("one", "base"):
        with torch.no_grad():
            assert torch.equal(Decoder(streamed(tmp_path / name)).logits(batch), Decoder(model).logits(batch))


def test_buffers_are_bounded_and_layers_of_any_size_fit_them(folder):
    path = folder("qwen2_moe")  # layer 1 is dense and the others are not
    model = streamed(path, buffers=2)
    stream = weights_of(model)
    sizes = stream._sizes[:3]
    assert sizes[0] != sizes[1] and stream.nbytes == 2 * max(sizes)
    assert weights_of(streamed(path, buffers=9)).nbytes == 3 * max(sizes)  # no more than there are layers


def test_what_comes_next_is_being_read(folder):
    model = streamed(folder(), buffers=3)
    stream = weights_of(model)
    held = [{0, 1, 2}, {1, 2, 3}, {2, 3, 5}, {2, 3, 5}, {2, 5, 0}, {2, 5, 0}, {2, 5, 0}]
    for layer, expected in zip(stream.visit([0, 1, 2, 3, 2, 5, 0]), held):
        assert {slot.layer for slot in stream._slots} == expected
        assert not any(is_placeholder(p) for p in layers_of(model)[layer].parameters())
    assert stream.loads == Counter({i: 1 for i in (0, 1, 2, 3, 5)} | {0: 2})


def test_layers_that_stay_in_main_memory(folder):
    path, batch, name = folder(), pack(SAMPLES), "model.layers.1.mlp.up_proj.weight"
    size = weights_of(streamed(path))._sizes[0]
    for kept in (0, 3, 6):
        model = streamed(path, host_bytes=kept * size + 10)
        decoder, stream = Decoder(model), weights_of(model)
        with torch.no_grad():
            assert torch.equal(decoder.logits(batch), Decoder(whole(path)).logits(batch))
        assert set(stream.host) == set(range(kept))
        # the self-check goes down where the model's forward came up: two layers are still there, at either end
        loads = {0: 3, 1: 3, 2: 4, 3: 4, 4: 3, 5: 3}
        assert stream.loads == loads
        assert stream.reads == {i: 1 if i < kept else loads[i] for i in range(6)}
        stream[name] = torch.zeros_like(stream[name])
        with torch.no_grad():
            decoder.logits(batch)
        assert stream.reads[1] == (2 if kept else 4) and not stream[name].any()


def test_a_layer_is_read_once_for_all_samples_of_a_prefix_cache(folder):
    decoder, other = Decoder(streamed(folder())), Decoder(whole(folder()))
    stream = decoder.weights
    stream.release()
    stream.loads.clear()
    ours, truth = (PrefixCache(d, SAMPLES, batch_tokens=20) for d in (decoder, other))
    for layer in (1, 3, 3, 5):
        for cache in (ours, truth):
            cache.advance(layer)
        assert torch.equal(ours.batch(range(9)).hidden, truth.batch(range(9)).hidden)
        assert stream.loads == {i: 1 for i in range(layer)}


def test_accuracy_of_a_streamed_model(tmp_path):
    tiny_text.workspace(tmp_path)
    questions = [{**tiny_text.question(name), "_where": "here"} for name in tiny_text.NAMES]
    tokenizer = load_tokenizer(tmp_path / "model")
    ours, truth = (
        choice_accuracy(Decoder(open(tmp_path / "model")), tokenizer, questions) for open in (streamed, whole)
    )
    assert ours == truth


def test_the_order_of_copies_on_a_device(folder, monkeypatch):
    """No GPU here: with stand-ins for streams and events the device's path runs, and what it waits for is written down.

    For each load: `free` is recorded on the compute stream before the buffer's copy is ordered; the copy stream waits
    for it, copies, records `arrived`; the compute stream waits for that before the layer runs; and the pinned buffer
    is not written again before `arrived`.
    """
    log = []

    class Event:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            log.append(("host waits", self.name))

        def record(self, stream):
            log.append((stream.name, "records", self.name))

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append((self.name, "waits", event.name))

        def record_event(self):
            event = Event(f"free {len(log)}")
            log.append((self.name, "records", event.name))
            return event

    model, compute = streamed(folder()), Stream("compute")
    stream = weights_of(model)
    for number, slot in enumerate(stream._slots):
        slot.staging, slot.arrived = torch.empty_like(slot.data), Event(f"arrived {number}")
    stream.copies.cuda, stream.copies.inward = True, Stream("copies")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with torch.no_grad():
        ids = pack(SAMPLES).input_ids[None, :9]
        assert torch.equal(model(input_ids=ids).logits, whole(folder())(input_ids=ids).logits)
    assert stream.loads == {i: 1 for i in range(6)}
    for number in (0, 1):
        arrived = f"arrived {number}"
        mine = [entry for entry in log if entry[-1] == arrived]
        assert mine == [("host waits", arrived), ("copies", "records", arrived), ("compute", "waits", arrived)] * 3
    frees = [entry[2] for entry in log if entry[2:] and entry[2].startswith("free") and entry[0] == "compute"]
    assert len(set(frees)) == 6
    for free in frees:
        assert log.index(("compute", "records", free)) < log.index(("copies", "waits", free))
    used = ("compute", "waits", "arrived 0")  # the second time layer 2's buffer is filled, layer 0 has been launched
    assert log.index(used) < [i for i, entry in enumerate(log) if entry == ("copies", "records", "arrived 0")][1]
    log.clear()
    stream.release()  # afterwards the memory that a copy comes from may be given away
    assert log == [("host waits", "arrived 0"), ("host waits", "arrived 1")]


def test_a_buffer_is_not_given_away_before_its_copy_has_ended(folder, monkeypatch):
    """`release` lets go of a buffer that the copy stream may still write to, so the allocator must know that stream."""

    class Buffer(torch.Tensor):
        def record_stream(self, stream):
            used.append((self.data_ptr(), stream))

    stream, copies, used, empty = weights_of(streamed(folder())), (object(), object()), [], torch.empty
    stream.copies.cuda, (stream.copies.inward, stream.copies.outward) = True, copies
    monkeypatch.setattr(torch.cuda, "Event", object)
    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None, pin_memory=False, **how: empty(*size, **how).as_subclass(Buffer)
    )
    slots = stream._slots
    assert len(slots) == 2 and used == [(slot.data.data_ptr(), stream) for slot in slots for stream in copies]
    assert not {place for place, _ in used} & {slot.staging.data_ptr() for slot in slots}


def test_a_backward_pass_needs_checkpointing_and_says_so(folder):
    decoder, other, batch = Decoder(streamed(folder())), Decoder(whole(folder())), pack(SAMPLES)

    def gradient(decoder, checkpoint):
        with torch.no_grad():
            hidden = decoder.embed(batch)
        decoder.run(batch, Stretch(0, hidden.requires_grad_(), checkpoint)).sin().sum().backward()
        return hidden.grad

    other.model.requires_grad_(False)
    assert torch.equal(gradient(decoder, True), gradient(other, True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(decoder, False)


def test_values_that_stand_for_the_files(folder, tmp_path):
    model = streamed(folder())
    decoder, stream, name = Decoder(model), weights_of(model), "model.layers.2.mlp.up_proj.weight"
    truth = whole(folder())
    assert name in stream and "lm_head.weight" in stream and "lm_head" not in stream
    assert torch.equal(stream[name], truth.get_parameter(name))
    new = {name: torch.randn_like(stream[name])}
    save_tensors(tmp_path / "new.safetensors", new)
    stream.replace(WeightSnapshot(tmp_path / "new.safetensors"))
    truth.get_parameter(name).data.copy_(new[name])
    with torch.no_grad():
        assert torch.equal(decoder.logits(pack(SAMPLES)), Decoder(truth).logits(pack(SAMPLES)))
    with pytest.raises(ValueError, match="head.weight is no parameter of this model"):
        stream.replace({"head.weight": new[name]})


# ---------------------------------------------------------------- training a block


def resident(path, unlearned, dtype, tokens, cached, steps=2, **settings):
    """The block that `reinserted` trains in a model that is in memory, micro-batch by micro-batch; what it reported."""
    decoder, other = Decoder(whole(path, dtype)), whole(unlearned, dtype)
    cache = PrefixCache(decoder, SAMPLES)
    cache.advance(BLOCK.start)
    metrics = []
    with kf.reinserted(decoder, other, BLOCK, lr=1e-3, micro_batch_tokens=tokens, **settings) as training:
        assert type(training) is BlockTraining
        for _ in range(steps):
            batch = cache.batch(range(9)) if cached else pack(SAMPLES)
            metrics.append(training.step_packed(training.criterion.step_batch(batch, 4)))
        return {name: tensor.clone() for name, tensor in training.tensors().items()}, metrics


def by_layer(decoder, unlearned, tokens, cached, steps=2, storage="host", **settings):
    if cached:
        cache = PrefixCache(decoder, SAMPLES)
        cache.advance(BLOCK.start)
    stream = decoder.weights
    loads, metrics = [], []
    values = Shards(unlearned) if isinstance(unlearned, Path) else unlearned
    found = {}

    class Target(dict):
        __contains__ = values.__contains__
        __getitem__ = values.__getitem__
        __setitem__ = found.__setitem__

    with kf.reinserted(
        decoder, Target(), BLOCK, lr=1e-3, micro_batch_tokens=tokens, activations=storage, **settings
    ) as training:
        assert type(training) is LayerMajorTraining
        for _ in range(steps):
            stream.loads.clear()
            batch = cache.batch(range(9)) if cached else pack(SAMPLES)
            metrics.append(training.step_packed(training.criterion.step_batch(batch, 4)))
            loads.append(dict(stream.loads))
    return found, metrics, loads


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("architecture", rarely(["llama", "gemma2", "mistral", "gpt2"], ["gemma2", "gpt2"]))
def test_the_trained_block_has_the_resident_bits(architecture, dtype, folder):
    path, unlearned = folder(architecture), folder(architecture, 1)
    values = {n: p.detach() for n, p in whole(unlearned, dtype).named_parameters()}
    for cached, tokens, optimizer in (
        (True, None, "lion"),
        (True, 20, "lion"),
        (False, 20, "adamw"),
        (True, 1, "adamw"),
    ):
        truth, reported = resident(path, unlearned, dtype, tokens, cached, optimizer=optimizer)
        ours, metrics, _ = by_layer(
            Decoder(streamed(path, dtype)), values, tokens, cached, optimizer=optimizer,
            storage="file" if tokens is None else "host",
        )  # fmt: skip
        assert equal(ours, truth), (cached, tokens)
        assert not any(torch.equal(ours[name], values[name]) for name in ours)
        assert metrics == reported


def test_a_layer_crosses_the_bus_once_each_way_and_none_below_the_block(folder):
    """Six layers, the block is 1 and 2. The layer at the top turns there, and what the last step has left is used."""
    path, unlearned = folder(), folder("llama", 1)
    for tokens in (None, 20, 1):
        decoder = Decoder(streamed(path))
        decoder.weights.release()
        _, _, loads = by_layer(decoder, unlearned, tokens, cached=True, steps=3)
        # up 3 4 5, down (5 4) 3
        assert loads == [{3: 2, 4: 1, 5: 1}, {3: 1, 5: 1}, {3: 1, 5: 1}]
    _, _, loads = by_layer(Decoder(streamed(path, buffers=3)), unlearned, 20, cached=True, steps=3)
    assert loads[1:] == [{}, {}]  # all there is above the block stays
    _, _, loads = by_layer(Decoder(streamed(path)), unlearned, 20, cached=False, steps=2)
    assert loads[1] == {0: 1, 3: 1, 4: 1, 5: 1}  # those below once, without a cache


# of those that others are like: also NLL alone, of each token or sample, or f-divergences
LIKE_OTHERS = ("ga", "dpo", "flat_kl", "flat_pearson", "npo_token", "ria", "satimp", "simnpo", "wga")


@pytest.mark.parametrize("name", rarely(sorted(OBJECTIVES), OBJECTIVES.keys() - set(LIKE_OTHERS)))
def test_micro_batches_add_up_to_the_whole_batchs_gradient(name, folder):
    """Every objective: the gradient of the step by one packed pass in a resident model, within 1e-12 (fp64)."""
    retain_loss = "nll" if name in ("rmu", "ga") else "kl"
    criterion = Criterion(name, retain_loss=retain_loss, retain_coeff=0.7, block=BLOCK)
    alternates = random_samples(4, seed=3) if criterion.alternate else []
    samples = FORGET + alternates + RETAIN
    resident, other = Decoder(whole(folder(), "float64")), whole(folder("llama", 1), "float64")
    parts = {"forget": FORGET, "alternate": alternates, "retain": RETAIN}
    original = OriginalValues.of(resident, parts, criterion.needs)
    with kf.reinserted(resident, other, BLOCK, lr=1e-3, criterion=criterion) as training:
        step = criterion.step_batch(pack(samples), 4, original)
        whole_batch = training.loss(step).backward()
        truth = training.flat.grad.clone()
    values = {n: p.detach() for n, p in whole(folder("llama", 1), "float64").named_parameters()}
    for tokens in (None, 25):
        decoder = Decoder(streamed(folder(), "float64"))
        decoder.weights.loads.clear()
        criterion = Criterion(name, retain_loss=retain_loss, retain_coeff=0.7, block=BLOCK)
        with kf.reinserted(
            decoder, dict(values), BLOCK, lr=1e-3, criterion=criterion, micro_batch_tokens=tokens
        ) as training:
            step = criterion.step_batch(pack(samples), 4, original)
            ours, loss = training.accumulate(step), whole_batch.loss
            assert float((training.flat.grad - truth).norm()) <= 1e-12 * float(truth.norm()) and truth.norm() > 0
            assert float((ours.loss - loss).abs()) <= 1e-12 * float(loss.abs()) + 1e-14
            rows, nll = ours.nll, whole_batch.nll
            assert (rows is None and nll is None) or torch.allclose(rows, nll, rtol=1e-12)
            if tokens is None:  # in one go, by activation checkpointing: for those who accumulate themselves
                training.flat.grad.zero_()
                training.loss(step).backward()
                assert float((training.flat.grad - truth).norm()) <= 1e-12 * float(truth.norm())
            if name == "rmu":  # of the last layer of the block: nothing above it runs
                assert set(decoder.weights.loads) <= {0}


@pytest.mark.parametrize("dtype, tokens, layers", [("float32", 20, "all"), ("bfloat16", None, [2, 4])])
def test_hidden_layers_have_the_bits_of_the_resident_training(dtype, tokens, layers, folder):
    """Each layer's distance enters at its own layer, on the way down."""
    settings = dict(retain_loss="hidden_layers", retain_layers=layers, objective="pdu", micro_batch_tokens=tokens)
    found = []
    for decoder in (Decoder(whole(folder(), dtype)), Decoder(streamed(folder(), dtype))):
        target = {n: p.detach().clone() for n, p in whole(folder("llama", 1), dtype).named_parameters()}
        needs = Criterion("pdu", retain_loss="hidden_layers").needs
        original, metrics = OriginalValues({}), []
        if tokens is None:
            original = OriginalValues.of(decoder, {"forget": FORGET, "retain": RETAIN}, needs, batch_tokens=30)
        else:
            if decoder.streamed:
                decoder.weights.release()
                decoder.weights.loads.clear()
            original = original.with_states(LayerStates(decoder, RETAIN, range(6), batch_tokens=30), first=4)
            assert not decoder.streamed or decoder.weights.loads == {i: 1 for i in range(6)}
        original = original.batch(range(9))
        with kf.reinserted(decoder, target, BLOCK, lr=1e-3, **settings) as training:
            for _ in range(3):
                metrics.append(training.step_packed(training.criterion.step_batch(pack(SAMPLES), 4, original)))
            metrics.append(training.criterion.retain_coeff)
        found.append((target, metrics, type(training)))
    assert equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert [kind for _, _, kind in found] == [BlockTraining, LayerMajorTraining]


def test_micro_batches():
    batch = pack(SAMPLES + random_samples(4, seed=3))
    batch.hidden = torch.randn(batch.num_tokens, 8)
    step = StepBatch(batch, Parts.of(4, 4, 5))
    for tokens in (None, 1, 30, 10_000):
        found = micro_batches(step, tokens)
        assert sorted(i for micro in found for i in micro.samples) == list(range(13))
        assert sorted(torch.cat([rows_of(batch, micro.samples) for micro in found]).tolist()) == list(
            range(len(batch.rows))
        )
        for micro in found:
            forget = [i for i in micro.samples if i < 4]
            assert len(micro.step.parts.forget) == len(forget) and micro.samples[len(forget) :][: len(forget)] == [
                i + 4 for i in forget
            ]
            assert torch.equal(micro.step.packed.targets, batch.targets[rows_of(batch, micro.samples)])
            pieces = batch.hidden.split(batch.lengths)
            assert torch.equal(micro.step.packed.hidden, torch.cat([pieces[i] for i in micro.samples]))
        assert len(found) == (1 if tokens in (None, 10_000) else 9 if tokens == 1 else len(found))
        if tokens == 30:
            assert len(found) > 2 and all(m.step.packed.num_tokens <= 30 for m in found)


def test_cumulative_insertion_and_a_streamed_unlearned_model(folder, tmp_path):
    """Two blocks, one after the other, M_u streamed too: both models end up as the resident ones."""
    truth, theirs = whole(folder(), "float64"), whole(folder("llama", 1), "float64")
    ours, other = streamed(folder(), "float64"), streamed(folder("llama", 1), "float64")
    for block in (range(0, 2), range(2, 4)):
        with kf.reinserted(truth, theirs, block, lr=1e-3, insertion="cumulative") as training:
            training.step(FORGET, RETAIN)
        with kf.reinserted(ours, other, block, lr=1e-3, insertion="cumulative") as training:
            training.step(FORGET, RETAIN)
    stream, unlearned = weights_of(ours), weights_of(other)
    for name, parameter in truth.named_parameters():
        if name in stream:
            assert torch.equal(stream[name], parameter) and torch.equal(unlearned[name], theirs.get_parameter(name))
    with torch.no_grad():
        for a, b in ((ours, truth), (other, theirs)):
            assert torch.equal(Decoder(a).logits(pack(SAMPLES)), Decoder(b).logits(pack(SAMPLES)))
    unlearned.save(tmp_path)
    saved, before = load_model(tmp_path), load_model(folder("llama", 1))
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name).to(torch.float32))
        inside = any(name.startswith(f"model.layers.{i}.") for i in range(4))
        assert torch.equal(parameter, before.get_parameter(name)) != inside, name
    with pytest.raises(ValueError, match="save it elsewhere"):
        unlearned.save(folder("llama", 1))
    with pytest.raises(ValueError, match="this model is streamed: its state_dict.*save.directory"):
        other.save_pretrained(tmp_path / "no")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(error, folder, monkeypatch):
    model = streamed(folder())
    decoder = Decoder(model)
    with torch.no_grad():
        before = decoder.logits(pack(SAMPLES))
    was, values = state(model), {n: p.detach() for n, p in whole(folder("llama", 1)).named_parameters()}
    start = {name: value.clone() for name, value in values.items()}
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error("on the way")
        return linear_loss(*args, **kwargs)

    linear_loss = losses.linear_loss
    with pytest.raises(error):
        with kf.reinserted(decoder, values, BLOCK, lr=1e-3, micro_batch_tokens=20) as training:
            training.step(FORGET, RETAIN)
            calls.append(1)
            monkeypatch.setattr(losses, "linear_loss", fail)
            with pytest.raises(error):
                training.step(FORGET, RETAIN)
            assert not training.flat.grad.any()
            raise error
    monkeypatch.undo()
    assert state(model) == was and equal(values, start)
    assert all(is_placeholder(p) for i in BLOCK for p in decoder.layers[i].parameters())
    with torch.no_grad():
        assert torch.equal(decoder.logits(pack(SAMPLES)), before)
    for settings in ({"betas": (2.0, 0.9)}, {"lr": -1.0}):
        with pytest.raises(ValueError):
            with kf.reinserted(decoder, values, BLOCK, **{"lr": 1e-3, **settings}):
                pass
        assert state(model) == was


def test_diverged_leaves_the_weights_as_they_were(folder):
    decoder = Decoder(streamed(folder()))
    values = {n: p.detach() for n, p in whole(folder("llama", 1)).named_parameters()}
    with pytest.raises(Diverged, match="block 1-2, step 0"):
        with kf.reinserted(decoder, values, BLOCK, lr=1e-3, micro_batch_tokens=20) as training:
            before = {name: tensor.clone() for name, tensor in training.tensors().items()}
            with torch.no_grad():
                training.flat.grad[0] = torch.inf
            try:
                training.step(FORGET, RETAIN)
            finally:
                assert equal(training.tensors(), before) and not training.flat.grad.any()


def test_what_a_step_by_layers_refuses(folder):
    decoder, values = Decoder(streamed(folder())), Shards(folder("llama", 1))
    with pytest.raises(ValueError, match="the unlearned model is the original itself"):
        with kf.reinserted(decoder, decoder.model, BLOCK, lr=1e-3):
            pass
    for settings, message in (
        ({"micro_batch_tokens": 0}, "micro_batch_tokens=0: expected at least 1"),
        ({"activations": "disk"}, "storage='disk': expected one of auto, device, host, file"),
        ({"insertion": "both"}, "insertion='both'"),
    ):
        with pytest.raises(ValueError, match=message):
            with kf.reinserted(decoder, values, BLOCK, lr=1e-3, **settings):
                pass
    with pytest.raises(
        ValueError, match="npo with retain_loss='nll' needs the original model's values: give original="
    ):
        with kf.reinserted(decoder, dict(layer_items(values)), BLOCK, lr=1e-3, criterion=Criterion("npo")) as t:
            t.loss(t.criterion.step_batch(pack(SAMPLES), 4))
    batches = [pack(FORGET), pack(RETAIN, torch.zeros(sum(len(s["input_ids"]) for s in RETAIN), 32), 0)]
    with pytest.raises(ValueError, match="some batches come from a prefix cache and others do not"):
        LayerMajor(decoder, batches, 0, 5).run(lambda *args: None)


def layer_items(shards):
    return ((name, shards[name]) for name in shards.files)


# ---------------------------------------------------------------- density


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt2", "qwen2_moe"])
def test_density_by_layers(architecture, folder):
    """Same bits, and each layer is read at most once each way for the whole set."""
    mixture = architecture in MIXTURES
    model, truth = (open(folder(architecture), "float64") for open in (streamed, whole))
    decoder, stream, other = Decoder(model), weights_of(model), Decoder(truth)
    was = state(model)
    for settings in (
        {},
        {"modules": "all", "activations": "file"},
        {"reduction": "mean"},
        {"statistic": "grad_mean_abs", "sample_fraction": 0.5},
        {"statistic": "slug", "retain": RETAIN},
        {"statistic": "fisher_ratio", "retain": RETAIN},
    ):
        stream.release()
        stream.loads.clear()
        ours = kf.knowledge_density(decoder, SAMPLES, batch_tokens=20, **settings)
        passes = 2 if "retain" in settings else 1
        at_rest = 1 if settings.get("statistic") == "slug" else 0  # the weights themselves
        most = 2 * passes + at_rest + (1 if mixture else 0)  # its check runs the experts once
        assert max(stream.loads.values()) <= most and stream.loads[decoder.num_layers - 1] <= most - passes
        settings.pop("activations", None)
        theirs = kf.knowledge_density(other, SAMPLES, batch_tokens=20, **settings)
        assert torch.equal(ours.per_layer, theirs.per_layer) and ours.per_module == theirs.per_module
        assert torch.equal(ours.num_weights, theirs.num_weights)
    assert state(model) == was


def test_density_in_half_precision_and_after_an_exception(folder, monkeypatch):
    decoder, other = Decoder(streamed(folder(), "bfloat16")), Decoder(whole(folder(), "bfloat16"))
    truth, was = kf.knowledge_density(other, SAMPLES, batch_tokens=20), state(decoder.model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(losses, "linear_loss", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        kf.knowledge_density(decoder, SAMPLES, batch_tokens=20)
    assert state(decoder.model) == was
    assert torch.equal(kf.knowledge_density(decoder, SAMPLES, batch_tokens=20).per_layer, truth.per_layer)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.layers.3.mlp.up_proj.weight"),
            "has no weights for model.layers.3.mlp.up_proj.weight .1 m",
        ),
        (
            lambda t: t.pop("lm_head.weight"),
            r"has no weights for lm_head.weight \(1 missing\): this checkpoint is not whole",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model.safetensors: model.norm.weight is \(31,\), expected \(32,\)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}),
            "model.safetensors: model.layers.1.mlp.up_proj.weight is I8, packed or quantised: expected one of F64",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_streamed(changed(folder(), tmp_path, change))


def test_an_experts_matrix_that_is_missing(folder, tmp_path):
    def lose(tensors):
        del tensors["model.layers.1.block_sparse_moe.experts.4.w3.weight"]

    with pytest.raises(ValueError, match=r"no weights for model.layers.1.mlp.experts.gate_up_proj \(1 missing\)"):
        open_streamed(changed(folder("mixtral"), tmp_path, lose))


def test_weights_that_are_not_finite_are_met_when_they_are_read(folder, tmp_path):
    def spoil(tensors):
        tensors["model.layers.4.self_attn.q_proj.weight"][0, 0] = torch.nan

    model = open_streamed(changed(folder(), tmp_path, spoil))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model.safetensors: model.layers.4.self_attn.q_proj.weight holds NaN or inf"
        ):
            Decoder(model)
    assert weights_of(model).loads[4] == 0
    weights_of(model).load(3)  # the others can still be read


def test_files_that_are_damaged_or_gone(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder(), path)
    files = sorted(path.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{files[1].name}: not a whole safetensors file"):
        open_streamed(path)
    files[1].write_bytes(content)
    model = open_streamed(path)
    files[1].write_bytes(content[:1000])  # while the model is open
    with pytest.raises(
        ValueError, match=f"{files[1].name}: changed while it was in use .1000 bytes, .* before.: put it"
    ):
        Decoder(model)
    files[1].write_bytes(content[:-4] + bytes(4))
    with pytest.raises(ValueError, match=f"{files[1].name}: changed while it was in use .it has been written to"):
        Decoder(model)
    files[1].write_bytes(content)
    Decoder(open_streamed(path))
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name}: no such file"):
        open_streamed(path)


def test_what_cannot_be_opened(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder(), path)
    config = json.loads((path / "config.json").read_text())

    def configured(**changes):
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        return path

    with pytest.raises(ValueError, match=f"{path}/config.json: .*model_type is 'nothing_known'"):
        open_streamed(configured(model_type="nothing_known"))
    with pytest.raises(ValueError, match=f"{path}/config.json: Unrecognized configuration class"):
        open_streamed(configured(model_type="clip"))
    with pytest.raises(ValueError, match=f"{path}/config.json: quantization_config: its weights are quantised"):
        open_streamed(configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    with pytest.raises(ValueError, match="dtype='float8': expected one of float64, float32, bfloat16, float16"):
        open_streamed(configured(), dtype="float8")
    with pytest.raises(ValueError, match="buffers=1: expected at least 2"):
        open_streamed(path, buffers=1)
    with pytest.raises(ValueError, match="no such directory"):
        open_streamed(path / "nowhere")
    with pytest.raises(TypeError, match="a streamed model cannot be copied: open it once more"):
        copy.deepcopy(open_streamed(path))


# ---------------------------------------------------------------- a model larger than memory

LARGE_BLOCK = range(28, 29)


def train_large(decoder):
    cache = PrefixCache(decoder, FORGET + RETAIN[:2], storage="host")
    cache.advance(LARGE_BLOCK.start)
    generator = torch.Generator().manual_seed(1)
    values = {
        f"model.layers.{i}.{name}": p.new_empty(p.shape).normal_(0, 0.02, generator=generator)
        for i in LARGE_BLOCK
        for name, p in decoder.layers[i].named_parameters()
    }
    with kf.reinserted(decoder, values, LARGE_BLOCK, lr=1e-4) as training:
        for _ in range(2):
            training.step_packed(training.criterion.step_batch(cache.batch(range(6)), 4))
    return values


def train_in_little_memory(path, result):
    """In a process of its own: no more than HEADROOM bytes of private memory above what the imports take."""
    # imported late, what they take would count: `kf.reinserted` 69 MB, SciPy by transformers where it is installed
    import transformers.loss.loss_utils  # noqa: F401

    import kunbr_fast.training.reinserted  # noqa: F401

    limit = memory("VmData") + HEADROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(HEADROOM + (8 << 20), dtype=torch.uint8)
    start = memory("VmRSS")
    decoder = Decoder(open_streamed(path))
    save_tensors(result, train_large(decoder))
    print(json.dumps({"resident": memory("VmHWM") - start, "loads": dict(decoder.weights.loads)}))


def test_a_block_of_a_model_that_does_not_fit(tmp_path):
    """A hard limit on private memory, 2.7 times smaller than the model; the result is the resident one, bit for bit."""
    write_large(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 2.5 * HEADROOM
    # the default threshold rises to 32 MB with what is freed: each pass would leave holes that the next one may not fit
    malloc = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    code = f"import test_streaming as t; t.train_in_little_memory({str(tmp_path)!r}, {str(tmp_path / 'block')!r})"
    done = python("-c", f"import sys; sys.path.append({str(Path(__file__).parent)!r}); {code}", **malloc)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] < HEADROOM + (64 << 20)  # with the pages of a file or two
    # three times for the Decoder's checks; then once for the cache, or up, down, up, down above the block
    assert all(found["loads"][str(i)] <= 4 for i in range(28)) and all(
        found["loads"][str(i)] <= 3 + 4 for i in range(29, 32)
    )
    truth = train_large(Decoder(whole(tmp_path)))
    assert equal(load_file(tmp_path / "block"), truth)
