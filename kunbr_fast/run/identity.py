"""What a run was given, so that it goes on with nothing else, and what its result is: whole, or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import xxhash

from kunbr_fast.files.atomic import file_digest
from kunbr_fast.files.checksums import read_sealed
from kunbr_fast.files.documents import checked
from kunbr_fast.files.model_folder import model_files
from kunbr_fast.files.models import ModelFolder
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.model.fingerprint import fingerprint
from kunbr_fast.model.weights import weights_of
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunInputs
from kunbr_fast.run.folder import NAME, STATE
from kunbr_fast.run.samples import Samples

# settings by which the samples are made
_OF_SAMPLES = """target max_length separator chat_date split_long objective objective_options warmup_objective
warmup_objective_options""".split()


class File(TypedDict):
    size: int
    xxh3: str


class Record(TypedDict):
    """In report.json. unlearned: the fingerprint of the given M_u; files: the model's; report: of all else in it."""

    identity: str
    unlearned: str | None
    files: dict[str, File]
    report: str


def run_identity(inputs: RunInputs, samples: Samples, model: str) -> str:
    """model: the original's fingerprint."""
    parts = [part for fold in inputs.folds for part in (fold.train_records, fold.questions)]
    asked = [*inputs.questions.values(), *parts]
    if samples.alternates:
        asked.append(samples.alternates)
    if samples.facts is not None:
        asked.append([{"text": "facts", "numbers": samples.facts}])
    weights = weights_of(inputs.model)
    dtype = str(weights[next(iter(weights))].dtype).removeprefix("torch.")
    return f"{dtype}-{fingerprint(model, samples.forget, samples.retain, *asked, tokenizer=inputs.tokenizer)}"


def difference(was: str, now: str, config: KUnBRConfig, before: Mapping[str, Any]) -> str:
    """Which of the things that two identities stand for differs, and the cure. before: the settings of the first."""
    old, new = was.split("-"), now.split("-")
    if len(old) != len(new) or len(new) != 4:
        return "its model or data are not those given now. Give the same ones, or another output directory"
    if old[0] != new[0]:
        return f"its dtype was {old[0]} and is {new[0]} now. Put it back, or give another output directory"
    if old[1:3] != new[1:3]:
        what = "model" if old[1] != new[1] else "tokenizer"
        return f"its {what} is not the one given now. Give the same {what}, or another output directory"
    for name in _OF_SAMPLES:
        if name in config.changed(dict(before)):
            both = f"{name} was {shown(before.get(name))} and is {shown(getattr(config, name))} now"
            return f"{both}. Put it back, or give another output directory"
    return (
        "its data are not those given now. Give the same forget and retain records and questions, or another output "
        "directory"
    )


# ---------------------------------------------------------------- of a result


def record(out: str | Path, report: Mapping[str, Any]) -> Record:
    """Of the run in `out`, whose model is written and whose checkpoints are still there. report: as JSON has it."""
    state = read_sealed(Path(out) / NAME / STATE, "start again")
    given = state["stages"].get("warmup", {}).get("given")
    files = {name: _file(path) for name, path in model_files(out).items()}
    return {"identity": state["identity"], "unlearned": given, "files": files, "report": report_digest(report)}


def check_record(out: str | Path, report: Mapping[str, Any], config: KUnBRConfig, now: str, given: str | None) -> None:
    """ValueError where the finished run in `out` was given something else, or its model is not as it was written."""
    where, cure = f"{plain(out)}/report.json", "move it away, or give another output directory, and run again"
    if "result" not in report:
        raise ValueError(f"{where}: an earlier version wrote it, or KUnBRTrainer: not what its run was given: {cure}")
    found = checked(report["result"], Record, f"{where}: result")
    if found["report"] != report_digest(report):
        raise ValueError(f"{where}: damaged or edited, and {plain(out)} holds a finished run: {cure}")
    if found["identity"] != now:
        text = difference(found["identity"], now, config, report["config"])
        raise ValueError(f"{plain(out)} holds a finished run, and belongs to another run: {text}")
    if given not in (None, found["unlearned"]):
        raise ValueError(
            f"{plain(out)} holds a finished run with another unlearned model than the one given now. Give the same one "
            "(unlearned=) or none, or another output directory"
        )
    there = model_files(out)
    for name, entry in found["files"].items():
        if name not in there:
            raise ValueError(f"{plain(Path(out) / name)}: missing, and {plain(out)} holds a finished run: {cure}")
        if (size := there[name].stat().st_size) != entry["size"] or _file(there[name]) != entry:
            what = (
                f"it has {size} bytes, {entry['size']} were written" if size != entry["size"] else "its bytes changed"
            )
            raise ValueError(f"{plain(there[name])}: damaged ({what}), and {plain(out)} holds a finished run: {cure}")
    try:
        ModelFolder(out, log=False)
    except ValueError as error:
        raise ValueError(f"{error} [{plain(out)} holds a finished run: {cure}]") from error


def check_whole(report: Mapping[str, Any], where: str, cure: str) -> None:
    """ValueError, which ends with `cure`, for a report that was edited since its run wrote it, as far as it says."""
    if "result" in report and report["result"].get("report") != report_digest(report):
        raise ValueError(f"{where}: damaged or edited (it does not have the checksum that it names): {cure}")


def report_digest(report: Mapping[str, Any]) -> str:
    """Of all in a report but its record, "result"."""
    rest = {name: value for name, value in report.items() if name != "result"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _file(path: Path) -> File:
    return {"size": path.stat().st_size, "xxh3": file_digest(path, xxhash.xxh3_128())}
