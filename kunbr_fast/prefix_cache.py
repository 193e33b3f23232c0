"""The prefix cache: every sample's activations at the input of the active block.

The layers below the block are frozen, so their output for a sample never changes while the block trains. It is
computed once, kept (T_total, D), and read back by sample. `advance` rolls it forward through the layers that are in
place, so going through the blocks from low to high costs one forward pass of each layer for each sample, in all.
The cache is exact: it stores what the layers put out, in their own dtype.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, pack
from kunbr_fast.decoder import Decoder
from kunbr_fast.schedule import token_batches
from kunbr_fast.streaming import stretches

STORAGES = ("auto", "device", "host", "file")


def _free_host_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_storage(storage: str) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: expected one of {', '.join(STORAGES)}")


def choose_storage(nbytes: int, device: torch.device) -> str:
    """The first of `device`, `host` and `file` that takes at most a quarter of what is free."""
    if device.type == "cuda" and nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return "device"
    return "host" if nbytes <= _free_host_bytes() // 4 else "file"


def allocate(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    storage: str,
    directory: str | Path | None,
    what: str,
) -> torch.Tensor:
    """An uninitialised tensor in one of the storages; `what` it is for, in errors and in the file's name."""
    if storage == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if storage == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    handle, name = tempfile.mkstemp(prefix=f"{what.replace(' ', '-')}-", dir=directory)
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        # blocks are reserved now: a full disk is an error here, not a bus error in the middle of a write
        os.posix_fallocate(handle, 0, nbytes)
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the {what} needs {nbytes / 2**30:.2f} GiB in {Path(name).parent}: {error.strerror}; "
            "free space there or give another directory",
        ) from error
    finally:
        os.close(handle)
        os.unlink(name)


class PrefixCache:
    """Activations at the input of layer `layer` for `samples`, with random access by sample.

    storage: `device` (beside the model), `host` (main memory; pinned where the model is on a GPU), `file` (a
    memory-mapped file in `directory`), or `auto`: the first of these that takes at most a quarter of what is free.
    The file is unlinked at once and goes away with the process.

    The cache trusts that layers below `layer` stay as they are; `reset` starts again at the embeddings.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        storage: str = "auto",
        directory: str | Path | None = None,
        batch_tokens: int = 4096,
        progress: bool = False,
    ):
        check_storage(storage)
        self.decoder, self.samples, self.progress = decoder, list(samples), progress
        if not self.samples:
            raise ValueError("no samples: expected at least one")
        lengths = [len(sample["input_ids"]) for sample in self.samples]
        self._offsets = list(itertools.accumulate(lengths, initial=0))
        self._batches = token_batches(lengths, batch_tokens)
        shape = (self._offsets[-1], decoder.hidden_size)
        self.nbytes = math.prod(shape) * decoder.dtype.itemsize
        self.storage = choose_storage(self.nbytes, decoder.device) if storage == "auto" else storage
        self._buffer = allocate(shape, decoder.dtype, decoder.device, self.storage, directory, "prefix cache")
        self.reset()

    @property
    def layer(self) -> int | None:
        """The layer whose input is held; None after an `advance` that was interrupted by an exception."""
        return self._layer

    def reset(self) -> None:
        """Starts again at the embeddings (needed after a layer below `layer` has changed)."""
        self._fill(0, 0)

    def advance(self, layer: int) -> None:
        """Rolls every sample forward to the input of `layer`; a layer behind the present one starts again below."""
        if not 0 <= layer <= self.decoder.num_layers:
            raise ValueError(f"layer {layer}: expected 0 to {self.decoder.num_layers}")
        if self._layer is None or layer < self._layer:
            self.reset()
        if layer > self._layer:
            self._fill(self._layer, layer)

    @torch.no_grad()
    def _fill(self, start: int, stop: int) -> None:
        bar = tqdm(
            total=len(self._batches) * max(stop - start, 1),
            desc=f"prefix cache to layer {stop}",
            unit="batch",
            leave=False,
            disable=not self.progress or stop == 0,
        )
        self._layer = None  # until all samples are there
        with bar:
            for first, last in stretches(self.decoder, start, stop):
                for indices in self._batches:
                    batch = pack([self.samples[i] for i in indices]).to(self.decoder.device)
                    rows = self._buffer[self._offsets[indices[0]] : self._offsets[indices[-1] + 1]]
                    hidden = None if last == 0 else rows.to(self.decoder.device)
                    rows.copy_(self.decoder.run(batch, first, last, hidden))
                    bar.update(max(last - first, 1))
        self._layer = stop

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The samples `indices` as a packed batch on the model's device, with `hidden` and `layer` filled in."""
        if not len(indices):
            raise ValueError("an empty batch: expected at least one sample index")
        if min(indices) < 0:
            raise IndexError(f"sample index {min(indices)}: expected 0 to {len(self.samples) - 1}")
        if self._layer is None:
            raise ValueError("the prefix cache was interrupted half-way: call advance or reset first")
        parts = [self._buffer[self._offsets[i] : self._offsets[i + 1]] for i in indices]
        lengths = [len(part) for part in parts]
        hidden = self._buffer.new_empty((sum(lengths), self._buffer.shape[1]), device=self.decoder.device)
        for part, into in zip(parts, hidden.split(lengths)):  # one by one: a concatenation would not be pinned
            into.copy_(part, non_blocking=True)
        return pack([self.samples[i] for i in indices], hidden, self._layer).to(self.decoder.device)
