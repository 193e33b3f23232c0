"""A step's forward and backward pass as a CUDA graph: one launch, no gaps between kernels.

A graph runs the same kernels on the same addresses each time, so what changes from step to step (tokens, index tensors,
activations at the block's input, weights of the rows) is copied into buffers of a fixed size, a *bucket*. The filling
is inert: its tokens belong to no sample, its rows have weight 0, and both have a gradient of exactly 0. A new bucket is
made when no captured one fits with at most an eighth of it empty.

Only what is known before the pass goes in: the objective must be a weight for each row (`losses.RowWeights`). The
update stays outside, since the host has to see first that loss and gradient are finite: one wait a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kunbr_fast.data import PackedBatch, grid
from kunbr_fast.kernels.dispatch import Unavailable, in_graphs
from kunbr_fast.memory import is_out_of_memory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives.losses import RowWeights

logger = logging.getLogger(__name__)

MAX_GRAPHS = 16  # of one block: beyond these the bucket that was used longest ago is dropped
WASTE = 8  # a bucket is at most 1/WASTE empty
ATTENTION_STEP = 64  # the grid of attention is a multiple of this wide: its share of a step is small

Pass = Callable[[PackedBatch, RowWeights], tuple[torch.Tensor, torch.Tensor]]
Capture = Callable[[Callable[[], Any], Any], tuple[Callable[[], None], Any]]


def round_up(n: int) -> int:
    """The next size: multiples of 1/8 of the power of two below, 16 at least."""
    step = max(16, (1 << (n.bit_length() - 1)) // WASTE)
    return -(-n // step) * step


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The sizes of a captured step."""

    samples: int
    tokens: int
    rows: int
    longest: int  # places for each sample in the grid of attention
    most_rows: int  # and in that of the last layer's
    layer: int
    cached: bool  # whether activations at the block's input are given
    capped: bool

    @classmethod
    def of(cls, batch: PackedBatch, rows: RowWeights, max_positions: int | None) -> Bucket:
        wide = -(-max(batch.lengths) // ATTENTION_STEP) * ATTENTION_STEP
        wide = wide if max_positions is None else min(wide, max_positions)
        most = -(-max(batch.row_counts) // ATTENTION_STEP) * ATTENTION_STEP
        most, count = min(wide, most), batch.num_samples
        # at most as many as there are places: the filling has places of its own
        tokens = min(round_up(batch.num_tokens), count * wide)
        num_rows = min(round_up(len(rows.weight)), count * most)
        return cls(count, tokens, num_rows, wide, most, batch.layer, batch.hidden is not None, rows.cap is not None)

    def takes(self, other: Bucket, batch: PackedBatch, num_rows: int) -> bool:
        """Whether a batch whose own bucket is `other` fits, with little waste."""
        if self != dataclasses.replace(other, tokens=self.tokens, rows=self.rows):
            return False
        sizes = ((self.tokens, batch.num_tokens), (self.rows, num_rows))
        return all(size >= n and (size - n) * WASTE <= size for size, n in sizes)


def unused(index: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """`count` numbers below `size` that are not in `index`."""
    free = torch.ones(size, dtype=torch.bool)
    free[index] = False
    return free.nonzero().squeeze(1)[:count]


class StaticBatch:
    """The buffers of a bucket, as a packed batch and its rows' weights."""

    def __init__(self, bucket: Bucket, hidden_size: int, dtype: torch.dtype, device: torch.device):
        self.bucket = bucket
        B, T, R, L, M = bucket.samples, bucket.tokens, bucket.rows, bucket.longest, bucket.most_rows
        sizes = dict(input_ids=T, position_ids=T, rows=R, targets=R, pad_index=B * L, unpad_index=T)
        sizes |= dict(row_index=B * M, row_back=R, row_places=B * M)
        self._staging = torch.zeros(sum(sizes.values()), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._integers = self._staging.to(device, copy=True)
        self._host, held = (
            dict(zip(sizes, flat.split(list(sizes.values())))) for flat in (self._staging, self._integers)
        )
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        hidden = torch.zeros(T, hidden_size, dtype=dtype, device=device) if bucket.cached else None
        # labels are not read where rows and targets are given
        self.batch = PackedBatch(
            held["input_ids"], held["input_ids"], held["position_ids"], [L] * B, hidden, bucket.layer
        )
        self.batch.set_indices(
            **{name: held[name] for name in ("rows", "targets", "pad_index", "unpad_index")},
            row_grid=(held["row_index"], held["row_back"], held["row_places"].view(B, M)),
        )
        weight = torch.zeros(R, dtype=torch.float64, device=device)
        self.rows = RowWeights(weight, torch.full_like(weight, torch.inf) if bucket.capped else None)

    @torch.no_grad()
    def fill(self, batch: PackedBatch, rows: RowWeights) -> None:
        """Copies a batch in. Waits for no kernel, only for the copy before."""
        host, bucket, T, R = batch.host, self.bucket, batch.num_tokens, len(rows.weight)
        if self._sent is not None:
            self._sent.synchronize()  # the staging buffer is still being read until then
        index, back, places = host.row_grid_of(bucket.most_rows)
        values = dict(input_ids=host.input_ids, position_ids=host.position_ids, rows=host.rows, targets=host.targets)
        values |= dict(unpad_index=host.sample_of_token * bucket.longest + host.position_ids)
        values |= dict(pad_index=grid(host.cu_seqlens[:-1], torch.tensor(host.lengths), bucket.longest))
        values |= dict(row_index=index, row_back=back, row_places=places.flatten())
        # `gather` wants an index that names nothing twice
        others = dict(rows=bucket.tokens, unpad_index=bucket.samples * bucket.longest)
        others |= dict(row_back=bucket.samples * bucket.most_rows)
        for name, into in self._host.items():
            n = len(values[name])
            into[:n] = values[name]
            into[n:] = unused(values[name], others[name], len(into) - n) if name in others else 0
        self._integers.copy_(self._staging, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        if batch.hidden is not None:
            self.batch.hidden[:T].copy_(batch.hidden)
            self.batch.hidden[T:].zero_()
        self.rows.weight[:R].copy_(rows.weight)
        self.rows.weight[R:].zero_()
        if rows.cap is not None:
            self.rows.cap[:R].copy_(rows.cap)
            self.rows.cap[R:].fill_(torch.inf)


def capture_cuda(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """(replay, what `function()` returned under capture, rewritten by each replay). Runs `function` once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces, kernels are compiled
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            out = function()
    except BaseException:
        torch.cuda.set_stream(outside)
        _close(pool, graph)
        raise
    return graph.replay, out


_failed: list[Any] = []  # graphs whose capture could not be ended: torch's allocators may still ask them


def _close(pool: Any, graph: Any) -> None:
    """Closes the pool that a failed capture allocated from.

    Where the driver cannot end a capture, torch leaves its pool open, and its memory held. While one is open, blocks
    that another stream has used are never freed, and to empty the cache is an error.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the capture was ended, and the graph lets go of the pool itself
        return
    torch._C._cuda_releasePool(device, pool)
    _failed.append(graph)


class StepGraphs:
    """Runs `forward` and its backward on batches put into buckets; replays a graph where one can be captured.

    forward(batch, rows) -> (loss, nll (R,)), whose backward adds to `gradient`, at a fixed address. A capture leaves
    `gradient` as it was: it may hold a step's earlier micro-batches.
    capture: as `capture_cuda`, or None: run each step launch by launch on the same buckets (the bits of its graph).
    `Unavailable`, when a step is called, where it cannot be captured.
    """

    def __init__(self, decoder: Decoder, forward: Pass, gradient: torch.Tensor, capture: Capture | None = capture_cuda):
        self._decoder, self._forward, self._gradient, self._capture = decoder, forward, gradient, capture
        on_gpu = decoder.device.type == "cuda" and capture is not None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._held: dict[Bucket, tuple[StaticBatch, Callable[[], None] | None, Any]] = {}
        self._said = False  # that long samples have no graph

    def drop(self) -> None:
        """Lets go of all buckets and graphs, and of the memory that these hold."""
        self._held.clear()
        if self.pool is not None:
            self.pool = torch.cuda.graph_pool_handle()

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The buckets' activations at the block's input, where they have any."""
        return [static.batch.hidden for static, _, _ in self._held.values() if static.batch.hidden is not None]

    @property
    def captured(self) -> int:
        """How many graphs are held."""
        return sum(replay is not None for _, replay, _ in self._held.values())

    def __call__(self, batch: PackedBatch, rows: RowWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, nll (R,)), detached, of the batch; its gradients are added to. Valid until the next call."""
        own, num_rows = Bucket.of(batch, rows, self._decoder.max_positions), len(rows.weight)
        if own.longest > self._decoder.rotary.same_up_to:  # a bucket does not know its samples' lengths
            if not self._said:
                logger.warning(
                    f"cuda_graphs: samples beyond {self._decoder.rotary.same_up_to} tokens have rotary angles of their "
                    "own: their steps run launch by launch, same result"
                )
            self._said = True
            return self._run(batch, rows)
        bucket = next((b for b in self._held if b.takes(own, batch, num_rows)), own)
        if bucket in self._held:
            self._held[bucket] = self._held.pop(bucket)  # the last used comes last
            static, replay, out = self._held[bucket]
            static.fill(batch, rows)
        else:
            static, replay, out = self._add(bucket, batch, rows)
        if replay is None:
            out = self._run(static.batch, static.rows)
        else:
            replay()
        loss, nll = out
        return loss, nll[:num_rows]

    def _run(self, batch: PackedBatch, rows: RowWeights) -> tuple[torch.Tensor, torch.Tensor]:
        with in_graphs():  # before the capture too, and without one: the same kernels
            loss, nll = self._forward(batch, rows)
            loss.backward()
        return loss.detach(), nll

    def _add(self, bucket: Bucket, batch: PackedBatch, rows: RowWeights) -> tuple:
        while len(self._held) >= MAX_GRAPHS:
            del self._held[next(iter(self._held))]
        decoder = self._decoder
        static = StaticBatch(bucket, decoder.hidden_size, decoder.state_dtype, decoder.device)
        static.fill(batch, rows)
        replay = out = None
        if self._capture is not None:
            with self._gradient_kept():  # the run before a capture adds to it
                try:
                    replay, out = self._capture(lambda: self._run(static.batch, static.rows), self.pool)
                except RuntimeError as error:  # a model's own code that waits for the device, for example
                    if is_out_of_memory(error):
                        raise
                    raise Unavailable(
                        f"cuda_graphs=True: a step cannot be captured as a CUDA graph ({error.__context__ or error}). "
                        "Leave cuda_graphs out: the same result, launch by launch"
                    ) from error
        self._held[bucket] = static, replay, out
        return self._held[bucket]

    @contextlib.contextmanager
    def _gradient_kept(self) -> Iterator[None]:
        """Puts the gradient back at the end. Only a step's later micro-batches find one that is not zero; it waits in
        pinned memory then, since the device's may be short, and the stream alone waits for the copies."""
        gradient, kept = self._gradient, None
        if bool(gradient.any()):
            kept = torch.empty_like(gradient, device="cpu", pin_memory=gradient.is_cuda)
            kept.copy_(gradient, non_blocking=True)
        try:
            yield
        finally:
            gradient.zero_() if kept is None else gradient.copy_(kept, non_blocking=True)


def check_cuda_graphs(asked: bool, device: torch.device) -> None:
    if asked and device.type != "cuda":
        raise Unavailable(f"cuda_graphs=True: the model is on {device}, not on a CUDA device")
