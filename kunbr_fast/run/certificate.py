"""OUT/unlearning.json: what a run has done, in a few kilobytes that can be given away, and checked (`verify`).

It names files by their SHA-256 and sets of records by a commitment (`data.commitment`); it holds no text of a record
and no name of a file of records. All that follows from report.json is written by `of_report`, all that follows from
evaluation.json by `of_evaluation`, so that both can be made again and compared. The same run gives the same certificate
but for the time, the seconds, the salts, and what depends on them.

docs/unlearning.schema.json is `schema()`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kunbr_fast.data.commitment import Commitment, Digest, commit
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.report import method_of
from kunbr_fast.files.checksums import checksum, read_sealed, write_sealed
from kunbr_fast.files.documents import checked, read_json
from kunbr_fast.files.model_digests import digests, files_of_model
from kunbr_fast.files.shown import plain
from kunbr_fast.run.config import KUnBRConfig

NAME, FORMAT = "unlearning.json", 1
SCHEMA = "https://raw.githubusercontent.com/kunbr-fast/kunbr-fast/main/docs/unlearning.schema.json"
DRAFT = "https://json-schema.org/draft/2020-12/schema"
REPORT, SETTINGS, EVALUATION = "report.json", "run.yaml", "evaluation.json"
CURE = "it was edited, or is damaged: nothing in it counts"

Files = dict[str, Digest]  # by their names in the folder
Number = Annotated[int, msgspec.Meta(ge=1)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a certificate: what is written is what is read, and no more."""


class Figure(_Part):
    """number: of questions, records or values that it is over."""

    measure: str
    set: str
    model: str
    value: float
    standard_error: float | None
    number: Number | None


class Attack(_Part):
    """A kind of attack. metric: of before and after, "accuracy" or "probability". number: of the folds' questions, or
    records. rates: learning rates that were tried. after: the strongest, at the learning rate lr after epoch; null
    where each training diverged. diverged: rates with no curve."""

    attack: str
    says: str
    metric: Literal["accuracy", "probability"]
    number: Number | None
    rates: list[float]
    before: float
    after: float | None
    standard_error: float | None
    lr: float | None
    epoch: int | None
    diverged: list[float]


class Evaluation(_Part):
    """What evaluation.json has. sets: those that were evaluated, where they were at hand; a set with the salt and the
    commitment of the run's is the run's."""

    suite: str
    sets: dict[str, Commitment]
    figures: list[Figure]
    attacks: list[Attack]


class Certificate(_Part):
    """made: UTC. blocks: [first layer, layer behind the last] of each. settings: those that are not the usual ones.
    original, result, unlearned (where it was given): the models' files. sets: what was forgotten and kept, and
    questions where they were in files of their own. files: what lies beside the result."""

    schema: Literal["https://raw.githubusercontent.com/kunbr-fast/kunbr-fast/main/docs/unlearning.schema.json"] = (
        msgspec.field(name="$schema")
    )
    format: Literal[1]
    kunbr_fast: str
    made: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    method: str
    blocks: list[tuple[int, int]]
    settings: dict[str, Any]
    original: Files
    unlearned: Files | None
    result: Files
    sets: dict[str, Commitment]
    files: Files
    figures: list[Figure]
    attacks: list[Attack]
    evaluation: Evaluation | None
    cautions: list[str]
    seconds: dict[str, float]


# ---------------------------------------------------------------- what follows from reports


class Measured(msgspec.Struct):
    """Of one model and set: accuracy, or probability of the answers."""

    plain: float | None = None
    calibrated: float | None = None
    smooth: float | None = None
    smooth_error: float | None = None
    num_questions: Number | None = None
    mean: float | None = None
    standard_error: float | None = None
    num_records: Number | None = None

    def figures(self, **of: str) -> list[Figure]:
        """of: set and model. The standard error of a share p of n questions is sqrt(p (1 - p) / n), as for attacks."""
        number, found = self.num_questions, []
        for measure, share in (("accuracy", self.plain), ("calibrated accuracy", self.calibrated)):
            if share is not None:
                error = (share * (1 - share) / number) ** 0.5 if number is not None and number > 1 else None
                found.append(Figure(measure, value=share, standard_error=error, number=number, **of))
        if self.smooth is not None:
            how = dict(value=self.smooth, standard_error=self.smooth_error, number=number)
            found.append(Figure("smooth accuracy", **how, **of))
        if self.mean is not None:
            how = dict(value=self.mean, standard_error=self.standard_error, number=self.num_records)
            found.append(Figure("probability of the answer", **how, **of))
        return found


_Models = dict[str, dict[str, Measured]]  # by model and set


class _Report(msgspec.Struct):
    """What is read of report.json."""

    kunbr_fast: str
    config: dict[str, Any]
    blocks: list[tuple[int, int]]
    accuracy: _Models
    rtt: dict[str, Any] | None
    seconds: dict[str, float]
    probability: _Models = {}
    cautions: list[str] = []


def of_report(report: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that follow from report.json. ValueError, which begins with `where`, for one that is no report."""
    found, usual = checked(dict(report), _Report, where), KUnBRConfig().to_dict()
    config = KUnBRConfig.from_dict(found.config, f"{where}: config", of_a_run=True)
    measured = [
        figure
        for models in (found.accuracy, found.probability)
        for model, sets in models.items()
        for name, each in sets.items()
        for figure in each.figures(set=name, model=model)
    ]
    return {
        "kunbr_fast": found.kunbr_fast,
        "method": method_of(config.to_dict(), found.blocks),
        "blocks": found.blocks,
        "settings": {name: value for name, value in found.config.items() if value != usual.get(name, ...)},
        "figures": measured,
        "attacks": _attacks(found.rtt, f"{where}: rtt"),
        "cautions": found.cautions,
        "seconds": found.seconds,
    }


def _attacks(curves: Mapping[str, Any] | None, where: str) -> list[Attack]:
    """Of curves as `RTTResult.to_dict` has them."""
    if curves is None:
        return []
    result = RTTResult.from_dict(dict(curves), where)
    failed: dict[str, list[float]] = {}
    for row in result.diverged:
        rates = failed.setdefault(row["attack"], [])
        rates += [row["lr"]] * (row["lr"] not in rates)
    found = []
    for name in dict.fromkeys([*result.attacks, *failed]):
        best = result.summary(name) if name in result.attacks else {}
        says = ATTACKS[name].says if name in ATTACKS else ""
        of = dict(metric=result.metric, number=result.num_questions, before=result.before, after=best.get("accuracy"))
        of |= {key: best.get(key) for key in ("standard_error", "lr", "epoch")}
        rates = result.rates(name) if best else []
        found.append(Attack(name, says, rates=rates, diverged=failed.get(name, []), **of))
    return found


class _Named(msgspec.Struct):
    path: str | None = None


class _Figure(msgspec.Struct):
    measure: str
    set: str
    model: str
    value: float
    standard_error: float | None
    number: Number | None


class _Evaluation(msgspec.Struct):
    """What is read of evaluation.json."""

    suite: str
    models: dict[str, _Named]
    figures: list[_Figure]
    lm_eval: dict[str, dict[str, Any]] | None = None
    rtt: dict[str, Any] | None = None


class _Harness(msgspec.Struct):
    value: float
    standard_error: float | None = None


def of_evaluation(evaluation: Mapping[str, Any], sets: Mapping[str, Commitment], where: str) -> Evaluation:
    """What follows from evaluation.json. ValueError, which begins with `where`, for one that is no evaluation."""
    found = checked(dict(evaluation), _Evaluation, where)
    figures = [Figure(**msgspec.structs.asdict(figure)) for figure in found.figures]
    for task, each in (found.lm_eval or {}).items():
        for model in ("original", "result", "retrained"):
            if model in each:
                said = checked(each[model], _Harness, f"{where}: lm_eval.{plain(task, 60)}.{model}")
                measure = f"{task} ({each.get('metric')})"
                figures.append(Figure(measure, "lm-evaluation-harness", model, said.value, said.standard_error, None))
    return Evaluation(found.suite, dict(sets), figures, _attacks(found.rtt, f"{where}: rtt"))


# ---------------------------------------------------------------- files


def write_certificate(
    out: str | os.PathLike,
    original: str | os.PathLike,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    unlearned: str | os.PathLike | None = None,
    progress: bool = False,
) -> None:
    """Writes OUT/unlearning.json of a run whose model and report.json are in `out`.

    original, unlearned: the folders of the models that the run was given. sets: records by "forget", "retain", and
    where they were in files of their own "forget_questions" and "retain_questions". progress: a bar, where it takes
    more than some seconds.

    ValueError, one line that names the file, where something is missing or is no file of a run.
    """
    out = Path(out)
    models = {"original": original, "unlearned": unlearned, "result": out}
    files = {
        what: None if folder is None else _digests(files_of_model(folder), what, progress)
        for what, folder in models.items()
    }
    committed = {what: commit(records) for what, records in sets.items() if records}
    where = plain(out / REPORT)
    fields = of_report(read_json(out / REPORT, dict), where) | files | {"sets": committed}
    fields |= {"schema": SCHEMA, "format": FORMAT, "made": _now(), "evaluation": None}
    _write(out, Certificate(**fields, files=_beside(out, REPORT, SETTINGS)))


def refresh(
    out: str | os.PathLike, sets: Mapping[str, Sequence[Mapping[str, Any]]] | None = None, progress: bool = False
) -> bool:
    """Adds OUT/evaluation.json to the certificate in `out`, in place of an earlier one. False where there is no
    certificate.

    sets: the records that were evaluated, by "forget", "retain" and "holdout": of the run's own sets the commitment is
    then that of the run, which tells everybody that these were evaluated.

    ValueError where the certificate is damaged, a file of the model in `out` is not the one that it names, and where
    evaluation.json is of another model: nothing is written then.
    """
    out = Path(out)
    if not os.path.lexists(out / NAME):
        return False
    before, path = read_certificate(out / NAME), out / EVALUATION
    now = {name: out / name for name in before.result if (out / name).is_file()}
    now = _digests(now, "result", progress) | _beside(out, REPORT, SETTINGS)
    for name, digest in {**before.result, **before.files}.items():
        if now.get(name) != digest and name != EVALUATION:
            what = "changed" if name in now else "gone"
            raise ValueError(f"{plain(out / name)}: {what} since {NAME} was made, which is of the run's own result")
    evaluation = read_sealed(path, "evaluate the model again")
    of = checked(evaluation, _Evaluation, plain(path)).models
    evaluated = of["result"].path if "result" in of else None
    if evaluated is None or not os.path.exists(evaluated) or not os.path.samefile(evaluated, out):
        raise ValueError(f"{plain(path)}: it is not of the model beside it, whose certificate {NAME} is")
    salts = {what: commitment.salt for what, commitment in before.sets.items()}
    committed = {what: commit(records, salts.get(what)) for what, records in (sets or {}).items() if records}
    found = of_evaluation(evaluation, committed, plain(path))
    more = {"made": _now(), "files": _beside(out, REPORT, SETTINGS, EVALUATION), "evaluation": found}
    _write(out, msgspec.structs.replace(before, **more))
    return True


def _write(out: Path, certificate: Certificate) -> None:
    write_sealed(out / NAME, msgspec.to_builtins(certificate))


def read_certificate(path: str | os.PathLike) -> Certificate:
    """ValueError for a file that is none, or whose seal is broken."""
    values = read_sealed(path, CURE)
    if values.get("format") != FORMAT:
        raise ValueError(f"{plain(path)}: no certificate of format {FORMAT}, which this version reads")
    return checked(values, Certificate, plain(path))


def is_certificate(path: Path) -> bool:
    """Whether a run has written the file, and nobody has edited it since."""
    try:
        read_certificate(path)
    except ValueError:
        return False
    return True


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of unlearning.json."""
    (found,), parts = msgspec.json.schema_components([Certificate], ref_template="#/$defs/{name}")
    for part in parts.values():
        part["description"] = " ".join(part["description"].split())
    top = parts.pop("Certificate")
    assert found == {"$ref": "#/$defs/Certificate"}
    top["properties"]["sha256"] = {
        "type": "string",
        "pattern": "^[0-9a-f]{64}$",
        "description": "SHA-256 of the file's text before the comma that precedes this key.",
    }
    top["required"] = [*top["required"], "sha256"]
    return {"$schema": DRAFT, "$id": SCHEMA, **top, "$defs": parts}


def _beside(out: Path, *names: str) -> dict[str, str]:
    """Of documents beside the result, as far as they are there."""
    return {name: checksum(out / name) for name in names if os.path.lexists(out / name)}


def _digests(files: Mapping[str, Path], what: str, progress: bool) -> dict[str, str]:
    return digests(files, f"SHA-256 of the {what} model" if progress else None)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
