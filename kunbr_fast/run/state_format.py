"""What a state.json may hold. It may be of any origin: names in it are those that we give, and lie in its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from kunbr_fast.density.measure import Saved
from kunbr_fast.evaluation.rtt import Point
from kunbr_fast.files.documents import checked
from kunbr_fast.files.shown import shown
from kunbr_fast.run.folder import stage_file

FORMAT = 2
_STAGES = re.compile(
    r"begin|warmup|density|selection|merge|reference(\.blocks)?|evaluation\.(original|result)|rtt\..+"
    r"|blocks\.[0-9]{1,9}\.[0-9]{1,9}-[0-9]{1,9}",
    re.DOTALL,
)
# what a stage's result has, by its group; the file may be gone once a later round has replaced it
_HAS = {
    "begin": ["unlearned_given"],
    "density": ["density", "seconds"],
    "selection": ["blocks"],
    "reference": ["file", "seconds"],
    "blocks": ["file", "epochs"],
    "evaluation": ["accuracy", "seconds"],
    "rtt": ["rows", "seconds"],
}
Losses = dict[str, float | None]


class Accuracy(TypedDict):
    plain: float
    calibrated: float | None
    num_questions: int


class Result(TypedDict, total=False):
    """Of a finished stage."""

    file: str
    sha256: str
    seconds: float
    epochs: list[Losses]
    accuracy: dict[str, Accuracy]
    given: str
    density: Saved
    blocks: list[tuple[int, int]]
    rows: Annotated[list[Point], Meta(min_length=1)]
    gradient_cosine: float
    cache_error: dict[str, float]
    unlearned_given: bool


class Account(TypedDict):
    """Of the steps that are done, besides tensors."""

    epochs: list[Losses]
    sums: dict[str, float | None] | None
    recent: list[float]
    seconds: float
    micro_batch_tokens: int | None


class Kept(TypedDict):
    file: str
    sha256: str


class Progress(Kept):
    step: Annotated[int, Meta(ge=0, le=10**12)]
    extra: Account
    confirmed: bool


class State(TypedDict):
    format: int
    identity: str
    config: dict[str, Any]
    stages: dict[str, Result]
    progress: dict[str, list[Progress]]
    kept: dict[str, Kept]


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """ValueError for a state of another format, of other types, or that names files other than its own."""
    if (found := state.get("format")) != FORMAT:
        raise ValueError(
            f"{path}: format {shown(found)}, this version reads {FORMAT}: start again in another directory"
        )
    checked(state, State, str(path))
    for stage, result in state["stages"].items():
        _check_stage(stage, path)
        _check_name(result, stage, None, path)
        if missing := [key for key in _HAS.get(stage.partition(".")[0], ()) if key not in result]:
            raise ValueError(f"{path}: {shown(stage)} has no {missing[0]}: {_CURE}")
    for stage, entries in state["progress"].items():
        _check_stage(stage, path)
        for entry in entries:
            _check_name(entry, stage, entry["step"], path)
    for name, entry in state["kept"].items():
        if name != "original" or entry["file"] != "original.safetensors":
            raise ValueError(f"{path}: {shown(name)} is nothing that a run keeps: {_CURE}")


_CURE = "it was not written by kunbr-fast: start again in another directory"


def _check_stage(stage: str, path: Path) -> None:
    if not _STAGES.fullmatch(stage):
        raise ValueError(f"{path}: {shown(stage)} is no stage of a run: {_CURE}")


def _check_name(entry: Mapping[str, Any], stage: str, step: int | None, path: Path) -> None:
    if ("file" in entry) != ("sha256" in entry):
        raise ValueError(f"{path}: {stage} has a file without a checksum, or the other way round: {_CURE}")
    if "file" in entry and entry["file"] != stage_file(stage, step):
        raise ValueError(f"{path}: {stage} names the file {shown(entry['file'])}: {_CURE}")
