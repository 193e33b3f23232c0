"""What can be made again of a certificate (`run.certificate`), and whether it is the same. Nothing is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kunbr_fast.data.commitment import commit
from kunbr_fast.files.checksums import checksum, read_sealed
from kunbr_fast.files.documents import checked, read_json, regular
from kunbr_fast.files.model_digests import digests, files_of_model
from kunbr_fast.files.model_folder import is_mixed
from kunbr_fast.files.shown import plain
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.certificate import (
    CURE,
    EVALUATION,
    NAME,
    REPORT,
    Certificate,
    Figure,
    Files,
    Measured,
    of_evaluation,
    of_report,
    read_certificate,
)
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunInputs
from kunbr_fast.run.proof import Proof
from kunbr_fast.version import __version__

OK, DIFFERS, NOT_CHECKED = "ok", "differs", "not checked"
SETS = ("forget", "retain", "forget_questions", "retain_questions")

# By how much a figure may differ that is measured again. The machine of the run gives the same bits. Another one rounds
# otherwise, which can turn a question whose two best choices are nearly equal. An upper bound of what rounding does is
# another dtype of the whole model: SmolLM2-135M in bfloat16 took another choice than in float32 for 4 of 158 questions
# of Years and 3 of 157 of MMLU (2.5 %, 1.9 %; by letters none), and the probability of their answers moved by 0.6 % and
# 0.4 %. In half precision about twice that is allowed, in full precision much less.
HALF = (torch.bfloat16, torch.float16)
SHARE, SHARE_OF_HALF = 0.01, 0.05  # of the questions, and one of them at least
PROBABILITY, PROBABILITY_OF_HALF = 0.001, 0.02  # of the figure itself


@dataclasses.dataclass(frozen=True)
class Check:
    """check: what was looked at. result: "ok", "differs" or "not checked". said: what was found, or why it was not."""

    check: str
    result: str
    said: str


def opened(out: str | os.PathLike) -> tuple[Certificate | None, Check]:
    """The certificate in `out`, None where its seal is broken: nothing in it counts. ValueError where there is none, or
    none that this version reads."""
    path = Path(out) / NAME
    if not os.path.lexists(path):
        raise ValueError(
            f"{plain(path)}: no such file: `kunbr-fast unlearn` and `baseline` write one at the end of a run"
        )
    regular(path)
    try:
        read_sealed(path, CURE)
    except ValueError as error:
        return None, Check("certificate", DIFFERS, str(error))
    found = read_certificate(path)
    said = f"it has the SHA-256 that it names; made {found.made} by kunbr-fast {plain(found.kunbr_fast)}"
    return found, Check("certificate", OK, said)


def verify(
    out: str | os.PathLike,
    certificate: Certificate,
    models: Mapping[str, str | os.PathLike | None],
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    progress: bool = False,
) -> list[Check]:
    """All but the measures. models: the folders of "original" and "unlearned", as far as they are given; sets: records,
    likewise, by `SETS`. progress: bars, where files take more than some seconds."""
    out, found = Path(out), []
    found += _documents(out, certificate)
    found.append(_figures(out, certificate, found))
    found += _model("result", out, certificate.result, progress)
    for what in ("original", "unlearned"):
        named, folder = getattr(certificate, what), models.get(what)
        if named is not None and folder is not None:
            found += _model(what, Path(folder), named, progress)
        elif named is not None:
            found.append(Check(f"{what} model", NOT_CHECKED, f"give --{what} DIR"))
    return [*found, *_sets(certificate, sets)]


def _documents(out: Path, certificate: Certificate) -> Iterator[Check]:
    for name, digest in certificate.files.items():
        path = out / name
        there = _inside(name) and path.is_file() and not path.is_symlink()
        now = checksum(path) if there else None
        yield Check(name, *_compared(digest, now))


def _compared(expected: str, now: str | None) -> tuple[str, str]:
    if now is None:
        return DIFFERS, "missing"
    if now != expected:
        return DIFFERS, f"SHA-256 {now[:12]}..., certified {expected[:12]}..."
    return OK, f"SHA-256 {now[:12]}..."


def _figures(out: Path, certificate: Certificate, documents: Sequence[Check]) -> Check:
    """Whether what the certificate says is what the documents say that it names."""
    what = "figures, settings"
    if REPORT not in certificate.files:
        return Check(what, DIFFERS, f"the certificate does not name the {REPORT} that they were taken from")
    if changed := next((check for check in documents if check.result != OK), None):
        return Check(what, NOT_CHECKED, f"{changed.check} is not the one that they were taken from")
    if certificate.kunbr_fast != __version__:
        made = f"made by kunbr-fast {plain(certificate.kunbr_fast)}, this is {__version__}"
        return Check(what, NOT_CHECKED, f"{made}, which may put it otherwise")
    expected = of_report(read_json(out / REPORT, dict), plain(out / REPORT))
    expected["evaluation"] = None
    if EVALUATION in certificate.files:
        sets = {} if certificate.evaluation is None else certificate.evaluation.sets
        values = read_sealed(out / EVALUATION, "evaluate the model again")
        expected["evaluation"] = of_evaluation(values, sets, plain(out / EVALUATION))
    others = [name for name, value in expected.items() if getattr(certificate, name) != value]
    if others:
        return Check(what, DIFFERS, f"{', '.join(others)}: not as in {' and '.join(_sources(certificate))}")
    return Check(what, OK, f"as in {' and '.join(_sources(certificate))}")


def _sources(certificate: Certificate) -> list[str]:
    return [name for name in (REPORT, EVALUATION) if name in certificate.files]


def _model(what: str, folder: Path, certified: Files, progress: bool) -> Iterator[Check]:
    """A line for each file that differs; one where none does."""
    if not folder.is_dir():
        raise ValueError(f"{plain(folder)}: no such directory: expected the {what} model's")
    there = {name: folder / name for name in certified if _inside(name) and (folder / name).is_file()}
    now = digests(there, f"SHA-256 of the {what} model" if progress else None)
    differing = {name: said for name in certified if (said := _compared(certified[name], now.get(name)))[0] != OK}
    for name in _read_too(folder) - certified.keys():
        differing[name] = DIFFERS, "not in the certificate, and read together with the model"
    for name, said in sorted(differing.items()):
        yield Check(f"{what} model: {plain(name, 100)}", *said)
    if not differing:
        yield Check(f"{what} model", OK, f"SHA-256 of {len(certified)} files")


def _inside(name: str) -> bool:
    """Of a certificate of any origin: no file outside the folder is read."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _read_too(folder: Path) -> set[str]:
    """Files of the folder by which a model is read, whether certified or not."""
    mixed = {name for name in os.listdir(folder) if is_mixed(name) and "adapter" in name}
    try:
        return {*files_of_model(folder), *mixed}
    except ValueError:  # weights are missing, which is said
        return mixed


def _sets(certificate: Certificate, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Check]:
    for what, certified in certificate.sets.items():
        name = f"{what.replace('_', ' ')} set" if what in ("forget", "retain") else what.replace("_", " ")
        if what not in sets:
            yield Check(name, NOT_CHECKED, f"give --{what.replace('_', '-')} FILES ({certified.records} records)")
            continue
        now = commit(sets[what], certified.salt)
        if now == certified:
            yield Check(name, OK, f"{now.records} records, and the commitment is theirs")
        else:
            count = f"{now.records} records, certified {certified.records}"
            same = "as many records, with another text" if now.records == certified.records else count
            yield Check(name, DIFFERS, same)
    for what in sets.keys() - certificate.sets.keys():
        option = what.replace("_", "-")
        raise ValueError(f"--{option}: the certificate has no such set: leave it out")


# ---------------------------------------------------------------- measures


def measured(
    certificate: Certificate,
    decoder: Decoder,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    questions: Mapping[str, Sequence[Mapping[str, Any]]],
    config: KUnBRConfig,
    progress: str | None = None,
) -> list[Check]:
    """The result's figures, of the sets that are given: whole ones, which the certificate commits to."""
    inputs = RunInputs(decoder.model, sets.get("forget", ()), sets.get("retain", ()), tokenizer, questions=questions)
    inputs = inputs.allowing_equal_choices() if config.equal_choices == "allow" else inputs
    found = Proof(inputs, config, decoder).measure(decoder, None, Place(), progress)
    now: dict[tuple[str, str], Figure] = {}
    for models in found.values():
        for name, each in models.items():
            for figure in checked(each, Measured, f"figures of the {name} set").figures(set=name, model="result"):
                now[figure.measure, figure.set] = figure
    certified = [figure for figure in certificate.figures if figure.model == "result" and figure.set in sets]
    return [_again(figure, now.get((figure.measure, figure.set)), decoder.dtype) for figure in certified]


def _again(certified: Figure, now: Figure | None, dtype: torch.dtype) -> Check:
    what = f"{certified.measure}, {certified.set} set"
    if now is None or now.number != certified.number:
        number = "nothing" if now is None else f"{now.number} records"
        return Check(what, DIFFERS, f"of {number} now, certified of {certified.number}")
    allowed = tolerance(certified, dtype)
    both = f"{now.value:.6g} now, certified {certified.value:.6g}"
    if abs(now.value - certified.value) <= allowed:
        return Check(what, OK, both if now.value != certified.value else f"{now.value:.6g}, to the bit")
    return Check(what, DIFFERS, f"{both}: more than rounding ({allowed:.2g})")


def tolerance(figure: Figure, dtype: torch.dtype) -> float:
    """By how much it may differ when it is measured on another machine (above). 1e-12: of shares' own rounding."""
    if figure.measure == "probability of the answer":
        return (PROBABILITY_OF_HALF if dtype in HALF else PROBABILITY) * figure.value
    return max(SHARE_OF_HALF if dtype in HALF else SHARE, 1 / figure.number) + 1e-12
