"""How long the samples of a run are: of its files and tokenizer, or assumed as WMDP has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

from kunbr_fast.data import IGNORE, encode, is_question, load_records
from kunbr_fast.data.content import check_files
from kunbr_fast.data.overlap import facts, of_folds, of_sides, settle
from kunbr_fast.evaluation.probability import MOST, spread
from kunbr_fast.run.config import KUnBRConfig


@dataclasses.dataclass
class Data:
    """The sizes of a run's samples, each as (tokens, rows with a label).

    folds: the attack's folds, each with its samples as the attack trains them. questions: tokens of each prompt whose
    accuracy is measured. answers: the records of sets without questions, whose answers' probability is; by_answers:
    whether that is what the attack measures. assumed: what was not known, in words.
    """

    forget: list[tuple[int, int]]
    retain: list[tuple[int, int]]
    folds: list[list[tuple[int, int]]]
    questions: list[int]
    assumed: list[str] = dataclasses.field(default_factory=list)
    answers: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    by_answers: bool = False

    @classmethod
    def load(
        cls,
        forget: Sequence[str] | None,
        retain: Sequence[str] | None,
        tokenizer: Any,
        config: KUnBRConfig,
        read: Callable[[str, str], list[dict]] | None = None,
    ) -> Data:
        """Of the files of `kunbr-fast unlearn`; lengths by the tokenizer, or WMDP's where there is none."""
        if bool(forget) != bool(retain):
            raise ValueError("forget= and retain= go together: give both, or none for assumed lengths")
        check_files({"--forget": forget}, {"--retain": retain})
        found, assumed = {}, []
        read = read or (lambda path, option: load_records(path, equal_choices=config.equal_choices))
        for what, paths in (("forget", forget), ("retain", retain)):
            found[what] = [read(path, f"--{what}") for path in paths] if paths else [[None] * 157] * 5
        every = {what: [r for part in parts for r in part] for what, parts in found.items()}
        if forget:  # what the run would refuse
            settle(of_folds(zip(forget, found["forget"]), config.rtt), config.overlap)
            settle(of_sides(*(facts({"": records}) for records in every.values())), config.overlap)
        else:
            assumed.append("785 forget and 785 retain samples, all of them questions, in 5 folds (as WMDP has them)")
        if not forget or tokenizer is None:
            why = ": there is no tokenizer" if forget else ""
            assumed.append(f"lengths of WMDP's questions: mean 77, at most 224 tokens{why}")

        def sizes(records: list, target: str) -> list[tuple[int, int]]:
            if not forget or tokenizer is None:
                return [(n, 1 if target == "letter" else n - 1) for n in assumed_lengths(len(records))]
            samples = encode(records, tokenizer, target, config.max_length, text=config.text())
            return [(len(s["input_ids"]), int((s["labels"][1:] != IGNORE).sum())) for s in samples]

        asked = {what: [r for r in records if r is None or is_question(r)] for what, records in every.items()}
        answers = []
        for what in ("forget", "retain"):
            if asked[what]:
                continue
            some = spread(every[what], MOST.get(what))
            for is_text, target in ((True, "all"), (False, "answer")):
                if part := [record for record in some if ("text" in record) == is_text]:
                    answers += sizes(part, target)
        folds = found["forget"] if len(found["forget"]) > 1 and config.rtt else []
        prompts = [*asked["forget"], *asked["retain"]]
        return cls(
            sizes(every["forget"], config.target),
            sizes(every["retain"], config.target),
            [sizes(part, config.rtt_target) for part in folds],
            [tokens for tokens, _ in sizes(prompts, "all")] if prompts else [],
            assumed,
            answers,
            not asked["forget"],
        )


def assumed_lengths(count: int) -> list[int]:
    """Log-normal with a mean of 77, from 20 to 224; not sorted."""
    normal = NormalDist()
    places = sorted(range(count), key=lambda i: i * 0.6180339887498949 % 1.0)
    return [round(min(224, max(20, 68 * math.exp(0.5 * normal.inv_cdf((i + 0.5) / count))))) for i in places]
