"""What the figures cannot show is said, and nothing where all is well."""

import math
import random

import pytest
from test_curves import report, rows

from kunbr_fast.evaluation.cautions import of_attack, of_run
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.significance import (
    Z,
    above_chance,
    change_error,
    differing_share,
    questions_needed,
    standard_error,
)


def answered(right, number, before=None, **more):
    """The figures of so many right answers of questions, in that order. before: right answers of the original."""
    found = {"plain": right / number, "calibrated": None, "num_questions": number, "chance": 0.25, **more}
    if before is not None:
        values = [[int(i < count) for i in range(number)] for count in (before, right)]
        found["change_error"] = change_error(*values)
    return found


def attacked(before, after, number, **more):
    made = [
        {"fold": fold, "lr": 1e-3, "epoch": epoch, "plain": right / number, "calibrated": None, **more}
        | {"num_questions": number}
        for fold in "ab"
        for epoch, right in enumerate((before, after))
    ]
    return RTTResult(made)


def test_nothing_is_said_where_all_is_well():
    accuracy = {
        "original": {"forget": answered(150, 150), "retain": answered(300, 300)},
        "unlearned": {"forget": answered(60, 150, 150), "retain": answered(280, 300, 300)},
        "result": {"forget": answered(40, 150, 150), "retain": answered(297, 300, 300)},
    }
    assert of_run(accuracy, {}, attacked(20, 45, 75)) == []
    assert of_run({}, {}, None) == []


def test_a_run_that_forgets_nothing_is_told():
    of = {name: {"forget": answered(right, 150, 130), "retain": answered(150, 150, 150)} for name, right in
          (("original", 130), ("result", 128))}  # fmt: skip
    (line,) = of_run(of, {}, None)
    assert line == (
        "forget accuracy is what it was, 86.7 % (original), 85.3 % (result): nothing is forgotten; the learning rates "
        "may be too low for this model"
    )
    of = {name: {"forget": {"mean": mean, "num_records": 9, "change_error": 0.001}} for name, mean in
          (("original", 0.6), ("result", 0.59))}  # fmt: skip
    (line,) = of_run({}, of, None)
    assert line.startswith("the probability of the forget answers is what it was, 60.0 % (original), 59.0 % (result)")
    of["original"]["forget"]["mean"] = of["result"]["forget"]["mean"] = 0.001  # never known
    assert of_run({}, of, None) == []


def test_an_original_at_chance_is_one_line_a_set():
    accuracy = {
        "original": {"forget": answered(5, 12), "retain": answered(8, 12)},
        "result": {"forget": answered(1, 12, 5), "retain": answered(8, 12, 8)},
    }
    (line,) = of_run(accuracy, {}, None)
    assert line == (
        "12 forget questions cannot tell the original from guessing (41.7 % right, by guessing 25.0 %): forgetting "
        "cannot be seen"
    )
    del accuracy["original"]["forget"]["chance"]  # of an earlier version
    assert "12 forget questions cannot tell 41.7 % (original) from 8.3 %" in of_run(accuracy, {}, None)[0]


@pytest.mark.parametrize("right, of, chance, above", [(6, 12, 0.25, False), (7, 12, 0.25, True), (0, 3, 0.5, False)])
def test_chance_is_the_exact_binomial_test(right, of, chance, above):
    generator = random.Random(0)
    as_many = [sum(generator.random() < chance for _ in range(of)) >= right for _ in range(40_000)]
    assert above_chance(right, of, chance) == (sum(as_many) / len(as_many) <= 0.05) == above


def test_eight_questions_cannot_tell_two():
    accuracy = {"original": {"forget": answered(5, 8)}, "result": {"forget": answered(3, 8, 5)}}
    (line,) = of_run(accuracy, {}, None)
    expected = "8 forget questions cannot tell 62.5 % (original) from 37.5 % (result): about 23 would be needed"
    assert line == expected
    many = {"original": {"forget": answered(15, 24)}, "result": {"forget": answered(9, 24, 15)}}
    assert of_run(many, {}, None) == [], "24 of which 6 were lost and none found"
    del many["result"]["forget"]["change_error"]  # other questions, or an earlier version's: they tell less
    assert "24 forget questions cannot tell 62.5 % (original) from 37.5 %" in of_run(many, {}, None)[0]


def test_what_is_needed_is_mcnemars_test():
    """The exact one: of so many that differ all in one direction, two-sided at 5 %, six are needed."""
    assert 2 * 0.5**6 <= 0.05 < 2 * 0.5**5
    assert [questions_needed(n / 100, n / 100) <= 100 for n in (5, 6)] == [False, True]
    assert questions_needed(0.5, 0.5) < questions_needed(0.5, 0.75) < questions_needed(0.25, 0.75)
    assert questions_needed(-0.5, 0.5) == questions_needed(0.5, 0.5)
    assert questions_needed(1.0, 0.5) == questions_needed(1.0, 1.0) == 6, "as many differ at least"
    assert differing_share(1.0, None, 1) == 1.0 and differing_share(0.5, None, 2) is None
    before, after = [0, 0, 1, 1, 1], [1, 1, 1, 0, 1]
    assert differing_share(0.2, change_error(before, after), 5) == pytest.approx(3 / 5)


def test_what_came_back_is_told_by_enough_questions():
    (line,) = of_attack(attacked(2, 4, 10))
    assert line.startswith(
        "20 questions of the folds cannot tell 20.0 % (before the attack) from 40.0 % (after): about"
    )
    assert of_attack(attacked(2, 9, 10)) == [] and of_attack(attacked(2, 2, 10)) == []
    same = {right: change_error([1] * 2 + [0] * 8, [1] * right + [0] * (10 - right)) for right in (4, 5)}
    assert of_attack(attacked(2, 5, 10)) and of_attack(attacked(2, 4, 10, change_error=same[4]))
    assert of_attack(attacked(2, 5, 10, change_error=same[5])) == [], "six of twenty came back, none was lost"
    unlike = [
        {"fold": fold, "lr": 1e-3, "epoch": epoch, "plain": plain, "calibrated": None, "num_questions": number}
        | {"change_error": 0.0 if number > 1 else None}
        for fold, number, last in (("a", 3, 1.0), ("b", 2, 0.0), ("c", 1, 0.0))
        for epoch, plain in enumerate((0.0, last))
    ]
    assert RTTResult(unlike).differing == 0.5, "three of six, none of which was lost"
    assert of_attack(RTTResult(unlike))[0].endswith(f"about {questions_needed(0.5, 0.5)} would be needed")
    (line,) = report(RTTResult(rows()), 2 / 14).cautions
    assert line.startswith("14 questions of the folds cannot tell 14.3 % (before the attack) from 50.0 % (after)")
    assert of_attack(RTTResult(rows(known=()))) == [], "an earlier version's, of no known number"


def test_forget_questions_that_are_not_the_folds_are_said():
    accuracy = {"result": {"forget": answered(60, 100)}}
    (line,) = of_run(accuracy, {}, attacked(20, 45, 75))
    assert line == (
        "recovery is of the folds' 150 questions (26.7 % before the attack), forget of 100 (60.0 %): they are not the "
        "same"
    )


def test_answer_probabilities():
    def found(mean, number, error=None):
        return {"mean": mean, "standard_error": 0.01, "num_records": number, "change_error": error}

    def run(*last):
        return of_run({}, {"original": {"forget": found(0.9, last[1])}, "result": {"forget": found(*last)}}, None)

    assert run(0.5, 100, 0.1) == [] and run(0.87, 100, 0.001) == []
    assert run(0.5, 10, 0.25) == [
        "10 forget records cannot tell 90.0 % (original) from 50.0 % (result): about 16 would be needed"
    ]
    assert run(0.5, 1)[0].startswith("1 forget record cannot tell")
    assert run(0.5, 1)[0].endswith("from 50.0 % (result): many more would be needed")
    made = attacked(2, 6, 10, metric="probability", error=0.1, change_error=0.4)
    assert "20 records of the folds cannot tell 20.0 % (before" in of_attack(made)[0]


def test_errors():
    values = [0.5, 0.25, 1.0, 0.0]
    spread = (sum((v - 0.4375) ** 2 for v in values) / 3) ** 0.5
    assert standard_error(values) == pytest.approx(spread / 2) and standard_error([0.5]) is None
    assert change_error(values, [v + 0.1 for v in values]) == pytest.approx(0, abs=1e-12)
    assert (1 + math.erf(Z / 2**0.5)) / 2 == pytest.approx(0.975, abs=1e-12)
