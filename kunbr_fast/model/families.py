"""The architectures of transformers whose layers can be fused, and how they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

ROLES = ("RMSNorm", "LayerNorm", "MLP", "Attention", "DecoderLayer")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers: classes named `prefix`, perhaps Text, and one of ROLES.

    A class that is built otherwise (no gate, other projections, latent attention) is named in `own` and keeps its own
    forward, as does one whose modules are not the expected ones (`fused_forwards`).

    cast, offset: the norm's convention, see `rms_norm`; "layer" is `layer_norm`, also for each nn.LayerNorm. qk_norm:
    None, "head" (over each head) or "all" (over all heads at once), where a module has q_norm and k_norm. options: what
    the attention function gets beside the usual, from the attention module. rotary: "half", or "own" for a convention
    that is not ours: its file's function. rotates: whether a layer rotates at all. out: attention's output projection.
    norms: before attention, and after the sum that follows it. after: the modules that the outputs of attention and MLP
    go through before they are added. multiplier, scalar: the layer's factors of these outputs, and of its own.
    """

    prefix: str
    own: tuple[str, ...] = ()
    cast: str = "llama"
    offset: float = 0.0
    qk_norm: str | None = None
    options: Mapping[str, Callable[[nn.Module], Any]] = dataclasses.field(default_factory=dict)
    rotary: str = "half"
    rotates: Callable[[nn.Module], bool] | None = None
    out: str = "o_proj"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, str] | None = None
    multiplier: str | None = None
    scalar: str | None = None


def _option(**options: Callable[[nn.Module], Any]) -> dict[str, Any]:
    return {"options": options}


def _window(attention: nn.Module) -> int | None:
    return getattr(attention, "sliding_window", None)


def _sinks(attention: nn.Module) -> Any:
    return attention.sinks


MLP, ATTENTION, LAYER = "MLP", "Attention", "DecoderLayer"
WINDOW = _option(sliding_window=_window)
WINDOW_OF_CONFIG = _option(sliding_window=lambda attention: getattr(attention.config, "sliding_window", None))
SOFTCAP = _option(sliding_window=_window, softcap=lambda attention: getattr(attention, "attn_logit_softcapping", None))
SINKS = _option(sliding_window=_window, s_aux=_sinks)
GEMMA: dict[str, Any] = dict(cast="gemma", offset=1.0)
GEMMA_LAYER: dict[str, Any] = dict(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)
GEMMA4: dict[str, Any] = dict(cast="gemma", **WINDOW, qk_norm="head", **GEMMA_LAYER, scalar="layer_scalar")
DROPOUTS: dict[str, Any] = dict(after=("resid_attn_dropout", "resid_mlp_dropout"))
EXAONE: dict[str, Any] = dict(
    qk_norm="head",
    rotates=lambda attention: attention.sliding_window is None or attention.is_sliding,
    **_option(sliding_window=lambda attention: attention.sliding_window if attention.is_sliding else None),
)
COHERE: dict[str, Any] = dict(cast="layer", qk_norm="head", rotary="own")
FOUR_NORMS: dict[str, Any] = dict(after=("post_self_attn_layernorm", "post_mlp_layernorm"))
LATENT: dict[str, Any] = dict(own=(ATTENTION,))  # multi-head latent attention
NORMS_ONLY: dict[str, Any] = dict(own=(MLP, ATTENTION, LAYER))

FAMILIES = {
    # Llama's structure
    "llama": Family("Llama"),
    "mistral": Family("Mistral", **WINDOW_OF_CONFIG),
    "ministral": Family("Ministral", **WINDOW),
    "ministral3": Family("Ministral3", (ATTENTION,)),  # scales its queries by position
    "qwen2": Family("Qwen2", **WINDOW),
    "qwen3": Family("Qwen3", **WINDOW, qk_norm="head"),
    "smollm3": Family("SmolLM3", **WINDOW, rotates=lambda attention: getattr(attention, "use_rope", True)),
    "phi3": Family("Phi3", **WINDOW_OF_CONFIG, **DROPOUTS),
    "granite": Family("Granite", multiplier="residual_multiplier"),
    "granite_swa": Family("GraniteSWA", **SINKS, multiplier="residual_multiplier"),
    "seed_oss": Family("SeedOss"),
    "ernie4_5": Family("Ernie4_5", rotary="own"),
    "glm": Family("Glm", rotary="own"),
    "glm4": Family("Glm4", rotary="own", **FOUR_NORMS),
    "helium": Family("Helium", cast="gemma", rotary="own"),
    "hyperclovax": Family("HyperCLOVAX", multiplier="residual_multiplier", after=("post_norm1", "post_norm2")),
    "emu3": Family("Emu3", after=("dropout", "dropout")),
    "minicpm3": Family("MiniCPM3", (ATTENTION,), multiplier="residual_scale"),
    "diffllama": Family("DiffLlama", (ATTENTION,)),
    "bitnet": Family("BitNet", (MLP, ATTENTION)),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", (ATTENTION,)),  # norms of q and k after the rotation
    "arcee": Family("Arcee", (MLP,)),
    "apertus": Family("Apertus", (MLP,), qk_norm="head", norms=("attention_layernorm", "feedforward_layernorm")),
    "nemotron": Family("Nemotron", (MLP,)),
    "starcoder2": Family("Starcoder2", (MLP,), cast="layer", **WINDOW_OF_CONFIG),
    "jais2": Family("Jais2", (MLP,), cast="layer"),
    "olmo": Family("Olmo", ("LayerNorm", ATTENTION)),
    # norms after attention and MLP, within the residual branches
    "olmo2": Family("Olmo2", (LAYER,), cast="gemma", qk_norm="all"),
    "olmo3": Family("Olmo3", (LAYER,), cast="gemma", qk_norm="all", **WINDOW),
    "exaone4": Family("Exaone4", (LAYER,), **EXAONE),
    # Gemma's
    "gemma": Family("Gemma", **GEMMA),
    "gemma2": Family("Gemma2", **GEMMA, **GEMMA_LAYER, **SOFTCAP),
    "gemma3": Family("Gemma3", **GEMMA, **GEMMA_LAYER, **WINDOW, qk_norm="head"),
    "gemma4": Family("Gemma4", **GEMMA4),
    "gemma4_unified": Family("Gemma4Unified", **GEMMA4),
    "vaultgemma": Family("VaultGemma", **GEMMA, norms=GEMMA_LAYER["norms"], **SOFTCAP),
    # mixtures of experts: routers and experts are their own
    "mixtral": Family("Mixtral", **WINDOW_OF_CONFIG),
    "qwen2_moe": Family("Qwen2Moe"),
    "qwen3_moe": Family("Qwen3Moe", **WINDOW, qk_norm="head"),
    "gpt_oss": Family("GptOss", (MLP,), cast="gemma", rotary="own", **SINKS),
    "olmoe": Family("Olmoe", (ATTENTION,)),
    "flex_olmo": Family("FlexOlmo", (LAYER,), cast="gemma", qk_norm="all"),
    "deepseek_v2": Family("DeepseekV2", **LATENT),
    "deepseek_v3": Family("DeepseekV3", **LATENT),
    "glm4_moe": Family("Glm4Moe", qk_norm="head"),
    "glm4_moe_lite": Family("Glm4MoeLite", **LATENT),
    "youtu": Family("Youtu", **LATENT),
    "axk1": Family("AXK1", **LATENT),
    "dots1": Family("Dots1", **WINDOW, qk_norm="head"),
    "mellum": Family("Mellum", **WINDOW, qk_norm="head"),
    "exaone_moe": Family("ExaoneMoe", **EXAONE),
    "kolibri1": Family("Kolibri1", **EXAONE, **FOUR_NORMS),
    "ernie4_5_moe": Family("Ernie4_5_Moe", rotary="own"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1", (ATTENTION,)),
    "hy_v3": Family("HYV3", qk_norm="head"),
    "minimax_m2": Family("MiniMaxM2", qk_norm="all"),
    "phimoe": Family("Phimoe", cast="layer"),
    "solar_open": Family("SolarOpen"),
    "aria": Family("Aria"),
    "granitemoe": Family("GraniteMoe", (LAYER,)),
    "granitemoeshared": Family("GraniteMoeShared", (MLP, LAYER)),
    "laguna": Family("Laguna", (ATTENTION,)),
    "mimo_v2_flash": Family("MiMoV2Flash", (ATTENTION,)),
    # attention and MLP side by side
    "cohere": Family("Cohere", (LAYER,), **COHERE),
    "cohere2": Family(
        "Cohere2", (LAYER,), **COHERE, **WINDOW, rotates=lambda attention: attention.sliding_window is not None
    ),
    "cohere_compass": Family("CohereCompass", (LAYER,), cast="layer", **WINDOW),
    "phi": Family("Phi", (MLP, LAYER), cast="layer", out="dense"),
    "stablelm": Family("StableLm", (LAYER,), cast="layer"),
    # state-space, convolution and gated layers between attention layers
    "qwen3_next": Family("Qwen3Next", (ATTENTION, LAYER), **GEMMA),
    "qwen3_5": Family("Qwen3_5", (ATTENTION, LAYER), **GEMMA),
    "qwen3_5_moe": Family("Qwen3_5Moe", (ATTENTION, LAYER), **GEMMA),
    "llama4": Family("Llama4", (ATTENTION, LAYER)),
    "bamba": Family("Bamba", (LAYER,)),
    "jamba": Family("Jamba", (ATTENTION, LAYER)),
    "falcon_h1": Family("FalconH1", **NORMS_ONLY),
    "granitemoehybrid": Family("GraniteMoeHybrid", (MLP, LAYER)),
    "lfm2": Family("Lfm2", **NORMS_ONLY),
    "lfm2_moe": Family("Lfm2Moe", **NORMS_ONLY),
    "minimax": Family("MiniMax", (LAYER,), **WINDOW_OF_CONFIG),
    # norms alone
    **{
        name: Family(prefix, cast="layer", **NORMS_ONLY)
        for name, prefix in {
            "gpt2": "GPT2",
            "gpt_bigcode": "GPTBigCode",
            "gpt_neo": "GPTNeo",
            "gpt_neox": "GPTNeoX",
            "gptj": "GPTJ",
            "codegen": "CodeGen",
            "opt": "OPT",
            "bloom": "Bloom",
            "mpt": "Mpt",
            "falcon": "Falcon",
            "persimmon": "Persimmon",
            "biogpt": "BioGpt",
        }.items()
    },
}


def identify(module: nn.Module) -> tuple[str | None, str]:
    """("llama", "MLP") for a LlamaMLP; (None, "") for a subclass of it that is defined elsewhere, and others."""
    kind = type(module)
    package, _, name = kind.__module__.rpartition(".modeling_")
    family = FAMILIES.get(name) if package == f"transformers.models.{name}" else None
    if family is None or not kind.__name__.startswith(family.prefix):
        return None, ""
    return name, kind.__name__.removeprefix(family.prefix).removeprefix("Text")
