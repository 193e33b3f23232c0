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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

# One process may evaluate, or train its last block, for hours while the others wait. One that dies is noticed at once.
TIMEOUT = datetime.timedelta(days=7)
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


# ---------------------------------------------------------------- blocks


# ---------------------------------------------------------------- samples
