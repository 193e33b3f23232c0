"""What an objective needs of the original model, computed once and kept, so that no second model is held: for a whole
data set (`OriginalValues.of`), or for a batch (`measure`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Decoder, Stretch
from kunbr_fast.model.sample_rows import RowFormat
from kunbr_fast.objectives import distributions as linear_rows
from kunbr_fast.objectives.layer_states import LayerStates, Spread

PARTS = ("forget", "alternate", "retain")
EVERY = "layer.all"  # each layer's output, a kind for `OriginalValues.of`
Needs = dict[str, tuple[str, ...]]  # for each kind of value, the PARTS that need it


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which samples of a packed batch are which: forget, then an alternate of each (or none), then retain."""

    forget: range
    alternate: range
    retain: range

    @classmethod
    def of(cls, forget: int = 0, alternate: int = 0, retain: int = 0) -> Parts:
        """By how many of each there are."""
        second = forget + alternate
        return cls(range(forget), range(forget, second), range(second, second + retain))


@dataclasses.dataclass(frozen=True)
class OriginalValues:
    """What the original model gives for some samples: for each kind one tensor a sample, None where it is not needed.

    Kinds: `nll` (R_i,), the labelled rows' NLL, fp32 (fp64 of an fp64 model); `hidden` (R_i, D), the labelled rows
    after the final norm; `hidden_all` (T_i, D), all tokens after the final norm; `layer.N` (T_i, D), the output of
    layer N. spread: of each `layer.N` the mean over tokens of |h - mean h|^2, of all the samples that were measured
    together. states: `layer.N` of the samples from `first` on, which are many bytes; rows: how they are kept.
    """

    values: dict[str, list[torch.Tensor | None]]
    spread: dict[str, float | torch.Tensor] = dataclasses.field(default_factory=dict)
    states: LayerStates | None = None
    first: int = 0
    rows: RowFormat | None = None

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        samples: Mapping[str, Sequence[Sample]],
        needs: Needs,
        *,
        impl: str = "auto",
        batch_tokens: int = 4096,
        place: Place | None = None,
        progress: bool = False,
    ) -> OriginalValues:
        """One forward pass of the original model over the samples that `needs` names; the values are in main memory.

        samples: lists by PARTS; the values follow the order of the mapping. A streamed model reads each layer once for
        all samples; place: where their activations wait between two layers.
        """
        needs = _each(needs, range(decoder.num_layers))
        sizes = [len(part) for part in samples.values()]
        first = dict(zip(samples, itertools.accumulate(sizes, initial=0)))
        values: dict[str, list[torch.Tensor | None]] = {kind: [None] * sum(sizes) for kind in needs}
        jobs = [
            (part, indices)
            for part in samples
            if any(part in parts for parts in needs.values())
            for indices in token_batches([len(s["input_ids"]) for s in samples[part]], batch_tokens)
        ]

        def packed(job: tuple[str, list[int]]) -> PackedBatch:
            part, indices = job
            return pack([samples[part][i] for i in indices]).to(decoder.device)

        def keep(job: tuple[str, list[int]], batch: PackedBatch, kinds: Iterable[str], stretch: Stretch) -> None:
            part, indices = job
            mine = {kind: (part,) for kind in kinds if part in needs[kind]}
            found = measure(decoder, batch, Parts.of(**{part: len(indices)}), mine, stretch=stretch, impl=impl)
            for kind, tensors in found.values.items():
                for i, tensor in zip(indices, tensors):
                    values[kind][first[part] + i] = tensor.cpu()

        stops: dict[int, list[str]] = {}  # what can be had of the input of a layer, if that and the next one run
        for kind in needs:
            layer = int(kind.partition(".")[2]) if kind.startswith("layer.") else decoder.num_layers - 1
            stops.setdefault(layer, []).append(kind)
        with tqdm(total=len(jobs), desc="original values", unit="batch", leave=False, disable=not progress) as bar:
            for number, batch, layers, stretch in decoder.forward_to(map(packed, jobs), stops, place):
                keep(jobs[number], batch, [kind for layer in layers for kind in stops[layer]], stretch)
                bar.update(max(stops) in layers)
        return together([cls(values)])[0]

    def batch(self, indices: Iterable[int]) -> OriginalValues:
        """The values of the samples `indices`, in their order."""
        indices = list(indices)
        values = {kind: [tensors[i] for i in indices] for kind, tensors in self.values.items()}
        if self.states is None:
            return dataclasses.replace(self, values=values)
        mine = [i for i, place in enumerate(indices) if place in self._places]
        for layer, parts in (self.states.batch([indices[i] - self.first for i in mine]) if mine else {}).items():
            rows = dict(zip(mine, parts))
            values.setdefault(f"layer.{layer}", [rows.get(i) for i in range(len(indices))])
        return OriginalValues(values, self.spread, rows=self.states.rows)

    def gathered(self, kind: str, samples: Iterable[int], device: torch.device) -> torch.Tensor:
        """The values of some samples as one tensor on `device`. ValueError where one of them is not there."""
        found = [self.values[kind][i] for i in samples] if kind in self.values else [None]
        if any(tensor is None for tensor in found):
            raise ValueError(f"the original model's {kind} of these samples is needed: give original=")
        if self.rows is not None and found[0].dtype == self.rows.dtype and kind.startswith("layer."):
            return self.rows.gathered(found, device)
        return torch.cat(found).to(device, non_blocking=True)

    def joined(self, more: OriginalValues) -> OriginalValues:
        """With other kinds of the same samples."""
        values, spread = {**self.values, **more.values}, {**self.spread, **more.spread}
        return dataclasses.replace(self, values=values, spread=spread)

    def with_states(self, states: LayerStates | None, first: int) -> OriginalValues:
        """With the layers' outputs of the samples from `first` on; None: without those that were there."""
        spread = self.spread | ({} if states is None else {f"layer.{i}": x for i, x in states.spread.items()})
        return dataclasses.replace(self, states=states, first=first, spread=spread)

    def expect(self, batches: Iterable[Sequence[int]]) -> None:
        """The samples that will be asked for, by `batch`, as of `SampleRows.expect`."""
        if self.states is not None:
            mine = ([i - self.first for i in indices if i in self._places] for indices in batches)
            self.states.expect([indices for indices in mine if indices])

    @property
    def _places(self) -> range:
        """Of the samples that `states` has."""
        return range(self.first, self.first + len(self.states))

    def tensors(self) -> dict[str, torch.Tensor]:
        """As flat tensors, for a file."""
        flat = {}
        for kind, tensors in self.values.items():
            flat[kind] = torch.cat([t for t in tensors if t is not None])
            flat[f"{kind}:rows"] = torch.tensor([0 if t is None else len(t) for t in tensors])
        flat |= {f"{kind}:spread": torch.tensor(x, dtype=torch.float64) for kind, x in self.spread.items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, torch.Tensor]) -> OriginalValues:
        values = {}
        for kind in (name for name in flat if ":" not in name):
            rows = flat[f"{kind}:rows"].tolist()
            values[kind] = [part if count else None for part, count in zip(flat[kind].split(rows), rows)]
        spread = {name.removesuffix(":spread"): float(x) for name, x in flat.items() if name.endswith(":spread")}
        return cls(values, spread)


def _each(needs: Needs, layers: Iterable[int]) -> Needs:
    """With each layer by its own kind where all are needed."""
    layers = {f"layer.{i}": needs[EVERY] for i in layers} if EVERY in needs else {}
    return layers | {kind: parts for kind, parts in needs.items() if kind != EVERY}


def together(parts: Sequence[OriginalValues]) -> list[OriginalValues]:
    """Values that were measured part by part, with the spread of all of them."""
    spread: dict[str, float | torch.Tensor] = {}
    for kind in parts[0].values if parts else ():
        if kind.startswith("layer."):
            spread[kind] = _spread([x for part in parts for x in part.values[kind] if x is not None])
    return [dataclasses.replace(part, spread=spread) for part in parts]


def _spread(states: list[torch.Tensor]) -> float | torch.Tensor:
    """Of all these; on a device as a tensor, so that nobody waits for it."""
    if not states:
        return 0.0
    spread = Spread()
    for part in states:
        spread.add(part)
    wide = torch.promote_types(states[0].dtype, torch.float32)
    return float(spread.value()) if states[0].device.type == "cpu" else spread.value().to(wide)


@torch.no_grad()
def measure(
    decoder: Decoder,
    batch: PackedBatch,
    parts: Parts,
    needs: Needs,
    *,
    stretch: Stretch = FROM_EMBEDDINGS,
    impl: str = "auto",
) -> OriginalValues:
    """The `OriginalValues` of one packed batch, from the weights that the decoder has now, in one forward pass. The
    spread is that of the batch."""
    needs = _each(needs, range(stretch.start, decoder.num_layers))
    values: dict[str, list[torch.Tensor | None]] = {kind: [None] * batch.num_samples for kind in needs}

    needs = {kind: of for kind, of in needs.items() if any(getattr(parts, part) for part in of)}  # of samples here

    def keep(kind: str, tensors: Sequence[torch.Tensor]) -> None:
        for part in needs.get(kind, ()):
            for i in getattr(parts, part):
                values[kind][i] = tensors[i]

    def keep_layer(kind: str, hidden: torch.Tensor) -> torch.Tensor:
        keep(kind, hidden.split(batch.lengths))
        return hidden

    kinds = {int(kind.partition(".")[2]): kind for kind in needs if kind.startswith("layer.")}
    taps = {layer: functools.partial(keep_layer, kind) for layer, kind in kinds.items()}
    stretch = dataclasses.replace(stretch, taps=taps)
    if needs.keys() & {"nll", "hidden", "hidden_all"}:
        every = "hidden_all" in needs
        final = decoder.final(decoder.run(batch, stretch, rows=not every))
        if every:
            keep("hidden_all", final.split(batch.lengths))
            final = final[batch.rows]
        keep("hidden", final.split(batch.row_counts))
        if "nll" in needs:
            nll = linear_rows.linear_nll(final, decoder.head, batch.targets, impl=impl)
            keep("nll", nll.split(batch.row_counts))
    elif kinds:
        decoder.run(batch, stretch, max(kinds) + 1)
    return together([OriginalValues(values)])[0]
