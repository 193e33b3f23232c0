"""Several processes, one run.

    torchrun --nproc-per-node 4 -m kunbr_fast unlearn --model DIR --forget F.jsonl --retain R.jsonl --out DIR

Every rank holds the whole model. What is divided:

- Blocks (insertion="independent"). Each rank trains whole blocks and nothing is communicated until the merge. The
  weights are those of one process, bit for bit. `assign.spread_blocks` deals the blocks out.
- The samples of a step (warm-up, insertion="cumulative", blocks too few to go round). Each rank computes the gradient
  of its own samples, the gradients are summed, and every rank makes the same update. The weights are those of one
  process up to summation order. `training.shared`.
- The prefix cache, where all ranks train a block together: each sample's activations are on one rank, its home.
  `assign.homes`.
- The samples of a density (a few float64 numbers are summed) and of a mask (the block's gradient is).

Rank 0 writes the run's state, the report and the model. While ranks train blocks of their own, each writes the files of
its blocks and a state of its own. All ranks must see the output directory. A killed run can be resumed with any number
of processes.

A rank that fails says why in the store where the ranks met. The others, which wait for it, see its connection close,
read the reason and raise `ProcessGone`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kunbr_fast.files.documents import parse_json
from kunbr_fast.files.shown import shown

# Ranks may wait for hours, for one that evaluates or trains its last block. One that dies is noticed at once.
TIMEOUT = datetime.timedelta(days=7)
CHUNK = 1 << 26  # elements of a half-precision tensor that are summed in fp32 at a time
LONGEST = 1 << 26  # bytes of JSON that one rank may send


class ProcessGone(RuntimeError):
    """Another rank has failed or was killed. told: whether that rank has said why."""

    def __init__(self, text: str, told: bool):
        self.told = told
        super().__init__(text)


@dataclasses.dataclass(frozen=True)
class Group:
    """The ranks of a run, seen from one of them. With one process no method does anything."""

    rank: int = 0
    size: int = 1
    store: Any = None  # torch's key-value store, where the ranks met

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of `items`, which all ranks have."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Blocks until every rank is here."""
        if self.size > 1:
            with self._communicating():
                dist.all_reduce(torch.zeros(1))  # on the host, where a lost rank is noticed

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, the same bits on all; half precision is summed in fp32."""
        if self.size == 1:
            return
        with self._communicating():
            # one by one: an operation still under way when a rank is lost would keep this process from exiting
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

    def send(self, parts: Sequence[torch.Tensor]) -> None:
        """Each rank's own of `parts`, one for each rank, becomes everybody's."""
        with self._communicating():
            for rank, part in enumerate(parts):
                if part.numel():
                    dist.broadcast(part, rank)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order: what JSON makes of it, as nothing that ranks send is unpickled."""
        if self.size == 1:
            return [value]
        # where the process group has no backend for the host (Trainer's may be nccl alone), through the GPU
        device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
        text = json.dumps(value, allow_nan=False).encode()
        sizes = self._all_gather(torch.tensor([len(text)], device=device))
        longest = int(max(sizes))
        if longest > LONGEST:  # on all ranks alike
            raise ValueError(f"a rank sends {longest} bytes, expected at most {LONGEST}: please report this bug")
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
        sent = [found.cpu().numpy().tobytes() for found in self._all_gather(padded)]
        return [parse_json(found, f"what rank {rank} has sent") for rank, found in enumerate(sent)]

    def _all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._communicating():
            dist.all_gather(found, mine)
        return found

    def check_same(self, values: Mapping[str, Any]) -> None:
        """ValueError that names the first of `values` that differs between ranks."""
        for rank, other in enumerate(found := self.gather(dict(values))):
            for name in found[0]:
                if other.get(name) != found[0][name]:
                    raise ValueError(
                        f"{name}: rank {rank} has {other.get(name)!r}, rank 0 {found[0][name]!r}: start all processes "
                        "with the same command, on the same files"
                    )

    def check_same_bits(self, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """RuntimeError where a tensor differs between ranks: that is a bug."""
        if self.size > 1:
            found = self.gather({name: _digest(tensor) for name, tensor in tensors.items()})
            for rank, other in enumerate(found):
                if odd := [name for name in found[0] if other.get(name) != found[0][name]]:
                    raise RuntimeError(
                        f"{what}: {odd[0]} differs between rank 0 and rank {rank}: please report this bug"
                    )

    @contextlib.contextmanager
    def _communicating(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's, nccl's or the store's
            raise self._gone(error) from error

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, torch communicates by itself, between computations (FSDP): a rank that is lost is told as here."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ProcessGone) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise self._gone(error) from error

    def _gone(self, error: RuntimeError) -> ProcessGone:
        if (told := self._failure(wait=2.0)) is not None:
            return ProcessGone(f"stopped, since {told}", True)
        text = " ".join(str(error).split())
        gone = "another process of this run has gone (killed, perhaps for its memory; torchrun says which)"
        return ProcessGone(f"stopped, since {gone}: {text}", False)

    def tell(self, error: BaseException) -> bool:
        """Tells the other ranks that this one has failed. False if one before it has told the same error."""
        try:
            mine = f"rank {self.rank} failed: {error}"
            if self.store.add("kunbr_failures", 1) == 1:
                self.store.set("kunbr_failure", mine)
                return True
            told = self._failure(wait=2.0) or ""
            return told.partition(" failed: ")[2] != str(error)
        except RuntimeError:  # the store is gone too
            return True

    def _failure(self, wait: float) -> str | None:
        """What the first failed rank has told, or None after `wait` seconds: the message may come late."""
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
    """The sum of the tensor's elements, read as integers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0


def num_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    size = _number("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={size} is set, {missing[0]} is not: start with torchrun --nproc-per-node N -m kunbr_fast ..., "
            "or unset WORLD_SIZE for one process"
        )
    if size < 1 or (size > 1 and _number("RANK") >= size):
        raise ValueError(f"RANK={os.environ.get('RANK')} of WORLD_SIZE={size}: expected a rank from 0 to below it")
    return size


def _number(name: str, default: str = "") -> int:
    """Of a variable that torchrun sets."""
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{name}={shown(text)}: expected a whole number, as torchrun sets it; unset it for one process"
        )
    return int(text)


def local_device() -> str:
    """The GPU of this rank."""
    local, count = _number("LOCAL_RANK", "0"), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are {count}: start as many")
    return f"cuda:{local}"


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """Joins the processes that torchrun has started into a `Group`, which it yields; `ALONE` for one process.

    device: where the model will be; "cuda" gives each rank a GPU of its own, and nccl beside gloo. An exception is told
    to the other ranks; where one of them has told the same, it becomes `ProcessGone`.
    """
    if num_processes() == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_device())
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={_number('MASTER_PORT')}, RANK={_number('RANK')}"
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{place}: could not meet the other processes: {said}: start all with torchrun, each with a rank of its own"
        ) from error
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
