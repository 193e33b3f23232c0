"""Knowledge density: how much each layer's weights would move for the forget set.

    K_l = mean over samples of || dL(sample)/dW_l ||_1          (reduction="sample", the paper's)
    K_l = || mean over samples of dL(sample)/dW_l ||_1          (reduction="mean", the norm of the mean gradient)

where L(sample) is the mean NLL over the sample's labelled tokens. Nothing is updated. Other statistics of the same
gradients: Fisher information, its ratio and the gradients' cosine between forget and retain set, and SLUG's importance.
`passes` reads the gradients; `attribution` has scores of single weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import torch
from torch import nn

from kunbr_fast.data import Sample
from kunbr_fast.density.layer_kinds import How, Watched, norm_of
from kunbr_fast.density.passes import Measurement, PassSettings, checked_samples, inner_product
from kunbr_fast.density.sums import check_values
from kunbr_fast.density.watch import MODULES, choose_tiles, num_weights, watch_list
from kunbr_fast.files.atomic import write_json
from kunbr_fast.files.documents import checked, read_json
from kunbr_fast.files.shown import plain
from kunbr_fast.keywords import named_by, taken
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.proofs import ensure_proven
from kunbr_fast.values import SHARE, check

NORMS = ("grad_l1", "grad_l2", "grad_l2sq", "grad_linf", "grad_mean_abs")
STATISTICS = (*NORMS, "fisher", "fisher_ratio", "cosine", "slug")
SAMPLED_STATISTICS = ("grad_l1", "grad_l2sq", "grad_mean_abs", "fisher")
REDUCTIONS = ("sample", "mean")
NO_SHARES = ("fisher_ratio", "cosine", "slug")  # no sums over weights: a layer has no share of a total
_OWN_REDUCTION = {"fisher": "sample", "fisher_ratio": "sample", "cosine": "mean", "slug": "mean"}
_MEASURED_AS = {"grad_mean_abs": "grad_l1", "fisher": "grad_l2sq", "fisher_ratio": "grad_l2sq", "slug": "grad_l2"}
_RETAIN = {"fisher_ratio": "needed", "cosine": "needed", "slug": "taken"}
COMPARING = tuple(_RETAIN)  # take a retain set


# ---------------------------------------------------------------- result

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Measured(TypedDict):
    per_layer: Annotated[list[float], msgspec.Meta(min_length=1)]
    per_module: dict[str, float | None]
    num_weights: list[Count]
    num_samples: Count
    modules: Literal[MODULES]
    statistic: Literal[STATISTICS]
    reduction: Literal[REDUCTIONS]


class Saved(_Measured, total=False):
    """As `Density.to_dict` writes it; earlier versions without the last three."""

    sample_fraction: float | None
    standard_error: list[float] | None
    alignment: list[float] | None


@dataclasses.dataclass(frozen=True)
class Density:
    """Knowledge density of each layer, un-normalised.

    per_layer: float64 (H,), the expected norm of the gradient of the layer's weights taken together (grad_l1: nats
    per unit of weight, summed over weights).
    per_module: {path: the same of one parameter}, such as "model.layers.3.mlp.up_proj.weight", or
    "model.layers.3.mlp.experts.down_proj[5]" for the matrix of one expert.
    num_weights: int64 (H,), the weights that each entry of per_layer is about. num_samples: of the expectation.
    sample_fraction: the part of the output rows that was measured, None for all; standard_error: float64 (H,), of
    per_layer as an estimate from that part, else None.
    alignment: float64 (H,), for SLUG with a retain set the cosine of each layer's mean forget and retain gradients.
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
    alignment: torch.Tensor | None = None

    @property
    def normalized(self) -> torch.Tensor:
        """(H,) float64 that sums to 1: `per_layer / per_layer.sum()`."""
        if self.statistic in NO_SHARES:
            raise ValueError(f"{self.statistic} is no sum over weights, so no layer has a share of it: use per_layer")
        total = self.per_layer.sum()
        if not total > 0:
            raise ValueError("every layer's density is zero: the loss does not depend on these weights")
        return self.per_layer / total

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["per_module"] = {k: v if math.isfinite(v) else None for k, v in self.per_module.items()}
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "density") -> Density:
        """The density that `to_dict` wrote. ValueError, which begins with `where`, for values of other types."""
        later = dict.fromkeys(("sample_fraction", "standard_error", "alignment"))  # absent from earlier files
        values = later | checked(values, Saved, where)
        layers = len(values["per_layer"])
        for name in ("num_weights", "standard_error", "alignment"):
            if values[name] is not None and len(values[name]) != layers:
                raise ValueError(f"{where}: {name}: got {len(values[name])} layers, and per_layer has {layers}")
        values["per_module"] = {k: math.inf if v is None else v for k, v in values["per_module"].items()}
        for name in ("per_layer", "standard_error", "alignment"):
            if name == "per_layer" or values[name] is not None:
                values[name] = torch.tensor(values[name], dtype=torch.float64)
        values["num_weights"] = torch.tensor(values["num_weights"], dtype=torch.int64)
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Floats survive the round trip exactly."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Density:
        """Reads what `save` wrote. ValueError names the file and the field."""
        return cls.from_dict(read_json(path), f"{plain(path)}: not a density file written by Density.save")


# ---------------------------------------------------------------- the measurement


@dataclasses.dataclass(frozen=True)
class DensitySettings(PassSettings):
    """sample_fraction: an unbiased estimate of grad_l1, grad_mean_abs, grad_l2sq or fisher from about this part of each
    matrix's output rows, in tiles of 16, chosen without replacement by `sample_seed`, at least two a matrix and the
    same for all samples; vectors and routers are measured whole. `standard_error` is about the choice of tiles, not
    about that of the samples."""

    sample_fraction: float | None = None
    sample_seed: int = 0


@named_by(DensitySettings)
def knowledge_density(
    model: nn.Module | Decoder,
    samples: Iterable[Any],
    modules: str = "mlp",
    statistic: str = "grad_l1",
    reduction: str | None = None,
    *,
    retain: Iterable[Any] | None = None,
    **settings: Any,
) -> Density:
    """Knowledge density of every layer for `samples` (usually the forget set), or another statistic of its gradients.

    samples: `{"input_ids": (T,), "labels": (T,)}` mappings, or padded Hugging Face batches (taken apart by their
    attention mask; a batch-mean loss plays no part: each sample's own mean NLL is differentiated).
    modules: `mlp` (weight matrices of the layer outside attention, experts and routers among them), `attention` (those
    within, and in whatever else mixes tokens: `roles`), `norms` (norm weights), or `all` (every parameter of the layer,
    biases too).
    statistic of the gradient g of a parameter, or of all the layer's parameters (n of them, of values w) together:
        grad_l1, grad_mean_abs      sum|g|, and sum|g| / n
        grad_l2sq, grad_l2          sum g^2, and its root
        grad_linf                   max|g|
        fisher                      E_samples sum g^2: the diagonal Fisher information's trace, with one sample's
                                    mean NLL as the log-likelihood. With the sum over the sample's R labelled tokens
                                    instead, a sample counts R^2 times as much; token-wise forms square each token's
                                    gradient, and batch-wise forms that of a mean over several samples
        fisher_ratio                fisher of `samples` / fisher of `retain`
        cosine                      g_f . g_r / (|g_f| |g_r|), of the mean gradients of `samples` and `retain`; 0 where
                                    one of them is 0
        slug                        |g_f|_2 / |w|_2, of the mean gradient: the layer importance of SLUG (arXiv
                                    2407.11867), whose other axis, with `retain`, is |alignment| (`pareto_front`)
    reduction: `sample`, the mean over samples of each one's statistic (memory does not grow with the number of
    samples); `mean`, the statistic of the mean gradient (holds one fp32 gradient of the chosen weights, and none if
    all samples fit one batch; several processes sum theirs). None: `mean` for cosine and slug, else `sample`.
    retain: a second set in the form of `samples`, for fisher_ratio, cosine and slug. Cosine and alignment hold one fp32
    gradient of the chosen weights, and a second one where `retain` does not fit one batch.
    settings: the fields of `DensitySettings` and `PassSettings`.

    Equivalent, at H forward and backward passes' price for one sample at a time:
        for s in samples: loss(model, s).backward(); K += model.layers[l].weight.grad.abs().sum(); zero_grad()

    Leaves no gradient, hook or changed flag behind. In a ratio 0 / 0 counts 0. Errors: ValueError with the module path
    for a module with an adapter, a tied weight, a weight in a buffer, a sample without a labelled token, a gradient
    that is not finite, or a layer whose divisor is 0; TypeError for an unknown setting.
    """
    how = taken(DensitySettings, settings, "knowledge_density")
    reduction = _check_settings(modules, statistic, reduction, retain, how.sample_fraction)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    samples = checked_samples(decoder, samples, "sample")
    ensure_proven(decoder.device, {decoder.dtype}, how.impl)
    if retain is not None:
        retain = checked_samples(decoder, retain, "retain sample")
    watched = watch_list(decoder, modules)
    tiles = {}
    if how.sample_fraction is not None:
        tiles = choose_tiles(watched, how.sample_fraction, how.sample_seed, decoder.device)
    norm = _MEASURED_AS.get(statistic, statistic)
    kernels = How("grad_l2sq" if norm in ("grad_l2", "cosine") else norm, how.impl, tiles)
    measurement = Measurement(decoder, watched, kernels, how)

    def density_of(samples: Sequence[Sample]) -> Density:
        sums, count = measurement.norms(samples, norm, reduction), len(samples)
        per_layer, per_module, variance = sums.means(count if reduction == "sample" else 1)
        error = None if how.sample_fraction is None else variance.sqrt()
        weights = num_weights(decoder, watched)
        return Density(per_layer, per_module, weights, count, modules, norm, reduction, how.sample_fraction, error)

    with measurement.ready(len(samples) + len(retain or ())):
        if retain is not None and reduction == "mean":
            density = _against_retain(measurement, samples, retain, modules, statistic)
        else:
            density = density_of(samples)
        if statistic == "fisher_ratio":
            density = _quotient(density, density_of(retain), "the retain set's Fisher information")
    if statistic == "slug":
        density = _quotient(density, _weight_norms(decoder, watched), "the norm of its weights")
    if statistic == "grad_mean_abs":
        density = _per_weight(density, watched)
    return dataclasses.replace(density, statistic=statistic)


def reduction_of(statistic: str, reduction: str | None) -> str:
    """`reduction`, or the statistic's own where that is None. ValueError where it has another one."""
    own = _OWN_REDUCTION.get(statistic)
    if reduction is None:
        return own or "sample"
    if own not in (None, reduction):
        what = "the mean gradient" if own == "mean" else "each sample's gradient"
        raise ValueError(f"reduction={reduction!r}: {statistic} is of {what}; leave reduction out, or set {own!r}")
    return reduction


def _check_settings(
    modules: str, statistic: str, reduction: str | None, retain: Any, sample_fraction: float | None
) -> str:
    """The reduction; ValueError for settings that are unknown or do not go together."""
    for name, value, known in (
        ("modules", modules, MODULES),
        ("statistic", statistic, STATISTICS),
        ("reduction", reduction, (None, *REDUCTIONS)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(filter(None, known))}")
    reduction = reduction_of(statistic, reduction)
    if retain is None and _RETAIN.get(statistic) == "needed":
        raise ValueError(f"statistic={statistic!r} compares with a retain set: give retain=samples to keep")
    if retain is not None and statistic not in COMPARING:
        raise ValueError(f"statistic={statistic!r} takes no retain set (only {', '.join(COMPARING)} do): leave it out")
    if sample_fraction is not None:
        check("sample_fraction", sample_fraction, SHARE)
        if statistic not in SAMPLED_STATISTICS:
            raise ValueError(
                f"sample_fraction with statistic={statistic!r}: only a sum over weights has an unbiased estimate from "
                f"a part of them; choose one of {', '.join(SAMPLED_STATISTICS)}"
            )
    return reduction


# ---------------------------------------------------------------- statistics made of others


def _against_retain(
    measurement: Measurement, forget: Sequence[Sample], retain: Sequence[Sample], modules: str, statistic: str
) -> Density:
    """Of the two sets' mean gradients: the cosines, or for SLUG the norms of the forget gradients, with the layers'
    cosines for `alignment`."""
    decoder, watched = measurement.decoder, measurement.watched
    held: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}  # forget . retain, forget . forget, retain . retain, for each matrix

    def against(path: str, b: torch.Tensor) -> None:
        a = held.pop(path, None)
        a = torch.zeros_like(b) if a is None else a
        found[path] = torch.stack([inner_product(a, b), inner_product(a, a), inner_product(b, b)])

    measurement.gradients(forget, held.__setitem__)
    measurement.gradients(retain, against)
    for path in list(held):  # not reached by the retain set
        against(path, torch.zeros_like(held[path]))
    names, layers, rows = [], [], []
    for item in watched:
        for path, own in item.names.items():
            names, layers = names + own, layers + [item.layer] * len(own)
            rows.append(found.get(path, torch.zeros(3, len(own), dtype=torch.float64)).cpu())
    scale = [1.0 / (len(forget) * len(retain)), 1.0 / len(forget) ** 2, 1.0 / len(retain) ** 2]
    by_module = torch.cat(rows, 1) * torch.tensor(scale, dtype=torch.float64)[:, None]
    by_layer = torch.zeros(3, decoder.num_layers, dtype=torch.float64)
    by_layer.index_add_(1, torch.tensor(layers), by_module)
    check_values(decoder, dict(zip(names, by_module.abs().sum(0).tolist())))

    def cosine(products: torch.Tensor) -> torch.Tensor:
        dot, one, two = products
        return torch.where((one > 0) & (two > 0), dot / (one.sqrt() * two.sqrt()), 0.0).clamp(-1.0, 1.0)

    if statistic == "cosine":
        per_layer, per_module, alignment = cosine(by_layer), cosine(by_module), None
    else:
        per_layer, per_module, alignment = by_layer[1].sqrt(), by_module[1].sqrt(), cosine(by_layer)
    weights = num_weights(decoder, watched)
    named = dict(zip(names, per_module.tolist()))
    return Density(per_layer, named, weights, len(forget), modules, reduction="mean", alignment=alignment)


def _weight_norms(decoder: Decoder, watched: list[Watched]) -> Density:
    """The L2 norms of the weights themselves."""
    per_module: dict[str, float] = {}
    per_layer = torch.zeros(decoder.num_layers, dtype=torch.float64)
    for layer in decoder.visit(dict.fromkeys(item.layer for item in watched)):
        for item in (item for item in watched if item.layer == layer):
            for parameter, names in zip(item.parameters, item.names.values()):
                weight = getattr(item.module, parameter).detach()
                squares = norm_of(weight.reshape(item.experts or 1, -1), "grad_l2sq").cpu()
                per_module.update(zip(names, squares.sqrt().tolist()))
                per_layer[layer] += squares.sum()
    return Density(per_layer.sqrt(), per_module, num_weights(decoder, watched), 1)


def _quotient(density: Density, divisor: Density, what: str) -> Density:
    """density / divisor, layer by layer and matrix by matrix; 0 / 0 is 0."""
    for layer, (value, by) in enumerate(zip(density.per_layer.tolist(), divisor.per_layer.tolist())):
        if by == 0 and value != 0:
            raise ValueError(f"layer {layer}: {what} is 0, so there is no quotient: choose other modules")
    per_module = {
        path: 0.0 if value == 0 else math.inf if divisor.per_module[path] == 0 else value / divisor.per_module[path]
        for path, value in density.per_module.items()
    }
    per_layer = torch.where(density.per_layer == 0, 0.0, density.per_layer / divisor.per_layer)
    return dataclasses.replace(density, per_layer=per_layer, per_module=per_module)


def _per_weight(density: Density, watched: list[Watched]) -> Density:
    """density / number of weights."""
    sizes = {
        name: getattr(item.module, parameter).numel() // (item.experts or 1)
        for item in watched
        for parameter, names in zip(item.parameters, item.names.values())
        for name in names
    }
    count = density.num_weights.clamp(min=1)
    return dataclasses.replace(
        density,
        per_layer=density.per_layer / count,
        per_module={name: value / sizes[name] for name, value in density.per_module.items()},
        standard_error=None if density.standard_error is None else density.standard_error / count,
    )
