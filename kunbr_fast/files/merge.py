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
import errno
import fnmatch
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from kunbr_fast.files.atomic import atomic_write, sha256, write_json
from kunbr_fast.files.models import model_directory
from kunbr_fast.files.scratch import remove_leftovers
from kunbr_fast.files.tensors import INDEX, Shards
from kunbr_fast.keywords import named_by, taken

METHODS = ("sum", "mean", "consensus")
MODES = ("negate", "add")
CHUNK = 2**20  # entries: 4 MiB of fp32, of which a dozen are in memory
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUMMARY, PARTIAL = "merge.json", "merge.partial.json"
BESIDE = (INDEX, "config.json", "generation_config.json", "*tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "vocab.*", "merges.txt", "chat_template*", "*.tiktoken", "spiece.model")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """mode: of MODES. method: of METHODS. alpha: above 0. agree: above 0.5, at most 1. The module says what they do."""

    mode: str
    method: str = "consensus"
    alpha: float = 1.0
    agree: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "agree"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, value, known in (("mode", self.mode, MODES), ("method", self.method, METHODS)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
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
    resume: go on after a kill or a full disk; files that are whole (SHA-256) are kept.

    The output has the base's dtype, files, configuration and tokenizer. A tied weight is in the files once, and stays
    tied. Tensors that are no floats are copied from the base.

    Returns (also in `output`/merge.json): `tensors`, `entries` (numbers of floats), `agreed_share` (entries whose task
    vectors all have one sign, or, with "consensus", a share of at least `agree` of them), `changed_share` (entries of
    tau that are not 0), `task_vector_norms` (L2, one for each model), `merged_norm` (of alpha * tau), `sha256` of each
    file, and the same counts and norms for each tensor in `per_tensor`.

    Errors, before anything is computed: ValueError for tensors that differ in name or shape (naming file and tensor),
    for a model given twice, an output that is an input or not empty; OSError where the disk has not enough space. While
    computing: ValueError for NaN or infinity, in an input or in the result.
    """
    how, output = taken(MergeSettings, settings, "merge_models"), Path(output)
    inputs = [Path(path) for path in (base, *models)]
    if len(inputs) == 1:
        raise ValueError("no model to merge: expected at least one, trained from the base")
    real = [path.resolve() for path in inputs]
    if output.resolve() in real:
        raise ValueError(f"{output} is one of the inputs: give another output directory")
    for number, path in enumerate(real):
        if path in real[:number]:
            raise ValueError(f"{inputs[number]} is given twice: its task vector would be counted twice, or be zero")
    _check_configuration(inputs[0])
    headers = [[_Header.read(file) for file in Shards(path).paths] for path in inputs]
    sources = [{tensor.name: tensor for header in found for tensor in header.tensors} for found in headers]
    _check_same(inputs, sources)

    identities = [[header.identity() for header in found] for found in headers]
    named = [{"directory": str(path), "files": identity} for path, identity in zip(real, identities)]
    job = dataclasses.asdict(how) | {"inputs": named}
    done = _begin(output, job, resume)
    sizes = {header.file.name: header.size for header in headers[0]}
    _check_space(output, sum(size for name, size in sizes.items() if name not in done))
    write_json(output / PARTIAL, {"job": job, "files": done})
    with tqdm(total=sum(sizes.values()), desc="merge", unit="B", unit_scale=True, disable=not progress) as bar:
        for header in headers[0]:
            name = header.file.name
            if name in done:
                bar.update(header.size)
            else:
                done[name] = _merge_file(output / name, header, sources, how, bar)
                write_json(output / PARTIAL, {"job": job, "files": done})
    summary = _summary(how, inputs, done)
    # config.json is last: it makes the directory a model
    for path in sorted(inputs[0].iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in BESIDE):
            with atomic_write(output / path.name) as copy:
                copy.write(path.read_bytes())
    write_json(output / SUMMARY, summary)
    (output / PARTIAL).unlink(missing_ok=True)
    return summary


# ---------------------------------------------------------------- what is merged


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor is: the bytes from `start` to `stop` of a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @contextlib.contextmanager
    def opened(self) -> Iterator[_Reader]:
        with open(self.file, "rb") as handle:
            handle.seek(self.start)
            yield _Reader(self, handle)


@dataclasses.dataclass(frozen=True)
class _Header:
    """A safetensors file: eight bytes with the length of a JSON header, the header, and the tensors' bytes."""

    file: Path
    raw: bytes  # everything before the tensors
    tensors: tuple[_Tensor, ...]  # as they lie in the file
    size: int

    @classmethod
    def read(cls, path: Path) -> _Header:
        with open(path, "rb") as file:
            raw = file.read(8)
            raw += file.read(int.from_bytes(raw, "little"))
        tensors = [
            _Tensor(path, name, entry["dtype"], tuple(entry["shape"]), *(len(raw) + at for at in entry["data_offsets"]))
            for name, entry in json.loads(raw[8:]).items()
            if name != "__metadata__"
        ]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
        return cls(path, raw, tuple(tensors), path.stat().st_size)

    def identity(self) -> list:
        """Recognises the file after an interruption, without reading all of it."""
        return [self.file.name, self.size, self.file.stat().st_mtime_ns, hashlib.sha256(self.raw).hexdigest()]


@dataclasses.dataclass
class _Reader:
    """A tensor's bytes, or entries, in chunks."""

    tensor: _Tensor
    handle: BinaryIO

    def raw(self, count: int) -> bytearray:
        data = bytearray(count)
        if self.handle.readinto(data) != count:
            raise ValueError(f"{self.tensor.file}: cut short while it was read: is it still being written?")
        return data

    def entries(self, count: int, wide: torch.dtype) -> torch.Tensor:
        """The next `count` entries; ValueError where one is not finite."""
        tensor, dtype = self.tensor, FLOATS[self.tensor.dtype]
        values = torch.frombuffer(self.raw(count * dtype.itemsize), dtype=dtype).to(wide)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{tensor.file}: {tensor.name} holds NaN or infinity: the model is damaged or diverged")
        return values


def _check_configuration(base: Path) -> None:
    path = model_directory(base) / "config.json"
    try:
        configuration = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if configuration.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights have no task vectors: merge the models before they are quantised")


def _check_same(inputs: Sequence[Path], sources: Sequence[dict[str, _Tensor]]) -> None:
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


# ---------------------------------------------------------------- the output directory


def _begin(output: Path, job: dict, resume: bool) -> dict[str, dict]:
    """Makes the directory, or takes it up again: returns the entry of each file that is whole."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / PARTIAL
    if not resume:
        if any(output.iterdir()):
            cure = "go on with it (resume=True)" if partial.is_file() else "give another one"
            raise ValueError(f"{output} is not empty: {cure}, or delete it")
        return {}
    if not partial.is_file():
        raise ValueError(f"{output}: no merge to resume (there is no {PARTIAL})")
    try:
        found = json.loads(partial.read_text())
        before, files = found["job"], dict(found["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{partial}: damaged ({error}): delete {output} and begin again") from error
    changed = [name for name, value in json.loads(json.dumps(job)).items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{output}: {changed[0]} changed since this merge was begun: put it back, or give another output"
        )
    remove_leftovers(output)
    there = {name: entry for name, entry in files.items() if (output / name).is_file()}
    return {name: entry for name, entry in there.items() if sha256(output / name) == entry["sha256"]}


def _check_space(output: Path, needed: int) -> None:
    free, more = shutil.disk_usage(output).free, 2**26  # tokenizer and the like
    if free < needed + more:
        sizes = f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB free"
        raise OSError(errno.ENOSPC, f"{output}: {sizes}: free space, or give another")


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
    path: Path, header: _Header, sources: Sequence[dict[str, _Tensor]], settings: MergeSettings, bar: tqdm
) -> dict:
    """One file of the base, merged: {"sha256", "tensors": {name: counts and norms}}."""
    tensors = {}
    with atomic_write(path) as file:
        out = _Digest(file, bar)
        out.write(header.raw)
        for tensor in header.tensors:
            with contextlib.ExitStack() as stack:
                readers = [stack.enter_context(source[tensor.name].opened()) for source in sources]
                if tensor.dtype in FLOATS:
                    tensors[tensor.name] = _merge_tensor(out, tensor, readers, settings)
                else:
                    _copy(out, tensor, readers)
    return {"sha256": out.sha256.hexdigest(), "tensors": tensors}


def _copy(out: _Digest, tensor: _Tensor, readers: Sequence[_Reader]) -> None:
    for first in range(tensor.start, tensor.stop, CHUNK):
        parts = [reader.raw(min(CHUNK, tensor.stop - first)) for reader in readers]
        for reader, part in zip(readers[1:], parts[1:]):
            if part != parts[0]:
                raise ValueError(
                    f"{reader.tensor.file}: {tensor.name} ({tensor.dtype}) is no float and differs from the base's"
                )
        out.write(parts[0])


def _merge_tensor(out: _Digest, tensor: _Tensor, readers: Sequence[_Reader], settings: MergeSettings) -> dict[str, Any]:
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
