"""What a parameter of a decoder layer belongs to: attention, in the wide sense of all that mixes tokens, or the MLP.

The way from the layer to the parameter decides, by its first module that says so: by its name, or where that says
nothing (`mixer`, `block`) by its class. A layer's part that holds both (a decoder layer inside a hybrid one) says
nothing. What nothing decides is outside attention, so it counts as MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_MIXING_NAME = re.compile(
    r"attn|attention|self_?att\b|mamba|ssm|conv|lstm|lru|delta_?net|kda|retention|recurrent|temporal|time_mix", re.I
)
_MLP_NAME = re.compile(r"(^|_)(mlps?|ffn?|feed_?forward|moe|(shared_)?experts?)(_|$)", re.I)
_MIXING_CLASS = re.compile(
    r"Attention|Attn|Mamba|SSM|Conv(?!1D)|LSTM|Lru|DeltaNet|KDA|Retention|Recurrent|Lightning|TimeMix"
)  # a Conv1D of transformers is a linear layer
_MLP_CLASS = re.compile(r"M(LP|lp)|MoE|Moe|FFN|FeedForward|Expert")
_HOLDS_BOTH = re.compile(r"(Layer|Block)$")
_NORM = re.compile(r"Norm(Gated)?$")


def _way(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules from below the layer to the one at `path`, each with its name."""
    module = layer
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        yield name, module


def in_attention(layer: nn.Module, path: str) -> bool:
    """Whether the layer's module at `path` belongs to attention or to another module that mixes tokens."""
    for name, module in _way(layer, path):
        kind = type(module).__name__
        if _NORM.search(kind):
            continue
        if _MIXING_NAME.search(name):
            return True
        if _MLP_NAME.search(name):
            return False
        if not _HOLDS_BOTH.search(kind) and _MIXING_CLASS.search(kind):
            return True
        if not _HOLDS_BOTH.search(kind) and _MLP_CLASS.search(kind):
            return False
    return False


def wanted(modules: str, layer: nn.Module, path: str, name: str, parameter: nn.Parameter) -> bool:
    """Whether `modules` means the parameter `name` of the layer's module at `path`."""
    if modules == "all":
        return True
    if name.endswith("bias"):  # those of stacked experts have two dimensions
        return False
    if parameter.dim() < 2:
        return modules == "norms" and bool(_NORM.search(type(layer.get_submodule(path)).__name__))
    return modules == ("attention" if in_attention(layer, path) else "mlp")
