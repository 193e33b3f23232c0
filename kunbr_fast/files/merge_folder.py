"""The folder that a merge writes: what is whole there, so that a killed merge goes on, and what is not its own.

`merge.partial.json` says what is merged and which files are whole. It is there from the first write on until
`merge.json` is. Whatever else the folder holds stays.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from kunbr_fast.files.atomic import in_units, sha256, write_json
from kunbr_fast.files.documents import read_json
from kunbr_fast.files.lock import NAME as LOCK
from kunbr_fast.files.scratch import remove_leftovers
from kunbr_fast.files.shown import shown
from kunbr_fast.files.target import FolderKind

SUMMARY, PARTIAL = "merge.json", "merge.partial.json"
LIMIT = 2**26  # bytes of either
FOLDER = FolderKind(begun=lambda folder: any((folder / name).is_file() for name in (PARTIAL, SUMMARY)))


Part, Norm = Annotated[float, msgspec.Meta(ge=0, le=1)], Annotated[float, msgspec.Meta(ge=0, le=1e150)]


class Sums(TypedDict):
    """Of one tensor."""

    entries: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    agreed_share: Part
    changed_share: Part
    task_vector_norms: list[Norm]
    merged_norm: Norm


class Entry(TypedDict):
    """Of one file."""

    sha256: str
    tensors: dict[str, Sums]


class Partial(TypedDict):
    job: dict[str, Any]
    files: dict[str, Entry]


class Summary(TypedDict):
    mode: str
    inputs: list[Any]
    sha256: dict[str, str]


class MergeFolder:
    """done: the entries of the files that are whole. finished: the summary, where the whole merge is."""

    def __init__(self, path: Path, job: dict[str, Any], resume: bool):
        """Takes up the folder, which the caller holds (`files.lock`). job: what is merged, and how.

        ValueError for a folder with other content, or with a merge of something else.
        """
        self.path, self.job = path, json.loads(json.dumps(job))
        self.done: dict[str, dict] = {}
        self.finished: dict[str, Any] | None = None
        remove_leftovers(path)
        if os.listdir(path) == [LOCK]:
            return  # also where a merge was killed before its first file was whole
        if not resume:
            cure = "go on with it (resume=True)" if (path / PARTIAL).is_file() else "give another one"
            raise ValueError(f"{path} is not empty: {cure}, or delete it")
        if (path / PARTIAL).is_file():
            self._go_on()
        elif (path / SUMMARY).is_file():
            self._look_at_finished()
        else:
            raise ValueError(f"{path}: no merge to resume (there is no {PARTIAL})")

    def _go_on(self) -> None:
        try:
            found = read_json(self.path / PARTIAL, Partial, LIMIT)
        except ValueError as error:
            raise ValueError(f"{error}: delete {self.path} and begin again") from error
        self._check_job(found["job"], "since this merge was begun")
        inputs = self.job["inputs"]
        known = {file[0] for file in inputs[0]["files"]}
        for name, entry in found["files"].items():
            norms = [len(sums["task_vector_norms"]) for sums in entry["tensors"].values()]
            if name not in known or set(norms) - {len(inputs) - 1}:
                raise ValueError(
                    f"{self.path / PARTIAL}: {shown(name)} is no file of this merge: delete {self.path} and begin again"
                )
        self.done = {name: entry for name, entry in found["files"].items() if self._is(name, entry["sha256"])}

    def _look_at_finished(self) -> None:
        """With the same job there is nothing to do: a kill came after the last write."""
        try:
            read_json(self.path / SUMMARY, Summary, LIMIT)
            found = read_json(self.path / SUMMARY, limit=LIMIT)
        except ValueError as error:
            raise ValueError(f"{error}: not a merge that can be resumed: give another output") from error
        self._check_job(found, "since this merge was finished")
        if odd := [name for name, digest in found["sha256"].items() if not self._is(name, digest)]:
            raise ValueError(f"{self.path / odd[0]}: changed since this merge was finished: give another output")
        self.finished = found

    def _check_job(self, before: Mapping[str, Any], since: str) -> None:
        changed = [name for name, value in self.job.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{self.path}: {changed[0]} changed {since}: put it back, or give another output")

    def _is(self, name: str, digest: str) -> bool:
        if Path(name).name != name:
            raise ValueError(f"{self.path}: {shown(name)} is not in its folder: delete {self.path} and begin again")
        path = self.path / name
        return not path.is_symlink() and path.is_file() and sha256(path) == digest

    def claim(self, name: str, starts: bytes, size: int) -> None:
        """ValueError where a file that is going to be written is there, and is none of this merge: its first bytes and
        its size would be these."""
        path = self.path / name
        if not os.path.lexists(path) or name in self.done:
            return
        if not path.is_symlink() and path.is_file() and path.stat().st_size == size:
            with open(path, "rb") as file:
                if file.read(len(starts)) == starts:
                    return
        raise ValueError(f"{path}: not of this merge, which would replace it: move it away, or give another output")

    def check_space(self, needed: int) -> None:
        needed, free = needed + 2**26, shutil.disk_usage(self.path).free  # more: tokenizer and the like
        if free < needed:
            sizes = f"{in_units(needed)} are needed and {in_units(free)} free"
            raise OSError(errno.ENOSPC, f"{self.path}: {sizes}: free space, or give another")

    def keep(self) -> None:
        """Records what is whole by now."""
        write_json(self.path / PARTIAL, {"job": self.job, "files": self.done})

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.path / SUMMARY, summary)
        (self.path / PARTIAL).unlink(missing_ok=True)
