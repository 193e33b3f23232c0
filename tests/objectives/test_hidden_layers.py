"""retain_loss="hidden_layers" against a plain formulation: two models, output_hidden_states, a loop over samples."""

import copy
import math

import pytest
import torch
from hidden_states import forward, spreads
from tiny_models import moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.hidden_layers import HiddenLayers
from kunbr_fast.objectives.layer_states import LayerStates
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.training.full import FullTraining

BLOCK = range(2, 4)
FORGET, RETAIN = random_samples(4, seed=1), random_samples(6, seed=2)
STEPS = [([0, 1], [0, 1, 2]), ([2, 3], [3, 4, 5]), ([1, 2], [1, 5])]
LR, COEFF, WEIGHT = 1e-3, 1.5, 0.7


@pytest.fixture(scope="module")
def models():
    original = tiny_model(num_hidden_layers=5)
    return original, moved(original, size=0.05)


# ---------------------------------------------------------------- the truth


def plain_loss(model, original, forget, retain, layers, spread):
    loss = -torch.stack([forward(model, s)[0] for s in forget]).mean()
    terms = []
    for sample in retain:
        nll, now = forward(model, sample)
        with torch.no_grad():
            then = forward(original, sample)[1]
        far = [(now[i] - then[i]).square().sum(1).mean() / spread[i] for i in layers]
        terms.append(nll + WEIGHT * torch.stack(far).mean())
    return loss + COEFF * torch.stack(terms).mean()


def plain_training(model, original, layers, spread, names=None, steps=STEPS):
    """Trained in place; spread: of the layers, or None: of each step's retain samples. Returns the losses."""
    found, parameters = [], [p for n, p in model.named_parameters() if names is None or n in names]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.0)
    for f, r in steps:
        forget, retain = [FORGET[i] for i in f], [RETAIN[i] for i in r]
        of_step = spreads(original, retain) if spread is None else spread
        loss = plain_loss(model, original, forget, retain, layers, of_step)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def same(ours, theirs):
    for name, value in theirs.items():
        assert float((ours[name] - value).detach().norm()) <= 1e-9 * float(value.detach().norm()), name


HOWS = [{}, {"gradient_checkpointing": True}, {"micro_batch_tokens": 25}]


def hidden(layers="all"):
    return dict(retain_loss="hidden_layers", retain_coeff=COEFF, hidden=HiddenLayers(layers, WEIGHT))


@pytest.mark.parametrize("layers", ["all", (1, 3)])
def test_all_parameters(layers, models):
    original = models[0]
    truth = copy.deepcopy(original)
    losses = plain_training(truth, original, range(5) if layers == "all" else layers, spreads(original, RETAIN))
    for how in HOWS:
        model = copy.deepcopy(original)
        c = Criterion(**hidden(layers))
        values = OriginalValues.of(Decoder(model), {"forget": FORGET, "retain": RETAIN}, c.needs, batch_tokens=20)
        training = FullTraining(Decoder(model), c, lr=LR, **how)
        found = []
        for f, r in STEPS:
            batch = c.pack([FORGET[i] for i in f], [RETAIN[i] for i in r], values.batch([*f, *(4 + i for i in r)]))
            found.append(training.step_packed(batch)["loss"])
        assert found == pytest.approx(losses, rel=1e-9)
        same(dict(model.named_parameters()), dict(truth.named_parameters()))
    with pytest.raises(ValueError, match=r"the original model's layer\.\d of these samples is needed: give original="):
        training.step(FORGET, RETAIN)


@pytest.mark.parametrize(
    ("layers", "measured"),
    [("all", "with the step"), ("all", "before"), ((1, 3), "with the step"), ("last", "before"), ("upper", "before")],
)
def test_a_block(layers, measured, models):
    """Layers below the block do not count; what is measured with a step has that step's spread."""
    original, unlearned = models
    truth = copy.deepcopy(original)
    truth.model.layers[2:4].load_state_dict(unlearned.model.layers[2:4].state_dict())
    names = {n for n, _ in truth.named_parameters() if n.startswith(("model.layers.2.", "model.layers.3."))}
    spread = None if measured == "with the step" else spreads(original, RETAIN)
    which = {"all": [2, 3, 4], "upper": [2, 3, 4], "last": [4]}.get(layers, [3])
    losses = plain_training(truth, original, which, spread, names)
    wanted = {n: p for n, p in truth.named_parameters() if n in names}
    settings = dict(retain_loss="hidden_layers", retain_layers=layers, hidden_coeff=WEIGHT, retain_coeff=COEFF)
    decoder, before = Decoder(original), copy.deepcopy(original.state_dict())
    other, samples = Decoder(copy.deepcopy(original)), {"forget": FORGET, "retain": RETAIN}
    cache = kf.PrefixCache(decoder, FORGET + RETAIN)
    cache.advance(BLOCK.start)
    for how in HOWS:
        target = dict(unlearned.named_parameters())
        with kf.reinserted(decoder, target, BLOCK, LR, optimizer="adamw", **settings, **how) as training:
            c, found = training.criterion, []
            values = None if spread is None else OriginalValues.of(other, samples, c.needs)
            for f, r in STEPS:
                at = [*f, *(4 + i for i in r)]
                batch = cache.batch(at) if "micro_batch_tokens" in how else pack([(FORGET + RETAIN)[i] for i in at])
                batch = c.step_batch(batch, len(f), values and values.batch(at))
                found.append(training.step_packed(batch)["loss"])
        assert found == pytest.approx(losses, rel=1e-9)
        same(target, wanted)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("form", ["exact", "budget", "fp8"])
def test_a_whole_run(form, tmp_path):
    """Warm-up and cumulative blocks, against plain trainings; the original's states computed once, wherever they are
    kept. fp8 is an approximation, which the report tells."""
    original = tiny_model(num_hidden_layers=4)
    kept = {"exact": {}, "budget": dict(cache="host", cache_bytes=20_000), "fp8": dict(cache_dtype="fp8")}[form]
    config = KUnBRConfig(
        retain_loss="hidden_layers", retain_layers=[0, 2, 3], hidden_coeff=WEIGHT, retain_coeff=COEFF, batch_size=2,
        retain_batch_size=3, warmup_epochs=1, warmup_lr=LR, warmup_optimizer="adamw", num_blocks=4, top_k=2, rtt=False,
        block_epochs=1, block_lr=LR, optimizer="adamw", insertion="cumulative", skip_last_layers=1, **kept,
    )  # fmt: skip
    model = copy.deepcopy(original)
    report = kf.unlearn(model, FORGET, RETAIN, config, output_dir=tmp_path, progress=False)
    assert report.seconds["states"] > 0 and "reference" not in report.seconds
    error = {e["original_states"] for e in report.cache_errors.values()}
    assert len(error) == (form == "fp8") and all(0.005 < e < 0.05 for e in error)

    def steps(number):
        schedule = Schedule(len(FORGET), len(RETAIN), 2, 3, 1, config.seed * 1000 + number)
        return [schedule[i] for i in range(len(schedule))]

    spread, unlearned, m0 = spreads(original, RETAIN), copy.deepcopy(original), copy.deepcopy(original)
    plain_training(unlearned, original, [0, 2, 3], spread, steps=steps(0))
    for number, block in enumerate(report.blocks):
        m0.model.layers[block.start].load_state_dict(unlearned.model.layers[block.start].state_dict())
        names = {n for n, _ in m0.named_parameters() if n.startswith(f"model.layers.{block.start}.")}
        plain_training(m0, original, [i for i in (0, 2, 3) if i >= block.start], spread, names, steps(1 + number))
        unlearned.model.layers[block.start].load_state_dict(m0.model.layers[block.start].state_dict())
    truth = dict(unlearned.named_parameters())
    if form != "fp8":
        same(dict(model.named_parameters()), truth)
    else:
        for name, value in model.named_parameters():
            assert float((value - truth[name]).detach().norm()) <= 0.05 * float(truth[name].detach().norm()), name


@pytest.mark.parametrize("dtype", ["none", "bf16", "fp8"])
@pytest.mark.parametrize("storage, budget", [("device", None), ("host", 4000), ("file", None)])
def test_states_are_kept_like_the_prefix_cache(dtype, storage, budget, models, tmp_path):
    decoder = Decoder(models[0])
    states = LayerStates(decoder, RETAIN, [3, 0], Place(storage, tmp_path), dtype=dtype, budget=budget, batch_tokens=20)
    tokens, row = sum(len(s["input_ids"]) for s in RETAIN), states.rows.width * states.rows.dtype.itemsize
    assert states.nbytes == 2 * tokens * row
    assert (states.fast, states.storage) == ((None, storage) if budget is None or dtype == "fp8" else ("host", "file"))
    values = OriginalValues({"nll": [None] * 10}).with_states(states, first=4)
    values.expect([[1, 5, 4], [0], [7, 5]])
    truth = OriginalValues.of(decoder, {"retain": RETAIN}, {"layer.0": ("retain",), "layer.3": ("retain",)})
    for indices in ([1, 5, 4], [0], [7, 5], [9, 2, 3, 9]):
        found = values.batch(indices)
        mine = [i for i, place in enumerate(indices) if place >= 4]
        for kind in ("layer.0", "layer.3") if mine else ():
            ours, exact = (
                found.gathered(kind, mine, decoder.device),
                torch.cat([truth.values[kind][indices[i] - 4] for i in mine]),
            )
            error = float((ours - exact).norm() / exact.norm())
            assert error <= (1e-14 if dtype == "none" else 0.004 if dtype == "bf16" else 0.05)
            assert (found.values[kind][0] is None) == (0 not in mine) and found.spread == values.spread
        assert found.batch([0]).values.keys() == found.values.keys()
    assert values.spread == pytest.approx(truth.spread, rel=1e-12)
    assert (states.relative_error == 0) == (dtype == "none") and states.relative_error < 0.05
    assert budget is None or dtype == "fp8" or states.hits >= 1


def test_parts_of_a_batch(models):
    """One side alone; and a step without retain samples is a sum of NLLs, as a CUDA graph takes it."""
    original, unlearned = models
    settings = dict(retain_loss="hidden_layers", hidden_coeff=WEIGHT)
    with kf.reinserted(original, dict(unlearned.named_parameters()), BLOCK, LR, COEFF, **settings) as training:
        c = training.criterion
        steps = [c.step_batch(pack(samples), n) for samples, n in ((FORGET + RETAIN, 4), (FORGET, 4), (RETAIN, 0))]
        both, forget, retain = (training.loss(step).loss.detach() for step in steps)
        assert [c.weights(step) is None for step in steps] == [True, False, True]
    torch.testing.assert_close(forget + retain, both, rtol=1e-12, atol=0)
    assert math.isfinite(float(both)) and Criterion(retain_loss="kl").weights(steps[1]) is not None


def test_the_original_itself_is_at_no_distance(models):
    original = models[0]
    target = dict(original.named_parameters())
    with kf.reinserted(original, dict(target), BLOCK, LR, retain_loss="hidden_layers") as training:
        batch = training.criterion.step_batch(pack(FORGET + RETAIN), 4)
        loss, plain = training.loss(batch).loss, Criterion()(training.decoder, batch).loss
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)


def test_what_does_not_fit(models):
    original, unlearned = models
    target = dict(unlearned.named_parameters())

    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            with kf.reinserted(original, target, BLOCK, LR, **settings):
                pass

    refused(r"retain_layers=\[0, 1\]: all of them are below the block 2-3, which cannot change them: name one of 2",
            retain_loss="hidden_layers", retain_layers=[0, 1])  # fmt: skip
    refused("retain_layers=.*: 5: the model has layers 0 to 4: leave it out",
            retain_loss="hidden_layers", retain_layers=[2, 5])  # fmt: skip
    refused(r"hidden_coeff=2\.0: retain_loss='nll' has none: leave it out, or take hidden_layers", hidden_coeff=2.0)
    refused("retain_layers=.*: retain_loss='kl' has none", retain_layers=[2], retain_loss="kl")
    refused("rmu has its own retain term", objective="rmu", retain_loss="hidden_layers")
    refused("ga has no retain term", objective="ga", retain_loss="hidden_layers")
    with pytest.raises(ValueError, match="retain_layers=.*: 7: the model has layers 0 to 4"):
        FullTraining(Decoder(original), Criterion(**hidden([7])), lr=LR)


def test_settings(tmp_path):
    config = KUnBRConfig(retain_loss="hidden_layers", retain_layers=[3, 1], hidden_coeff=2)
    config.save(tmp_path / "run.yaml")
    assert KUnBRConfig.load(tmp_path / "run.yaml") == config and config.retain_layers == (3, 1)
    assert config.criterion(range(2)).hidden == HiddenLayers((3, 1), 2.0)
    assert KUnBRConfig(retain_loss="hidden_layers", retain_layers=["all"]).retain_layers == "all"
    both = KUnBRConfig(retain_loss="hidden_layers", warmup_objective="ga", retain_layers=[1])
    assert both.criterion(warmup=True).hidden is None and both.criterion().hidden.layers == (1,)
    for settings, match in (
        (dict(hidden_coeff=2.0), "hidden_coeff=2.0: retain_loss='nll' has none"),
        (dict(hidden_coeff=0), "hidden_coeff=0: expected a number above 0"),
        (dict(retain_layers=[1], objective="ga"), "retain_layers=.*: retain_loss='nll' has none"),
        (
            dict(retain_layers=[1, 1], retain_loss="hidden_layers"),
            "all, upper, last, or different numbers of layers",
        ),
        (
            dict(retain_layers=[], retain_loss="hidden_layers"),
            "all, upper, last, or different numbers of layers",
        ),
        (dict(retain_layers="some", retain_loss="hidden_layers"), "retain_layers entry='some': expected a whole"),
        (dict(retain_layers=[-1], retain_loss="hidden_layers"), "retain_layers entry=-1: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            KUnBRConfig(**settings)
