"""Methods by name: what each sets, before any other setting (`--method`, `method:` in run.yaml)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import meant
from kunbr_fast.objectives.methods import OBJECTIVES, Objective


@dataclasses.dataclass(frozen=True)
class Method:
    """text: what it is and where it was measured, a line. settings: of KUnBRConfig. No learning rate is among them:
    these depend on the model."""

    text: str
    settings: Mapping[str, Any]


_PLAIN = {"objective": "gradient_difference", "retain_loss": "nll", "adversary_every": 0}
_ROBUST = {
    "objective": "gradient_difference",
    "forget_loss_cap": 5.0,
    "retain_loss": "hidden_layers",
    "retain_layers": "upper",
    "hidden_coeff": 2.5,
    "adversary_every": 9,
    "warmup_optimizer": "lion",
    "rtt_attacks": ("all",),
}
_MEASURED = "measured on small models alone (docs/evidence.md)"
NAMED = {
    "kunbr": Method(
        "KUnBR as published (arXiv 2511.11667): warm-up, then re-insertion of the densest blocks, each by itself",
        {**_PLAIN, "num_blocks": 8, "top_k": 6, "insertion": "independent", "optimizer": "lion"},
    ),
    "robust": Method(
        "the forget loss under a relearning adversary, hidden states of the retain set kept, all parameters; "
        + _MEASURED,
        {**_ROBUST, "top_k": 0},
    ),
    "robust_blocks": Method(
        f"robust as a warm-up, then re-insertion of half of the layers under an adversary of the block; {_MEASURED}",
        {**_ROBUST, "num_blocks": 2, "top_k": 1, "block_hidden_coeff": 0.5, "optimizer": "lion"},
    ),
}


def called(objective: Objective) -> str:
    """An objective's name and source, with which its function's docstring begins."""
    doc = " ".join((inspect.getdoc(objective.function) or objective.name).split())
    sources = re.findall(r"arXiv \d{4}\.\d{5}", doc)
    return ", ".join([doc.partition(":")[0].replace("`", ""), *sources[:1]])


def _alone(objective: Objective) -> Method:
    text = f"{called(objective)}, on all parameters"
    return Method(text, {**_PLAIN, "objective": objective.name, "warmup_optimizer": "lion", "top_k": 0})


def methods() -> dict[str, Method]:
    """All methods: those above, and each objective alone, your own ones too."""
    return NAMED | {name: _alone(objective) for name, objective in OBJECTIVES.items()}


def settings_of(name: Any, beside: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What the method sets, for a run with the settings `beside`. ValueError for one that does not exist."""
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"method={shown(name)}{meant(name, known) or ':'} expected one of {', '.join(known)}")
    found = dict(known[name].settings)
    if beside.get("rule", "top_k") != "top_k" and found.get("top_k"):
        del found["top_k"]  # which that rule does not take
    return found
