"""Verdicts on kernels: one for each kind of launch on one machine's GPU and versions, kept in files.

    KUNBR_CACHE, or $XDG_CACHE_HOME/kunbr_fast, or ~/.cache/kunbr_fast      what was proven on this machine
    proofs/*.json in this package                                           what the developers proved

A verdict counts for its own key alone: the GPU, its driver, torch, what compiled the kernel, and the kernel's sources.
Nothing here needs torch, or a GPU, to be imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cuda_library

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

KERNELS = Path(__file__).resolve().parent
PACKAGED = KERNELS / "proofs"
FORMAT = 1
LARGEST = 2**24  # bytes of a file; one GPU's verdicts take 0.1 MB
ENOUGH = 1.05  # times torch's speed that "auto" asks for: below it a kernel is not worth its risk
APART = ("__init__.py", "aot.py", "dispatch.py", "errors.py", "verdicts.py")  # no kernel's result depends on these
FOLDERS = {"lion": "optimizers", "adamw": "optimizers", "rms_norm": "norms", "layer_norm": "norms",
           "swiglu": "gated", "geglu": "gated"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """What a verdict is on. dtype: "bf16", "fp16" or "fp32". kind: of launch, one of the operation's `cases.py`."""

    operation: str
    impl: str
    dtype: str
    kind: str

    def __str__(self) -> str:
        return f"{self.operation} {self.impl} {self.dtype}" + f" {self.kind}" * (self.kind != "all")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of a call with `size` elements (what is counted: the operation's `cases.py`), medians. mode: "eager"
    or "graph", replayed from a CUDA graph, where the host's time does not count."""

    size: int
    mode: str
    torch_ms: float
    ours_ms: float

    @property
    def speed(self) -> float:
        return self.torch_ms / self.ours_ms


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a kind of launch is right, and its times beside torch.

    why: what was wrong ("wrong values", "not deterministic", "hung", "crashed: ..."), None if it is right.
    error, bound: of the value that is worst beside its bound, and that bound; None where nothing was computed.
    key: the machine and versions that it is on, by `key`.
    """

    target: Target
    why: str | None
    error: float | None = None
    bound: float | None = None
    times: tuple[Timing, ...] = ()
    key: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.why is None

    def speed(self, size: int | None, mode: str) -> float | None:
        """Torch's time over ours at the timed size nearest to `size` (in factors), the worst one where that is None.
        A mode that was not timed has the other's speed."""
        timed = [t for t in self.times if t.mode == mode] or self.times
        if not timed:
            return None
        if size is None:
            return min(t.speed for t in timed)
        return min(timed, key=lambda t: abs(math.log2(max(size, 1) / t.size))).speed

    def __str__(self) -> str:
        if not self.right:
            return self.why
        if not self.times:
            return "right, not timed"
        eager = [f"{t.speed:.2g}x{' torch' * (i == 0)} at {amount(t.size)}" for i, t in enumerate(self._of("eager"))]
        graph = [f"{t.speed:.2g}x" for t in self._of("graph")]
        slow = all(t.speed < ENOUGH for t in self.times)
        text = ("slower than torch: " if slow else "right, ") + ", ".join(eager)
        return text + f"; in a CUDA graph {', '.join(graph)}" * bool(graph)

    def _of(self, mode: str) -> list[Timing]:
        return [t for t in self.times if t.mode == mode]

    def as_json(self) -> dict[str, Any]:
        """Flat: the target's fields, `right` and the speeds beside its own."""
        return {
            **dataclasses.asdict(self.target), "right": self.right, "why": self.why, "error": _finite(self.error),
            "bound": _finite(self.bound), "times": [dataclasses.asdict(t) for t in self.times], "key": dict(self.key),
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Verdict:
        """Of what `as_json` gave. KeyError, TypeError, ValueError for anything else."""
        target = Target(*(_text(found[field.name]) for field in dataclasses.fields(Target)))
        times = tuple(
            Timing(int(t["size"]), _text(t["mode"]), float(t["torch_ms"]), float(t["ours_ms"])) for t in found["times"]
        )
        if any(not 1 <= t.size < 2**63 or not (0 < t.torch_ms < math.inf and 0 < t.ours_ms < math.inf) for t in times):
            raise ValueError("a time or a size is out of range")
        why, numbers = found["why"], [found["error"], found["bound"]]
        if found["right"] is not (why is None):
            raise ValueError("right and why contradict each other")
        error, bound = (None if number is None else float(number) for number in numbers)
        key = {_text(name): _text(value) for name, value in found["key"].items()}
        return cls(target, None if why is None else _text(why), error, bound, times, key)


def amount(size: int) -> str:
    """About how many, short: 32, 4.1k, 134M."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return str(size)


def _finite(number: float | None) -> float | None:
    """JSON has no infinity."""
    return number if number is None or math.isfinite(number) else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got a {type(value).__name__}")
    return value


# ---------------------------------------------------------------- what a verdict depends on


def key(operation: str, impl: str, device: torch.device) -> dict[str, str]:
    """What a verdict depends on beside its target: another value of any of these asks for another proof."""
    compiler = cuda_library.source_hash() if impl == "cuda" else _version("triton")
    return {**gpu(device), "compiler": compiler, "sources": sources(FOLDERS.get(operation, operation))}


def gpu(device: torch.device) -> dict[str, str]:
    """The part of a key that all verdicts on a device share."""
    return _gpu(with_index(device))


def with_index(device: torch.device) -> torch.device:
    """The current GPU for one without an index."""
    if device.type == "cuda" and device.index is None:
        import torch

        device = torch.device("cuda", torch.cuda.current_device())
    return device


@functools.lru_cache
def _gpu(device: torch.device) -> dict[str, str]:
    import torch

    if device.type != "cuda":  # for tests: a proof on a CPU is for nobody else
        return {"gpu": device.type, "torch": torch.__version__}
    of = torch.cuda.get_device_properties(device)
    return {
        "gpu": of.name, "capability": f"{of.major}.{of.minor}", "multiprocessors": str(of.multi_processor_count),
        "driver": _driver(), "torch": torch.__version__,
    }  # fmt: skip


def _driver() -> str:
    """The version of NVIDIA's driver, by its management library; "unknown" where that cannot be had (WSL's can)."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)):
            return "unknown"
        return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        return "unknown"


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def sources(folder: str) -> str:
    """A hash of the operation's Python files, of those that all operations share, and of the proof's."""
    shared = [file for file in KERNELS.glob("*.py") if file.name not in APART]
    digest = hashlib.sha256()
    for file in sorted([*shared, *(KERNELS / folder).glob("*.py"), *(KERNELS / "proof").glob("*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- files


def folder() -> Path:
    """Where this machine's verdicts are kept; where a user has no home, nowhere."""
    cache = os.environ.get("KUNBR_CACHE")
    where = Path(cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kunbr_fast"))
    try:
        return where.expanduser() / "proofs"
    except RuntimeError:
        return Path(os.devnull) / "proofs"


def read(path: Path) -> list[Verdict]:
    """The verdicts of a file; none, with a warning, of one that is damaged or not ours."""
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):  # a pipe would be waited for
            raise ValueError("no file, or larger than any of ours")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["checksum"] != _checksum(found["verdicts"]):
            raise ValueError("another format or another checksum")
        return [Verdict.from_json(verdict) for verdict in found["verdicts"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = ascii(str(error))[1:121]
        logger.warning("%s is left out (%s): run `kunbr-fast prove` to prove its kernels again", path, said)
        return []


def write(path: Path, verdicts: Iterable[Verdict]) -> None:
    """Adds verdicts to a file, in place of those on the same target and key. Atomic; OSError where it cannot be
    written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        merged = {_identity(verdict): verdict for verdict in [*read(path), *verdicts]}
        body = [verdict.as_json() for verdict in merged.values()]
        text = json.dumps({"format": FORMAT, "checksum": _checksum(body), "verdicts": body}, indent=1)
        for left in path.parent.glob(".*.tmp"):  # of a process that was killed: this one has the lock
            if re.fullmatch(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.tmp", left.name) and not left.is_dir():
                left.unlink()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def path_of(device: torch.device, where: Path | None = None) -> Path:
    """The file of a device's verdicts in `where`, or in this machine's folder."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu(device)["gpu"].lower()).strip("-") or "gpu"
    return (where or folder()) / f"{name}.json"


@contextlib.contextmanager
def alone(say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """One process of this machine at a time proves; another waits here, and then finds what the first one found.
    Where no lock can be had (a folder that is read-only) nobody waits."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = _lock(folder() / "proving.lock", say)
        lock.__enter__()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    import fcntl

    with open(path, "a") as file:  # held until it is closed, by a kill too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is proving these kernels: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checksum(verdicts: Any) -> str:
    return hashlib.sha256(json.dumps(verdicts, sort_keys=True).encode()).hexdigest()


def _identity(verdict: Verdict) -> tuple:
    return verdict.target, tuple(sorted(verdict.key.items()))


# ---------------------------------------------------------------- what this process knows

_known: dict[str, dict[tuple, Verdict]] = {}  # of a GPU, by target and key
_on_change: list[Callable[[], None]] = []


def find(target: Target, device: torch.device) -> Verdict | None:
    """The verdict on `target` that counts on `device` now, None if there is none."""
    of = key(target.operation, target.impl, device)
    return _verdicts(device).get((target, tuple(sorted(of.items()))))


def current(device: torch.device) -> list[Verdict]:
    """All that count on `device` now."""
    return [verdict for verdict in _verdicts(device).values() if find(verdict.target, device) is verdict]


def switched_off() -> bool:
    """Whether KUNBR_PROVE=0 keeps kernels from being proven, and verdicts from being used."""
    return os.environ.get("KUNBR_PROVE") == "0"


def adopt(verdicts: Iterable[Verdict], device: torch.device) -> None:
    """Makes this process go by these verdicts."""
    _verdicts(device).update({_identity(verdict): verdict for verdict in verdicts})
    for forget in _on_change:
        forget()


def forget() -> None:
    """Reads the files anew when next asked."""
    _known.clear()
    for changed in _on_change:
        changed()


def on_change(forget: Callable[[], None]) -> None:
    """Calls `forget()` whenever a verdict may have changed."""
    _on_change.append(forget)


def _verdicts(device: torch.device) -> dict[tuple, Verdict]:
    name = gpu(device)["gpu"]
    if name not in _known:
        own = path_of(device)
        files = [*sorted(PACKAGED.glob("*.json")), own]  # this machine's own come last: they count
        _known[name] = {_identity(verdict): verdict for file in files for verdict in read(file)}
    return _known[name]
