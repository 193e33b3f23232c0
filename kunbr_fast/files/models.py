"""Models and tokenizers from local directories: safetensors only, no remote code, nothing filled in silently."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from kunbr_fast.files.atomic import os_errors, sizes, sync, usual_mode
from kunbr_fast.files.scratch import scratch
from kunbr_fast.files.tensors import open_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def model_directory(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory: expected a local Hugging Face model directory")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json: not a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{path}: no *.safetensors: pickled weights are not loaded; convert them with safetensors first"
        )
    return path


def load_model(path: str | Path, dtype: str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """A causal language model from a local directory, in eval mode; dtype: a name of DTYPES (default: as saved)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = model_directory(path)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    for file in sorted(path.glob("*.safetensors")):
        with open_tensors(file):  # only its header is read; transformers' own error would not name the file
            pass
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=attention_of(config),
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path}: has no weights for {missing[0]} ({len(missing)} missing): this checkpoint is not whole"
        )
    return model.to(device).eval()


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation to load a model with; None leaves the choice to transformers.

    SDPA knows no softcap. transformers 5.20 and older chooses it for Gemma 2 all the same, and leaves the softcap out.
    """
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if softcap is None else "eager"


def has_tokenizer(path: str | Path) -> bool:
    """Whether the directory has one of the files that any tokenizer has."""
    return any((Path(path) / name).is_file() for name in TOKENIZERS)


def load_tokenizer(path: str | Path) -> Any:
    """The directory's own tokenizer."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        raise ValueError(
            f"{path}: no tokenizer (tokenizer.json): save one with tokenizer.save_pretrained({str(path)!r})"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare Exceptions
        raise ValueError(f"{path}: its tokenizer cannot be loaded: {error}") from error


def check_vocabulary(model: nn.Module, ids: Iterable[torch.Tensor], what: str) -> None:
    """ValueError if one of the token ids has no embedding: tokenizer and model do not belong together."""
    rows = model.get_input_embeddings().weight.shape[0]
    for tensor in ids:
        low, high = (int(value) for value in tensor.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"{what}: token id {low if low < 0 else high}, but the model embeds {rows}: tokenizer and model do not "
                "belong together"
            )


def check_same_architecture(original: nn.Module, unlearned: nn.Module, where: str) -> None:
    """ValueError naming the first parameter that differs in presence or shape."""
    first, second = dict(original.named_parameters()), dict(unlearned.named_parameters())
    for name in [*first, *second]:
        a, b = first.get(name), second.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [tuple(p.shape) if p is not None else "missing" for p in (a, b)]
            raise ValueError(
                f"{where}: {name} is {shapes[1]} there and {shapes[0]} in the original model: the unlearned model must "
                "be the original one, changed by training only (same architecture and vocabulary)"
            )


def save_model(model: nn.Module, tokenizer: Any | None, directory: str | Path) -> None:
    """Writes a loadable model directory. Each file is whole or absent; config.json, which makes it a model, is last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with scratch(".saving-", directory) as folder:
        staged = folder / "model"
        try:
            mode = usual_mode(folder)
            with os_errors():
                model.save_pretrained(staged, safe_serialization=True)
                if tokenizer is not None:
                    tokenizer.save_pretrained(staged)
        except OSError as error:
            said = f"{error.strerror or error}{sizes(error, directory, sum(p.nbytes for p in model.parameters()))}"
            raise OSError(error.errno, f"could not write the model to {directory}: {said}") from error
        for file in sorted(staged.rglob("*"), key=lambda p: p.name == "config.json"):
            if file.is_file():
                sync(file)
                target = directory / file.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.chmod(file, mode)  # safetensors and tokenizers leave private files
                os.replace(file, target)
