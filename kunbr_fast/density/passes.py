"""Gradients of chosen parameters, of each sample by itself or of all together, read in passes over the samples.

For norms no weight gradient is ever held: a linear layer's gradient for one sample is dY_i^T X_i, formed a tile at a time
from the layer's input and the gradient of its output, inside the backward pass (`taps`, `layer_kinds`). Samples are
packed, and each one's loss stands alone in the sum, so one backward pass serves all of them. `density` makes statistics
of layers of this, `attribution` scores of single weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, as_samples, check_labels, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import LAYER_KINDS, How, Tiles, Watched, norm_of
from kunbr_fast.density.taps import Part, Segments, Taps
from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.memory import OutOfMemory, Place, cannot_fit, gibibytes, in_halves, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.finite import check_finite
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.layer_major import LayerMajor
from kunbr_fast.objectives import losses
from kunbr_fast.parallel.group import ALONE, Group

logger = logging.getLogger(__name__)

MODULES = ("mlp", "attention", "norms", "all")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


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


def watch_list(decoder: Decoder, modules: str) -> list[Watched]:
    from kunbr_fast.model.low_precision import (
        check_exact,  # it imports blocks, and that density, which imports this module
    )

    check_exact(decoder, "density and attribution")
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
                    "add it to kunbr_fast.layer_kinds.LAYER_KINDS or choose other modules"
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


def choose_tiles(watched: list[Watched], fraction: float, seed: int, device: torch.device) -> dict[str, Tiles]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{item.path}.{name}": Tiles.choose(out_features, item.experts or 1, fraction, generator, device)
        for item in watched
        for name, out_features in item.kind.out_features(item.module).items()
        if name in item.parameters
    }


# ---------------------------------------------------------------- passes over samples


def checked_samples(samples: Iterable[Any], name: str) -> list[Sample]:
    """`as_samples`, each with a loss; `name` is what an error calls one."""
    samples = as_samples(samples)
    check_labels(samples, [f"{name} {i}" for i in range(len(samples))])
    return samples


@dataclasses.dataclass
class Measurement:
    """Passes over samples that read the gradients of the watched parameters. gradient_checkpointing: None, the model's.
    activations, directory: see `knowledge_density`."""

    decoder: Decoder
    watched: list[Watched]
    how: How
    batch_tokens: int = 2048
    gradient_checkpointing: bool | None = None
    activations: str = "auto"
    directory: str | Path | None = None
    group: Group = ALONE

    def __post_init__(self) -> None:
        for operation in ("grad_density", "linear_loss"):
            resolve(operation, self.how.impl, self.decoder.device)
        if self.gradient_checkpointing is None:
            modules = self.decoder.model.modules()
            self.gradient_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in modules)

    @contextlib.contextmanager
    def ready(self, total: int, progress: bool, title: str = "knowledge density") -> Iterator[tqdm]:
        """Inside, `norms` and `gradients` may run; afterwards the model is as before. Yields a bar of `total` samples."""
        with (
            frozen(self.decoder.model),
            tqdm(
                total=-(-total // self.group.size), desc=title, unit="sample", leave=False, disable=not progress
            ) as bar,
        ):
            experts.check(self.decoder, [item for item in self.watched if item.experts is not None])
            yield bar

    def norms(self, samples: Sequence[Sample], statistic: str, reduction: str, bar: tqdm) -> Sums:
        """The samples' statistic, summed (reduction="sample") or of their mean gradient."""
        sums, batches = Sums(self.decoder, self.watched, self.how, statistic), self._batches(samples)
        if reduction == "sample":
            for found in self._measure(self._batches(self.group.share(samples)), False, None, bar):
                sums.add(found, 1.0)
                del found  # before the next one is made
            sums.gather(self.group)
        elif (
            len(batches) == 1
            and self.group.size == 1
            and (found := self._fits(batches, lambda: [*self._measure(batches, True, None, bar)], bar))
        ):
            sums.add(found[0], 1.0 / len(samples))
        else:
            found: dict[str, torch.Tensor] = {}

            def add(path: str, gradient: torch.Tensor) -> None:
                found[path] = _of_gradient(gradient, self.how, self.how.tiles.get(path))

            self.gradients(samples, add, bar)
            sums.add(found, 1.0 / len(samples))
        return sums

    def gradients(
        self,
        samples: Sequence[Sample],
        visit: Callable[[str, torch.Tensor], None],
        bar: tqdm,
        squared: bool = False,
    ) -> None:
        """`visit(path, sum over samples of the parameter's gradient)`, once for each parameter that has one.

        The sum is (E, N, K) for a matrix, (E, n) for all else, in fp32 (fp64 for fp64 models), and becomes the caller's.
        Where all samples fit one batch it is made within the backward pass and nothing is held here; else one gradient
        of the watched parameters is. squared: the sum of each sample's squared gradient instead (always held).
        Of several processes each makes its part, and all visit the sum.
        """
        samples = self.group.share(samples)
        held: dict[str, torch.Tensor] = {}
        visited: set[str] = set()

        def now(path: str, gradient: torch.Tensor) -> None:
            visit(path, gradient)
            visited.add(path)

        def add(path: str, gradient: torch.Tensor) -> None:
            gradient = gradient.square_() if squared else gradient
            held[path] = held[path].add_(gradient) if path in held else gradient

        done = None
        while done is None:
            held.clear()
            batches = self._batches(samples)
            take = now if len(batches) == 1 and not squared and self.group.size == 1 else add
            done = self._fits(batches, lambda b=batches, t=take: [*self._measure(b, not squared, t, bar)], bar)
        self._gather(held)
        for path in list(held):
            gradient = held.pop(path)
            if path not in visited:  # before memory ran out
                visit(path, gradient)

    def _gather(self, held: dict[str, torch.Tensor]) -> None:
        """Sums gradients over the processes, of which one may have none of a parameter."""
        if self.group.size == 1:
            return
        kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for found in self.group.gather({path: (g.shape, g.dtype) for path, g in held.items()}):
            kinds |= found
        for path in sorted(kinds):  # the same order everywhere
            shape, dtype = kinds[path]
            gradient = held[path] if path in held else torch.zeros(shape, dtype=dtype, device=self.decoder.device)
            self.group.sum([gradient])
            held[path] = gradient

    def _fits(self, batches: list[list[Sample]], run: Callable[[], list], bar: tqdm) -> list | None:
        """run(), or None if memory ran out; then `batch_tokens` is half of what did not fit."""
        before = bar.n
        try:
            return run()
        except Exception as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            said = str(error)
        release()
        bar.n = before
        divisible = [_tokens(batch) for batch in batches if len(batch) > 1]
        if not divisible:
            raise self._refusal(max(map(_tokens, batches)), said)
        largest = max(divisible)
        self.batch_tokens = largest // 2
        logger.warning(
            f"density: memory ran out at batches of up to {largest} tokens: it begins again at {self.batch_tokens}"
        )
        return None

    def _refusal(self, tokens: int, said: str) -> OutOfMemory:
        cures = [] if self.gradient_checkpointing else ["gradient_checkpointing=True (the same result)"]
        cures += ["shorter samples (max_length)", 'fewer matrices (modules="mlp")', "a streamed model (open_streamed)"]
        weights = sum(p.nbytes for p in self.decoder.model.parameters())
        return cannot_fit(tokens, f"density: the model {gibibytes(weights)}", cures, self.decoder.device, said)

    def _batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        batches = token_batches([len(s["input_ids"]) for s in samples], self.batch_tokens)
        return [[samples[i] for i in indices] for indices in batches]

    def _measure(
        self, batches: list[list[Sample]], whole: bool, add: Callable[[str, torch.Tensor], None] | None, bar: tqdm
    ) -> Iterator[dict[str, torch.Tensor]]:
        """`_measure` of each batch, in their order."""
        if not batches:  # of more processes than samples
            return
        decoder, common = self.decoder, (self.watched, self.how, whole, add)
        by_sample = add is None and not whole

        def by_layer() -> list[dict[str, torch.Tensor]]:
            packed = [pack(samples).to(decoder.device) for samples in batches]
            return _measure_by_layer(decoder, packed, *common, self.activations, self.directory, bar)

        if decoder.streamed:
            samples = [sample for batch in batches for sample in batch]
            found = self._fits(batches, by_layer, bar) if by_sample else by_layer()
            while found is None:
                batches = self._batches(samples)
                found = self._fits(batches, by_layer, bar)
            yield from found
            return

        def one(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
            return _measure(decoder, pack(samples).to(decoder.device), *common, self.gradient_checkpointing)

        if by_sample:
            for samples, found in in_halves(batches, one, _tokens, "density", self._refusal):
                yield found
                del found
                bar.update(len(samples))
            return
        for samples in batches:
            yield one(samples)
            bar.update(len(samples))


# ---------------------------------------------------------------- one pass


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample["input_ids"]) for sample in samples)


def _measure(
    decoder: Decoder,
    batch: PackedBatch,
    watched: list[Watched],
    how: How,
    whole: bool,
    add: Callable[[str, torch.Tensor], None] | None,
    recompute: bool,
) -> dict[str, torch.Tensor]:
    """One packed batch: {parameter path: values as `LayerKind.values` has them}, B its samples, or one if it is taken
    `whole`. With `add` instead add(path, gradient) for the gradient of the whole batch, or of each of its samples."""
    found: dict[str, torch.Tensor] = {}
    start = min((item.layer for item in watched), default=0)
    with torch.no_grad():
        hidden = decoder.embed(batch)
        below = decoder.run(batch, Stretch(0, hidden), start) if start else hidden
    with _tapped(decoder, batch, watched, how, whole, add, found) as forward_is_over:
        hidden = decoder.run(batch, Stretch(start, below.requires_grad_(), recompute))
        forward_is_over()
        loss = _loss(decoder, batch, hidden, how)
        del hidden
        loss.backward(inputs=[below])
    return found


def _measure_by_layer(
    decoder: Decoder,
    batches: list[PackedBatch],
    watched: list[Watched],
    how: How,
    whole: bool,
    add: Callable[[str, torch.Tensor], None] | None,
    activations: str,
    directory: str | Path | None,
    bar: tqdm,
) -> list[dict[str, torch.Tensor]]:
    """`_measure` of each batch, each layer over all of them before the next one."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in batches]
    start, top = min((item.layer for item in watched), default=0), decoder.num_layers - 1

    def turn(layer: int, number: int, x: torch.Tensor, dy: torch.Tensor | None) -> None:
        batch, inside = batches[number], [item for item in watched if item.layer == layer]
        with _tapped(decoder, batch, inside, how, whole, add, found[number]) as forward_is_over:
            out = decoder.run(batch, Stretch(layer, x), layer + 1)
            forward_is_over()
            if dy is None:
                out = _loss(decoder, batch, out, how)
            out.backward(dy, inputs=[x])
        if layer == start:
            bar.update(batch.num_samples)

    LayerMajor(decoder, batches, start, top, Place(activations, directory)).run(turn, need_first=True)
    return found


@contextlib.contextmanager
def _tapped(
    decoder: Decoder,
    batch: PackedBatch,
    watched: list[Watched],
    how: How,
    whole: bool,
    add: Callable[[str, torch.Tensor], None] | None,
    found: dict[str, torch.Tensor],
) -> Iterator[Callable[[], None]]:
    """Inside, one forward and backward pass is measured as `_measure` says. Yields what is to be called between them."""

    def measure(parts: list[Part]) -> None:
        kind = parts[0].item.kind
        if add is None:
            for part, values in zip(parts, kind.values(parts, how)):
                found.update((f"{part.item.path}.{n}", v) for n, v in values.items() if n in part.item.parameters)
            return
        for part in parts:
            for piece in [part] if whole else _by_sample(part, batch.num_samples):
                for name, gradient in kind.gradient(piece, how).items():
                    if name in part.item.parameters:
                        wide = torch.promote_types(gradient.dtype, torch.float32)  # small modules' are in their own
                        add(f"{part.item.path}.{name}", gradient.to(wide))

    segments = Segments.of([batch.num_tokens] if whole else batch.lengths, decoder.device)
    taps = Taps(segments, batch.num_tokens, measure)
    mixtures = [item for item in watched if item.experts is not None]
    with contextlib.ExitStack() as stack:
        for item in watched:
            if item.experts is None:
                hook = item.module.register_forward_hook(taps.hook(item), with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(experts.watched(mixtures, taps, batch))
        yield taps.forward_is_over
        taps.finish()


def _loss(decoder: Decoder, batch: PackedBatch, hidden: torch.Tensor, how: How) -> torch.Tensor:
    """The sum over samples of each one's mean NLL, from the last layer's output (T, D)."""
    rows = losses.likelihood(batch, reduction="sum")
    final = decoder.final(hidden[batch.rows])
    loss, _ = losses.linear_loss(final, decoder.head, batch.targets, rows.weight, impl=how.impl)
    return loss


def _by_sample(part: Part, num_samples: int) -> Iterator[Part]:
    """The part of each sample alone, one segment for each expert (the segments go expert by expert)."""
    pieces = [part.x.split(part.segments.lengths)]
    pieces += [None if dy is None else dy.split(part.segments.lengths) for dy in part.dys]
    for sample in range(num_samples):
        x, *dys = [None if p is None else torch.cat(p[sample::num_samples]) for p in pieces]
        segments = Segments.of(part.segments.lengths[sample::num_samples], x.device)
        yield dataclasses.replace(part, segments=segments, x=x, dys=dys)


def _of_gradient(gradient: torch.Tensor, how: How, tiles: Tiles | None) -> torch.Tensor:
    """(E, ...) -> values as `LayerKind.values` has them, B = 1."""
    if tiles is None:
        return norm_of(gradient.flatten(1), how.statistic)[:, None]
    return tiles.totals(norm_of(gradient, how.statistic)[:, None])


# ---------------------------------------------------------------- sums


class Sums:
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

    def gather(self, group: Group) -> None:
        """Of several processes' samples all have the sums of all: one all-reduce of a few float64 numbers."""
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
        """The means over `count`: of each layer, of each matrix, and the variance that each layer's has from its tiles."""
        per_module = dict(zip(self._names, (self._per_module / count).tolist()))
        check_values(self._decoder, per_module)
        variance = torch.zeros(self._decoder.num_layers, dtype=torch.float64)
        for item in self._watched:
            for parameter in item.parameters:
                path = f"{item.path}.{parameter}"
                if path in self._tiles:
                    variance[item.layer] += self._how.tiles[path].variance(self._tiles[path] / count).sum()
        return self._per_layer / count, per_module, variance


def check_values(decoder: Decoder, per_module: dict[str, float]) -> None:
    """ValueError for a value that is not finite, of a weight's or else of the gradient's own."""
    for path, value in per_module.items():
        if not value < math.inf:
            check_finite(decoder.model)
            raise ValueError(f"{path}: its gradient is not finite although all weights are: try a wider dtype")


def num_weights(decoder: Decoder, watched: list[Watched]) -> torch.Tensor:
    """(H,) int64: how many weights are watched in each layer."""
    out = torch.zeros(decoder.num_layers, dtype=torch.int64)
    for item in watched:
        out[item.layer] += sum(getattr(item.module, parameter).numel() for parameter in item.parameters)
    return out


def inner_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(E, ...), (E, ...) -> (E,) float64: the sums of a * b, with no temporary as large as a."""
    out = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for x, y in zip(a.flatten(1).split(1 << 16, -1), b.flatten(1).split(1 << 16, -1)):
        out += (x.double() * y).sum(-1)
    return out
