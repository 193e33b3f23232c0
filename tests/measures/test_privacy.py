"""Membership inference: scores and areas against their formulas, pair by pair."""

import math
import zlib

import pytest
from invented_answers import CLOSE, EMPTY, answer, figure, np, random_readout, readout, subject

from kunbr_fast.measures.privacy import auc

FORGET, HOLDOUT, RETRAINED = random_readout(1, 40), random_readout(2, 30), [random_readout(seed, 40) for seed in (3, 4)]
RETRAINED[1] = random_readout(4, 30)


def retrained():
    return subject(forget=RETRAINED[0], holdout=RETRAINED[1])


def loss(one):
    return -sum(one.log_probs.tolist()) / len(one.log_probs)


def lowest(values):
    values = sorted(values)
    number = max(1, math.floor(len(values) * 2 / 5))
    return sum(values[:number]) / number


SCORES = {
    "mia_loss": lambda one: -loss(one),
    "mia_zlib": lambda one: -loss(one) / len(zlib.compress(one.text.encode("utf-8"))),
    "mia_min_k": lambda one: lowest(one.log_probs.tolist()),
    "mia_min_k_plus_plus": lambda one: lowest(
        [(p - mu) / max(sigma, 0.001) for p, mu, sigma in zip(one.log_probs, one.means, one.deviations)]
    ),
}


def area(members, others):
    """Each pair: 1 if the member's is higher, 1/2 if they are equal."""
    wins = [(a > b) + (a == b) / 2 for a in members for b in others]
    return sum(wins) / len(wins)


def by(score, *sets):
    return [[score(one) for one in said.answers if len(one)] for said in sets]


@pytest.mark.parametrize("name", SCORES)
def test_attacks(name):
    found = figure(name, subject(forget=FORGET, holdout=HOLDOUT))
    assert found.value == pytest.approx(area(*by(SCORES[name], FORGET, HOLDOUT)), rel=1e-12)
    assert (found.number, found.detail) == (70, {"members": 40, "others": 30})
    assert 0 < found.standard_error < 0.2
    assert figure(name, subject(forget=FORGET, holdout=HOLDOUT)) == found


@pytest.mark.parametrize("name", SCORES)
def test_all_members_found(name):
    """What is certain before what is not."""
    certain, doubtful = answer([-0.1] * 5), answer([-9.0] * 5)
    sets = dict(forget=readout([certain] * 4), holdout=readout([doubtful] * 3))
    assert figure(name, subject(**sets)).value == 1.0
    assert figure(name, subject(forget=sets["holdout"], holdout=sets["forget"])).value == 0.0
    same = figure(name, subject(forget=sets["forget"], holdout=sets["forget"]))
    assert (same.value, same.standard_error) == (0.5, 0.0)


def test_areas_with_ties():
    random = np.random.default_rng(0)
    for _ in range(20):
        members, others = (random.integers(0, 4, random.integers(1, 9)) for _ in range(2))
        assert auc(members, others) == pytest.approx(area(members, others), rel=1e-12)


def test_error_of_an_area():
    """Of scores from one distribution the variance of U is n m (n + m + 1) / 12."""
    random = np.random.default_rng(5)
    n, m = 300, 200
    said = [readout([answer([-x]) for x in random.random(number)]) for number in (n, m)]
    found = figure("mia_loss", subject(forget=said[0], holdout=said[1]))
    # the bound on the bootstrap's own deviation, and its distance from the population's at this size
    assert found.standard_error == pytest.approx(((n + m + 1) / (12 * n * m)) ** 0.5, rel=CLOSE + 0.05)


def test_smallest():
    """One token, one record a side; a distribution that is one token."""
    sets = dict(forget=readout([answer([-1.0], means=[0.0], deviations=[0.0])]), holdout=readout([answer([-2.0])]))
    for name in SCORES:
        found = figure(name, subject(**sets))
        assert found.standard_error is None and found.number == 2
    # (-1 - 0) / 0.001 is below (-2 + 2) / 1, and above (-4 + 2) / 0.001
    assert [figure(name, subject(**sets)).value for name in SCORES] == [1.0, 1.0, 1.0, 0.0]
    sets["holdout"] = readout([answer([-4.0], means=[-2.0], deviations=[0.001])])
    assert figure("mia_min_k_plus_plus", subject(**sets)).value == 1.0


@pytest.mark.parametrize("name", [*SCORES, "mia_reference", "privleak"])
def test_what_is_missing(name):
    assert figure(name, subject(forget=FORGET)) is None
    empty = dict(forget=FORGET, holdout=readout([EMPTY]))
    assert figure(name, subject(subject(**empty), **empty)) is None
    said = dict(forget=readout([EMPTY, *FORGET.answers]), holdout=HOLDOUT)
    assert figure(name, subject(subject(**said), **said)).number == 70


def test_reference():
    found = figure("mia_reference", subject(retrained(), forget=FORGET, holdout=HOLDOUT))
    scores = [
        [loss(other) - loss(own) for own, other in zip(a.answers, b.answers)]
        for a, b in zip((FORGET, HOLDOUT), RETRAINED)
    ]
    assert found.value == pytest.approx(area(*scores), rel=1e-12)
    assert figure("mia_reference", subject(forget=FORGET, holdout=HOLDOUT)) is None


def test_privleak():
    """MUSE's formula of 1 - AUC."""
    model = 1 - area(*by(SCORES["mia_min_k"], FORGET, HOLDOUT))
    reference = 1 - area(*by(SCORES["mia_min_k"], *RETRAINED))
    found = figure("privleak", subject(retrained(), forget=FORGET, holdout=HOLDOUT))
    assert found.value == pytest.approx((model - reference) / reference, rel=1e-12)
    assert found.detail == {
        "auc": pytest.approx(1 - model),
        "reference_auc": pytest.approx(1 - reference),
        "reference": "retrained",
    }
    assert found.number == 70 and found.standard_error > 0
    alone = figure("privleak", subject(forget=FORGET, holdout=HOLDOUT))
    assert alone.value == pytest.approx((model - 0.5) / 0.5, rel=1e-12)
    assert (alone.detail["reference_auc"], alone.detail["reference"]) == (0.5, "none: taken as 0.5")
    same = figure("privleak", subject(subject(forget=FORGET, holdout=HOLDOUT), forget=FORGET, holdout=HOLDOUT))
    assert (same.value, same.standard_error) == (0.0, 0.0)  # rows are drawn for both models alike


def test_privleak_is_of_whole_members_and_of_a_reference_that_errs():
    certain, doubtful = readout([answer([-0.1])] * 4), readout([answer([-9.0])] * 4)
    sets = dict(forget=certain, holdout=doubtful)
    assert figure("privleak", subject(**sets)).value == -1.0
    assert figure("privleak", subject(subject(**sets), **sets)) is None  # 0 / 0
