"""Full-parameter training of a streamed model: the bits of the model in memory, and what goes over the bus."""

import pytest
import torch
from streamed_models import folders_of_models, streamed, whole
from tiny_models import random_samples

from kunbr_fast.data import pack
from kunbr_fast.files.models import load_model
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors
from kunbr_fast.memory import OutOfMemory, Place
from kunbr_fast.model import layer_store
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.layer_buffers import Copies
from kunbr_fast.model.layer_files import LayerFiles
from kunbr_fast.model.layer_store import LayerStore
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.fine_tune import full_training
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.streamed_full import StreamedFullTraining

FORGET, RETAIN = random_samples(4, seed=1), random_samples(5, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_of_models(tmp_path_factory)


def trained(decoder, tmp_path, criterion=None, steps=3, **how):
    """The state of a training after some steps, the steps' metrics, and the training."""
    criterion = criterion or (lambda: Criterion(retain_coeff=1.5))
    original = OriginalValues.of(decoder, {"forget": FORGET, "retain": RETAIN}, criterion().needs)
    with frozen(decoder.model):
        training = full_training(decoder, criterion(), impl="torch", **{"lr": 1e-3, **how})
        metrics = []
        for _ in range(steps):
            step = training.criterion.pack(FORGET, RETAIN, original)
            metrics.append(training.step_packed(step))
        training.check()
        return {name: value.detach().clone() for name, value in training.state().items()}, metrics, training


def both(path, dtype, tmp_path, budget=None, resident=0, **how):
    """(of the model in memory, of the streamed one, its decoder)."""
    truth = trained(Decoder(whole(path, dtype)), tmp_path, **how)[:2]
    decoder = Decoder(streamed(path, dtype, host_bytes=budget, resident_layers=resident))
    with decoder.weights.writable(tmp_path):
        ours = trained(decoder, tmp_path, **how)[:2]
    return truth, ours, decoder


def same(truth, ours):
    assert truth[0].keys() == ours[0].keys()
    for name, value in truth[0].items():
        assert torch.equal(value, ours[0][name]), name
    assert truth[1] == ours[1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_bits_of_the_model_in_memory(architecture, dtype, folder, tmp_path):
    if architecture == "qwen2_moe" and dtype == "bfloat16":
        pytest.skip("eager experts in bf16 are the model's own affair")
    for optimizer, micro in (("lion", None), ("adamw", 20)):
        truth, ours, _ = both(folder(architecture), dtype, tmp_path, optimizer=optimizer, micro_batch_tokens=micro)
        same(truth, ours)


def test_every_objectives_parts(folder, tmp_path):
    """Retain terms of whole distributions, of hidden layers, of an objective's own layer; an adapting coefficient."""
    cases = (
        lambda: Criterion(retain_loss="kl"),
        lambda: Criterion(retain_loss="hidden_mse"),
        lambda: Criterion(retain_loss="hidden_layers"),
        lambda: Criterion("rmu", {"layer": 3}),
        lambda: Criterion("pdu", {"retain_loss_eps": 0.3}),
        lambda: Criterion("npo", {"beta": 0.1}),
    )
    for criterion in cases:
        truth, ours, decoder = both(folder("gemma2"), "float32", tmp_path, criterion=criterion, micro_batch_tokens=20)
        same(truth, ours)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("optimizer, moments, counters", [("lion", 1, 0), ("adamw", 2, 9 * 4)])
def test_what_goes_over_the_bus_in_a_step(optimizer, moments, counters, resident, folder, tmp_path):
    """Weights twice in, but for the two layers that are in the buffers where the pass turns and where it ends; once
    out; the state once each way. Of resident layers nothing. counters: bytes of AdamW's in a layer."""
    decoder = Decoder(streamed(folder(), "float32", host_bytes=0, resident_layers=resident))
    stream = decoder.weights
    (layer,) = {sum(p.numel() * 4 for p in layer.parameters()) for layer in decoder.layers}
    moving = 6 - resident
    with stream.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, lr=1e-3, optimizer=optimizer, impl="torch")
        for _ in range(3):
            before = dict(stream.traffic)
            training.step(FORGET, RETAIN)
            found = {what: count - before.get(what, 0) for what, count in stream.traffic.items()}
        assert found == {
            "weights_in": (2 * moving - 4) * layer,
            "weights_out": moving * layer,
            "state_in": moving * (moments * layer + counters),
            "state_out": moving * (moments * layer + counters),
        }


def test_a_checkpoint_is_the_one_of_the_model_in_memory(folder, tmp_path):
    """Taken up by either: the same bits as without."""
    path, how = folder("gemma2"), dict(lr=1e-3, optimizer="adamw", impl="torch")

    def steps(training, count):
        for _ in range(count):
            training.step(FORGET, RETAIN)
        return {name: value.detach().clone() for name, value in training.state().items()}

    def resumed(decoder, state):
        with frozen(decoder.model):
            training = full_training(decoder, **how)
            training.load_state(state, 2)
            return steps(training, 2)

    memory = Decoder(whole(path))
    with frozen(memory.model):
        training = full_training(memory, **how)
        two, four = steps(training, 2), steps(training, 2)
    save_tensors(tmp_path / "two.safetensors", two)
    for resident in (0, 3):
        decoder = Decoder(streamed(path, resident_layers=resident))
        with decoder.weights.writable(tmp_path) as reset, frozen(decoder.model):
            training = full_training(decoder, **how)
            mine = steps(training, 2)
            assert mine.keys() == two.keys() and all(torch.equal(two[name], mine[name]) for name in two)
            reset()
            found = resumed(decoder, WeightSnapshot(tmp_path / "two.safetensors"))
            assert found.keys() == four.keys() and all(torch.equal(four[name], found[name]) for name in four)
        taken_up = resumed(Decoder(whole(path)), mine)
        assert all(torch.equal(four[name], taken_up[name]) for name in four)


def test_a_state_of_the_beginning_has_no_optimiser_state(folder, tmp_path):
    """What a training has made before it takes up such a state is gone."""
    decoder = Decoder(streamed(folder(), resident_layers=1))
    with decoder.weights.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, lr=1e-3, optimizer="adamw", impl="torch")
        begun = {name: tensor.clone() for name, tensor in training.state().items()}
        training.step(FORGET, RETAIN)
        once = {name: tensor.clone() for name, tensor in training.state().items()}
        training.load_state(begun, 0)
        assert training.state().keys() == begun.keys() != once.keys()
        training.step(FORGET, RETAIN)
        again = training.state()
        assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("resident", [0, 2])
def test_the_model_is_as_before_after_it(resident, folder, tmp_path):
    decoder = Decoder(streamed(folder("gemma2"), resident_layers=resident))
    stream, batch = decoder.weights, pack(FORGET)
    before = {name: stream[name].clone() for name in stream}
    with torch.no_grad():
        logits = decoder.logits(batch)
    with stream.writable(tmp_path) as reset:
        for begin_anew in (reset, lambda: None):
            first, *_ = trained(decoder, tmp_path)
            assert all(torch.equal(stream[name], first[name]) for name in stream)
            assert not any(torch.equal(before[name], first[name]) for name in stream)
            with torch.no_grad():
                assert not torch.equal(decoder.logits(batch), logits)
            decoder.save(tmp_path / f"saved-{begin_anew is reset}")
            begin_anew()
    assert all(torch.equal(before[name], stream[name]) for name in stream)
    with torch.no_grad():
        assert torch.equal(decoder.logits(batch), logits)
    for name in ("saved-True", "saved-False"):
        saved = load_model(tmp_path / name)
        assert all(torch.equal(first[name], parameter) for name, parameter in saved.named_parameters())


def test_where_trained_layers_lie(folder, tmp_path, monkeypatch):
    """In main memory as far as the budget goes, then in files that have no name any more."""
    decoder = Decoder(streamed(folder(), host_bytes=200_000))
    made, allocate = [], Place.allocate
    monkeypatch.setattr(Place, "allocate", lambda p, *a: made.append((p.storage, a[0][0])) or allocate(p, *a))
    with decoder.weights.writable(tmp_path):
        trained(decoder, tmp_path)
        kept = [(storage, size) for storage, size in made if storage in ("host", "file")]
        assert {storage for storage, _ in kept} == {"host", "file"} and len(kept) == 12
        assert sum(size for storage, size in kept if storage == "host") <= 200_000
        assert not list(tmp_path.iterdir())


def test_a_state_that_grows(tmp_path, monkeypatch):
    """A parameter's first gradient may come late: its state goes between the others', in a buffer that an earlier
    training has made large enough, or in a larger one, for which the smaller one's bytes are free again."""
    a, b, c = (torch.full((60,), float(number)) for number in range(3))
    made, allocate = [], Place.allocate
    monkeypatch.setattr(Place, "allocate", lambda p, *a: made.append(p.storage) or allocate(p, *a))
    for earlier, places in ((True, ["host"]), (False, ["host", "host"])):
        made.clear()
        store = LayerStore(Copies(torch.device("cpu")), 1000, tmp_path)
        if earlier:
            store.write_state(0, {"a": b, "b": b, "c": b})
            store.reset()
        store.write_state(0, {"a": a, "c": c})
        now = store.state(0)
        store.write_state(0, {"a": now["a"], "b": b, "c": now["c"]})
        assert made == places
        for name, value in store.state(0).items():
            assert torch.equal(value, {"a": a, "b": b, "c": c}[name]), (name, earlier)


def test_a_checkpoint_reads_what_was_not_trained_when_it_is_written(folder, tmp_path, monkeypatch):
    """Else most of the model would be in memory together."""
    decoder, read = Decoder(streamed(folder())), []
    get = LayerFiles.__getitem__
    monkeypatch.setattr(LayerFiles, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    with decoder.weights.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, Criterion("rmu", {"layer": 3}), lr=1e-3, impl="torch")
        step = training.criterion.pack(
            FORGET, RETAIN, OriginalValues.of(decoder, {"forget": FORGET, "retain": RETAIN}, training.criterion.needs)
        )
        training.step_packed(step)
        read.clear()
        state = training.state()
        assert not read
        save_tensors(tmp_path / "state.safetensors", state)
        assert {int(name.split(".")[2]) for name in read if ".layers." in name} == {4, 5}
    kept = WeightSnapshot(tmp_path / "state.safetensors")
    assert all(torch.equal(kept[name], decoder.weights[name]) for name in kept if ".layers.5." in name)


def test_what_is_refused(folder, tmp_path):
    decoder = Decoder(streamed(folder()))
    with pytest.raises(ValueError, match=r"streamed: train it inside `with decoder.weights.writable\(directory\):`"):
        full_training(decoder, lr=1e-3)
    with decoder.weights.writable(tmp_path):
        with pytest.raises(RuntimeError, match="this streamed model is being trained already"):
            with decoder.weights.writable(tmp_path):
                pass
        with pytest.raises(ValueError, match="adversary_every=5: an adversary of all parameters is a second model"):
            full_training(decoder, lr=1e-3, adversary_every=5)
        with pytest.raises(ValueError, match="is streamed: take StreamedFullTraining"):
            FullTraining(decoder, lr=1e-3)
    with pytest.raises(ValueError, match="is not streamed: take FullTraining"):
        StreamedFullTraining(Decoder(whole(folder())), lr=1e-3)
    with pytest.raises(ValueError, match="resident_layers=7: expected 0 to 6"):
        open_streamed(folder(), resident_layers=7)
    with pytest.raises(ValueError, match="host_bytes=-1: expected 0 or more bytes, or None"):
        open_streamed(folder(), host_bytes=-1)


def test_divergence_and_memory_in_the_middle_of_a_step(folder, tmp_path, monkeypatch):
    """Named as of a model in memory; no step follows but from a checkpoint."""
    decoder, whole_one = Decoder(streamed(folder())), Decoder(whole(folder()))

    def diverging(decoder):
        training = full_training(decoder, lr=1e30, impl="torch")
        training.step(FORGET, RETAIN)
        with pytest.raises(Diverged) as error:
            training.step(FORGET, RETAIN)
        return training, str(error.value)

    with frozen(whole_one.model):
        truth = diverging(whole_one)[1]
    with decoder.weights.writable(tmp_path) as reset, frozen(decoder.model):
        training, said = diverging(decoder)
        assert said == truth
        with pytest.raises(RuntimeError, match="a step has ended in the middle of its updates"):
            training.step(FORGET, RETAIN)
        reset()
        training = full_training(decoder, lr=1e-3, impl="torch")
        training.step(FORGET, RETAIN)
        state = {name: value.clone() for name, value in training.state().items()}
        for refused in (decoder.place, lambda values: decoder.weights.transformed(print).__enter__()):
            with pytest.raises(RuntimeError, match="layers of this streamed model are being trained"):
                refused({})
        training.step(FORGET, RETAIN)
        truth = {name: value.clone() for name, value in training.state().items()}
        training.load_state(state, 1)
        run, calls = decoder.run, []

        def short_of_memory(*args, **how):
            calls.append(1)
            if len(calls) == 10:  # two to the layer before the top, then down
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(*args, **how)

        monkeypatch.setattr(decoder, "run", short_of_memory)
        with pytest.raises(OutOfMemory, match="in the update .*all parameters, layer by layer"):
            training.step(FORGET, RETAIN)
        assert len(calls) == 10 and training.torn
        training.load_state(state, 1)
        training.step(FORGET, RETAIN)
        now = training.state()
        assert all(torch.equal(now[name], truth[name]) for name in truth)


def test_less_main_memory_than_was_said(folder, tmp_path, monkeypatch):
    """An error that names the cure, not the system's killer; the training goes on from a checkpoint, in files."""
    decoder = Decoder(streamed(folder(), host_bytes=1 << 40))
    monkeypatch.setattr(layer_store, "free_host_bytes", lambda: 20_000)
    with decoder.weights.writable(tmp_path) as reset:
        with pytest.raises(
            OutOfMemory, match="the weights of layer 5 take .* GiB, .* are free: keep less there .stream_c"
        ):
            trained(decoder, tmp_path)
        reset()
    decoder = Decoder(streamed(folder(), host_bytes=0))
    with decoder.weights.writable(tmp_path):
        trained(decoder, tmp_path)
