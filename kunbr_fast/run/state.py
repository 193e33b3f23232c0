"""What a run keeps on disk so that it can be killed at any moment and go on with the same bits.

`state.json` is the only truth: it names the files that belong to it with their SHA-256, and is replaced in one step.
A file is written under a new name first, then state.json refers to it, then the file it replaces is deleted; so a
kill between any two of these leaves a state that is whole. state.json carries its own checksum, and the files' are
looked at each time they are read.

Of several ranks the first writes state.json. While they work apart each has a small file of the same kind for itself
(`PartState`), which counts as part of state.json; whoever opens the run next takes it over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.evaluation.curves import attack_of
from kunbr_fast.files.checksums import check_file, checksum, read_sealed, write_sealed
from kunbr_fast.files.row_files import RowFiles
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors
from kunbr_fast.parallel.group import ALONE, Group
from kunbr_fast.run.folder import STATE, stage_file, sweep
from kunbr_fast.run.identity import difference
from kunbr_fast.run.setting import counts_for
from kunbr_fast.run.state_format import FORMAT, check_state
from kunbr_fast.run.visits import RTT, WARMUP, Stage

# What may be changed on resuming in the middle of a stage, which is how a diverged run is rescued.
FREE_WHILE_TRAINING = ("warmup_lr", "warmup_epochs", "block_lr", "block_epochs")


class RunState:
    """The finished stages of a run, the progress of the present one, and their files, in one directory.

    All ranks make the same calls. One of them `writes`; the others read what it wrote, between two waits. say: told of
    progress that cannot be read.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: str,
        config: Any,
        resume: bool,
        writes: bool = True,
        wait: Callable[[], None] = ALONE.wait,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.directory, self._writes, self._wait, self._say = Path(directory), writes, wait, say
        self.path = self.directory / STATE
        if writes:
            self._open(identity, config, resume)
        self._share()
        if not writes:
            self._check(identity, config)

    def _open(self, identity: str, config: Any, resume: bool) -> None:
        self.state, parts = _fresh(identity, config.to_dict()), []
        if not resume and os.path.lexists(self.path):
            raise ValueError(f"{self.directory} holds an unfinished run: continue it with resume (resume=True)")
        if resume:
            self.state = self._read() if os.path.lexists(self.path) else self.state
            parts = self._take_parts()
            self._check(identity, config)
            self._drop_damaged()
        self.state["config"] = config.to_dict()
        self.state["kept"] = {}  # of a process that is gone
        self._write()
        _remove(parts)
        sweep(self.directory, {STATE, *self._files()})

    def _read(self, path: Path | None = None) -> dict[str, Any]:
        path = path or self.path
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: not a regular file: something has been put in its place")
        state = read_sealed(path, f"delete {self.directory} and start again")
        check_state(state, path)
        return state

    def _files(self) -> set[str]:
        """The names of all files that belong to the state."""
        entries = [*self.state["stages"].values(), *self.state["kept"].values()]
        entries += [entry for entries in self.state["progress"].values() for entry in entries]
        return {part["file"] for entry in entries for part in _parts(entry) if "file" in part}

    def _drop_damaged(self) -> None:
        """Of progress whose file is damaged, falls back to the one before it, or to the beginning of the stage."""
        for stage, entries in list(self.state["progress"].items()):
            for entry in entries[::-1]:
                if self._is_whole(entry):
                    break
                entries.remove(entry)
                goes_on = f"step {entries[-1]['step']}" if entries else "its beginning"
                names = " or ".join(plain(self.directory / part["file"]) for part in _parts(entry))
                self._say(f"{names} is damaged or missing: {stage} goes on from {goes_on}")
            if not entries:
                del self.state["progress"][stage]

    def _take_parts(self) -> list[Path]:
        """Takes over what each `PartState` wrote. Returns their files, which may go once state.json is written."""
        paths = sorted(self.directory.glob("state.rank-*.json"))
        for path in paths:
            part = self._read(path)
            if part["identity"] != self.state["identity"]:
                raise ValueError(f"{path}: belongs to another run than {self.path}: delete {self.directory}")
            self.state["stages"] |= part["stages"]
            self.state["progress"] |= part["progress"]
        unfinished = {k: v for k, v in self.state["progress"].items() if v and k not in self.state["stages"]}
        self.state["progress"] = unfinished
        return paths

    def _check(self, identity: str, config: Any) -> None:
        if self.state["identity"] != identity:
            text = difference(self.state["identity"], identity, config, self.state["config"])
            raise ValueError(f"{self.directory} belongs to another run: {text}")
        for name, stage in config.changed(self.state["config"]).items():
            if self.is_locked(name, stage):
                was = shown(self.state["config"].get(name))
                raise ValueError(
                    f"{self.directory}: {name} was {was} in the run to be resumed, and its results depend on it. "
                    "Put it back, or start again in another directory"
                )

    def is_locked(self, name: str, stage: str) -> bool:
        """Whether something that is done depends on the setting `name`, of `stage` (as `KUnBRConfig.stage_of`)."""
        results = self.results()
        if stage == RTT:
            made = [attack_of(result["rows"][0]) for result in self.results(RTT).values() if "rows" in result]
            return any(counts_for(attack, name) for attack in made)
        finished = {found.group for found in results}
        current = {Stage(found).group for found, entries in self.state["progress"].items() if entries}
        if "given" in results.get(WARMUP, {}):  # an unlearned model that another program has made
            finished.remove("warmup")
        locked = finished | ({"data"} if results or current else set())
        locked |= {"training"} if finished & {"warmup", "blocks"} else set()
        return stage in locked or (stage in current and name not in FREE_WHILE_TRAINING)

    def _write(self) -> None:
        write_sealed(self.path, self.state)

    def _share(self) -> None:
        """Every rank reloads the state that the writer wrote."""
        self._wait()
        if not self._writes:
            self.state = self._read()
        self._wait()

    # ------------------------------------------------ stages

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, or None."""
        return self.state["stages"].get(stage)

    def results(self, group: str | None = None) -> dict[Stage, dict[str, Any]]:
        """All finished stages' results, or those of a group, in the order in which they were finished."""
        found = {Stage(name): result for name, result in self.state["stages"].items()}
        return {stage: result for stage, result in found.items() if group in (None, stage.group)}

    def keep_only(self, stages: Iterable[str]) -> None:
        """Forgets all other finished stages, from the next write on."""
        kept = set(stages)
        self.state["stages"] = {name: result for name, result in self.state["stages"].items() if name in kept}

    def finish(self, stage: str, result: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Records a stage's result (the writer's), and its tensors in a file of its own; its progress is dropped."""
        if self._writes:
            if tensors is not None:
                name = stage_file(stage)
                if self.state["stages"].pop(stage, None) is not None:
                    self._write()  # the file that it names is going to be another one
                result = {**result, "file": name, "sha256": self._save(name, tensors)}
            self.state["stages"][stage] = result
            self._replace(stage, [])
        self._share()

    def forget(self, stages: Container[str]) -> None:
        """Forgets finished stages, by their names or groups; their files go."""
        if self._writes:
            before = self._files()
            self.keep_only(stage for stage in self.results() if stage not in stages and stage.group not in stages)
            self._write()
            _remove(self.directory / name for name in before - self._files())
        self._share()

    def file(self, stage: str) -> Path:
        """The checked file of a finished stage."""
        if self.result(stage) is None:
            raise ValueError(f"{self.path}: it has no result of {stage}: start again in another directory")
        return self._checked(self.result(stage))

    def weights(self, stage: str) -> WeightSnapshot:
        """The file of a finished stage, which is checked each time it is read."""
        return WeightSnapshot(self.file(stage), self.result(stage)["sha256"])

    def drop_file(self, stage: str) -> None:
        """Deletes the file of a finished stage that no later stage reads; the result stays. Every rank has read the
        file: they have waited for each other since."""
        if self._writes:
            _remove([self.directory / self.result(stage)["file"]])

    # ------------------------------------------------ progress within a stage

    def save_progress(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        extra: dict[str, Any],
        ranks: Group = ALONE,
    ) -> None:
        """Keeps a stage's progress beside the one that was confirmed last: `step` steps are done, `tensors` is the
        training's state. It is not known yet whether a forward pass from it is finite: `confirm`, or `reject`.
        ranks: each has a part of the tensors (`RowFiles`), and writes that."""
        entries, parts = self._entries(stage), ranks.size > 1
        there = ranks.gather(bool(entries) and entries[-1]["step"] == step)[0]  # the same, and its file is in use
        if there or not (self._writes or parts):
            return
        name = stage_file(stage, step, ranks.rank if parts else None)
        saved = {"file": name, "sha256": self._save(name, tensors)}
        saved = {"ranks": ranks.gather(saved)} if parts else saved
        if self._writes:
            self._replace(stage, [*_confirmed(entries), {"step": step, "extra": extra, "confirmed": False, **saved}])

    def confirm(self, stage: str) -> None:
        """The progress saved last is good: the one before it goes. Does nothing where there is none to confirm."""
        entries = self._entries(stage)
        if self._writes and entries != _confirmed(entries):
            self._replace(stage, [{**entries[-1], "confirmed": True}])

    def reject(self, stage: str) -> None:
        """The progress saved last is bad: the one confirmed before it is the stage's progress again, if any."""
        entries = self._entries(stage)
        if self._writes and entries != _confirmed(entries):
            self._replace(stage, _confirmed(entries))

    def confirmed_steps(self, stage: str) -> int | None:
        """After how many steps the stage's confirmed progress was saved, or None."""
        return next((entry["step"] for entry in _confirmed(self._entries(stage))), None)

    def _entries(self, stage: str) -> list[dict[str, Any]]:
        """A stage's progress: the confirmed one, then the one that is not yet; each may be missing."""
        return self.state["progress"].get(stage, [])

    def _replace(self, stage: str, entries: list[dict[str, Any]]) -> None:
        """Records what `entries` are in place of a stage's progress; then the files that no entry names go."""
        kept = {part["file"] for entry in entries for part in _parts(entry)}
        now = [part["file"] for entry in self._entries(stage) for part in _parts(entry)]
        old = [self.directory / name for name in now if name not in kept]
        self._record(stage, entries)
        self._write()
        _remove(old)

    def _record(self, stage: str, entries: list[dict[str, Any]]) -> None:
        self.state["progress"].pop(stage, None)
        if entries:
            self.state["progress"][stage] = entries

    def progress(self, stage: str) -> tuple[int, WeightSnapshot | RowFiles, dict[str, Any]] | None:
        """(steps done, tensors, extra) of `stage` if it was interrupted, as it was saved last, confirmed or not."""
        if not (entries := self._entries(stage)):
            return None
        entry = entries[-1]
        if "ranks" not in entry:
            return entry["step"], WeightSnapshot(self._checked(entry), entry["sha256"]), entry["extra"]
        files = [(self.directory / part["file"], part["sha256"]) for part in entry["ranks"]]
        return entry["step"], RowFiles(files, self._cure), entry["extra"]

    @contextlib.contextmanager
    def apart(self, rank: int) -> Iterator[PartState]:
        """Inside, each rank writes to a state of its own; afterwards all of it is here."""
        self._share()
        yield PartState(self, rank)
        self._wait()
        if self._writes:
            parts = self._take_parts()
            self._write()
            _remove(parts)
        self._share()

    # ------------------------------------------------ files

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> WeightSnapshot:
        """Keeps tensors in NAME.safetensors until `drop`, or until this process ends."""
        if self._writes:
            file = f"{name}.safetensors"
            self.state["kept"][name] = {"file": file, "sha256": self._save(file, tensors)}
            self._write()
        self._share()
        entry = self.state["kept"][name]
        return WeightSnapshot(self._checked(entry), entry["sha256"])

    def drop(self, name: str) -> None:
        self._wait()
        if self._writes:
            entry = self.state["kept"].pop(name)
            self._write()
            _remove([self.directory / entry["file"]])
        self._share()

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        path = self.directory / name
        save_tensors(path, tensors)
        return checksum(path)

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        try:
            for part in _parts(entry):
                self._checked(part)
        except (ValueError, OSError):
            return False
        return True

    def _checked(self, entry: Mapping[str, Any]) -> Path:
        path = self.directory / entry["file"]
        check_file(path, entry["sha256"], self._cure)
        return path

    @property
    def _cure(self) -> str:
        return f"{self.path} names it: start again in another directory"


class PartState(RunState):
    """What one rank adds to a run's state while the ranks work on different stages, in a file of its own.

    Reads `whole`, which no rank writes meanwhile. There is no file before there is something to keep.
    """

    def __init__(self, whole: RunState, rank: int):
        self.directory, self._whole, self._say = whole.directory, whole, whole._say
        self._writes, self._wait = True, ALONE.wait
        self.path = self.directory / f"state.rank-{rank}.json"
        self.state = _fresh(whole.state["identity"], whole.state["config"])

    def result(self, stage: str) -> dict[str, Any] | None:
        return super().result(stage) or self._whole.result(stage)

    def results(self, group: str | None = None) -> dict[Stage, dict[str, Any]]:
        return self._whole.results(group) | super().results(group)

    def _entries(self, stage: str) -> list[dict[str, Any]]:
        return self.state["progress"].get(stage, self._whole._entries(stage))

    def _record(self, stage: str, entries: list[dict[str, Any]]) -> None:
        self.state["progress"][stage] = entries  # also none: the whole state may have some


def _fresh(identity: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "identity": identity, "config": config, "stages": {}, "progress": {}, "kept": {}}


def _parts(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The files of a result or of progress: one, or one for each rank."""
    return entry.get("ranks") or [entry]


def _confirmed(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["confirmed"]]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
