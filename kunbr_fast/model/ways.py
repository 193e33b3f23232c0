"""How a batch goes through a model's layers: packed, on a right-padded grid, or a sample at a time.

    packed   (1, T, D), sample after sample without padding. Attention is `attention.packed_attention`, within each
             sample; positions are those within the sample. Nothing is lost.
    padded   (B, Lmax, D). The model's own attention, masks and positions, whatever they are. Padding lies to the right
             of each sample's tokens, so a causal layer never mixes it in, and no mask is needed: its gradient is 0.
    alone    (1, L, D), sample by sample: for what depends on how long the sequence is, or looks to the right.
    picked   padded up to a number of tokens, alone beyond it: attention to the best k keys. Which of equal ones are
             taken (the same token twice) depends on how many there are.

Above `Decoder.run` all three look the same: activations are (T, D), in packed order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from kunbr_fast.data import PackedBatch
from kunbr_fast.model import attention
from kunbr_fast.model.gather import take, to_places
from kunbr_fast.model.layers import odd_types
from kunbr_fast.model.rotary import RotaryByLength


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a batch stand in the grid (B, L) that its layers run on; packed: (1, T).

    sample: (B * L,) which sample each place belongs to, padding to the one that it follows. back: (T,) each token's
    place; None where places are tokens.
    """

    shape: tuple[int, int]
    sample: torch.Tensor
    back: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.sample)

    def rows(self, x: torch.Tensor, heads_first: bool = False) -> torch.Tensor:
        """(B * L, D), (B, L, D), (B, L, heads, d) or (B, heads, L, d) to rows, sample after sample, without padding."""
        x = (x.transpose(1, 2) if heads_first else x).flatten(0, -2)
        if self.back is None:
            return x
        return x.unflatten(0, (self.count, -1)).index_select(0, self.back).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Way:
    """config: the text model's. A *grid* is the form that the layers take: (places, D) with two leading dimensions."""

    config: Any
    rotary: RotaryByLength

    name = "packed"
    lost = ""  # what it costs, for a log line

    def pieces(self, batch: PackedBatch) -> list[PackedBatch]:
        """The batches that go through a layer one after the other; end to end they are `batch`."""
        return [batch]

    def together(self, longest: int) -> bool:
        """Whether samples of up to `longest` tokens go through a layer at once."""
        return True

    def inputs(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """What the model's own forward is given to make its layers' arguments."""
        return {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}

    def to_grid(self, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(T, D) -> (1, T, D)"""
        return rows[None]

    def to_rows(self, grid: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(1, T, D) -> (T, D)"""
        return grid[0]

    def grids(self, rows: torch.Tensor, pieces: list[PackedBatch]) -> list[torch.Tensor]:
        """(T, D) of a batch -> the grid of each of its pieces."""
        parts = [rows] if len(pieces) == 1 else rows.split([piece.num_tokens for piece in pieces])
        return [self.to_grid(part, piece) for part, piece in zip(parts, pieces)]

    def rows(self, grids: list[torch.Tensor], pieces: list[PackedBatch]) -> torch.Tensor:
        """The grids of a batch's pieces -> (T, D)"""
        parts = [self.to_rows(grid, piece) for grid, piece in zip(grids, pieces)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def shape(self, batch: PackedBatch) -> tuple[int, int]:
        """Of a grid, without D."""
        return 1, batch.num_tokens

    def places(self, batch: PackedBatch) -> Places:
        return Places(self.shape(batch), batch.sample_of_token)

    def check(self, batch: PackedBatch, name: str) -> None:
        attention.check_places(self.config, batch, name)

    @contextlib.contextmanager
    def running(self, batch: PackedBatch, window: int | None = None) -> Iterator[None]:
        """Inside, a layer may run on the batch. window: of the layer's mask."""
        with attention.named(self.config, attention.ATTENTION), attention.of(batch, window), self.rotary.of(batch):
            yield


class Padded(Way):
    name = "padded"
    lost = "its layers do not run on packed samples: they run on padded ones, with their own attention"

    def inputs(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        ids = batch.input_ids
        return {"input_ids": (ids if batch.pad_index is None else ids[batch.pad_index]).view(self.shape(batch))}

    def to_grid(self, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(T, D) -> (B, Lmax, D)"""
        back = None if batch.pad_index is None else batch.unpad_index
        return to_places((rows, batch.pad_index, back))[0].unflatten(0, self.shape(batch))

    def to_rows(self, grid: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(B, Lmax, D) -> (T, D)"""
        rows = grid.flatten(0, 1)
        return rows if batch.pad_index is None else take(rows, batch.unpad_index)

    def shape(self, batch: PackedBatch) -> tuple[int, int]:
        return batch.num_samples, max(batch.lengths)

    def places(self, batch: PackedBatch) -> Places:
        samples, length = self.shape(batch)
        sample = torch.arange(samples, device=batch.device).repeat_interleave(length)
        return Places((samples, length), sample, None if batch.pad_index is None else batch.unpad_index)

    def check(self, batch: PackedBatch, name: str) -> None:
        """Positions are those within the sample."""

    @contextlib.contextmanager
    def running(self, batch: PackedBatch, window: int | None = None) -> Iterator[None]:
        with self.rotary.alone():
            yield


class Alone(Padded):
    name = "alone"
    lost = "its layers run on one sample at a time: beside others a sample's result is another"

    def together(self, longest: int) -> bool:
        return False

    def pieces(self, batch: PackedBatch) -> list[PackedBatch]:
        return [batch] if self.together(max(batch.lengths)) else batch.samples()


class Picked(Alone):
    name = "picked"
    lost = "its attention picks keys: samples are padded, and longer ones than it picks keys run one at a time"

    def together(self, longest: int) -> bool:
        return longest <= min(_picked_keys(self.config))


def _picked_keys(config: Any) -> list[int]:
    """How many keys attention picks for a query, as configurations of transformers call it."""
    names = [name for name in vars(config) if _PICKED.fullmatch(name)]
    return [value for name in names if isinstance(value := getattr(config, name), int)]


_PICKED = re.compile(r"index_topk|indexer_budget|keep_window_size")


def ways_of(config: Any, rotary: RotaryByLength) -> list[Way]:
    """The ways that may fit a model, the best one first."""
    picks = picks_keys(config)
    kinds: list[type[Way]] = [] if picks or odd_types(config) else [Way]
    if rotary.same_up_to == math.inf:  # else a sample's angles would be those of the longest one beside it
        kinds.append(Picked if picks else Padded)
    return [kind(config, rotary) for kind in (*kinds, Alone)]


def picks_keys(config: Any) -> bool:
    return bool(_picked_keys(config))
