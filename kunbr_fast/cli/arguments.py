"""Arguments that several commands share, and one option for each setting of a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kunbr_fast.cli.argument_types import (
    Different,
    Renamed,
    Settings,
    column,
    device_name,
    escaped_text,
    name_and_value,
    number,
    number_or,
    path_name,
)
from kunbr_fast.data.presets import PRESETS
from kunbr_fast.files.models import DTYPES
from kunbr_fast.objectives.hidden_layers import WORDS
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.methods import methods
from kunbr_fast.run.setting import NUMBERS
from kunbr_fast.values import Bytes

# The groups of the help text: theme, and the settings of KUnBRConfig under it.
THEMES = {
    "data": "target max_length separator chat_date split_long overlap equal_choices seed batch_size retain_batch_size",
    "objective": "objective objective_options retain_loss retain_layers hidden_coeff retain_coeff "
    "forget_loss_cap weight_decay max_retain_loss",
    "adversary": "adversary_every adversary_steps adversary_lrs adversary_frozen adversary_reach",
    "warm-up": "warmup_epochs warmup_objective warmup_objective_options warmup_lr warmup_optimizer "
    "warmup_master_weights",
    "selection": "modules statistic reduction num_blocks rule top_k threshold skip_last_layers",
    "blocks": "insertion rounds block_epochs block_lr block_hidden_coeff optimizer master_weights mask mask_ratio",
    "attack": "scoring rtt rtt_lrs rtt_attacks rtt_master_weights rtt_lora_rank rtt_lora_targets rtt_epochs "
    "rtt_batch_size rtt_target",
    "execution": "cache cache_bytes optimizer_device resident_layers micro_batch_tokens checkpoint_every log_to "
    "gradient_checkpointing cuda_graphs parallel sharding impl",
    "approximations": "cover_precision cache_dtype",
}
THEME = {name: theme for theme, names in THEMES.items() for name in names.split()}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=path_name, metavar="DIR", help="local Hugging Face model directory (safetensors)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as saved")
    add_device(parser)


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", type=device_name, metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)"
    )


def add_files(
    parser: argparse.ArgumentParser, option: str, metavar: str, text: str | None = None, required: bool = False
) -> None:
    """An option that names files of records, and beside it the one that says what their columns stand for."""
    parser.add_argument(
        option, nargs="+", type=path_name, action=Different, required=required, metavar=metavar, help=text
    )
    parser.add_argument(
        f"{option}-columns",
        nargs="+",
        type=column,
        action=Renamed,
        metavar="COLUMN=KEY",
        help=f"what keys of {option} stand for, such as question=prompt answer=completion; A=choices B=choices makes "
        "one list",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How files of records are read, all of them."""
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        action=Different,
        default=[],
        metavar="KEY",
        help="keys of the files' lines, and of messages, that are left out; one that would not be used is an error "
        "otherwise",
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="lines as a published set has them, beside our own; an option's columns take its place",
    )


def add_stream(parser: argparse.ArgumentParser, text: str = "") -> None:
    parser.add_argument(
        "--stream", action="store_true", help=f"models larger than memory: layers are read when they run{text}"
    )
    parser.add_argument(
        "--stream-cache",
        type=number(Bytes()),
        metavar="SIZE",
        help="with --stream, main memory in which layers may stay once they were read, and lie while they are trained, "
        "such as 64GiB; the rest is in files [none; for what is trained half of what is free]",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    group.add_argument("--quiet", action="store_true", help="no progress bars, no stage lines")


def add_settings(
    parser: argparse.ArgumentParser,
    names: Sequence[str] | None = None,
    called: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> None:
    """One option for each setting of KUnBRConfig, or for `names` alone: --block-lr 1e-5. called: the option of a
    setting that has a shorter name too, or the same, and its help."""
    parser.add_argument(
        "--config",
        type=path_name,
        metavar="run.yaml",
        help="settings, one 'name: value' a line; an option below wins over its line",
    )
    if names is None:
        parser.add_argument(
            "--method",
            choices=list(known := methods()),
            help="what a method sets; the options below win over it. "
            + "; ".join(f"{name}: {method.text}" for name, method in known.items()),
        )
    wanted = [field for field in dataclasses.fields(KUnBRConfig) if names is None or field.name in names]
    for theme in THEMES:
        fields = [field for field in wanted if THEME[field.name] == theme]
        # what has shorter names is all the training that there is
        title = "training" if any(field.name in called for field in fields) and theme == "warm-up" else theme
        group = parser.add_argument_group(title) if fields else None
        for field in fields:
            _add_setting(group, field, *called.get(field.name, ("", field.metadata["help"])))


def _add_setting(group: Any, field: dataclasses.Field, short: str, text: str) -> None:
    option = f"--{field.name.replace('_', '-')}"
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    kind = {"default": argparse.SUPPRESS, "dest": f"set_{field.name}"}
    if isinstance(default, dict):
        option, text = option.removesuffix("s"), f"{text}; may be given several times"
        kind |= {"action": Settings, "type": name_and_value, "metavar": "NAME=VALUE"}
    elif isinstance(default, bool):
        kind |= {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        known, metavar = NUMBERS.get(field.name), field.name.rpartition("_")[2].upper().removesuffix("S")
        metavar = "LOG" if field.name == "log_to" else metavar
        kind |= {"nargs": "+", "type": number(known) if known else str, "action": Different, "metavar": metavar}
    elif field.name == "retain_layers":
        kind |= {"nargs": "+", "type": number_or(WORDS, NUMBERS[field.name]), "action": Different, "metavar": "LAYER"}
    else:
        known = NUMBERS.get(field.name)
        words = escaped_text if field.name == "separator" else str
        kind |= {"type": words if known is None else number(known), "metavar": field.name.rpartition("_")[2].upper()}
    if default not in (None, "") and not isinstance(default, dict):
        text += f" [{' '.join(map(str, default)) or 'none' if isinstance(default, tuple) else default}]"
    group.add_argument(*dict.fromkeys([short or option, option]), help=text.replace("%", "%%"), **kind)
