"""What a user's model must be, before anything is computed with it or trained in it.

`whole`: its weights are in memory, all on one device, as plain floating-point numbers. Every `Decoder` asks for that,
so density, attribution, the attack and all training do.

`trainable`: what a call would train may be trained, and what is saved of the model is what was trained: it has no
adapter (PEFT saves that alone, and has frozen the rest), and no weight that the call changes is frozen by its owner. A
model of which every weight is frozen is no exception. `kf.unlearn`, `KUnBRTrainer`, `kf.reinserted` and `DEEP_UNL` ask
for that. Measuring changes no weight, so frozen ones are measured, beside adapters too, but no module that has one; the
attack puts all weights back.

Errors are ValueErrors in one line, with the cure. Nothing is imported for this: a package's classes are known by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.files.shards import MASK, PACKED
from kunbr_fast.files.shown import shown
from kunbr_fast.model.frozen import constants, owners_flag
from kunbr_fast.model.weights import weights_of

QUANTISERS = (
    "bitsandbytes", "torchao", "hqq", "quanto", "optimum.quanto", "awq", "auto_gptq", "gptqmodel", "aqlm", "eetq",
    "vptq", "auto_round", "compressed_tensors",
)  # fmt: skip
COMPILED = ("torch.OptimizedModule",)
SHARDED = ("torch.FullyShardedDataParallel", "torch.FSDPModule", "torch.DTensor")
WRAPPERS = ("torch.DataParallel", "torch.DistributedDataParallel", "deepspeed.DeepSpeedEngine")
WITHOUT = "merge it first (model = model.merge_and_unload()), or load the model without it"
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _is(thing: object, names: Sequence[str]) -> bool:
    """Whether it is of one of these classes, each named by its package and its own name."""
    return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in names for kind in type(thing).__mro__)


def _is_from(thing: object, packages: Sequence[str]) -> bool:
    """Whether its class, or one that this is made of, comes from one of these packages."""
    kinds = [f"{kind.__module__}." for kind in type(thing).__mro__]
    return any(kind.startswith(f"{package}.") for kind in kinds for package in packages)


def uncompiled(model: nn.Module, what: str = "the model") -> nn.Module:
    """The model inside torch.compile's wrapper, which has the same parameters under other names; else the model.
    ValueError for what is none; what: its name there."""
    if not isinstance(model, nn.Module):
        load = f"AutoModelForCausalLM.from_pretrained({shown(str(model))})"
        cure = f"load it first: {load}" if isinstance(model, (str, Path)) else "a model of transformers, say"
        raise ValueError(f"{what}: got {shown(model)}, expected a torch.nn.Module: {cure}")
    return model._orig_mod if _is(model, COMPILED) else model


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@torch.no_grad()
def bare_product(linear: nn.Linear, name: str) -> None:
    """ValueError where hooks, or a forward of its own, make the head more than its product: losses read its weight."""
    if linear._backward_hooks or linear._backward_pre_hooks:
        raise ValueError(f"{name}: its head has a backward hook, which losses here do not run: remove it")
    if has_hooks(linear) or "forward" in linear.__dict__:
        x = torch.linspace(-1, 1, 2 * linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
        x = x.view(2, -1)
        if not torch.equal(linear(x), F.linear(x, linear.weight, linear.bias)):
            raise ValueError(
                f"{name}: a hook on its head, or a forward put into it, changes the logits, and losses here read the "
                "head's weight alone: remove it"
            )


# ---------------------------------------------------------------- in memory, whole


def whole(model: nn.Module, whose: str = "") -> None:
    """ValueError where the model's weights are not all in memory as they are. A streamed model's layers count as that.

    whose: goes before the model's name in an error, such as "the unlearned model's ".
    """
    name = f"{whose}{type(model).__name__}"
    if _is(model, WRAPPERS):
        raise ValueError(f"{name} is a wrapper for several devices: give the model inside it (model.module)")
    parameters = dict(model.named_parameters())
    _undivided(model, parameters, name)
    present(model, name)
    _unquantised(model, parameters, name)
    devices: dict[str, str] = {}
    for path, parameter in parameters.items():
        devices.setdefault(str(parameter.device), path)
    if len(devices) > 1:
        where = ", ".join(f"{path} on {device}" for device, path in devices.items())
        raise ValueError(
            f"{name} lies on {len(devices)} devices ({where}), by device_map for example: load it whole on one device, "
            "or stream it from its folder (open_streamed, --stream)"
        )


def present(model: nn.Module, name: str) -> None:
    """ValueError for weights without data, of a model or a module that an error calls `name`."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    absent = [path for path, tensor in tensors.items() if tensor.is_meta]
    if absent:
        hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        why = "is offloaded by Accelerate (device_map, cpu_offload, disk_offload)" if hooked else "has no weights"
        raise ValueError(
            f"{name} {why}: {absent[0]} is on the meta device, without data ({len(absent)} of {len(tensors)} are): "
            "load it whole into memory, or stream it from its folder (open_streamed, --stream)"
        )


def _undivided(model: nn.Module, parameters: Mapping[str, nn.Parameter], name: str) -> None:
    found = ["tp_plan"] if (getattr(model, "_tp_size", None) or 1) > 1 else []
    found += [type(module).__name__ for module in model.modules() if _is(module, SHARDED)]
    found += [f"{path} is a {type(p).__name__}" for path, p in parameters.items() if _is(p, SHARDED)]
    found += [f"{path} is DeepSpeed ZeRO-3's" for path, p in parameters.items() if hasattr(p, "ds_id")]
    if found:
        raise ValueError(
            f"{name} is in parts on several processes ({found[0]}), and each needs the whole model: load it without "
            "FSDP, DeepSpeed ZeRO-3 or tensor parallelism"
        )


def _unquantised(model: nn.Module, parameters: Mapping[str, nn.Parameter], name: str) -> None:
    found = [
        f"{path} is {str(tensor.dtype).removeprefix('torch.')} in a {type(tensor).__name__}"
        for path, tensor in parameters.items()
        if tensor.dtype not in PLAIN or _is_from(tensor, QUANTISERS)
    ]
    buffers = dict(_saved_buffers(model))
    found += [
        f"{path} is {str(tensor.dtype).removeprefix('torch.')}"
        for path, tensor in buffers.items()
        if tensor.dtype not in PLAIN and (PACKED.search(path) or _is_packed(path, tensor))
    ]
    found += [f"{path} is a {type(m).__name__}" for path, m in model.named_modules() if _is_from(m, QUANTISERS)]
    if found:
        raise ValueError(
            f"{name} is quantised ({found[0]}): load it in bfloat16 or float32, without quantization_config"
        )
    for path, tensor in buffers.items():
        if tensor.dim() > 1 and path.endswith("weight"):
            raise ValueError(
                f"{path} of {name} is a buffer, which has no gradient: it is to be an nn.Parameter, or load the model "
                "without what has put it there"
            )


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that are saved with the model: weights are, masks and tables that are made again are not."""
    for path, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), tensor


def _is_packed(path: str, tensor: torch.Tensor) -> bool:
    """Whether it is a matrix of a type that weights are packed in; ids are int64."""
    small = tensor.dtype not in (torch.bool, torch.int64) and not tensor.is_complex()
    return small and tensor.dim() > 1 and not MASK.search(path)


def check_data(name: str, tensor: torch.Tensor) -> None:
    """ValueError for a tensor on the meta device, in a mapping of weights."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, without data: load the weights whole into memory")


# ---------------------------------------------------------------- to be trained, or differentiated


def differentiable(model: nn.Module) -> None:
    """ValueError for weights that autograd does not take."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, and has no gradients: load the model outside of it"
            )
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            _reached(module, path)


def _reached(linear: nn.Linear, path: str) -> None:
    """ValueError where a subclass of nn.Linear computes with something else than its weight, an int8 copy say."""
    weight = nn.Parameter(linear.weight.detach())
    x = torch.linspace(-1, 1, 2 * weight.shape[-1], dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    twin = copy.copy(linear)
    twin._parameters = {**linear._parameters, "weight": weight}
    try:
        with torch.enable_grad():
            y = twin.forward(x)
            if not isinstance(y, torch.Tensor):  # a router
                return
            reached = y.requires_grad and torch.autograd.grad(y.sum(), weight, allow_unused=True)[0] is not None
    except TypeError:  # it takes more than one tensor
        return
    except RuntimeError:
        reached = False
    if not reached:
        raise ValueError(
            f"{path}: {type(linear).__name__} gives its weight no gradient, as quantised layers do: load the model "
            "in bfloat16 or float32, without them"
        )


def adapters(module: nn.Module) -> dict[str, nn.Module]:
    """The adapters in it by path, PEFT's or such that transformers has put in (`add_adapter`), and what wraps them."""
    return {path: inner for path, inner in module.named_modules() if _is_from(inner, ("peft",))}


@contextlib.contextmanager
def naming_adapters(model: nn.Module) -> Iterator[None]:
    """Adds the cure to a ValueError inside if the model has an adapter: of some kinds the model around it differs."""
    try:
        yield
    except ValueError as error:
        if not (found := adapters(model)):
            raise
        kind = type(next(iter(found.values()))).__name__
        raise ValueError(f"{error}; it has a PEFT adapter ({kind}): {WITHOUT}") from error


def no_adapter(model: nn.Module, call: str, whose: str = "this model") -> None:
    """ValueError for a model with `adapters`."""
    for path, module in adapters(model).items():
        raise ValueError(
            f"{call} trains a model's own weights, and {whose} has a PEFT adapter ({type(module).__name__}"
            f"{f' at {path}' if path else ''}), which is saved without them: merge it first (model = "
            "model.merge_and_unload().requires_grad_(True)), or load the model without it"
        )


def not_frozen(parameters: Mapping[str, torch.Tensor], call: str, whose: str = "model") -> None:
    """ValueError where one of the parameters that `call` changes does not require grad."""
    frozen = [name for name, parameter in parameters.items() if not owners_flag(parameter)]
    if frozen:
        raise ValueError(
            f"{call} trains {frozen[0]}, which is frozen (requires_grad is False of {len(frozen)} of "
            f"{len(parameters)} parameters): if they may change, call {whose}.requires_grad_(True) first"
        )


def trainable(model: nn.Module, call: str) -> None:
    """ValueError where `call` may not train all weights of the model. A streamed model's are its files'."""
    no_adapter(model, call)
    whole(model)
    differentiable(model)
    if not weights_of(model).streamed:
        own = constants(model)
        not_frozen({name: p for name, p in model.named_parameters() if name not in own}, call)
