"""What a setting of a run is: its help, the stage whose result it changes, what its value may be, and what became of
earlier versions' settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kunbr_fast.evaluation.attacks import ATTACKS, chosen_attacks
from kunbr_fast.evaluation.lora import chosen_targets
from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import nearest
from kunbr_fast.objectives.hidden_layers import WORDS
from kunbr_fast.run.log import chosen_logs
from kunbr_fast.values import (
    ABOVE_ZERO,
    BATCH,
    COUNT,
    COUNT_OR_NONE,
    EPOCHS,
    EPOCHS_OR_NONE,
    LAYERS,
    NOT_NEGATIVE,
    SEED,
    SHARE,
    Whole,
    check,
)

RATES = ("adversary_lrs", "rtt_lrs")
ADVERSARY = ("adversary_every", "adversary_steps", "adversary_lrs", "adversary_frozen")  # of warm-up and blocks
VISITS = 999  # a seed has so many data orders for blocks (`RunSteps.schedule_of`)
# What a number may be: of the settings that are numbers.
NUMBERS = {
    "seed": SEED,
    **dict.fromkeys("batch_size retain_batch_size rtt_batch_size".split(), BATCH),
    **dict.fromkeys("max_length micro_batch_tokens checkpoint_every rtt_lora_rank".split(), COUNT),
    **dict.fromkeys("block_epochs rtt_epochs".split(), EPOCHS),
    "warmup_epochs": EPOCHS_OR_NONE,
    "num_blocks": LAYERS,
    **dict.fromkeys("top_k skip_last_layers resident_layers".split(), Whole(0, LAYERS.most)),
    "rounds": Whole(1, VISITS),
    **dict.fromkeys("warmup_lr block_lr weight_decay retain_coeff".split(), NOT_NEGATIVE),
    "threshold": NOT_NEGATIVE,
    **dict.fromkeys("forget_loss_cap max_retain_loss hidden_coeff block_hidden_coeff".split(), ABOVE_ZERO),
    "mask_ratio": SHARE,
    "retain_layers": Whole(0, LAYERS.most),
    **dict.fromkeys(RATES, ABOVE_ZERO),
    "adversary_every": COUNT_OR_NONE,
    "adversary_steps": COUNT,
}


def chosen_layers(value: Any, name: str) -> str | tuple[int, ...]:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(listed) == 1 and listed[0] in WORDS:
        return listed[0]
    if not listed or len(set(map(str, listed))) < len(listed):
        raise ValueError(f"{name}={shown(value)}: expected {', '.join(WORDS)}, or different numbers of layers")
    return tuple(check(f"{name} entry", layer, NUMBERS[name]) for layer in listed)


OF_SOME_ATTACKS = ("rtt_lora_rank", "rtt_lora_targets", "rtt_master_weights")


def counts_for(attack: str, name: str) -> bool:
    """Whether a kind of attack depends on a setting of attacks."""
    kind = ATTACKS[attack]
    return name not in OF_SOME_ATTACKS or (kind.adapters if "lora" in name else kind.trains_all)


# What is one word or several: of the settings that are, a function of value and name.
CHOSEN = {
    "rtt_attacks": chosen_attacks,
    "rtt_lora_targets": chosen_targets,
    "retain_layers": chosen_layers,
    "log_to": chosen_logs,
}
# Settings, and values of them, that earlier versions had: what stands for them now.
OLD_SETTINGS = {
    "activations": "cache also says where a streamed model's activations wait; leave it out",
    "cover_precision=fp8_matmul": "its gradients were too far from the exact ones (cosine 0.949): take fp8",
    "master_weights=True": "expected fp32, none or stochastic: take fp32, which it was",
    "master_weights=False": "expected fp32, none or stochastic: take none, which it was",
}
# What other names are taken for settings: those of `baseline`'s options, and options that are none.
_STAND_FOR = {
    "lr": "take warmup_lr (of all parameters), or block_lr",
    "epochs": "take warmup_epochs (of all parameters), or block_epochs",
} | {
    name: f"--{name.replace('_', '-')} is an option of the command line, no setting: leave the line out"
    for name in ("model", "forget", "retain", "out", "preset", "forget_columns", "retain_columns", "ignore_keys")
}


def setting(default: Any, text: str, stage: str, choices: Sequence[str] = ()) -> Any:
    """A field with its help text, the stage whose result it changes, and the values that it may have (none: any)."""
    kind = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": text, "stage": stage, "choices": choices})


def unknown(name: Any, known: Sequence[str]) -> str:
    """An unknown setting's name, and which one it may stand for."""
    return f"{shown(name)}: {_STAND_FOR[name]}" if name in _STAND_FOR else f"{shown(name)}{nearest(name, known)}"


def refuse_old(name: str, where: str = "") -> None:
    if name in OLD_SETTINGS:
        raise ValueError(f"{where}{name} is no longer a setting: {OLD_SETTINGS[name]}")
