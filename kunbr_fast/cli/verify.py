"""`kunbr-fast verify`: is what a run's certificate says still so? Nothing is written."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kunbr_fast.cli.argument_types import path_name
from kunbr_fast.cli.arguments import add_device, add_files, add_output, add_reading, add_stream
from kunbr_fast.cli.inputs import open_model, read_questions, reader, sayer
from kunbr_fast.cli.terminal import show
from kunbr_fast.data import is_question
from kunbr_fast.files.documents import read_json
from kunbr_fast.files.shown import plain
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.run.certificate import REPORT, Certificate
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.verify import DIFFERS, NOT_CHECKED, SETS, Check, measured, opened, verify

Sets = Mapping[str, list[dict]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s OUT [options]"  # behind an option of several files it would be one of them
    parser.add_argument("folder", type=path_name, metavar="OUT", help="folder of a run, with its unlearning.json")
    text = "the model that the run was given, to compare its files"
    parser.add_argument("--original", type=path_name, metavar="DIR", help=text)
    text = "the unlearned model that the run was given, if it was"
    parser.add_argument("--unlearned", type=path_name, metavar="DIR", help=text)
    add_files(parser, "--forget", "F.jsonl", "what was to be forgotten, all of it, in any order")
    add_files(parser, "--retain", "R.jsonl", "what was to be kept, likewise")
    text = "questions that were in files of their own, on the {} set"
    add_files(parser, "--forget-questions", "Q.jsonl", text.format("forget"))
    add_files(parser, "--retain-questions", "Q.jsonl", text.format("retain"))
    add_reading(parser)
    text = "measure the result again on the sets that are given, and compare within rounding; loads the model"
    parser.add_argument("--measures", action="store_true", help=text)
    add_device(parser)
    add_stream(parser, "; for --measures")
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.measures and not (arguments.forget or arguments.retain):
        raise ValueError("--measures needs what is measured: give --forget, --retain or both")
    certificate, seal = opened(arguments.folder)
    checks = [seal]
    if certificate is not None:
        checks += _checks(certificate, arguments)
    differing = [check for check in checks if check.result == DIFFERS]
    arguments.status = 1 if differing else 0
    if not arguments.json:
        for check in checks:
            show(f"{check.result:<12} {check.check}: {check.said}")
        left = sum(check.result == NOT_CHECKED for check in checks)
        show(f"{len(checks)} checks: {len(differing)} differ, {left} not made")
    return {"out": str(arguments.folder), "checks": [dataclasses.asdict(check) for check in checks]}


def _checks(certificate: Certificate, arguments: argparse.Namespace) -> list[Check]:
    config = _config(Path(arguments.folder))
    sets = _sets(arguments, config or KUnBRConfig())
    models = {"original": arguments.original, "unlearned": arguments.unlearned}
    if arguments.unlearned and certificate.unlearned is None:
        raise ValueError("--unlearned: the run was given none: leave it out")
    checks = verify(arguments.folder, certificate, models, sets, progress=not arguments.quiet)
    if not arguments.measures:
        return [*checks, Check("measures", NOT_CHECKED, "give --measures, with --forget and --retain")]
    return [*checks, *_measured(certificate, arguments, sets, config, checks)]


def _config(out: Path) -> KUnBRConfig | None:
    """The run's settings; None where its report cannot be read."""
    try:
        return KUnBRConfig.from_dict(read_json(out / REPORT, dict)["config"], plain(out / REPORT), of_a_run=True)
    except (ValueError, KeyError):
        return None


def _sets(arguments: argparse.Namespace, config: KUnBRConfig) -> Sets:
    read, found = reader(arguments, config), {}
    for name in SETS:
        option, paths = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if not paths:
            continue
        records = read_questions(paths, option, read) if name.endswith("_questions") else read(paths, option)
        found[name] = [r for r in records if is_question(r)] if name.endswith("_questions") else records
    return found


def _measured(
    certificate: Certificate,
    arguments: argparse.Namespace,
    sets: Sets,
    config: KUnBRConfig | None,
    checks: list[Check],
) -> list[Check]:
    if wrong := [check for check in checks if check.result == DIFFERS]:
        return [Check("measures", NOT_CHECKED, f"{wrong[0].check} differs already")]
    given = {name: sets[name] for name in ("forget", "retain") if name in sets}
    questions = {}
    for name, records in given.items():
        apart = f"{name}_questions"
        if apart in certificate.sets and apart not in sets:
            raise ValueError(f"--measures: the run's questions were in files of their own: give --{name}-questions")
        questions[name] = sets.get(apart) or [record for record in records if is_question(record)]
    arguments.model, arguments.dtype = arguments.folder, None
    model, tokenizer = open_model(arguments)
    sayer(arguments)("measuring the result again")
    with frozen(model):
        how = given, questions, config, None if arguments.quiet else "evaluation"
        found = measured(certificate, Decoder(model), tokenizer, *how)
    left = [name for name in ("forget", "retain") if name not in given]
    return [*found, *(Check(f"measures, {name} set", NOT_CHECKED, f"give --{name} FILES") for name in left)]
