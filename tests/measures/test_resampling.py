"""The bootstrap: what theory says, the same each time, rows stay whole, and where it says nothing."""

import numpy as np
import pytest
from invented_answers import CLOSE

from kunbr_fast.measures import resampling
from kunbr_fast.measures.registry import mean_of
from kunbr_fast.measures.resampling import bootstrap_error, mean

VALUES = np.random.default_rng(1).random(200).tolist()


def of_population(values):
    """The standard error of a mean of what is drawn from these values themselves: sigma / sqrt(N)."""
    return float(np.std(values)) / len(values) ** 0.5


def test_of_a_mean():
    assert bootstrap_error(mean, VALUES) == pytest.approx(of_population(VALUES), rel=CLOSE)
    slow = bootstrap_error(lambda values: float(values.mean()), VALUES)
    assert slow == pytest.approx(bootstrap_error(mean, VALUES), rel=1e-12)


def test_a_mean_of_many_is_drawn_in_parts(monkeypatch):
    """A hundred thousand records would take a gigabyte at once."""
    whole = bootstrap_error(mean, VALUES)
    monkeypatch.setattr(resampling, "_AT_ONCE", 700)  # three rounds
    assert bootstrap_error(mean, VALUES) == whole


def test_of_a_share():
    """sqrt(p (1 - p) / N)"""
    found = mean_of([1] * 30 + [0] * 70)
    assert found.value == 0.3 and found.number == 100
    assert found.standard_error == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=CLOSE)


def test_of_a_difference():
    """Two samples are drawn by themselves: variances add up."""
    others = [3 * value for value in VALUES[:50]]
    found = bootstrap_error(lambda a, b: float(a.mean() - b.mean()), VALUES, others)
    assert found == pytest.approx((of_population(VALUES) ** 2 + of_population(others) ** 2) ** 0.5, rel=CLOSE)


def test_rows_stay_whole():
    """The columns' difference is 1 in each row, so in each draw."""
    rows = np.stack([VALUES, np.add(VALUES, 1)], axis=1)
    assert bootstrap_error(lambda drawn: float((drawn[:, 1] - drawn[:, 0]).mean()), rows) == pytest.approx(0, abs=1e-12)


def test_the_same_each_time():
    assert bootstrap_error(mean, VALUES) == bootstrap_error(mean, VALUES)
    assert bootstrap_error(mean, VALUES) != bootstrap_error(mean, VALUES, seed=1)


def test_nothing_to_say():
    assert bootstrap_error(mean, [0.5]) is None
    assert bootstrap_error(lambda a, b: 0.0, VALUES, [1.0]) is None
    assert bootstrap_error(mean, [0.5] * 9) == 0.0
    assert bootstrap_error(lambda values: 1 / values.min() if values.min() else float("inf"), [0.0, 1.0, 2.0]) is None
    assert bootstrap_error(lambda values: float(values.mean()), [8e307, 0.0]) is None  # its square is no number
    assert mean_of([None, None]) is None
    one = mean_of([None, 0.25])
    assert (one.value, one.standard_error, one.number, one.values) == (0.25, None, 1, [None, 0.25])
