"""Trainings that go to infinity: each is seen, also in its last step; no model is written; a lower rate rescues it."""

import contextlib
import copy
import itertools
import math
import re

import pytest
import torch
from helpers import rarely
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.evaluation.rtt import AttackDiverged
from kunbr_fast.kernels.optimizers.op import Watched
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.parallel.group import ALONE
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.stages import Stages
from kunbr_fast.training import training as steps
from kunbr_fast.training.fine_tune import train_all
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.settings import BlockSettings, FullSettings
from kunbr_fast.training.shared import SharedStep

FORGET, RETAIN = random_samples(10, seed=1), random_samples(12, seed=2)
GOOD = dict(
    batch_size=5, retain_batch_size=4, warmup_epochs=2, warmup_lr=1e-3, num_blocks=3, top_k=2, block_epochs=2,
    block_lr=1e-3, seed=3, rtt=False,
)  # fmt: skip
ONE_STEP = dict(batch_size=10, warmup_epochs=1, block_epochs=1)
EACH = dict(checkpoint_every=1)
FP16 = torch.float16


def run(out, config, dtype=torch.float32, resume=False, **more):
    """The result's weights. Nothing is saved of a model that is not finite, nor of one that diverged."""
    model, saved = tiny_model(dtype=dtype), []
    more.setdefault("progress", False)
    try:
        kf.unlearn(
            model, FORGET, RETAIN, kf.KUnBRConfig(**GOOD | config), output_dir=out, resume=resume,
            before_cleanup=saved.append, **more,
        )  # fmt: skip
    except BaseException:
        assert not saved
        raise
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert saved and all(bool(value.isfinite().all()) for value in weights.values())
    return weights


def same(ours, theirs):
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


# (settings that diverge, dtype, stage, the settings that rescue it)
DIVERGING = {
    "a block, one step": (dict(block_lr=1e30) | ONE_STEP, None, "block", dict(block_lr=1e-3)),
    "a cumulative block, one step": (
        dict(block_lr=1e30, insertion="cumulative") | ONE_STEP, None, "block", dict(block_lr=1e-3)),
    "a block, several steps": (dict(block_lr=1e30) | EACH, None, "block", dict(block_lr=1e-3)),
    "cumulative blocks, two rounds": (
        dict(block_lr=1e30, insertion="cumulative", rounds=2) | EACH, None, "block", dict(block_lr=1e-3)),
    "independent blocks, two rounds": (dict(block_lr=1e30, rounds=2) | EACH, None, "block", dict(block_lr=1e-3)),
    "AdamW in a block": (dict(block_lr=1e30, optimizer="adamw") | ONE_STEP, None, "block", dict(block_lr=1e-3)),
    "only the fp16 copy overflows": (dict(block_lr=1e5) | ONE_STEP, FP16, "block", dict(block_lr=1e-3)),
    "fp16 without master weights": (
        dict(block_lr=1e5, master_weights="none") | ONE_STEP, FP16, "block", dict(block_lr=1e-3)),
    "fp16, the update on the host": (
        dict(block_lr=1e5, optimizer_device="host") | ONE_STEP, FP16, "block", dict(block_lr=1e-3)),
    "the warm-up, one step": (dict(warmup_lr=1e30) | ONE_STEP, None, "warm-up", dict(warmup_lr=1e-3)),
    "the warm-up, several steps": (dict(warmup_lr=1e30) | EACH, None, "warm-up", dict(warmup_lr=1e-3)),
    "AdamW in the warm-up": (
        dict(warmup_lr=1e30, warmup_optimizer="adamw") | ONE_STEP, None, "warm-up", dict(warmup_lr=1e-3)),
    "the warm-up in fp16": (dict(warmup_lr=1e5) | ONE_STEP, FP16, "warm-up", dict(warmup_lr=1e-3)),
    "weight decay in the warm-up": (dict(weight_decay=1e38) | ONE_STEP, None, "warm-up", dict(weight_decay=0.0)),
}  # fmt: skip


OFTEN = ("a block, several steps", "independent blocks, two rounds", "AdamW in a block", "only the fp16 copy overflows",
         "fp16, the update on the host", "the warm-up, one step", "AdamW in the warm-up")  # fmt: skip


@pytest.mark.parametrize("which", rarely(DIVERGING, OFTEN))
def test_it_is_seen_nothing_is_written_and_a_lower_rate_rescues(which, tmp_path):
    """With the bits of a run that had the lower rate from the stage's beginning on."""
    config, dtype, stage, rescue = DIVERGING[which]
    dtype, out = dtype or torch.float32, tmp_path / "out"
    with pytest.raises(kf.Diverged) as error:
        run(out, config, dtype)
    said, name = str(error.value), next(iter(rescue))
    assert said.startswith(f"diverged at {stage}") and f"{name} ({config[name]:g}" in said.replace("=", " (")
    assert error.value.resume == "A resumed run begins this stage again" and "\n" not in said
    same(run(out, config | rescue, dtype, resume=True), run(tmp_path / "truth", config | rescue, dtype))


@contextlib.contextmanager
def destroyed(at, factor, monkeypatch):
    """Inside, update number `at` of a stage multiplies all weights that it makes by `factor`."""
    update = steps.Training.update

    def then(self, term=None):
        update(self, term)
        if self.steps - 1 == at:
            with torch.no_grad():
                for parameter in self.parameters.values():
                    parameter.mul_(factor)
            if not math.isfinite(factor):  # as a kernel would have seen
                self.optimizer.flag(torch.device("cpu")).fill_(1)

    with monkeypatch.context() as patch:
        patch.setattr(steps.Training, "update", then)
        yield


@pytest.mark.parametrize("factor", [math.inf, 1e30])
@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize(
    "at, every",
    [
        pytest.param(at, every, marks=() if (at, every) in ((1, 1), (3, 1), (2, 2)) else pytest.mark.slow)
        for at, every in itertools.product(range(4), (1, 2))
    ],
)
def test_the_checkpoint_before_the_bad_update_is_gone_on_from(at, every, warm_up, factor, monkeypatch, tmp_path):
    """Steps 0 to 3 of a stage. What is kept is the last state from which a step was good."""
    config = dict(checkpoint_every=every, top_k=1, warmup_epochs=2 if warm_up else 0)
    lower = config | ({"warmup_lr": 1e-4} if warm_up else {"block_lr": 1e-4})
    done = {1: [0, 1, 2, 3], 2: [0, 0, 2, 2]}[every][at]  # saved and found good: by step `at`, the last good one
    with destroyed(at, factor, monkeypatch), pytest.raises(kf.Diverged) as error:
        run(tmp_path / "out", config)
    told = f"The checkpoint after {done} steps was found good: a resumed run goes on from there"
    assert error.value.resume == (told if done else "A resumed run begins this stage again")
    stage = "warm-up" if warm_up else "block"
    # an update that stores infinity is named itself, and so is the last one; else it is the next step that sees it
    number = at if factor == math.inf or at == 3 else at + 1
    assert re.match(rf"diverged at {stage}[0-9 -]*, step {number}[ :]", str(error.value)), error.value
    rescued = run(tmp_path / "out", lower, resume=True)

    seen, stop = [], kf.Stop()

    @contextlib.contextmanager
    def around(name, part):
        seen.extend([part] * (part == "step"))
        if len(seen) == done:  # within the step
            stop.request()
        yield

    if not done:
        same(rescued, run(tmp_path / "truth", lower))
        return
    with pytest.raises(kf.Stopped):
        run(tmp_path / "truth", config, stop=stop, reporter=Reporter(around=around))
    same(rescued, run(tmp_path / "truth", lower, resume=True))


def test_a_checkpoint_whose_next_step_is_not_good_does_not_replace_the_one_before(monkeypatch, tmp_path):
    """Killed between the bad update and the step that would have seen it: the bad state is tried, and rejected."""
    config = dict(checkpoint_every=1, warmup_epochs=0, top_k=1)

    def kill(name, part):
        seen.extend([part] * (part == "step"))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return contextlib.nullcontext()

    seen = []
    with destroyed(2, 1e30, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, reporter=Reporter(around=kill))
    for _ in range(2):  # first from the unconfirmed state, then from the confirmed one
        try:
            rescued = run(tmp_path, config | {"block_lr": 1e-4}, resume=True)
        except kf.Diverged as error:
            assert "after 2 steps was found good" in error.resume
    assert rescued


def test_a_lower_rate_is_no_cure_for_blocks_that_others_have_been_trained_before(monkeypatch, tmp_path):
    made = []
    update = steps.Training.update

    def then(self, term=None):
        update(self, term)
        made.append(self.name)
        if len(set(made)) == 2:
            self.optimizer.flag(torch.device("cpu")).fill_(1)

    with monkeypatch.context() as patch:
        patch.setattr(steps.Training, "update", then)
        with pytest.raises(kf.Diverged) as error:
            run(tmp_path, dict(warmup_epochs=0))
    assert error.value.resume.endswith("with this learning rate, by which the blocks that are done were trained")
    same(run(tmp_path, dict(warmup_epochs=0), resume=True), run(tmp_path / "truth", dict(warmup_epochs=0)))


def test_a_model_that_is_not_finite_is_never_saved(monkeypatch, tmp_path):
    """Whatever else has made it so."""
    monkeypatch.setattr(Watched, "left_finite", lambda self: True)
    place = Decoder.place

    def spoilt(self, weights):
        place(self, weights)
        with torch.no_grad():
            self.layers[1].mlp.down_proj.weight[0, 0] = math.nan

    monkeypatch.setattr(Decoder, "place", spoilt)
    with pytest.raises(kf.Diverged, match=r"the merge of the trained blocks: model.layers.1.mlp.down_proj.weight is"):
        run(tmp_path, {})


def overflowing(monkeypatch):
    """Merged models have finite weights, and a forward pass that is not finite."""
    check = Stages.check_result

    def then(self, *trained):
        with torch.no_grad():
            for weight in (self.decoder.layers[1].mlp.up_proj.weight, self.decoder.layers[1].mlp.down_proj.weight):
                weight.mul_(1e30)
        check(self, *trained)

    monkeypatch.setattr(Stages, "check_result", then)


def test_a_result_that_overflows_in_use_is_never_saved_and_other_rates_rescue_it(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        overflowing(patch)
        with pytest.raises(kf.Diverged) as error:
            run(tmp_path / "out", {})
    said = str(error.value)
    merge = "diverged at the merge of the trained blocks: "
    assert said.startswith(merge + "the hidden states for forget sample 0 to retain sample 11 are not finite")
    assert "lower block_lr (0.001), on resuming too; or in a new run (another output directory) lower warmup_lr" in said
    assert error.value.resume == "A resumed run trains the blocks again" and "\n" not in said
    assert not list((tmp_path / "out/kunbr-checkpoints").glob("blocks*"))
    lower = dict(block_lr=1e-4)
    same(run(tmp_path / "out", lower, resume=True), run(tmp_path / "truth", lower))


@pytest.mark.parametrize("model", ["result", "unlearned", "original"])
def test_an_answer_that_is_not_finite_is_a_divergence_of_what_has_made_the_model(model, monkeypatch, tmp_path):
    """Of the original it is none."""
    asked, measured = {"result": 2, "unlearned": 1, "original": 0}[model], []

    def bad(self, decoder, name):
        measured.append(name)
        if len(measured) == asked + 1:
            raise FloatingPointError("the model's answer to question 3 is not a finite number ([nan]): its weights")
        return {"accuracy": {}}

    monkeypatch.setattr(Stages, "_measured", bad)
    at = {"result": "the merge of the trained blocks", "unlearned": "the end of the warm-up"}.get(model)
    with pytest.raises(FloatingPointError if at is None else kf.Diverged) as error:
        run(tmp_path, {})
    assert measured[-1] == model and "answer to question 3 is not a finite number" in str(error.value)
    if at is not None:
        assert str(error.value).startswith(f"diverged at {at}: ") and "resumed run" in error.value.resume


@pytest.mark.parametrize("own", [True, False])
def test_an_answer_before_the_attack_is_the_result_s_and_one_in_it_the_attack_s(own, monkeypatch, tmp_path):
    def bad(self):
        kind = AttackDiverged if own else FloatingPointError
        raise kind("the model's answer to question 3 is not a finite number ([nan]): its weights")

    monkeypatch.setattr(Stages, "_attack", bad)
    with pytest.raises(AttackDiverged if own else kf.Diverged) as error:
        run(tmp_path, {})
    if not own:
        said = "Nothing that a resumed run may change cures it: in a new run (another output directory) lower block_lr"
        assert said in str(error.value) and not error.value.resume


@pytest.mark.parametrize("insertion", ["independent", "cumulative"])
def test_a_streamed_run_that_diverges_writes_no_model(insertion, tmp_path):
    paths, out = [tmp_path / name for name in ("original", "unlearned")], tmp_path / "out"
    for seed, path in enumerate(paths):
        tiny_model(dtype=torch.float32, seed=seed).save_pretrained(path, max_shard_size="70KB")

    def streamed(lr, out, resume=False):
        model, unlearned = map(open_streamed, paths)
        config = kf.KUnBRConfig(**GOOD | ONE_STEP | dict(block_lr=lr, insertion=insertion))
        how = dict(unlearned=unlearned, output_dir=out, resume=resume, progress=False)
        kf.unlearn(model, FORGET, RETAIN, config, **how)
        found = weights_of(model)
        return {name: found[name].clone() for name in found}

    with pytest.raises(kf.Diverged, match="diverged at block .*step 0"):
        streamed(1e30, out)
    assert not list(out.glob("*.safetensors*")) and not (out / "config.json").exists()
    same(streamed(1e-3, out, resume=True), streamed(1e-3, tmp_path / "truth"))


# ---------------------------------------------------------------- without a run


@pytest.mark.parametrize("lr", [1e30, 3e38])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_reinserted_gives_back_no_block_that_its_last_step_destroyed(optimizer, lr):
    if optimizer == "adamw" and lr > 1e38:
        with pytest.raises(ValueError, match=r"lr=3e\+38: AdamW's first step is 3e\+39, more than fp32 holds"):
            FullSettings(lr)
        return
    original, unlearned = tiny_model(dtype=torch.float32), tiny_model(seed=1, dtype=torch.float32)
    before = [copy.deepcopy(m.state_dict()) for m in (original, unlearned)]
    said = re.escape(f"lower the learning rate (lr={lr:g})")
    with pytest.raises(kf.Diverged, match=f"diverged at block 2-3, step 0.*{said}"):
        with kf.reinserted(original, unlearned, range(2, 4), lr=lr, optimizer=optimizer) as training:
            training.step(FORGET, RETAIN)
    for model, state in zip((original, unlearned), before):
        same(dict(model.state_dict()), state)
        assert all(p.grad is None for p in model.parameters())


def test_a_training_of_all_parameters_ends_with_a_look():
    model = tiny_model(dtype=torch.float32)
    epochs = []
    with pytest.raises(kf.Diverged, match="diverged at step 1"):
        train_all(Decoder(model), FORGET, lr=1e30, optimizer="lion", epochs=1, batch_size=5, on_epoch=epochs.append)
    assert not epochs  # nobody evaluates it
    training = FullTraining(Decoder(tiny_model(dtype=torch.float32)), lr=1e-3)
    training.step(FORGET, RETAIN)
    state = {name: value.clone() for name, value in training.state().items()}
    training.check()
    same(training.state(), state)
    assert all(p.grad is None for p in training.parameters.values()) and training.last is None


def test_a_shared_step_sees_the_update_before_it():
    """As a step of several ranks does; nothing is updated."""
    training = FullTraining(Decoder(tiny_model(dtype=torch.float32)), lr=1e-3)
    batch = training.criterion.pack(FORGET, RETAIN)
    for number in range(2):
        step = SharedStep(training)
        step.add(batch, training.accumulate(batch))
        if number == 1:
            training.optimizer.flag(torch.device("cpu")).fill_(1)
            with pytest.raises(kf.Diverged, match=r"diverged at step 0 \(.*its update left weights"):
                step.gather(ALONE)
            assert training.steps == 1 and all(p.grad is None for p in training.parameters.values())
            return
        step.gather(ALONE)
        step.apply()


@pytest.mark.parametrize("kind", [FullSettings, BlockSettings])
@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(lr=1e39), "lr=1e+39: expected a number of at least 0 that fp32 holds"),
        (dict(lr=-1.0), "lr=-1.0: expected"),
        (dict(lr=math.nan), "lr=nan: expected"),
        (dict(lr=1e-3, weight_decay=1e300), "weight_decay=1e+300: expected a number of at least 0 that fp32 holds"),
        (dict(lr=1e20, weight_decay=1e20), "lr=1e+20, weight_decay=1e+20: expected a product that fp32 holds"),
    ],
)
def test_numbers_beyond_fp32_are_refused_by_name(kind, settings, said):
    with pytest.raises(ValueError) as error:
        kind(**settings)
    assert said in str(error.value)


@pytest.mark.parametrize("name, optimizer", [("block_lr", "optimizer"), ("warmup_lr", "warmup_optimizer")])
def test_a_run_names_its_own_setting(name, optimizer):
    with pytest.raises(ValueError, match=rf"{name}=1e\+20, weight_decay=1e\+20: expected a product"):
        kf.KUnBRConfig(**{name: 1e20, "weight_decay": 1e20})
    with pytest.raises(ValueError, match=rf"{name}=1e\+38: AdamW's first step is 1e\+39"):
        kf.KUnBRConfig(**{name: 1e38, optimizer: "adamw"})


# ---------------------------------------------------------------- what the error advises

CURED = dict(
    retain_coeff=2.0, forget_loss_cap=10.0, objective="npo", weight_decay=0.0, max_retain_loss=99.0,
    warmup_lr=1e-4, block_lr=1e-4, warmup_epochs=1, block_epochs=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "stage, given", [("warm-up", False), ("block", False), ("block", True), ("block 2", False), ("block 2", True)]
)
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_resume_accepts_what_the_error_says_and_refuses_what_it_leaves_to_a_new_run(decay, stage, given, tmp_path):
    """The table that decides is asked, for every setting that is named."""
    config = dict(weight_decay=decay, **({"warmup_lr": 1.0} if stage == "warm-up" else {"block_lr": 1.0}))
    more = dict(unlearned=tiny_model(seed=1, dtype=torch.float32)) if given else {}
    if stage != "warm-up" and not given:
        config["warmup_lr"] = 0.0
    made, update = [], steps.Training.update

    def then(self, term=None):
        update(self, term)
        made.append(self.name)
        blocks = [name for name in dict.fromkeys(made) if name.startswith("block")]
        if {"warm-up": True, "block": len(blocks) == 1, "block 2": len(blocks) == 2}[stage]:
            self.optimizer.flag(torch.device("cpu")).fill_(1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(kf.Diverged) as error:
        patch.setattr(steps.Training, "update", then)
        run(tmp_path, config, **more)
    said = str(error.value)
    free, _, locked = said.partition("in a new run")
    for name, cure in error.value.cures.items():
        assert (cure in free) != (cure in locked)
        asked = dict(config)
        asked[name] = CURED[name]
        if cure in locked:
            with pytest.raises(ValueError, match=f"{name} was .* in the run to be resumed"):
                run(tmp_path, asked, resume=True, **more)
        else:
            accepted(tmp_path, asked, more)


def accepted(out, config, more):
    """Whether a resumed run begins; it ends at once, and another one can be tried."""

    def stop(text):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Stages, "all", stop)
        run(out, config, resume=True, **more)


@pytest.mark.parametrize(
    "config, said, unsaid",
    [
        (dict(retain_coeff=1e38), "To cure it lower retain_coeff (1e+38)", "take another model"),
        (dict(objective="npo", objective_options=dict(beta=1e-39)), "take other options of npo (beta=1e-39)", "model"),
        (dict(), "take another model, or a wider dtype than float32", "retain_coeff"),
    ],
)
def test_a_first_loss_that_is_not_finite_is_not_blamed_on_the_learning_rate(config, said, unsaid, tmp_path):
    def spoilt(model, batch, output):
        return output * math.inf

    with pytest.MonkeyPatch.context() as patch, pytest.raises(kf.Diverged) as error:
        if not config:  # from the first step on
            begin = steps.Training.accumulate
            handles = []

            def then(self, step):
                handles.append(self.decoder.layers[-1].register_forward_hook(spoilt))
                try:
                    return begin(self, step)
                finally:
                    handles.pop().remove()

            patch.setattr(steps.Training, "accumulate", then)
        run(tmp_path, config)
    text = str(error.value)
    assert text.startswith("diverged at warm-up, step 0 (") and said in text and unsaid not in text
    assert "itself is not finite, before any update, so the learning rate is not the cause" in text
    assert "lower the learning rate" not in text and "\n" not in text
