"""Folders that hold a model, or are going to: what is in them, by name and content, and how one replaces another."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from kunbr_fast.files.atomic import os_errors, sizes, sync, usual_mode
from kunbr_fast.files.documents import read_json, read_text
from kunbr_fast.files.headers import Header
from kunbr_fast.files.scratch import scratch

# what transformers writes of a model, a tokenizer and a processor
_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|model-[0-9]+-of-[0-9]+\.safetensors")
_OTHERS = frozenset(
    """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
    added_tokens.json chat_template.jinja chat_template.json vocab.json vocab.txt merges.txt spiece.model spm.model
    sentencepiece.bpe.model normalizer.json tekken.json processor_config.json preprocessor_config.json
    video_preprocessor_config.json""".split()
)
_TEMPLATES = "additional_chat_templates"  # a folder of them
# what libraries read beside a model of ours, and would mix with it; nothing of ours replaces it
_MIXED = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|adapter_config\.json|adapter_model\..+")
# what a model written in the form of another takes over from its folder as it is: configuration, tokenizer, processors,
# code that config.json names. Not what programs have written about that model, nor indexes of its weights
_SIDE = re.compile(r"(?!\.).*\.(json|txt|jinja|py|tiktoken|bpe|codes|spm|vocab|model(\.v[0-9]+(m[0-9]+)?)?)")
_NOT_SIDE = re.compile(
    r".*\.index(\..+)?\.json|(report|unlearning|evaluation|merge(\.partial)?|trainer_state|training_args|(.*_)?results|.*log|requirements)"
    r"\.(json|txt)|.*(licen[cs]e|readme|notice).*",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r".*token.*|(vocab|merges|chat_template|dict|spiece|tekken|normalizer|added_tokens)\..*"
    r"|.*\.(model(\..+)?|tiktoken|bpe|codes|spm|vocab)|additional_chat_templates/.*"
)


def within(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or lies in it, by any name and over any link. Neither needs to be there yet."""
    folder, path = Path(folder).resolve(), Path(path).resolve()
    return any(p == folder or (p.exists() and folder.exists() and p.samefile(folder)) for p in (path, *path.parents))


def side_files(folder: str | Path) -> dict[str, Path]:
    """The files beside the weights that belong to a model, by their names in its folder; config.json is last."""
    found = {path.name: path for path in _entries(Path(folder)) if _is_side(path.name)}
    found |= {f"{_TEMPLATES}/{path.name}": path for path in sorted((Path(folder) / _TEMPLATES).glob("*.jinja"))}
    last = sorted(found, key=lambda name: (name == "config.json", name))
    return {name: found[name] for name in last if found[name].is_file()}


def is_of_tokenizer(name: str) -> bool:
    """Whether one of `side_files` is the tokenizer's."""
    return _TOKENIZER.fullmatch(name) is not None


def _is_side(name: str) -> bool:
    return _SIDE.fullmatch(name) is not None and _NOT_SIDE.fullmatch(name) is None


def written_names(source: str | Path) -> set[str]:
    """The names that a model from the folder `source` and its tokenizer may have when they are written."""
    names = {path.name for path in _entries(Path(source))}
    return _OTHERS | {name for name in names if _is_side(name) or name.endswith(".safetensors")}


def is_model_file(name: str) -> bool:
    """Whether a model that is written may have a file (or folder) of this name, whichever model it is."""
    return name in _OTHERS or name == _TEMPLATES or _WEIGHTS.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a model's weights, or the index of their files, have this name."""
    return _WEIGHTS.fullmatch(name) is not None


def is_mixed(name: str) -> bool:
    """Whether a file of this name would be read together with a model beside it, which it does not belong to."""
    return _MIXED.fullmatch(name) is not None


def model_files(folder: str | Path) -> dict[str, Path]:
    """The model's files in a folder, by their names in it."""
    found = {path.name: path for path in _entries(Path(folder)) if is_model_file(path.name)}
    found |= {f"{_TEMPLATES}/{path.name}": path for path in _entries(Path(folder) / _TEMPLATES)}
    return {name: path for name, path in found.items() if path.is_file()}


# ---------------------------------------------------------------- by content


def is_model(folder: str | Path) -> bool:
    """Whether the folder holds a model that transformers has written: its configuration, and weights."""
    path = Path(folder) / "config.json"
    try:
        values = read_json(path, dict)
    except ValueError:
        return False
    weights = [
        entry for entry in _entries(Path(folder)) if entry.suffix == ".safetensors" and is_model_file(entry.name)
    ]
    named = isinstance(values.get("model_type"), str) or isinstance(values.get("architectures"), list)
    return named and bool(weights) and all(map(is_part, weights))


def is_part(path: Path) -> bool:
    """Whether a file (or the folder of templates) in a model's folder can be the model's, by its content."""
    if path.is_symlink():
        return False
    if path.name == _TEMPLATES:
        return path.is_dir() and all(
            entry.suffix == ".jinja" and entry.is_file() and not entry.is_symlink() for entry in path.iterdir()
        )
    if not path.is_file():
        return False
    try:
        if path.suffix == ".safetensors":
            Header.read(path)
        elif path.name == "tokenizer.json":  # too large for `read_json`
            with open(path, "rb") as file:
                return re.match(rb'\s*\{\s*"version"\s*:', file.read(200)) is not None
        elif path.suffix == ".json" and path.name not in ("vocab.json", "tekken.json"):
            # not `read_json`: transformers writes model_max_length as 10**30
            found = json.loads(read_text(path))
            return isinstance(found, dict) and (_WEIGHTS.fullmatch(path.name) is None or "weight_map" in found)
    except (ValueError, OSError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def new_model(folder: str | Path, replace: bool = False, size: int | None = None) -> Iterator[Path]:
    """Yields an empty folder for a model's files, which take their names in `folder` when all are there, on the disk
    and read back (`readback.read_back`).

    Each is the old one or the new one; config.json, which makes them a model, is last. replace: then, and not before,
    what is left of a model in `folder` goes, so that no file of one is read with the other. size: of the weights, for a
    full disk's error.
    """
    try:
        with os_errors(), _new_model(Path(folder), replace) as staged:
            yield staged
    except OSError as error:
        said = f"{error.strerror or error}{sizes(error, Path(folder), size)}"
        raise OSError(error.errno, f"could not write the model to {folder}: {said}") from error


@contextlib.contextmanager
def _new_model(folder: Path, replace: bool) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(".saving-", folder) as here:
        staged, mode = here / "model", usual_mode(here)
        staged.mkdir()
        yield staged
        files = sorted((p for p in staged.rglob("*") if p.is_file()), key=lambda path: path.name == "config.json")
        for file in files:
            os.chmod(file, mode)  # safetensors and tokenizers leave private files
        if replace:
            _remove_model(folder, {str(file.relative_to(staged)) for file in files})
        for file in files:
            target = folder / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        sync(folder)


def _remove_model(folder: Path, keep: Collection[str]) -> None:
    """Removes config.json, which makes the others a model, and those that no file in `keep` replaces."""
    (folder / "config.json").unlink(missing_ok=True)
    for path in _entries(folder):
        if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
            for template in path.glob("*.jinja"):
                if f"{_TEMPLATES}/{template.name}" not in keep:
                    template.unlink()
            with contextlib.suppress(OSError):  # it holds something else
                path.rmdir()
        elif is_model_file(path.name) and path.name not in keep and not path.is_dir():
            path.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir()) if folder.is_dir() else ())
