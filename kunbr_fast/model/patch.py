"""`patched(model, active_block)`: fused layers inside a Hugging Face decoder, and everything but one block frozen.

What is replaced is the `forward` of single modules, chosen by their type, on the instance (fused_forwards.py).

On a GPU a launch of ours costs the host more than one of torch's: where a layer's products are short, its own code is
faster (`WORTH`), and in a user's own loop it is what runs (`OnceItPays`).

What undoes a change, of `forward` or of requires_grad, is put on one stack before it is made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kunbr_fast.kernels import dispatch
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.families import FAMILIES, identify
from kunbr_fast.model.frozen import same_modes
from kunbr_fast.model.fused_forwards import fused_forward, say_once
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.ownership import present, uncompiled
from kunbr_fast.proofs import ensure_proven

logger = logging.getLogger(__name__)
MARK = "_kunbr_patched"  # on the list of layers: the call that patched them
# A layer's weights times the tokens of a call, from which on fused layers are faster than its own code, launched one by
# one: on an H100, Llama-3.2-1B's and Llama-3-8B's layers (benchmarks/results/fused_layers_h100.csv).
WORTH = 4e11


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


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, found as `Decoder` finds them, but without its demands on what they are."""
    modules = uncompiled(model).modules()
    owner = next((module for module in modules if hasattr(getattr(module, "config", None), "get_text_config")), None)
    if owner is None:
        raise ValueError(f"{type(model).__name__} holds no Hugging Face model: no module in it has a model's config")
    return find_layers(owner)[1]


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

    docs/fused_layers.md lists the models that have fused layers, and what of each is fused. Any other model keeps its
    own layers, frozen or not, and this says so once per class (a warning of this module's logger).

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
    """The tokens of a call, from which on the layer is fused. Stacked experts do not count: a token sees few."""
    return math.ceil(WORTH / sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() < 3))


def _fuse(model: nn.Module, layers: nn.ModuleList, changes: contextlib.ExitStack, impl: str, tokens: int) -> None:
    """tokens: of a call, from which on modules run fused."""
    kinds = {type(layer).__name__: identify(layer)[0] for layer in layers}
    unknown = [name for name, family in kinds.items() if family is None]
    for name in unknown:
        say_once(
            f"{name}: no fused layers for this type of layer; it runs its own code (and frozen layers stay frozen)"
        )
    if unknown:
        return
    for operation in ("rms_norm", "layer_norm", "swiglu", "geglu", "rotary"):
        dispatch.resolve(operation, impl, next(layers.parameters()).device)
    count, family = 0, FAMILIES[kinds[type(layers[0]).__name__]]
    for module in model.modules():
        forward = fused_forward(module, impl, family)
        if forward is not None:
            _set(changes, module, "forward", OnceItPays(forward, module, tokens) if tokens else forward)
            count += 1
    if not count:
        say_once(f"{type(layers[0]).__name__}: nothing is fused; another tool has put its own forward into the modules")


def fused(model: nn.Module, impl: str, spare: bool = False) -> contextlib.AbstractContextManager:
    """`patched(model, impl=impl)`, with every call fused unless `spare`; or nothing where the model is patched
    already."""
    return contextlib.nullcontext() if MARK in _layers(model).__dict__ else _patched(model, None, impl, spare)
