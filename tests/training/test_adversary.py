"""A relearning adversary, against two models and loops over padded batches; and its guarantees."""

import contextlib
import copy

import pytest
import torch
from graph_emulator import capture
from helpers import relative
from hidden_states import forward, spreads
from reference_procedure import ReferenceLion, block_names, padded_loss
from reinsertion_problem import equal, identity, touched_model, weights
from streamed_models import streamed, whole
from tiny_models import moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data.adversary import AdversarySettings
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.memory import OutOfMemory, is_out_of_memory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.run.samples import with_facts
from kunbr_fast.training.approximation import gradient_cosine
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import BlockSettings

BLOCK = range(2, 4)
FORGET, RETAIN = random_samples(8, seed=1, low=5), random_samples(5, seed=2, low=5)
FACTS = [0, 0, 1, 2, 2, 3, 4, 5]
EVERY = dict(adversary_every=3, adversary_steps=2, adversary_lrs=(1e-3, 3e-3), adversary_seed=7)


def schedule(steps=7, **changes):
    made = {name.removeprefix("adversary_"): value for name, value in {**EVERY, **changes}.items()}
    return Schedule(8, 5, 3, 2, steps, seed=3, adversary=AdversarySettings(**made), facts=FACTS)


def batches(plan, steps=7):
    for number in range(steps):
        forget, retain = plan[number]
        relearned = [[FORGET[i] for i in batch] for batch in plan.relearned(number)]
        yield [FORGET[i] for i in forget], [RETAIN[i] for i in retain], relearned


def minus_nll(model, samples):
    return -padded_loss(model, samples)


def two_models(model, names, plan, lr=1e-3, forget_loss=minus_nll, kept=0, reach=None):
    """The method as the literature writes it: a whole second model. reach: what the adversary changes."""
    adversary = copy.deepcopy(model)
    of = [dict(m.named_parameters()) for m in (model, adversary)]
    mine, theirs = ([of[which][name] for name in names] for which in (0, 1))
    reach = {name: of[1][name] for name in reach or names}
    for parameter in [*of[0].values(), *of[1].values()]:
        parameter.requires_grad_(False)
    for parameter in [*mine, *reach.values()]:
        parameter.requires_grad_(True)
    lion = ReferenceLion(mine, lr)
    for number, (forget, retain, relearned) in enumerate(batches(plan)):
        if plan.adversary.forks(number):
            with torch.no_grad():
                for name, a in reach.items():
                    a.copy_(of[0][name])
            adamw = torch.optim.AdamW(reach.values(), plan.adversary.lr(number), weight_decay=0.0)
        for batch in relearned:
            adamw.zero_grad()
            padded_loss(adversary, batch).backward()
            adamw.step()
        forget_grads = torch.autograd.grad(forget_loss(adversary, forget), theirs)
        retain_loss = padded_loss(model, retain) + (kept and 0.7 * kept(model, retain))
        retain_grads = torch.autograd.grad(1.5 * retain_loss, mine)
        for w, forget_grad, retain_grad in zip(mine, forget_grads, retain_grads):
            w.grad = forget_grad + retain_grad
        lion.step()
    return {name: of[0][name].detach() for name in names}


def npo_of(original):
    original = copy.deepcopy(original)

    def npo(model, samples):
        total = 0
        for sample in samples:
            rows = int((sample["labels"][1:] != -100).sum())
            with torch.no_grad():
                before = padded_loss(original, [sample])
            ratio = rows * (before - padded_loss(model, [sample]))
            total = total - 2 / 0.1 * torch.nn.functional.logsigmoid(-0.1 * ratio)
        return total / len(samples)

    return npo


def full(model, plan, steps=7, **changes):
    criterion = changes.pop("criterion", Criterion(retain_coeff=1.5))
    training = FullTraining(Decoder(model), criterion, lr=1e-3, optimizer="lion", **{**EVERY, **changes})
    for forget, retain, relearned in batches(plan, steps):
        training.step(forget, retain, relearned=relearned)
    return training


def reinserted(plan, model=None, steps=7, **changes):
    model = tiny_model() if model is None else model
    unlearned = moved(tiny_model())
    with kf.reinserted(model, unlearned, BLOCK, lr=1e-3, retain_coeff=1.5, **{**EVERY, **changes}) as training:
        for forget, retain, relearned in batches(plan, steps):
            training.step(forget, retain, relearned=relearned)
        training.check()
        return {name: tensor.clone() for name, tensor in training.tensors().items()}


def close(a, b):
    return set(a) == set(b) and all(relative(a[name], b[name]) < 1e-9 for name in a)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("frozen_form", [False, True])
def test_all_parameters_are_trained_as_with_two_models(frozen_form):
    model, plan = tiny_model(), schedule(frozen=frozen_form)
    truth = two_models(copy.deepcopy(model), [name for name, _ in model.named_parameters()], plan)
    with frozen(model):
        full(model, plan, adversary_frozen=frozen_form)
    assert close(weights(model), truth)


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 12}, {"gradient_checkpointing": True}])
def test_a_block_is_trained_as_with_two_models(changes):
    model, plan = tiny_model(), schedule()
    names = block_names(model, "model.layers", BLOCK)
    start = dict(moved(tiny_model()).named_parameters())
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(start[name])
    assert close(reinserted(plan, **changes), two_models(model, names, plan))


def test_other_objectives_are_taken_at_the_adversary():
    """NPO, whose original values are M0's wherever the loss is taken."""
    model, plan = tiny_model(), schedule()
    names = block_names(model, "model.layers", BLOCK)
    start, inserted = dict(moved(tiny_model()).named_parameters()), copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            inserted.get_parameter(name).copy_(start[name])
    truth = two_models(inserted, names, plan, forget_loss=npo_of(model))
    assert close(reinserted(plan, objective="npo"), truth)


def test_hidden_layers_are_kept_at_the_trained_weights():
    """The whole method: the forget loss at the adversary, the retain term with its hidden states at the model."""
    model, plan, layers = tiny_model(), schedule(), range(2, 6)
    original = copy.deepcopy(model)
    names = block_names(model, "model.layers", BLOCK)

    def kept(model, retain):
        spread, far = spreads(original, retain), []
        for sample in retain:
            with torch.no_grad():
                then = forward(original, sample)[1]
            now = forward(model, sample)[1]
            far.append(torch.stack([(now[i] - then[i]).square().sum(1).mean() / spread[i] for i in layers]).mean())
        return torch.stack(far).mean()

    start, inserted = dict(moved(tiny_model()).named_parameters()), copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            inserted.get_parameter(name).copy_(start[name])
    ours = reinserted(plan, retain_loss="hidden_layers", hidden_coeff=0.7)
    assert close(ours, two_models(inserted, names, plan, kept=kept))
    assert not close(ours, reinserted(plan))


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 12, "objective": "npo"}])
def test_an_adversary_of_the_whole_model(changes):
    model, plan = tiny_model(), schedule()
    original, names = copy.deepcopy(model), block_names(model, "model.layers", BLOCK)
    start, inserted = dict(moved(tiny_model()).named_parameters()), copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            inserted.get_parameter(name).copy_(start[name])
    before = identity(model)
    trained = reinserted(plan, model, adversary_reach="model", **changes)
    assert identity(model) == before
    more = {"forget_loss": npo_of(original)} if changes else {}
    truth = two_models(inserted, names, plan, reach=[name for name, _ in model.named_parameters()], **more)
    assert close(trained, truth) and not close(trained, reinserted(plan, **changes))


def test_batches_of_a_prefix_cache_serve_an_adversary_of_either_reach():
    """The adversary of the whole model changes the layers below the block too, so it takes the tokens alone."""
    plan = schedule()
    for reach in ("block", "model"):
        model, unlearned = tiny_model(), moved(tiny_model())
        cache = kf.PrefixCache(Decoder(model), FORGET + RETAIN)
        cache.advance(BLOCK.start)
        how = dict(lr=1e-3, retain_coeff=1.5, adversary_reach=reach)
        with kf.reinserted(model, unlearned, BLOCK, **how, **EVERY) as training:
            for number in range(7):
                forget, retain = plan[number]
                relearned = [cache.batch(batch) for batch in plan.relearned(number)]
                training.step(cache.batch(forget), cache.batch([8 + i for i in retain]), relearned=relearned)
            found = {name: tensor.clone() for name, tensor in training.tensors().items()}
        assert close(found, reinserted(plan, adversary_reach=reach))


def test_it_is_not_the_training_without_one():
    plan = schedule()
    without = Schedule(8, 5, 3, 2, 7, seed=3)
    model = tiny_model()
    unlearned = moved(tiny_model())
    with kf.reinserted(model, unlearned, BLOCK, lr=1e-3, retain_coeff=1.5) as training:
        for forget, retain, _ in batches(without):
            training.step(forget, retain)
        plain = {name: tensor.clone() for name, tensor in training.tensors().items()}
    assert not close(plain, reinserted(plan))


# ---------------------------------------------------------------- the same bits


def test_everything_of_the_original_is_put_back():
    model = touched_model()
    before = identity(model)
    reinserted(schedule(), model)
    assert identity(model) == before


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("model", 4), ("block", 2), ("block", 3), ("host", 4), ("half", 4), ("full", 3), ("full", 5), ("half rounded", 4),
     pytest.param("half full rounded", 4, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_resumed_training_has_the_same_bits(kind, steps):
    plan, found, kept = schedule(), [], {}
    for first in (0, steps):
        model = tiny_model(dtype=torch.bfloat16 if "half" in kind else torch.float64)
        unlearned = moved(tiny_model(dtype=model.dtype))
        how = dict(retain_coeff=1.5, optimizer_device="host" if kind == "host" else "device")
        how |= {"adversary_reach": "model"} if kind == "model" else {}
        every = EVERY | ({"master_weights": "stochastic"} if "rounded" in kind else {})
        with contextlib.ExitStack() as stack:
            if "full" in kind:
                stack.enter_context(frozen(model))
                criterion = Criterion(retain_coeff=1.5)
                training = FullTraining(Decoder(model), criterion, lr=1e-3, optimizer="lion", **every)
            else:
                training = stack.enter_context(kf.reinserted(model, unlearned, BLOCK, lr=1e-3, **how, **every))
            if first:
                training.load_state(kept, first)
            for number, (forget, retain, relearned) in enumerate(batches(plan)):
                if number >= first:
                    training.step(forget, retain, relearned=relearned)
                if number == steps - 1:
                    kept = {name: value.clone() for name, value in training.state().items()}
            found.append({name: value.clone() for name, value in training.state().items()})
    wide = torch.float64 if "half" not in kind else torch.float32
    assert found[0]["adversary.exp_avg.0"].dtype == wide
    assert equal(*found)


def test_the_host_updates_to_the_same_bits():
    plan = schedule()
    assert equal(reinserted(plan), reinserted(plan, optimizer_device="host"))


def test_masked_weights_keep_their_bits_in_both():
    name = "model.layers.2.mlp.up_proj.weight"
    model = tiny_model()
    mask = {name: torch.rand_like(model.get_parameter(name)) > 0.5}
    trained = reinserted(schedule(), mask=mask)[name]
    start = dict(moved(tiny_model()).named_parameters())[name]
    assert torch.equal(trained[~mask[name]], start[~mask[name]])
    assert not bool((trained == start)[mask[name]].any())


def test_steps_through_graphs_have_the_same_bits():
    """A graph for the weights that are trained, and another one for the adversary's: each holds addresses."""
    plan, found = schedule(), []
    for emulated in (None, capture):
        unlearned = moved(tiny_model())
        with kf.reinserted(tiny_model(), unlearned, BLOCK, lr=1e-3, retain_coeff=1.5, **EVERY) as training:
            training.use_graphs(emulated)
            for forget, retain, relearned in batches(plan):
                training.step(forget, retain, relearned=relearned)
            found.append({name: tensor.clone() for name, tensor in training.tensors().items()})
            captured = training.graphs.captured, training.adversary_graphs.captured
    assert min(captured) > 0
    assert equal(*found)
    assert close(found[0], reinserted(plan))


@pytest.mark.parametrize("tokens", [None, 14])
def test_a_streamed_model_gives_the_bits_of_one_in_memory(tmp_path, tokens):
    plan, found = schedule(), []
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "m0")
    for opened in (whole, streamed):
        model = opened(tmp_path / "m0")
        values = weights(moved(tiny_model(dtype=torch.float32)))
        how = dict(retain_coeff=1.5, micro_batch_tokens=tokens, gradient_checkpointing=True)
        with kf.reinserted(model, values, BLOCK, lr=1e-3, **how, **EVERY) as training:
            for forget, retain, relearned in batches(plan):
                training.step(forget, retain, relearned=relearned)
            found.append({name: tensor.clone() for name, tensor in training.tensors().items()})
    assert equal(*found)


# ---------------------------------------------------------------- what goes wrong


def test_the_number_of_batches_to_relearn_is_checked():
    with frozen(model := tiny_model()):
        training = FullTraining(Decoder(model), lr=1e-3, **EVERY)
        with pytest.raises(ValueError, match="got 1 batches to relearn, expected 2"):
            training.step(FORGET[:2], RETAIN[:2], relearned=[FORGET[2:]])
        without = FullTraining(Decoder(model), lr=1e-3)
        with pytest.raises(ValueError, match="expected 0: there is no adversary"):
            without.step(FORGET[:2], RETAIN[:2], relearned=[FORGET[2:]])


def test_an_adversary_that_diverges_is_named():
    for steps in (2, 1):
        with frozen(model := tiny_model(dtype=torch.float32)):
            before = weights(model)
            how = {**EVERY, "adversary_lrs": (3e37,), "adversary_steps": steps}
            training = FullTraining(Decoder(model), lr=1e-3, **how)
            with pytest.raises(
                Diverged, match="adversary's weights.*3e\\+37.*take 3e\\+37 out of adversary_lrs"
            ) as raised:
                training.step(FORGET[:2], RETAIN[:2], relearned=[FORGET[2:4], FORGET[4:6]][:steps])
            assert "adversary_lrs" in raised.value.cures and ("lr" in raised.value.cures) == (steps == 1)
            assert equal(weights(model), before)


def test_memory_that_runs_out_at_a_fork_names_the_adversary(monkeypatch):
    def full_up(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    model, unlearned = tiny_model(), moved(tiny_model())
    with pytest.raises(OutOfMemory, match="adversary_every=0"):  # noqa: SIM117
        with kf.reinserted(model, unlearned, BLOCK, lr=1e-3, **EVERY) as training:
            monkeypatch.setattr(type(training.flat), "twin", full_up)
            training.step(FORGET[:2], RETAIN[:2], relearned=[FORGET[2:4], FORGET[4:6]])


# ---------------------------------------------------------------- the schedule


def test_no_fact_stands_on_both_sides():
    for number in range(30):
        plan = schedule(30)
        forget, relearned = plan[number][0], plan.relearned(number)
        asked = {FACTS[i] for i in forget}
        assert asked and not asked & {FACTS[i] for batch in relearned for i in batch}
        assert len(relearned) == (2 if number % 3 == 0 else 1)


def test_each_fork_draws_anew():
    plan = schedule(90)
    sides = {frozenset(plan.adversary.halves(FACTS, step)[0]) for step in range(0, 90, 3)}
    assert len(sides) > 5
    assert {plan.adversary.lr(step) for step in range(90)} == {1e-3, 3e-3}
    assert all(plan.adversary.lr(step) == plan.adversary.lr(step - step % 3) for step in range(90))


def test_a_fork_sees_every_sample_of_its_halves():
    plan = Schedule(8, 0, 2, 1, 40, seed=3, adversary=AdversarySettings(every=40), facts=FACTS)
    relearned, asked = plan.adversary.halves(FACTS, 0)
    assert sorted(relearned + asked) == list(range(8))
    assert {i for step in range(8) for i in plan[step][0]} == set(asked)
    assert {i for step in range(8) for batch in plan.relearned(step) for i in batch} == set(relearned)


def test_of_tokens_each_sample_is_a_fact_and_equal_ones_are_one():
    said, config = [], kf.KUnBRConfig(num_blocks=3, top_k=0, warmup_epochs=1, adversary_every=2)
    twice = [FORGET[0], FORGET[1], {name: tensor.clone() for name, tensor in FORGET[0].items()}]
    assert with_facts(twice, None, config, Decoder(tiny_model()), "forget")[1] == [0, 1, 0]
    kf.unlearn(tiny_model(), FORGET[:3], RETAIN, config, progress=False, on_stage=said.append)
    assert sum("takes each sample for a fact" in text for text in said) == 1
    with pytest.raises(ValueError, match="2 forget samples about 1 fact"):
        kf.unlearn(tiny_model(), [twice[0], twice[2]], RETAIN, config, progress=False)


def test_a_single_fact_cannot_be_halved():
    plan = Schedule(3, 0, 2, 1, 4, seed=3, adversary=AdversarySettings(), facts=[0, 0, 0])
    with pytest.raises(ValueError, match="3 forget samples about 1 fact, expected two"):
        plan[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adversary_every": -1}, "adversary_every=-1: expected a whole number from 0"),
        ({"adversary_steps": 0}, "adversary_steps=0: expected a whole number from 1"),
        ({"adversary_lrs": ()}, "adversary_lrs=.*one or more different learning rates"),
        ({"adversary_lrs": (1e-3, 1e-3)}, "adversary_lrs=.*one or more different learning rates"),
        ({"adversary_lrs": (0.0,)}, "adversary_lrs entry=0.*above 0"),
        ({"adversary_reach": "all"}, "adversary_reach='all': expected one of block, model"),
        ({"adversary_frozen": 1}, "adversary_frozen=1: expected True or False"),
        ({"adversary_every": 0}, r"adversary_lrs=\(0.001, 0.003\): there is no adversary \(adversary_every=0\)"),
    ],
)
def test_settings_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        BlockSettings(1e-3, **{**EVERY, **changes})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adversary_lrs": 1e-3}, r"adversary_lrs=\(0.001,\): there is no adversary"),
        ({"adversary_frozen": True}, "adversary_frozen=True: there is no adversary"),
        ({"adversary_reach": "model"}, "adversary_reach='model': there is no adversary"),
        (
            {"adversary_every": 2, "adversary_reach": "model", "cover_precision": "int8"},
            "a cover in low precision is not",
        ),
        ({"block_hidden_coeff": 2.0}, "block_hidden_coeff=2: retain_loss='nll' has none"),
    ],
)
def test_settings_that_a_run_would_not_use(settings, said):
    with pytest.raises(ValueError, match=said):
        kf.KUnBRConfig(**settings)


def test_a_streamed_model_is_not_relearned_as_a_whole(tmp_path):
    """Said before the first stage."""
    tiny_model().save_pretrained(tmp_path / "m")
    model, unlearned = streamed(tmp_path / "m"), streamed(tmp_path / "m")
    config = kf.KUnBRConfig(num_blocks=2, top_k=1, skip_last_layers=0, adversary_every=2, adversary_reach="model")
    with pytest.raises(ValueError, match="adversary_reach='model': a streamed model's weights"):
        more = dict(unlearned=unlearned, output_dir=tmp_path / "out", on_stage=pytest.fail)
        kf.unlearn(model, FORGET, RETAIN, config, progress=False, **more)


def test_approximations_are_measured_before_the_adversary_is_there():
    found = []
    for settings in ({}, EVERY):
        how = dict(lr=1e-3, cover_precision="int8", **settings)
        with kf.reinserted(tiny_model(), moved(tiny_model()), BLOCK, **how) as training:
            found.append(gradient_cosine(training, training.criterion.pack(FORGET, RETAIN)))
    assert 0.9 < found[0] < 1 and found[1] == pytest.approx(found[0], abs=1e-5)  # summed in another order
