"""What arguments name: settings, devices, models, and the folds of the attack."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.cli.terminal import say
from kunbr_fast.data import is_question
from kunbr_fast.data.columns import Columns
from kunbr_fast.data.foreign import behind
from kunbr_fast.data.reading import read_records
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.parallel.group import local_device, num_processes
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.methods import methods, settings_of


def read_config(arguments: argparse.Namespace) -> KUnBRConfig:
    """The settings of --method and of --config, and of the options, which win."""
    values: dict[str, Any] = {}
    method = getattr(arguments, "method", None)
    if arguments.config:
        values, found = KUnBRConfig.read(arguments.config), KUnBRConfig.load(arguments.config)
        mine = KUnBRConfig.from_dict({"method": method})
        for name in settings_of(method) if method else ():
            if name in values and f"set_{name}" not in arguments and getattr(found, name) != getattr(mine, name):
                raise ValueError(
                    f"{plain(arguments.config)}: {name}: {shown(values[name])}, and --method {method} sets "
                    f"{shown(getattr(mine, name))}: leave one of them out, or give --{name.replace('_', '-')} too"
                )
    if method:
        values["method"] = method
        sayer(arguments)(f"{method}: {methods()[method].text}")
    for name, value in vars(arguments).items():
        if name.startswith("set_"):
            name = name[4:]
            values[name] = {**values.get(name, {}), **value} if name.endswith("_options") else value
    return KUnBRConfig.from_dict(values, "settings")


def choose_device(arguments: argparse.Namespace) -> str:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and not count:
        raise ValueError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; `kunbr-fast doctor` says more"
        )
    if int(device.partition(":")[2] or 0) >= max(count, 1):
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"--device {device}: expected cpu, cuda or {there}: torch sees no other")
    return local_device() if device == "cuda" and num_processes() > 1 else device


def open_model(arguments: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """(model, tokenizer) of --model: in memory, or with --stream read layer by layer."""
    device, kept = choose_device(arguments), getattr(arguments, "stream_cache", None)
    if getattr(arguments, "stream", False):
        model = open_streamed(arguments.model, device, arguments.dtype, host_bytes=kept)
    elif kept is not None:
        raise ValueError("--stream-cache without --stream: the model is in memory whole: leave it out")
    else:
        model = load_model(arguments.model, arguments.dtype, device)
    return model, load_tokenizer(arguments.model)


Reader = Callable[..., list[dict]]  # of a file or several, and the option that names them


def check_columns(arguments: argparse.Namespace) -> None:
    """ValueError for names of columns that are not in order, or of files that are not given."""
    given = vars(arguments)
    for dest, columns in given.items():
        if not dest.endswith("_columns") or not columns:
            continue
        option = dest.removesuffix("_columns").replace("_", "-")
        if not given[dest.removesuffix("_columns")]:
            raise ValueError(f"--{option}-columns without --{option}: give its files, or leave it out")
        try:
            Columns(columns)
        except ValueError as error:  # which begins with "columns"
            raise ValueError(f"--{option}-{error}") from error


def reader(arguments: argparse.Namespace, config: KUnBRConfig) -> Reader:
    """`load_records` as the options say: `read(paths, "--forget")`."""
    check_columns(arguments)
    given = vars(arguments)
    if arguments.preset and config.separator:
        raise ValueError(
            f"--separator with --preset {arguments.preset}: the preset's lines have what stands between prompt and "
            "completion: leave --separator out, or name the columns yourself"
        )
    say = sayer(arguments)

    def read(paths: str | Sequence[str], option: str) -> list[dict]:
        columns = given[f"{option.removeprefix('--').replace('-', '_')}_columns"]
        preset = None if columns else arguments.preset
        records = read_records(paths, arguments.ignore_keys, config.equal_choices, columns, preset, say)
        joined = [r for r in records if "prompt" in r and behind(r["prompt"], r["completion"]) != r["completion"]]
        if columns and joined and not config.separator:
            say(
                f"{joined[0]['_where']}: nothing stands between prompt and completion ({len(joined)} such lines, of "
                f"{len(records)}): --separator ' ' puts a space there"
            )
        return records

    return read


def read_folds(forget: Sequence[str], questions: Sequence[str] | None, read: Reader) -> list[Fold]:
    """One fold for each forget file, with its own questions."""
    if questions is not None and len(questions) != len(forget):
        raise ValueError(
            f"--forget-questions has {len(questions)} files and --forget {len(forget)}: "
            "give one for each, in the same order"
        )
    folds = []
    for i, path in enumerate(forget):
        records = read(path, "--forget")
        asked = records if questions is None else read_questions([questions[i]], "--forget-questions", read)
        folds.append(Fold(Path(path).stem, records, [r for r in asked if is_question(r)]))
    return folds


def read_questions(paths: Sequence[str], option: str, read: Reader) -> list[dict]:
    """The records of files of which each must ask something."""
    found = []
    for path in paths:
        records = read(path, option)
        if not any(map(is_question, records)):
            raise ValueError(
                f"{option}: {plain(path)} has no question among its {len(records)} lines: expected lines with "
                "question, choices and answer"
            )
        found += records
    return found


def sayer(arguments: argparse.Namespace) -> Callable[[str], None]:
    """`say`, or with --quiet nothing."""
    return (lambda text: None) if arguments.quiet else say
