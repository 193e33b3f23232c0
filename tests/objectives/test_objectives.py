"""Every objective, its value and its gradients, against plain formulas on the full logits of padded batches."""

import copy
import dataclasses
import math

import pytest
import tiny_text
import torch
import torch.nn.functional as F
from reference_procedure import ReferenceLion, padded
from tiny_models import moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data import ALTERNATES, REFUSALS, encode, pack, with_alternates
from kunbr_fast.data.batch import join
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.kernels.linear_loss import reference as plain_kernels
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import Shares
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.methods import OBJECTIVES, RETAIN_LOSSES, check_options
from kunbr_fast.objectives.original import OriginalValues, Parts, measure
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import Execution

BLOCK = range(2, 4)
FORGET, RETAIN = random_samples(4, seed=1), random_samples(3, seed=2)
ALTERNATE = random_samples(4, seed=3)
PAIRS = [{**sample, "alternate": other} for sample, other in zip(FORGET, ALTERNATE)]
SAMPLES = {"forget": FORGET, "alternate": ALTERNATE, "retain": RETAIN}


# ---------------------------------------------------------------- the truth: plain formulas, sample by sample


def outputs(model, samples):
    """For each sample of a padded batch: logits (r, V) and labels (r,) at the labelled rows, all its logits (t, V), and
    the hidden states: final ones at the labelled rows, and the outputs of every layer at all its tokens."""
    ids, mask, labels = padded(samples)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    found = []
    for i, sample in enumerate(samples):
        t = len(sample["input_ids"])
        rows = [p for p in range(t - 1) if labels[i, p + 1] != -100]
        targets = torch.stack([labels[i, p + 1] for p in rows])
        states = [h[i, :t] for h in out.hidden_states[1:]]
        found.append((out.logits[i, rows], targets, out.logits[i, :t], out.hidden_states[-1][i, rows], states))
    return found


def nll(one):
    return F.cross_entropy(one[0], one[1], reduction="none")


def logp(one):
    return -nll(one).sum()


def house(values):
    return torch.stack([v.mean() for v in values]).mean()


def sigmoid_loss(beta, x):
    return -2 / beta * torch.log(torch.sigmoid(beta * x))


def onehot(one):
    return F.one_hot(one[1], one[0].shape[1]).double()


def ceu(one, skip):
    z = one[0].detach().masked_fill(onehot(one).bool(), float("-inf"))
    value = -(z.softmax(1) * one[0].log_softmax(1)).sum(1)
    kept = [i for i in range(len(value)) if i >= skip or i == len(value) - 1]
    return value[kept]


def hinge(one):
    p, hot = one[0].softmax(1), onehot(one)
    return 1 + (p * hot).sum(1) - (p * (1 - hot)).max(1).values


def flat(now, other, slope, conjugate):
    """FLAT's loss: g as `slope`, f* as `conjugate`."""
    p = [torch.stack([torch.exp(-nll(o)).mean() for o in side]) for side in (now, other)]
    return (conjugate(slope(p[0])) - slope(p[1])).mean()


def rmu_direction(size, seed):
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u / u.square().sum().sqrt()


def weighted(f, weight):
    return -house([weight(torch.exp(-nll(o)).detach()) * nll(o) for o in f])


# name -> (options, formula of the forget and alternate samples now, and of the original's)
PLAIN = {
    "ga": ({}, lambda f, a, f0, a0: -house([nll(o) for o in f])),
    "gradient_difference": ({}, lambda f, a, f0, a0: -house([nll(o) for o in f])),
    "npo": ({"beta": 0.7}, lambda f, a, f0, a0: torch.stack([
        sigmoid_loss(0.7, -(logp(o) - logp(o0))) for o, o0 in zip(f, f0)]).mean()),
    "npo_token": ({"beta": 0.7}, lambda f, a, f0, a0: house(
        [2 / 0.7 * torch.log1p((torch.exp(-nll(o)) / torch.exp(-nll(o0))) ** 0.7) for o, o0 in zip(f, f0)])),
    "dpo": ({"beta": 0.2}, lambda f, a, f0, a0: torch.stack([
        sigmoid_loss(0.2, (logp(w) - logp(w0)) - (logp(o) - logp(o0))) for o, o0, w, w0 in zip(f, f0, a, a0)]).mean()),
    "idk_dpo": ({"beta": 0.2}, lambda f, a, f0, a0: PLAIN["dpo"][1](f, a, f0, a0)),
    "simnpo": ({"beta": 2.5, "delta": 0.3}, lambda f, a, f0, a0: torch.stack([
        sigmoid_loss(2.5, -logp(o) / len(o[1]) - 0.3) for o in f]).mean()),
    "wga": ({"beta": 0.6}, lambda f, a, f0, a0: weighted(f, lambda p: p**0.6)),
    "satimp": ({"beta1": 0.4, "beta2": 1.5}, lambda f, a, f0, a0: weighted(f, lambda p: p**0.4 * (1 - p) ** 1.5)),
    "ria": ({}, lambda f, a, f0, a0: house([nll(o) for o in a])),
    "flat_kl": ({}, lambda f, a, f0, a0: flat(f, a, lambda p: p, lambda u: torch.exp(u - 1))),
    "flat_tv": ({}, lambda f, a, f0, a0: flat(f, a, lambda p: torch.tanh(p) / 2, lambda u: u)),
    "flat_js": ({}, lambda f, a, f0, a0: flat(
        f, a, lambda p: torch.log(2 / (1 + torch.exp(-p))),
        lambda u: -torch.log(2 - torch.exp(u)))),
    "flat_pearson": ({}, lambda f, a, f0, a0: flat(f, a, lambda p: p, lambda u: u**2 / 4 + u)),
    "undial": ({"beta": 3.0}, lambda f, a, f0, a0: house(
        [-((o0[0] - 3.0 * onehot(o)).softmax(1) * o[0].log_softmax(1)).sum(1) for o, o0 in zip(f, f0)])),
    "ceu": ({"skip_first": 2}, lambda f, a, f0, a0: house([ceu(o, 2) for o in f])),
    "inverted_hinge": ({}, lambda f, a, f0, a0: house([hinge(o) for o in f])),
    "negative_entropy": ({}, lambda f, a, f0, a0: house([(o[0].softmax(1) * o[0].log_softmax(1)).sum(1) for o in f])),
    "logit_margin": ({}, lambda f, a, f0, a0: house(
        [((o[0] * onehot(o)).sum(1) - o[0].mean(1)).clamp(min=0) for o in f])),
    "pdu": ({"retain_loss_eps": 0.5, "dual_step_size": 0.25}, lambda f, a, f0, a0: house(
        [(o[0].max(1).values - o[0].mean(1)) ** 2 for o in f]) - 1.5 * 0.5),
    "rmu": ({"steering_coeff": 4.0, "seed": 3, "layer": 3}, lambda f, a, f0, a0: house(
        [(o[4][3] - 4.0 * rmu_direction(o[4][3].shape[1], 3)).square().mean(1) for o in f])),
}  # fmt: skip


def kl(z, z0):
    return (z0.softmax(1) * (z0.log_softmax(1) - z.log_softmax(1))).sum(1)


PLAIN_RETAIN = {
    "nll": lambda r, r0: house([nll(o) for o in r]),
    "kl": lambda r, r0: house([kl(o[0], o0[0]) for o, o0 in zip(r, r0)]),
    "kl_all": lambda r, r0: house([kl(o[2], o0[2]) for o, o0 in zip(r, r0)]),
    "hidden_mse": lambda r, r0: house([(o[3] - o0[3]).square().mean(1) for o, o0 in zip(r, r0)]),
}


def plain_loss(now, original, name, retain_loss="nll", coeff=1.5, samples=SAMPLES):
    with torch.no_grad():
        f0, a0, r0 = (outputs(original, samples[part]) for part in samples)
    f, a, r = (outputs(now, samples[part]) for part in samples)
    loss = PLAIN[name][1](f, a, f0, a0)
    if name == "rmu":
        return loss + coeff * house([(o[4][3] - o0[4][3]).square().mean(1) for o, o0 in zip(r, r0)])
    return loss if name == "ga" else loss + coeff * PLAIN_RETAIN[retain_loss](r, r0)


# every objective with the NLL for a retain term, every retain term beside two objectives
CASES = [(name, "nll") for name in PLAIN]
CASES += [(name, loss) for name in ("gradient_difference", "undial") for loss in PLAIN_RETAIN if loss != "nll"]


@pytest.fixture(scope="module")
def models():
    """M0, M_u, and M0 with M_u's block."""
    original = tiny_model(num_hidden_layers=5)
    unlearned = moved(original, size=0.05)
    grafted = copy.deepcopy(original)
    for i in BLOCK:
        grafted.model.layers[i].load_state_dict(unlearned.model.layers[i].state_dict())
    return original, unlearned, grafted


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three rows of logits at a time."""
    monkeypatch.setattr(plain_kernels, "LOGITS_CHUNK", 300)
    monkeypatch.setattr(plain_kernels, "HEAD_CHUNK", 300)


def criterion(name, retain_loss="nll", **settings):
    return Criterion(name, PLAIN[name][0], retain_loss=retain_loss, **{"retain_coeff": 1.5, **settings})


def packed(c):
    parts = [FORGET, ALTERNATE if c.alternate else [], RETAIN]
    return c.step_batch(pack([sample for part in parts for sample in part]), len(FORGET))


def with_values(step, original):
    return dataclasses.replace(step, original=original)


def close(ours, theirs, what=""):
    assert float((ours - theirs).norm()) <= 1e-9 * float(theirs.norm()) + 1e-14, what


def test_every_objective_has_a_plain_formula():
    assert set(PLAIN) == set(OBJECTIVES) and set(PLAIN_RETAIN) | {"hidden_layers"} == set(RETAIN_LOSSES)
    for name, found in OBJECTIVES.items():
        assert "arXiv" in found.function.__doc__ or name == "gradient_difference", name
        assert set(PLAIN[name][0]) <= set(found.options)


@pytest.mark.parametrize("name, retain_loss", CASES)
def test_in_re_insertion(name, retain_loss, models):
    original, unlearned, grafted = models
    grafted.zero_grad()
    truth = plain_loss(grafted, original, name, retain_loss)
    truth.backward()
    wanted = {n: p.grad for n, p in grafted.named_parameters() if p.grad is not None}
    settings = dict(objective=name, objective_options=PLAIN[name][0], retain_loss=retain_loss, retain_coeff=1.5)
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, **settings) as training:
        batch = packed(training.criterion)
        for checkpoint in (False, True):
            training.execution = Execution(gradient_checkpointing=checkpoint)
            part = training.loss(batch).backward()
            close(part.loss, truth.detach())
            for key, parameter in training.parameters.items():
                close(parameter.grad, wanted.get(key, torch.zeros_like(parameter)), key)
            training.flat.grad.zero_()
        metrics = losses.metrics(batch, part)
    with torch.no_grad():
        forget, retain = (float(house([nll(o) for o in outputs(grafted, s)])) for s in (FORGET, RETAIN))
    assert metrics["loss"] == pytest.approx(float(truth.detach()), rel=1e-9)
    if name == "rmu":
        assert metrics["forget_loss"] is None and metrics["retain_loss"] is None
    else:
        assert metrics["forget_loss"] == pytest.approx(forget, rel=1e-9)
        assert metrics["retain_loss"] == pytest.approx(retain, rel=1e-9)


@pytest.mark.parametrize("name, retain_loss", CASES)
def test_in_the_warm_up(name, retain_loss, models):
    """All parameters, the head too, which then no longer is the original's."""
    original, unlearned, _ = models
    truth_model = copy.deepcopy(unlearned)
    truth = plain_loss(truth_model, original, name, retain_loss)
    truth.backward()
    model = copy.deepcopy(original)
    decoder, c = Decoder(model), criterion(name, retain_loss)
    values = OriginalValues.of(decoder, SAMPLES, c.needs, batch_tokens=20)
    training = FullTraining(decoder, lr=1e-3, criterion=c)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), unlearned.parameters()):
            ours.copy_(theirs)  # as steps would have
    indices = [*range(4), *(range(4, 8) if c.alternate else ()), *range(8, 11)]
    part = training.loss(with_values(packed(c), values.batch(indices))).backward()
    close(part.loss, truth.detach())
    for (key, ours), theirs in zip(model.named_parameters(), truth_model.parameters()):
        assert (ours.grad is None) == (theirs.grad is None) or not theirs.grad.any(), key
        if ours.grad is not None:
            close(ours.grad, theirs.grad, key)


@pytest.mark.parametrize(
    "name, retain_loss", [("npo", "kl_all"), ("dpo", "hidden_mse"), ("undial", "kl"), ("rmu", "nll")]
)
def test_the_reference_is_that_of_a_second_model(name, retain_loss, models):
    """On the fly with the block's original weights, from values computed once, and from a real second model."""
    original, unlearned, _ = models
    decoder, other = Decoder(original), Decoder(copy.deepcopy(original))
    kept = {n: p.detach().clone() for n, p in original.named_parameters()}
    with kf.reinserted(
        decoder, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, criterion=criterion(name, retain_loss)
    ) as training:
        c = training.criterion
        batch = packed(c)
        whole = OriginalValues.of(other, SAMPLES, c.needs)
        stored = OriginalValues.from_tensors(whole.tensors())
        indices = [*range(4), *(range(4, 8) if c.alternate else ()), *range(8, 11)]
        live = measure(other, batch.packed, batch.parts, c.needs)
        found = [training.loss(with_values(batch, v)).loss.detach() for v in (None, stored.batch(indices), live)]
        for key, parameter in training.parameters.items():
            assert torch.equal(parameter, dict(unlearned.named_parameters())[key])  # put back after it was measured
        cache = kf.PrefixCache(decoder, FORGET + ALTERNATE + RETAIN)
        cache.advance(BLOCK.start)
        found.append(training.loss(c.step_batch(cache.batch(indices), len(FORGET))).loss.detach())
    for value in found[1:]:
        close(value, found[0])
    assert all(torch.equal(p, kept[n]) for n, p in original.named_parameters())


def test_a_step_needs_its_reference(models):
    original = models[0]
    c = criterion("npo", "kl")
    training = FullTraining(Decoder(copy.deepcopy(original)), lr=1e-3, criterion=c)
    batch = packed(c)
    with pytest.raises(ValueError, match="the original model's nll of these samples is needed: give original="):
        training.step_packed(batch)
    whole = OriginalValues.of(Decoder(original), {"forget": FORGET, "retain": RETAIN}, c.needs)
    with pytest.raises(ValueError, match="the original model's hidden of these"):
        training.step_packed(with_values(batch, whole.batch([0, 1, 2, 3, 0, 1, 2])))
    with pytest.raises(ValueError, match="rows of nll for samples that have"):
        training.step_packed(with_values(batch, whole.batch([0, 0, 0, 0, 4, 5, 6])))
    assert training.steps == 0


def test_rmu_runs_no_layer_above_its_own(models):
    original, unlearned, _ = models
    model = copy.deepcopy(original)
    calls = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_hook(lambda *_: calls.append("head")))
    with kf.reinserted(model, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, objective="rmu") as training:
        assert training.criterion.layer == 3
        calls.clear()
        metrics = training.step(FORGET, RETAIN)
    assert set(calls) == {0, 1, 2, 3}
    assert metrics["forget_loss"] is None and metrics["retain_loss"] is None and math.isfinite(metrics["loss"])
    for given in (
        {"objective": "rmu", "objective_options": {"layer": 1}},
        {"criterion": Criterion("rmu", {"layer": 1})},
    ):
        with pytest.raises(ValueError, match="rmu: layer=1 is below the block 2-3, which would get no gradient"):
            with kf.reinserted(model, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, **given):
                pass
    with pytest.raises(ValueError, match="give those or it"):
        with kf.reinserted(model, {}, BLOCK, 1e-3, 2.0, criterion=Criterion()):
            pass
    with pytest.raises(ValueError, match="rmu on all layers: say at which one.*--objective-option layer=7"):
        Criterion("rmu")
    with pytest.raises(ValueError, match="rmu: layer=9: the model has layers 0 to 4"):
        FullTraining(Decoder(model), lr=1e-3, criterion=Criterion("rmu", {"layer": 9}))


# ---------------------------------------------------------------- steps


def test_the_default_has_the_bits_of_one_weighted_pass(models):
    original, unlearned, _ = models
    for cap in (None, 4.0):
        with kf.reinserted(
            original, dict(unlearned.named_parameters()), BLOCK, 1e-3, 1.5, forget_loss_cap=cap
        ) as training:
            step = packed(training.criterion)
            batch, part = step.packed, training.loss(step).backward()
            grad = training.flat.grad.clone()
            training.flat.grad.zero_()
            decoder = training.decoder
            rows = losses.gradient_difference(batch, len(FORGET), 1.5, cap)
            hidden = decoder.final(decoder.run(batch, rows=True))
            other = losses.linear_loss(hidden, decoder.head, batch.targets, rows.weight, rows.cap)
            other[0].backward()
            assert torch.equal(part.loss, other[0]) and torch.equal(part.nll, other[1])
            assert torch.equal(grad, training.flat.grad) and training.criterion.needs == {}
            # and as a function of the NLL it is the same number
            c = Criterion(forget_loss_cap=cap, retain_coeff=1.5)
            c.objective = dataclasses.replace(c.objective, weighted=False)
            close(c(decoder, step).loss.detach(), part.loss)
            assert training.state().keys() == {"weights"} or "objective.retain_coeff" not in training.state()
    weights = []
    for step in ("step", "step_packed"):
        model = copy.deepcopy(original)
        training = FullTraining(Decoder(model), lr=1e-3, optimizer="lion", criterion=Criterion(retain_coeff=1.5))
        args = (FORGET, RETAIN) if step == "step" else (training.criterion.pack(FORGET, RETAIN),)
        getattr(training, step)(*args)
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_every_form_of_batch_gives_the_same_step(models):
    original, unlearned, _ = models

    def hf(samples):
        ids, mask, labels = padded(samples, 3)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    forms = {
        "samples": (PAIRS, RETAIN),
        "pairs": ([{"original": f, "alternate": a} for f, a in zip(FORGET, ALTERNATE)], RETAIN),
        "padded": ({"original": hf(FORGET), "alternate": hf(ALTERNATE)}, hf(RETAIN)),
        "apart": (FORGET, RETAIN, ALTERNATE),
        "packed": (pack(FORGET), pack(RETAIN), pack(ALTERNATE)),
    }
    found = {}
    for name, batches in forms.items():
        with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, objective="dpo") as training:
            metrics = [training.step(*batches) for _ in range(2)]
            found[name] = metrics, training.flat.param.detach().clone()
            for bad, match in (
                (FORGET, "dpo needs a second answer"),
                (pack(FORGET), "give them packed, as alternate_batch"),
            ):
                with pytest.raises(ValueError, match=match):
                    training.step(bad, RETAIN)
            with pytest.raises(ValueError, match="expected an alternate of each right after them"):
                training.step_packed(training.criterion.step_batch(pack(FORGET), 4))
    for metrics, weights in found.values():
        assert metrics == found["samples"][0] and torch.equal(weights, found["samples"][1])
    c = Criterion("dpo")
    batch = c.pack(PAIRS, RETAIN)
    assert torch.equal(batch.packed.input_ids, pack(FORGET + ALTERNATE + RETAIN).input_ids)
    assert batch.parts.forget == range(4)
    assert Criterion("npo").pack(PAIRS, RETAIN).packed.num_samples == 7  # alternates that nothing asks for are left out
    with pytest.raises(ValueError, match="sample 1 has no alternate, and others have one"):
        with_alternates([PAIRS[0], FORGET[1]])
    with pytest.raises(ValueError, match="holds 4 and its alternate 3: expected one alternate"):
        with_alternates({"original": hf(FORGET), "alternate": hf(RETAIN)})


@pytest.mark.parametrize("name", ["npo", "pdu", "ceu", "rmu"])
def test_one_side_alone(name, models):
    original, unlearned, _ = models
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, lr=1e-3, objective=name) as training:
        assert math.isfinite(training.step(FORGET)["loss"])
        loss, both, alone = (
            training.loss(training.criterion.step_batch(pack(samples), forget)).loss
            for samples, forget in ((RETAIN, 0), (FORGET + RETAIN, 4), (FORGET, 4))
        )
    close(both.detach(), (alone + loss).detach())


def test_parts_of_a_batch_add_up(models):
    """Micro-batches that hold unequal shares of both sides."""
    original, unlearned, _ = models
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, 1e-3, 1.5, objective="npo") as training:
        whole = training.loss(training.criterion.pack(FORGET, RETAIN)).loss
        total = 0
        for forget, retain in ((FORGET[:1], RETAIN[:2]), (FORGET[1:], RETAIN[2:])):
            shares = Shares(len(forget) / 4, len(retain) / 3)
            total = (
                total
                + training.loss(training.criterion.step_batch(pack(forget + retain), len(forget), shares=shares)).loss
            )
    close(total.detach(), whole.detach())


def test_pdu_moves_its_retain_preference(models):
    original, unlearned, grafted = models
    c = criterion("pdu")
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, lr=1e-4, criterion=c) as training:
        expected = 1.5
        for _ in range(3):
            metrics = training.step(FORGET, RETAIN)
            expected = max(0.0, expected + 0.25 * (metrics["retain_loss"] - 0.5))
            assert c.retain_coeff == pytest.approx(expected, rel=1e-12)
        state = {k: v.clone() for k, v in training.state().items()}
        training.step(FORGET, RETAIN)
        after = c.retain_coeff, training.flat.param.detach().clone()
        training.load_state(state, 3)
        assert c.retain_coeff == float(state["objective.retain_coeff"])
        training.step(FORGET, RETAIN)
        assert c.retain_coeff == after[0] and torch.equal(training.flat.param, after[1])
    c = Criterion("pdu", {"retain_loss_eps": 1e9}, block=BLOCK)
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, lr=1e-4, criterion=c) as training:
        training.step(FORGET, RETAIN)
        assert c.retain_coeff == 0.0
        before = training.flat.param.detach().clone()
        handle = original.model.layers[4].register_forward_hook(lambda m, args, out: out * torch.nan)
        with pytest.raises(kf.Diverged):
            training.step(FORGET, RETAIN)
        handle.remove()
        training.load_state(training.state(), 1)
        assert c.retain_coeff == 0.0 and torch.equal(training.flat.param, before)


def test_the_kernels_train_the_same_block():
    pytest.importorskip("triton", reason="triton is made for Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = tiny_model(dtype=torch.float32, num_hidden_layers=3).to(device)
    values, found = {n: p.detach().clone() for n, p in moved(original, size=0.05).named_parameters()}, {}
    for impl in ("torch", "triton"):
        settings = dict(objective="npo", objective_options={"beta": 0.5}, impl=impl)
        with kf.reinserted(original, dict(values), range(1, 2), lr=1e-3, **settings) as training:
            packed = pack(FORGET[:2] + RETAIN[:1]).to(device)
            part = training.loss(training.criterion.step_batch(packed, 2)).backward()
            found[impl] = part.loss, part.nll, training.flat.grad.clone()
    (loss, rows_nll, grad), (loss_t, nll_t, grad_t) = found["torch"], found["triton"]
    torch.testing.assert_close(loss_t, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll_t, rows_nll, rtol=1e-5, atol=1e-6)
    assert float((grad_t - grad).norm() / grad.norm()) < 1e-5


# ---------------------------------------------------------------- whole runs

SETTINGS = dict(
    batch_size=3, retain_batch_size=2, retain_coeff=1.5, warmup_epochs=1, warmup_lr=1e-3, num_blocks=3, top_k=2,
    block_epochs=1, block_lr=1e-3, seed=3, rtt=False, checkpoint_every=1, skip_last_layers=1,
)  # fmt: skip
RUN = dict(num_hidden_layers=4)


def run_plainly(model, unlearned, config, samples, blocks, name, retain_loss):
    """Warm-up and blocks with two whole models beside the one that trains, and the plain formulas."""
    forget, others, retain = (samples[part] for part in ("forget", "alternate", "retain"))

    def train(now, parameters, epochs, number, lr):
        optimizer = ReferenceLion(parameters, lr)
        schedule = Schedule(
            len(forget), len(retain), config.batch_size, config.retain_size, epochs, config.seed * 1000 + number
        )
        for step in range(len(schedule)):
            f, r = schedule[step]
            part = {
                "forget": [forget[i] for i in f],
                "alternate": [others[i] for i in f],
                "retain": [retain[i] for i in r],
            }
            optimizer.zero_grad()
            plain_loss(now, model, name, retain_loss, config.retain_coeff, part).backward()
            optimizer.step()

    if unlearned is None:
        unlearned = copy.deepcopy(model)
        train(unlearned, unlearned.parameters(), config.warmup_epochs, 0, config.warmup_lr)
    result = copy.deepcopy(unlearned)
    for number, block in enumerate(blocks):
        grafted = copy.deepcopy(model)
        for i in block:
            grafted.model.layers[i].load_state_dict(unlearned.model.layers[i].state_dict())
        train(
            grafted,
            [p for i in block for p in grafted.model.layers[i].parameters()],
            config.block_epochs,
            1 + number,
            config.block_lr,
        )
        for i in block:
            result.model.layers[i].load_state_dict(grafted.model.layers[i].state_dict())
    return result


@pytest.mark.parametrize("name, retain_loss", [("npo", "nll"), ("dpo", "nll"), ("undial", "kl")])
def test_a_whole_run_is_that_of_the_plain_formulas(name, retain_loss):
    model = tiny_model(**RUN)
    start, options = copy.deepcopy(model), PLAIN[name][0]
    # at M0 the gradient of the KL is rounding alone, and Lion takes its sign: with it only blocks can be compared
    unlearned = moved(model, size=0.05) if retain_loss == "kl" else None
    config = KUnBRConfig(
        **{**SETTINGS, "num_blocks": 4}, objective=name, objective_options=options, retain_loss=retain_loss
    )
    report = kf.unlearn(model, PAIRS, RETAIN, config, unlearned=unlearned, progress=False)
    truth = run_plainly(start, unlearned, config, SAMPLES, report.blocks, name, retain_loss)
    for (key, ours), theirs in zip(model.named_parameters(), truth.named_parameters()):
        close(ours.detach(), theirs[1].detach(), key)
    assert report.seconds["reference"] > 0


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        dict(objective="npo", retain_loss="kl", insertion="cumulative"),
        dict(objective="pdu", objective_options={"dual_step_size": 0.5}),
        dict(objective="rmu", warmup_objective="undial", insertion="cumulative"),
        dict(objective="simnpo", retain_loss="hidden_layers", insertion="cumulative"),
        dict(objective="ga", warmup_objective="rmu", warmup_objective_options={"layer": 1}),
    ],
    ids=lambda s: s["objective"],
)
def test_a_run_that_was_interrupted_gives_the_same_bits(settings, tmp_path, monkeypatch):
    config = KUnBRConfig(**{**SETTINGS, "num_blocks": 4}, **settings)
    truth = tiny_model(dtype=torch.float32, **RUN)
    report = kf.unlearn(truth, FORGET, RETAIN, config, progress=False)

    def run(resume):
        model = tiny_model(dtype=torch.float32, **RUN)
        return model, kf.unlearn(model, FORGET, RETAIN, config, output_dir=tmp_path, progress=False, resume=resume)

    for number, owner in enumerate((FullTraining, BlockTraining, BlockTraining)):
        real, calls = owner.step_packed, []

        def step(self, *args, real=real, calls=calls, number=number):
            calls.append(1)
            if len(calls) == 2 + (number == 2):  # in the warm-up, in the first block, in the second
                raise Stop
            return real(self, *args)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(owner, "step_packed", step)
            run(resume=number > 0)
    model, resumed = run(resume=True)
    for (key, ours), theirs in zip(model.named_parameters(), truth.parameters()):
        assert torch.equal(ours, theirs), key
    assert resumed.losses == report.losses


def test_resume_notices_another_objective(tmp_path, monkeypatch):
    def stop(*args):
        raise Stop

    def run(config, resume):
        model = tiny_model(dtype=torch.float32, **RUN)
        kf.unlearn(model, PAIRS, RETAIN, config, output_dir=tmp_path, progress=False, resume=resume)

    monkeypatch.setattr(FullTraining, "step_packed", stop)
    settings = {**SETTINGS, "num_blocks": 4}
    with pytest.raises(Stop):
        run(KUnBRConfig(**settings, objective="npo"), False)
    for change in ({"objective": "simnpo"}, {"objective_options": {"beta": 0.3}}, {"retain_loss": "kl"}):
        with pytest.raises(ValueError, match=f"{[*change][0]} was .* in the run to be resumed"):
            run(KUnBRConfig(**{**settings, "objective": "npo", **change}), True)


def test_losses_that_are_not_measured_are_none_in_the_report():
    settings = {**SETTINGS, "num_blocks": 4}
    config = KUnBRConfig(**settings, objective="rmu", warmup_objective="ga", max_retain_loss=1e-9)
    report = kf.unlearn(tiny_model(dtype=torch.float32, **RUN), FORGET, RETAIN, config, progress=False)
    for stage, epochs in report.losses.items():
        assert all(epoch["retain_loss"] is None for epoch in epochs)  # and so has no limit
        assert all((epoch["forget_loss"] is None) == (stage != "warmup") for epoch in epochs)


# ---------------------------------------------------------------- alternates


QUESTION = {"question": "When was Ada Ek born?", "choices": [1900, 1901, 1902], "answer": 1}
RECORDS = {
    "question": {**QUESTION, "alternate": "nobody knows"},
    "prompt": {"prompt": "Ada Ek was born in", "completion": " 1901", "alternate": " 1950"},
    "text": {"text": "Ada Ek was born in 1901.", "alternate": "Ada Ek was born in 1950."},
    "messages": {
        "messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "1901"}],
        "alternate": "1950",
    },
}


def shown(tokenizer, sample):
    """The text, and the part of it that counts."""
    ids, labels = sample["input_ids"], sample["labels"]
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100]).strip()


def test_alternates_by_form():
    tokenizer = tiny_text.tokenizer()

    def one(form, kind, target="all", **changes):
        (sample,) = encode([{**RECORDS[form], **changes}], tokenizer, target, alternate=kind)
        (same,) = encode([{**RECORDS[form], **changes}], tokenizer, target)
        assert torch.equal(sample["input_ids"], same["input_ids"]) and torch.equal(sample["labels"], same["labels"])
        return shown(tokenizer, sample["alternate"])

    prompt = "When was Ada Ek born?\nA. 1900\nB. 1901\nC. 1902\nAnswer:"
    for target in ("answer", "letter", "number"):
        assert one("question", "given", target) == (f"{prompt} nobody knows", "nobody knows")
    assert one("question", "given") == (f"{prompt} nobody knows",) * 2
    text, counted = one("question", "wrong", "letter")
    assert text.startswith(prompt) and text.endswith((" A. 1900", " C. 1902")) and counted in ("A", "C")
    text, counted = one("question", "wrong", "number")
    assert text.endswith(counted) and counted in ("1900", "1902")
    text, counted = one("question", "refusal", "letter")
    assert text == f"{prompt} {counted}" and counted in REFUSALS
    assert one("prompt", "given", "answer") == ("Ada Ek was born in 1950", "1950")
    assert one("prompt", "refusal", "answer")[1] in REFUSALS
    assert one("text", "given", "number") == ("Ada Ek was born in 1950.", "1950")
    text, counted = one("messages", "given", "answer")
    assert "1950" in counted and "1901" not in text and text.startswith("<user> When?")
    assert one("messages", "refusal", "answer")[1] in REFUSALS


def test_alternates_are_chosen_by_seed_and_number():
    tokenizer, records = tiny_text.tokenizer(), [tiny_text.question(n) for n in tiny_text.NAMES]

    def texts(kind, seed):
        samples = encode(records, tokenizer, "answer", alternate=kind, seed=seed)
        return [shown(tokenizer, s["alternate"])[1] for s in samples]

    for kind in ("refusal", "wrong"):
        assert texts(kind, 1) == texts(kind, 1) != texts(kind, 2)
        assert len(set(texts(kind, 1))) > 3
    right = [f"{'ABCD'[r['answer']]}. {r['choices'][r['answer']]}" for r in records]
    assert not any(a == b for a, b in zip(texts("wrong", 1), right))


@pytest.mark.parametrize(
    "form, kind, target, message",
    [
        ("prompt", "wrong", "all", r"record 0: a wrong answer is one of a question's choices, and this line has"),
        ("text", "refusal", "all", "record 0: a text line asks nothing that could be refused"),
        (
            "prompt",
            "given",
            "all",
            "record 0: no 'alternate', the second answer that .* give each record one, or .*idk_dpo",
        ),
        ("text", "given", "answer", "record 0: target='answer' does not apply to a text line"),
        ("prompt", "other", "all", f"alternate='other': expected one of {', '.join(ALTERNATES)}, or None"),
    ],
)
def test_records_without_such_an_alternate(form, kind, target, message):
    record = {k: v for k, v in RECORDS[form].items() if k != "alternate" or "no 'alternate'" not in message}
    with pytest.raises(ValueError, match=message):
        encode([record], tiny_text.tokenizer(), target, alternate=kind)


def test_an_alternate_that_is_too_long_is_reported():
    record = {**RECORDS["prompt"], "alternate": "1950 " * 30}
    with pytest.raises(ValueError, match=r"longer than max_length=20: the alternate of record 0 \(\d+ tokens\)"):
        encode([record], tiny_text.tokenizer(), "all", 20, "given")


def test_samples_bring_their_own_alternates():
    config = KUnBRConfig(**{**SETTINGS, "num_blocks": 4}, objective="ria")
    with pytest.raises(ValueError, match=r"the forget set has no alternates, which ria needs \(wrong\)"):
        kf.unlearn(tiny_model(**RUN), FORGET, RETAIN, config, progress=False)
    blank = {"input_ids": torch.arange(4), "labels": torch.full((4,), -100)}
    with pytest.raises(ValueError, match="the alternate of forget sample 1: no token after its first has a label"):
        kf.unlearn(tiny_model(**RUN), [PAIRS[0], {**FORGET[1], "alternate": blank}], RETAIN, config, progress=False)
    beyond = {"input_ids": torch.tensor([3, 97]), "labels": torch.tensor([3, 97])}
    with pytest.raises(ValueError, match="token id 97"):
        kf.unlearn(tiny_model(**RUN), [{**FORGET[1], "alternate": beyond}], RETAIN, config, progress=False)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "nop"}, "objective='nop': did you mean 'npo'? expected one of ga, gradient_difference"),
        ({"objective": "npo", "objective_options": {"gamma": 1}}, "npo: unknown option 'gamma': its options are beta"),
        ({"objective": "ria", "objective_options": {"beta": 1}}, "ria: unknown option 'beta': it has none"),
        ({"objective": "npo", "objective_options": {"beta": 0}}, "npo: beta=0: expected a number above 0"),
        ({"objective": "npo", "objective_options": {"beta": "x"}}, "npo: beta='x': expected a number above 0"),
        ({"objective": "wga", "objective_options": {"beta": True}}, "wga: beta=True: expected a finite number"),
        ({"objective": "wga", "objective_options": {"beta": None}}, "wga: beta=None: expected a finite number"),
        ({"objective": "ceu", "objective_options": {"skip_first": 1.5}}, "ceu: skip_first=1.5: expected an integer"),
        ({"objective": "rmu", "objective_options": {"layer": "a"}}, "rmu: layer='a': expected an integer or null"),
        ({"objective_options": [1]}, "objective_options=[1]: expected a mapping such as {beta: 0.1}"),
        ({"retain_loss": "l2"}, "retain_loss='l2': expected one of nll, kl, kl_all, hidden_mse"),
        ({"objective": "ga", "retain_loss": "kl"}, "retain_loss='kl': ga has no retain term: leave it out"),
        ({"objective": "rmu", "retain_loss": "kl"}, "retain_loss='kl': rmu has its own retain term"),
        ({"objective": "npo", "forget_loss_cap": 4}, "forget_loss_cap=4.0: npo has none: leave it out"),
        ({"warmup_objective_options": {"beta": 1}}, "warmup_objective_options without a warmup_objective"),
        ({"warmup_objective": "x"}, "objective='x': expected one of"),
        ({"objective": "dpo", "warmup_objective": "ria"}, "dpo and ria need different second answers (given, wrong)"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        KUnBRConfig.from_dict(settings)
    assert message in str(error.value)


def test_settings_reach_the_criteria(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "objective: npo\nobjective_options: {beta: 1e-2}\nretain_loss: kl\nwarmup_objective: gradient_difference\n"
        "forget_loss_cap: 7\nretain_coeff: 2\n"
    )
    config = KUnBRConfig.load(path)
    block, warmup = config.criterion(BLOCK), config.criterion(warmup=True)
    assert (block.objective.name, block.options, block.retain_loss, block.retain_coeff) == (
        "npo",
        {"beta": 0.01},
        "kl",
        2,
    )
    assert (warmup.objective.name, warmup.options["forget_loss_cap"], warmup.retain_loss) == (
        "gradient_difference",
        7,
        "kl",
    )
    config.save(tmp_path / "again.yaml")
    assert KUnBRConfig.load(tmp_path / "again.yaml") == config
    older = {k: v for k, v in KUnBRConfig().to_dict().items() if "objective" not in k and k != "retain_loss"}
    assert KUnBRConfig().changed(older) == {}
    assert config.changed(older)["objective"] == "data"
    assert check_options("rmu", {"layer": None, "seed": 2}) == {"layer": None, "steering_coeff": 6.5, "seed": 2}


def test_layers_that_do_not_exist_are_refused_before_anything_runs():
    settings, stages = {**SETTINGS, "num_blocks": 4}, []

    def refused(match, **more):
        with pytest.raises(ValueError, match=match):
            kf.unlearn(
                tiny_model(**RUN),
                FORGET,
                RETAIN,
                KUnBRConfig(**settings, **more),
                progress=False,
                on_stage=stages.append,
            )

    refused("rmu on all layers: say at which one", objective="rmu")
    refused("rmu: layer=1 is below the block 2-2", objective="rmu", objective_options={"layer": 1})
    refused("layer=7: the model has layers 0 to 3", warmup_objective="rmu", warmup_objective_options={"layer": 7})
    assert stages == []


def test_the_command_line(tmp_path, capsys):
    root = tiny_text.workspace(tmp_path)
    command = [
        "unlearn",
        "--model",
        str(root / "model"),
        "--forget",
        str(root / "f0.jsonl"),
        "--retain",
        str(root / "r.jsonl"),
    ]
    command += "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --target answer --no-rtt --quiet".split()
    (tmp_path / "run.yaml").write_text("objective: idk_dpo\nobjective_options: {beta: 5}\n")
    config = ["--config", str(tmp_path / "run.yaml")]
    assert cli.main([*command, *config, "--objective-option", "beta=2e-1", "--out", str(tmp_path / "out")]) == 0
    saved = KUnBRConfig.load(tmp_path / "out" / "run.yaml")
    assert saved.objective == "idk_dpo" and saved.criterion(range(1)).options == {"beta": 0.2}
    capsys.readouterr()
    assert cli.main([*command, *config, "--objective-option", "bta=2", "--out", str(tmp_path / "no")]) == 2
    assert "idk_dpo: unknown option 'bta': its options are beta" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--objective-option", "beta", "--out", str(tmp_path / "no")])
    assert "'beta': expected NAME=VALUE, such as beta=0.1" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_join_keeps_the_order_of_the_parts():
    c = Criterion("dpo")
    batch = join(join(pack(FORGET), pack(ALTERNATE)), pack(RETAIN))
    assert c.step_batch(batch, 4).parts == Parts(forget=range(4), alternate=range(4, 8), retain=range(8, 11))
