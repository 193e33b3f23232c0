"""A model's config.json, judged before transformers reads it: sizes, numbers and names that no model can have."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kunbr_fast.files.documents import read_json
from kunbr_fast.files.kinds import check_start
from kunbr_fast.files.shown import plain, shown

DTYPES = ("float64", "float32", "bfloat16", "float16")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model")
WINDOWS = ("sliding_window", "attention_chunk_size")
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", *WINDOWS)
# the largest that each size may be: far above any model's, and small enough that nothing made from it fills the memory
SIZES = {
    **dict.fromkeys(LAYERS, 1000),
    **dict.fromkeys((*HEADS, "num_key_value_heads"), 2**16),
    **dict.fromkeys((*WIDTHS, "head_dim", "intermediate_size", "n_inner", "ffn_dim"), 2**24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 2**24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 2**24),
    **dict.fromkeys(("vocab_size", *WINDOWS), 2**31 - 1),
}
EXPERTS = re.compile(r"(num|n)_\w*experts\w*$")
MOST_EXPERTS = 2**14
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token")
# of all other whole numbers, in parts for images and sounds too: (names, the largest). transformers makes a list or a
# module for each layer or label
MOST = (
    (re.compile(r"(\w*_)?(n?layers?|depths?)$|(num|n)_\w*(blocks|stages)$"), 1000),
    (re.compile(r"num_labels$"), 10**5),
    (re.compile(r"\w*(vocab|theta|base|freq|seed|flos|param|time|date|version|token|offset|ids?$|idx$|index$)"), 2**64),
    (re.compile(r""), 2**24),
)
BOOLS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
TEXTS = ("model_type", *ACTIVATIONS)
EPSILONS = re.compile(r"(\w+_)?norm_(eps|epsilon)$")
DROPOUTS = re.compile(r"\w+_(dropout|pdrop)$|rotary_pct$|partial_rotary_factor$")
ROPES = ("rope_scaling", "rope_parameters")
ABOVE_ZERO = re.compile(
    r"(rope_(local_)?(base_freq|theta)|rotary_emb_base|\w*softcapping|query_pre_attn_scalar|factor)$"
)
QUANTISED = ("quantization_config", "compression_config", "quantization")  # the last: MLX's
QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # AutoGPTQ's, AutoAWQ's, ModelOpt's
UNQUANTISED = "take the model that was quantised, or load it in its own library and save it in bfloat16"
CURE = "correct it, or copy the model's config.json again"
# what a model gives back and which code computes it: of a program, not of a model
RUNNING = re.compile(
    r"_?(output_(attentions|hidden_states)|(use_)?return_dict|torchscript)$|_?(attn|experts)_implementation"
)
# of a configuration: where it came from, and what changes no result
NOT_COUNTED = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype",
               "use_cache", "output_attentions", "output_hidden_states", "return_dict")  # fmt: skip
# which transformers would follow to other weights than the folder's
REDIRECTIONS = ("transformers_weights",)


def read_model_config(path: Path) -> dict[str, Any]:
    """The values of a config.json, without those of `RUNNING`. ValueError, in one line that names the file and the
    setting."""
    values = read_json(path)
    check_start(path)
    if not isinstance(values, dict):
        raise ValueError(f"{plain(path)}: got {shown(values)}, expected an object with the model's settings: {CURE}")
    for wrong in (*_quantised(values), *_wrong(values)):
        raise ValueError(f"{plain(path)}: {wrong}")
    return _of_model(values)


def _of_model(value: Any) -> Any:
    if isinstance(value, list):
        return [_of_model(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: _of_model(item) for name, item in value.items() if not RUNNING.match(name)}
    for name in ("dtype", "torch_dtype"):  # older releases wrote "torch.bfloat16", which newer ones do not know
        if isinstance(found.get(name), str):
            found[name] = found[name].removeprefix("torch.")
    return found


def configured(values: Mapping[str, Any]) -> Any:
    """Their configuration in transformers. Not AutoConfig.from_pretrained, which reads other files that the settings
    name."""
    from transformers import CONFIG_MAPPING

    name = values.get("model_type")
    if name not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {shown(name)}, which this release of transformers does not know: {CURE}")
    if name == "mistral" and "layer_types" in values and "ministral" in CONFIG_MAPPING:  # as AutoConfig does
        name = "ministral"
    return CONFIG_MAPPING[name].from_dict(copy.deepcopy({**values, "model_type": name}))


def differing(one: Any, other: Any) -> str | None:
    """The first setting, of those by which results differ, that two configurations do not share."""
    a, b = (_counted(config.to_dict()) for config in (one, other))
    return next((name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)), None)


def _counted(value: Any) -> Any:
    if isinstance(value, Mapping):
        names = [name for name in value if name not in NOT_COUNTED and not RUNNING.match(str(name))]
        return {str(name): _counted(value[name]) for name in names}
    if isinstance(value, list | tuple | set):
        return [_counted(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


def text_of(config: Any) -> Any:
    """The configuration of its language model."""
    from transformers import PretrainedConfig

    found = config.get_text_config()
    if not isinstance(found, PretrainedConfig):
        raise ValueError(
            f"it has settings of a part (text_config, decoder, ...) that a {config.model_type} does not have, "
            f"{shown(found)}: {CURE}"
        )
    return found


def check_heads(config: Any, path: Path) -> None:
    """What `read_model_config` checks of heads, with transformers' defaults. config: its, of the language model."""
    values = config.to_dict()
    heads, width = _first(values, HEADS), _first(values, WIDTHS)
    if values.get("head_dim") is None and heads and width and heads[1] > 0:
        values["head_dim"] = width[1] // heads[1]
    for wrong in (*_wrong_heads(values, ""), *_wrong_mixture(values, "")):
        raise ValueError(f"{plain(path)}: {wrong}")


def check_names(values: Mapping[str, Any], path: Path) -> None:
    """ValueError for an activation or a kind of rope that transformers does not know; it would raise a KeyError, or go
    on after a warning."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"rope": {*ROPE_INIT_FUNCTIONS, "default", "mrope", "su"}, "activation": set(ACT2FN)}
    for where, kind, name in _names(of_language(values)):
        if isinstance(name, str) and name not in known[kind]:
            some = ", ".join(sorted(known[kind])[:6])
            raise ValueError(f"{plain(path)}: {where} is {shown(name)}, expected a known {kind} ({some}, ...): {CURE}")


def _names(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str, Any]]:
    """(setting, "rope" or "activation", its value)"""
    for name, value in values.items():
        if isinstance(value, dict) and (where or name in ROPES):
            yield from _names(value, f"{where}{name}.")
        elif where and name in ("rope_type", "type"):
            yield where + name, "rope", value
        elif not where and name in ACTIVATIONS:
            yield name, "activation", value


def of_language(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: of one that also sees or hears they are in an object of their own."""
    return values.get("text_config") or values


def number_of_layers(values: Mapping[str, Any]) -> tuple[str, int] | None:
    """(name, value) of the setting that says how many layers there are."""
    found = of_language(values)
    return next(((name, found[name]) for name in LAYERS if name in found), None)


def _quantised(values: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """What says that the weights are quantised, in any part of the settings."""
    for name, value in values.items():
        if name in QUANTISED and value is not None and value is not False:
            yield f"{plain(inside + name)}: its weights are quantised, expected plain ones: {UNQUANTISED}"
        elif isinstance(value, dict):
            yield from _quantised(value, f"{inside}{name}.")


def check_plain(folder: Path) -> None:
    """ValueError for files beside a model's weights that say that these are not all, or are quantised: an adapter,
    which transformers would put on top of them, or what a quantiser writes."""
    for name in sorted(os.listdir(folder)):
        if re.fullmatch(r"adapter_config\.json|adapter_model\..*", name):
            raise ValueError(
                f"{plain(folder / name)}: an adapter, which transformers would put on top of these weights: merge it "
                "into the model (merge_and_unload), or move it elsewhere"
            )
        if name in QUANTISERS:
            values = read_json(folder / name, dict)
            said = values.get("quantization") if name == "hf_quant_config.json" else values
            if isinstance(said, dict) and said.get("quant_algo", said) is not None:
                raise ValueError(
                    f"{plain(folder / name)}: its weights are quantised, expected plain ones: {UNQUANTISED}"
                )


def _wrong(values: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """What is wrong with the settings. inside: the object in config.json that they are in, with a dot."""
    for name, value in values.items():
        expected = _expected(name, value)
        if expected is not None and not (value is None and _null_by_default(values.get("model_type"), name)):
            yield f"{plain(inside + name)} is {shown(value)}, expected {expected}: {CURE}"
    for name in REDIRECTIONS:
        if values.get(name) is not None:
            yield f"{name} is {shown(values[name])}: weights are read from model.safetensors or its index: delete it"
    yield from _wrong_heads(values, inside)
    yield from _wrong_mixture(values, inside)
    for name in ROPES:
        yield from _wrong_rope(values.get(name), f"{inside}{name}")
    if not inside and isinstance(values.get("text_config"), dict):
        yield from _wrong(values["text_config"], "text_config.")
    if not inside:
        yield from _too_large(values, "", "")


def _too_large(value: Any, where: str, name: str) -> Iterator[str]:
    """Of whole numbers at any depth. name: of the setting, which a list's items share."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _too_large(item, f"{where}.{plain(key)}" if where else plain(key), key)
    elif isinstance(value, list):
        for item in value:
            yield from _too_large(item, where, name)
    elif type(value) is int:
        most = SIZES.get(name) or next(most for names, most in MOST if names.match(name))
        if value > most:
            yield f"{where} is {value}, expected at most {most}: {CURE}"


def _null_by_default(model_type: Any, name: str) -> bool:
    """Whether transformers' own default is null, as GPT-Neo's intermediate_size is. Asked only where it matters."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    defaults = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    return name in defaults and defaults[name].default is None


def _expected(name: str, value: Any) -> str | None:
    """What is expected in place of the value; None where it may be right."""
    if name in SIZES or EXPERTS.match(name):
        least, most = (1, SIZES[name]) if name in SIZES else (0, MOST_EXPERTS)
        least = 0 if name in WINDOWS else least  # transformers writes 0 for none
        if value is None and (name in NULLABLE or name not in SIZES):
            return None
        return None if type(value) is int and least <= value <= most else f"a whole number from {least} to {most}"
    if value is None:
        return "true or false" if name == "tie_word_embeddings" else None
    if name in ("n_group", "topk_group", "num_labels"):
        least = 0 if name == "num_labels" else 1
        return None if type(value) is int and value >= least else f"a whole number from {least} on"
    if name == "id2label":
        return None if isinstance(value, dict) else "an object"
    if name in BOOLS:
        return None if isinstance(value, bool) else "true or false"
    if name in TEXTS:
        return None if isinstance(value, str) and value.isprintable() else "a name"
    if name in ("dtype", "torch_dtype") and not isinstance(value, dict):
        known = isinstance(value, str) and value.removeprefix("torch.") in (*DTYPES, "auto")
        return None if known else f"one of {', '.join(DTYPES)}"
    if name in (*ROPES, "text_config"):
        return None if isinstance(value, dict) else "an object"
    if name in ("architectures", "layer_types"):
        return None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "a list of names"
    return _expected_number(name, value)


def _expected_number(name: str, value: Any) -> str | None:
    if isinstance(value, bool):  # such as use_dropout, or one that transformers refuses
        return None
    if EPSILONS.match(name):
        return None if _is_number(value) and 0 < value < 1 else "a number above 0 and below 1"
    if DROPOUTS.match(name):
        return None if _is_number(value) and 0 <= value <= 1 else "a number from 0 to 1"
    if name == "initializer_range":
        return None if _is_number(value) and 0 <= value else "a number from 0 on"
    if ABOVE_ZERO.match(name):
        return None if _is_number(value) and value > 0 else "a number above 0"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int] | None:
    return next(((name, values[name]) for name in names if type(values.get(name)) is int), None)


def _wrong_heads(values: Mapping[str, Any], inside: str) -> Iterator[str]:
    heads, width = _first(values, HEADS), _first(values, WIDTHS)
    if heads is None or heads[1] < 1:
        return
    groups = values.get("num_key_value_heads")
    if type(groups) is int and groups > 0 and heads[1] % groups:
        yield f"{inside}{heads[0]} is {heads[1]}, expected a multiple of num_key_value_heads, {groups}: {CURE}"
    size = values.get("head_dim")
    if size is None and width is not None and width[1] % heads[1]:
        yield f"{inside}{width[0]} is {width[1]}, expected a multiple of {heads[0]}, {heads[1]}: {CURE}"
    if type(size) is int and size % 2 and _turns_all(values):
        yield f"{inside}head_dim is {size}, expected an even number: rotary positions turn pairs of entries: {CURE}"


def _wrong_mixture(values: Mapping[str, Any], inside: str) -> Iterator[str]:
    counts = [v for n, v in values.items() if EXPERTS.match(n) and n not in PER_TOKEN and "shared" not in n]
    experts = max((count for count in counts if type(count) is int), default=0)
    chosen = _first(values, PER_TOKEN)
    if experts and chosen is not None and not 1 <= chosen[1] <= experts:
        yield f"{inside}{chosen[0]} is {chosen[1]}, expected from 1 to the number of experts, {experts}: {CURE}"
    groups, kept = values.get("n_group"), values.get("topk_group")
    if experts and type(groups) is int and groups > 0:
        if experts % groups:
            yield f"{inside}n_group is {groups}, expected a divisor of the number of experts, {experts}: {CURE}"
        if type(kept) is int and kept > groups:
            yield f"{inside}topk_group is {kept}, expected at most n_group, {groups}: {CURE}"


def _turns_all(values: Mapping[str, Any]) -> bool:
    """Whether rotary positions turn all entries of a head."""
    shares = [values.get(name) for name in ("partial_rotary_factor", "rotary_pct")]
    part = any(_is_number(share) and share < 1 for share in shares)
    return not part and any(name.startswith(("rope_", "rotary_")) for name in values)


def _wrong_rope(values: Any, where: str) -> Iterator[str]:
    """values: of a rope, or one for each type of layer."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _wrong_rope(value, f"{where}.{plain(name)}")
            continue
        right, expected = _is_number(value), "a number"
        if name in ("rope_type", "type"):
            right, expected = isinstance(value, str) and value.isprintable(), "a name"
        elif isinstance(value, list):
            right, expected = all(map(_is_number, value)), "numbers"
        elif ABOVE_ZERO.match(name) or name == "original_max_position_embeddings":
            right, expected = right and value > 0, "a number above 0"
        if not right and value is not None and not isinstance(value, bool):
            yield f"{where}.{plain(name)} is {shown(value)}, expected {expected}: {CURE}"
