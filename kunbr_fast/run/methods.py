"""Methods by name: what each sets, before any other setting (`--method`, `method:` in run.yaml)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import nearest


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
METHODS = {
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
        f"the same, then re-insertion of half of the layers under an adversary of the block; {_MEASURED}",
        {**_ROBUST, "num_blocks": 2, "top_k": 1, "block_hidden_coeff": 0.5, "optimizer": "lion"},
    ),
    "gradient_difference": Method(
        "gradient difference on all parameters, without blocks: the baseline to compare with",
        {**_PLAIN, "warmup_optimizer": "lion", "top_k": 0},
    ),
}


def settings_of(name: Any) -> dict[str, Any]:
    """What the method sets. ValueError for one that does not exist."""
    if not isinstance(name, str) or name not in METHODS:
        near = nearest(name, METHODS) if isinstance(name, str) else ""
        raise ValueError(f"method={shown(name)}{near}: expected one of {', '.join(METHODS)}")
    return dict(METHODS[name].settings)
