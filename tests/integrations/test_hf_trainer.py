"""`KUnBRTrainer`: the weights of `kf.unlearn`, through Hugging Face Trainer's loop, checkpoints and processes."""

import copy
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
import torch
from helpers import environment, python, rarely

pytest.importorskip("accelerate")
import transformers as tf
from safetensors.torch import load_file
from tiny_models import random_samples, tiny_model
from trainer_runner import ARGUMENTS, CONFIG, STEPS, data, trainer
from transformers import TrainingArguments

import kunbr_fast as kf
from kunbr_fast.files import readback
from kunbr_fast.files.models import load_model
from kunbr_fast.integrations import driven_stages, hf_trainer, trainer_checkpoints
from kunbr_fast.model import patch
from kunbr_fast.run.folder import CheckpointFolder

RUNNER = Path(__file__).parent.parent.joinpath("trainer_runner.py")
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(ours, theirs, limit=1e-9):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((value - theirs[name]).norm()) <= limit * float(theirs[name].norm()), name


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.fixture(scope="module")
def truth():
    """What kf.unlearn makes of the same, for each difference of the config."""
    found = {}

    def of(**config):
        key = json.dumps(config, sort_keys=True)
        if key not in found:
            model = tiny_model()
            kf.unlearn(model, *data(), kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | config), progress=False)
            found[key] = weights(model)
        return found[key]

    return of


# ---------------------------------------------------------------- the same weights


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"insertion": "cumulative", "rounds": 2, "block_epochs": 1},
        pytest.param({"rounds": 2, "block_epochs": 1}, marks=pytest.mark.slow),
        {"optimizer": "adamw", "warmup_optimizer": "adamw", "weight_decay": 0.1},
        pytest.param({"warmup_epochs": 0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_unlearn(config, truth, tmp_path):
    run = trainer(tmp_path, config=config)
    start = weights(run.model)
    run.train()
    equal(weights(run.model), truth(**config))
    assert any(not torch.equal(p, start[name]) for name, p in run.model.named_parameters())
    assert run.blocks and all(isinstance(block, range) for block in run.blocks)
    assert len(run.density.per_layer) == 6
    assert list(tmp_path.iterdir()) == []  # nothing is saved, nothing can be resumed


def test_an_unlearned_model_is_given(truth, tmp_path):
    """As a model and as a state dict: the re-insertion alone."""
    unlearned = tiny_model(seed=3)
    model = tiny_model()
    config = kf.KUnBRConfig(**CONFIG | {"batch_size": 4})
    kf.unlearn(model, *data(), config, unlearned=unlearned, progress=False)
    for given in (unlearned, unlearned.state_dict()):
        run = trainer(tmp_path, unlearned=given)
        assert run.train().global_step == STEPS - 6
        equal(weights(run.model), weights(model))
    with pytest.raises(ValueError, match="^unlearned: got 'OUT', expected a model or its state dict: load it first"):
        trainer(tmp_path, unlearned="OUT").train()
    wrong = {name: value for name, value in unlearned.state_dict().items() if "layers.2.mlp.up" not in name}
    with pytest.raises(ValueError, match=r"unlearned: model.layers.2.mlp.up_proj.weight is missing"):
        trainer(tmp_path, unlearned=wrong).train()


class Pairs(torch.utils.data.Dataset):
    """Each forget sample with a retain one, as Hugging Face users hold them."""

    def __init__(self, forget, retain):
        self.pairs = [(forget[i % len(forget)], retain[i]) for i in range(len(retain))]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return {"forget": self.pairs[i][0], "retain": self.pairs[i][1]}


def padded(samples):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([s["input_ids"] for s in samples], True, 0),
        "labels": pad([s["labels"] for s in samples], True, -100),
        "attention_mask": pad([torch.ones_like(s["input_ids"]) for s in samples], True, 0),
    }


class OpenUnlearning(torch.utils.data.Dataset):
    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        raise AssertionError("both sides are taken whole")


def test_forget_and_retain_in_one_data_set(truth, tmp_path):
    forget, retain = data()
    lists = [[{k: v.tolist() for k, v in sample.items()} for sample in part] for part in (forget, retain)]
    two_answers = [{"original": sample, "alternate": retain[0]} for sample in forget]
    tuples = [(pair["forget"], pair["retain"]) for pair in Pairs(forget, retain)]

    def collator(items):
        return {"forget": padded([f for f, _ in items]), "retain": padded([r for _, r in items])}

    for more in (
        {"train_dataset": Pairs(forget, retain)},
        {"train_dataset": tuples, "data_collator": collator},
        {"train_dataset": OpenUnlearning(*lists)},
        {"train_dataset": OpenUnlearning(two_answers, retain)},
    ):
        run = trainer(tmp_path, forget_dataset=None, retain_dataset=None, **more)
        run.train()
        equal(weights(run.model), truth())


@pytest.mark.parametrize("accumulation, batch", [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_accumulated_gradients(accumulation, batch, truth, tmp_path):
    """Also where a step's samples do not divide evenly: the last of an epoch has 2, in up to 4 parts."""
    run = trainer(
        tmp_path, arguments={"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    )
    assert run.train().global_step == STEPS
    close(weights(run.model), truth())


@pytest.mark.parametrize(
    "config",
    [{"objective": "npo", "retain_loss": "kl", "adversary_every": 3, "adversary_lrs": (1e-3, 2e-3)},
     {"objective": "dpo"},
     pytest.param({"objective": "pdu", "retain_loss": "hidden_layers"}, marks=pytest.mark.slow),
     pytest.param({"objective": "ga"}, marks=pytest.mark.slow),
     pytest.param({"objective": "rmu", "warmup_objective": "ga"}, marks=pytest.mark.slow)],
    ids=lambda config: config["objective"],
)  # fmt: skip
def test_objectives(config, tmp_path):
    """Whatever they need (the original's values, second answers, a state of their own), also in parts of a batch."""
    forget, retain = data()
    forget = [{**sample, "alternate": other} for sample, other in zip(forget, random_samples(10, seed=7, low=6))]
    config = config | {"block_epochs": 1}
    model = tiny_model()
    kf.unlearn(model, forget, retain, kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | config), progress=False)
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    arguments |= {"save_strategy": "steps", "save_steps": 4}
    run = trainer(tmp_path, config=config, arguments=arguments, forget_dataset=forget)
    run.train()
    close(weights(run.model), weights(model))
    for step in (4, 8):
        again = trainer(tmp_path, config=config, arguments=arguments, forget_dataset=forget)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        equal(weights(again.model), weights(run.model))


WITHOUT_BLOCKS = {name: CONFIG[name] for name in ("warmup_lr", "warmup_epochs", "retain_batch_size", "max_retain_loss")}


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_an_objective_alone_by_its_name(method, tmp_path):
    config = {"method": method, **WITHOUT_BLOCKS, "warmup_epochs": 1}
    config |= {"objective_options": {"layer": 2}} if method == "rmu" else {}
    model = tiny_model()
    settings = kf.KUnBRConfig.from_dict(config | {"batch_size": 4})
    assert kf.unlearn(model, *data(), settings, progress=False).method == method
    forget, retain = data()
    arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    run = hf_trainer.KUnBRTrainer(tiny_model(), arguments, config=config, forget_dataset=forget, retain_dataset=retain)
    run.train()
    close(weights(run.model), weights(model))


def test_a_rule_that_does_not_say_how_many_blocks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rule='pareto': .* number of steps .* take rule='top_k', or kf.unlearn"):
        trainer(tmp_path, config={"rule": "pareto", "statistic": "slug", "top_k": 6})


def test_another_statistic_chooses_the_blocks(tmp_path):
    config = {"statistic": "slug", "top_k": 1, "warmup_epochs": 1, "block_epochs": 1}
    truth = kf.knowledge_density(tiny_model(), data()[0], statistic="slug", retain=data()[1])
    run = trainer(tmp_path, config=config)
    run.train()
    torch.testing.assert_close(run.density.per_layer, truth.per_layer)
    assert run.blocks == kf.select_blocks(truth, 3, 1, 1)


def test_a_run_without_blocks(tmp_path):
    """The warm-up alone, with what `robust` sets: all parameters, an adversary, hidden layers kept."""
    config = {"method": "robust", **WITHOUT_BLOCKS, "adversary_every": 2, "adversary_lrs": (1e-3, 2e-3)}
    config = kf.KUnBRConfig.from_dict(config | {"batch_size": 4, "rtt": False}).to_dict()
    model = tiny_model()
    report = kf.unlearn(model, *data(), kf.KUnBRConfig(**config), progress=False)
    run = trainer(tmp_path, config=config)
    run.train()
    assert report.blocks == [] and run.blocks in (None, [])
    close(weights(run.model), weights(model))


# ---------------------------------------------------------------- what Trainer's arguments say


def test_clipping_and_the_schedule_of_the_learning_rate(tmp_path):
    """Of each stage by itself; both have their effect."""
    arguments = {"lr_scheduler_type": "linear", "warmup_steps": 5, "max_grad_norm": 1e-3}
    run = trainer(tmp_path, arguments=arguments, config={"optimizer": "adamw", "warmup_epochs": 1})
    run.train()
    logs = [row for row in run.state.log_history if "loss" in row]
    rates = [[row["learning_rate"] for row in logs if row["stage"] == stage] for stage in range(3)]
    assert [len(r) for r in rates] == [3, 6, 6]
    for r in rates:  # each up for a third of its steps, and then down
        top = len(r) // 3
        assert r[: top + 1] == sorted(r[: top + 1]) and r[top:] == sorted(r[top:], reverse=True)
        assert r[0] == 0.0 and r[top] == 1e-3 and r[-1] < 1e-3
    assert all(row["grad_norm"] > 1e-3 for row in logs)


def test_logs_tell_the_stage(tmp_path):
    run = trainer(tmp_path, arguments={"logging_steps": 2})
    run.train()
    logs = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in logs] == list(range(2, STEPS + 1, 2))
    for row in logs:
        assert row["stage"] == (row["step"] - 1) // 6
        if row["stage"]:
            block = run.blocks[row["stage"] - 1]
            assert (row["first_layer"], row["last_layer"]) == (block[0], block[-1])
        else:
            assert "first_layer" not in row
        assert row["loss"] == pytest.approx(-row["forget_loss"] + 1.5 * row["retain_loss"], rel=1e-5)
    assert "stage" not in run.state.log_history[-1]  # Trainer's summary
    assert run.state.num_train_epochs == 6 and run.state.epoch == 6


def test_evaluation_and_callbacks_see_whole_models(tmp_path):
    forget, _ = data()
    seen = []

    class Watch(tf.TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            seen.append(weights(model))

    ids = forget[0]["input_ids"]
    run = trainer(
        tmp_path,
        arguments={"eval_strategy": "steps", "eval_steps": 5},
        eval_dataset=[{"input_ids": ids, "labels": ids}] * 2,
        callbacks=[Watch()],
    )
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert len(set(losses)) == len(losses) >= 3
    equal(seen[0], weights(run.model))
    plain = tf.Trainer(copy.deepcopy(run.model), run.args, eval_dataset=run.eval_dataset)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"] not in losses


def test_an_evaluation_leaves_the_active_block_where_its_optimiser_updates_it(truth, tmp_path, monkeypatch):
    """Several processes on CPUs have the device "cpu:0", to which a move is a copy."""
    ids = data()[0][0]["input_ids"]
    run = trainer(
        tmp_path,
        arguments={"eval_strategy": "steps", "eval_steps": 8},  # in a block's second step
        eval_dataset=[{"input_ids": ids, "labels": ids}],
    )
    monkeypatch.setattr(type(run.accelerator), "device", torch.device("cpu:0"))
    run.train()
    equal(weights(run.model), truth())
    assert run.accelerator.device_placement


def test_a_callback_that_moves_the_weights_ends_the_training(tmp_path):
    """No update would reach them any more."""

    class Casts(tf.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 7:
                model.to(torch.float32).to(torch.float64)

    run = trainer(tmp_path, callbacks=[Casts()])
    with pytest.raises(RuntimeError, match="^model.layers.* is no longer where its training updates it: something"):
        run.train()


def test_saved_model_is_a_normal_one(tmp_path):
    run = trainer(tmp_path / "run", arguments={"save_strategy": "steps", "save_steps": 8, "save_total_limit": 1})
    run.train()
    run.save_model(str(tmp_path / "out"))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    equal(weights(loaded), weights(run.model))
    assert [p.name for p in sorted((tmp_path / "run").glob("checkpoint-*"))] == [f"checkpoint-{STEPS}"]


def test_a_saved_model_has_its_source_s_form_and_is_read_back(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size="70KB")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"a_note": "mine"}))
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"x")
    run = trainer(tmp_path / "run", load_model(tmp_path / "source"))
    before = {path.name: path for path in (tmp_path / "source").iterdir()}
    tiny_model("gpt2").save_pretrained(tmp_path / "run")  # which is replaced
    run.save_model()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == before.keys() | {"training_args.bin"}
    same = {n for n, path in before.items() if (tmp_path / "run" / n).read_bytes() == path.read_bytes()}
    assert same == names - {"training_args.bin"}  # nothing was trained

    def flip(path):
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])

    monkeypatch.setattr(readback, "forget", flip)
    with pytest.raises(readback.NotWritten, match="is not what is in memory"):
        run.save_model(str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    run.save_model(str(tmp_path / "checkpoint"), _internal_call=True)  # Trainer's own
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_the_original_s_own_folder_is_never_overwritten(tmp_path):
    source = tmp_path / "source"
    tiny_model().save_pretrained(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ValueError, match="output_dir: .*source/run is the folder of the original model, or lies in it"):
        trainer(source / "run", load_model(source)).train()
    run = trainer(tmp_path / "run", load_model(source))
    with pytest.raises(ValueError, match="save_model: .*source is the folder of the original model"):
        run.save_model(str(source))
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "dtype, autocast", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)], ids=str
)
def test_bf16(dtype, autocast, truth, tmp_path):
    """A bf16 model keeps fp32 copies of a block; an fp32 one keeps its dtype and computes in bf16 under autocast."""
    run = trainer(tmp_path, tiny_model(dtype=dtype), arguments={"bf16": autocast})
    start = weights(run.model)
    run.evaluate(data()[0][:1])  # after which the model's forward is accelerate's
    run.train()
    exact, distance, moved = truth(), 0.0, 0.0
    for name, p in run.model.named_parameters():
        assert p.dtype == dtype and bool(p.isfinite().all())
        distance += float((p.detach().double() - exact[name]).square().sum())
        moved += float((start[name].double() - exact[name]).square().sum())
    assert distance < 0.5 * moved  # most signs of Lion's steps are the same


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"save_steps": 2}, marks=pytest.mark.slow),
        {"save_steps": 2, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_resume(arguments, tmp_path):
    """From a checkpoint in the warm-up, in a block, and at each edge between stages."""
    arguments = {"save_strategy": "steps", **arguments}
    config = {"optimizer": "adamw", "insertion": "cumulative"}
    whole = trainer(tmp_path, arguments=arguments, config=config)
    whole.train()
    steps = whole.state.max_steps
    for step in (4, 6, 8, 16) if steps == STEPS else (2, 4, 6, steps):
        run = trainer(tmp_path, arguments=arguments, config=config)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        equal(weights(run.model), weights(whole.model))
        assert run.blocks == whole.blocks and run.state.global_step == steps


@pytest.mark.parametrize("insertion", ["independent", pytest.param("cumulative", marks=pytest.mark.slow)])
def test_rounds_come_in_the_order_of_unlearn(insertion, truth, tmp_path):
    """And any checkpoint can be resumed, though independent blocks keep no file of a former round."""
    config = {"insertion": insertion, "rounds": 2, "block_epochs": 1, "warmup_epochs": 1}
    run = trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 1}, config=config)
    run.train()
    equal(weights(run.model), truth(**config))
    logs = [row for row in run.state.log_history if "loss" in row and row["stage"]]
    order = list(dict.fromkeys((row["stage"], row["first_layer"]) for row in logs))
    first, second = (block.start for block in run.blocks)
    twice = [first, first, second, second] if insertion == "independent" else [first, second, first, second]
    assert order == list(zip((1, 2, 3, 4), twice))
    kept = {path.name.split(".")[1] for path in (tmp_path / "kunbr-checkpoints").glob("blocks.*.safetensors")}
    assert kept == ({"1"} if insertion == "independent" else {"0", "1"})
    for step in (4, 6, 8, 11, 15):  # in rounds 0 and 1 of both blocks, and at an edge and the end
        again = trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 100}, config=config)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        equal(weights(again.model), weights(run.model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing(truth, tmp_path):
    run = trainer(tmp_path, arguments={"gradient_checkpointing": True})
    run.train()
    close(weights(run.model), truth())


@pytest.mark.parametrize(
    "step, config",
    [
        (10, {"block_lr": 1e-5}),
        (2, {"warmup_lr": 1e-5, "warmup_master_weights": "fp32", "top_k": 1, "block_epochs": 1}),
    ],
    ids=("block", "warm-up"),
)
def test_bf16_resumes_with_its_wide_weights(step, config, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": step, "bf16": True, "lr_scheduler_type": "cosine"}
    models = []
    for resume in (None, str(tmp_path / f"checkpoint-{step}")):
        run = trainer(tmp_path, tiny_model(dtype=torch.bfloat16), arguments=arguments, config=config)
        run.train(resume_from_checkpoint=resume)
        models.append(weights(run.model))
    equal(*models)


def test_resume_is_refused_for_other_data_and_settings(tmp_path):
    trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 4}).train()
    at = str(tmp_path / "checkpoint-8")
    for wrong, message in (
        ({"model": tiny_model(seed=4)}, "belongs to another run"),
        ({"forget_dataset": random_samples(10, seed=9, low=6)}, "belongs to another run"),
        ({"config": {"block_lr": 1e-2}}, "block_lr was 0.001"),
        ({"arguments": {"per_device_train_batch_size": 3}}, r"processes\) was 4"),
        ({"unlearned": tiny_model(seed=3)}, "was begun without unlearned="),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **wrong).train(resume_from_checkpoint=at)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(tmp_path / "other").train(resume_from_checkpoint=True)


def test_resume_is_refused_for_another_unlearned_model(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, arguments=arguments, unlearned=tiny_model(seed=3)).train()
    again = trainer(tmp_path, arguments=arguments, unlearned=tiny_model(seed=4))
    with pytest.raises(ValueError, match="was begun with another unlearned="):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_of_an_earlier_training_in_the_same_place_is_refused(tmp_path):
    """Its steps are of another M_u; the present training has not come so far."""

    class Dies(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    for seed, at in ((0, 9), (3, 8)):
        dies = Dies()
        dies.at = at
        run = trainer(tmp_path, config={"seed": seed}, arguments={"save_strategy": "steps", "save_steps": 2 - seed % 2})
        run.add_callback(dies)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    run = trainer(tmp_path, config={"seed": 3})
    with pytest.raises(ValueError, match="^the checkpoint is of another training in this output_dir: delete it"):
        run.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert run.train(resume_from_checkpoint=True).global_step == STEPS


def test_a_damaged_trainer_state_is_named(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text('{"global_step": 7, "log_history": [{"loss": NaN}]}')  # as Trainer writes it
    assert trainer_checkpoints.global_step(tmp_path) == 7
    changed = [
        fuzz.as_json({"global_step": value}) for value in fuzz.VALUES if type(value) is not int or value >= 2**63
    ]
    for text in (*fuzz.HOSTILE_JSON.values(), *changed):
        path.write_bytes(text)
        with pytest.raises(ValueError) as error:
            trainer_checkpoints.global_step(tmp_path)
        fuzz.one_line(error.value, path)


def test_killed_and_resumed(truth, tmp_path):
    """In the first block; the last checkpoint is cut short too, and so is passed by."""
    kill_after = 11
    settings = {
        "out": str(tmp_path),
        "kill_after": kill_after,
        "arguments": {"save_strategy": "steps", "save_steps": 2},
    }
    killed = python(RUNNER, json.dumps(settings), **ON_CPU)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = tmp_path / f"checkpoint-{kill_after - 1}"
    (last / "trainer_state.json").unlink()
    run = trainer(tmp_path, arguments=settings["arguments"])
    begun = []
    run.add_callback(Steps(begun))
    run.train(resume_from_checkpoint=True)
    assert begun[0] == kill_after - 3
    equal(weights(run.model), truth())


class Steps(tf.TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes(truth, tmp_path):
    """Two gloo processes with half the batch each; the last step of an epoch has fewer samples than parts."""
    runs = []
    for number, (batch, accumulation, config) in enumerate(
        [(2, 1, {}), (1, 2, {"objective": "pdu", "insertion": "cumulative"})]
    ):
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        out, save = str(tmp_path / f"{number}"), str(tmp_path / f"{number}.safetensors")
        runs.append({"out": out, "save": save, "config": config, "arguments": arguments})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes, errors = [], [tmp_path / f"{rank}.log" for rank in range(2)]
    try:
        for rank, error in enumerate(errors):
            more = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, RUNNER, *map(json.dumps, runs)]
            processes.append(subprocess.Popen(command, env=environment(**ON_CPU, **more), stderr=error.open("wb")))
        deadline = time.monotonic() + 300
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes) and time.monotonic() < deadline, [
                error.read_text()[-3000:] for error in errors
            ]
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], [error.read_text()[-3000:] for error in errors]
    for run in runs:
        close(load_file(run["save"]), truth(**run["config"]))


# ---------------------------------------------------------------- errors


def test_an_exception_leaves_the_original(truth, tmp_path):
    for at in (3, 15):

        class Fails(tf.TrainerCallback):
            def on_step_end(self, args, state, control, at=at, **kwargs):
                if state.global_step == at:
                    raise KeyboardInterrupt

        model = tiny_model().train()
        start, flags = weights(model), [(p.requires_grad, p.grad) for p in model.parameters()]
        run = trainer(tmp_path, model, callbacks=[Fails()], config={"insertion": "cumulative"})
        with pytest.raises(KeyboardInterrupt):
            run.train()
        equal(weights(model), start)
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags and model.training
        assert not any("forward" in module.__dict__ for module in patch._layers(model).modules())
        run.remove_callback(Fails)
        run.train()  # the same trainer again
        equal(weights(model), truth(insertion="cumulative"))


@pytest.mark.parametrize("where", rarely(["on_train_end", "on_log", "merge"], ["merge"]))
def test_an_exception_at_the_end_leaves_the_original(where, truth, tmp_path, monkeypatch):
    """In a callback before or after the merge, or half way through it."""
    run = trainer(tmp_path)
    start = weights(run.model)

    def fails(*args, **kwargs):
        if where != "on_log" or "train_runtime" in kwargs["logs"]:
            raise RuntimeError("no room on the server of logs")

    class Fails(tf.TrainerCallback):
        pass

    with monkeypatch.context() as patching:
        if where == "merge":
            place = driven_stages.DrivenStages.merge

            def half(stages, trained):
                place(stages, dict(list(trained.items())[:1]))
                assert any(not torch.equal(p, start[name]) for name, p in run.model.named_parameters())
                fails()

            patching.setattr(driven_stages.DrivenStages, "merge", half)
        else:
            setattr(Fails, where, fails)
            run.add_callback(Fails())
        with pytest.raises(RuntimeError, match="no room"):
            run.train()
    equal(weights(run.model), start)
    run.remove_callback(Fails)
    run.train()
    equal(weights(run.model), truth())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_costs_no_result(truth, tmp_path, monkeypatch, caplog):
    def refuses(self, say):
        raise PermissionError(13, "Permission denied", str(self.path))

    run = trainer(tmp_path)
    monkeypatch.setattr(CheckpointFolder, "end", refuses)
    assert run.train().global_step == STEPS
    equal(weights(run.model), truth())
    assert "the training is done, but" in caplog.text and "Permission denied" in caplog.text


def test_the_folder_of_checkpoints_is_known_by_its_marker_not_by_its_name(tmp_path):
    (tmp_path / "kunbr").mkdir()
    (tmp_path / "kunbr" / "thesis").write_text("mine")  # of this name were those of earlier versions
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer(tmp_path, arguments=arguments).train()
    folder = tmp_path / "kunbr-checkpoints"
    (folder / "thesis").write_text("mine")
    trainer(tmp_path, arguments=arguments).train()  # forgets the former run, and no more
    assert {path.read_text() for path in tmp_path.rglob("thesis")} == {"mine"} and (folder / "thesis").is_file()
    (folder / "kunbr-fast.json").unlink()
    before = sorted(folder.iterdir())
    for resume in (None, True):
        with pytest.raises(ValueError, match="was not made by kunbr-fast"):
            trainer(tmp_path, arguments=arguments).train(resume_from_checkpoint=resume)
    assert sorted(folder.iterdir()) == before and (tmp_path / "kunbr" / "thesis").read_text() == "mine"


def test_divergence(tmp_path):
    run = trainer(tmp_path, config={"max_retain_loss": 1e-3, "block_epochs": 4})
    start = weights(run.model)
    with pytest.raises(kf.Diverged, match="max_retain_loss"):
        run.train()
    equal(weights(run.model), start)


@pytest.mark.parametrize(
    "config, stage",
    [
        ({"warmup_lr": 1e30}, "warm-up"),
        ({"block_lr": 1e30}, "block"),
        pytest.param({"block_lr": 1e30, "rounds": 2}, "block", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_last_update_of_a_stage_is_looked_at(config, stage, tmp_path):
    """Stages of one step, which no other one follows; no checkpoint of what it destroyed is written."""
    config |= {"warmup_epochs": 1, "block_epochs": 1}
    for number, arguments in enumerate(({}, {"save_strategy": "steps", "save_steps": 1})):
        arguments |= {"per_device_train_batch_size": 10}
        run = trainer(tmp_path / str(number), tiny_model(dtype=torch.float32), config, arguments)
        start = weights(run.model)
        with pytest.raises(kf.Diverged, match=f"diverged at {stage}.*step 0"):
            run.train()
        equal(weights(run.model), start)
        saved = [path.name for path in (tmp_path / str(number)).glob("checkpoint-*")]
        assert saved == (["checkpoint-1"] if number and stage == "block" else [])  # of the warm-up


def test_what_is_not_supported_is_refused(tmp_path):
    forget, retain = data()
    for more, message in (
        ({"arguments": {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps",
                        "metric_for_best_model": "loss"}, "eval_dataset": forget}, "load_best_model_at_end"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], 1.0), None)}, "optimizers"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func"),
        ({"config": {"sharding": "fsdp"}}, "sharding='fsdp': the Trainer's processes hold all of it"),
        ({"retain_dataset": None}, "both forget_dataset and retain_dataset"),
        ({"forget_dataset": None, "retain_dataset": None}, "no data"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **more)
    for more, message in (
        ({"forget_dataset": []}, "the forget set is empty"),
        ({"forget_dataset": None, "retain_dataset": None, "train_dataset": forget}, r"train_dataset\[0\]: expected"),
        ({"forget_dataset": None, "retain_dataset": None, "train_dataset": OpenUnlearning(forget, None)}, "retain set"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **more).train()


@pytest.mark.slow
def test_importing_the_package_imports_no_trainer():
    code = (
        "import sys, kunbr_fast, kunbr_fast.integrations; "
        "assert not {'transformers.trainer', 'kunbr_fast.integrations.hf_trainer'} & set(sys.modules); "
        "from kunbr_fast.integrations import KUnBRTrainer; print(KUnBRTrainer.__name__)"
    )
    done = python("-c", code, **ON_CPU)
    assert done.returncode == 0 and done.stdout.strip() == "KUnBRTrainer", done.stderr
