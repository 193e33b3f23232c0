"""What data sets and models a `KUnBRTrainer` takes, and what it says of its result."""

import gc
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text
import torch
from helpers import environment

pytest.importorskip("accelerate")
from trainer_runner import CONFIG, trainer

import kunbr_fast as kf
from kunbr_fast.evaluation import rtt
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.integrations import KUnBRTrainer, driven_stages
from kunbr_fast.integrations.trainer_data import forget_and_retain
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.run.output import finished_report
from kunbr_fast.training.training import Training

RTT = {"rtt": True, "rtt_lrs": (1e-3,), "rtt_epochs": 1, "rtt_batch_size": 4}
SMALL = {"warmup_epochs": 1, "block_epochs": 1, "num_blocks": 2, "top_k": 1, "skip_last_layers": 0}


def records(start, stop):
    return [tiny_text.question(name) for name in tiny_text.NAMES[start:stop]]


FOLDS = [Fold("a", records(0, 4), records(0, 4)), Fold("b", records(4, 8), records(4, 8))]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


def model():
    return tiny_text.model(layers=2, dtype=torch.float64)


def of_text(out, processing, config=None, **more):
    given = {"forget_dataset": records(0, 8), "retain_dataset": records(12, 18), "processing_class": processing}
    return trainer(out, model(), SMALL | (config or {}), **given | more)


def equal(ours, theirs):
    theirs = dict(theirs.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())


# ---------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def truth(tokenizer):
    """The model and the report that kf.unlearn makes."""
    found, config = model(), kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | SMALL | RTT)
    report = kf.unlearn(found, records(0, 8), records(12, 18), config, tokenizer=tokenizer, folds=FOLDS, progress=False)
    return found, report


def same_figures(report, expected):
    assert report.accuracy == expected.accuracy and len(report.accuracy) == 3
    assert report.rtt.to_dict() == expected.rtt.to_dict()
    assert (report.blocks, report.losses, report.recovery) == (expected.blocks, expected.losses, expected.recovery)


def test_the_report_is_that_of_unlearn(truth, tokenizer, tmp_path):
    """Of the same bits: accuracy of three models, density, the attack, which leaves the weights as they were."""
    run = of_text(tmp_path, tokenizer, RTT, folds=FOLDS)
    assert run.report is None
    output = run.train()
    expected = truth[1]
    equal(run.model, truth[0])
    same_figures(run.report, expected)
    assert torch.equal(run.report.density.per_layer, expected.density.per_layer)
    figures = {
        "forget_accuracy": expected.accuracy["result"]["forget"]["plain"],
        "retain_accuracy": expected.accuracy["result"]["retain"]["plain"],
        "original_forget_accuracy": expected.accuracy["original"]["forget"]["plain"],
        "unlearned_retain_accuracy": expected.accuracy["unlearned"]["retain"]["plain"],
        "rtt_accuracy": expected.rtt.accuracy,
        "recovery": expected.recovery,
    }
    assert figures.items() <= output.metrics.items()
    assert figures.items() <= run.state.log_history[-1].items()


def test_an_unlearned_model_and_folds_in_files(tokenizer, tmp_path):
    """Its own accuracy, and questions and folds from files: what kf.unlearn says of them."""
    files = [tiny_text.write_jsonl(tmp_path / f"{fold.name}.jsonl", fold.train_records) for fold in FOLDS]
    asked = tiny_text.write_jsonl(tmp_path / "asked.jsonl", [*records(12, 14), {"text": "no question"}])
    unlearned = tiny_text.model(seed=3, layers=2, dtype=torch.float64)
    config = kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | SMALL | RTT)
    expected = kf.unlearn(
        model(), records(0, 8), records(12, 18), config, tokenizer=tokenizer, unlearned=unlearned, folds=FOLDS,
        retain_questions=records(12, 14), progress=False,
    )  # fmt: skip
    data = {"folds": [files[0], str(files[1])], "retain_questions": str(asked), "unlearned": unlearned}
    run = of_text(tmp_path / "out", tokenizer, RTT, **data)
    run.train()
    same_figures(run.report, expected)


def test_the_report_of_a_run_without_blocks(tokenizer, tmp_path):
    config = {"top_k": 0}
    expected = kf.unlearn(
        model(), records(0, 8), records(12, 18), kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | SMALL | config),
        tokenizer=tokenizer, progress=False,
    )  # fmt: skip
    run = of_text(tmp_path, tokenizer, config)
    run.train()
    assert (run.report.blocks, run.report.accuracy) == ([], expected.accuracy)
    assert torch.equal(run.report.density.per_layer, expected.density.per_layer)


def test_nothing_of_the_training_is_held_while_the_result_is_attacked(tokenizer, tmp_path, monkeypatch):
    """The memory is the attack's: no prefix cache, no optimiser's state, no fp32 copies."""
    own, held = driven_stages.DrivenStages.attack, []

    def attack(self):
        gc.collect()
        held.append([type(found) for found in gc.get_objects() if isinstance(found, (PrefixCache, Training))])
        return own(self)

    monkeypatch.setattr(driven_stages.DrivenStages, "attack", attack)
    of_text(tmp_path, tokenizer, RTT, folds=FOLDS).train()
    assert held == [[]]


class Killed(BaseException):
    """Nothing catches it."""


def test_a_resumed_run_goes_on_with_the_attack(truth, tokenizer, tmp_path, monkeypatch):
    """Not from its beginning; and figures of another result are not taken for this one's."""
    attacked, own = [], rtt.Attack._attack

    def attack(self, job, *args):
        attacked.append(self.folds[job.folds[0]].name)
        if len(attacked) == 2:
            raise Killed
        return own(self, job, *args)

    monkeypatch.setattr(rtt.Attack, "_attack", attack)
    arguments = {"save_strategy": "steps", "save_steps": 2}
    start = model()
    first = of_text(tmp_path, tokenizer, RTT, folds=FOLDS, arguments=arguments)
    with pytest.raises(Killed):
        first.train()
    equal(first.model, start)
    again = of_text(tmp_path, tokenizer, RTT, folds=FOLDS, arguments=arguments)
    again.train(resume_from_checkpoint=True)
    assert attacked == ["a", "b", "b"]
    equal(again.model, truth[0])
    same_figures(again.report, truth[1])

    monkeypatch.setattr(driven_stages, "model_fingerprint", lambda model: "of another")
    other = of_text(tmp_path, tokenizer, RTT, folds=FOLDS, arguments=arguments)
    other.train(resume_from_checkpoint=True)
    assert attacked[3:] == ["a", "b"]
    same_figures(other.report, truth[1])


def test_an_attack_that_diverges_leaves_the_result(truth, tokenizer, tmp_path, monkeypatch, caplog):
    def diverge(self, *args):
        with torch.no_grad():
            next(self.decoder.model.parameters()).fill_(7)
        raise FloatingPointError("not finite")

    monkeypatch.setattr(rtt.Attack, "_attack", diverge)
    run = of_text(tmp_path, tokenizer, RTT, folds=FOLDS)
    run.train()
    equal(run.model, truth[0])
    assert run.report.rtt is None and run.report.accuracy == truth[1].accuracy
    (said,) = [record.message for record in caplog.records if "RTT attack" in record.message]
    assert said.startswith("RTT attack on fold a at learning rate 0.001: not finite.") and "rtt_lrs" in said


@pytest.mark.parametrize(
    "config, given, level, message",
    [
        ({"rtt": True}, {}, logging.INFO, "there is no RTT attack: folds= "),
        (
            {"rtt": True, "rtt_epochs": 1},
            {},
            logging.WARNING,
            "RTT attack, rtt_epochs counts for nothing: ",
        ),
        (
            {"rtt": True, "rtt_epochs": 1, "rtt_batch_size": 2},
            {},
            logging.WARNING,
            "rtt_epochs, rtt_batch_size count for",
        ),
        ({}, {"folds": FOLDS}, logging.WARNING, "folds=: rtt=False, there is no attack; accuracy is measured on their"),
    ],
    ids=str,
)
def test_settings_of_an_attack_that_is_not_made(config, given, level, message, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "kunbr_fast"):
        of_text(tmp_path, tokenizer, config, **given)
    said = [record for record in caplog.records if record.name.startswith("kunbr_fast")]
    assert [record.levelno for record in said] == [level] and message in said[0].message


@pytest.mark.parametrize(
    "config, given, message",
    [
        ({"rtt": True}, {}, "^config: rtt=True without folds: .*: folds= "),
        ({}, {"folds": "f.jsonl"}, "^folds: got 'f.jsonl', expected a list of two or more files"),
        ({}, {"folds": [records(0, 4)]}, r"^folds\[0\]: got \[.*expected a file of records, or a Fold"),
        (
            {},
            {"forget_questions": [{"text": "a"}]},
            r"^forget_questions\[0\]: got {.*}, expected records with",
        ),
        ({}, {"forget_questions": records(0, 1)[0]}, "^forget_questions: got {.*, expected a list of records"),
        ("run.yaml", {}, r"^config: got 'run.yaml', expected settings: KUnBRConfig.load\(...\) reads a file"),
        ([1], {}, r"^config: got \[1\], expected a KUnBRConfig or a mapping"),
    ],
    ids=lambda value: "",
)
def test_what_is_asked_in_another_form(config, given, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        KUnBRTrainer(model(), config=config, train_dataset=[], processing_class=tokenizer, **given)


def test_one_fold_and_a_scoring_of_nothing(tokenizer, tmp_path, caplog):
    with pytest.raises(ValueError, match="got 1 fold, expected at least two"):
        of_text(tmp_path, tokenizer, RTT, folds=FOLDS[:1]).train()
    nothing = {"forget_questions": [], "retain_questions": []}
    run = of_text(tmp_path, tokenizer, {"scoring": "choice"}, **nothing)
    run.train()
    assert run.report.accuracy == {}
    assert len([r for r in caplog.records if "scoring='choice' counts for nothing" in r.message]) == 1


def test_the_report_beside_the_saved_model(tokenizer, tmp_path, caplog):
    """As the command line writes it; what is the user's stays."""
    run = of_text(tmp_path, tokenizer, RTT, folds=FOLDS)
    run.save_model(tmp_path / "before")
    run.train()
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "run.yaml").write_text("mine: 1\n")
    run.save_model(tmp_path / "after")
    assert not (tmp_path / "before" / "report.json").exists()
    found = finished_report(tmp_path / "after")
    assert found["accuracy"] == run.report.accuracy and found["recovery"] == run.report.recovery
    assert found["model"] == "LlamaForCausalLM"
    assert (tmp_path / "after" / "run.yaml").read_text() == "mine: 1\n"
    assert "run.yaml: not written by a run, so it stays" in caplog.text


@pytest.mark.slow  # 10 s: two processes
def test_two_processes_share_the_attack(truth, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = finished_report(tmp_path / "saved")
    assert report["accuracy"] == json.loads(json.dumps(truth[1].accuracy))
    assert report["rtt"]["accuracy"] == truth[1].rtt.accuracy
    made = (tmp_path / "made").read_text().split()
    assert sorted(made) == ["0:a", "1:b"]


# ---------------------------------------------------------------- data


class Stream:
    """As an IterableDataset: no length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


NEITHER = {"forget_dataset": None, "retain_dataset": None}


def pairs(forget, retain):
    return [{"forget": one, "retain": other} for one, other in zip(forget * 2, retain)]


def read(run):
    return forget_and_retain(run.forget_dataset, run.retain_dataset, run.train_dataset, run.data_collator)


def test_forms_of_data(tokenizer, tmp_path):
    """All of the same records; a table has null where a record has no such key."""
    forget, retain, none = records(0, 4), records(12, 16), {"text": None, "prompt": None}
    tables = [[none | record for record in part] for part in (forget, retain)]
    for given in (
        {"forget_dataset": forget, "retain_dataset": Stream(retain)},
        {"train_dataset": pairs(*tables)},
        {"train_dataset": Stream(pairs(forget, retain))},
        {"train_dataset": {"retain": Stream(retain), "forget": tables[0]}},
    ):
        run = of_text(tmp_path, tokenizer, **NEITHER | given)
        assert read(run) == (forget, retain)
    run.train_dataset["retain"] = retain  # a mapping is read by train(), not before
    run.train()
    assert run.report.accuracy["result"]["forget"]["num_questions"] == 4


def test_data_sets_of_hugging_face(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="not among the packages of the tests in CI")
    forget, retain = ([{**record, "id": 1} for record in part] for part in (records(0, 4), records(12, 16)))
    sets = [datasets.Dataset.from_list(part) for part in (forget, retain)]
    streams = [part.to_iterable_dataset() for part in sets]
    for given in (
        {"forget_dataset": sets[0], "retain_dataset": streams[1]},
        {"train_dataset": datasets.IterableDatasetDict(forget=streams[0], retain=streams[1])},
        {"train_dataset": datasets.Dataset.from_list(pairs(forget, retain)).to_iterable_dataset()},
        {"train_dataset": datasets.DatasetDict(forget=sets[0], retain=sets[1])},
    ):
        run = of_text(tmp_path, tokenizer, **NEITHER | given)
        assert read(run) == (forget, retain)
    run.train()
    assert run.report.accuracy["result"]["forget"]["num_questions"] == 4


def tokens(record):
    """Tokens with the text that they were made of beside them."""
    return {"input_ids": torch.tensor([5, 6, 7, 8]), **record}


def test_the_text_beside_tokens_is_no_question(tmp_path):
    data = [tokens(record) for record in records(0, 4)], [tokens(record) for record in records(12, 16)]
    data = [[{**item, "input_ids": item["input_ids"] + 9 * i} for item in part] for i, part in enumerate(data)]
    run = trainer(tmp_path, model(), SMALL, forget_dataset=data[0], retain_dataset=data[1])
    run.train()
    assert run.report.accuracy == {}
    config = kf.KUnBRConfig(**CONFIG | {"batch_size": 4} | SMALL)
    assert kf.unlearn(model(), *data, config, progress=False).accuracy == {}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"train_dataset": {"train": [], "test": []}},
            "train_dataset: got train and test, .*retain missing",
        ),
        ({"train_dataset": {"forget": [], "retain": [], "test": []}}, "test would not be read: give {'forget': data"),
        ({"forget_dataset": {"train": records(0, 2)}, "retain_dataset": []}, "^forget_dataset: got a mapping of train"),
        ({"forget_dataset": "f.jsonl", "retain_dataset": []}, "forget set: got 'f.jsonl', .*load_records reads files"),
        ({"forget_dataset": ["f.jsonl"], "retain_dataset": []}, "forget set: got 'f.jsonl', .*load_records"),
        ({"train_dataset": records(0, 2)}, r"^train_dataset\[0\]: expected {\"forget\": ..., \"retain\": ...}"),
        ({"train_dataset": records(0, 2), "forget_dataset": [], "retain_dataset": []}, "^train_dataset beside"),
    ],
    ids=str,
)
def test_data_of_another_form(given, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        of_text(tmp_path, tokenizer, **NEITHER | given).train()
    assert "\n" not in str(error.value)


def test_the_tokenizer_by_its_old_name(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kunbr_fast"):
        run = of_text(tmp_path, None, tokenizer=tokenizer)
    assert run.processing_class is tokenizer
    assert [r.message for r in caplog.records if "processing_class" in r.message] == [
        "tokenizer= is taken as processing_class=, its present name"
    ]
    with pytest.raises(ValueError, match="are the same: give processing_class alone"):
        of_text(tmp_path, tokenizer, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="^the forget set: records, not tokens .* as processing_class="):
        of_text(tmp_path, None).train()
    with pytest.raises(ValueError, match="^fold a: records, not tokens .* give a tokenizer as processing_class="):
        of_text(tmp_path, None, RTT, folds=FOLDS)


def test_a_name_is_no_model(tmp_path):
    data = [tokens({})]
    for call in (
        lambda: trainer(tmp_path, "Qwen/Qwen3-8B"),
        lambda: kf.unlearn("Qwen/Qwen3-8B", data, data),
        lambda: kf.unlearn(model(), data, data, unlearned="Qwen/Qwen3-8B"),
        lambda: kf.knowledge_density("Qwen/Qwen3-8B", data),
        lambda: kf.reinserted("Qwen/Qwen3-8B", {}, range(1), lr=1e-3).__enter__(),
        lambda: kf.reinserted(model(), "Qwen/Qwen3-8B", range(1), lr=1e-3).__enter__(),
        lambda: kf.patched("Qwen/Qwen3-8B").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"model: got 'Qwen/Qwen3-8B', .*CausalLM.from_pretrained\('Qwen/Qwen3-8B"):
            call()


def _shared(out):
    """A rank of `test_two_processes_share_the_attack`."""
    own = rtt.Attack._attack

    def attack(self, job, *args):
        with open(Path(out, "made"), "a") as file:
            file.write(f"{os.environ['RANK']}:{self.folds[job.folds[0]].name}\n")
        return own(self, job, *args)

    rtt.Attack._attack = attack
    run = of_text(out, tiny_text.tokenizer(), RTT, folds=FOLDS, arguments={"per_device_train_batch_size": 2})
    run.train()
    after = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.save_model(str(Path(out, "saved")))
    digests = [None, None]
    torch.distributed.all_gather_object(digests, {name: float(p.sum()) for name, p in after.items()})
    assert digests[0] == digests[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    _shared(sys.argv[1])
    torch.distributed.destroy_process_group()
