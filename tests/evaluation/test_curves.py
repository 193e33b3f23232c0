"""Each question counts once, whatever folds it is in."""

import pytest
import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.candidates import SAMPLES, guessing
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.report import Report, attack_table, table

RIGHT = {"a": [1, 3, 6, 6], "b": [1, 2, 0, 1]}  # of the questions, by epoch
NUMBER = {"a": 12, "b": 2}


def rows(known=("a", "b"), number=NUMBER):
    return [
        {
            "attack": "full", "fold": fold, "lr": 1e-3, "epoch": epoch, "plain": right / NUMBER[fold],
            "calibrated": None, "smooth": right / NUMBER[fold], "smooth_error": 0.1, "pool": 4.0 + (fold == "b"),
            "leak": [right / NUMBER[fold]] * len(SAMPLES),
            **({"num_questions": number[fold]} if fold in known else {}),
        }
        for fold, curve in RIGHT.items()
        for epoch, right in enumerate(curve)
    ]  # fmt: skip


def report(rtt, forget):
    density = Density(torch.ones(4, dtype=torch.float64), {}, torch.ones(4, dtype=torch.int64), 1)
    accuracy = {"result": {"forget": {"plain": forget, "calibrated": None, "num_questions": 14}}}
    return Report({"objective": "gd", "adversary_every": 0}, [range(1)], density, {}, {}, accuracy, rtt)


def test_figures_are_over_all_questions_of_unequal_folds():
    result = RTTResult(rows())
    pooled = [2 / 14, 5 / 14, 6 / 14, 7 / 14]
    for key in ("plain", "smooth"):
        assert result.curve(1e-3, key) == pytest.approx(pooled, abs=1e-15)
    assert result.before == pytest.approx(2 / 14) and result.accuracy == pytest.approx(7 / 14)
    assert result.best == (1e-3, 3), "by folds it would be epoch 1"
    assert result.recovery == result.accuracy - result.before
    found = result.summary("full")
    assert found["accuracy"] == result.accuracy and found["smooth_accuracy"] == pytest.approx(7 / 14)
    assert found["smooth_error"] == pytest.approx(0.1 * (12**2 + 2**2) ** 0.5 / 14)
    assert found["standard_error"] == pytest.approx((12 * 0.5 * 0.5 + 2 * 0.5 * 0.5) ** 0.5 / 14)
    assert result.leaks() == pytest.approx([2 / 14] * len(SAMPLES))
    both = zip(guessing(4.0), guessing(5.0))
    assert result.guesses == pytest.approx([(12 * first + 2 * second) / 14 for first, second in both])
    assert "14.3" in attack_table(result).splitlines()[2]


def test_no_question_that_came_back_is_no_recovery():
    right = {"a": (6, 8, 12), "b": (19, 17, 24)}  # 25 of 36, before and after
    made = [
        {
            "fold": fold,
            "lr": 1e-3,
            "epoch": i,
            "plain": found[i] / found[2],
            "calibrated": None,
            "num_questions": found[2],
        }
        for fold, found in right.items()
        for i in (0, 1)
    ]
    assert RTTResult(made).recovery == 0.0


def test_the_report_and_the_attack_have_one_recovery():
    made = report(RTTResult(rows()), 2 / 14)
    assert made.recovery == made.rtt.recovery == made.to_dict()["recovery"] == made.to_dict()["rtt"]["recovery"]
    assert made.recovery == pytest.approx(5 / 14) and "+35.7" in table([made.row()])
    other = report(made.rtt, 0.9)  # of other questions than the folds'
    assert other.recovery == made.recovery and "+35.7" in table([other.row()])


def test_where_a_number_is_not_known_each_fold_counts_once():
    result = RTTResult(rows(known=("a",)))
    assert result.curve(1e-3) == pytest.approx([(r / 12 + s / 2) / 2 for r, s in zip(*RIGHT.values())])
    assert result.best == (1e-3, 1) and result.standard_error is None
    newer = [{**row, "attack": "int8", "lr": 0.0} for row in rows() if row["epoch"] < 2]
    assert RTTResult(rows(known=()) + newer).curve(1e-3)[2] == pytest.approx(6 / 14), "by the newer rows"


def test_one_question_of_a_fold_has_no_spread():
    made = rows()
    for row in made:
        if row["fold"] == "b":
            row |= {"num_questions": 1, "plain": float(row["plain"] > 0.5), "smooth_error": None}
    assert RTTResult(made).standard_error is None and "±" not in attack_table(RTTResult(made))


def test_folds_of_one_size_count_alike_to_the_bit():
    values = {"a": [0.1, 1 / 3], "b": [0.2, 2 / 7], "c": [0.7, 0.3]}
    made = [
        {"fold": fold, "lr": 1e-3, "epoch": epoch, "plain": value, "calibrated": None, "num_questions": 75}
        for fold, curve in values.items()
        for epoch, value in enumerate(curve)
    ]
    assert RTTResult(made).curve(1e-3) == [sum(column) / 3 for column in zip(*values.values())]


def test_a_fold_of_two_sizes_is_refused():
    made = rows()
    made[1]["num_questions"] = 11
    with pytest.raises(ValueError, match="fold 'a' have 12 questions and 11: expected the same"):
        RTTResult(made)
