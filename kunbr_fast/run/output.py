"""What a run writes into a folder, and whether it may: nothing of the user's is replaced there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.evaluation.figures import drawn
from kunbr_fast.evaluation.plots import plot_density, plot_relearning
from kunbr_fast.evaluation.report import Report, plain_values, write_report
from kunbr_fast.files.documents import read_json
from kunbr_fast.files.model_folder import is_mixed, is_model, is_model_file, is_part, within, written_names
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.shown import plain
from kunbr_fast.files.target import csv_with, is_page, is_picture, is_signed, json_with, model_in
from kunbr_fast.model.weights import weights_of
from kunbr_fast.run.certificate import is_certificate
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.folder import FINISHED, SAVING, CheckpointFolder

logger = logging.getLogger(__name__)
_KEYS = "kunbr_fast config blocks density seconds losses accuracy rtt recovery model".split()
_FINISHED = json_with(*_KEYS, also=None)
_REPORT = json_with(*_KEYS, also=("gradient_cosines", "cache_errors", "probability", "cautions", "examples", "result"))
_EVALUATION = json_with("kunbr_fast", "format", "suite", "models", "sets", "figures", also=None)
# what there is of a run besides the model, and whether a file of that name is one of ours: new results remove them all
REPORTS = {
    "report.json": _REPORT,
    "run.yaml": is_signed,
    "density.png": is_picture,
    "relearning.png": is_picture,
    "unlearning.json": is_certificate,
    "report.html": is_page,
    "evaluation.json": _EVALUATION,
    "evaluation.csv": csv_with("measure", "group", "set", "model", "value", "standard_error"),
}


def finished_report(out: str | Path) -> dict[str, Any] | None:
    """The report of the finished run in `out`, or None."""
    path = Path(out) / "report.json"
    return read_json(path) if path.is_file() and _FINISHED(path) else None


def check_place(out: str | Path, sources: Mapping[str, str | Path | None]) -> None:
    """ValueError where `out` cannot be a run's folder, or is that of one of `sources` ({what it is: folder})."""
    if not str(out) or within(Path.cwd(), out):
        raise ValueError(f"the output directory {str(out)!r} is the current one, or holds it: give a folder of its own")
    for path in (Path(out), *Path(out).parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
            raise ValueError(f"{plain(path)}: it is {what}: give the result a folder")
    for what, source in sources.items():
        if source is not None and within(out, source):
            raise ValueError(
                f"{plain(out)}: it is the folder of {what}, or lies in it, and what a run reads is never overwritten: "
                "give another output directory"
            )


def is_finished(out: str | Path, folder: CheckpointFolder) -> bool:
    """Whether the run in `out` has come to its end, though something of its checkpoints may be left."""
    return folder.phase == FINISHED or (folder.phase is None and finished_report(out) is not None)


def check_output(
    out: str | Path, source: str | Path, resume: bool, overwrite: bool, reads: Iterable[str | Path] = ()
) -> None:
    """ValueError where a run into `out` would replace something. source: of the model, whose files' names it writes.

    overwrite: a model, and the result of a finished run, may be replaced; nothing else may. reads: other files that the
    run reads, which never are.
    """
    folder = CheckpointFolder(out)
    if not resume and is_finished(out, folder) and not overwrite:
        raise ValueError(
            f"{plain(out)} already holds a finished run: give another output directory, or replace it (overwrite=True)"
        )
    folder.check()
    if resume and folder.phase is None and (Path(out) / "report.json").exists():
        raise ValueError(
            f"{plain(Path(out) / 'report.json')} is not that of a finished run, or damaged, and there are no "
            "checkpoints: move it away, or give another output directory, and run again"
        )
    if resume:
        folder.check_resumable()
    elif folder.phase != FINISHED:
        folder.check_free()
    names = written_names(source) | REPORTS.keys()
    for given in reads:
        path = Path(given).resolve()
        if path.parent == Path(out).resolve() and (is_model_file(path.name) or path.name in names):
            raise ValueError(f"{plain(given)} is read by this run, which would replace it: move it elsewhere")
    if folder.phase == SAVING:
        return  # what is there the run has written
    may, model, whole = overwrite or folder.overwrites, model_in(Path(out)), is_model(out)
    if model and not may and (whole or model.name != "config.json"):
        raise ValueError(
            f"{plain(out)} holds a model ({plain(model.name)}), which the result would replace: give another output "
            "directory, or replace it (overwrite=True)"
        )
    for path in sorted(Path(out).iterdir()) if Path(out).is_dir() else ():
        cure = "move it, or give another output directory"
        if is_mixed(path.name):
            raise ValueError(f"{plain(path)} would be read together with the result, which it is no part of: {cure}")
        if path.name not in names and not is_model_file(path.name):
            continue
        ours = _is_report(path) if path.name in REPORTS else whole and is_part(path)
        if not may or not ours:
            what = "was not written by this run" if not may else "is no file of a model or of a finished run"
            raise ValueError(f"{plain(path)} {what}, and the result would replace it: {cure}")


def write_reports(
    out: str | Path, report: Report, model: str, seal: Callable[[Mapping[str, Any]], Any] | None = None
) -> None:
    """A run's settings, plots and last its report, beside the result, in place of those of an earlier run: not all are
    written each time. What is the user's under one of these names stays, and is said.

    model: what the original is called. seal: of the report's values, what tells later whether it is whole."""
    out, config = Path(out), KUnBRConfig.from_dict(report.config, of_a_run=True)
    for name in REPORTS:
        if _is_report(path := out / name):
            path.unlink()
    taken = [name for name in REPORTS if os.path.lexists(out / name)]
    if taken:
        logger.warning("%s: %s: not written by a run, so it stays, and none is written", plain(out), ", ".join(taken))
    density, curves = out / "density.png", out / "relearning.png"
    if density.name not in taken:
        drawn(density, lambda: plot_density(report.density, report.blocks, density, config.skip_last_layers))
    if report.rtt is not None and curves.name not in taken:
        chance = report.accuracy.get("result", {}).get("forget", {}).get("chance", 0.25)
        drawn(curves, lambda: plot_relearning({report.method: report.rtt}, curves, chance))
    if "run.yaml" not in taken:
        config.save(out / "run.yaml")
    if "report.json" not in taken:
        values = plain_values(report.to_dict() | {"model": model})
        write_report(out / "report.json", values if seal is None else values | {"result": seal(values)})


def _is_report(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and REPORTS[path.name](path)


def check_not_read(out: str | Path, model: nn.Module) -> None:
    """ValueError where the model in `out` has the weights of `model`, in memory: it may have been loaded from there, by
    a name that leads elsewhere by now."""
    if not is_model(out):
        return
    try:
        weights, shards = weights_of(model), Shards(out)
    except ValueError:  # its index is broken, say: nobody has loaded it
        return
    both = [name for name in weights if name in shards]
    if both and all(torch.equal(shards[name].to(weights[name].dtype), weights[name].cpu()) for name in both):
        raise ValueError(
            f"{plain(out)}: the model there has the weights of the one given, and what a run reads is never "
            "overwritten: give another output directory"
        )
