"""What data sets and models a `KUnBRTrainer` takes, and what it says of its result."""

import logging

import pytest
import tiny_text
import torch

pytest.importorskip("accelerate")
from trainer_runner import CONFIG, trainer

import kunbr_fast as kf
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.integrations.trainer_data import forget_and_retain

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
