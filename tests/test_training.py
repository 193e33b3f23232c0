"""Full-parameter training, freezing, and snapshots of the weights."""

import copy

import pytest
import torch
from reference_procedure import padded_loss
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, random_samples, tiny_model

from kunbr_fast import losses
from kunbr_fast.data import Schedule, pack
from kunbr_fast.decoder import Decoder
from kunbr_fast.training import Diverged, FullTraining, WeightSnapshot, frozen, train_all

FORGET, RETAIN = random_samples(3, seed=1), random_samples(3, seed=2)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def gradient_difference_step(training, forget, retain):
    batch = pack(forget + retain)
    return training.step(batch, losses.gradient_difference(batch, len(forget), 1.5), len(forget))


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_puts_flags_grads_and_modes_back(error):
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].mlp.eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    before = [(p.requires_grad, id(p.grad)) for p in model.parameters()], [m.training for m in model.modules()]
    try:
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert all(not p.requires_grad and p.grad is None for p in model.parameters())
            first = next(model.parameters())
            first.requires_grad_(True)
            first.grad = torch.zeros_like(first)
            model.train()
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert (
        [(p.requires_grad, id(p.grad)) for p in model.parameters()],
        [m.training for m in model.modules()],
    ) == before
    for parameter in model.parameters():
        assert parameter.grad is None or bool((parameter.grad == 1).all())


# ---------------------------------------------------------------- full training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_the_plain_two_pass_step(architecture):
    """AdamW on all parameters, tied ones once, against padded batches through the model's own forward. SGD-like
    settings (betas 0, large epsilon are not offered), so one step's sign-like update is compared where gradients are
    clearly not rounding."""
    model = tiny_model(architecture)
    truth = copy.deepcopy(model)
    forget, retain = random_samples(3, seed=1, low=7), random_samples(4, seed=2, low=7)
    decoder = Decoder(model)
    loss = -padded_loss(truth, forget) + 1.5 * padded_loss(truth, retain)
    loss.backward()
    optimizer = torch.optim.AdamW(truth.parameters(), lr=1e-3, weight_decay=0.1)
    grads = {name: p.grad.clone() for name, p in truth.named_parameters()}
    optimizer.step()
    with frozen(model):
        training = FullTraining(decoder, lr=1e-3, weight_decay=0.1)
        metrics = gradient_difference_step(training, forget, retain)
    limit = 1e-5 if architecture == "gemma2" else 1e-9
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=limit)
    assert set(training.parameters) == set(grads)  # a tied weight once
    compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters()):
        clear = grads[name].abs() > 1e-4
        compared += int(clear.sum())
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=0, atol=1e-3 * limit * 100, msg=name)
    assert compared > 0.5 * sum(p.numel() for p in model.parameters() if p.shape[0] != 97)


def test_metrics_tell_forget_from_retain():
    model = tiny_model()
    with frozen(model):
        training = FullTraining(Decoder(model), lr=0.0)
        both = gradient_difference_step(training, FORGET, RETAIN)
        batch = pack(RETAIN)
        only = training.step(batch, losses.likelihood(batch))
    assert both["forget_loss"] == pytest.approx(float(padded_loss(model, FORGET).detach()), rel=1e-10)
    assert both["retain_loss"] == pytest.approx(float(padded_loss(model, RETAIN).detach()), rel=1e-10)
    assert both["loss"] == pytest.approx(-both["forget_loss"] + 1.5 * both["retain_loss"], rel=1e-12)
    assert only["forget_loss"] is None and only["loss"] == pytest.approx(only["retain_loss"], rel=1e-12)


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_resumed_training_goes_on_with_the_same_bits(optimizer):
    start = tiny_model("gemma2")  # tied embeddings
    batches = [(random_samples(2, seed=i, low=6), random_samples(2, seed=50 + i, low=6)) for i in range(5)]

    def train(model, part, state=None, steps=0):
        with frozen(model):
            training = FullTraining(Decoder(model), lr=1e-3, optimizer=optimizer, weight_decay=0.1)
            if state is not None:
                gradient_difference_step(training, *batches[4])  # what was trained before must not matter
                training.load_state(state, steps)
            for batch in part:
                gradient_difference_step(training, *batch)
            assert training.steps == steps + len(part)
            return {name: tensor.clone() for name, tensor in training.state().items()}

    truth = train(copy.deepcopy(start), batches)
    saved = train(copy.deepcopy(start), batches[:2])
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    for _ in range(2):
        assert equal(train(copy.deepcopy(start), batches[2:], saved, 2), truth)
        assert equal(saved, kept)  # not changed by who took it up
    empty = train(copy.deepcopy(start), [])
    assert equal(train(copy.deepcopy(start), batches, empty, 0), truth)


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_diverged_step_changes_nothing(optimizer):
    model = tiny_model()
    with frozen(model):
        training = FullTraining(Decoder(model), lr=1e-3, optimizer=optimizer)
        gradient_difference_step(training, FORGET, RETAIN)
        state = {name: tensor.clone() for name, tensor in training.state().items()}
        handle = model.model.layers[5].register_forward_hook(lambda m, args, out: out * torch.inf)
        with pytest.raises(Diverged, match=r"diverged at step 1 \(.*set forget_loss_cap"):
            gradient_difference_step(training, FORGET, RETAIN)
        handle.remove()
        assert equal(training.state(), state) and training.steps == 1
        assert all(p.grad is None for p in model.parameters())
        gradient_difference_step(training, FORGET, RETAIN)
        assert training.steps == 2


def test_diverged_shows_the_numbers_it_has():
    error = Diverged("here", {"loss": float("nan"), "retain_loss": None, "tokens": 7, "forget_loss": 12.345678})
    assert "diverged at here (loss nan, forget_loss 12.35)" in str(error)
    assert error.metrics["tokens"] == 7 and error.where == "here"


def test_train_all_learns_and_leaves_no_trace():
    model = tiny_model()
    model.train()
    samples = random_samples(7, seed=3)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    before = float(padded_loss(model, samples).detach())
    epochs, steps = [], []

    def on_epoch(number):
        assert not torch.is_grad_enabled() and not model.training
        epochs.append((number, len(steps)))

    train_all(Decoder(model), samples, lr=1e-2, epochs=6, batch_size=3, seed=4, on_epoch=on_epoch, on_step=steps.append)
    assert epochs == [(i, 3 * i) for i in range(1, 7)] and len(steps) == 18
    assert float(padded_loss(model, samples).detach()) < 0.5 * before
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags and model.training


def test_train_all_is_the_plain_loop_in_the_schedules_order():
    model = tiny_model()
    truth, samples = copy.deepcopy(model), random_samples(5, seed=3)
    train_all(Decoder(model), samples, lr=1e-3, epochs=2, batch_size=2, seed=4, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = torch.optim.AdamW(truth.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1)
    for indices, _ in Schedule(5, 0, 2, 1, 2, 4):
        optimizer.zero_grad()
        padded_loss(truth, [samples[i] for i in indices]).backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)


# ---------------------------------------------------------------- snapshots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_snapshot_round_trip_is_exact(dtype, architecture, tmp_path):
    model = tiny_model(architecture, dtype)
    before, places = weights(model), [p.data_ptr() for p in model.parameters()]
    snapshot = WeightSnapshot.save(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for _ in range(2):
        snapshot.restore(model)
        assert equal(weights(model), before)
        with torch.no_grad():
            next(model.parameters()).zero_()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert set(snapshot.names()) == set(before) == set(load_file(tmp_path / "w.safetensors"))
    for name, value in before.items():
        assert name in snapshot and torch.equal(snapshot[name], value)
    assert "nothing" not in snapshot


def test_special_values_and_views_survive(tmp_path):
    model = tiny_model(dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
        flat = torch.cat([p.flatten() for p in model.model.layers[1].parameters()])  # views of one vector
        start = 0
        for parameter in model.model.layers[1].parameters():
            parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        model.lm_head.weight.data = model.lm_head.weight.t().contiguous().t()  # not contiguous
    bits = {name: p.detach().clone().contiguous().view(torch.int32) for name, p in model.named_parameters()}
    snapshot = WeightSnapshot.save(model, tmp_path / "w.safetensors")
    for name in bits:
        assert torch.equal(snapshot[name].view(torch.int32), bits[name]), name


def test_snapshot_refusals(tmp_path):
    with pytest.raises(ValueError, match="none.safetensors: no such weights file"):
        WeightSnapshot(tmp_path / "none.safetensors")
    model = tiny_model(dtype=torch.float32)
    before = weights(model)
    name = "model.layers.5.mlp.up_proj.weight"

    def attempt(tensors, message):
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=message):
            WeightSnapshot(tmp_path / "w.safetensors").restore(model)
        assert equal(weights(model), before), "refused half-way"

    other = {key: value + 1 for key, value in before.items()}
    attempt({k: v for k, v in other.items() if k != name}, f"{name} is in only one of the file and LlamaForCausalLM")
    attempt({**other, "extra": torch.zeros(1)}, "extra is in only one")
    attempt(
        {**other, name: other[name][:3].contiguous()},
        rf"{name} is torch.float32 \(3, 32\), the model's is .*\(48, 32\)",
    )
    attempt({**other, name: other[name].double()}, f"{name} is torch.float64 .* the model's is torch.float32")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    path = tmp_path / "w.safetensors"
    WeightSnapshot.save(model, path)
    before = path.read_bytes()

    def full(tensors, temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kunbr_fast.training.save_file", full)
    with pytest.raises(OSError, match="w.safetensors: No space left"):
        WeightSnapshot.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
