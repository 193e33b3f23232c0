"""What an objective needs of the original model, computed once and kept, so that no second model is held: for a whole
data set (`OriginalValues.of`), or for a batch (`measure`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Decoder, Stretch
from kunbr_fast.objectives import distributions as linear_rows

PARTS = ("forget", "alternate", "retain")
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
    layer N.
    """

    values: dict[str, list[torch.Tensor | None]]

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
        return cls(values)

    def batch(self, indices: Iterable[int]) -> OriginalValues:
        """The values of the samples `indices`, in their order."""
        indices = list(indices)
        return OriginalValues({kind: [tensors[i] for i in indices] for kind, tensors in self.values.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """As flat tensors, for a file."""
        flat = {}
        for kind, tensors in self.values.items():
            flat[kind] = torch.cat([t for t in tensors if t is not None])
            flat[f"{kind}:rows"] = torch.tensor([0 if t is None else len(t) for t in tensors])
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, torch.Tensor]) -> OriginalValues:
        values = {}
        for kind in (name for name in flat if not name.endswith(":rows")):
            rows = flat[f"{kind}:rows"].tolist()
            values[kind] = [part if count else None for part, count in zip(flat[kind].split(rows), rows)]
        return cls(values)


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
    """The `OriginalValues` of one packed batch, from the weights that the decoder has now."""
    values: dict[str, list[torch.Tensor | None]] = {kind: [None] * batch.num_samples for kind in needs}

    def keep(kind: str, tensors: Sequence[torch.Tensor]) -> None:
        for part in needs.get(kind, ()):
            for i in getattr(parts, part):
                values[kind][i] = tensors[i]

    for layer in sorted(int(kind.partition(".")[2]) for kind in needs if kind.startswith("layer.")):
        hidden = decoder.run(batch, stretch, layer + 1)
        stretch = Stretch(layer + 1, hidden)
        keep(f"layer.{layer}", hidden.split(batch.lengths))
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
    return OriginalValues(values)
