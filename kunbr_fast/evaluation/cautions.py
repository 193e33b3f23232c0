"""What the figures of a report cannot show, one line each: questions that cannot tell the original from guessing, or
one model from another. At most one line for each set and comparison, and none where all is well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.significance import Z, above_chance, differing_share, questions_needed

SEEN = 0.02  # nobody reads a smaller difference as one
HIDDEN = {"forget": "forgetting", "retain": "damage"}

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by model and set


def of_run(accuracy: Found, probability: Found, rtt: RTTResult | None) -> list[str]:
    """Of a `Report`'s figures."""
    found = []
    for what, hidden in HIDDEN.items():
        first, last = (accuracy.get(model, {}).get(what) for model in ("original", "result"))
        if first is not None and (line := _at_chance(first, what, hidden)):
            found.append(line)
        elif first is not None and last is not None:
            found += _unmoved(f"{what} accuracy", first["plain"], last["plain"]) if what == "forget" else []
            number, change = first["num_questions"], last["plain"] - first["plain"]
            how = number, differing_share(change, last.get("change_error"), number)
            found += _few(f"{what} questions", first["plain"], last["plain"], *how)
        first, last = (probability.get(model, {}).get(what) for model in ("original", "result"))
        if first is not None and last is not None:
            known = what == "forget" and first["mean"] >= SEEN
            found += _unmoved("the probability of the forget answers", first["mean"], last["mean"]) if known else []
            how = first["num_records"], last["change_error"]
            found += _few_records(f"{what} records", first["mean"], last["mean"], *how)
    return found if rtt is None else [*found, *of_attack(rtt), *_others(accuracy, probability, rtt)]


def of_attack(rtt: RTTResult) -> list[str]:
    """Of what came back."""
    number, models = rtt.num_questions, ("before the attack", "after")
    if number is None:
        return []
    if rtt.metric == "probability":
        return _few_records("records of the folds", rtt.before, rtt.accuracy, number, rtt.change_error, models)
    return _few("questions of the folds", rtt.before, rtt.accuracy, number, rtt.differing, models)


def _at_chance(found: Mapping[str, Any], what: str, hidden: str) -> str | None:
    number, chance = found["num_questions"], found.get("chance")
    if chance is None or above_chance(round(found["plain"] * number), number, chance):
        return None
    right = f"{_percent(found['plain'])} right, by guessing {_percent(chance)}"
    asked = _counted(number, f"{what} questions")
    return f"{asked} cannot tell the original from guessing ({right}): {hidden} cannot be seen"


def _unmoved(figure: str, first: float, last: float) -> list[str]:
    if abs(last - first) >= SEEN:
        return []
    both = f"{_percent(first)} (original), {_percent(last)} (result)"
    return [f"{figure} is what it was, {both}: nothing is forgotten; the learning rates may be too low for this model"]


def _few(
    what: str,
    first: float,
    last: float,
    number: int,
    differing: float | None,
    models: tuple[str, str] = ("original", "result"),
) -> list[str]:
    """differing: as of `questions_needed`; None where it is not known."""
    if abs(difference := last - first) < SEEN:
        return []
    mean = (first + last) / 2
    needed = questions_needed(difference, 2 * mean * (1 - mean) if differing is None else differing)
    return [_cannot(what, first, last, number, f"{needed}", models)] if number < needed else []


def _few_records(
    what: str,
    first: float,
    last: float,
    number: int,
    error: float | None,
    models: tuple[str, str] = ("original", "result"),
) -> list[str]:
    if abs(difference := last - first) < SEEN:
        return []
    if error is None:
        return [_cannot(what, first, last, number, "many more", models)]
    needed = max(math.ceil(number * (Z * error / difference) ** 2), number + 1)
    told = abs(difference) >= Z * error
    return [] if told else [_cannot(what, first, last, number, f"{needed}", models)]


def _cannot(what: str, first: float, last: float, number: int, needed: str, models: tuple[str, str]) -> str:
    both = f"{_percent(first)} ({models[0]}) from {_percent(last)} ({models[1]})"
    return f"{_counted(number, what)} cannot tell {both}: {'about ' * needed.isdecimal()}{needed} would be needed"


def _others(accuracy: Found, probability: Found, rtt: RTTResult) -> list[str]:
    """Where forget accuracy is of other questions than recovery."""
    by_metric = {"accuracy": (accuracy, "plain", "num_questions"), "probability": (probability, "mean", "num_records")}
    of, value, number = by_metric[rtt.metric]
    found = of.get("result", {}).get("forget")
    if found is None or rtt.num_questions is None:
        return []
    if found[number] == rtt.num_questions and abs(found[value] - rtt.before) < SEEN:
        return []
    what = number.removeprefix("num_")
    return [
        f"recovery is of the folds' {rtt.num_questions} {what} ({_percent(rtt.before)} before the attack), forget of "
        f"{found[number]} ({_percent(found[value])}): they are not the same"
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what.removesuffix('s') if number == 1 else what}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
