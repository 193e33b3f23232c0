"""`kunbr-fast unlearn`: warm-up, density, selection, re-insertion, proof."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from kunbr_fast.cli.argument_types import path_name
from kunbr_fast.cli.arguments import add_files, add_model, add_output, add_reading, add_settings, add_stream
from kunbr_fast.cli.inputs import open_model, read_config, read_folds, read_questions, reader, sayer
from kunbr_fast.cli.show import Shown, add_show, show_samples
from kunbr_fast.cli.terminal import show
from kunbr_fast.data import is_question
from kunbr_fast.data.content import check_files
from kunbr_fast.data.overlap import facts, of_sides, settle
from kunbr_fast.evaluation.figures import drawn
from kunbr_fast.evaluation.folds import Fold, overlap_of
from kunbr_fast.evaluation.report import Report, attack_table, table
from kunbr_fast.files.lock import hold
from kunbr_fast.files.models import DTYPES, check_same_architecture, load_model
from kunbr_fast.files.saving import save_model
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.pages import page
from kunbr_fast.parallel.group import ALONE
from kunbr_fast.run import certificate
from kunbr_fast.run.checks import check_finished
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunInputs
from kunbr_fast.run.folder import CheckpointFolder
from kunbr_fast.run.identity import record
from kunbr_fast.run.output import check_output, check_place, finished_report, is_finished, write_reports
from kunbr_fast.run.unlearn import Options, carry_out

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--unlearned", type=path_name, metavar="DIR", help="your own M_u (made by any method): no warm-up"
    )
    add_settings(parser)
    add_output(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """All but the settings."""
    add_model(parser)
    lines = "(default: the question lines among them)"
    text = "what to forget; each file is a fold of the RTT attack"
    add_files(parser, "--forget", "F.jsonl", text, required=True)
    add_files(parser, "--retain", "R.jsonl", "what to keep", required=True)
    text = f"questions on the forget files, one file for each {lines}"
    add_files(parser, "--forget-questions", "Q.jsonl", text)
    add_files(parser, "--retain-questions", "Q.jsonl", f"questions on the retain files {lines}")
    add_reading(parser)
    parser.add_argument(
        "--out",
        type=path_name,
        required=True,
        metavar="DIR",
        help="the unlearned model, report.html, report.json, unlearning.json and plots; DIR/kunbr-checkpoints until "
        "the run is finished",
    )
    text = "a model or a finished run in --out goes when the result is written; never one that is read"
    parser.add_argument("--overwrite", action="store_true", help=text)
    add_stream(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --out")
    add_show(parser)


def _read(arguments: argparse.Namespace, config: KUnBRConfig) -> tuple[list[Fold], list[dict], list[dict]]:
    """The folds, the retain set, and the questions about it. Where they overlap that is known at once."""
    check_files(
        {"--forget": arguments.forget, "--forget-questions": arguments.forget_questions},
        {"--retain": arguments.retain, "--retain-questions": arguments.retain_questions},
    )
    read, named = reader(arguments, config), arguments.retain_questions
    folds, retain = read_folds(arguments.forget, arguments.forget_questions, read), read(arguments.retain, "--retain")
    asked = read_questions(named, "--retain-questions", read) if named else retain
    asked = [record for record in asked if is_question(record)]
    # --show ends here: nothing else says what is let be
    settings = (config.overlap, *([sayer(arguments)] if arguments.show else []))
    settle(overlap_of(folds, config.rtt), *settings)
    forget = [record for fold in folds for record in (*fold.train_records, *fold.questions)]
    settle(of_sides(facts({"": forget}), facts({"": [*retain, *asked]})), *settings)
    return folds, retain, asked


def _show(arguments: argparse.Namespace, config: KUnBRConfig) -> dict[str, Any]:
    criteria = [config.criterion(range(1))] + ([] if arguments.unlearned else [config.criterion(warmup=True)])
    alternate = next((c.alternate for c in criteria if c.alternate is not None), None)
    folds, retain, _ = _read(arguments, config)
    forget = [record for fold in folds for record in fold.train_records]
    sets = [Shown("forget", forget, config.target, alternate), Shown("retain", retain, config.target)]
    return show_samples(arguments, config, sets)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return run_with(read_config(arguments), arguments)


def run_with(config: KUnBRConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    first = (arguments.group or ALONE).first
    if arguments.show:
        return _show(arguments, config)
    if first:
        check_place(arguments.out, {"--model": arguments.model, "--unlearned": arguments.unlearned})
    with hold(arguments.out, sayer(arguments)) if first else contextlib.nullcontext():
        return _run(arguments, config)


def _run(arguments: argparse.Namespace, config: KUnBRConfig) -> dict[str, Any]:
    out, say, group = Path(arguments.out), sayer(arguments), arguments.group or ALONE
    finished = _check_target(arguments, config) if group.first else None
    if any(group.gather(finished is not None)) and finished is None:
        return {}  # the first rank looks whether it is this run
    folds, retain, asked = _read(arguments, config)
    questions = [record for fold in folds for record in fold.questions]
    if not questions:
        say("no question lines about the forget set: its figure is the probability of its records' answers")
    if len(folds) < 2 and config.rtt:
        say("one forget file: the RTT attack needs two or more (each is a fold), so there is none")
    model, tokenizer = open_model(arguments)

    def save(report: Report) -> None:
        """All of it while checkpoints are still there: if the disk is full here, --resume computes nothing again."""
        if not arguments.stream:  # else it is there
            say(f"writing the model to {out}, and reading it back")
            save_model(model, tokenizer, out, replace=CheckpointFolder(out).overwrites)
        write_reports(out, report, str(arguments.model), lambda values: record(out, values))
        _certify(arguments, {"forget": forget, "retain": retain} | apart)
        if not os.path.lexists(path := out / page.NAME):  # else it is the user's, as has been said
            drawn(path, lambda: page.write_page([out], path), "page")

    forget = [record for fold in folds for record in fold.train_records]
    apart = {"forget_questions": questions} if arguments.forget_questions else {}
    apart |= {"retain_questions": asked} if arguments.retain_questions else {}
    unlearned = _open_unlearned(arguments, model)
    used = folds if len(folds) > 1 else []
    if finished is not None:
        inputs = RunInputs(model, forget, retain, tokenizer, unlearned, {"forget": questions, "retain": asked}, used)
        return _finished(finished, inputs, config, arguments)
    options = Options(
        tokenizer=tokenizer,
        unlearned=unlearned,
        forget_questions=questions,
        retain_questions=asked,
        folds=used,
        output_dir=out,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
        on_stage=say,
        before_cleanup=save,
        group=group,
        stop=arguments.stop,
    )
    report = carry_out(model, forget, retain, config, options, command=True)
    if not arguments.json:
        _print(report, arguments)
    return report.to_dict() | {"model": str(arguments.model)}


def _certify(arguments: argparse.Namespace, sets: dict[str, list[dict]]) -> None:
    """The certificate of what is written. What hinders it costs no result, but for a full disk, where --resume goes on.
    A file of that name is the user's, as has been said."""
    if os.path.lexists(path := Path(arguments.out) / certificate.NAME):
        return
    try:
        given = dict(unlearned=arguments.unlearned, progress=not arguments.quiet)
        certificate.write_certificate(arguments.out, arguments.model, sets, **given)
    except ValueError as error:
        logger.warning("%s is not written: %s", plain(path), error)


def _check_target(arguments: argparse.Namespace, config: KUnBRConfig) -> dict[str, Any] | None:
    """The report of the run in --out, if that is finished and to be resumed. ValueError where --out cannot be used."""
    out, folder = Path(arguments.out), CheckpointFolder(arguments.out)
    if not (arguments.resume and is_finished(out, folder)):
        given = (arguments.forget, arguments.forget_questions, arguments.retain, arguments.retain_questions)
        reads = [path for paths in given for path in paths or ()] + ([arguments.config] if arguments.config else [])
        check_output(out, arguments.model, arguments.resume, arguments.overwrite, reads)
        return None
    report = finished_report(out)
    if report is None:
        raise ValueError(f"{out}: its run was finished, but report.json is gone: give another --out, or delete it")
    if changed := list(config.changed(report["config"])):
        was = shown(report["config"].get(changed[0]))
        raise ValueError(
            f"{out} holds a finished run with {changed[0]} = {was}: leave --resume out, give another --out"
        )
    return report


def _finished(
    report: dict[str, Any], inputs: RunInputs, config: KUnBRConfig, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The report of a finished run, which must be of these inputs. Removes what is left of its checkpoints."""
    check_finished(arguments.out, report, inputs, config)
    CheckpointFolder(arguments.out).end_again(sayer(arguments))
    if not arguments.json:
        show(f"this run is finished: model, report.json and plots are in {arguments.out}")
        before = report["config"]
        for name in ("rtt_attacks", "rtt_lrs") if config.rtt and before.get("rtt") else ():
            was = before.get(name, [*getattr(KUnBRConfig, name)])
            if not {*getattr(config, name)} <= {*was}:
                more = f"kunbr-fast rtt --model {arguments.out} makes others"
                show(f"it was attacked with {name} = {shown(was)}: {more}")
    return report


def _open_unlearned(arguments: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """The model of --unlearned, in the dtype of `model`."""
    if not arguments.unlearned:
        return None
    if arguments.stream:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        unlearned = open_streamed(arguments.unlearned, "cpu", dtype)
    else:
        unlearned = load_model(arguments.unlearned, arguments.dtype, "cpu").to(model.dtype)
    check_same_architecture(model, unlearned, arguments.unlearned)
    return unlearned


def _print(report: Report, arguments: argparse.Namespace) -> None:
    rows = [report.row("original", "original"), *[report.row("warm-up (M_u)", "unlearned")] * bool(report.blocks)]
    rows = [*(row for row in rows if "forget" in row or "retain" in row), report.row()]
    show(*table(rows).splitlines())
    if report.rtt is not None:
        show(*attack_table(report.rtt).splitlines())
    for caution in report.cautions:
        show(f"caution: {caution}")
    show(f"model, report.html, report.json and plots are in {arguments.out}")
