"""Keys and values of many sequences, in memory that is reserved once for all tokens to come.

transformers' DynamicCache copies the whole past at each token; its StaticCache has attention read places that are not
filled yet. Here a step writes one column, and attention gets a view of the columns up to it, or up to the end of its
block of columns: cuDNN's attention makes a plan for each shape, which takes it tens of milliseconds.

Sequences are aligned at the right: the prompt of each ends in the same column, so a step writes the same column of all.
What lies to the left of a shorter prompt is masked. Layers with a sliding window keep all columns too; the model's own
mask leaves out those that the window does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


@dataclasses.dataclass
class Writing:
    """Where the next call of the model writes: these rows, from column `begin` on. prompt: they have no past. block:
    attention reads a multiple of so many columns."""

    rows: slice
    begin: int
    prompt: bool
    block: int

    def read(self, tokens: int) -> int:
        """How many columns attention reads with so many new tokens, of which the last are those not written yet."""
        return tokens if self.prompt else -(-(self.begin + tokens) // self.block) * self.block


class _Layer(DynamicLayer):
    """(B, heads, columns, d) for keys and for values."""

    def __init__(self, writing: Writing, sequences: int, columns: int):
        super().__init__()
        self._writing, self._sequences, self._columns = writing, sequences, columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(self._sequences, x.shape[1], self._columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        here = self._writing
        end = here.begin + key_states.shape[2]
        self.keys[here.rows, :, here.begin : end] = key_states
        self.values[here.rows, :, here.begin : end] = value_states
        if here.prompt:
            return key_states, value_states
        read = here.read(key_states.shape[2])
        return self.keys[:, :, :read], self.values[:, :, :read]

    def get_seq_length(self) -> int:
        return 0 if self._writing.prompt else self._writing.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._writing.read(query_length), 0

    def take(self, rows: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values))


class Reserved:
    """For `sequences` sequences of up to `columns` tokens each, padding included, of a model with this configuration.

    cache: what the model takes. block: of `Writing`.
    ValueError for a model whose layers keep more than keys and values.
    """

    def __init__(self, config: Any, sequences: int, columns: int, block: int):
        own = DynamicCache(config=config).layers
        others = {type(layer).__name__ for layer in own} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
        if others:
            raise ValueError(f"its layers keep more than keys and values: {', '.join(sorted(others))}")
        layers = len(own) or config.get_text_config(decoder=True).num_hidden_layers
        self.writing = Writing(slice(None), 0, True, block)
        columns = -(-columns // block) * block
        self.cache = Cache(layers=[_Layer(self.writing, sequences, columns) for _ in range(layers)])

    def before_prompts(self, rows: slice, begin: int) -> None:
        """The model's next call reads the prompts of these sequences, which begin at this column."""
        self.writing.rows, self.writing.begin, self.writing.prompt = rows, begin, True

    def before_step(self, begin: int) -> int:
        """The model's next call reads the token in this column of all sequences. Returns how many columns it attends
        to, of which those behind this one are to be masked."""
        self.writing.rows, self.writing.begin, self.writing.prompt = slice(None), begin, False
        return self.writing.read(1)

    def take(self, rows: torch.Tensor) -> None:
        """These rows, in this order, become the sequences."""
        for layer in self.cache.layers:
            layer.take(rows)


class Own:
    """As `Reserved`, what the model itself would keep: states of a linear attention, the last keys of a window."""

    def __init__(self, config: Any, sequences: int, columns: int, block: int):
        self.cache = DynamicCache(config=config)

    def before_prompts(self, rows: slice, begin: int) -> None:
        pass

    def before_step(self, begin: int) -> int:
        return begin + 1

    def take(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)
