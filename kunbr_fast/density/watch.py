"""Which parameters of the decoder's layers are watched, and which of their output rows are sampled."""

from __future__ import annotations

import torch
from torch import nn

from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import LAYER_KINDS, Tiles, Watched
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.low_precision import check_exact
from kunbr_fast.model.ownership import WITHOUT, adapters
from kunbr_fast.model.weights import other_names, owners
from kunbr_fast.values import SEED, check

MODULES = ("mlp", "attention", "norms", "all")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


def wanted(modules: str, inner_path: str, parameter: nn.Parameter) -> bool:
    """Whether `modules` names the parameter at `inner_path` (relative to its layer)."""
    if modules == "all":
        return True
    bias = inner_path.endswith("bias")
    if parameter.dim() < 2 or bias:  # the biases of stacked experts have two dimensions
        return modules == "norms" and not bias
    attention = inner_path.split(".")[0] in _ATTENTION_NAMES
    return attention if modules == "attention" else modules == "mlp" and not attention


def watch_list(decoder: Decoder, modules: str) -> list[Watched]:
    """The modules of all layers that have parameters of `modules` (of MODULES).

    Errors: ValueError with the module's path for one of no known kind or with an adapter, a tied weight, or a plain
    layer inside experts; RuntimeError inside `low_precision_cover`.
    """
    check_exact(decoder, "density and attribution")
    uses = owners(decoder.model)
    watched: list[Watched] = []
    for index, layer in enumerate(decoder.layers):
        mixtures = [name for name, module in layer.named_modules() if experts.is_experts(module)]
        adapted = adapters(layer)
        for inner, module in layer.named_modules():
            own = {
                name: p
                for name, p in module.named_parameters(recurse=False)
                if wanted(modules, f"{inner}.{name}".lstrip("."), p)
            }
            if not own:
                continue
            path = f"{decoder.layer_path(index)}.{inner}".rstrip(".")
            around = [adapter for at, adapter in adapted.items() if at in ("", inner) or inner.startswith(f"{at}.")]
            if around:
                raise ValueError(
                    f"{path} belongs to a PEFT adapter ({type(around[0]).__name__}), and a model's own weights are "
                    f"measured: {WITHOUT}, or choose other modules"
                )
            for name, parameter in own.items():
                if others := other_names(uses, parameter, f"{path}.{name}"):
                    raise ValueError(f"{path}.{name} is tied to {others}: its gradient belongs to more than one layer")
            kind = next((k for k in LAYER_KINDS.values() if k.matches(module)), None)
            if kind is None:
                raise ValueError(
                    f"{path}: {type(module).__name__} is of no known kind (known: {', '.join(LAYER_KINDS)}); "
                    "add it to kunbr_fast.density.layer_kinds.LAYER_KINDS or choose other modules"
                )
            number = module.num_experts if inner in mixtures else None
            watched.append(Watched(module, kind, path, index, tuple(own), number))
            if any(inner.startswith(f"{name}.") for name in mixtures):
                raise ValueError(
                    f"{path}: {type(module).__name__} runs on the rows of experts, which do not stand in the order of "
                    "the tokens: choose other modules"
                )
    if not watched:
        raise ValueError(f"{decoder.name}: no layer has parameters of modules={modules!r}")
    return watched


def choose_tiles(watched: list[Watched], fraction: float, seed: int, device: torch.device) -> dict[str, Tiles]:
    """{weight's path: its sampled tiles}, about `fraction` of each matrix that can be sampled."""
    generator = torch.Generator().manual_seed(check("sample_seed", seed, SEED))
    return {
        f"{item.path}.{name}": Tiles.choose(out_features, item.experts or 1, fraction, generator, device)
        for item in watched
        for name, out_features in item.kind.out_features(item.module).items()
        if name in item.parameters
    }


def num_weights(decoder: Decoder, watched: list[Watched]) -> torch.Tensor:
    """(H,) int64: how many weights are watched in each layer."""
    out = torch.zeros(decoder.num_layers, dtype=torch.int64)
    for item in watched:
        out[item.layer] += sum(getattr(item.module, parameter).numel() for parameter in item.parameters)
    return out
