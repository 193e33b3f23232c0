"""What an objective needs of the original model, computed once and kept, so that no second model is held.

A `Reference` has for each sample its rows' NLL, or hidden states (to those below the head it is then applied chunk by
chunk). It is made of a whole data set (`Reference.of`), or of each batch with the block's original weights put back
(`measure`; `reinserted` does that when it is given none).
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
Needs = dict[str, tuple[str, ...]]  # of the original model: for each kind of value, which PARTS it is needed of


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the original model gives for some samples: for each kind one tensor a sample, None where it is not needed.

    Kinds: `nll` (R_i,), of the labelled rows, fp32 (fp64 of an fp64 model); `hidden` (R_i, D), theirs after the final
    norm; `hidden_all` (T_i, D), that at all tokens; `layer.N` (T_i, D), the output of layer N at all tokens.
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
    ) -> Reference:
        """One forward pass of the original model over those of `samples` (lists by PARTS, one after the other in the
        order of the mapping) that `needs` names; the values are kept in main memory. place: where a streamed model's
        activations wait between two layers, each of which is read once for all samples."""
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
            found = measure(decoder, batch, {part: range(len(indices))}, mine, stretch=stretch, impl=impl)
            for kind, tensors in found.values.items():
                for i, tensor in zip(indices, tensors):
                    values[kind][first[part] + i] = tensor.cpu()

        stops: dict[int, list[str]] = {}  # what can be had of the input of a layer, if that and the next one run
        for kind in needs:
            layer = int(kind.partition(".")[2]) if kind.startswith("layer.") else decoder.num_layers - 1
            stops.setdefault(layer, []).append(kind)
        with tqdm(total=len(jobs), desc="reference", unit="batch", leave=False, disable=not progress) as bar:
            for number, batch, layers, stretch in decoder.forward_to(map(packed, jobs), stops, place):
                keep(jobs[number], batch, [kind for layer in layers for kind in stops[layer]], stretch)
                bar.update(max(stops) in layers)
        return cls(values)

    def batch(self, indices: Iterable[int]) -> Reference:
        """The values of the samples `indices`, in their order."""
        indices = list(indices)
        return Reference({kind: [tensors[i] for i in indices] for kind, tensors in self.values.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as flat tensors, for a file; `from_tensors` reads them."""
        flat = {}
        for kind, tensors in self.values.items():
            flat[kind] = torch.cat([t for t in tensors if t is not None])
            flat[f"{kind}:rows"] = torch.tensor([0 if t is None else len(t) for t in tensors])
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, torch.Tensor]) -> Reference:
        values = {}
        for kind in (name for name in flat if not name.endswith(":rows")):
            rows = flat[f"{kind}:rows"].tolist()
            values[kind] = [part if count else None for part, count in zip(flat[kind].split(rows), rows)]
        return cls(values)


@torch.no_grad()
def measure(
    decoder: Decoder,
    batch: PackedBatch,
    parts: Mapping[str, range],
    needs: Needs,
    *,
    stretch: Stretch = FROM_EMBEDDINGS,
    impl: str = "auto",
) -> Reference:
    """The `Reference` values of one packed batch from the weights that the decoder has now. parts: which of its samples
    are the forget, alternate and retain ones; stretch: as in `Decoder.run`."""
    values: dict[str, list[torch.Tensor | None]] = {kind: [None] * batch.num_samples for kind in needs}

    def keep(kind: str, tensors: Sequence[torch.Tensor]) -> None:
        for part in needs.get(kind, ()):
            for i in parts.get(part, ()):
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
    return Reference(values)
