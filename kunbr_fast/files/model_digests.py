"""SHA-256 of the files that make a model what it is: weights, configuration, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from kunbr_fast.files.checksums import checksum
from kunbr_fast.files.model_folder import is_of_tokenizer, side_files
from kunbr_fast.files.shards import Shards

CONFIG = "config.json"
SECONDS = 2**28  # bytes: what is less is read before anybody wonders


def files_of_model(folder: str | Path) -> dict[str, Path]:
    """By their names in the folder: the weights that are read (`Shards`) and their index, the configuration, and the
    tokenizer's files. ValueError where it holds no weights, or not all of them."""
    shards = Shards(folder)
    found = {header.file.name: header.file for header in shards.headers}
    if shards.index is not None:
        found[shards.index.name] = shards.index
    found |= {name: path for name, path in side_files(folder).items() if name == CONFIG or is_of_tokenizer(name)}
    return dict(sorted(found.items()))


def digests(files: Mapping[str, Path], progress: str | None = None) -> dict[str, str]:
    """Each file's SHA-256, in hexadecimal. A link's is that of the file behind it (the Hub's cache is made of links).
    progress: title of a bar, which files of some seconds have."""
    size = sum(path.stat().st_size for path in files.values())
    how = dict(unit="B", unit_scale=True, leave=False, disable=progress is None or size < SECONDS)
    with tqdm(total=size, desc=progress, **how) as bar:
        return {name: checksum(os.path.realpath(path), bar.update) for name, path in files.items()}
