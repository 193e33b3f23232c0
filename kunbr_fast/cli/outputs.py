"""What the options of a command write, checked before it begins; and whether --resume would go on."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Mapping
from pathlib import Path

from kunbr_fast.files.lock import hold_file
from kunbr_fast.files.merge_folder import PARTIAL
from kunbr_fast.files.target import FileKind, FolderKind, Target, check
from kunbr_fast.measures import UNFINISHED
from kunbr_fast.run.folder import NAME, STATE

# Options that name what is read, of all commands. `plan --unlearned` is a flag.
INPUTS = (
    "model", "unlearned", "base", "models", "config", "compare", "report",
    "forget", "retain", "forget_questions", "retain_questions", "other_facts", "holdout_of",
    "original", "retrained", "holdout", "lm_eval_include",
)  # fmt: skip
# What there is in --out of a command that was interrupted, once something of it is kept.
KEPT = {
    "unlearn": f"{NAME}/{STATE}", "baseline": f"{NAME}/{STATE}", "merge": PARTIAL, "rtt": "", "bench": "results.csv",
    "evaluate": UNFINISHED,
}  # fmt: skip
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def check_outputs(arguments: argparse.Namespace, writes: Mapping[str, FileKind | FolderKind]) -> None:
    """ValueError for an option in `writes` whose target is not ours to replace, or cannot be written, or which another
    process is going to write; until the command ends no other may. Of several processes the first one writes, and
    looks. Folders are held by what writes there."""
    if arguments.group is not None and not arguments.group.first:
        return
    targets = [Target(option(name), given, writes[name]) for name, given in named(arguments, writes)]
    check(targets, [(option(name), given) for name, given in named(arguments, INPUTS)])
    for target in targets:
        if isinstance(target.kind, FileKind):
            arguments.held.enter_context(hold_file(target.path))


def named(arguments: argparse.Namespace, names) -> list[tuple[str, str]]:
    """(name, path) of those that are given, one for each path."""
    found = [(name, getattr(arguments, name, None)) for name in names]
    lists = [(name, value if isinstance(value, list) else [value]) for name, value in found]
    return [(name, path) for name, paths in lists for path in paths if isinstance(path, str)]


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def resumes(arguments: argparse.Namespace) -> bool:
    """Whether --resume would find something of this command in --out."""
    out = getattr(arguments, "out", None)
    return bool(out) and arguments.command in KEPT and os.path.exists(Path(out) / KEPT[arguments.command])


def of_disk(error: BaseException) -> bool:
    """Whether a disk is full, or has failed: nothing that was given is wrong, and the command can go on later."""
    return isinstance(error, OSError) and error.errno in DISK
