"""trainer=KUnBR in OpenUnlearning: evaluations are of the weights that they are said to be of, the RTT attack has its
data, and what a machine lacks is said in one line."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from open_unlearning_package import Evaluator, Node, load, packages, score, trainer_args
from tiny_models import random_samples, tiny_model

from kunbr_fast.integrations.open_unlearning import Refused
from kunbr_fast.integrations.open_unlearning_kunbr import results_of
from kunbr_fast.integrations.open_unlearning_machine import cures, get_model, load_hf_dataset, load_trainer_args
from kunbr_fast.model import compat

packed = pytest.mark.skipif(compat.VERSION < compat.PACKED_SINCE, reason=f"packed samples need {compat.PACKED_SINCE}")
SETTINGS = dict(
    num_blocks=3, top_k=1, skip_last_layers=2, warmup_epochs=1, block_epochs=1, block_lr=1e-3, warmup_lr=1e-3
)


@pytest.fixture
def package(monkeypatch):
    return packages(monkeypatch)


def made_of(package, folder, evaluators, model=None, tokenizer=None, data=None, config=(), **method_args):
    args = dict(
        max_grad_norm=0.0, eval_on_start=True, eval_strategy="epoch", gradient_accumulation_steps=1, learning_rate=1e-3
    )  # fmt: skip
    if data is None:
        data = [{"forget": f, "retain": r} for f, r in zip(random_samples(4), random_samples(4, seed=1))]
    return load(
        package, "KUnBR", folder, tiny_model() if model is None else model, data, None,
        {"config": SETTINGS | dict(config)} | method_args, args,
        tokenizer=tokenizer, data_collator=None, evaluators=evaluators,
    )  # fmt: skip


def results(folder, name="TOFU"):
    """Scores by step and folder."""
    found = sorted(Path(folder).glob(f"checkpoint-*/*/{name}_SUMMARY.json"))
    return {str(p.parent.relative_to(folder)): json.loads(p.read_text())[f"{name}_score"] for p in found}


@packed
def test_each_evaluation_is_of_its_weights(package, tmp_path, caplog):
    """Before: the last epoch's evaluation and the final one shared a folder, and the second found the first's."""
    start, evaluators = tiny_model(), {"tofu": Evaluator(), "lm_eval": Evaluator("LMEval")}
    made = made_of(package, tmp_path, evaluators, copy.deepcopy(start))
    with caplog.at_level(logging.INFO, "kunbr_fast"):
        made.train()
        final = made.evaluate()
    last = made.state.global_step
    found = results(tmp_path)
    assert found == {
        "checkpoint-0/evals": score(start),
        "checkpoint-2/evals_stage_0": found["checkpoint-2/evals_stage_0"],
        f"checkpoint-{last}/evals_stage_1": found[f"checkpoint-{last}/evals_stage_1"],
        f"checkpoint-{last}/evals": score(made.model),
    }
    assert final == {"TOFU_score": score(made.model), "LMEval_score": score(made.model)}
    assert len(set(found.values())) == 4 and results(tmp_path, "LMEval") == found
    block = f"the original with layers {made.blocks[0].start}-{made.blocks[0].stop - 1} inserted, visit 1 of 1"
    for said in ("step 0 is of the original;", "step 2 is of M_u;", f"step {last} is of {block}", "of the unlearned"):
        assert said in caplog.text
    assert made.evaluators is evaluators
    assert [e.measured for e in evaluators.values()] == [4, 4]
    made.evaluate()
    assert [e.measured for e in evaluators.values()] == [4, 4]  # of the same weights: overwrite=false counts


@packed
def test_after_an_exception_it_is_the_original(package, tmp_path):
    class Fails(tf.TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    made = made_of(package, tmp_path, {"tofu": Evaluator()})
    made.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.evaluate() == {"TOFU_score": score(tiny_model())}
    assert json.loads((tmp_path / "checkpoint-1/evals/model.json").read_text())["model"] == "the original"


@packed
def test_results_of_another_model_are_not_reported(package, tmp_path, caplog):
    """A second run into one folder, and one of do_train=false: what is there is of other weights."""
    for seed in (0, 1):
        made = made_of(package, tmp_path, {"tofu": Evaluator()}, tiny_model(seed=seed))
        assert made.evaluate() == {"TOFU_score": score(made.model)}
    assert "TOFU_EVAL.json, TOFU_SUMMARY.json not of these weights: removed" in caplog.text


def test_results_without_a_note_are_not_kept(tmp_path):
    (tmp_path / "TOFU_EVAL.json").write_text("{}")
    assert results_of(tmp_path, "a", "the original") == tmp_path and not (tmp_path / "TOFU_EVAL.json").exists()
    (tmp_path / "TOFU_EVAL.json").write_text("{}")
    results_of(tmp_path, "a", "the original")
    assert (tmp_path / "TOFU_EVAL.json").exists()
    results_of(tmp_path, "b", "the unlearned model")
    assert not (tmp_path / "TOFU_EVAL.json").exists()
    assert json.loads((tmp_path / "model.json").read_text()) == {"model": "the unlearned model", "weights": "b"}


@packed
def test_without_folds_rtt_is_an_error(package, tmp_path):
    with pytest.raises(Refused, match="trainer=KUnBR: config: rtt=True without folds.*trainer.method_args"):
        made_of(package, tmp_path, None, config={"rtt": True})


@packed
def test_its_settings_are_ours(package, tmp_path):
    assert made_of(package, tmp_path, None, config={"statistic": "slug"}).config.statistic == "slug"
    with pytest.raises(Refused, match="trainer=KUnBR: .*statistc.*trainer.method_args.config"):
        made_of(package, tmp_path, None, config={"statistc": "slug"})


@packed
def test_the_attack_and_its_report(package, tmp_path):
    from tiny_text import NAMES, model, question, tokenizer, write_jsonl

    records = [question(name) for name in NAMES]
    folds = [write_jsonl(tmp_path / f"{i}.jsonl", records[2 * i : 2 * i + 2]) for i in range(2)]
    words, made = tokenizer(), []
    for record in records[:6]:
        ids = torch.tensor(words(f"{record['question']} {record['choices'][record['answer']]}")["input_ids"])
        made.append({"input_ids": ids, "labels": ids.clone()})
    config = {"rtt": True, "rtt_epochs": 1, "rtt_lrs": [1e-3]}
    trainer = made_of(
        package, tmp_path / "out", None, model(), words, [{"forget": a, "retain": b} for a, b in zip(made, made[3:])],
        config, folds=[str(path) for path in folds], retain_questions=str(write_jsonl(tmp_path / "r", records[9:12])),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))  # as its train.py does
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recovery"] is not None and trainer.report.recovery == pytest.approx(report["recovery"])
    assert "recovery" in trainer.state.log_history[-2] or "recovery" in trainer.state.log_history[-1]
    assert trainer.report.row()["retain"] is not None


# ---------------------------------------------------------------- the machine


def test_the_rates_warm_up_without_a_gpu(monkeypatch):
    """Before: ZeroDivisionError."""
    load, given = (
        load_trainer_args(lambda args, data: trainer_args(args, len(data))),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    for gpus, processes, expected in ((0, 1, 6), (0, 3, 2), (4, 1, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert load(given | {"warmup_epochs": 1.0}, range(24)) == given | {"warmup_steps": expected}
        assert load(given, range(24)) == given


def test_ours_reads_its_arguments(package, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    given = {"warmup_epochs": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = package.load_trainer_args({**given, "output_dir": str(tmp_path), "use_cpu": True}, range(24))
    assert made.warmup_steps == 6


STOCK = {"attn_implementation": "flash_attention_2", "device_map": "cuda", "pretrained_model_name_or_path": "a/b"}
NEEDED = [
    "model.model_args.attn_implementation=sdpa", "model.model_args.device_map=cpu", "+trainer.args.use_cpu=true",
    "trainer.args.optim=adamw_torch",
]  # fmt: skip


def test_what_the_stock_configs_need_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = {"bf16": True, "optim": "paged_adamw_32bit", "do_train": True}
    assert cures({"model_args": STOCK}, {"handler": "NPO", "args": args}) == NEEDED
    assert cures({"model_args": STOCK}, {"handler": "KUnBR", "args": args}) == NEEDED[:3]
    assert cures({"model_args": STOCK}) == NEEDED[:2]
    plain = {"model_args": {"attn_implementation": "sdpa", "device_map": None}}
    assert cures(plain, {"handler": "NPO", "args": args | {"use_cpu": True, "do_train": False}}) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cures(plain, {"handler": "NPO", "args": args}) == []


def test_a_model_that_is_not_to_be_had(package):
    def own(cfg):
        raise ValueError("Error We couldn't connect\nto the hub")

    sdpa = Node({"model": {"model_args": {"pretrained_model_name_or_path": "a/b"}}})
    with pytest.raises(Refused, match=r"a/b could not be loaded \(Error We couldn't connect\): .*=FOLDER"):
        get_model(own)(Model(sdpa["model"]))
    stock = Node({"model": {"model_args": STOCK}, "trainer": {}})
    with pytest.raises(Refused, match="the config wants it: add model.model_args.attn_implementation=sdpa"):
        get_model(own)(Model(stock["model"]))


class Model(Node):
    """Its config: keys are attributes too."""

    def __init__(self, node):
        super().__init__(node, node.parent)

    def __getattr__(self, name):
        return self[name]


def test_data_that_is_not_to_be_had():
    def own(path, **_):
        raise ConnectionError("Couldn't reach 'locuslab/TOFU' on the Hub")

    with pytest.raises(Refused, match=r"data set locuslab/TOFU \(name=forget10\) .*Couldn't reach.*data_files=FILE"):
        load_hf_dataset(own)("locuslab/TOFU", name="forget10")
