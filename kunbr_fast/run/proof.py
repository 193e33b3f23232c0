"""What is measured of the original, the unlearned model and the result: accuracy on questions, and of a set without any
the probability of its records' answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.data import is_question, is_record
from kunbr_fast.evaluation.accuracy import Accuracy, Questions, measure_all, prepare_questions
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.examples import Examples, answers_at
from kunbr_fast.evaluation.probability import MOST, Answers, Probability, answer_probabilities, prepare_answers
from kunbr_fast.evaluation.significance import chance_of, change_error
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunInputs
from kunbr_fast.run.visits import Stage

Found = dict[str, dict[str, dict[str, Any]]]  # by "accuracy" and "probability", and set


class Proof:
    """Measures models in the same way: all that they are asked is tokenised once, for the decoder of the first."""

    def __init__(self, inputs: RunInputs, config: KUnBRConfig, decoder: Decoder):
        self.tokenizer, self.config, self.decoder, self.folds = inputs.tokenizer, config, decoder, inputs.folds
        self.asked = {what: part for what, part in inputs.questions.items() if part}
        self.records = {"forget": without_questions(inputs.forget), "retain": without_questions(inputs.retain)}
        told = self.tokenizer is not None
        self.records = {what: part for what, part in self.records.items() if part and told and what not in self.asked}

    @functools.cached_property
    def examples(self) -> Examples:
        """Of the forget set's questions, or where it has none of its records."""
        return Examples.of(self.asked.get("forget") or self.records.get("forget", ()), self.folds)

    def __bool__(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.asked or self.records)

    @functools.cached_property
    def _questions(self) -> dict[str, Questions]:
        how = dict(scoring=self.config.scoring, decoder=self.decoder)
        return {what: prepare_questions(self.tokenizer, part, **how) for what, part in self.asked.items()}

    @functools.cached_property
    def _answers(self) -> dict[str, Answers]:
        how = dict(text=self.config.text(), max_length=self.config.max_length, decoder=self.decoder)
        records = self.records.items()
        return {what: prepare_answers(self.tokenizer, part, **how, most=MOST.get(what)) for what, part in records}

    def says(self, name: str) -> list[str]:
        """What is measured of the model `name`, a line for each metric."""
        lines = []
        if self.asked:
            counts = " and ".join(f"{len(part)} {what}" for what, part in self.asked.items())
            lines.append(f"accuracy of the {name} model on {counts} questions")
        if self.records:
            counts = " and ".join(f"{answers.num_records} {what}" for what, answers in self._answers.items())
            lines.append(f"answer probability of the {name} model on {counts} records")
        return lines

    def measure(
        self, decoder: Decoder, original: Mapping[str, Any] | None, place: Place, progress: str | None
    ) -> Found:
        """Of the decoder's model, as the state keeps it. original: what was found of the original; None: this is it."""
        accuracy = measure_all(decoder, self._questions, place=place, progress=progress)
        how = dict(impl=self.config.impl, place=place, progress=progress)
        probability = answer_probabilities(decoder, self._answers, **how)
        found = {"accuracy": {what: self._of_questions(what, each) for what, each in accuracy.items()}}
        if probability:
            found["probability"] = {what: _of_records(each) for what, each in probability.items()}
        for kind, each in (("accuracy", accuracy), ("probability", probability)):
            for what, now in each.items():
                if what == "forget":
                    found[kind][what]["answers"] = answers_at(now, self.examples.places)
                if original is None:
                    found[kind][what]["values"] = " ".join(f"{value:.6g}" for value in now.values)
                else:
                    before = original.get(kind, {}).get(what, {}).get("values")
                    found[kind][what]["change_error"] = _change(before, now.values)
        return found

    def shown(
        self, results: Mapping[Stage, Mapping[str, Any]], rtt: RTTResult | None, where: str
    ) -> list[dict[str, str | None]]:
        """The examples of a run with these results. where: as of `Examples.shown`."""
        before, after = (_answers(results.get(Stage.evaluation(name))) for name in ("original", "result"))
        return self.examples.shown(before, after, (rtt.answers or None) if rtt is not None else None, where)

    def _of_questions(self, what: str, found: Accuracy) -> dict[str, Any]:
        names = "plain calibrated num_questions smooth smooth_error".split()
        return {**{name: getattr(found, name) for name in names}, "chance": chance_of(self.asked[what])}


def _of_records(found: Probability) -> dict[str, Any]:
    return {"mean": found.mean, "standard_error": found.standard_error, "num_records": len(found.values)}


def _change(before: str | None, now: Sequence[float]) -> float | None:
    """The standard error of the change; None where an earlier version has not kept what was before."""
    return None if before is None else change_error([float(value) for value in before.split()], now)


def without_questions(data: Sequence[Mapping]) -> list[Mapping]:
    """The records whose answer's probability can be measured: none of samples and batches."""
    return [record for record in data if is_record(record) and not is_question(record)]


def reported(found: Mapping[str, Any] | None, kind: str) -> dict[str, Any]:
    """What the report has of a stage's result, without the single answers."""
    of_sets = (found or {}).get(kind, {})
    return {what: {k: v for k, v in each.items() if k not in ("values", "answers")} for what, each in of_sets.items()}


def _answers(found: Mapping[str, Any] | None) -> list[int | float] | None:
    """A stage's answers to the examples (`Proof.examples`); None where an earlier version has not kept them."""
    of_kinds = ((found or {}).get(kind, {}).get("forget", {}) for kind in ("accuracy", "probability"))
    return next((each["answers"] for each in of_kinds if "answers" in each), None)
