"""Which parameters of the decoder's layers are watched, and which of their output rows are sampled."""

from __future__ import annotations

import torch

from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import BY_AUTOGRAD, LAYER_KINDS, Tiles, Watched
from kunbr_fast.density.roles import wanted
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.low_precision import check_exact
from kunbr_fast.model.ownership import WITHOUT, adapters
from kunbr_fast.model.weights import other_names, owners
from kunbr_fast.values import SEED, check

MODULES = ("mlp", "attention", "norms", "all")


def watch_list(decoder: Decoder, modules: str) -> list[Watched]:
    """The modules of all layers that have parameters of `modules` (of MODULES).

    One of no known kind, and one that runs on the rows of experts, which do not stand in the order of the tokens, is
    measured by autograd. Errors: ValueError with the module's path for one with an adapter, or a tied weight;
    RuntimeError inside `low_precision_cover`.
    """
    check_exact(decoder, "density and attribution")
    uses = owners(decoder.model)
    watched: list[Watched] = []
    for index, layer in enumerate(decoder.layers):
        mixtures = [name for name, module in layer.named_modules() if experts.holds_experts(name, module)]
        adapted = adapters(layer)
        for inner, module in layer.named_modules():
            own = {
                name: p for name, p in module.named_parameters(recurse=False) if wanted(modules, layer, inner, name, p)
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
            kind = next((k for k in LAYER_KINDS.values() if k.matches(module)), BY_AUTOGRAD)
            if any(inner.startswith(f"{name}.") for name in mixtures):
                kind = BY_AUTOGRAD
            watched.append(Watched(module, kind, path, index, tuple(own), experts.number_of(module)))
    if not watched:
        raise ValueError(f"{decoder.name}: no layer has parameters of modules={modules!r}: choose others (all)")
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
