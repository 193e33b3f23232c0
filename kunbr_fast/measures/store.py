"""What an evaluation has found so far, by model and pass, so that one that was interrupted goes on.

Each pass is a sealed file, and a safetensors file where it has tensors, in `kunbr-evaluation` beside the result. It
counts for the model, the records and the settings that it was made of, and for no others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.files.checksums import check_file, checksum, read_sealed, write_sealed
from kunbr_fast.files.scratch import remove_leftovers
from kunbr_fast.files.tensors import load_tensors, save_tensors
from kunbr_fast.measures import UNFINISHED

_OURS = re.compile(
    r"(original|retrained|result)\.(likelihoods|generation|states|values|attack|lm-eval)\.(json|safetensors)"
)
_CURE = "delete it, and that part is measured again"


class Store:
    """folder: of the result; None keeps nothing."""

    def __init__(self, folder: str | Path | None):
        self._path = None if folder is None else Path(folder) / UNFINISHED

    def begun(self) -> bool:
        """Whether there is anything of an earlier evaluation."""
        return self._path is not None and any(_OURS.fullmatch(path.name) for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(self._path.iterdir()) if self._path is not None and self._path.is_dir() else []

    def get(self, name: str, identity: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What a pass has found, if it was made of the same. ValueError for a damaged file."""
        if self._path is None or not (path := self._path / f"{name}.json").exists():
            return None
        found = read_sealed(path, _CURE)
        if found.get("identity") != identity:
            return None
        tensors = {}
        if found["tensors"] is not None:
            check_file(path.with_suffix(".safetensors"), found["tensors"], _CURE)
            tensors = load_tensors(path.with_suffix(".safetensors"))
        return found["values"], tensors

    def put(
        self, name: str, identity: str, values: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        if self._path is None:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        path, sha256 = self._path / f"{name}.json", None
        path.unlink(missing_ok=True)  # it names the tensors, which change first
        if tensors:
            save_tensors(path.with_suffix(".safetensors"), tensors)
            sha256 = checksum(path.with_suffix(".safetensors"))
        write_sealed(path, {"identity": identity, "tensors": sha256, "values": values})

    def clear(self) -> None:
        """Removes what is ours, and the folder if nothing else is in it."""
        if self._path is None or not self._path.is_dir():
            return
        remove_leftovers(self._path)
        for path in self._files():
            if _OURS.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
        with contextlib.suppress(OSError):  # it holds something else
            self._path.rmdir()
