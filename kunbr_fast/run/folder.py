"""The checkpoint folder of a run, `kunbr-checkpoints` in its output directory.

It is ours by the marker file in it, which appears together with it, and says how far the run is: `running`, `saving`
(the result is being written) or `finished`. What is removed is what is ours by name in a folder that is ours by its
marker; anything else in it stays and is named. At the end the marker says `finished` first, then the files go,
state.json and the marker last; so a kill between any two of these leaves a run that is known to be finished.

Whoever changes it holds the output directory (`files.lock`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from kunbr_fast.files.atomic import sync
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.files.scratch import remove_leftovers, scratch
from kunbr_fast.files.shown import plain

NAME = "kunbr-checkpoints"
MARKER = "kunbr-fast.json"
STATE = "state.json"
RUNNING, SAVING, FINISHED = "running", "saving", "finished"

_WITH_FILE = r"warmup|reference|reference\.blocks|blocks\.[0-9]+\.[0-9]+-[0-9]+"  # stages, see `run.visits`
_OURS = re.compile(
    rf"state\.json|state\.rank-[0-9]+\.json|({_WITH_FILE})(-step-[0-9]+(\.rank-[0-9]+)?)?\.safetensors|original\.safetensors"
    r"|rtt-weights\.safetensors"
    r"|(prefix-cache|activation-store|(weights|state)-of-layer-[0-9]+)-[a-z0-9_]{8}"  # mapped, see `memory.Place`
)
_SCRATCH = re.compile("rank-[0-9]+")  # folders, of the attack on each rank


def stage_file(stage: str, step: int | None = None, rank: int | None = None) -> str:
    """The name of a stage's file, or of its progress's, or of a rank's part of that. ValueError for a stage that has
    none."""
    if not re.fullmatch(_WITH_FILE, stage):
        raise ValueError(f"{stage!r} is no stage that keeps a file")
    part = "" if rank is None else f".rank-{rank}"
    return f"{stage}.safetensors" if step is None else f"{stage}-step-{step}{part}.safetensors"


class CheckpointFolder:
    """The folder of the run in `output_dir`, which may not be there yet. Nothing is changed before `begin`.

    phase: what the marker says; None without a folder. overwrites: whether the run may replace a model in output_dir.
    foreign: why what has the folder's name is not ours, or None.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / NAME
        self._begun = False
        self._read()

    def _read(self) -> None:
        marker = self.path / MARKER
        self.phase: str | None = None
        self.overwrites = False
        self.foreign: str | None = None
        if self.path.is_symlink():
            self.foreign = "it is a symbolic link: checkpoints are kept in a real folder"
        elif not self.path.exists():
            return
        elif not self.path.is_dir():
            self.foreign = "it is a file"
        elif marker.is_symlink() or not marker.is_file():
            if any(self.path.iterdir()):  # an empty one is what the end of a run may leave, and nobody's loss
                self.foreign = f"it was not made by kunbr-fast: there is no {MARKER} in it"
        else:
            said = read_sealed(marker, f"delete {self.path} and start again, or give another output directory")
            self.phase, self.overwrites = said.get("phase"), said.get("overwrite")
            if self.phase not in (RUNNING, SAVING, FINISHED) or not isinstance(self.overwrites, bool):
                self.foreign = f"its {MARKER} is none of ours"

    def check(self) -> None:
        """ValueError where something else has the folder's name."""
        if self.foreign:
            raise ValueError(f"{self.path}: {self.foreign}. Move it away, or give another output directory")

    def check_resumable(self) -> None:
        """ValueError where there is no run."""
        if self.phase is None:
            old = former_folder(self.output_dir)
            why = f" ({old} is of an earlier version, which this one does not read)" if old else ""
            raise ValueError(f"{self.output_dir} holds no run to resume{why}: leave resume out (resume=True)")

    def check_free(self) -> None:
        """ValueError where there is a run that has not come to its end."""
        if (self.path / STATE).exists():
            raise ValueError(
                f"{self.path} holds an unfinished run: continue it with resume (resume=True), or give another output "
                "directory, or delete that folder"
            )

    # ------------------------------------------------ a run's way through its phases

    def begin(self, resume: bool, overwrite: bool = False, forget: bool = False) -> None:
        """Makes the folder, or takes up the one that is there.

        forget: an unfinished run goes. ValueError with resume=True where there is no run, and else where there is one.
        """
        self.check()
        if resume:
            self.check_resumable()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.phase is None:
            self._make(overwrite)
            self._read()
        self._begun = True
        if self.phase == FINISHED:
            self.end()
            if resume:
                raise ValueError(
                    f"{self.output_dir}: its run is finished, and what was left of the checkpoints is removed now. Its "
                    "result is where it was saved; to run again leave resume out (resume=True)"
                )
            return self.begin(resume, overwrite)
        if forget:
            self.clear()
        if not resume:
            self.check_free()
        if overwrite and not self.overwrites:
            self.overwrites = True
            self.mark(self.phase)
        remove_leftovers(self.path)
        remove_leftovers(self.output_dir)

    def _make(self, overwrite: bool) -> None:
        """In one step with its marker."""
        with scratch(f".{NAME}.", self.output_dir, ".tmp") as folder:
            new = folder / NAME
            new.mkdir()
            write_sealed(new / MARKER, _words(RUNNING, overwrite))
            try:
                os.rename(new, self.path)  # over an empty one
            except OSError as error:
                raise ValueError(f"{self.path}: another process has just made it: give another directory") from error
        sync(self.output_dir)

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._begun and not (self.path / STATE).exists():  # refused before anything was begun
            self._remove()

    def mark(self, phase: str) -> None:
        self.phase = phase
        write_sealed(self.path / MARKER, _words(phase, self.overwrites))

    def end(self, say: Callable[[str], None] = lambda text: None) -> None:
        """The run is finished: removes what is ours, and the folder if nothing else is in it."""
        self.mark(FINISHED)
        if left := self._remove():
            names = ", ".join(plain(name, 60) for name in left[:3]) + (f" and {len(left) - 3} more" if left[3:] else "")
            say(f"{plain(self.path)} stays, since it holds what is not of this run: {names}")

    def _remove(self) -> list[str]:
        """Returns what else is in the folder, which then stays."""
        sweep(self.path, {STATE})
        for name in (STATE, MARKER):
            (self.path / name).unlink(missing_ok=True)
        self.phase, self._begun = None, False
        left = sorted(os.listdir(self.path))
        if not left:
            self.path.rmdir()
            sync(self.output_dir)
        return left

    def end_again(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Removes what a process that was killed in `end` has left."""
        remove_leftovers(self.output_dir)
        if self.phase == FINISHED:
            self.end(say)
        elif not self.foreign:
            with contextlib.suppress(OSError):  # it is not there, or the next run's
                self.path.rmdir()

    def clear(self) -> None:
        """Forgets the run that is in it."""
        (self.path / STATE).unlink(missing_ok=True)  # first: it names the others
        sweep(self.path)


def sweep(folder: Path, keep: Collection[str] = ()) -> None:
    """Removes what is ours in a checkpoint folder, but the marker and what is named. Links are not ours."""
    remove_leftovers(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and _SCRATCH.fullmatch(entry.name):
            sweep(path)
            with contextlib.suppress(OSError):  # it holds something else
                path.rmdir()
        elif entry.is_file(follow_symlinks=False) and _OURS.fullmatch(entry.name) and entry.name not in keep:
            path.unlink()


def former_folder(output_dir: str | Path) -> Path | None:
    """The checkpoints of an earlier version in `output_dir`, which nothing reads or removes any more."""
    for name in ("work", "kunbr"):
        folder = Path(output_dir) / name
        with contextlib.suppress(OSError):
            if re.match(rb'\{\s*"format": 1,\s*"identity": "', (folder / STATE).read_bytes()[:100]):
                return folder
    return None


def _words(phase: str, overwrite: bool) -> dict[str, Any]:
    what = "checkpoints of kunbr-fast: removed when the run in the folder above is finished"
    return {"what": what, "format": 1, "phase": phase, "overwrite": overwrite}
