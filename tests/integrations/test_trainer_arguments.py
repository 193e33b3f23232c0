"""What TrainingArguments, callbacks and a trainer's own methods do for `KUnBRTrainer`."""

import contextlib
import dataclasses
import functools
import logging
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
import transformers as tf
from test_hf_trainer import equal, weights
from tiny_models import tiny_model
from trainer_runner import CONFIG, STEPS, data, trainer

import kunbr_fast as kf
from kunbr_fast.integrations import trainer_arguments as ours
from kunbr_fast.integrations.hf_trainer import KUnBRMixin, KUnBRTrainer
from kunbr_fast.integrations.stage_steps import share_steps

TABLE = Path(__file__).parents[2].joinpath("docs/integrations.md")
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
SHORT = {"warmup_epochs": 1, "block_epochs": 1}  # 3 stages of 3 steps
WARM = {"lr_scheduler_type": "linear", "max_grad_norm": 1e-3}


def stages(run):
    """Which stage each step was of."""
    return [row["stage"] for row in run.state.log_history if "loss" in row]


# ---------------------------------------------------------------- every field


def test_every_field_is_known():
    """Of the installed release, so that a new one's fields show up here; and readers find each in the table."""
    lists = [ours.HONOURED, ours.BY_STAGE, ours.REFUSED, ours.OF_REFUSED, ours.COUNTS, ours.NOT_READ]
    names = [name for part in lists for name in part]
    assert sorted(names) == sorted(set(names))
    fields = {field.name for field in dataclasses.fields(tf.TrainingArguments)}
    assert fields - set(names) == set()
    table = TABLE.read_text().partition("| of TrainingArguments |")[2].partition("\n\n")[0]
    told = set(re.findall(r"`([a-z_0-9]+)`", table))
    for kind in (ours.BY_STAGE, ours.REFUSED, ours.COUNTS, ours.NOT_READ):
        assert set(kind) - told == set()


# ---------------------------------------------------------------- max_steps


@pytest.mark.parametrize(
    "max_steps, steps, shared",
    [
        (8, {0: 6, 1: 6, 2: 6}, {0: 3, 1: 3, 2: 2}),
        (18, {0: 6, 1: 6, 2: 6}, {0: 6, 1: 6, 2: 6}),
        (3, {0: 100, 1: 1, 2: 7}, {0: 1, 1: 1, 2: 1}),
        (54, {0: 100, 1: 1, 2: 7}, {0: 49, 1: 1, 2: 4}),
        (5, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}, dict.fromkeys(range(1, 6), 1)),
    ],
)
def test_shares(max_steps, steps, shared):
    assert share_steps(max_steps, steps) == shared


def test_any_share_is_whole_and_within_its_stage():
    draw = functools.partial(torch.randint, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        steps = dict(enumerate(draw(1, 50, (int(draw(1, 9, (1,))),)).tolist()))
        whole = sum(steps.values())
        most = int(draw(len(steps), whole + 1, (1,)))
        shared = share_steps(most, steps)
        assert sum(shared.values()) == most and all(1 <= shared[n] <= steps[n] for n in steps)


def test_max_steps_is_shared(tmp_path, caplog):
    """Each stage has its first steps, its own schedule of the learning rate, and the blocks are merged; what goes on
    from a checkpoint gives the same bits, and not with another max_steps."""
    caplog.set_level(logging.WARNING)
    arguments = SAVING | WARM | {"max_steps": 8, "save_steps": 2}
    run = trainer(tmp_path, arguments=arguments)
    start = weights(run.model)
    assert run.train().global_step == 8
    assert stages(run) == [0, 0, 0, 1, 1, 1, 2, 2]
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert rates == pytest.approx([3e-3 / 3, 2e-3 / 3, 1e-3 / 3] * 2 + [1e-3, 1e-3 / 2])
    said = "max_steps=8 of 18, shared over the stages: 3 of 6 steps of the warm-up, 2 or 3 of 6 of each of 2 visits"
    assert said in caplog.text
    assert run.blocks and all(not torch.equal(value, start[name]) for name, value in weights(run.model).items())
    for step in (2, 8):
        again = trainer(tmp_path, arguments=arguments)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == 8
        equal(weights(again.model), weights(run.model))
    for other, message in ((9, "max_steps=8, and is max_steps=9 now"), (-1, "max_steps=8, and is without max_steps")):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, arguments=SAVING | {"max_steps": other}).train(resume_from_checkpoint=True)


def test_stages_make_their_first_steps(tmp_path):
    """By max_steps, or where a callback ends them: half of two epochs each is what `kf.unlearn` makes of one each."""
    model = tiny_model()
    kf.unlearn(model, *data(), kf.KUnBRConfig(**CONFIG | SHORT | {"batch_size": 4}), progress=False)
    for how in ({"arguments": {"max_steps": 9}}, {"callbacks": [StopsAt((3, 6, 9))]}):
        run = trainer(tmp_path, **how)
        assert run.train().global_step == 9 and stages(run) == [0] * 3 + [1] * 3 + [2] * 3
        equal(weights(run.model), weights(model))


def test_max_steps_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=f"max_steps=99: all stages have {STEPS} steps"):
        trainer(tmp_path, arguments={"max_steps": 99}).train()
    with pytest.raises(ValueError, match=r"max_steps=2: 3 stages .* raise it to 3, or lower rounds or top_k"):
        trainer(tmp_path, arguments={"max_steps": 2}).train()


# ---------------------------------------------------------------- callbacks that stop


class StopsAt(tf.TrainerCallback):
    """Asks for the end of the training after these steps, at that event."""

    def __init__(self, steps, event="on_step_end", what="should_training_stop"):
        def stop(args, state, control, **kwargs):
            if state.global_step in steps:
                setattr(control, what, True)

        setattr(self, event, stop)


class Fails(tf.TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event, accumulation", [("on_log", 1), ("on_step_begin", 2)])
def test_a_callback_that_stops_ends_the_stage(event, accumulation, tmp_path, caplog):
    """And what goes on from any checkpoint ends it there too, to the same bits, without the callback."""
    arguments = SAVING | WARM | {"gradient_accumulation_steps": accumulation}
    arguments["per_device_train_batch_size"] = 4 // accumulation
    early = int(event == "on_step_begin")  # which is before the step that is then made whole
    stops = StopsAt([step - early for step in (2, 3, 5)], event)
    run = trainer(tmp_path, config=SHORT, arguments=arguments, callbacks=[stops])
    assert run.train().global_step == 5
    assert stages(run) == [0, 0, 1, 2, 2]
    assert re.findall("has ended (.*) after (. of 3) steps: (.*)", caplog.text) == [
        ("the warm-up", "2 of 3", "the next stage begins"),
        (f"visit 1 of 2 (layers {run.blocks[0][0]}-{run.blocks[0][-1]})", "1 of 3", "the next stage begins"),
        (f"visit 2 of 2 (layers {run.blocks[1][0]}-{run.blocks[1][-1]})", "2 of 3", "it was the last stage"),
    ]
    for step in (1, 3, 5) if event == "on_log" else ():
        again = trainer(tmp_path, config=SHORT, arguments=arguments | {"save_steps": 9})
        assert again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")).global_step == 5
        equal(weights(again.model), weights(run.model))


def test_early_stopping_counts_within_each_stage(tmp_path, caplog):
    """With a metric that gets worse throughout each stage ends alike, also in a training that was killed."""

    class Worse(KUnBRTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = SAVING | {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    how = {"kind": Worse, "arguments": arguments, "eval_dataset": data()[0][:1], "config": {"top_k": 1}}
    run = trainer(tmp_path / "3", callbacks=[tf.EarlyStoppingCallback(3)], **how)
    run.train()
    assert stages(run) == [0, 0, 0, 0, 1, 1, 1, 1]  # 3 that are no better than the first
    assert caplog.text.count("a callback has ended") == 2
    cut = trainer(tmp_path / "cut", callbacks=[tf.EarlyStoppingCallback(3), Fails((3,))], **how)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", callbacks=[tf.EarlyStoppingCallback(3)], **how)
    again.train(resume_from_checkpoint=True)
    assert stages(again) == stages(run)
    equal(weights(again.model), weights(run.model))


def test_a_stopped_epoch_is_told_once_and_changes_nothing(tmp_path, caplog):
    run = trainer(tmp_path, config=SHORT, callbacks=[StopsAt((1, 2), what="should_epoch_stop")])
    assert run.train().global_step == 9
    assert caplog.text.count("a callback stops the epoch, which changes nothing") == 1


def test_what_is_no_result_is_not_saved(tmp_path):
    """After an exception and while it trains; a checkpoint is. Nor is it pushed."""

    class Saves(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="is not at its end, into which no block was inserted"):
                run.save_model(str(tmp_path / "out"))

    run = trainer(tmp_path, config=SHORT, arguments=SAVING, callbacks=[Saves(), Fails((5,))])
    run.save_model(str(tmp_path / "before"))  # what was given
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for save in (run.save_model, lambda: run.save_model(_internal_call=True)):
        message = r"ended in KeyboardInterrupt after 5 steps: this is the original.*resume_from_checkpoint=True"
        with pytest.raises(ValueError, match=message):
            save()
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "out").exists()
    run.remove_callback(Fails)
    run.train(resume_from_checkpoint=True)
    run.save_model()
    assert (tmp_path / "model.safetensors").is_file()


def test_a_training_that_goes_on_with_other_arguments_says_so(tmp_path, caplog):
    run = trainer(tmp_path, config=SHORT, arguments=SAVING, callbacks=[Fails((2,))])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for arguments, said in (({}, 0), ({"max_grad_norm": 0.5, "lr_scheduler_type": "linear"}, 1)):
        run = trainer(tmp_path, config=SHORT, arguments=SAVING | arguments, callbacks=[Fails((4,))])
        with pytest.raises(KeyboardInterrupt):
            run.train(resume_from_checkpoint=True)
        assert caplog.text.count("this training was begun with other arguments") == said
    assert "goes on with lr_scheduler_type=linear (it was constant), max_grad_norm=0.5 (it was 0.0)" in caplog.text


# ---------------------------------------------------------------- the warm-up of the learning rate


def test_each_stage_warms_up_for_the_same_share(tmp_path):
    """A third of 15 steps: each stage reaches the rate."""
    arguments = WARM | {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
    run = trainer(tmp_path, config={"warmup_epochs": 1}, arguments=arguments)
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert rates == [0.0, 1e-3, 1e-3] + [0.0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3] * 2


@pytest.mark.parametrize("kind, kwargs", [("polynomial", {"lr_end": 1e-4}), ("cosine_with_min_lr", {"min_lr": 1e-4})])
def test_schedules_that_read_the_rate_that_a_stage_began_with(kind, kwargs, tmp_path):
    run = trainer(tmp_path, config=SHORT, arguments={"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs})
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert rates[0] == 1e-3 > rates[1] > rates[2] > 1e-4 and rates == rates[:3] * 3


def test_a_schedule_that_a_later_stage_cannot_have_is_refused_at_the_beginning(tmp_path):
    """Its rate is below the schedule's end, which would be seen after the warm-up."""
    arguments = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-4}}
    run = trainer(tmp_path, config=SHORT | {"block_lr": 1e-5}, arguments=arguments)
    with pytest.raises(
        ValueError, match=r"^config.block_lr=1e-05 does not go with lr_scheduler_type=polynomial: lr_end"
    ):
        run.train()
    assert run.state.global_step == 0 and not run.state.log_history


@pytest.mark.parametrize(
    "asked, steps, whole, own",
    [(0, 6, 18, 0), (4, 6, 18, 2), (17, 6, 18, 5), (0.1, 6, 18, 1), (0.99, 6, 18, 5), (3, 1, 9, 0),
     (18, 6, 18, 6), (36, 6, 18, 12)],
)  # fmt: skip
def test_a_stage_s_part_of_the_warm_up(asked, steps, whole, own):
    args = tf.TrainingArguments(use_cpu=True, warmup_steps=asked)
    assert ours.for_stage(args, steps, whole).get_warmup_steps(steps) == own
    assert args.warmup_steps == asked
    assert (ours.unreached(args, whole) is None) == (asked < whole)


def test_a_warm_up_that_ends_in_no_stage_is_told_once(tmp_path, caplog):
    trainer(tmp_path, config=SHORT, arguments={"warmup_steps": 9}).train()
    assert caplog.text.count("warmup_steps=9 of 9 steps in all: no stage reaches its learning rate") == 1


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", sorted(ours.REFUSED))
def test_refused_with_what_to_do_instead(name, monkeypatch):
    """Before Trainer begins with them, which no test could stand: a repository on the Hub, a handler of SIGTERM."""
    args = tf.TrainingArguments(use_cpu=True)
    setattr(args, name, 0.1)
    for begun in (tf.Trainer, KUnBRTrainer):
        monkeypatch.setattr(begun, "create_accelerator_and_postprocess", lambda self: pytest.fail("it has begun"))
    for given in ((tiny_model(), args), (tiny_model(),)):
        with pytest.raises(ValueError, match=f"KUnBRTrainer does not support {name}: .{{5}}"):
            KUnBRTrainer(*given, **({} if args in given else {"args": args}))
    assert name != "load_best_model_at_end" or "metric_for_best_model" in ours.REFUSED[name]
    args.hub_strategy = "end"
    with contextlib.nullcontext() if name == "push_to_hub" else pytest.raises(ValueError, match=name):
        ours.refuse_fields([args], "KUnBRTrainer")


def test_a_scheduler_is_refused(tmp_path):
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], 1.0))
    with pytest.raises(ValueError, match="a scheduler in optimizers: args.lr_scheduler_type"):
        trainer(tmp_path, optimizers=(None, schedule))


def test_methods_that_training_would_not_call_are_refused(tmp_path):
    def of(name, below=False):
        methods = {name: lambda self, *args, **kwargs: None}
        bases = (KUnBRMixin, type("Theirs", (tf.Trainer,), methods)) if below else (KUnBRTrainer,)
        return type("Mine", bases, {} if below else methods)

    for name, below in (("compute_loss", False), ("compute_loss", True), ("create_optimizer", True),
                        ("training_step", True), ("create_scheduler", False)):  # fmt: skip
        owner = "Theirs" if below else "Mine"
        with pytest.raises(ValueError, match=f"Mine does not support {owner}.{name}, which"):
            trainer(tmp_path, kind=of(name, below))
    back = type("Back", (of("compute_loss"),), {"compute_loss": tf.Trainer.compute_loss})
    assert trainer(tmp_path, kind=back).args
    asked = []

    class Scheduled(tf.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            asked.append(num_training_steps)
            return super().create_scheduler(num_training_steps, optimizer)

    trainer(tmp_path, kind=type("Mine", (KUnBRMixin, Scheduled), {}), config=SHORT).train()
    assert asked == [3, 3, 3]


def test_a_target_of_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.target='answer': the data are samples"):
        trainer(tmp_path, config={"target": "answer"}).train()


# ---------------------------------------------------------------- not read


def test_one_warning_names_what_counts(tmp_path, caplog):
    arguments = {
        "seed": 7, "data_seed": 8, "num_train_epochs": 10, "learning_rate": 1e-5, "weight_decay": 0.1, "optim": "sgd",
        "adam_beta2": 0.95, "dataloader_drop_last": True, "dataloader_num_workers": 2,
        "ddp_find_unused_parameters": True,
        "accelerator_config": {"split_batches": True}, "ignore_data_skip": True,
    }  # fmt: skip
    trainer(tmp_path, arguments=arguments, config={"checkpoint_every": 5, "batch_size": 3})
    (record,) = [record for record in caplog.records if "not read" in record.message]
    text = record.message
    for part in (
        "seed=7 (config.seed=0)", "data_seed=8 (config.seed=0)",
        "num_train_epochs=10 (config.warmup_epochs=2, config.block_epochs=2)",
        "learning_rate=1e-05 (config.warmup_lr=0.001, config.block_lr=0.001)",
        "weight_decay=0.1 (config.weight_decay=0.0)",
        "optim=sgd (config.warmup_optimizer=lion, config.optimizer=lion)",
        "adam_beta2=0.95 (config.warmup_optimizer=lion",
        "dataloader_drop_last=True (an epoch's last step", "dataloader_num_workers=2 (of evaluations alone)",
        "ddp_find_unused_parameters=True (there is no", "accelerator_config=... (of evaluations",
        "ignore_data_skip=True",
        "config.checkpoint_every=5 (args.save_strategy and save_steps)", "config.batch_size=3 (per_device_train_batch",
    ):  # fmt: skip
        assert part in text


def test_no_warning_where_the_values_agree(tmp_path, caplog):
    arguments = {"seed": 3, "data_seed": 3, "learning_rate": 1e-3, "num_train_epochs": 6, "optim": "lion_32bit"}
    trainer(tmp_path, arguments=arguments | {"adam_beta2": 0.99}, config={"seed": 3, "batch_size": 4})
    trainer(tmp_path, arguments={"num_train_epochs": 2})
    given = {"warmup_lr": 1.0, "warmup_optimizer": "lion", "optimizer": "adamw"}  # a warm-up that is not made
    trainer(
        tmp_path, arguments={"learning_rate": 1e-3, "optim": "adamw_torch"}, config=given, unlearned=tiny_model(seed=3)
    )
    assert "not read" not in caplog.text


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_that_cannot_be_resumed(tmp_path, caplog):
    arguments = SAVING | {"save_only_model": True, "save_steps": 8}
    trainer(tmp_path, config=SHORT, arguments=arguments).train()
    assert caplog.text.count("save_only_model=True: no checkpoint of this training can be resumed") == 1
    with pytest.raises(
        ValueError, match=r"checkpoint-9 has no optimizer.pt, as with save_only_model=True.*leave it out"
    ):
        trainer(tmp_path, config=SHORT, arguments=arguments).train(resume_from_checkpoint=True)


def test_errors_of_a_resume_name_a_trainer_s_arguments(tmp_path):
    trainer(tmp_path, config=SHORT, arguments=SAVING | {"save_steps": 8}).train()
    at = str(tmp_path / "checkpoint-8")
    wrong = [
        (
            tmp_path,
            {"arguments": {"per_device_train_batch_size": 3}},
            r"batch_size \(per_device_train_batch_size x .* was 4",
        ),
        (tmp_path, {"model": tiny_model(seed=4)}, "another output_dir"),
        (tmp_path / "other", {}, "holds no run to resume: leave resume_from_checkpoint out"),
    ]
    for out, more, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            trainer(out, **{"config": SHORT} | more).train(resume_from_checkpoint=at)
        assert "resume=True" not in str(error.value) and "--" not in str(error.value)
