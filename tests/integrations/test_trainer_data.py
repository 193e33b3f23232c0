"""What data sets and models a `KUnBRTrainer` takes, and what it says of its result."""

import pytest
import tiny_text
import torch

pytest.importorskip("accelerate")
from trainer_runner import CONFIG, trainer

import kunbr_fast as kf
from kunbr_fast.evaluation.rtt import Fold

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


def of_text(out, tokenizer, config=None, **more):
    given = {"forget_dataset": records(0, 8), "retain_dataset": records(12, 18), "processing_class": tokenizer}
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
