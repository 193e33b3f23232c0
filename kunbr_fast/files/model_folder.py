"""Folders that hold a model, or are going to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# what transformers writes of a model and of a tokenizer
_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|model-[0-9]+-of-[0-9]+\.safetensors")
_OTHERS = frozenset(
    """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
    added_tokens.json chat_template.jinja chat_template.json vocab.json vocab.txt merges.txt spiece.model spm.model
    sentencepiece.bpe.model normalizer.json tekken.json""".split()
)
_PART = re.compile(r".*\.(json|txt|model|jinja|safetensors)")  # of those in a model's folder, which are written again


def within(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or lies in it, by any name and over any link. Neither needs to be there yet."""
    folder, path = Path(folder).resolve(), Path(path).resolve()
    return any(p == folder or (p.exists() and folder.exists() and p.samefile(folder)) for p in (path, *path.parents))


def written_names(source: str | Path) -> set[str]:
    """The names that a model from the folder `source` and its tokenizer may have when they are written."""
    return _OTHERS | {path.name for path in _entries(Path(source)) if _PART.fullmatch(path.name)}


def is_model_file(name: str) -> bool:
    """Whether a model that is written may have a file of this name, whichever model it is."""
    return name in _OTHERS or _WEIGHTS.fullmatch(name) is not None


def remove_model(folder: str | Path) -> None:
    """Removes weights, after the configuration, which makes them a model: the next one's are not mixed with them."""
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    for path in _entries(folder):
        if _WEIGHTS.fullmatch(path.name):
            path.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir()) if folder.is_dir() else ())
