"""Perplexity, model utility and forget quality against their formulas, written out here."""

import dataclasses
import math
import sys

import pytest
from invented_answers import CLOSE, EMPTY, answer, figure, np, random_readout, readout, subject
from scipy.stats import hmean, ks_2samp

from kunbr_fast.data.items import Item
from kunbr_fast.measures import utility  # noqa: F401 registers

SAID = random_readout(0, 30)


def test_perplexity():
    tokens = [p for one in SAID.answers for p in one.log_probs.tolist()]
    found = figure("perplexity", SAID)
    assert found.value == pytest.approx(math.exp(-sum(tokens) / len(tokens)), rel=1e-12)
    assert (found.number, found.detail) == (30, {"tokens": len(tokens)})
    long = readout([answer([-1.0] * 3), answer([-5.0]), EMPTY])
    assert figure("perplexity", long).value == pytest.approx(math.exp(8 / 4))  # tokens count, not records
    assert figure("perplexity", readout([EMPTY])) is None
    assert figure("perplexity", readout([answer([-1.0])])).standard_error is None


def test_error_of_perplexity():
    """Answers of one token: perplexity times the standard error of the mean loss (the delta method)."""
    losses = 1 + np.random.default_rng(0).random(2000) / 10
    found = figure("perplexity", readout([answer([-x]) for x in losses]))
    assert found.standard_error == pytest.approx(found.value * np.std(losses) / 2000**0.5, rel=CLOSE)


def test_perplexity_of_a_broken_model():
    lost = figure("perplexity", readout([answer([-5000.0])] * 2))
    assert lost.value == math.exp(709) and lost.standard_error is None
    half = figure("perplexity", readout([answer([-5000.0]), answer([-1.0])]))
    assert math.isfinite(half.value) and half.standard_error is None


# ---------------------------------------------------------------- model utility


def items(number, file, paraphrase):
    return [
        Item({"prompt": "Who?", "completion": " Ada", "_where": f"{file}:{i}"}, paraphrase, (" Bo",))
        for i in range(1, number + 1)
    ]


def part(seed, number, file, paraphrased=True):
    said = random_readout(seed, number, items=items(number, file, " It is Ada." if paraphrased else None))
    words = ["ada was born in paris", "paris", "in 1921"]
    texts = [words[(seed + i) % 3] for i in range(number)]
    paraphrases = said.paraphrases if paraphrased else [None] * number
    return dataclasses.replace(said, paraphrases=paraphrases, generated=texts, references=[words[0]] * number)


def together(*parts):
    fields = ("items", "answers", "paraphrases", "perturbed", "generated", "references")
    return readout(**{name: [one for said in parts for one in getattr(said, name)] for name in fields})


def three(said, against_wrong):
    """Probability, ROUGE-L recall (of texts whose words are the reference's, in order, or none) and truth ratio."""
    p = [math.exp(one.log_probs.mean()) for one in said.answers]
    wrong = [[math.exp(one.log_probs.mean()) for one in several] for several in said.perturbed]
    right = [b or a for a, b in zip(said.answers, said.paraphrases)]
    ratios = [
        math.exp(np.mean([one.log_probs.mean() for one in several]) - one.log_probs.mean())
        for one, several in zip(right, said.perturbed)
    ]
    recall = [len(set(text.split()) & set(words.split())) / 5 for text, words in zip(said.generated, said.references)]
    if against_wrong:
        p = [a / (a + sum(several)) for a, several in zip(p, wrong)]
    return [float(np.mean(values)) for values in (p, recall, [max(0, 1 - ratio) for ratio in ratios])]


RETAIN, AUTHORS, FACTS = part(1, 9, "retain"), part(2, 5, "authors", False), part(3, 7, "facts", False)
UNSEEN = part(4, 4, "unseen")


def test_model_utility():
    """TOFU's nine figures: retain, real authors and world facts, these two in one holdout set."""
    found = figure("model_utility", subject(retain=RETAIN, holdout=together(AUTHORS, FACTS)), "retain")
    figures = [three(RETAIN, False), three(AUTHORS, True), three(FACTS, True)]
    assert found.value == pytest.approx(hmean(sum(figures, [])), rel=1e-12)
    assert found.number == 21 and 0 < found.standard_error < found.value
    names = ("probability", "rouge_l_recall", "truth_ratio")
    assert [[one[name] for name in names] for one in found.detail["parts"]] == [pytest.approx(one) for one in figures]
    said = [[one[name] for name in ("set", "file", "records", "against_wrong")] for one in found.detail["parts"]]
    assert said == [["retain", "retain", 9, False], ["holdout", "authors", 5, True], ["holdout", "facts", 7, True]]


def test_unseen_records_are_no_utility():
    alone = figure("model_utility", subject(retain=RETAIN), "retain")
    assert alone.value == pytest.approx(hmean(three(RETAIN, False)), rel=1e-12)
    assert figure("model_utility", subject(retain=RETAIN, holdout=UNSEEN), "retain") == alone


def test_model_utility_is_zero_with_one_zero():
    nothing = dataclasses.replace(RETAIN, generated=["zzz"] * 9)
    found = figure("model_utility", subject(retain=nothing), "retain")
    assert (found.value, found.standard_error) == (0.0, 0.0)


def test_no_model_utility():
    one = answer([-1.0])
    assert figure("model_utility", readout([one], generated=["a"], references=["a"]), "retain") is None
    silent = dataclasses.replace(RETAIN, generated=None, references=())
    assert figure("model_utility", subject(retain=silent), "retain") is None


# ---------------------------------------------------------------- forget quality


def ratios(said):
    right = [b or a for a, b in zip(said.answers, said.paraphrases)]
    return [
        math.exp(np.mean([one.log_probs.mean() for one in several]) - one.log_probs.mean())
        for one, several in zip(right, said.perturbed)
    ]


def distance(a, b):
    """Of two distribution functions, at each place."""
    return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in [*a, *b])


def test_forget_quality():
    other = random_readout(9, 25)
    found = figure("forget_quality", subject(subject(forget=other), forget=SAID))
    a, b = ratios(SAID), ratios(other)
    assert found.value == pytest.approx(ks_2samp(a, b).pvalue, rel=1e-9)
    assert found.standard_error is None and found.number == 30
    assert found.detail["statistic"] == pytest.approx(distance(a, b), rel=1e-12)
    assert (found.detail["n"], found.detail["m"]) == (30, 25)
    random = np.random.default_rng(0)
    draws = [[random.choice(one, len(one)) for one in (a, b)] for _ in range(1000)]
    assert found.detail["statistic_error"] == pytest.approx(np.std([distance(*two) for two in draws]), rel=2 * CLOSE)


def test_forget_quality_of_the_same_and_of_the_far():
    assert figure("forget_quality", subject(subject(forget=SAID), forget=SAID)).value == 1.0
    one, other = answer([-1.0]), answer([-2.0])
    far = [readout([a] * 20, perturbed=[[b]] * 20) for a, b in ((one, other), (other, one))]
    found = figure("forget_quality", subject(subject(forget=far[1]), forget=far[0]))
    assert found.value == pytest.approx(2 / math.comb(40, 20), rel=1e-6)  # of all orders two are so far apart
    assert (found.detail["statistic"], found.detail["statistic_error"]) == (1.0, 0.0)


def test_no_forget_quality(monkeypatch):
    assert figure("forget_quality", SAID) is None
    plain = readout([answer([-1.0])])
    assert figure("forget_quality", subject(subject(forget=plain), forget=plain)) is None
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ValueError, match=r"scipy: pip install 'kunbr-fast\[evaluate\]'"):
        figure("forget_quality", subject(subject(forget=SAID), forget=SAID))
