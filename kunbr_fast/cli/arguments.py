"""Arguments that several commands share, and one option for each setting of a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from kunbr_fast.files.models import DTYPES
from kunbr_fast.run.config import KUnBRConfig

# The groups of the help text: theme, and the settings of KUnBRConfig under it.
THEMES = {
    "data": "target max_length seed batch_size retain_batch_size",
    "objective": "objective objective_options retain_loss retain_coeff forget_loss_cap weight_decay max_retain_loss",
    "warm-up": "warmup_epochs warmup_objective warmup_objective_options warmup_lr warmup_optimizer",
    "selection": "modules reduction num_blocks top_k skip_last_layers",
    "blocks": "insertion rounds block_epochs block_lr optimizer master_weights mask mask_ratio",
    "attack": "scoring rtt rtt_lrs rtt_epochs rtt_batch_size rtt_target",
    "execution": "cache cache_bytes optimizer_device micro_batch_tokens checkpoint_every "
    "gradient_checkpointing cuda_graphs parallel impl",
    "approximations": "cover_precision cache_dtype",
}
THEME = {name: theme for theme, names in THEMES.items() for name in names.split()}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="local Hugging Face model directory (safetensors)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as saved")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def add_files(
    parser: argparse.ArgumentParser, option: str, metavar: str, text: str | None = None, required: bool = False
) -> None:
    parser.add_argument(option, nargs="+", required=required, metavar=metavar, help=text)


def add_stream(parser: argparse.ArgumentParser, text: str = "") -> None:
    parser.add_argument(
        "--stream", action="store_true", help=f"models larger than memory: layers are read when they run{text}"
    )
    parser.add_argument(
        "--stream-cache",
        default="0",
        metavar="SIZE",
        help="with --stream, main memory in which layers may stay once they were read, such as 64GiB [none]",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    group.add_argument("--quiet", action="store_true", help="no progress bars, no stage lines")


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """One option for each setting of KUnBRConfig, or for `names` alone: --block-lr 1e-5."""
    parser.add_argument(
        "--config", metavar="run.yaml", help="settings, one 'name: value' a line; an option below wins over its line"
    )
    wanted = [field for field in dataclasses.fields(KUnBRConfig) if names is None or field.name in names]
    for theme in THEMES:
        fields = [field for field in wanted if THEME[field.name] == theme]
        group = parser.add_argument_group(theme) if fields else None
        for field in fields:
            _add_setting(group, field)


def _add_setting(group: Any, field: dataclasses.Field) -> None:
    option, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    kind = {"default": argparse.SUPPRESS, "dest": f"set_{field.name}"}
    if isinstance(default, dict):
        option, text = option.removesuffix("s"), f"{text}; may be given several times"
        kind |= {"action": "append", "type": _name_and_value, "metavar": "NAME=VALUE"}
    elif isinstance(default, bool):
        kind |= {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        kind |= {"nargs": "+", "type": float, "metavar": "LR"}
    else:
        kind |= {"type": _scalar, "metavar": field.name.rpartition("_")[2].upper()}
    if default is not None and not isinstance(default, dict):
        text += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
    group.add_argument(option, help=text.replace("%", "%%"), **kind)


def _name_and_value(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name or not sign or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, such as beta=0.1")
    return name, _scalar(value)


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def positive(kind: type):
    """An argument type: a number of `kind` above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive float value: '-1'"
    return read
