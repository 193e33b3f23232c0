"""Which measures there are, and which of them a suite, or a list of names, asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence

from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import nearest
from kunbr_fast.measures import depth, knowledge, memorisation, privacy, utility
from kunbr_fast.measures.registry import MEASURES, SUITES, Measure

MODULES = (knowledge, memorisation, privacy, utility, depth)  # which have registered theirs
GIVEN = {
    "original": "the model before unlearning (original=, --original DIR)",
    "retrained": "a model trained without the forget set (retrained=, --retrained DIR)",
    "holdout": "records that no model was trained on (holdout=, --holdout H.jsonl)",
    "retain": "a retain set (retain=, --retain R.jsonl)",
    "attack": "an attack (attack=, --attack), or the report of a run that made one",
    "generation": "a model in memory, which generates text (leave out stream=, --stream)",
}


def chosen(suite: str, names: Sequence[str] = (), attack: bool = False) -> list[Measure]:
    """The measures of a suite, or those that are named; attack: and those of one. ValueError for others."""
    if suite not in SUITES:
        raise ValueError(f"suite={shown(suite)}{nearest(suite, SUITES)}")
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"measure {shown(name)}{nearest(name, MEASURES)}")
    wanted = names or [one.name for one in MEASURES.values() if suite in one.suites or suite == "all"]
    more = [one.name for one in MEASURES.values() if "attack" in one.needs] if attack else []
    return [MEASURES[name] for name in dict.fromkeys([*wanted, *more])]


def lacking(measure: Measure, given: Collection[str]) -> str | None:
    """What a measure needs that was not given, else None. given: names of sets and of `GIVEN`."""
    needs = [need for need in measure.needs if need in GIVEN and need not in given]
    if not needs and not set(measure.sets) & set(given):
        needs = [name for name in measure.sets if name in GIVEN][:1]
    return f"needs {' and '.join(GIVEN[need] for need in needs)}" if needs else None


def check_packages(measures: Sequence[Measure], lm_eval: bool = False) -> None:
    """ValueError where a package is missing that one of them, or lm-evaluation-harness, needs: before anything is
    computed."""
    if lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-evaluation-harness: pip install 'kunbr-fast[lm-eval]'")
    if any("generation" in one.needs for one in measures):
        from kunbr_fast.measures.texts import rouge

        rouge("a", "a")
    if any(one.name == "forget_quality" for one in measures):
        utility.kolmogorov_smirnov()
