"""What a run writes of its steps while it works: a table, TensorBoard's event files, or Weights & Biases.

All of it is in `OUT/logs`. Steps are counted through the whole run: the warm-up's, then those of the visits in their
order; the result's figures stand behind the last. A resumed run repeats the steps since its checkpoint, with the same
values: they stand in the table once.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.files.atomic import atomic_path, write_with
from kunbr_fast.files.shown import plain, shown

logger = logging.getLogger(__name__)
FOLDER = "logs"
TABLE = "log.csv"
WANDB_ID = "wandb-run-id"
_MEASURED = [f"{name}_{metric}" for metric in ("accuracy", "probability") for name in ("forget", "retain", "rtt")]
VALUES = ("loss", "forget_loss", "retain_loss", *_MEASURED, "recovery")  # of the table; other logs take any
COLUMNS = ("step", "stage", "time", *VALUES)
Values = Mapping[str, float | None]


class _Log:
    """What a log may do; by itself it writes nothing."""

    def open(self) -> None:
        """Before anything is computed: ValueError where it cannot be had."""

    def begin(self, step: int) -> None:
        """Before the first `add`: `step` is the first that this process will add, those from there on are void."""

    def add(self, step: int, stage: str, values: Values) -> None:
        """Of a step."""

    def close(self) -> None:
        """At the end, of the run or by an exception, also where nothing was begun."""


class RunLog:
    """The logs of a run, by the names in `LOGS`; none: nothing is written.

    add(step, stage, values): numbers by name, those that are None are left out. A log that cannot be written any more
    is no reason to lose the run: one warning, and the others go on.
    """

    def __init__(self, kinds: Sequence[str] = (), folder: Path | None = None, config: Mapping[str, Any] | None = None):
        if kinds and folder is None:
            raise ValueError(f"log_to={shown(tuple(kinds))}: logs lie in output_dir: give one")
        self._logs = {kind: LOGS[kind](folder, config or {}) for kind in kinds}
        self._begun = False

    def __bool__(self) -> bool:
        return bool(self._logs)

    def open(self) -> None:
        self._each(lambda log: log.open())

    def add(self, step: int, stage: str, values: Values) -> None:
        begun, self._begun = self._begun, True
        if not begun:
            self._each(lambda log: log.begin(step))
        kept = {name: float(value) for name, value in values.items() if value is not None}
        self._each(lambda log: log.add(step, stage, kept))

    def close(self) -> None:
        self._each(lambda log: log.close())

    def _each(self, do: Callable[[_Log], None]) -> None:
        for kind, log in list(self._logs.items()):
            try:
                do(log)
            except OSError as error:
                del self._logs[kind]
                what = f"{plain(error.filename)}: " * bool(error.filename) + (error.strerror or str(error))
                logger.warning("log_to=%s: %s: it ends here, the run goes on", kind, what)


@contextlib.contextmanager
def opened(
    kinds: Sequence[str], output_dir: str | Path | None, resume: bool, config: Mapping[str, Any]
) -> Iterator[RunLog]:
    """A run's log, closed at the end. ValueError where a kind cannot be had, or what has the table's name is not ours.

    resume: without it what an earlier run has left there is void.
    """
    folder = None if output_dir is None else Path(output_dir) / FOLDER
    log = RunLog(kinds, folder, config)
    if folder is not None and log and not resume:
        (folder / WANDB_ID).unlink(missing_ok=True)
    elif folder is not None and not log and resume and folder.is_dir():
        logger.warning("log_to=[]: %s ends where the run was interrupted: --log-to goes on with it", plain(folder))
    try:
        yield log
    finally:
        log.close()


# ---------------------------------------------------------------- a table


class _Table(_Log):
    """`log.csv`: a line a step, COLUMNS, empty where there is no value."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.path = folder / TABLE
        self._file: Any = None
        if os.path.lexists(self.path) and not (self.path.is_file() and self._head() == ",".join(COLUMNS)):
            raise ValueError(f"{plain(self.path)} is not a log of kunbr-fast: it is left alone; move it elsewhere")

    def _head(self) -> str:
        with open(self.path, "rb") as file:
            return file.readline(2**12).decode(errors="replace").strip()

    def begin(self, step: int) -> None:
        rows = []
        if self.path.exists():
            with open(self.path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]  # the last may have been cut
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row for row in rows[1:] if row[0].isdecimal() and int(row[0]) < step)
        self._file = open(self.path, "a", encoding="utf-8", newline="", buffering=1)

    def add(self, step: int, stage: str, values: Values) -> None:
        cells = [values.get(name) for name in VALUES]
        row = [step, stage, f"{time.time():.3f}", *("" if value is None else repr(value) for value in cells)]
        self._file.write(",".join(map(str, row)) + "\n")  # one write: a kill leaves whole lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# ---------------------------------------------------------------- TensorBoard


class _TensorBoard(_Log):
    """Event files, for `tensorboard --logdir OUT/logs`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        _needed("tensorboard", "tensorboard")
        self.folder = folder
        self._writer: Any = None

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # events of earlier files from this step on are hidden
        self._writer = SummaryWriter(str(self.folder), purge_step=step)

    def add(self, step: int, stage: str, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


# ---------------------------------------------------------------- Weights & Biases


class _WandB(_Log):
    """A run of wandb, named as the output directory; WANDB_PROJECT and its other variables count. A resumed run is the
    same one."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.wandb, self.folder, self.config = _needed("wandb", "wandb"), folder, dict(config)
        self._run: Any = None

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / WANDB_ID
        if not place.is_file():
            write_with(place, lambda path: path.write_text(secrets.token_hex(8), encoding="ascii"))
        how = {"id": place.read_text(encoding="ascii"), "resume": "allow", "dir": str(self.folder)}
        how |= {"project": os.environ.get("WANDB_PROJECT") or "kunbr-fast", "name": self.folder.parent.resolve().name}
        try:
            self._run = self.wandb.init(config=self.config, **how)
        except self.wandb.errors.Error as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"log_to=wandb: {said}: or set WANDB_MODE=offline") from error

    def add(self, step: int, stage: str, values: Values) -> None:
        with self._sending():
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            with self._sending():
                self._run.finish()

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """OSError, as of any log, for what wandb says where it sends no more."""
        try:
            yield
        except self.wandb.errors.Error as error:
            raise OSError(" ".join(str(error).split())) from error


def _needed(module: str, kind: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"log_to={kind}: it is not installed ({error}): pip install {module}") from error


LOGS: dict[str, Callable[[Path, Mapping[str, Any]], _Log]] = {
    "csv": _Table,
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}


def chosen_logs(value: Any, name: str) -> tuple[str, ...]:
    """The logs that a setting called `name` asks for. ValueError for others."""
    if value in ("none", ["none"], ("none",)):
        return ()
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(one, str) and one in LOGS for one in found) or len(set(found)) < len(found):
        raise ValueError(f"{name}={shown(value)}: expected different ones of {', '.join(LOGS)}, or none of them ([])")
    return found
