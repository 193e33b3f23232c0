"""Half-precision weights that take small updates: fp32 masters, and stochastic rounding of bf16."""

import copy

import pytest
import torch
from reinsertion_problem import BLOCK, FORGET, RETAIN, equal, weights
from streamed_models import streamed, whole
from tiny_models import moved, tiny_model
from torch import nn

import kunbr_fast as kf
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors
from kunbr_fast.kernels.optimizers.op import Fused
from kunbr_fast.memory import OutOfMemory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.parallel.group import Group
from kunbr_fast.parallel.sharded import sharded
from kunbr_fast.training import flat_buffer
from kunbr_fast.training.fine_tune import fine_tune, full_training
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import FullSettings
from kunbr_fast.training.sharded import ShardedTraining
from kunbr_fast.training.updates import Updates

KEPT = ["fp32", "stochastic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied embeddings, three layers, bf16."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model(dtype=torch.bfloat16, num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(path)
    return path


def copied(state):
    return {name: value.clone() for name, value in state.items()}


def steps(training, count):
    for _ in range(count):
        training.step(FORGET, RETAIN)
    return copied(training.state())


def host_numbers(training):
    """The counters of optimisers that keep them on the host."""
    parts = [training.updates] if type(training) is FullTraining else [*training.layers, *training._outside()]
    of = [(each, each.state[p]) for part in parts for n, p in part._updated.items() for each in [part._each[n]]]
    return [values["step"] for each, values in of if isinstance(each, Fused) and "step" in values]


# ---------------------------------------------------------------- all parameters, in memory and streamed


@pytest.mark.parametrize(
    "master, optimizer, kernels",
    [("fp32", "lion", False), ("fp32", "adamw", False), ("fp32", "adamw", True), ("stochastic", "lion", False),
     ("stochastic", "adamw", False)],
)  # fmt: skip
def test_a_streamed_training_has_the_bits_of_the_one_in_memory(
    master, optimizer, kernels, folder, tmp_path, monkeypatch
):
    """After a checkpoint too, whoever wrote it. kernels: not torch's AdamW but ours, with its counter on the host."""
    if kernels:
        monkeypatch.setattr(flat_buffer, "resolve", lambda *_, **__: "cuda")
    counted = kernels or master == "stochastic"
    how = dict(lr=1e-4, optimizer=optimizer, master_weights=master, rounding_seed=7, weight_decay=0.1, impl="torch")
    memory = Decoder(whole(folder))
    with frozen(memory.model):
        training = full_training(memory, **how)
        two, four = steps(training, 2), steps(training, 2)
        training.load_state(two, 2)
        assert equal(training.state(), two) and equal(steps(training, 2), four)
        assert host_numbers(training) == [4.0] * counted * len(training.parameters)
    assert sum(name.startswith("master.") for name in two) == (len(training.parameters) if master == "fp32" else 0)
    kept = [value for name, value in two.items() if name.startswith(("master.", "optimizer."))]
    assert kept and all(value.dtype == torch.float32 for value in kept)
    save_tensors(tmp_path / "two.safetensors", two)
    decoder = Decoder(streamed(folder, resident_layers=1))
    with decoder.weights.writable(tmp_path) as reset, frozen(decoder.model):
        training = full_training(decoder, **how)
        mine = steps(training, 2)
        assert equal(mine, two) and equal(steps(training, 2), four)
        reset()
        training = full_training(decoder, **how)
        training.step(FORGET, RETAIN)  # what was trained before does not matter
        training.load_state(WeightSnapshot(tmp_path / "two.safetensors"), 2)
        assert host_numbers(training) == [2.0] * counted * len(training.parameters)
        assert equal(training.state(), two) and equal(steps(training, 2), four)


@pytest.mark.parametrize("master", KEPT)
def test_a_model_in_parts_keeps_its_state(master, folder, tmp_path):
    """Here all parts are in one process."""
    how = dict(lr=1e-4, optimizer="adamw", master_weights=master, impl="torch")
    memory, model = Decoder(whole(folder)), whole(folder)
    with frozen(memory.model):
        training = full_training(memory, **how)
        two, four = steps(training, 2), steps(training, 2)
    save_tensors(tmp_path / "two.safetensors", two)
    decoder, snapshot = Decoder(model), WeightSnapshot.save(model, tmp_path / "model.safetensors")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        with frozen(model), sharded(model, decoder.layers, Group(0, 1), snapshot):
            training = full_training(decoder, **how)
            assert isinstance(training, ShardedTraining)
            assert equal(steps(training, 2), two)
            training.step(FORGET, RETAIN)
            training.load_state(WeightSnapshot(tmp_path / "two.safetensors"), 2)
            assert equal(training.state(), two) and equal(steps(training, 2), four)
            training.updates.forget()
            assert training.state().keys() == dict(model.named_parameters()).keys()
    finally:
        torch.distributed.destroy_process_group()


def test_what_goes_over_the_bus_with_masters(folder, tmp_path):
    decoder = Decoder(streamed(folder, host_bytes=0))
    with decoder.weights.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, lr=1e-3, optimizer="lion", master_weights="fp32", impl="torch")
        for step in range(3):
            before = dict(decoder.weights.traffic)
            training.step(FORGET, RETAIN)
            moved = [decoder.weights.traffic[f"state_{way}"] - before.get(f"state_{way}", 0) for way in ("in", "out")]
            state = 8 * sum(p.numel() for p in decoder.layers.parameters())  # master and momentum
            assert moved == [state * (step > 0), state]


def test_a_gradient_that_comes_late(folder, tmp_path, monkeypatch):
    """Its state is made in a later step than the others' of its layer."""
    late, step, done = "model.layers.1.mlp.up_proj.weight", Updates.step, []

    def held_back(self):
        if late in self.parameters and not done:
            done.append(1)
            self.parameters[late].grad = None
        step(self)

    monkeypatch.setattr(Updates, "step", held_back)
    how = dict(lr=1e-3, optimizer="adamw", master_weights="fp32", impl="torch")
    memory, decoder = Decoder(whole(folder)), Decoder(streamed(folder))
    with frozen(memory.model):
        training = full_training(memory, **how)
        assert f"master.{late}" not in steps(training, 1)
        truth = steps(training, 2)
    done.clear()
    with decoder.weights.writable(tmp_path), frozen(decoder.model):
        assert equal(steps(full_training(decoder, **how), 3), truth)


def test_small_updates_train(caplog, monkeypatch):
    """Where plain bf16 stands still."""
    monkeypatch.setattr(flat_buffer, "_warned", set())
    start = tiny_model(dtype=torch.bfloat16, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.copy_(torch.where(parameter < 0, -1, 1) * parameter.abs().clamp(min=0.0625))
    losses, same, said = {"none": [], "fp32": [], "stochastic": []}, {}, {}
    for master, found in losses.items():
        caplog.clear()
        model = copy.deepcopy(start)
        training = FullTraining(Decoder(model), lr=2e-5, optimizer="lion", master_weights=master, impl="torch")
        fine_tune(training, RETAIN, epochs=100, batch_size=len(RETAIN), on_step=found.append)
        same[master] = equal(weights(model), weights(start))
        said[master] = "or take master_weights (warmup_master_weights, rtt_master_weights) fp32 or" in caplog.text
    assert same == said == {"none": True, "fp32": False, "stochastic": False}
    curves = {master: [metrics["retain_loss"] for metrics in found] for master, found in losses.items()}
    fell = {master: curve[0] - sum(curve[-10:]) / 10 for master, curve in curves.items()}
    assert abs(fell["none"]) < 1e-5 and fell["fp32"] > 0.1
    assert fell["stochastic"] == pytest.approx(fell["fp32"], rel=0.1)


@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_an_update_that_does_not_fit_says_what_to_change(master):
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1)
    training = FullTraining(Decoder(model), lr=1e-3, master_weights=master, impl="torch")
    training.lr_name = "warmup_lr"  # as in a run

    def short_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    training.updates._each["lm_head.weight"].update = short_of_memory
    with pytest.raises(OutOfMemory) as error:
        training.step(FORGET, RETAIN)
    said = ("master weights and optimiser state", 'warmup_master_weights="stochastic" (no copies of bf16 weights)')
    for text in said:
        assert (text in str(error.value)) == (master == "fp32"), text


# ---------------------------------------------------------------- a parameter, and its master or its bits


def random_parameters(dtypes, seed=0):
    torch.manual_seed(seed)
    return {f"p{number}": nn.Parameter(torch.randn(40, 5).to(dtype)) for number, dtype in enumerate(dtypes)}


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_an_fp32_training_by_the_same_gradients(dtype, optimizer):
    """Beside them a parameter in fp32, which has none."""
    parameters = random_parameters([dtype, torch.float32, dtype])
    wide = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    settings = FullSettings(1e-3, optimizer, weight_decay=0.1, master_weights="fp32")
    updates = Updates(parameters, settings, "torch")
    truth = Updates(wide, settings, "torch")
    assert not updates.state()
    for _ in range(3):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            wide[name].grad = parameter.grad.float()
        updates.step()
        truth.step()
        assert all(p.grad is None for p in (*parameters.values(), *updates._updated.values()))
    found = updates.state()
    assert {name for name in found if name.startswith("master.")} == {"master.p0", "master.p2"}
    for name, parameter in parameters.items():
        assert torch.equal(found.get(f"master.{name}", parameter.data), wide[name].data)
        assert torch.equal(parameter.data, wide[name].data.to(parameter.dtype))
    assert equal({name: value for name, value in found.items() if not name.startswith("master.")}, truth.state())
    for group in updates.optimizer.param_groups:  # as a scheduler does
        group["lr"] = 0.0
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    updates.step()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.data, wide[name].data.to(parameter.dtype))


def test_each_parameter_has_bits_of_its_own_wherever_it_is():
    def after(names, seed=3, numbers=None, dtype=torch.bfloat16):
        value = torch.randn(4000, generator=torch.Generator().manual_seed(0)).to(dtype)
        parameters = {name: nn.Parameter(value.clone()) for name in names}
        settings = FullSettings(1e-5, "lion", master_weights="stochastic", rounding_seed=seed)
        updates = Updates(parameters, settings, "torch", numbers)
        for _ in range(2):
            for parameter in parameters.values():
                parameter.grad = torch.ones_like(parameter)
            updates.step()
        return {name: parameter.data for name, parameter in parameters.items()}

    found = after("abc")
    assert equal(found, after("abc")) and not torch.equal(found["a"], found["b"])
    assert equal(after("cb", numbers={"a": 0, "b": 1, "c": 2}), {name: found[name] for name in "bc"})
    assert not any(torch.equal(found[name], value) for name, value in after("abc", seed=4).items())
    for dtype in (torch.float32, torch.float64):  # nothing is rounded there
        plain = after("a", dtype=dtype)["a"]
        assert torch.equal(plain, after("a", seed=9, dtype=dtype)["a"])


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_block_rounded_stochastically(optimizer, folder):
    """Streamed and in memory the same bits, after a checkpoint too; another seed, other ones."""
    values = weights(moved(whole(folder)))
    how = dict(lr=1e-4, optimizer=optimizer, master_weights="stochastic", impl="torch", micro_batch_tokens=20)
    found, memory = {}, whole(folder)
    for kind, model, seed in (("memory", memory, 5), ("streamed", streamed(folder), 5), ("other", memory, 6)):
        found[kind] = dict(values)
        with kf.reinserted(model, found[kind], range(1, 2), rounding_seed=seed, **how) as training:
            two = steps(training, 2)
            four = steps(training, 2)
            training.load_state(two, 2)
            assert equal(steps(training, 2), four)
            assert training.flat.master is None and four["weights"].dtype == torch.bfloat16
    assert equal(found["memory"], found["streamed"]) and not equal(found["memory"], found["other"])


# ---------------------------------------------------------------- refusals


def test_what_is_refused(tmp_path):
    for value in (True, False, "bf16", None):
        with pytest.raises(ValueError, match=f"master_weights={value!r}: expected one of fp32, none, stochastic"):
            FullSettings(1e-3, master_weights=value)
    model, unlearned = tiny_model(dtype=torch.float16), tiny_model(dtype=torch.float16, seed=1)
    with pytest.raises(ValueError, match="master_weights=True: expected one of fp32, none, stochastic"):
        kf.reinserted(model, unlearned, BLOCK, lr=1e-3, master_weights=True).__enter__()
    cure = "in float16, and rounding is for bfloat16: take fp32, or load the model in bfloat16"
    with pytest.raises(ValueError, match=f"^master_weights='stochastic': the model is {cure}"):
        kf.reinserted(model, unlearned, BLOCK, lr=1e-3, master_weights="stochastic").__enter__()
    with pytest.raises(ValueError, match=f"^master_weights='stochastic': the model is {cure}"):
        FullTraining(Decoder(model), lr=1e-3, master_weights="stochastic")
    for name in ("master_weights", "warmup_master_weights"):
        config = kf.KUnBRConfig(num_blocks=6, top_k=1, **{name: "stochastic"})
        with pytest.raises(ValueError, match=f"^{name}='stochastic': the model is {cure}"):
            kf.unlearn(model, FORGET, RETAIN, config, on_stage=pytest.fail, progress=False)


def test_each_stage_of_a_run_has_a_seed_of_its_own():
    config = kf.KUnBRConfig(warmup_master_weights="stochastic", master_weights="none")
    full, block = config.full_settings(7), config.block_settings(8)
    assert (full.master_weights, full.rounding_seed) == ("stochastic", 7)
    assert (block.master_weights, block.rounding_seed) == ("none", 8)
