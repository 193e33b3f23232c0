"""Memory that runs out, and where large buffers lie."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import re
import resource
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

# what backends say in a RuntimeError of no type of its own
_SAYS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
_ONEDNN = "could not create a primitive"  # the whole of it: with more words it is an operation that is not offered


class OutOfMemory(torch.OutOfMemoryError):
    """The smallest part does not fit; the message says what to change."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that a device's or the host's memory ran out, or was caused by one that does (such as a
    CUDA graph's capture that ends early)."""
    while isinstance(error, RuntimeError):
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError) or said == _ONEDNN or any(text in said for text in _SAYS):
            return True
        error = error.__cause__ or error.__context__
    return isinstance(error, MemoryError)


def release() -> None:
    """Frees unused memory. To be called outside the `except`, whose error keeps its frames alive."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def gibibytes(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def cannot_fit(tokens: int | None, what: str, cures: Sequence[str], device: torch.device, said: str) -> OutOfMemory:
    """The error for a single sample (with its alternate) that does not fit, or, with tokens None, for an update."""
    when = "in the update" if tokens is None else f"with one sample of {tokens} tokens alone"
    there = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        there = f"; {gibibytes(free)} of {gibibytes(total)} are free on {device}"
    said = " ".join(said.split())
    return OutOfMemory(f"out of memory {when} ({what}{there}). Cures: {'; '.join(cures)}. What was said: {said[:300]}")


LESS = "keep less there (stream_cache, --stream-cache): the rest goes to files"
STORAGES = ("auto", "device", "host", "file")


def free_host_bytes() -> int:
    """Main memory that this process may still take, with what the page cache would give back: within its own limit
    (RLIMIT_DATA) and its cgroup's."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(available[1]) << 10 if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit != resource.RLIM_INFINITY:
        taken = re.search(r"VmData:\s+(\d+) kB", _read("/proc/self/status"))
        free = min(free, limit - (int(taken[1]) << 10 if taken else 0))
    path = re.search(r"^0::(.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    group = Path(f"/sys/fs/cgroup{path[1] if path else ''}")
    most, now = (_read(group / f"memory.{what}").strip() for what in ("max", "current"))
    if most.isdigit() and now.isdigit():
        cached = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
        free = min(free, int(most) - int(now) + (int(cached[1]) if cached else 0))
    return max(free, 0)


def _read(path: str | Path) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def pinned_bytes(size: int) -> torch.Tensor:
    """(size,) uint8 in pinned main memory, as long as this tensor itself, and not a view of it, is kept. torch's own
    pinned memory comes in powers of two. `OutOfMemory` where the system does not pin so much."""
    flat = torch.empty(size, dtype=torch.uint8)
    cuda = torch.cuda.cudart()
    try:
        torch.cuda.check_error(int(cuda.cudaHostRegister(flat.data_ptr(), size, 0)))
    except RuntimeError as error:
        raise OutOfMemory(f"{gibibytes(size)} of main memory could not be pinned ({error}): {LESS}") from error
    weakref.finalize(flat, cuda.cudaHostUnregister, flat.data_ptr())
    return flat


def choose_storage(nbytes: int, device: torch.device) -> str:
    """The first of `device`, `host` and `file` that takes at most a quarter of what is free."""
    if device.type == "cuda" and nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return "device"
    return "host" if nbytes <= free_host_bytes() // 4 else "file"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a large buffer lies.

    storage: `device` (beside the model), `host` (main memory; pinned where the model is on a GPU), `file` (a
    memory-mapped file in `directory`, by default the system's for temporary files; unlinked at once, it goes away
    with the process), or `auto`: the first of these that takes at most a quarter of what is free.
    """

    storage: str = "auto"
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"storage={self.storage!r}: expected one of {', '.join(STORAGES)}")

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str) -> torch.Tensor:
        """An uninitialised tensor for a model on `device`; `what` it is for, in errors and the file's name."""
        nbytes = math.prod(shape) * dtype.itemsize
        storage = choose_storage(nbytes, device) if self.storage == "auto" else self.storage
        if storage == "device":
            return torch.empty(shape, dtype=dtype, device=device)
        if storage == "host":
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        return self._map_file(shape, dtype, nbytes, what)

    def _map_file(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int, what: str) -> torch.Tensor:
        handle, name = tempfile.mkstemp(prefix=f"{what.replace(' ', '-')}-", dir=self.directory)
        os.unlink(name)  # at once: a killed process leaves nothing of it
        try:
            # blocks are reserved now: a full disk is an error here, not a bus error in the middle of a write
            os.posix_fallocate(handle, 0, nbytes)
            file = f"/proc/self/fd/{handle}"
            return torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the {what} needs {gibibytes(nbytes)} in {Path(name).parent}: {error.strerror}; "
                "free space there or give another directory",
            ) from error
        finally:
            os.close(handle)
