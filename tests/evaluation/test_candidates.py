"""Smooth accuracy and leak at k: against every set of distractors in turn, plain forwards and real sampling."""

import itertools
import json

import pytest
import torch
from test_accuracy import byte_level_bpe, characters, make_model, make_records

from kunbr_fast.evaluation import accuracy, candidates
from kunbr_fast.evaluation.accuracy import choice_accuracy, prepare_questions
from kunbr_fast.evaluation.candidates import SAMPLES, expected_accuracy
from kunbr_fast.model.decoder import Decoder


def by_enumeration(right, wrong, drawn):
    """Over all sets of distractors: the share in which the right answer wins, ties broken evenly."""
    found = []
    for chosen in itertools.combinations(wrong, drawn):
        best = max(right, *chosen)
        winners = [right, *chosen].count(best)
        found.append((right == best) / winners)
    return sum(found) / len(found)


def test_expected_accuracy_is_the_mean_over_all_sets_of_distractors():
    for right, wrong, choices in ((3, [1, 2, 5, 0], 4), (3, [1, 3, 5, 0, 3, 2], 4), (1, [1] * 5, 4), (0, [1, 2], 3)):
        less, equal = sum(w < right for w in wrong), wrong.count(right)
        truth = by_enumeration(right, wrong, choices - 1)
        assert expected_accuracy(less, equal, len(wrong), choices) == pytest.approx(truth)
    assert expected_accuracy(0, 9, 9, 4) == pytest.approx(1 / 4), "a model that knows nothing has chance"
    assert expected_accuracy(1, 0, 1, 4) == 1.0, "fewer different wrong choices than the question has"


@torch.no_grad()
def log_likelihood(model, tokenizer, question, choice):
    start = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(log_p[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))


@pytest.mark.parametrize("make", [byte_level_bpe, characters])
def test_smooth_accuracy_equals_a_plain_loop_over_all_candidates(make):
    tokenizer, records = make(), make_records(5, choices=3)
    records[3]["choices"] = ["at dawn", "at noon", 1999]
    records[3]["answer"] = 0
    model = make_model(len(tokenizer))
    years = dict.fromkeys(c for r in records for c in r["choices"] if isinstance(c, int))
    truth, likelihoods = [], []
    for record in records:
        right = record["choices"][record["answer"]]
        kind = years if isinstance(right, int) else record["choices"]  # words against words, and its own year
        scores = {c: log_likelihood(model, tokenizer, record["question"], c) for c in kind}
        wrong = [score for choice, score in scores.items() if choice != right]
        truth.append(by_enumeration(scores[right], wrong, 2))
        likelihoods.append(scores[right])
    found = choice_accuracy(Decoder(model), tokenizer, records, scoring="choice")
    assert 0 < sum(truth) < len(truth)
    assert found.smooth == pytest.approx(sum(truth) / len(truth), abs=1e-12)
    assert found.smooth_error == pytest.approx(
        torch.tensor(truth, dtype=torch.float64).std().item() / len(truth) ** 0.5, abs=1e-12
    )
    hit = torch.tensor(likelihoods, dtype=torch.float64).exp()
    assert found.leak == pytest.approx([float((1 - (1 - hit) ** k).mean()) for k in SAMPLES], abs=1e-12)
    assert found.pool == pytest.approx(5 / (4 / len(years) + 1 / 3))


def test_what_is_not_measured_by_letters_is_none():
    tokenizer = byte_level_bpe()
    found = choice_accuracy(Decoder(make_model(len(tokenizer))), tokenizer, make_records())
    assert (found.smooth, found.smooth_error, found.leak, found.pool) == (None,) * 4
    assert accuracy.Accuracy(**json.loads(json.dumps(found.to_dict()))) == found


def test_prefixes_are_shared_and_large_pools_sampled(monkeypatch):
    records = make_records(40)
    by_digits = prepare_questions(characters(), records, scoring="choice").candidates
    decades = {str(c)[:3] for r in records for c in r["choices"]}
    for question in by_digits:
        assert len(question.sequences) == len(decades), "a text for each longest prefix"
        assert len(question.paths) == question.pool == len({c for r in records for c in r["choices"]}) > 50
    monkeypatch.setattr(candidates, "MOST", 20)
    sampled = prepare_questions(characters(), records, scoring="choice").candidates
    assert all(len(question.paths) == 4 + 20 and question.pool > 50 for question in sampled)
    monkeypatch.setattr(candidates, "TEXTS", 4)
    for few in prepare_questions(characters(), records, scoring="choice").candidates:
        assert len(few.sequences) <= 4 and 4 <= len(few.paths) < 24


def test_leak_is_what_sampling_finds():
    """p of a toy: the chance that k sampled answers hold the right one."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.02, 0.3, 1.0, 0.0], dtype=torch.float64)
    drawn = torch.rand(4, 20_000, SAMPLES[-1], generator=generator, dtype=torch.float64) < probabilities[:, None, None]
    expected = candidates.leak(probabilities.log())
    for k, value in zip(SAMPLES, expected):
        assert float(drawn[:, :, :k].any(2).double().mean()) == pytest.approx(value, abs=0.004)
    assert candidates.guessing(1) == [1.0] * len(SAMPLES)
    assert candidates.guessing(4)[:2] == pytest.approx([1 / 4, 1 - (3 / 4) ** 2])
