"""Knowledge density: how much each layer's weights would move for the forget set.

    K_l = mean over samples of || dL(sample)/dW_l ||_1          (reduction="sample", the paper's)
    K_l = || mean over samples of dL(sample)/dW_l ||_1          (reduction="mean", the norm of the mean gradient)

where L(sample) is the mean NLL over the sample's labelled tokens. Nothing is updated. For the first form no weight
gradient is ever held: a linear layer's gradient for one sample is dY_i^T X_i, formed a tile at a time from the
layer's input and the gradient of its output, inside the backward pass (`taps`, `layer_kinds`). Samples are packed, and
each one's loss stands alone in the sum, so one backward pass serves all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast import experts, losses
from kunbr_fast.atomic import write_json
from kunbr_fast.data import PackedBatch, as_samples, check_labels, pack
from kunbr_fast.decoder import Decoder, check_finite
from kunbr_fast.dispatch import resolve
from kunbr_fast.layer_kinds import LAYER_KINDS, How, Tiles, Watched, norm_of
from kunbr_fast.schedule import token_batches
from kunbr_fast.taps import Part, Segments, Taps
from kunbr_fast.training import frozen

MODULES = ("mlp", "attention", "norms", "all")
STATISTICS = ("grad_l1", "grad_l2", "grad_l2sq", "grad_linf")
SAMPLED_STATISTICS = ("grad_l1", "grad_l2sq")
REDUCTIONS = ("sample", "mean")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


# ---------------------------------------------------------------- result


@dataclasses.dataclass(frozen=True)
class Density:
    """Knowledge density of each layer, un-normalised.

    per_layer: float64 (H,), the expected norm of the gradient of the layer's weights taken together (grad_l1: nats
    per unit of weight, summed over weights); per_module: of one parameter each, by its path, such as
    "model.layers.3.mlp.up_proj.weight", or "model.layers.3.mlp.experts.down_proj[5]" for the matrix of one expert;
    num_weights: (H,) int64, how many weights each entry of per_layer is about; num_samples: how many samples the
    expectation is over. sample_fraction: of the tiles of output rows that were measured, None for all of them, and
    standard_error: float64 (H,), of per_layer as an estimate from that part (None: nothing was sampled).
    """

    per_layer: torch.Tensor
    per_module: dict[str, float]
    num_weights: torch.Tensor
    num_samples: int
    modules: str = "mlp"
    statistic: str = "grad_l1"
    reduction: str = "sample"
    sample_fraction: float | None = None
    standard_error: torch.Tensor | None = None

    @property
    def normalized(self) -> torch.Tensor:
        """(H,) float64 that sums to 1: `per_layer / per_layer.sum()`."""
        total = self.per_layer.sum()
        if not total > 0:
            raise ValueError("every layer's density is zero: the loss does not depend on these weights")
        return self.per_layer / total

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Density:
        later = {"sample_fraction": None, "standard_error": None}  # files of earlier versions do not have them
        values = {f.name: (later | values)[f.name] for f in dataclasses.fields(cls)}
        for name in ("per_layer", "standard_error"):
            if name == "per_layer" or values[name] is not None:
                values[name] = torch.tensor(values[name], dtype=torch.float64)
        values["num_weights"] = torch.tensor(values["num_weights"], dtype=torch.int64)
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Floats survive the round trip exactly."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Density:
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a density file written by Density.save ({error})") from error


# ---------------------------------------------------------------- which parameters


def _wanted(modules: str, inner_path: str, parameter: nn.Parameter) -> bool:
    """Whether `modules` names the parameter at `inner_path` (relative to its layer)."""
    if modules == "all":
        return True
    bias = inner_path.endswith("bias")
    if parameter.dim() < 2 or bias:  # the biases of stacked experts have two dimensions
        return modules == "norms" and not bias
    attention = inner_path.split(".")[0] in _ATTENTION_NAMES
    return attention if modules == "attention" else modules == "mlp" and not attention


def _watch_list(decoder: Decoder, modules: str) -> list[Watched]:
    uses: dict[int, list[str]] = {}
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    watched: list[Watched] = []
    for index, layer in enumerate(decoder.layers):
        mixtures = [name for name, module in layer.named_modules() if experts.is_experts(module)]
        for inner, module in layer.named_modules():
            own = {
                name: p
                for name, p in module.named_parameters(recurse=False)
                if _wanted(modules, f"{inner}.{name}".lstrip("."), p)
            }
            if not own:
                continue
            path = f"{decoder.layer_path(index)}.{inner}".rstrip(".")
            for name, parameter in own.items():
                if len(uses[id(parameter)]) > 1:
                    others = ", ".join(n for n in uses[id(parameter)] if n != f"{path}.{name}")
                    raise ValueError(f"{path}.{name} is tied to {others}: its gradient belongs to more than one layer")
            kind = next((k for k in LAYER_KINDS.values() if k.matches(module)), None)
            if kind is None:
                raise ValueError(
                    f"{path}: {type(module).__name__} is of no known kind (known: {', '.join(LAYER_KINDS)}); "
                    "add it to kunbr_fast.density.LAYER_KINDS or choose other modules"
                )
            if any(inner.startswith(f"{name}.") for name in mixtures):
                raise ValueError(
                    f"{path}: {type(module).__name__} runs on the rows of experts, which do not stand in the order of "
                    "the tokens: choose other modules"
                )
            number = module.num_experts if kind is LAYER_KINDS["experts"] else None
            watched.append(Watched(module, kind, path, index, tuple(own), number))
    if not watched:
        raise ValueError(f"{decoder.name}: no layer has parameters of modules={modules!r}")
    return watched


def _choose_tiles(watched: list[Watched], fraction: float, seed: int, device: torch.device) -> dict[str, Tiles]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{item.path}.{name}": Tiles.choose(out_features, item.experts or 1, fraction, generator, device)
        for item in watched
        for name, out_features in item.kind.out_features(item.module).items()
        if name in item.parameters
    }


# ---------------------------------------------------------------- the measurement


def knowledge_density(
    model: nn.Module | Decoder,
    samples: Iterable[Any],
    modules: str = "mlp",
    statistic: str = "grad_l1",
    reduction: str = "sample",
    *,
    batch_tokens: int = 2048,
    gradient_checkpointing: bool | None = None,
    sample_fraction: float | None = None,
    sample_seed: int = 0,
    impl: str = "auto",
    progress: bool = False,
) -> Density:
    """Knowledge density of every layer for `samples` (usually the forget set).

    samples: `{"input_ids": (T,), "labels": (T,)}` mappings, or padded Hugging Face batches (taken apart by their
    attention mask; a batch-mean loss plays no part: each sample's own mean NLL is differentiated).
    modules: `mlp` (weight matrices of the layer outside attention, experts and routers among them), `attention` (those
    within), `norms` (norm weights), or `all` (every parameter of the layer, biases too).
    statistic of the gradient g of a parameter, or of all the layer's parameters together: `grad_l1`, sum|g|;
    `grad_l2sq`, sum g^2; `grad_l2`, its root; `grad_linf`, max|g|.
    reduction: `sample`, the mean over samples of each one's statistic (memory does not grow with the number of
    samples); `mean`, the statistic of the mean gradient (holds one fp32 gradient of the chosen weights, and none if
    all samples fit one batch).
    batch_tokens: tokens of one packed forward and backward pass.
    gradient_checkpointing: keep only each layer's input for the backward pass and run the layer again; None: if the
    model has it enabled. The result is the same.
    sample_fraction: an unbiased estimate of grad_l1 or grad_l2sq from about this part of each matrix's output rows, in
    tiles of 16, chosen without replacement by `sample_seed`, at least two a matrix and the same for all samples; vectors
    and routers are measured whole. `standard_error` is about the choice of tiles, not about that of the samples.

    Equivalent, at H forward and backward passes' price for one sample at a time:
        for s in samples: loss(model, s).backward(); K += model.layers[l].weight.grad.abs().sum(); zero_grad()

    Leaves no gradient, hook or changed flag behind. Errors: ValueError with the module path for a module of no known
    kind, a tied weight, a sample without a labelled token, or a gradient that is not finite.
    """
    for name, value, known in (
        ("modules", modules, MODULES),
        ("statistic", statistic, STATISTICS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if sample_fraction is not None:
        if not 0 < sample_fraction <= 1:
            raise ValueError(f"sample_fraction={sample_fraction}: expected above 0 and at most 1")
        if statistic not in SAMPLED_STATISTICS:
            raise ValueError(
                f"sample_fraction with statistic={statistic!r}: only a sum over weights has an unbiased estimate from "
                f"a part of them; choose one of {', '.join(SAMPLED_STATISTICS)}"
            )
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    for operation in ("grad_density", "linear_loss"):
        resolve(operation, impl, decoder.device)
    samples = as_samples(samples)
    check_labels(samples)
    watched = _watch_list(decoder, modules)
    batches = token_batches([len(s["input_ids"]) for s in samples], batch_tokens)
    tiles = {} if sample_fraction is None else _choose_tiles(watched, sample_fraction, sample_seed, decoder.device)
    how = How("grad_l2sq" if statistic == "grad_l2" else statistic, impl, tiles)
    if gradient_checkpointing is None:
        gradient_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in decoder.model.modules())
    sums = _Sums(decoder, watched, how, statistic)
    gradients: dict[str, torch.Tensor] | None = {} if reduction == "mean" and len(batches) > 1 else None
    with (
        frozen(decoder.model),
        tqdm(total=len(samples), desc="knowledge density", unit="sample", leave=False, disable=not progress) as bar,
    ):
        experts.check(decoder, [item for item in watched if item.experts is not None])
        for indices in batches:
            batch = pack([samples[i] for i in indices]).to(decoder.device)
            found = _measure(decoder, batch, watched, how, reduction == "mean", gradients, gradient_checkpointing)
            if reduction == "sample":
                sums.add(found, 1.0)
                found.clear()
            bar.update(len(indices))
    if reduction == "mean":
        if gradients is not None:
            found = {path: _of_gradient(gradient, how, how.tiles.get(path)) for path, gradient in gradients.items()}
        sums.add(found, 1.0 / len(samples))
    count = len(samples) if reduction == "sample" else 1
    return sums.result(count, len(samples), modules, reduction, sample_fraction)


def _measure(
    decoder: Decoder,
    batch: PackedBatch,
    watched: list[Watched],
    how: How,
    whole: bool,
    gradients: dict[str, torch.Tensor] | None,
    checkpoint: bool,
) -> dict[str, torch.Tensor]:
    """One packed batch: {parameter path: values as `LayerKind.values` has them}, B its samples, or one if it is taken
    `whole`. With `gradients` the batch's gradients are added to those instead."""
    found: dict[str, torch.Tensor] = {}

    def measure(parts: list[Part]) -> None:
        kind = parts[0].item.kind
        if gradients is None:
            for part, values in zip(parts, kind.values(parts, how)):
                found.update((f"{part.item.path}.{n}", v) for n, v in values.items() if n in part.item.parameters)
            return
        for part in parts:
            for name, gradient in kind.gradient(part, how).items():
                path = f"{part.item.path}.{name}"
                if name in part.item.parameters:
                    gradients[path] = gradients[path].add_(gradient) if path in gradients else gradient

    with torch.no_grad():
        embedded = decoder.embed(batch)
    segments = Segments.of([batch.num_tokens] if whole else batch.lengths, decoder.device)
    taps = Taps(segments, batch.num_tokens, measure)
    mixtures = [item for item in watched if item.experts is not None]
    with contextlib.ExitStack() as stack:
        for item in watched:
            if item.experts is None:
                hook = item.module.register_forward_hook(taps.hook(item), with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(experts.watched(mixtures, taps, batch))
        hidden = decoder.run(batch, 0, None, embedded.requires_grad_(), checkpoint)
        taps.forward_is_over()
        rows = losses.likelihood(batch, reduction="sum")
        loss, _ = losses.linear_loss(
            decoder.final(hidden[batch.rows]), decoder.head, batch.targets, rows.weight, impl=how.impl
        )
        del hidden
        loss.backward(inputs=[embedded])
        taps.finish()
    return found


def _of_gradient(gradient: torch.Tensor, how: How, tiles: Tiles | None) -> torch.Tensor:
    """(E, ...) -> values as `LayerKind.values` has them, B = 1."""
    if tiles is None:
        return norm_of(gradient.flatten(1), how.statistic)[:, None]
    return tiles.totals(norm_of(gradient, how.statistic)[:, None])


class _Sums:
    """Sums over samples, on the CPU: of each matrix's statistic, of each layer's, and of each sampled tile's."""

    def __init__(self, decoder: Decoder, watched: list[Watched], how: How, statistic: str):
        self._decoder, self._watched, self._how, self._statistic = decoder, watched, how, statistic
        self._names = [name for item in watched for p in item.parameters for name in item.names(p)]
        layers = [item.layer for item in watched for p in item.parameters for _ in item.names(p)]
        self._layer = torch.tensor(layers)
        self._per_module = torch.zeros(len(layers), dtype=torch.float64)
        self._per_layer = torch.zeros(decoder.num_layers, dtype=torch.float64)
        self._tiles: dict[str, torch.Tensor] = {}

    def add(self, found: dict[str, torch.Tensor], factor: float) -> None:
        """found: as from `_measure`, of gradients to be multiplied by `factor`."""
        factor = factor**2 if self._how.statistic == "grad_l2sq" else factor
        num_samples = next((values.shape[-1] for values in found.values()), 1)
        rows = []
        for item in self._watched:
            for parameter in item.parameters:
                path = f"{item.path}.{parameter}"
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

    def result(
        self, count: int, num_samples: int, modules: str, reduction: str, sample_fraction: float | None
    ) -> Density:
        """The means over `count`."""
        per_module = dict(zip(self._names, (self._per_module / count).tolist()))
        for path, value in per_module.items():
            if not value < float("inf"):
                check_finite(self._decoder.model)
                raise ValueError(f"{path}: its gradient is not finite although all weights are: try a wider dtype")
        num_weights = torch.zeros(self._decoder.num_layers, dtype=torch.int64)
        variance = torch.zeros(self._decoder.num_layers, dtype=torch.float64)
        for item in self._watched:
            for parameter in item.parameters:
                num_weights[item.layer] += getattr(item.module, parameter).numel()
                path = f"{item.path}.{parameter}"
                if path in self._tiles:
                    variance[item.layer] += self._how.tiles[path].variance(self._tiles[path] / count).sum()
        return Density(
            self._per_layer / count,
            per_module,
            num_weights,
            num_samples,
            modules,
            self._statistic,
            reduction,
            sample_fraction,
            None if sample_fraction is None else variance.sqrt(),
        )
