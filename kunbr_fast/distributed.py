"""Several processes for one run: who computes what, and how they tell each other.

    torchrun --nproc-per-node 4 -m kunbr_fast unlearn --model DIR --forget F.jsonl --retain R.jsonl --out DIR

Every process holds the whole model. What is divided:

- blocks (insertion="independent"): each trains whole blocks, longest first to whoever has the least to do, and nothing
  is communicated until the merge. The weights are those of one process, bit for bit. `spread_blocks`
- samples of a step (warm-up, insertion="cumulative", blocks that are too few to go round): each computes the gradient of
  its part, weighted so that the parts' sum is the step's, and the gradients of what is trained are summed: for a block one
  vector. All then make the same update of the same bits. Against one process: equal up to summation order. `SharedStep`
- the prefix cache, by sample: for blocks that all train together a sample always goes to the same process, its home, which
  alone holds it. `homes`
- samples of a density: one sum of a few float64 numbers. Of a mask: one sum of the block's gradient.

One process (rank 0) writes the run's state, the report and the model; while blocks are trained apart each process writes
its own blocks' files and a small state of its own (`checkpoint.PartState`). All must see the output directory. Whoever is
killed, the run can be resumed with any number of processes.

A process that fails tells the others why through the store that they met at; those that wait for it find its connection
closed and raise `ProcessGone`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kunbr_fast import losses
from kunbr_fast.checkpoint import PartState, RunState
from kunbr_fast.data import PackedBatch
from kunbr_fast.original import Reference
from kunbr_fast.training import Diverged, finite

# One process may evaluate, or train its last block, for hours while the others wait. One that dies is noticed at once.
TIMEOUT = datetime.timedelta(days=7)
# What a step shared by all costs beyond its part: small batches use a GPU less well, and gradients are summed. A guess.
SHARING_COSTS = 1.25
PARALLEL = ("auto", "blocks", "samples")
CHUNK = 1 << 26  # elements of a half-precision gradient that are widened and summed at a time


class ProcessGone(RuntimeError):
    """Another process of this run has failed or was killed. told: whether it has said why, and where."""

    def __init__(self, text: str, told: bool):
        self.told = told
        super().__init__(text)


# ---------------------------------------------------------------- the processes


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it. With one process every method is free and changes nothing."""

    rank: int = 0
    size: int = 1
    store: Any = None  # torch's, that they met at

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part of what all have."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            with self._speaking():
                dist.all_reduce(torch.zeros(1))  # on the host, where a lost peer is noticed

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each tensor becomes the sum over processes, the same bits on all of them; half precision is summed in fp32."""
        if self.size == 1:
            return
        with self._speaking():
            # one after the other: what is under way when a process is lost would keep this one from leaving
            for tensor in tensors:
                flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    for part in flat.split(CHUNK):
                        wide = part.float()
                        dist.all_reduce(wide)
                        part.copy_(wide)
                else:
                    dist.all_reduce(flat)
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._speaking():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, values: Mapping[str, Any]) -> None:
        """ValueError that names the first of `values` which another process has otherwise."""
        for rank, other in enumerate(found := self.gather(dict(values))):
            for name in found[0]:
                if other.get(name) != found[0][name]:
                    raise ValueError(
                        f"{name}: rank {rank} has {other.get(name)!r}, rank 0 {found[0][name]!r}: start all processes with "
                        "the same command, on the same files"
                    )

    def check_same_bits(self, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """RuntimeError where a tensor is not the same on all processes, which no step leads to."""
        if self.size > 1:
            found = self.gather({name: _digest(tensor) for name, tensor in tensors.items()})
            for rank, other in enumerate(found):
                if odd := [name for name in found[0] if other.get(name) != found[0][name]]:
                    raise RuntimeError(
                        f"{what}: {odd[0]} differs between rank 0 and rank {rank}: please report this bug"
                    )

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of gloo, of nccl, of the store
            if (told := self._failure(wait=2.0)) is not None:
                raise ProcessGone(f"stopped, since {told}", True) from error
            text = " ".join(str(error).split())
            raise ProcessGone(
                f"stopped, since another process of this run has gone (killed, perhaps for its memory; torchrun says which): {text}",
                False,
            ) from error

    def tell(self, error: BaseException) -> bool:
        """Lets the others know that this process has failed. False where one before has told the same."""
        try:
            mine = f"rank {self.rank} failed: {error}"
            if self.store.add("kunbr_failures", 1) == 1:
                self.store.set("kunbr_failure", mine)
                return True
            told = self._failure(wait=2.0) or ""
            return told.partition(" failed: ")[2] != str(error)
        except RuntimeError:  # the store has gone too
            return True

    def _failure(self, wait: float) -> str | None:
        """What a failed process has told; one that fails tells before it leaves, but news may come late."""
        try:
            until = time.monotonic() + wait
            while not self.store.check(["kunbr_failure"]):
                if time.monotonic() > until:
                    return None
                time.sleep(0.05)
            return self.store.get("kunbr_failure").decode()
        except (RuntimeError, AttributeError):
            return None


ALONE = Group()


def _digest(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bit patterns."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0


def num_processes() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={size} is set, {missing[0]} is not: start with torchrun --nproc-per-node N -m kunbr_fast ..., or "
            "unset WORLD_SIZE for one process"
        )
    return size


def local_device() -> str:
    """This process's own GPU."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are {count}: start as many")
    return f"cuda:{local}"


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """Inside, the processes that torchrun has started are one `Group`: `ALONE`, if it has not, or only one.

    device: where the model will be; "cuda" for GPUs, one a process (then nccl, else gloo). An exception is told to the
    others on its way out, and becomes `ProcessGone` where one of them has told the same.
    """
    if num_processes() == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_device())
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    group = Group(rank, size, dist.PrefixStore("kunbr", store))
    try:
        yield group
    except (ProcessGone, KeyboardInterrupt):
        raise
    except BaseException as error:
        if not group.tell(error):
            raise ProcessGone(f"stopped: {error}", True) from error
        raise
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- the state of a run


class SharedState(RunState):
    """A `RunState` that one process writes, and all read: between two waits, so that none reads a later one."""

    def __init__(self, writes: bool, wait: Callable[[], None], *arguments: Any):
        self._writes, self._wait = writes, wait
        *others, resume = arguments
        if writes:
            super().__init__(*others, resume)
        wait()
        if not writes:
            super().__init__(*others, True)
        wait()

    def _write(self) -> None:
        if self._writes:
            super()._write()

    def _share(self) -> None:
        """What the writer has, to all."""
        self._wait()
        if not self._writes:
            self.state = self._read()
        self._wait()

    def finish(self, stage: str, result: dict, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """As `RunState.finish`; all call it, the result that counts is the writer's."""
        if self._writes:
            super().finish(stage, result, tensors)
        self._share()

    def save_progress(self, stage: str, step: int, tensors: Mapping[str, torch.Tensor], extra: dict[str, Any]) -> None:
        if self._writes:
            super().save_progress(stage, step, tensors, extra)

    def drop_file(self, stage: str) -> None:
        """All have read what it held: they have trained from it, and waited for each other since."""
        if self._writes:
            super().drop_file(stage)

    @contextlib.contextmanager
    def apart(self, rank: int) -> Iterator[PartState]:
        """Inside, each process has a state of its own to write to; afterwards all of it is here."""
        if self._writes:
            self._interrupt(self.state["current"])
            self.state["current"] = None
            self._write()
        self._share()
        yield PartState(self, rank)
        self._wait()
        if self._writes:
            parts = self._take_parts()
            self._write()
            for path in parts:
                path.unlink()
        self._share()


# ---------------------------------------------------------------- blocks


def block_cost(block: range, num_layers: int) -> float:
    """What a step of a block's training takes, in forward passes of one layer: 3 for each of its own layers (forward, dX,
    dW), 2 for each above (forward, dX). Those below are in the prefix cache."""
    return 3.0 * len(block) + 2.0 * (num_layers - block.stop)


def spread_blocks(
    costs: Sequence[float], size: int, share: float, parallel: str = "auto"
) -> tuple[list[list[int]], list[int]]:
    """(the blocks that each process trains alone, those that all train together), as indices into `costs`.

    share: the part of a step that the busiest process has where all train together. parallel: "blocks" for all alone,
    "samples" for all together, "auto" for whatever is predicted to end first: the blocks alone are dealt out longest
    first, each to the process with the least to do; and where that leaves some idle (fewer blocks than processes, or
    seven on four), the cheapest or the costliest ones are trained together by all.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def dealt(indices: Sequence[int]) -> tuple[float, list[list[int]]]:
        alone: list[list[int]] = [[] for _ in range(size)]
        loads = [0.0] * size
        for index in indices:
            rank = min(range(size), key=lambda r: (loads[r], r))
            alone[rank].append(index)
            loads[rank] += costs[index]
        return max(loads), [sorted(part) for part in alone]

    counts = {"auto": range(len(costs) + 1), "blocks": [0], "samples": [len(costs)]}[parallel]
    best = None
    for count in counts:
        for together in (order[:count], order[len(order) - count :]):
            longest, alone = dealt([i for i in order if i not in together])
            time_ = longest + share * SHARING_COSTS * sum(costs[i] for i in together)
            if best is None or time_ < best[0]:
                best = time_, alone, sorted(together)
    return best[1], best[2]


# ---------------------------------------------------------------- samples


def homes(steps: Iterable[Sequence[int]], sizes: Sequence[int], ranks: int) -> list[int]:
    """For each sample the process that it always goes to, in steps that all processes share.

    steps: each one's samples; sizes: of each sample, in tokens. A fixed home means that one process alone needs the sample's
    activations. The steps are known beforehand, so homes are chosen, longest sample first, where the sample meets the
    fewest tokens of its own steps (an index modulo `ranks` leaves the busiest process with 1.6 times its part at 12 samples
    a step on 4 processes; this with 1.2 to 1.4 times, and less in larger steps).
    """
    where: list[list[int]] = [[] for _ in sizes]
    for number, step in enumerate(steps):
        for i in step:
            where[i].append(number)
    tokens: dict[int, list[int]] = {}  # of a step, on each process
    held = [0] * ranks
    home = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        loads = [tokens.setdefault(number, [0] * ranks) for number in where[i]]
        best = min(range(ranks), key=lambda r: (sum(load[r] for load in loads), held[r], r))
        home[i] = best
        held[best] += sizes[i]
        for load in loads:
            load[best] += sizes[i]
    return home


def busiest_share(steps: Iterable[Sequence[int]], sizes: Sequence[int], home: Sequence[int], ranks: int) -> float:
    """The part of all steps' tokens that the busiest process of each step has: 1 / ranks at best."""
    most = total = 0
    for step in steps:
        loads = [0] * ranks
        for i in step:
            loads[home[i]] += sizes[i]
        most, total = most + max(loads), total + sum(loads)
    return most / total


class SharedStep:
    """One step of a training, whose samples come in parts: of several processes, of several micro-batches, or both.

    `add` or `add_all` makes the gradient of a part, `gather` sums over the processes. A part's loss is the objective of its
    samples, weighted by their share of the step's forget samples (the retain term by that of the retain samples), so that
    the sum over all parts is the loss of the step: means of samples are made of means of parts.
    """

    def __init__(self, training: Any):
        self._training = training
        self._sums = torch.zeros(6, dtype=torch.float64, device=training.decoder.device)

    def add(
        self,
        batch: PackedBatch,
        num_forget: int,
        reference: Reference | None,
        share: float,
        retain_share: float,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> torch.Tensor:
        """Adds the gradient of a packed batch (as `step_packed` takes it) that has these shares of the step's forget and
        retain samples. Returns its part of the step's loss. autocast: what the forward pass runs in."""
        with self._scaled(share, retain_share) as factor, autocast():
            loss, nll = self._training.loss(batch, num_forget, reference)
        loss = loss * factor
        loss.backward()
        return self._count(batch, num_forget, loss.detach(), nll, retain_share)

    def add_all(
        self, batch: PackedBatch, num_forget: int, reference: Reference | None, share: float, retain_share: float
    ) -> torch.Tensor:
        """`add` of all that this process has of the step, which the training takes through as it does a whole one: in parts
        that fit its memory, layer by layer."""
        criterion = self._training.criterion
        # `share` within the loss: layers that compute in fp32 round alike
        with self._scaled(share, retain_share) as criterion.share:
            try:
                loss, nll = self._training.accumulate(batch, num_forget, reference)
            finally:
                criterion.share = 1.0
        return self._count(batch, num_forget, loss, nll, retain_share)

    @contextlib.contextmanager
    def _scaled(self, share: float, retain_share: float) -> Iterator[float]:
        """Inside, the criterion's loss of a part times the number yielded is what it has in the step's."""
        criterion, factor = self._training.criterion, share or 1.0
        criterion.retain_scale = retain_share / factor
        try:
            yield factor
        finally:
            criterion.retain_scale = 1.0

    def _count(
        self, batch: PackedBatch, num_forget: int, loss: torch.Tensor, nll: torch.Tensor | None, retain_share: float
    ) -> torch.Tensor:
        criterion, sums = self._training.criterion, self._sums
        sums[0] += loss
        if criterion.terms:  # an objective that adapts to its retain term sees the whole step's
            sums[1] += criterion.terms.pop() * retain_share
        if nll is not None:
            found, ranges = losses.mean_nll(batch, nll), criterion.parts(batch, num_forget)
            for at, name in ((2, "forget"), (4, "retain")):
                sums[at] += found[ranges[name].start : ranges[name].stop].sum()
                sums[at + 1] += len(ranges[name])
        return loss

    def gather(self, group: Group, where: str) -> dict[str, float | None]:
        """Sums gradients and losses over the processes, and returns the step's `losses.metrics`. Raises `Diverged`, which
        names `where`, on all processes, if something is not finite; no update is made here."""
        training, sums = self._training, self._sums
        if group.size > 1:
            for parameter in training.parameters.values():  # all have the same ones to sum
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            group.sum([sums, *training.gradients()])
        loss, term, forget, num_forget, retain, num_retain = sums.tolist()
        metrics = {
            "loss": loss,
            "forget_loss": forget / num_forget if num_forget else None,
            "retain_loss": retain / num_retain if num_retain else None,
        }
        if training.criterion.objective.update is not None:
            training.criterion.terms.append(term)
        if not finite(sums, *training.gradients()):
            raise Diverged(where, metrics)
        return metrics
