"""`patched(model, active_block)`: fused layers inside a Hugging Face decoder, and everything but one block frozen.

What is replaced is the `forward` of single modules, chosen by their type, on the instance:

    norm            fused.norms.rms_norm, in the architecture's own casting and offset convention
    MLP             gate and up by fused.linear.linears (Phi-3: its one packed product), swiglu or geglu, down
    attention       q, k and v by linears (Phi-3: packed), q/k norm, apply_rotary, then the attention function that the
                    model's configuration names, through transformers' own interface, and the output projection
    decoder layer   the residual sum after attention is made by the norm that follows it (Llama's and Gemma's
                    structure; OLMo-2 has no norm there, and its layer keeps its own forward); on request queries and
                    MLP for some rows only (`kunbr_rows`, from Decoder.run)

For the backward pass nothing is kept of a cover layer that only a weight's gradient needs.

A projection that is not a plain nn.Linear when it is called (a LoRA wrapper, quantised weights, a forward of its own,
hooks of its own) is called as a module; it takes no part in the fused product and everything else stays fused. So is a
norm. (Hooks registered for all modules of a process see a fused module, not the projections inside it.)

On a GPU a launch of ours costs the host more than one of torch's: where a layer's products are short, its own code is
faster (`WORTH`), and in a user's own loop it is what runs (`OnceItPays`).

What undoes a change, of `forward` or of requires_grad, is put on one stack before it is made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.gated.op import geglu, swiglu
from kunbr_fast.kernels.norms.op import rms_norm
from kunbr_fast.kernels.projections import linears
from kunbr_fast.kernels.rotary.op import apply_rotary
from kunbr_fast.model import compat
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.families import FAMILIES, Family, identify
from kunbr_fast.model.frozen import same_modes
from kunbr_fast.model.gather import take
from kunbr_fast.model.layers import layer_list
from kunbr_fast.model.ownership import has_hooks, present, uncompiled
from kunbr_fast.proofs import ensure_proven

logger = logging.getLogger(__name__)
MARK = "_kunbr_patched"  # on the list of layers: the call that patched them
# A layer's weights times the tokens of a call, from which on fused layers are faster than its own code, launched one by
# one: on an H100, Llama-3.2-1B's and Llama-3-8B's layers (benchmarks/results/fused_layers_h100.csv).
WORTH = 4e11


def _is_plain(linear: nn.Module) -> bool:
    """Whether its product may be computed without calling it."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and type(linear.weight) in (nn.Parameter, torch.Tensor)  # quantised and sharded weights are subclasses
        and not has_hooks(linear)
    )


# ---------------------------------------------------------------- the forwards


def _project(x: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    """`[module(x) for module in modules]`, the plain linear layers among them as one function."""
    plain = [module for module in modules if _is_plain(module)]
    if len(plain) < 2:
        return [module(x) for module in modules]
    fused = iter(linears(x, [module.weight for module in plain], [module.bias for module in plain]))
    return [next(fused) if module in plain else module(x) for module in modules]


def _norm(module: nn.Module, hidden_states: torch.Tensor, *, family: Family, impl: str) -> torch.Tensor:
    if hidden_states.dtype == torch.float64:  # an fp64 model's own norms are fp32 inside: those steps, bit for bit
        return type(module).forward(module, hidden_states)
    eps = getattr(module, family.eps)
    return rms_norm(hidden_states, module.weight, eps, offset=family.offset, cast=family.cast, impl=impl)


def _sum_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, family: Family, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(residual + x), residual + x`."""
    ours = getattr(norm.__dict__.get("forward"), "func", None) is _norm
    if not ours or has_hooks(norm) or x.dtype == torch.float64:
        hidden = residual + x
        return norm(hidden), hidden
    return rms_norm(
        x, norm.weight, getattr(norm, family.eps), offset=family.offset, cast=family.cast, residual=residual, impl=impl
    )


def _activation(module: nn.Module) -> Any:
    """The gated form of an activation module, act(gate) * up; None if there is none."""
    if type(module) in (compat.SiLUActivation, nn.SiLU):
        return swiglu
    if type(module) in (compat.GELUTanh, compat.GELUActivation):
        return functools.partial(geglu, approximate="tanh" if type(module) is compat.GELUTanh else "none")
    return None


def _mlp(module: nn.Module, x: torch.Tensor, *, family: Family, impl: str, gated: Any) -> torch.Tensor:
    if has_hooks(getattr(module, family.act)):
        return type(module).forward(module, x)
    gate_up = [module.gate_up_proj(x)] if family.packed else _project(x, module.gate_proj, module.up_proj)
    return module.down_proj(gated(*gate_up, impl=impl))


def _attention(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    family: Family,
    impl: str,
    eager: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """kwargs: for the attention function. kunbr_rows, (R,): queries and result are of these tokens: (1, R, D)."""
    past_key_values = kwargs.pop("past_key_value", past_key_values)  # transformers 4
    rows = kwargs.get("kunbr_rows")
    query, key, value = _heads(module, hidden_states, rows, family)
    if getattr(module, "use_rope", True):  # SmolLM3 has layers without
        if rows is None:
            query, key = apply_rotary(query, key, *position_embeddings, impl=impl)
        else:  # each with its own angles, beside a partner of no heads
            query, _ = apply_rotary(query, query[:, :0], *(x[:, rows] for x in position_embeddings), impl=impl)
            key, _ = apply_rotary(key, key[:, :0], *position_embeddings, impl=impl)
    position = kwargs.pop("cache_position", None)  # transformers 5.0; later releases' caches know it themselves
    if past_key_values is not None:
        further = () if position is None else ({"cache_position": position},)
        key, value = past_key_values.update(key, value, module.layer_idx, *further)
    name = module.config._attn_implementation
    if compat.LAYERS_RETURN_TUPLES and name == "sdpa" and kwargs.get("output_attentions"):
        name = "eager"  # as the model's own code; later releases ask for it elsewhere
    attend = eager if name in (None, "eager") else compat.ALL_ATTENTION_FUNCTIONS[name]
    for option, place in (("sliding_window", family.window), ("softcap", family.softcap)):
        if place is not None:
            owner, name = place.split(".")
            kwargs[option] = getattr(module.config if owner == "config" else module, name, None)
    kwargs["dropout"] = module.attention_dropout if module.training else 0.0
    out, weights = attend(module, query, key, value, attention_mask, scaling=module.scaling, **kwargs)
    return module.o_proj(out.reshape(len(query), query.shape[2], -1)), weights


def _heads(
    module: nn.Module, hidden_states: torch.Tensor, rows: torch.Tensor | None, family: Family
) -> Iterator[torch.Tensor]:
    """Queries (of some rows only), keys and values, (B, heads, T or R, d), before rotation."""
    width = module.head_dim
    if family.packed:
        heads = module.config.num_attention_heads, module.config.num_key_value_heads, module.config.num_key_value_heads
        query, key, value = module.qkv_proj(hidden_states).split([count * width for count in heads], -1)
        query = query if rows is None else take(query, rows, 1)
    elif rows is not None:
        query = module.q_proj(take(hidden_states, rows, 1))
        key, value = _project(hidden_states, module.k_proj, module.v_proj)
    else:
        query, key, value = _project(hidden_states, module.q_proj, module.k_proj, module.v_proj)
    if family.qk_norm == "all":
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (x.unflatten(-1, (-1, width)) for x in (query, key, value))
    if family.qk_norm == "head":
        query, key = module.q_norm(query), module.k_norm(key)
    return (x.transpose(1, 2) for x in (query, key, value))


def _layer(module: nn.Module, hidden_states: torch.Tensor, *args: Any, family: Family, impl: str, **kwargs: Any) -> Any:
    """`_whole_layer`, again in the backward pass where gradient checkpointing is on.

    That is switched on through attributes that transformers sets on the layer, and which its own forward reads.
    """
    run = functools.partial(_whole_layer, module, family=family, impl=impl)
    if compat.LAYERS_RETURN_TUPLES:  # and, under gradient checkpointing, give their arguments by position
        names = list(inspect.signature(type(module).forward).parameters)[2:]
        kwargs.update(zip(names, args))
        if kwargs.get("output_attentions"):
            return type(module).forward(module, hidden_states, **kwargs)
        return (run(hidden_states, **kwargs),)
    if compat.CALL_CHECKPOINTS or not (module.gradient_checkpointing and module.training):
        return run(hidden_states, **kwargs)
    if kwargs.get("past_key_values") is not None:  # the second run would write to it again
        kwargs.update(past_key_values=None, use_cache=False)
        _say_once(f"{type(module).__name__}: no cache is kept under gradient checkpointing")
    return module._gradient_checkpointing_func(functools.partial(run, **kwargs), hidden_states)


def _whole_layer(
    module: nn.Module, hidden_states: torch.Tensor, *, family: Family, impl: str, **kwargs: Any
) -> torch.Tensor:
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
    rows = kwargs.get("kunbr_rows")
    hidden_states = hidden_states if rows is None else take(hidden_states, rows, 1)
    norm, after_mlp = getattr(module, family.sums_into), None
    if family.after is not None:
        after_attention, after_mlp = (getattr(module, name) for name in family.after)
        attended = after_attention(attended)
    normed, residual = _sum_norm(norm, attended, hidden_states, family, impl)
    out = module.mlp(normed)
    return residual + (out if after_mlp is None else after_mlp(out))


def _consists_of(module: nn.Module, names: set[str]) -> bool:
    """Whether it has these children, and no other that computes with weights (of a later release of transformers)."""
    children = dict(module.named_children())
    weighted = {name for name, child in children.items() if any(True for _ in child.parameters())}
    return weighted <= names <= set(children)


def _fused_forward(module: nn.Module, impl: str) -> functools.partial | None:
    """The forward to put into a module, None where it keeps its own."""
    name, role = identify(module)
    if name is None or "forward" in module.__dict__:  # some other tool's, such as Accelerate's offloading
        return None
    family = FAMILIES[name]
    common = dict(family=family, impl=impl)
    if role == "RMSNorm":
        return functools.partial(_norm, module, **common)
    if role == "MLP":
        needed = {"down_proj", family.act} | ({"gate_up_proj"} if family.packed else {"gate_proj", "up_proj"})
        gated = _activation(getattr(module, family.act, None))
        return (
            functools.partial(_mlp, module, **common, gated=gated) if gated and _consists_of(module, needed) else None
        )
    if role in ("Attention", "DecoderLayer") and compat.ALL_ATTENTION_FUNCTIONS is None:
        return None  # transformers 4.45: norms and MLPs only
    if role == "Attention":
        needed = {"o_proj"} | ({"qkv_proj"} if family.packed else {"q_proj", "k_proj", "v_proj"})
        needed |= {"q_norm", "k_norm"} if family.qk_norm else set()
        eager = importlib.import_module(type(module).__module__).eager_attention_forward
        return functools.partial(_attention, module, **common, eager=eager) if _consists_of(module, needed) else None
    if role == "DecoderLayer" and family.sums_into is not None:
        forward = functools.partial(_layer, module, **common)
        forward.takes_rows = _fused_forward(module.self_attn, impl) is not None  # see Decoder.run
        return forward
    return None


class OnceItPays:
    """A module's fused forward, from so many tokens of a call on; before, its own. In a CUDA graph and under
    torch.compile, where the host's time does not count, always the fused one."""

    def __init__(self, fused: functools.partial, module: nn.Module, tokens: int):
        self.fused, self.module, self.tokens = fused, module, tokens
        self.called = {"own": False, "fused": False}
        self.func, self.takes_rows = fused.func, getattr(fused, "takes_rows", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        few = x.shape[:-1][:2].numel() < self.tokens  # (B, T, D), (B, T, heads, d), or (T, D)
        free = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        own = few and not free and "kunbr_rows" not in kwargs
        if not torch.compiler.is_compiling():
            self.called["own" if own else "fused"] = True
        if own:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.fused(*args, **kwargs)


# ---------------------------------------------------------------- in and out


def _set(changes: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute; `changes` puts back what it was."""
    if isinstance(owner, nn.Module) and name not in owner.__dict__:  # a class attribute, such as `forward`
        changes.callback(owner.__dict__.pop, name, None)
    else:
        changes.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, found as `Decoder` finds them, but without its demands on what they are."""
    modules = uncompiled(model).modules()
    owner = next((module for module in modules if hasattr(getattr(module, "config", None), "get_text_config")), None)
    if owner is None:
        raise ValueError(f"{type(model).__name__} holds no Hugging Face model: no module in it has a model's config")
    return layer_list(model, owner.config.get_text_config().num_hidden_layers, type(owner).__name__)[1]


def _tell_of_thawed(outside: list[tuple[str, nn.Parameter]], block: range) -> None:
    """Whoever switches adapters inside (PEFT's set_adapter: TRL's DPO does, for its reference) has them all train."""
    thawed = [name for name, parameter in outside if parameter.requires_grad]
    if thawed:
        logger.warning(
            "%s and %d more parameters outside the active block were set to require grad in kf.patched, and may have "
            "been trained: put adapters into the block alone, LoraConfig(layers_to_transform=%s)",
            thawed[0],
            len(thawed) - 1,
            list(block),
        )


def _ends_backward(model: nn.Module, layer: nn.Module) -> Any:
    """A hook: gradients end at the input of `layer`, below which nothing trains, where they go on only because PEFT and
    gradient checkpointing have the embeddings' output require grad. It still does: reentrant checkpointing needs that.
    """

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling():  # whose graphs know no grad_fn: it goes on
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.grad_fn is None:
            return None
        if not any(getattr(module, "_require_grads_hook", None) is not None for module in model.modules()):
            return None
        hidden = hidden.detach().requires_grad_()
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return layer.register_forward_pre_hook(cut, with_kwargs=True)


@contextlib.contextmanager
def patched(model: nn.Module, active_block: range | None = None, impl: str = "auto") -> Iterator[nn.Module]:
    """Inside, the model's decoder runs fused layers, and only the layers of `active_block` can train.

        with kf.patched(model, active_block=range(8, 12)):
            trainer.train()

    model: a Hugging Face causal language model, or a wrapper of one (PEFT, torch.compile). Yields it. Same logits and
    gradients as the model's own code, up to rounding; an fp64 model's norms keep their own code (fp32 inside).
    active_block: the parameters of all other layers, embeddings, final norm and head do not require grad inside;
    those within keep their flags, so what is frozen there stays frozen. The backward pass ends at the block, also where
    PEFT or gradient checkpointing have the embeddings' output require grad. None: no flag is changed.
    impl: "auto", "triton" or "torch", as everywhere; the choice is that of each fused operation. On a GPU "auto" runs a
    layer's own code where a call has so few tokens that launches, not products, are what takes the time (`WORTH`).

    On exit, also by an exception: forward methods, the frozen parameters' requires_grad and all modules' train/eval
    flags are as they were; weights, buffers, gradients and hooks are never touched. A deep copy made inside keeps the
    fused forwards.

    Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3, OLMo-2, Gemma-2 and Gemma-3 (text) have fused layers. Any other model
    keeps its own layers, frozen or not, and this says so once per class (a warning of this module's logger).

    Errors: RuntimeError if the model is patched already; ValueError for a block that is no range of its layers, or has
    weights that are offloaded (no gradient would reach them), and for a model without a list of layers;
    `dispatch.Unavailable` for an impl that cannot run here.
    """
    with _patched(model, active_block, impl, spare=True):
        yield model


@contextlib.contextmanager
def _patched(model: nn.Module, active_block: range | None, impl: str, spare: bool) -> Iterator[None]:
    """spare: on a GPU "auto" runs a layer's own code where that is faster (`OnceItPays`)."""
    if impl not in ("auto", *dispatch.IMPLEMENTATIONS):
        raise ValueError(f"unknown impl {impl!r}: expected one of auto, {', '.join(dispatch.IMPLEMENTATIONS)}")
    layers = _layers(model)
    if active_block is not None:
        for index in check_block(active_block, len(layers)):
            present(layers[index], f"layer {index} of {type(model).__name__}")
    if MARK in layers.__dict__:
        raise RuntimeError(f"this model is inside {layers.__dict__[MARK]} already: leave that one first")
    first = next(layers.parameters())
    ensure_proven(first.device, {first.dtype}, impl)
    with same_modes(model), contextlib.ExitStack() as changes:
        _set(changes, layers, MARK, f"patched({type(model).__name__}, active_block={active_block!r}, impl={impl!r})")
        if active_block is not None:
            inside = {id(p) for index in active_block for p in layers[index].parameters()}
            outside = [(name, p) for name, p in model.named_parameters() if id(p) not in inside]
            for _, parameter in outside:
                _set(changes, parameter, "requires_grad", False)
            changes.callback(_tell_of_thawed, outside, active_block)
            changes.callback(_ends_backward(model, layers[active_block.start]).remove)
            logger.info(
                "layers %d to %d of %d train: about %.2f of the FLOPs of training every layer",
                active_block.start, active_block.stop - 1, len(layers), _share(active_block, len(layers)),
            )  # fmt: skip
        _fuse(model, layers, changes, impl, _worth(layers[0]) if spare and impl == "auto" and first.is_cuda else 0)
        yield


def _share(block: range, layers: int) -> float:
    """FLOPs of a step that trains a block, over one that trains all layers: every layer's forward pass, gradients of
    the inputs from the block on, and of the block's weights."""
    return (layers + (layers - block.start) + len(block)) / (3 * layers)


def left_alone(model: nn.Module) -> str | None:
    """Why no fused layer has run in a patched model: None where some have, or may have in compiled code."""
    forwards = [found for module in _layers(model).modules() if (found := module.__dict__.get("forward")) is not None]
    if not forwards:
        return "no fused forwards for this model"
    if all(isinstance(f, OnceItPays) and f.called == {"own": True, "fused": False} for f in forwards):
        return f"calls of fewer than {forwards[0].tokens} tokens, where a layer's own code is faster"
    return None


def _worth(layer: nn.Module) -> int:
    """The tokens of a call, from which on the layer is fused."""
    return math.ceil(WORTH / sum(parameter.numel() for parameter in layer.parameters()))


def _fuse(model: nn.Module, layers: nn.ModuleList, changes: contextlib.ExitStack, impl: str, tokens: int) -> None:
    """tokens: of a call, from which on modules run fused."""
    kinds = {type(layer).__name__: identify(layer) for layer in layers}
    unknown = [name for name, (family, role) in kinds.items() if family is None or role != "DecoderLayer"]
    for name in unknown:
        _say_once(
            f"{name}: no fused layers for this type of layer; it runs its own code (and frozen layers stay frozen)"
        )
    if unknown:
        return
    for operation in ("rms_norm", "swiglu", "geglu", "rotary"):
        dispatch.resolve(operation, impl, next(layers.parameters()).device)
    count = 0
    for module in model.modules():
        forward = _fused_forward(module, impl)
        if forward is not None:
            _set(changes, module, "forward", OnceItPays(forward, module, tokens) if tokens else forward)
            count += 1
    if not count:
        _say_once(
            f"{type(layers[0]).__name__}: nothing is fused; another tool has put its own forward into the modules"
        )


def fused(model: nn.Module, impl: str, spare: bool = False) -> contextlib.AbstractContextManager:
    """`patched(model, impl=impl)`, with every call fused unless `spare`; or nothing where the model is patched
    already."""
    return contextlib.nullcontext() if MARK in _layers(model).__dict__ else _patched(model, None, impl, spare)
