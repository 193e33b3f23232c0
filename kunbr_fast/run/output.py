"""Whether a run may write its result into a folder: nothing of the user's is replaced there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kunbr_fast.files.documents import read_json
from kunbr_fast.files.model_folder import holds_model, is_model_file, within, written_names
from kunbr_fast.run.folder import FINISHED, SAVING, CheckpointFolder

REPORTS = ("report.json", "run.yaml", "density.png", "relearning.png")


def finished_report(out: str | Path) -> dict[str, Any] | None:
    """The report of the finished run in `out`, or None."""
    path = Path(out) / "report.json"
    try:
        report = read_json(path) if path.is_file() else None
    except ValueError:
        return None
    ours = isinstance(report, dict) and report.keys() >= {"kunbr_fast", "config", "blocks", "density", "losses"}
    return report if ours and isinstance(report["config"], dict) else None


def check_place(out: str | Path, sources: Mapping[str, str | Path | None]) -> None:
    """ValueError where `out` cannot be a run's folder, or is that of one of `sources` ({what it is: folder})."""
    if not str(out) or within(Path.cwd(), out):
        raise ValueError(f"the output directory {str(out)!r} is the current one, or holds it: give a folder of its own")
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out}: it is a file: give the result a folder")
    for what, source in sources.items():
        if source is not None and within(out, source):
            raise ValueError(
                f"{out}: it is the folder of {what}, or lies in it, and what a run reads is never overwritten: give "
                "another output directory"
            )


def is_finished(out: str | Path, folder: CheckpointFolder) -> bool:
    """Whether the run in `out` has come to its end, though something of its checkpoints may be left."""
    return folder.phase == FINISHED or (folder.phase is None and finished_report(out) is not None)


def check_output(out: str | Path, source: str | Path, resume: bool, overwrite: bool) -> None:
    """ValueError where a run into `out` would replace something. source: of the model, whose files' names it writes.

    overwrite: a model, and the result of a finished run, may be replaced; nothing else may.
    """
    folder, finished = CheckpointFolder(out), finished_report(out)
    if not resume and is_finished(out, folder) and not overwrite:
        raise ValueError(
            f"{out} already holds a finished run: give another output directory, or replace it (overwrite=True)"
        )
    folder.check()
    if resume:
        folder.check_resumable()
    elif folder.phase != FINISHED:
        folder.check_free()
    if folder.phase == SAVING:
        return  # what is there the run has written
    may = overwrite or folder.overwrites
    if holds_model(out) and not may:
        raise ValueError(
            f"{out} holds a model, which the result would replace: give another output directory, or replace it "
            "(overwrite=True)"
        )
    names = written_names(source) | set(REPORTS)
    for path in sorted(Path(out).iterdir()) if Path(out).is_dir() else ():
        name = path.name
        if name not in names and not is_model_file(name):
            continue
        replaceable = finished is not None if name in REPORTS else holds_model(out)
        if path.is_dir() or not (may and replaceable):
            raise ValueError(
                f"{path} was not written by this run, which would replace it: move it, or give another output directory"
            )
