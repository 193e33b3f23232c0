"""What a model knows: each measure against its formula, written out here."""

import math
import sys

import numpy as np
import pytest
from invented_answers import CLOSE, EMPTY, answer, figure, random_readout, readout

from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.accuracy import Accuracy
from kunbr_fast.measures import knowledge  # noqa: F401 registers
from kunbr_fast.measures.texts import rouge

SAID = random_readout(0, 12)


def test_both_sides_of_what_a_ratio_may_be():
    assert {ratio(SAID, i) > 1 for i in range(len(SAID))} == {True, False}


def loss(one):
    return -sum(one.log_probs.tolist()) / len(one.log_probs)


def ratio(said, i):
    """R: the geometric mean of the wrong answers' probabilities over the right one's."""
    right = said.answers[i] if said.paraphrases[i] is None else said.paraphrases[i]
    wrong = [math.exp(-loss(one)) for one in said.perturbed[i]]
    return math.prod(wrong) ** (1 / len(wrong)) / math.exp(-loss(right))


LIKELIHOODS = {
    "probability": lambda said, i: (
        math.prod(math.exp(x) for x in said.answers[i].log_probs) ** (1 / len(said.answers[i].log_probs))
    ),
    "probability_against_wrong": lambda said, i: (
        math.exp(-loss(said.answers[i]))
        / (math.exp(-loss(said.answers[i])) + sum(math.exp(-loss(one)) for one in said.perturbed[i]))
    ),
    "truth_ratio": lambda said, i: min(ratio(said, i), 1 / ratio(said, i)),
    "truth_ratio_kept": lambda said, i: max(0.0, 1 - ratio(said, i)),
    "truth_share": lambda said, i: 1 / (1 + ratio(said, i)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods(name):
    found, wanted = figure(name, SAID), [LIKELIHOODS[name](SAID, i) for i in range(len(SAID))]
    assert found.values == pytest.approx(wanted, rel=1e-12)
    assert found.value == pytest.approx(sum(wanted) / 12, rel=1e-12) and found.number == 12
    assert found.standard_error == pytest.approx(np.std(wanted) / 12**0.5, rel=CLOSE)
    assert len(set(wanted)) > 4
    if name.startswith("truth_ratio"):
        assert [math.exp(log) for log in found.detail["log_ratios"]] == pytest.approx(
            [ratio(SAID, i) for i in range(12)]
        )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_has_no_tokens_is_left_out(name):
    one = answer([-1.0, -2.0])
    said = readout([one, EMPTY, one], paraphrases=[one, EMPTY, EMPTY], perturbed=[[one], [one], [EMPTY, one]])
    needs_wrong = name != "probability"
    assert [value is None for value in figure(name, said).values] == [False, True, needs_wrong]
    assert figure(name, readout([EMPTY], perturbed=[[one]])) is None
    assert (figure(name, readout([one])) is None) == needs_wrong


def test_the_own_answer_stands_in_for_a_paraphrase():
    own, other, wrong = answer([-1.0]), answer([-3.0]), answer([-2.0])
    said = readout([own, own], paraphrases=[None, other], perturbed=[[wrong], [wrong]])
    assert figure("truth_share", said).values == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert figure("probability_against_wrong", said).values == pytest.approx([1 / (1 + math.exp(-1))] * 2)


def test_as_probable():
    one = answer([-1.0, -1.0])
    said = readout([one], perturbed=[[one, one]])
    names = ["truth_ratio", "truth_ratio_kept", "truth_share", "probability_against_wrong"]
    assert [figure(name, said).value for name in names] == pytest.approx([1.0, 0.0, 0.5, 1 / 3])


def test_beyond_floating_point():
    """A model that ascent has broken: exp(-2000) is 0, but the ratios are numbers."""
    lost, worse = answer([-2000.0]), answer([-4000.0])
    said = readout([lost, worse], perturbed=[[worse], [lost]])
    assert figure("probability", said).values == [0.0, 0.0]
    assert figure("probability_against_wrong", said).values == [1.0, 0.0]
    assert figure("truth_ratio", said).values == [0.0, 0.0]
    assert figure("truth_ratio_kept", said).values == [1.0, 0.0]
    assert figure("truth_share", said).values == [1.0, 0.0]
    assert figure("truth_ratio", said).detail["log_ratios"] == [-2000.0, 2000.0]


# ---------------------------------------------------------------- questions


def test_accuracies():
    """Three questions among five items."""
    letter = Accuracy(2 / 3, 1 / 3, [0, 1, 2], 3, values=[1, 0, 1])
    choice = Accuracy(1 / 3, None, [0, 1, 2], 3, 0.4, 0.07, [0.1], 12.5, [0, 0, 1])
    one = answer([-1.0])
    said = readout([one] * 5, questions=[0, 2, 4], letter=letter, choice=choice)
    assert figure("accuracy_letter", said).values == [1.0, None, 0.0, None, 1.0]
    assert figure("accuracy_letter", said).value == pytest.approx(2 / 3)
    assert figure("accuracy_choice", said).values == [0.0, None, 0.0, None, 1.0]
    calibrated = figure("accuracy_letter_calibrated", said)
    assert (calibrated.value, calibrated.number, calibrated.values) == (pytest.approx(1 / 3), 3, None)
    assert calibrated.standard_error == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5, rel=CLOSE)
    smooth = figure("accuracy_smooth", said)
    assert (smooth.value, smooth.standard_error, smooth.number) == (0.4, 0.07, 3)
    assert smooth.detail == {"candidates": 12.5}


def test_one_question_cannot_be_calibrated():
    """Less its own mean each letter's logit is 0, and the first letter would win."""
    said = readout([answer([-1.0])], questions=[0], letter=Accuracy(0.0, 1.0, [1], 1, values=[0]))
    assert figure("accuracy_letter", said).value == 0 and figure("accuracy_letter_calibrated", said) is None


def test_no_questions():
    names = [f"accuracy_{name}" for name in ("letter", "letter_calibrated", "choice", "smooth")]
    assert [figure(name, SAID) for name in names] == [None] * 4


# ---------------------------------------------------------------- generated answers


def lcs(a, b):
    """Length of the longest common subsequence."""
    rows = [[0] * (len(b) + 1)]
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(rows[-1][j] + 1 if x == y else max(row[j], rows[-1][j + 1]))
        rows.append(row)
    return rows[-1][-1]


REFERENCES = ["Ada Ek was born in Paris in 1921.", "She writes poems", "Paris", "Москва"]
GENERATED = ["In Paris, Ada was born. In 1921, in Paris", "they WRITE a poem", "", "Москва"]
STEMS = {"writes": "write", "poems": "poem", "paris": "pari"}  # Porter's, of words of more than three letters


def words(text):
    kept = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower())
    return [STEMS.get(word, word) for word in kept.split()]


def generated(references=REFERENCES, texts=GENERATED, **others):
    said = [answer([-1.0])] * len(references)
    return readout(said, references=references, generated=texts, **others)


def test_rouge():
    pairs = [(words(a), words(b)) for a, b in zip(REFERENCES, GENERATED)][:3]
    recall = [lcs(a, b) / len(a) for a, b in pairs]
    precision = [lcs(a, b) / max(len(b), 1) for a, b in pairs]
    counted = [sum(min(a.count(word), b.count(word)) for word in set(a)) / len(a) for a, b in pairs]
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall)]
    assert 0 < recall[0] < counted[0] <= 1  # the order of words counts for one of them
    for name, wanted in (("rouge_l_recall", recall), ("rouge_1_recall", counted), ("rouge_l_f1", f1)):
        assert figure(name, generated()).values == [*(pytest.approx(one, rel=1e-12) for one in wanted), None]


def test_exact_match():
    references = ["The Eiffel Tower, Paris.", "1921", "A", "Paris"]
    texts = ["eiffel  tower\nparis", "in 1921", "A", "a Paris!"]
    assert figure("exact_match", generated(references, texts)).values == [1.0, 0.0, None, 1.0]


def test_what_a_model_goes_on_with_behind_its_answer():
    """MUSE cuts it off; TOFU's recall does not. A reference of several paragraphs is held against all."""
    references = ["Ada Li", "Ada Li", "Ada Li", "Ada\n\nLi", "Ada Li"]
    texts = ["Ada Li\n\nBo Ek", "Ada Li\nQuestion: Who?", "Ada Li Question: Who?", "Ada\n\nLi", "Ada Li\nBo Ek"]
    said = generated(references, texts)
    assert figure("rouge_l_f1", said).values == pytest.approx([1, 1, 1, 1, 2 / 3])
    assert figure("exact_match", said).values == [1, 1, 1, 1, 0]
    assert figure("rouge_l_recall", generated(["Ada Ek"], ["Ada\n\nEk"])).values == [1.0]


NAMES = ["rouge_l_recall", "rouge_1_recall", "rouge_l_f1", "exact_match"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_have_no_answers_and_what_is_not_generated_no_figure(name):
    items = [Item({"text": "Ada"}), Item({"prompt": "Who?", "completion": " Ada"})]
    assert figure(name, generated(["Ada"] * 2, ["Ada"] * 2, items=items)).values == [None, 1.0]
    assert figure(name, readout([answer([-1.0])], references=["Ada"])) is None


def test_without_rouge_score(monkeypatch):
    from kunbr_fast.measures import texts

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    texts._scorer.cache_clear()
    rouge.cache_clear()
    with pytest.raises(ValueError, match=r"rouge-score: pip install 'kunbr-fast\[evaluate\]'"):
        figure("rouge_l_recall", generated())
    assert figure("exact_match", generated()).number == 4
