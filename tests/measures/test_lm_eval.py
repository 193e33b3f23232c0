"""lm-evaluation-harness on a model in memory: a task of a folder against a plain formula, and what is refused."""

import json
import os
import random
import sys

import numpy as np
import pytest
import tiny_text
import torch
from tiny_models import tiny_model

from kunbr_fast.measures.lm_eval import run_lm_eval
from kunbr_fast.model.streaming import open_streamed

harness = pytest.mark.skipif(
    not any(os.path.isdir(os.path.join(path, "lm_eval")) for path in sys.path),
    reason="lm-eval is not installed: pip install 'kunbr-fast[lm-eval]'",
)
METRIC_NAMES = "acc", "acc_norm"
METRICS = "".join(
    f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in ("acc", "acc_norm")
)
QUESTIONS = [tiny_text.question(name) for name in tiny_text.NAMES]
# The right choice of some is the shortest, wrong ones have more characters a token: acc and acc_norm differ.
CHOICES = [
    [f"{c}{' When was born?' * 2 * (i % 3 == 0 and j != q['answer'])}" for j, c in enumerate(q["choices"])]
    for i, q in enumerate(QUESTIONS)
]


@pytest.fixture
def include(tmp_path, monkeypatch):
    """Tasks `born` (acc_norm) and `born_plain` (acc alone), tag `borns` of both, group `all_born`, and `absent`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, data = tmp_path / "tasks", tmp_path / "born.jsonl"
    folder.mkdir()
    lines = [
        {"question": q["question"], "choices": choices, "answer": q["answer"]} for q, choices in zip(QUESTIONS, CHOICES)
    ]
    tiny_text.write_jsonl(data, lines)
    for name, metrics in (("born", METRICS), ("born_plain", METRICS.splitlines(keepends=True)[0])):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntag: borns\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
            f'doc_to_choice: "{{{{choices}}}}"\ndoc_to_target: answer\nmetric_list:\n{metrics}'
        )
    (folder / "all.yaml").write_text(
        "group: all_born\ntask: [born, born_plain]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    born = (folder / "born.yaml").read_text().replace("tag: borns\n", "")
    absent = born.replace("task: born", "task: absent").replace("json\n", "no/such_set\n")
    (folder / "absent.yaml").write_text(absent.replace(f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n", ""))
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: no_such_type\n")
    (folder / "gone.yaml").write_text(born.replace("task: born", "task: gone").replace("born.jsonl", "gone.jsonl"))
    return folder


def right(model, tokenizer, number, per_character):
    """Of each question whether the answer has the largest log-likelihood (over its characters)."""
    found = []
    for question, choices in list(zip(QUESTIONS, CHOICES))[:number]:
        scores = []
        for choice in choices:
            context = tokenizer(question["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                shares = model(ids).logits[0].double().log_softmax(-1)
            score = sum(shares[t - 1, ids[0, t]].item() for t in range(len(context), ids.shape[1]))
            scores.append(score / len(choice) if per_character else score)
        found.append(float(np.argmax(scores) == question["answer"]))
    return found


@harness
def test_a_task_of_a_folder(include):
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    found = run_lm_eval(model, tokenizer, ["born", "born_plain"], include=include, batch_size=5)
    for task, metric in (("born", "acc_norm"), ("born_plain", "acc")):
        truth = right(model, tokenizer, 24, metric == "acc_norm")
        error = np.std(truth, ddof=1) / len(truth) ** 0.5
        assert found[task] == {
            "metric": metric, "value": np.mean(truth), "standard_error": pytest.approx(error), "number": 24
        }  # fmt: skip
    assert list(found) == ["born", "born_plain"]
    assert found["born"]["value"] != found["born_plain"]["value"]
    json.dumps(found)


@harness
def test_groups_tags_and_a_limit(include):
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    truth = right(model, tokenizer, 7, False)
    given = dict(include=str(include), limit=7)
    assert list(run_lm_eval(model, tokenizer, ["borns"], **given)) == ["born", "born_plain"]
    found = run_lm_eval(model, tokenizer, ["all_born", "born_plain"], **given)
    assert list(found) == ["all_born", "born_plain"] and found["all_born"]["metric"] == "acc"
    assert found["all_born"]["value"] == found["born_plain"]["value"] == pytest.approx(np.mean(truth))
    assert found["all_born"]["number"] == 14 and found["born_plain"]["number"] == 7


@harness
def test_everything_stays_as_it_was(include, capsys, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    model = tiny_text.model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_lm_eval(model, tiny_text.tokenizer(), ["born"], include=include, limit=2)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert model.training and all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ and "%" not in capsys.readouterr().err
    run_lm_eval(model, tiny_text.tokenizer(), ["born"], include=include, limit=2, progress="the tasks")
    said = capsys.readouterr().err
    assert "the tasks" in said and "100%" in said


@harness
@pytest.mark.parametrize(
    "tasks, message",
    [
        (["absent"], "task absent: its data is not on this machine .*no/such_set"),
        (["gone"], "task gone: its data is not on this machine .*gone.jsonl"),
        (["broken"], "task broken: its definition does not load"),
        (["hellaswag"], "task hellaswag: its data is not on this machine .*HF_HOME"),
        (["no_such_task"], "has no task 'no_such_task'"),
    ],
)
def test_tasks_that_cannot_run(include, tasks, message):
    with pytest.raises(ValueError, match=message):
        run_lm_eval(tiny_text.model(), tiny_text.tokenizer(), tasks, include=include)


@pytest.mark.parametrize(
    "tasks, given, message",
    [
        ([], {}, "no task"),
        (["born"], {"include": "/no/such/folder"}, "include='/no/such/folder': expected a folder"),
        (["born"], {"limit": 0}, "limit=0"),
        (["born"], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments(tasks, given, message):
    with pytest.raises(ValueError, match=message):
        run_lm_eval(tiny_text.model(), tiny_text.tokenizer(), tasks, **given)


def test_a_missing_package_and_a_streamed_model(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'kunbr-fast\[lm-eval\]'"):
        run_lm_eval(tiny_text.model(), tiny_text.tokenizer(), ["born"])
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="streamed.*load it whole"):
        run_lm_eval(open_streamed(tmp_path), tiny_text.tokenizer(), ["born"])
