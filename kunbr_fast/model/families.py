"""The architectures of transformers whose layers can be fused, and how they differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers: classes named `prefix`RMSNorm, MLP, Attention, DecoderLayer.

    cast, offset, eps: the norm's convention, see `rms_norm`, and the name of its epsilon. qk_norm: None, "head" (over
    each head) or "all" (over all heads at once). window, softcap: where the attention function's arguments of those
    names come from, "module.attribute" or "config.attribute"; None: it gets none. packed: q/k/v and gate/up are one
    projection each. act: the name of the MLP's activation. sums_into: the norm that follows the residual sum after
    attention, if any. after: the modules that the outputs of attention and MLP go through before they are added.
    """

    prefix: str
    cast: str = "llama"
    offset: float = 0.0
    eps: str = "variance_epsilon"
    qk_norm: str | None = None
    window: str | None = None
    softcap: str | None = None
    packed: bool = False
    act: str = "act_fn"
    sums_into: str | None = "post_attention_layernorm"
    after: tuple[str, str] | None = None


GEMMA: dict[str, Any] = dict(
    cast="gemma", offset=1.0, eps="eps", window="module.sliding_window", sums_into="pre_feedforward_layernorm",
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)  # fmt: skip
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="config.sliding_window"),
    "qwen2": Family("Qwen2", window="module.sliding_window"),
    "qwen3": Family("Qwen3", window="module.sliding_window", qk_norm="head"),
    "smollm3": Family("SmolLM3", window="module.sliding_window"),
    "phi3": Family(
        "Phi3",
        window="config.sliding_window",
        packed=True,
        act="activation_fn",
        after=("resid_attn_dropout", "resid_mlp_dropout"),
    ),  # fmt: skip
    "olmo2": Family("Olmo2", cast="gemma", qk_norm="all", sums_into=None),
    "gemma2": Family("Gemma2", **GEMMA, softcap="module.attn_logit_softcapping"),
    "gemma3": Family("Gemma3", **GEMMA, qk_norm="head"),
}


def identify(module: nn.Module) -> tuple[str | None, str]:
    """("llama", "MLP") for a LlamaMLP; (None, "") for a subclass of it that is defined elsewhere, and others."""
    kind = type(module)
    for name, family in FAMILIES.items():
        if kind.__module__ == f"transformers.models.{name}.modeling_{name}" and kind.__name__.startswith(family.prefix):
            return name, kind.__name__.removeprefix(family.prefix)
    return None, ""
