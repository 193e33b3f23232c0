"""A model in memory becomes a folder again, in the form of the one that it came from, where that is still its form."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.files import model_config
from kunbr_fast.files.digests import tokenizer_fingerprint
from kunbr_fast.files.model_folder import is_of_tokenizer, new_model, side_files
from kunbr_fast.files.models import ModelFolder, held_back, load_tokenizer
from kunbr_fast.files.parameters import Stored, stored_parameters
from kunbr_fast.files.readback import check_copies, check_model, read_back
from kunbr_fast.files.shards import Shards, has_weights
from kunbr_fast.files.weight_files import DTYPES, New, write_like

# of a tokenizer, which transformers writes only where the file or the call that it was loaded by had them
SETTINGS = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens")

logger = logging.getLogger(__name__)


def save_model(
    model: nn.Module,
    tokenizer: Any | None,
    directory: str | Path,
    replace: bool = False,
    source: str | Path | None = None,
) -> None:
    """Writes a loadable model directory, reads it back, and only then gives the files their names there.

    source: the folder that the model was loaded from (default: config.name_or_path, where that is a folder). While the
    model is of the same configuration, what is written has its form, which any release of transformers reads as it
    read the source: the same tensors, in the same files; config.json and all beside the weights byte for byte, but for
    a changed dtype; the tokenizer too, if it is the folder's own, unchanged, or None. What is not so is written by
    transformers, and a log line says it. replace: the files of a model that is there go when this one is complete
    (`new_model`).

    Errors: ValueError, with nothing of `directory` touched, where what was read back is not the model in memory.
    """
    model = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper, whose names are others
    directory, copies = Path(directory), {}
    with new_model(directory, replace, sum(parameter.nbytes for parameter in model.parameters())) as staged:
        folder, stored = _form(model, source or getattr(model.config, "name_or_path", None))
        if folder is not None:
            copies = _write_like(model, tokenizer, folder, stored, staged)
        else:
            model.save_pretrained(staged, safe_serialization=True)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, staged)
        with read_back(staged, directory):
            check_model(model, staged)
            check_copies(copies, staged)


def _form(model: nn.Module, source: str | Path | None) -> tuple[ModelFolder, Stored] | tuple[None, None]:
    """The model's folder, and which of its tensors are which of the model; None where the model has another form by
    now, or the folder holds what does not go with it. ValueError where its weights are damaged."""
    if not source or not Path(source).is_dir():
        return None, None
    if has_weights(source):
        Shards(source)  # damaged: the model in memory may be mapped to these files, and is then not whole either
    try:
        folder = ModelFolder(source, log=False)
        config, stored = folder.configuration(), stored_parameters(model, folder.shards)
        changed = model_config.differing(config, model.config)
        why = f"config.json has another {changed}" if changed else None
        if odd := stored.missing or (stored.unused if stored.followed else []):
            why = f"{odd[0]} is only in one of them"
    except ValueError as error:  # the folder is another model's by now, or the model was changed
        why = str(error)
    if why is None:
        return folder, stored
    logger.warning("the model is no longer that of %s (%s): transformers writes it anew", source, why)
    return None, None


def _write_like(
    model: nn.Module, tokenizer: Any | None, folder: ModelFolder, stored: Stored, staged: Path
) -> dict[str, Path]:
    """Writes the model in the form of its folder. Returns {name: path} of what was copied as it is."""
    if stored.followed:
        write_like(folder.shards, staged, new_tensors(stored, model.state_dict(keep_vars=True).__getitem__))
    else:  # only transformers knows which tensors the files have
        model.save_pretrained(staged, safe_serialization=True)
    own = tokenizer is None or _is_own(tokenizer, folder.path)
    copies = {name: path for name, path in side_files(folder.path).items() if own or not is_of_tokenizer(name)}
    copy_files(copies, staged)
    if not own:
        logger.warning("the tokenizer is not %s's own, or was changed: transformers writes it anew", folder.path)
        _save_tokenizer(tokenizer, staged)
    if model.dtype != folder.saved_dtype(folder.configuration()):
        text = copies.pop("config.json").read_bytes().decode()
        (staged / "config.json").write_bytes(with_dtype(text, str(model.dtype).removeprefix("torch.")).encode())
    if _generates_otherwise(model, folder.path):
        del copies["generation_config.json"]
        model.generation_config.save_pretrained(staged)
    return copies


def copy_files(copies: Mapping[str, Path], directory: Path) -> None:
    for name, path in copies.items():
        if not (directory / name).parent.is_dir():
            (directory / name).parent.mkdir()
        shutil.copyfile(path, directory / name)


def new_tensors(stored: Stored, value: Callable[[str], torch.Tensor]) -> Mapping[str, New]:
    """The stored floats as `value` has them, by the names in the files. value: of a parameter."""

    def part(name: str, index: tuple) -> torch.Tensor:
        return value(name)[index]

    return {
        piece.stored: New(DTYPES[value(name).dtype], functools.partial(part, name, piece.index))
        for name, pieces in stored.sources.items()
        if value(name).dtype in DTYPES
        for piece in pieces
    }


def with_dtype(text: str, dtype: str) -> str:
    """A config.json with another dtype, all else as it is, byte for byte."""
    return re.sub(r'("(?:torch_)?dtype"\s*:\s*")(?:torch\.)?\w+(")', rf"\g<1>{dtype}\g<2>", text)


def _is_own(tokenizer: Any, folder: Path) -> bool:
    """Whether it is the folder's, as it was loaded."""
    try:
        if not Path(tokenizer.name_or_path).samefile(folder):
            return False
        own = load_tokenizer(folder)
        return tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer) and _settings(own) == _settings(tokenizer)
    except (AttributeError, OSError, ValueError):
        return False


def _settings(tokenizer: Any) -> dict[str, Any]:
    """Those beside its fingerprint, as they are now: of a file, of the call that loaded it, or set since."""
    names = sorted({*SETTINGS, *getattr(tokenizer, "init_kwargs", ())} - {"name_or_path"})
    values = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
    return json.loads(json.dumps(values, default=str))


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """As transformers does, with the settings of `SETTINGS` that it leaves out: those that no file had."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    now, values = _settings(tokenizer), json.loads(path.read_text(encoding="utf-8"))
    usual = {name: getattr(type(tokenizer), name, False) for name in SETTINGS}
    left = {name: now[name] for name in SETTINGS if name in now and name not in values and now[name] != usual[name]}
    if left:
        text = json.dumps(values | left, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


@held_back()
def _generates_otherwise(model: nn.Module, source: Path) -> bool:
    """Whether settings of generation were changed in memory."""
    now = getattr(model, "generation_config", None)
    if now is None or not (source / "generation_config.json").is_file():
        return False
    return _values(now) != _values(type(now).from_pretrained(source))


def _values(generation: Any) -> Any:
    values = {name: value for name, value in generation.to_dict().items() if name != "transformers_version"}
    return json.loads(json.dumps(values, default=str))
