"""Full-parameter training, and freezing."""

import copy
import logging

import pytest
import torch
from reference_procedure import padded_loss
from tiny_models import ARCHITECTURES, peak_bytes, random_samples, tiny_model

from kunbr_fast.data import pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.training import flat_buffer
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.fine_tune import train_all
from kunbr_fast.training.full import FullTraining

FORGET, RETAIN = random_samples(3, seed=1), random_samples(3, seed=2)
CRITERION = Criterion(retain_coeff=1.5)


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


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
        training = FullTraining(decoder, lr=1e-3, weight_decay=0.1, criterion=CRITERION)
        metrics = training.step(forget, retain)
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
        training = FullTraining(Decoder(model), lr=0.0, criterion=CRITERION)
        both = training.step(FORGET, RETAIN)
        only = FullTraining(Decoder(model), lr=0.0)
        only = only.step_packed(only.criterion.step_batch(pack(RETAIN), 0))
    assert both["forget_loss"] == pytest.approx(float(padded_loss(model, FORGET).detach()), rel=1e-10)
    assert both["retain_loss"] == pytest.approx(float(padded_loss(model, RETAIN).detach()), rel=1e-10)
    assert both["loss"] == pytest.approx(-both["forget_loss"] + 1.5 * both["retain_loss"], rel=1e-12)
    assert only["forget_loss"] is None and only["loss"] == pytest.approx(only["retain_loss"], rel=1e-12)


def test_checkpointing_lowers_the_peak_and_keeps_the_bits():
    forget, retain = random_samples(6, low=12, high=12), random_samples(6, seed=1, low=12, high=12)
    models, peaks = [], []
    for flag in (False, True):
        models.append(tiny_model())
        training = FullTraining(Decoder(models[-1]), lr=1e-3, optimizer="lion", gradient_checkpointing=flag)
        training.step(forget, retain)
        peaks.append(peak_bytes(lambda: training.step(forget, retain)))  # noqa: B023
    assert peaks[1] < 0.7 * peaks[0], peaks
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_resumed_training_goes_on_with_the_same_bits(optimizer):
    start = tiny_model("gemma2")  # tied embeddings
    batches = [(random_samples(2, seed=i, low=6), random_samples(2, seed=50 + i, low=6)) for i in range(5)]

    def train(model, part, state=None, steps=0):
        with frozen(model):
            training = FullTraining(Decoder(model), lr=1e-3, optimizer=optimizer, weight_decay=0.1, criterion=CRITERION)
            if state is not None:
                training.step(*batches[4])  # what was trained before must not matter
                training.load_state(state, steps)
            for batch in part:
                training.step(*batch)
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
        training = FullTraining(Decoder(model), lr=1e-3, optimizer=optimizer, criterion=CRITERION)
        training.step(FORGET, RETAIN)
        state = {name: tensor.clone() for name, tensor in training.state().items()}
        handle = model.model.layers[5].register_forward_hook(lambda m, args, out: out * torch.inf)
        with pytest.raises(Diverged, match=r"diverged at step 1 \(.*set forget_loss_cap"):
            training.step(FORGET, RETAIN)
        handle.remove()
        assert equal(training.state(), state) and training.steps == 1
        assert all(p.grad is None for p in model.parameters())
        training.step(FORGET, RETAIN)
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_finite_finds_one_bad_value_and_does_not_overflow(bad):
    big = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert finite(torch.tensor(1.0), big, torch.zeros(3, dtype=torch.float64))
    for place in (0, 500, 999):
        broken = big.clone()
        broken[place] = bad
        assert not finite(torch.tensor(1.0), broken)
    assert not finite(torch.tensor(bad), big)


@pytest.mark.parametrize("dtype, lr, warns", [
    (torch.bfloat16, 1e-6, True), (torch.bfloat16, 1e-2, False),
    (torch.float16, 1e-6, True), (torch.float32, 1e-6, False),
])  # fmt: skip
def test_updates_that_half_precision_rounds_away_are_said_once(dtype, lr, warns, caplog, monkeypatch):
    monkeypatch.setattr(flat_buffer, "_warned", set())
    model = tiny_model(dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with frozen(model), caplog.at_level(logging.WARNING):
        for _ in range(2):
            training = FullTraining(Decoder(model), lr=lr, optimizer="lion", criterion=CRITERION)
        training.step(FORGET, RETAIN)
    assert len(caplog.records) == int(warns)
    moved = torch.cat([(p != before[name]).flatten() for name, p in model.named_parameters()]).double().mean()
    assert (moved < 0.5) == warns
    if warns:
        assert "rounded away" in caplog.text and "--dtype float32" in caplog.text
