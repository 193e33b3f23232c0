"""What OpenUnlearning's configs want of a machine: where that is not there, one line says what to set. And its standard
output, whose reader may go."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from kunbr_fast.files.models import reason
from kunbr_fast.integrations.open_unlearning_options import Refused


def cures(model: Any, trainer: Any = None) -> list[str]:
    """The overrides without which a model's config, and a trainer's, cannot run here."""
    found, cuda = [], torch.cuda.is_available()
    arguments = model.get("model_args") or {}
    flash = arguments.get("attn_implementation") == "flash_attention_2"
    if flash and (not cuda or importlib.util.find_spec("flash_attn") is None):
        found.append("model.model_args.attn_implementation=sdpa")
    if cuda:
        return found
    if str(arguments.get("device_map")).startswith("cuda"):
        found.append("model.model_args.device_map=cpu")
    given = (trainer or {}).get("args") or {}
    if (given.get("bf16") or given.get("bf16_full_eval")) and not given.get("use_cpu"):
        found.append("+trainer.args.use_cpu=true")
    # trainer=KUnBR has optimisers of its own
    if str(given.get("optim")).startswith("paged_") and given.get("do_train") and trainer.get("handler") != "KUnBR":
        found.append("trainer.args.optim=adamw_torch")
    return found


def get_model(own: Callable) -> Callable:
    """`model.get_model`, after a look at the config and with its failures in one line."""

    @functools.wraps(own)
    def get(model_cfg: Any) -> Any:
        from omegaconf import OmegaConf

        if missing := cures(model_cfg, OmegaConf.select(model_cfg, "..trainer")):
            lacking = "flash-attn is not installed" if torch.cuda.is_available() else "there is no GPU here"
            raise Refused(f"{lacking}, and the config wants it: add {' '.join(missing)}")
        name = model_cfg.model_args.get("pretrained_model_name_or_path")
        try:
            return own(model_cfg)
        except (ValueError, RuntimeError) as error:
            raise Refused(
                f"{name} could not be loaded ({reason(error)}): without a network, or for another model, set "
                "model.model_args.pretrained_model_name_or_path=FOLDER "
                "model.tokenizer_args.pretrained_model_name_or_path=FOLDER"
            ) from error

    return get


def load_hf_dataset(own: Callable) -> Callable:
    """`data.utils.load_hf_dataset`, whose failures name the data set and the way to files of one's own."""

    @functools.wraps(own)
    def load(path: str, **kwargs: Any) -> Any:
        try:
            return own(path, **kwargs)
        except (OSError, ValueError) as error:  # ConnectionError and FileNotFoundError among them
            raise Refused(
                f"data set {path} ({', '.join(f'{k}={v}' for k, v in kwargs.items())}) could not be loaded "
                f"({reason(error)}): without a network give files: its hf_args.path=json hf_args.name=null "
                "+hf_args.data_files=FILE"
            ) from error

    return load


def load_trainer_args(own: Callable) -> Callable:
    """`trainer.load_trainer_args`, where it would divide by the number of GPUs and there is none."""

    @functools.wraps(own)
    def load(trainer_args: Any, dataset: Any) -> Any:
        trainer_args = dict(trainer_args)
        if trainer_args.get("warmup_epochs") and not torch.cuda.device_count():
            at_once = trainer_args["per_device_train_batch_size"] * trainer_args["gradient_accumulation_steps"]
            at_once *= int(os.environ.get("WORLD_SIZE", 1))
            trainer_args["warmup_steps"] = int(trainer_args.pop("warmup_epochs") * len(dataset) // at_once)
        return own(trainer_args, dataset)

    return load


class Output(io.TextIOWrapper):
    """Standard output. Once its reader has enough (`| head`) the process ends without a word, as `yes` does."""

    @classmethod
    def install(cls) -> None:
        how = {name: getattr(sys.stdout, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        sys.stdout = cls(sys.stdout.detach(), **how)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # takes what is left, at Python's exit
        raise SystemExit(128 + signal.SIGPIPE)
