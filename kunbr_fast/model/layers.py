"""Where a model has its layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def layer_list(model: nn.Module, count: int, name: str) -> tuple[str, nn.ModuleList]:
    """The path and the list of `count` layers; ValueError, which calls the model `name`, where it is not clear."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters())
    ]
    if not found:
        raise ValueError(f"{name} has no nn.ModuleList of num_hidden_layers={count} layers: not a decoder this takes")
    depth = min(path.count(".") for path, _ in found)
    found = [item for item in found if item[0].count(".") == depth]
    if len(found) > 1:
        raise ValueError(f"{name} has several lists of {count} layers ({', '.join(p for p, _ in found)})")
    return found[0]


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """`layer_list` of a model."""
    config, name = model.config.get_text_config(), type(model).__name__
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(f"{name}: its configuration has no num_hidden_layers: not a decoder this takes")
    try:
        return layer_list(model, count, name)
    except ValueError:
        fewer = getattr(config, "num_layers", None)  # LongCat counts its layers' halves
        if not isinstance(fewer, int) or fewer == count:
            raise
        return layer_list(model, fewer, name)


def odd_types(config: Any) -> set[str]:
    """Types of layers that do not run on packed samples: chunks and the like."""
    return set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
