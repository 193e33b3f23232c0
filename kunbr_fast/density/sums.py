"""Sums over samples of what the passes measure, on the CPU."""

from __future__ import annotations

import math

import torch

from kunbr_fast.density.layer_kinds import How, Watched
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.weights import check_finite
from kunbr_fast.parallel.group import Group


class Sums:
    """Of each matrix's statistic, of each layer's, and of each sampled tile's."""

    def __init__(self, decoder: Decoder, watched: list[Watched], how: How, statistic: str):
        self._decoder, self._watched, self._how, self._statistic = decoder, watched, how, statistic
        matrices = [(item.layer, name) for item in watched for names in item.names.values() for name in names]
        layers, self._names = zip(*matrices)
        self._layer = torch.tensor(layers)
        self._per_module = torch.zeros(len(layers), dtype=torch.float64)
        self._per_layer = torch.zeros(decoder.num_layers, dtype=torch.float64)
        self._tiles: dict[str, torch.Tensor] = {}

    def add(self, found: dict[str, torch.Tensor], factor: float) -> None:
        """found: {path: values as `LayerKind.values` has them}, of gradients still to be multiplied by `factor`."""
        factor = factor**2 if self._how.statistic == "grad_l2sq" else factor
        num_samples = next((values.shape[-1] for values in found.values()), 1)
        rows = []
        for item in self._watched:
            for path in item.names:
                values = found.get(path)
                if values is None:  # a module that never ran, or that the loss does not depend on
                    rows.append(torch.zeros(item.experts or 1, num_samples, dtype=torch.float64))
                    continue
                values = values * factor
                if path in self._how.tiles:
                    totals = values.sum(2).cpu()
                    self._tiles[path] = self._tiles[path].add_(totals) if path in self._tiles else totals
                    values = values.sum(1) * self._how.tiles[path].scale
                rows.append(values)
        values = torch.cat([row.to(self._decoder.device) for row in rows]).cpu()  # one copy from the device
        by_layer = torch.zeros(self._decoder.num_layers, num_samples, dtype=torch.float64)
        if self._statistic == "grad_linf":
            by_layer.scatter_reduce_(0, self._layer[:, None].expand_as(values), values, "amax")
        else:
            by_layer.index_add_(0, self._layer, values)
        if self._statistic == "grad_l2":
            values, by_layer = values.sqrt(), by_layer.sqrt()
        self._per_module += values.sum(1)
        self._per_layer += by_layer.sum(1)

    def gather(self, group: Group) -> None:
        """Afterwards every process has the sums over all processes' samples: one all-reduce of a few numbers."""
        if group.size == 1:
            return
        for path, tiles in self._how.tiles.items():
            none = torch.zeros(tiles.rows.shape[:2], dtype=torch.float64)
            self._tiles[path] = self._tiles.get(path, none).double()
        parts = [self._per_module, self._per_layer, *(self._tiles[path] for path in self._how.tiles)]
        flat = torch.cat([part.flatten() for part in parts])
        group.sum([flat])
        for part, value in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(value.view(part.shape))

    def means(self, count: int) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
        """Means over `count` of each layer and matrix, and each layer's variance by the choice of tiles."""
        per_module = dict(zip(self._names, (self._per_module / count).tolist()))
        check_values(self._decoder, per_module)
        variance = torch.zeros(self._decoder.num_layers, dtype=torch.float64)
        for item in self._watched:
            for path in item.names:
                if path in self._tiles:
                    variance[item.layer] += self._how.tiles[path].variance(self._tiles[path] / count).sum()
        return self._per_layer / count, per_module, variance


def check_values(decoder: Decoder, per_module: dict[str, float]) -> None:
    """ValueError for a value that is not finite; it names the weight that is not, if there is one."""
    for path, value in per_module.items():
        if not value < math.inf:
            check_finite(decoder.model)
            raise ValueError(f"{path}: its gradient is not finite although all weights are: try a wider dtype")
