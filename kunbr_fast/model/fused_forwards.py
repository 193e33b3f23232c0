"""The forwards that `patched` puts into a decoder's modules, chosen by their type (families.py).

    norm            kernels.norms: rms_norm or layer_norm, in the architecture's own casting and offset convention
    MLP             gate and up by kernels.projections.linears (Phi-3 and GLM: their one packed product), swiglu or
                    geglu, down
    attention       q, k and v by linears (Phi-3: packed), q/k norm, apply_rotary, then the attention function that the
                    model's configuration names, through transformers' own interface, and the output projection
    decoder layer   the residual sum after attention is made by the norm that follows it (where none does, or attention
                    and MLP lie side by side, a layer keeps its own forward); on request queries and MLP for some rows
                    only (`kunbr_rows`, from Decoder.run)

For the backward pass nothing is kept of a cover layer that only a weight's gradient needs.

A projection that is not a plain nn.Linear when it is called (a LoRA wrapper, quantised weights, a forward of its own,
hooks of its own) is called as a module; it takes no part in the fused product and everything else stays fused. So is a
norm. (Hooks registered for all modules of a process see a fused module, not the projections inside it.)
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.kernels.gated.op import geglu, swiglu
from kunbr_fast.kernels.norms.op import layer_norm, rms_norm
from kunbr_fast.kernels.operators import choose
from kunbr_fast.kernels.projections import linears
from kunbr_fast.kernels.rotary.op import apply_rotary
from kunbr_fast.model import compat
from kunbr_fast.model.families import FAMILIES, Family, identify
from kunbr_fast.model.gather import take
from kunbr_fast.model.ownership import has_hooks

logger = logging.getLogger(f"{__package__}.patch")  # the room of `patched`, whose warnings these are


@functools.cache
def say_once(message: str) -> None:
    logger.warning("%s", message)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its product may be computed without calling it."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and type(linear.weight) in (nn.Parameter, torch.Tensor)  # quantised and sharded weights are subclasses
        and not has_hooks(linear)
    )


def _project(x: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    """`[module(x) for module in modules]`, the plain linear layers among them as one function."""
    plain = [module for module in modules if _is_plain(module)]
    if len(plain) < 2:
        return [module(x) for module in modules]
    fused = iter(linears(x, [module.weight for module in plain], [module.bias for module in plain]))
    return [next(fused) if module in plain else module(x) for module in modules]


def _own_is_better(norm: nn.Module, x: torch.Tensor, impl: str) -> bool:
    """An fp64 model's own norms are fp32 inside: those steps, bit for bit. And torch's LayerNorm is one kernel."""
    return x.dtype == torch.float64 or (type(norm) is nn.LayerNorm and choose("layer_norm", impl, x) == "torch")


def _by_kernel(
    norm: nn.Module, x: torch.Tensor, family: Family, impl: str, residual: torch.Tensor | None = None
) -> Any:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if family.cast == "layer":
        return layer_norm(x, norm.weight, getattr(norm, "bias", None), eps, residual=residual, impl=impl)
    return rms_norm(x, norm.weight, eps, offset=family.offset, cast=family.cast, residual=residual, impl=impl)


def _norm(module: nn.Module, hidden_states: torch.Tensor, *, family: Family, impl: str) -> torch.Tensor:
    if _own_is_better(module, hidden_states, impl):
        return type(module).forward(module, hidden_states)
    return _by_kernel(module, hidden_states, family, impl)


def _sum_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, family: Family, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(residual + x), residual + x`."""
    ours = getattr(norm.__dict__.get("forward"), "func", None) is _norm
    if not ours or has_hooks(norm) or _own_is_better(norm, x, impl):
        hidden = residual + x
        return norm(hidden), hidden
    return _by_kernel(norm, x, family, impl, residual)


def _activation(module: nn.Module) -> Any:
    """The gated form of an activation module, act(gate) * up; None if there is none."""
    if type(module) in (compat.SiLUActivation, nn.SiLU):
        return swiglu
    if type(module) in (compat.GELUTanh, compat.GELUActivation):
        return functools.partial(geglu, approximate="tanh" if type(module) is compat.GELUTanh else "none")
    return None


def _mlp(module: nn.Module, x: torch.Tensor, *, impl: str, act: str, gated: Any) -> torch.Tensor:
    if has_hooks(getattr(module, act)):
        return type(module).forward(module, x)
    packed = getattr(module, "gate_up_proj", None)
    gate_up = _project(x, module.gate_proj, module.up_proj) if packed is None else [packed(x)]
    return _dropped(module, module.down_proj(gated(*gate_up, impl=impl)))


def _dropped(module: nn.Module, out: torch.Tensor) -> torch.Tensor:
    """What StarCoder2's and Seed-OSS's attention and MLPs end with."""
    rate = getattr(module, "residual_dropout", 0.0)
    return F.dropout(out, rate, module.training) if rate else out


def _attention(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    family: Family,
    eager: Any,
    rotate: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """kwargs: for the attention function. kunbr_rows, (R,): queries and result are of these tokens: (1, R, D)."""
    past_key_values = kwargs.pop("past_key_value", past_key_values)  # transformers 4
    kwargs.pop("shared_kv_states", None)  # Gemma-4's, which no fused attention reads or writes
    rows = kwargs.get("kunbr_rows")
    query, key, value = _heads(module, hidden_states, rows, family)
    if position_embeddings is not None and (family.rotates is None or family.rotates(module)):
        if rows is None:
            query, key = rotate(query, key, *position_embeddings)
        else:  # each with its own angles, beside a partner of no heads
            query, _ = rotate(query, query[:, :0], *(x[:, rows] for x in position_embeddings))
            key, _ = rotate(key, key[:, :0], *position_embeddings)
    position = kwargs.pop("cache_position", None)  # transformers 5.0; later releases' caches know it themselves
    if past_key_values is not None:
        further = () if position is None else ({"cache_position": position},)
        key, value = past_key_values.update(key, value, module.layer_idx, *further)
    name = module.config._attn_implementation
    if compat.LAYERS_RETURN_TUPLES and name == "sdpa" and kwargs.get("output_attentions"):
        name = "eager"  # as the model's own code; later releases ask for it elsewhere
    attend = eager if name in (None, "eager") else compat.ALL_ATTENTION_FUNCTIONS[name]
    for option, of in family.options.items():
        kwargs[option] = of(module)
    kwargs["dropout"] = module.attention_dropout if module.training else 0.0
    out, weights = attend(module, query, key, value, attention_mask, scaling=module.scaling, **kwargs)
    project = getattr(module, family.out)
    return _dropped(module, project(out.reshape(len(query), query.shape[2], -1))), weights


def _heads(
    module: nn.Module, hidden_states: torch.Tensor, rows: torch.Tensor | None, family: Family
) -> Iterator[torch.Tensor]:
    """Queries (of some rows only), keys and values, (B, heads, T or R, d), before rotation."""
    width = module.head_dim
    if hasattr(module, "qkv_proj"):
        heads = module.config.num_attention_heads, module.config.num_key_value_heads, module.config.num_key_value_heads
        query, key, value = module.qkv_proj(hidden_states).split([count * width for count in heads], -1)
        query = query if rows is None else take(query, rows, 1)
    else:
        sources = (
            [module.k_proj] if module.v_proj is None else [module.k_proj, module.v_proj]
        )  # Gemma-4: values are keys
        if rows is None:
            query, key, *values = _project(hidden_states, module.q_proj, *sources)
        else:
            query = module.q_proj(take(hidden_states, rows, 1))
            key, *values = _project(hidden_states, *sources)
        value = values[0] if values else key
    normed = getattr(module, "q_norm", None) is not None and family.qk_norm
    if normed == "all":
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (x.unflatten(-1, (-1, width)) for x in (query, key, value))
    if normed == "head":
        query, key = module.q_norm(query), module.k_norm(key)
    if hasattr(module, "v_norm"):  # Gemma-4
        value = module.v_norm(value)
    return (x.transpose(1, 2) for x in (query, key, value))


def _layer(module: nn.Module, hidden_states: torch.Tensor, *args: Any, family: Family, impl: str, **kwargs: Any) -> Any:
    """`_whole_layer`, again in the backward pass where gradient checkpointing is on.

    That is switched on through attributes that transformers sets on the layer, and which its own forward reads.
    """
    run = functools.partial(_whole_layer, module, family=family, impl=impl)
    if args:  # transformers before 4.54, with gradient checkpointing; None for the embeddings of Gemma-4's other layers
        names = list(inspect.signature(type(module).forward).parameters)[2:]
        kwargs.update((name, value) for name, value in zip(names, args) if value is not None)
    if compat.LAYERS_RETURN_TUPLES:
        if kwargs.get("output_attentions"):
            return type(module).forward(module, hidden_states, **kwargs)
        return (run(hidden_states, **kwargs),)
    if compat.CALL_CHECKPOINTS or not (module.gradient_checkpointing and module.training):
        return run(hidden_states, **kwargs)
    if kwargs.get("past_key_values") is not None:  # the second run would write to it again
        kwargs.update(past_key_values=None, use_cache=False)
        say_once(f"{type(module).__name__}: no cache is kept under gradient checkpointing")
    return module._gradient_checkpointing_func(functools.partial(run, **kwargs), hidden_states)


def _whole_layer(
    module: nn.Module, hidden_states: torch.Tensor, *, family: Family, impl: str, **kwargs: Any
) -> torch.Tensor:
    first, second = (getattr(module, name) for name in family.norms)
    attended, _ = module.self_attn(hidden_states=first(hidden_states), **kwargs)
    rows = kwargs.get("kunbr_rows")
    hidden_states = hidden_states if rows is None else take(hidden_states, rows, 1)
    normed, residual = _sum_norm(second, _added(module, attended, family, 0), hidden_states, family, impl)
    out = module.mlp(normed)
    out = out[0] if isinstance(out, tuple) else out  # gpt-oss gives its router's scores too
    hidden_states = residual + _added(module, out, family, 1)
    return hidden_states if family.scalar is None else hidden_states * getattr(module, family.scalar)


def _added(module: nn.Module, out: torch.Tensor, family: Family, place: int) -> torch.Tensor:
    """What is added to the residual stream of the output of attention (place 0) or MLP (1)."""
    out = out if family.after is None else getattr(module, family.after[place])(out)
    return out if family.multiplier is None else out * getattr(module, family.multiplier)


# ---------------------------------------------------------------- which module gets which


def _consists_of(module: nn.Module, names: set[str], parameters: frozenset[str] = frozenset()) -> bool:
    """Whether it has these children, and no other that computes with weights (of a later release of transformers)."""
    children = dict(module.named_children())
    weighted = {name for name, child in children.items() if any(True for _ in child.parameters())}
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return weighted <= names <= set(children) and own <= parameters


def fused_forward(module: nn.Module, impl: str, family: Family) -> functools.partial | None:
    """The forward to put into a module of a model whose layers are of `family`, None where it keeps its own."""
    name, role = ("", "LayerNorm") if type(module) is nn.LayerNorm and family.cast == "layer" else identify(module)
    if name is None or "forward" in module.__dict__:  # some other tool's, such as Accelerate's offloading
        return None
    family = FAMILIES.get(name, family)
    if role in family.own:
        return None
    if role in ("RMSNorm", "LayerNorm"):
        weight, fits = getattr(module, "weight", None), (role == "LayerNorm") == (family.cast == "layer")
        plain = fits and weight is not None and weight.dim() == 1  # Gemma-4 has norms without, Cohere's q_norm has rows
        return functools.partial(_norm, module, family=family, impl=impl) if plain else None
    if role == "MLP":
        return _fused_mlp(module, impl)
    if compat.ALL_ATTENTION_FUNCTIONS is None:  # transformers 4.45: norms and MLPs only
        return None
    if role == "Attention":
        return _fused_attention(module, impl, family)
    return _fused_layer(module, impl, family) if role == "DecoderLayer" else None


def _fused_mlp(module: nn.Module, impl: str) -> functools.partial | None:
    act = "activation_fn" if hasattr(module, "activation_fn") else "act_fn"
    needed = {"down_proj", act} | ({"gate_up_proj"} if hasattr(module, "gate_up_proj") else {"gate_proj", "up_proj"})
    gated = _activation(getattr(module, act, None))
    if gated is None or not _consists_of(module, needed):
        return None
    return functools.partial(_mlp, module, impl=impl, act=act, gated=gated)


def _fused_attention(module: nn.Module, impl: str, family: Family) -> functools.partial | None:
    needed = {family.out} | ({"qkv_proj"} if hasattr(module, "qkv_proj") else {"q_proj", "k_proj"})
    needed |= {"v_proj"} if getattr(module, "v_proj", None) is not None else set()
    needed |= {"q_norm", "k_norm"} if family.qk_norm and getattr(module, "q_norm", None) is not None else set()
    parameters = frozenset({"sinks"} if "s_aux" in family.options else ())
    shares = getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False)  # Gemma-4
    if shares or not _consists_of(module, needed, parameters):
        return None
    file = importlib.import_module(type(module).__module__)
    rotate = functools.partial(apply_rotary, impl=impl) if family.rotary == "half" else file.apply_rotary_pos_emb
    return functools.partial(_attention, module, family=family, eager=file.eager_attention_forward, rotate=rotate)


def _fused_layer(module: nn.Module, impl: str, family: Family) -> functools.partial | None:
    if not _consists_of(module, {"self_attn", "mlp", *family.norms, *(family.after or ())}):
        return None
    if compat.LAYERS_RETURN_TUPLES:
        if identify(module.mlp)[1] != "MLP":  # a router's scores are in the tuple too
            return None
    elif "output_attentions" in inspect.signature(type(module).forward).parameters:
        return None  # transformers 5.0: a few layers still give a tuple
    forward = functools.partial(_layer, module, family=family, impl=impl)
    forward.takes_rows = fused_forward(module.self_attn, impl, family) is not None  # see Decoder.run
    return forward
