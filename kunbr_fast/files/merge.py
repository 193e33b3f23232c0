"""Merging models by their task vectors, file by file, without loading any of them.

A task vector is what training changed: tau_k = theta_k - theta_0, for models theta_k trained from the same theta_0.

    negate (models fine-tuned on the forget set)    theta = theta_0 - alpha * tau       arXiv 2212.04089
    add    (models that were unlearned)             theta = theta_0 + alpha * tau

`method` says how the models' task vectors become one tau:

    sum         their sum
    mean        their mean
    consensus   entry by entry: where at least a share `agree` of the models has the same sign, their mean,
                0 elsewhere. agree=1 is NegMerge (arXiv 2410.05583). An entry that a model did not change has no sign.

With one model, each of the three is its task vector.

Tensors are read and computed in chunks of CHUNK entries, in fp32 (fp64 where the base is fp64), and written in the
base's dtype into files with the layout of the base's own. The models' task vectors of a chunk come one by one. Memory:
a dozen chunks, for any size and number of models. Disk: every input is read once, the output is written once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from kunbr_fast.files.atomic import atomic_write, sha256
from kunbr_fast.files.headers import Header, Tensor
from kunbr_fast.files.lock import hold
from kunbr_fast.files.merge_folder import FOLDER, MergeFolder
from kunbr_fast.files.model_folder import side_files
from kunbr_fast.files.models import ModelFolder
from kunbr_fast.files.readback import NotWritten, check_copies, forget
from kunbr_fast.files.shards import INDEX
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import Target, check
from kunbr_fast.keywords import named_by, taken

METHODS = ("sum", "mean", "consensus")
MODES = ("negate", "add")
LARGEST = 2.0**128  # from here on fp32 has no number
AGAIN = "resume (resume=True) writes it again"
CHUNK = 2**20  # entries: 4 MiB of fp32, of which a dozen are in memory
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """mode: of MODES. method: of METHODS. alpha: above 0. agree: above 0.5, at most 1. The module says what they do."""

    mode: str
    method: str = "consensus"
    alpha: float = 1.0
    agree: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "agree"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
                raise ValueError(f"{name}={shown(value)}: expected a finite number")
            if abs(value) >= LARGEST:
                raise ValueError(f"{name}={shown(value)}: expected a number that fp32 holds")
            object.__setattr__(self, name, float(value))
        for name, value, known in (("mode", self.mode, MODES), ("method", self.method, METHODS)):
            if value not in known:
                raise ValueError(f"{name}={shown(value)}: expected one of {', '.join(known)}")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: expected a number above 0; mode says in which direction")
        if not 0.5 < self.agree <= 1:
            raise ValueError(f"agree={self.agree}: expected a share above 0.5 and at most 1, so that one sign has it")

    @property
    def step(self) -> float:
        return -self.alpha if self.mode == "negate" else self.alpha


@named_by(MergeSettings)
def merge_models(
    base: str | Path,
    models: Sequence[str | Path],
    output: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Writes the merged model to the directory `output`, which `load_model` and transformers read.

    base: directory of theta_0. models: one or more directories of models trained from it, of any float dtype, in any
    number of files. Safetensors only. settings: the fields of `MergeSettings`, `mode` at least.
    Each file is read back from the disk, and compared with what was computed, before its name counts as whole.

    resume: go on after a kill or a full disk; files that are whole (SHA-256) are kept. Of a finished merge: nothing to
    do.

    The output has the base's dtype, files, configuration and tokenizer. A tied weight is in the files once, and stays
    tied. Tensors that are no floats are copied from the base.

    Returns (also in `output`/merge.json): `tensors`, `entries` (numbers of floats), `agreed_share` (entries whose task
    vectors all have one sign, or, with "consensus", a share of at least `agree` of them), `changed_share` (entries of
    tau that are not 0), `task_vector_norms` (L2, one for each model), `merged_norm` (of alpha * tau), `sha256` of each
    file, the same counts and norms for each tensor in `per_tensor`, and `inputs`, by which a resumed merge knows them.

    Errors, before anything is computed: ValueError for tensors that differ in name or shape (naming file and tensor),
    for a model given twice, an output that is an input, lies in one, or is not empty; OSError where the disk has not
    enough space. While computing: ValueError for NaN or infinity, in an input or in the result, and for a file that is
    read back as another one.
    """
    how, output = taken(MergeSettings, settings, "merge_models"), Path(output)
    inputs = [Path(path) for path in (base, *models)]
    _check_inputs(inputs, output)
    if resume and not output.is_dir():
        raise ValueError(f"{output}: no merge to resume: there is no such folder")
    output.mkdir(parents=True, exist_ok=True)  # it stays, so that --resume goes on whenever a kill came
    with hold(output):
        return _merge(inputs, output, how, resume, progress)


def _check_inputs(inputs: Sequence[Path], output: Path) -> None:
    if len(inputs) == 1:
        raise ValueError("no model to merge: expected at least one, trained from the base")
    check([Target("output", str(output), FOLDER)], [("an input", path) for path in inputs])
    for number, path in enumerate(inputs):
        if any(path.exists() and path.samefile(other) for other in inputs[:number]):
            raise ValueError(f"{path} is given twice: its task vector would be counted twice, or be zero")
        if not _is_utf8(path.resolve()):
            what = "base" if number == 0 else "a model to merge"
            raise ValueError(f"{plain(path)}: {what}, in a folder whose name is not UTF-8: rename it")


def _merge(inputs: Sequence[Path], output: Path, how: MergeSettings, resume: bool, progress: bool) -> dict[str, Any]:
    shards = [ModelFolder(path, configured=path is inputs[0]).shards for path in inputs]
    headers = [found.headers for found in shards]
    sources = [{tensor.name: tensor for header in found for tensor in header.tensors} for found in headers]
    _check_same(inputs, sources)
    identities = [[_identity(header) for header in found] for found in headers]
    named = [{"directory": str(path.resolve()), "files": found} for path, found in zip(inputs, identities)]
    folder = MergeFolder(output, dataclasses.asdict(how) | {"inputs": named}, resume)
    if folder.finished is not None:
        return folder.finished
    index = {} if shards[0].index is None else {INDEX: shards[0].index}
    beside = index | side_files(inputs[0])  # config.json is last: it makes the directory a model
    for header in headers[0]:
        folder.claim(header.file.name, header.raw, header.size)
    for name, path in beside.items():
        folder.claim(name, path.read_bytes(), path.stat().st_size)
    folder.check_space(sum(header.size for header in headers[0] if header.file.name not in folder.done))
    folder.keep()
    total = sum(header.size for header in headers[0])
    with tqdm(total=total, desc="merge", unit="B", unit_scale=True, disable=not progress) as bar:
        for header in headers[0]:
            name = header.file.name
            if name in folder.done:
                bar.update(header.size)
            else:
                folder.done[name] = _merge_file(output / name, header, sources, how, bar)
                folder.keep()
    for name, path in beside.items():
        with atomic_write(output / name) as copy:
            copy.write(path.read_bytes())
    with _reading_back("delete it if it is there, then "):
        for name in beside:
            forget(output / name)
        check_copies(beside, output)
    with _reading_back():
        ModelFolder(output, log=False)
    summary = _summary(how, inputs, folder.done) | {"inputs": folder.job["inputs"]}
    folder.finish(summary)
    return summary


@contextlib.contextmanager
def _reading_back(first: str = "") -> Iterator[None]:
    """What is not there, cannot be read or is something else becomes a `NotWritten` with the cure."""
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{plain(error.filename)}: read back, {error.strerror}: {AGAIN}") from error
    except ValueError as error:
        raise NotWritten(f"{error}: {first}{AGAIN}") from error


# ---------------------------------------------------------------- what is merged


def _identity(header: Header) -> list:
    """Recognises a file after an interruption, without reading all of it."""
    file = header.file
    return [file.name, header.size, file.stat().st_mtime_ns, hashlib.sha256(header.raw).hexdigest()]


@contextlib.contextmanager
def _opened(tensor: Tensor) -> Iterator[_Reader]:
    with open(tensor.file, "rb") as handle:
        handle.seek(tensor.start)
        yield _Reader(tensor, handle)


@dataclasses.dataclass
class _Reader:
    """A tensor's bytes, or entries, in chunks."""

    tensor: Tensor
    handle: BinaryIO

    def raw(self, count: int) -> bytearray:
        data = bytearray(count)
        try:
            found = self.handle.readinto(data)
        except OSError as error:  # else it would be the output's, which is being written
            raise ValueError(f"{self.tensor.file}: cannot be read: {error.strerror}") from error
        if found != count:
            raise ValueError(f"{self.tensor.file}: cut short while it was read: is it still being written?")
        return data

    def entries(self, count: int, wide: torch.dtype) -> torch.Tensor:
        """The next `count` entries; ValueError where one is not finite."""
        tensor, dtype = self.tensor, FLOATS[self.tensor.dtype]
        values = torch.frombuffer(self.raw(count * dtype.itemsize), dtype=dtype).to(wide)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{tensor.file}: {tensor.name} holds NaN or infinity: the model is damaged or diverged")
        return values


def _is_utf8(path: Path) -> bool:
    """Whether its name can stand in a report."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _check_same(inputs: Sequence[Path], sources: Sequence[dict[str, Tensor]]) -> None:
    base = sources[0]
    for path, other in zip(inputs[1:], sources[1:]):
        if odd := sorted(base.keys() ^ other.keys()):
            here, there = (base, path) if odd[0] in base else (other, inputs[0])
            raise ValueError(
                f"{odd[0]} is in {here[odd[0]].file} and not in {there} ({len(odd)} tensors differ): "
                "all models must be of the base's architecture; if it is a tied weight, save both with save_pretrained"
            )
        for name, first in base.items():
            second = other[name]
            if second.shape != first.shape:
                raise ValueError(f"{name} is {second.shape} in {second.file} and {first.shape} in {first.file}")
            if second.dtype != first.dtype and not {second.dtype, first.dtype} <= FLOATS.keys():
                raise ValueError(f"{name} is {second.dtype} in {second.file} and {first.dtype} in {first.file}")


def _summary(settings: MergeSettings, inputs: Sequence[Path], files: dict[str, dict]) -> dict[str, Any]:
    per_tensor = {name: entry for file in files.values() for name, entry in file["tensors"].items()}
    entries = sum(entry["entries"] for entry in per_tensor.values())

    def share(key: str) -> float:
        return sum(entry[key] * entry["entries"] for entry in per_tensor.values()) / entries if entries else 0.0

    norms = zip(*(entry["task_vector_norms"] for entry in per_tensor.values()))
    return {
        **dataclasses.asdict(settings),
        "base": str(inputs[0]),
        "models": [str(path) for path in inputs[1:]],
        "tensors": len(per_tensor),
        "entries": entries,
        "agreed_share": share("agreed_share"),
        "changed_share": share("changed_share"),
        "task_vector_norms": [math.hypot(*column) for column in norms],
        "merged_norm": math.hypot(*(entry["merged_norm"] for entry in per_tensor.values())),
        "sha256": {name: file["sha256"] for name, file in files.items()},
        "per_tensor": per_tensor,
    }


# ---------------------------------------------------------------- computing


class _Digest:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO, bar: tqdm):
        self.file, self.bar, self.sha256 = file, bar, hashlib.sha256()

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bar.update(len(data))


def _merge_file(
    path: Path, header: Header, sources: Sequence[dict[str, Tensor]], settings: MergeSettings, bar: tqdm
) -> dict:
    """One file of the base, merged: {"sha256", "tensors": {name: counts and norms}}."""
    tensors = {}
    with atomic_write(path, header.size) as file:
        out = _Digest(file, bar)
        out.write(header.raw)
        for tensor in header.tensors:
            with contextlib.ExitStack() as stack:
                readers = [stack.enter_context(_opened(source[tensor.name])) for source in sources]
                if tensor.dtype in FLOATS:
                    tensors[tensor.name] = _merge_tensor(out, tensor, readers, settings)
                else:
                    _copy(out, tensor, readers)
    with _reading_back():
        forget(path)
        if sha256(path) != out.sha256.hexdigest():
            raise ValueError(f"{plain(path)}: read back, it is not what was written")
    return {"sha256": out.sha256.hexdigest(), "tensors": tensors}


def _copy(out: _Digest, tensor: Tensor, readers: Sequence[_Reader]) -> None:
    for first in range(tensor.start, tensor.stop, CHUNK):
        parts = [reader.raw(min(CHUNK, tensor.stop - first)) for reader in readers]
        for reader, part in zip(readers[1:], parts[1:]):
            if part != parts[0]:
                raise ValueError(
                    f"{reader.tensor.file}: {tensor.name} ({tensor.dtype}) is no float and differs from the base's"
                )
        out.write(parts[0])


def _merge_tensor(out: _Digest, tensor: Tensor, readers: Sequence[_Reader], settings: MergeSettings) -> dict[str, Any]:
    dtype = FLOATS[tensor.dtype]
    wide = torch.promote_types(dtype, torch.float32)
    agreed = changed = 0
    squares, merged_square = [0.0] * (len(readers) - 1), 0.0
    for first in range(0, tensor.entries, CHUNK):
        count = min(CHUNK, tensor.entries - first)
        base = readers[0].entries(count, wide)
        tau, agrees, parts = _combine((reader.entries(count, wide) - base for reader in readers[1:]), settings, base)
        agreed += int(agrees.sum())
        changed += int(tau.count_nonzero())
        squares = [total + part for total, part in zip(squares, parts)]
        tau *= settings.step
        merged_square += _square(tau)
        result = base.add_(tau).to(dtype)
        if not bool(result.isfinite().all()):
            raise ValueError(f"{tensor.name}: the merged values go beyond {tensor.dtype}: lower alpha")
        out.write(memoryview(result.view(torch.uint8).numpy()))
    return {
        "entries": tensor.entries,
        "agreed_share": agreed / max(tensor.entries, 1),
        "changed_share": changed / max(tensor.entries, 1),
        "task_vector_norms": [math.sqrt(total) for total in squares],
        "merged_norm": math.sqrt(merged_square),
    }


def _square(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _combine(
    vectors: Iterator[torch.Tensor], settings: MergeSettings, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """(the task vectors of a chunk as one, where enough of them agree in sign, the squared norm of each).

    The vectors come one by one. What is kept: the sum and the number of the values above 0, and of those below 0.
    """
    up, down = torch.zeros_like(like), torch.zeros_like(like)
    ups, downs = torch.zeros_like(like, dtype=torch.int32), torch.zeros_like(like, dtype=torch.int32)
    squares = []
    for vector in vectors:
        squares.append(_square(vector))
        up += vector.clamp(min=0)
        down += vector.clamp(max=0)
        ups += vector > 0
        downs += vector < 0
    needed = settings.agree * len(squares) - 1e-9 if settings.method == "consensus" else len(squares)
    rises, falls = ups >= needed, downs >= needed
    if settings.method == "consensus":
        tau = torch.where(rises, up / ups, torch.where(falls, down / downs, 0))
    else:
        tau = up + down
        tau = tau / len(squares) if settings.method == "mean" else tau
    return tau, rises | falls, squares
