"""Models and tokenizers from local directories: safetensors only, no remote code, nothing filled in silently."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import warnings
from collections.abc import Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kunbr_fast.files import model_config
from kunbr_fast.files.documents import read_json, read_text
from kunbr_fast.files.headers import COPY, odd_kind
from kunbr_fast.files.kinds import check_start
from kunbr_fast.files.parameters import (
    REMADE,
    Stored,
    check_all_used,
    check_tied_names,
    layers_in_files,
    stored_parameters,
    without,
)
from kunbr_fast.files.shards import Shards, instead_of_weights
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.weight_files import TORCH

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")  # of tokenizer.json
BUFFERS = 2**30  # bytes: of known models, GPT-J's masks of 0.1 GB are the most
TEMPLATE = 2**20  # bytes of a chat template: the longest of known models has 0.03 MB
LONGEST = 240  # characters of another library's reason


class ModelFolder:
    """A model's folder, judged before transformers is imported and before any tensor is read.

    values: what config.json says; shards: its weights. configured=False: config.json may be missing. log=False: nothing
    is said about weights that are not read.

    Errors: ValueError in one line, with the file, what it holds and the cure.
    """

    def __init__(self, path: str | Path, configured: bool = True, log: bool = True):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{plain(path)}: no such directory: expected a local Hugging Face model directory")
        for name in sorted(os.listdir(self.path)):
            with contextlib.suppress(OSError):  # a link to nothing, which is named where it is read
                kind = odd_kind(self.path / name)
                if kind not in (None, "a directory"):
                    raise ValueError(f"{plain(self.path / name)}: {kind}, in a model's folder: move it elsewhere")
        model_config.check_plain(self.path)
        self.config_path = self.path / "config.json"
        self.values: dict[str, Any] = {}
        if configured or os.path.lexists(self.config_path):
            if not os.path.lexists(self.config_path):
                no = f"{plain(path)}: no config.json: not a Hugging Face model directory"
                raise ValueError(instead_of_weights(self.path) or no)
            self.values = model_config.read_model_config(self.config_path)
        if os.path.lexists(generation := self.path / "generation_config.json"):
            read_json(generation, dict)
            check_start(generation)
        self.shards = Shards(self.path, log)
        self._check_layers()
        if model_config.of_language(self.values).get("tie_word_embeddings") is True:
            check_tied_names(self.shards)

    def _check_layers(self) -> None:
        asked, there = model_config.number_of_layers(self.values), layers_in_files(self.shards.tensors)
        if asked is None or not there:
            return
        name, number = asked
        lacking = next((layer for layer in range(number) if layer not in there), None)
        if lacking is not None:
            raise ValueError(
                f"{plain(self.config_path)}: {name} is {number}, and the weights have {len(there)} layers (none "
                f"numbered {lacking}): correct it, or copy the missing files"
            )
        predicting = any("nextn" in name or "mtp" in name for name in model_config.of_language(self.values))
        if len(there) > number and not predicting:  # layers that predict several tokens come after the others
            tensor = self.shards.tensors[there[max(there)]]
            raise ValueError(
                f"{plain(self.config_path)}: {name} is {number}, and the weights have {len(there)} layers "
                f"({tensor.name} in {tensor.file.name}): correct it, or copy the model's config.json again"
            )

    def configuration(self) -> PretrainedConfig:
        """config.json as transformers reads it."""
        model_config.check_names(self.values, self.config_path)
        with refusals(self.config_path):
            config = model_config.configured(self.values)
            config._name_or_path = str(self.path)
            model_config.check_heads(model_config.text_of(config), self.config_path)
        return config

    def on_meta(self, config: PretrainedConfig, dtype: torch.dtype) -> tuple[nn.Module, Stored]:
        """(the model without its weights, where these are). ValueError where the files do not fit it."""
        from transformers import AutoModelForCausalLM

        with refusals(self.config_path):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=False, attn_implementation=attention_of(config)
                )
                model.requires_grad_(False).eval()
                model.tie_weights()
            if (size := sum(buffer.nbytes for buffer in model.buffers())) > BUFFERS:
                raise ValueError(f"its settings ask for {size} bytes beside the weights: {model_config.CURE}")
            stored = stored_parameters(model, self.shards)
            check_forward(model)
        return model, stored

    def fitting(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """ValueError for weights that the files lack, or have too many."""
        _, stored = self.on_meta(config, dtype)
        if stored.followed:
            check_all_used(stored, self.shards)

    def saved_dtype(self, config: PretrainedConfig) -> torch.dtype:
        """As transformers' "auto": what config.json says, else the dtype of the first floating-point tensor."""
        found = getattr(config, "dtype", None)
        if isinstance(found, torch.dtype):
            return found
        for tensor in self.shards.tensors.values():
            if tensor.dtype in TORCH:
                return TORCH[tensor.dtype]
        raise ValueError(f"{plain(self.path)}: it holds no floating-point weights")


def check_loadable(path: str | Path) -> None:
    """ValueError where `load_model` would refuse the folder, by its names, headers and settings."""
    folder = ModelFolder(path)
    config = folder.configuration()
    folder.fitting(config, folder.saved_dtype(config))


def check_forward(model: nn.Module) -> None:
    """Two tokens through a model on the meta device: some settings are looked at in the forward pass only."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    before = [(module, set(vars(module))) for module in model.modules()]
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    except (NotImplementedError, torch.OutOfMemoryError):
        pass  # what depends on values
    except RuntimeError as error:  # others are of the device, such as what depends on values
        if re.search(r"out of range|is invalid for input|must match|cannot be multiplied", str(error)):
            raise
    finally:
        for module, names in before:  # LongRoPE leaves frequencies behind, which have no values here
            for name in vars(module).keys() - names:
                delattr(module, name)


@contextlib.contextmanager
def refusals(where: Path) -> Iterator[None]:
    """Turns what transformers and tokenizers raise for a file into a ValueError in one line.

    Their checks raise types of their own, even bare Exceptions. What they log and warn of meanwhile comes after them,
    unless they raise: the error is to be the only line."""
    try:
        with held_back():
            yield
    except MemoryError:
        raise
    except Exception as error:
        ours = isinstance(error, ValueError) and str(error).startswith(plain(where if where.is_dir() else where.parent))
        if ours or isinstance(error, torch.OutOfMemoryError):
            raise
        cure = f": {model_config.CURE}" if where.name == "config.json" and model_config.CURE not in str(error) else ""
        raise ValueError(f"{plain(where)}: {reason(error)}{cure}") from error


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds back transformers' log and all warnings; an error drops them."""
    logger, records = logging.getLogger("transformers"), queue.SimpleQueue()
    handlers, logger.handlers = logger.handlers, [QueueHandler(records)]
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    for warned in caught:
        warnings.showwarning(warned.message, warned.category, warned.filename, warned.lineno, warned.file, warned.line)
    while not records.empty():
        logger.handle(records.get())


def reason(error: BaseException) -> str:
    """The line of an error's text that says why, cut."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip(" -")]
    first = lines[0] if lines else ""
    if "alidation error" in first and len(lines) > 1:  # of a dataclass: the field, and what is wrong with it
        first = lines[1].removeprefix("TypeError: ").removeprefix("ValueError: ")
    if not isinstance(error, ValueError | OSError | RuntimeError) or not first:
        first = f"{type(error).__name__}: {first}"
    return plain(first if len(first) <= LONGEST else f"{first[: LONGEST - 3]}...")


def known_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={shown(dtype)}: expected one of {', '.join(DTYPES)}")


@held_back()
def load_model(path: str | Path, dtype: str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """A causal language model from a local directory, in eval mode; dtype: a name of DTYPES (default: as saved)."""
    known_dtype(dtype)
    folder = ModelFolder(path)
    config = folder.configuration()
    wanted = DTYPES[dtype] if dtype else folder.saved_dtype(config)
    folder.fitting(config, wanted)
    from transformers import AutoModelForCausalLM

    with refusals(folder.path):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=config,
            attn_implementation=attention_of(config),
            dtype=wanted,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # what transformers says counts, also of conversions that only it knows
    left = without(sorted(info["unexpected_keys"]), REMADE)
    check_all_used(Stored({}, sorted(info["missing_keys"]), [], True), folder.shards)
    if left:
        raise ValueError(f"{plain(path)}: {left[0]} is no tensor of the model ({len(left)} are not): {COPY}")
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

    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{plain(path)}: no such directory: expected a local Hugging Face model directory")
    for name in (*TOKENIZERS, *BESIDE, "merges.txt", "chat_template.jinja"):
        if os.path.exists(path / name) and (kind := odd_kind(path / name)) is not None:
            raise ValueError(f"{plain(path / name)}: {kind}, expected a file: {COPY}")
        if not name.endswith(".model") or not (path / TOKENIZERS[0]).exists():  # else nobody reads it
            check_start(path / name)
    if not has_tokenizer(path):
        raise ValueError(
            f"{plain(path)}: no tokenizer (tokenizer.json): save one with tokenizer.save_pretrained({str(path)!r})"
        )
    _check_beside(path)
    model = _beside_tokenizer(path)
    try:
        with held_back(), _silent():
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, config=model
            )
            tokenizer("a")  # some settings, such as model_max_length, are looked at in a call only
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        damaged = path / "tokenizer.json" if _is_panic(error) else _damaged_tokenizer(path)
        raise ValueError(f"{plain(damaged)}: {reason(error)}: {COPY}") from error
    return tokenizer


def _beside_tokenizer(path: Path) -> PretrainedConfig | None:
    """The model's configuration, by which transformers chooses a tokenizer's class; judged before it is read."""
    if not os.path.lexists(file := path / "config.json"):
        return None
    values = model_config.read_model_config(file)
    if "model_type" not in values:  # transformers then goes by the tokenizer's own files
        return None
    with refusals(file):
        config = model_config.configured(values)
    config._name_or_path = str(path)
    return config


def _check_beside(path: Path) -> None:
    """What stands beside a tokenizer.json: templates and small objects. ValueError names the file."""
    templates = [path / "chat_template.jinja"]
    if (more := path / "additional_chat_templates").is_dir():
        templates += [more / name for name in sorted(os.listdir(more))]
    for template in templates:
        if os.path.lexists(template):
            read_text(template, TEMPLATE)
    for name in BESIDE:
        if not (path / name).exists():
            continue
        with refusals(path / name):  # not read_json: transformers writes model_max_length as 10**30
            if not isinstance(found := json.loads(read_text(path / name)), dict):
                raise ValueError(f"got {shown(found)}, expected an object: {COPY}")
            for key, value in found.items():
                if (expected := _expected_beside(name, key, value)) is not None:
                    raise ValueError(f"{plain(key)} is {shown(value)}, expected {expected}: {COPY}")
            for file in found.get("fast_tokenizer_files") or () if name == BESIDE[0] else ():
                if not (path / file).is_file():
                    raise ValueError(f"fast_tokenizer_files: {shown(file)} is not there: delete it")


def _expected_beside(name: str, key: str, value: Any) -> str | None:
    """What is expected in place of a value in one of BESIDE; None where it may be right."""
    if name in ("added_tokens.json", "vocab.json"):
        return None if type(value) is int and 0 <= value < 2**31 else "a token's number"
    if key.endswith("_token") and not key.startswith(("add_", "split_")):
        text = value.get("content") if isinstance(value, dict) else value
        # true and false are of settings that are named like tokens
        return None if isinstance(text, str | bool) or value is None else "a token's text"
    if name != BESIDE[0] or value is None:
        return None
    if key == "model_max_length":
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if key in ("auto_map", "added_tokens_decoder"):
        return None if isinstance(value, dict) else "an object"
    if key == "tokenizer_class":
        return None if isinstance(value, str) and value.isprintable() else "a name"
    if key == "fast_tokenizer_files":
        right = isinstance(value, list) and all(isinstance(v, str) and os.path.basename(v) == v != "" for v in value)
        return None if right else "names of files in the folder"
    if key == "chat_template":
        named = isinstance(value, list) and all(_is_named_template(item) for item in value)
        return None if isinstance(value, str) or named else "a template, or a list of {name, template}"
    return None


def _is_named_template(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))


def _is_panic(error: BaseException) -> bool:
    """Of Rust's code: tokenizers raises it as a BaseException."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Takes what a panic of Rust's code writes by itself to the process's standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _damaged_tokenizer(path: Path) -> Path:
    """Which of a tokenizer's files is to blame: tokenizer.json, if it cannot be read by itself."""
    from tokenizers import Tokenizer

    if (path / "tokenizer.json").exists():
        try:
            with _silent():
                Tokenizer.from_file(str(path / "tokenizer.json"))
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            return path / "tokenizer.json"
    return next((path / name for name in BESIDE if (path / name).exists()), path)


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
