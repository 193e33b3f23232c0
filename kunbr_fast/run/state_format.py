"""What a state.json may hold. It may be of any origin: names in it are those that we give, and lie in its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from typing_extensions import NotRequired, TypedDict

from kunbr_fast.density.measure import Saved
from kunbr_fast.evaluation.curves import Answers, Error, Point, Share, attack_of
from kunbr_fast.files.documents import checked
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.folder import stage_file
from kunbr_fast.run.visits import Stage

FORMAT = 2
_STAGES = re.compile(
    r"begin|warmup|density|selection|merge|states|reference(\.blocks)?|evaluation\.(original|result)|rtt\..+"
    r"|blocks\.[0-9]{1,9}\.[0-9]{1,9}-[0-9]{1,9}",
    re.DOTALL,
)
# what a stage's result has, by its group; the file may be gone once a later round has replaced it
_HAS = {
    "begin": ["unlearned_given"],
    "density": ["density", "seconds"],
    "selection": ["blocks"],
    "reference": ["file", "seconds"],
    "states": ["seconds"],
    "blocks": ["file", "epochs"],
    "evaluation": ["accuracy", "seconds"],
    "rtt": ["rows", "seconds"],
}
Seconds = Annotated[float, Meta(ge=0, le=1e10)]
Epochs = Annotated[list[dict[str, float | None]], Meta(max_length=10**6)]


class _Answered(TypedDict):
    plain: Share
    calibrated: Share | None
    num_questions: Annotated[int, Meta(ge=1, le=10**9)]


class Accuracy(_Answered, total=False):
    smooth: Share | None
    smooth_error: Error
    chance: Share
    change_error: Error
    values: Annotated[str, Meta(pattern="^[01 ]*$")]  # of the original alone: of each question, between spaces
    answers: Answers  # to the examples of the forget set


class _Probable(TypedDict):
    mean: Share
    standard_error: Error
    num_records: Annotated[int, Meta(ge=1, le=10**9)]


class Probability(_Probable, total=False):
    change_error: Error
    values: Annotated[str, Meta(pattern=r"^[0-9.e+ -]*$")]
    answers: Answers


class Result(TypedDict, total=False):
    """Of a finished stage."""

    file: str
    sha256: str
    seconds: Seconds
    epochs: Epochs
    accuracy: dict[str, Accuracy]
    probability: dict[str, Probability]
    given: str
    model: str
    density: Saved
    blocks: list[tuple[int, int]]
    rows: Annotated[list[Point], Meta(min_length=1)]
    gradient_cosine: float
    cache_error: dict[str, float]
    unlearned_given: bool
    run: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]  # which one of those in the same directory
    max_steps: Annotated[int, Meta(ge=1, le=10**12)]  # that the stages share
    ends: dict[str, Annotated[int, Meta(ge=1, le=10**12)]]  # of stages that were ended early, by their numbers


class Sums(TypedDict):
    """Of the losses of the present epoch's steps."""

    forget_loss: float | None
    retain_loss: float | None
    steps: Annotated[int, Meta(ge=1, le=10**12)]


class Account(TypedDict):
    """Of the steps that are done, besides tensors."""

    epochs: Epochs
    sums: Sums | None
    recent: Annotated[list[float], Meta(max_length=10)]
    seconds: Seconds
    micro_batch_tokens: Annotated[int, Meta(ge=1, le=2**40)] | None


class Kept(TypedDict):
    file: str
    sha256: str


class Progress(TypedDict):
    """In one file, or of a training that is in parts in one for each rank, in order."""

    file: NotRequired[str]
    sha256: NotRequired[str]
    ranks: NotRequired[Annotated[list[Kept], Meta(min_length=1, max_length=10**5)]]
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
    """ValueError for a state of another format, of other types or values, or that names files other than its own."""
    if (found := state.get("format")) != FORMAT:
        raise ValueError(
            f"{path}: format {shown(found)}, this version reads {FORMAT}: start again in another directory"
        )
    checked(state, State, plain(path))
    KUnBRConfig.from_dict(state["config"], f"{plain(path)}: config", of_a_run=True)
    for stage, result in state["stages"].items():
        _check_stage(stage, path)
        _check_name(result, stage, None, path)
        if missing := [key for key in _HAS.get(stage.partition(".")[0], ()) if key not in result]:
            raise ValueError(f"{path}: {shown(stage)} has no {missing[0]}: {_CURE}")
        for row in result.get("rows", ()):
            if stage != Stage.attack(row["fold"], row["lr"], attack_of(row)):
                raise ValueError(f"{path}: {shown(stage)} has rows of {shown(row['fold'])} at {row['lr']:g}: {_CURE}")
    for stage, entries in state["progress"].items():
        _check_stage(stage, path)
        for entry in entries:
            if ("file" in entry) == ("ranks" in entry):
                raise ValueError(f"{path}: {plain(stage)} has progress in no file, or in two forms: {_CURE}")
            _check_name(entry, stage, entry["step"], path)
            for rank, part in enumerate(entry.get("ranks", ())):
                _check_name(part, stage, entry["step"], path, rank)
            _check_account(entry["extra"], entry["step"], f"{path}: {plain(stage)}")
    for name, entry in state["kept"].items():
        if name != "original" or entry["file"] != "original.safetensors":
            raise ValueError(f"{path}: {shown(name)} is nothing that a run keeps: {_CURE}")


_CURE = "it was not written by kunbr-fast: start again in another directory"


def _check_stage(stage: str, path: Path) -> None:
    if not _STAGES.fullmatch(stage):
        raise ValueError(f"{path}: {shown(stage)} is no stage of a run: {_CURE}")


def _check_name(entry: Mapping[str, Any], stage: str, step: int | None, path: Path, rank: int | None = None) -> None:
    if ("file" in entry) != ("sha256" in entry):
        raise ValueError(f"{path}: {plain(stage)} has a file without a checksum, or the other way round: {_CURE}")
    if "file" in entry and entry["file"] != _file_of(stage, step, rank):
        raise ValueError(f"{path}: {plain(stage)} names the file {shown(entry['file'])}: {_CURE}")


def _file_of(stage: str, step: int | None, rank: int | None) -> str | None:
    try:
        return stage_file(stage, step, rank)
    except ValueError:  # it keeps none
        return None


def _check_account(account: Account, step: int, where: str) -> None:
    """As far as it can be told without the schedule, which `steps.Run` holds it against."""
    present = account["sums"]["steps"] if account["sums"] else 0
    if len(account["epochs"]) + present > step:
        raise ValueError(
            f"{where}: extra.epochs, extra.sums: got {len(account['epochs'])} epochs and {present} steps of the next, "
            f"of {step} steps in all: {_CURE}"
        )
