"""MLP value vectors beside those of the original: what unlearning has changed in them.

An MLP's output is a sum over its hidden units i of (activation of i) * v_i (Geva et al., arXiv 2012.14913). The v_i,
the columns of the down projection, hold what is written to the residual stream. Source: Hong et al., "Intrinsic Test of
Unlearning Using Parametric Knowledge Traces", arXiv 2406.11614: methods that leave them as they were hide a concept and
do not erase it. There the vectors of a concept are located first; here all of a layer are compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.density.roles import in_attention
from kunbr_fast.files.models import load_model
from kunbr_fast.model import compat
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of

AT_ONCE = 1 << 24  # elements that are compared together: of fp64 copies 128 MiB each
# A down projection's parameter: "...down_proj.weight", of stacked experts "...down_proj".
_DOWN = re.compile(
    r"(^|\.)(down_proj|proj_down|c_proj|fc2|fc_out|dense_4h_to_h|w2|Wo|w_out|output_linear|layer_2|output\.dense"
    r"|feed_forward\.(output|value)|ffn\.2)(\.weight)?$"
)


@dataclasses.dataclass(frozen=True)
class ValueVectors:
    """Cosine similarities of value vectors with the original's, by layer. layers: those that have an MLP. mean,
    smallest: over a layer's vectors. number: of vectors, in all layers."""

    layers: list[int]
    mean: list[float]
    smallest: list[float]
    number: int


@dataclasses.dataclass(frozen=True)
class Values:
    """A parameter that holds value vectors. rows: they are its last dimension, else the one before."""

    name: str
    layer: int
    rows: bool


def _opened(source: Source, dtype: str | None) -> nn.Module:
    """Of a folder nothing is in memory but what is compared, unless its architecture cannot be streamed."""
    if isinstance(source, nn.Module):
        return source
    try:
        return open_streamed(source, "cpu", dtype)
    except ValueError:
        return load_model(source, dtype)


def value_parameters(model: nn.Module) -> Iterator[Values]:
    """The down projections of a model's MLPs, experts' too, by layer: matrices outside of attention that are called so
    and give the hidden size. Of a parameter that several layers share each layer's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    for number, layer in enumerate(find_layers(model)[1]):
        for path, module in layer.named_modules():
            if "norm" in path or in_attention(layer, path):
                continue
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.dim() > 1 and _DOWN.search(name):
                    out = next((axis for axis in _axes(module) if parameter.shape[axis] == width), None)
                    if out is not None:
                        yield Values(names[id(parameter)], number, rows=out == -1)


def _axes(module: nn.Module) -> tuple[int, ...]:
    """Which axis of a matrix may be that of what the module gives."""
    if isinstance(module, nn.Linear):
        return (-2,)
    return (-1,) if isinstance(module, compat.Conv1D) or getattr(module, "is_transposed", False) else (-2, -1)


Source = nn.Module | str | Path


@torch.no_grad()
def compare_values(
    model: Source, original: Source, dtype: str | None = None, progress: str | None = None
) -> ValueVectors | None:
    """Of two models of one architecture, or their folders, a parameter at a time; in fp64. A vector that is zero in
    both has a cosine of 1, in one of them 0. None where no MLP's value vectors are known (a state-space model).

    dtype: that folders are read in, as of `load_model`. progress: label of a bar. ValueError where the models have
    other parameters.
    """
    model, original = (_opened(source, dtype) for source in (model, original))
    ours, theirs = weights_of(model), weights_of(original)
    found: dict[int, list[torch.Tensor]] = {}
    for values in tqdm(list(value_parameters(model)), desc=progress, leave=False, disable=progress is None):
        if values.name not in theirs or theirs[values.name].shape != ours[values.name].shape:
            raise ValueError(
                f"{values.name}: the original has none of this shape: give the model that this one was made of"
            )
        pair = (_matrices(weights[values.name], values.rows) for weights in (ours, theirs))
        found.setdefault(values.layer, []).extend(_cosines(a, b) for a, b in zip(*pair))
    if not found:
        return None
    joined = {layer: torch.cat(parts) for layer, parts in sorted(found.items())}
    return ValueVectors(
        list(joined),
        [float(x.mean()) for x in joined.values()],
        [float(x.min()) for x in joined.values()],
        sum(map(len, joined.values())),
    )


def _matrices(parameter: torch.Tensor, rows: bool) -> list[torch.Tensor]:
    """(number, D) of each expert, or the one: views."""
    vectors = parameter if rows else parameter.mT
    return [vectors] if vectors.dim() == 2 else list(vectors.flatten(0, -3))


def _cosines(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """(number,) float64, on the CPU."""
    at_once = max(1, AT_ONCE // ours.shape[1])
    pieces = zip(ours.split(at_once), theirs.split(at_once))
    return torch.cat([_cosine(a.double(), b.to(a.device).double()).cpu() for a, b in pieces])


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    sizes = a.norm(dim=1) * b.norm(dim=1)
    equal = (a == b).all(1)
    return torch.where(equal, 1.0, torch.where(sizes > 0, (a * b).sum(1) / sizes, 0.0))
