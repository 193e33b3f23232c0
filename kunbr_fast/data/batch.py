"""Packed batches: samples end to end, without padding, as they go through the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kunbr_fast.data.samples import IGNORE, Sample


def _index(function: Callable[[PackedBatch], Any]) -> functools.cached_property:
    """A cached property of integers: computed on the host, and sent to the batch's device without synchronising."""

    def value(self: PackedBatch) -> Any:
        if self.host is self:
            return function(self)
        found = getattr(self.host, function.__name__)
        if isinstance(found, tuple):
            return tuple(send(x, self.device) for x in found)
        return None if found is None else send(found, self.device)

    value.__doc__ = function.__doc__
    return functools.cached_property(value)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, copied through pinned memory so that the host does not wait for a GPU."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def grid(first: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """(B * width,) int64: the item at each place of a right-padded (B, width) grid. Row i holds the items first[i],
    ..., first[i] + counts[i] - 1; its padding repeats first[i]."""
    place = torch.arange(width)
    return (first[:, None] + torch.where(place < counts[:, None], place, 0)).flatten()


@dataclasses.dataclass
class PackedBatch:
    """B samples end to end, T tokens in all, no padding.

    input_ids, labels, position_ids: (T,) int64; lengths: B ints whose sum is T.
    hidden: optional (T, D) activations at the input of layer `layer` (from the prefix cache).
    ends: where samples are trees (`data.trees`), (T,) int64, the place in its tree of each token's last descendant;
    position_ids are depths then. None: each token follows the one before it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    hidden: torch.Tensor | None = None
    layer: int = 0
    ends: torch.Tensor | None = None
    _host: PackedBatch | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def host(self) -> PackedBatch:
        """The same batch in main memory; itself if it is there."""
        if self.device.type == "cpu":
            return self
        if self._host is None:
            tensors = (x.cpu() for x in (self.input_ids, self.labels, self.position_ids))
            self._host = PackedBatch(*tensors, self.lengths, ends=None if self.ends is None else self.ends.cpu())
        return self._host

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; of trees, from a root to the deepest token."""
        return max(self.lengths) if self.ends is None else int(self.host.position_ids.max()) + 1

    @functools.cached_property
    def row_counts(self) -> list[int]:
        """How many labelled rows each sample has."""
        return self.host.rows_per_sample.tolist()

    @_index
    def cu_seqlens(self) -> torch.Tensor:
        """(B+1,) int64 offsets: sample i holds the tokens cu_seqlens[i]:cu_seqlens[i+1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @_index
    def sample_of_token(self) -> torch.Tensor:
        """(T,) int64: the sample that each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_samples), torch.tensor(self.lengths))

    @_index
    def place_of_token(self) -> torch.Tensor:
        """(T,) int64: each token's place in its sample."""
        return torch.arange(self.num_tokens) - self.cu_seqlens[self.sample_of_token]

    @_index
    def rows(self) -> torch.Tensor:
        """(R,) int64: the positions whose next token has a label. Only these need the head."""
        follows = self.position_ids[1:] != 0  # a sample's first token follows nothing
        return torch.nonzero(follows & (self.labels[1:] != IGNORE)).squeeze(1)

    @_index
    def targets(self) -> torch.Tensor:
        """(R,) int64: the token to be predicted at each of `rows`."""
        return self.labels[self.rows + 1]

    @_index
    def row_sample(self) -> torch.Tensor:
        """(R,) int64: the sample of each of `rows`."""
        return self.sample_of_token[self.rows]

    @_index
    def rows_per_sample(self) -> torch.Tensor:
        """(B,) int64: how many labelled rows each sample has."""
        return torch.bincount(self.row_sample, minlength=self.num_samples)

    @_index
    def pad_index(self) -> torch.Tensor | None:
        """(B * Lmax,) int64: the packed token at each place of the right-padded (B, Lmax) grid. Padding repeats the
        sample's first token, so that it stays finite. None without padding."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        return grid(self.cu_seqlens[:-1], torch.tensor(self.lengths), longest)

    @_index
    def unpad_index(self) -> torch.Tensor:
        """(T,) int64: the place of each packed token in the flattened (B, Lmax) grid."""
        return self.sample_of_token * max(self.lengths) + self.place_of_token

    @_index
    def row_grid(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The labelled rows as a right-padded (B, Rmax) grid: (B * Rmax,) the index into `rows` at each place (padding
        repeats one), (R,) the place of each row in the flattened grid, (B, Rmax) the position in its sample of the
        token at each place."""
        return self.row_grid_of(max(1, *self.row_counts))

    def row_grid_of(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`row_grid` with `width` places a sample, Rmax or more, of a batch on the host."""
        first = self.rows_per_sample.cumsum(0) - self.rows_per_sample
        index = grid(first, self.rows_per_sample, width).clamp(max=len(self.rows) - 1)
        back = self.row_sample * width + torch.arange(len(self.rows)) - first[self.row_sample]
        return index, back, self.position_ids[self.rows][index].view(-1, width)

    def samples(self) -> list[PackedBatch]:
        """Each sample as a batch of its own."""
        if self.num_samples == 1:
            return [self]
        host, lengths = self.host, self.lengths
        hosts: list[PackedBatch | None] = [None] * len(lengths)
        if host is not self:
            hosts = host.samples()
        tensors = zip(*(x.split(lengths) for x in (self.input_ids, self.labels, self.position_ids)))
        hidden = [None] * len(lengths) if self.hidden is None else self.hidden.split(lengths)
        ends = [None] * len(lengths) if self.ends is None else self.ends.split(lengths)
        parts = zip(tensors, lengths, hidden, ends, hosts)
        return [PackedBatch(*three, [n], rows, self.layer, last, one) for three, n, rows, last, one in parts]

    def set_indices(self, **indices: Any) -> None:
        """Gives the batch indices (`rows`, `pad_index`, ...) that it then does not work out itself."""
        vars(self).update(indices)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`; a copy from the host does not synchronise."""
        device = torch.device(device)
        if self.device == device:
            return self
        host = self.host
        tensors = (send(x, device) for x in (host.input_ids, host.labels, host.position_ids))
        hidden = None if self.hidden is None else self.hidden.to(device)
        ends = None if host.ends is None else send(host.ends, device)
        return PackedBatch(*tensors, self.lengths, hidden, self.layer, ends, host)


def pack(samples: Sequence[Sample], hidden: torch.Tensor | None = None, layer: int = 0) -> PackedBatch:
    """Puts samples end to end, in main memory. hidden: (T, D), on any device, their activations at the input of
    `layer`, in the same order."""
    if not samples:
        raise ValueError("an empty batch: expected at least one sample")
    lengths = [len(sample["input_ids"]) for sample in samples]
    if min(lengths) == 0:
        raise ValueError(f"sample {lengths.index(0)} of the batch has no token")
    input_ids, labels = (torch.cat([sample[key] for sample in samples]).cpu() for key in ("input_ids", "labels"))
    return PackedBatch(input_ids, labels, torch.cat([torch.arange(n) for n in lengths]), lengths, hidden, layer)


def join(first: PackedBatch, second: PackedBatch) -> PackedBatch:
    """Two packed batches as one. Both hold hidden states, at the same layer, or neither does."""
    if (first.hidden is None) != (second.hidden is None) or first.layer != second.layer:
        raise ValueError("one batch comes from a prefix cache and the other does not, or they are at different layers")
    names = ("input_ids", "labels", "position_ids")
    tensors = (torch.cat([getattr(first, name), getattr(second, name)]) for name in names)
    hidden = None if first.hidden is None else torch.cat([first.hidden, second.hidden])
    return PackedBatch(*tensors, first.lengths + second.lengths, hidden, first.layer)
