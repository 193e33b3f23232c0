"""`kunbr-fast evaluate`: the measures that people publish, of a model, the original and a retrained one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.cli.argument_types import Different, number, path_name
from kunbr_fast.cli.arguments import add_files, add_model, add_output, add_reading, add_settings
from kunbr_fast.cli.inputs import check_columns, choose_device, read_config, sayer
from kunbr_fast.cli.outputs import named, option
from kunbr_fast.cli.terminal import show, with_options
from kunbr_fast.data.content import check_files
from kunbr_fast.data.items import Item
from kunbr_fast.data.overlap import facts, of_sides, settle
from kunbr_fast.data.published import load_items
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.files.models import load_tokenizer
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import PAGE, FileKind, FolderKind, Target, check, csv_with, json_with
from kunbr_fast.measures.evaluate import Options, evaluate
from kunbr_fast.measures.evaluation import COLUMNS, CSV, JSON, KEYS, MORE, Evaluation
from kunbr_fast.measures.registry import SUITES
from kunbr_fast.pages.page import NAME as PAGE_NAME
from kunbr_fast.pages.page import write_page
from kunbr_fast.run.certificate import NAME as CERTIFICATE
from kunbr_fast.run.certificate import refresh
from kunbr_fast.run.identity import check_whole
from kunbr_fast.run.output import finished_report
from kunbr_fast.values import COUNT

DESCRIPTION = """\
Measures of what a model still knows, remembers, gives away and has lost. core: likelihoods alone; tofu, muse: what
these benchmarks report, with generated answers; all: every measure, hidden states too. docs/evaluation.md has the list.
Each text goes through each model once, whatever measures ask for it."""
SETTINGS = (
    "max_length separator chat_date split_long overlap equal_choices scoring seed impl rtt_lrs rtt_attacks "
    "rtt_master_weights rtt_lora_rank rtt_lora_targets rtt_epochs rtt_batch_size rtt_target"
)
FILES = {
    JSON: FileKind("an evaluation", (".json",), json_with(*KEYS, also=MORE)),
    CSV: FileKind("an evaluation's table", (".csv",), csv_with(*COLUMNS)),
}
READ = ("forget", "retain", "holdout", "config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    add_model(parser)
    for name, text in (
        ("--original", "the model before unlearning, to compare with"),
        ("--retrained", "a model trained without the forget set: forget quality, PrivLeak, inference by reference"),
    ):
        parser.add_argument(name, type=path_name, metavar="DIR", help=text)
    kinds = "records of ours, or files of TOFU, MUSE, WMDP, RWKU or KnowUnDo as their authors have them"
    text = f"what was to be forgotten: {kinds}; each file is a fold of the attack"
    add_files(parser, "--forget", "F.jsonl", text, required=True)
    add_files(parser, "--retain", "R.jsonl", "what was to be kept")
    add_files(parser, "--holdout", "H.jsonl", "what no model was trained on: membership inference")
    add_reading(parser)
    parser.add_argument("--chat", action="store_true", help="published questions and their answers as messages")
    _add_measures(parser)
    _add_outcome(parser)
    add_settings(parser, SETTINGS.split())
    add_output(parser)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measures")
    group.add_argument("--suite", choices=SUITES, default="core", help="[core]")
    text = "names in place of a suite, such as probability mia_min_k"
    group.add_argument("--measures", nargs="+", action=Different, default=[], metavar="NAME", help=text)
    whole = number(COUNT)
    text = "at most so many records of each set, spread evenly; an attack takes all [all]"
    group.add_argument("--records", type=whole, metavar="N", help=text)
    text = f"records whose hidden states are read [{Options.layer_records}]"
    group.add_argument("--layer-records", type=whole, default=Options.layer_records, metavar="N", help=text)
    text = f"tokens of a generated answer at most [{Options.max_new_tokens}]"
    group.add_argument("--max-new-tokens", type=whole, default=Options.max_new_tokens, metavar="N", help=text)
    text = "make the attacks of --rtt-attacks on the forget files, two or more; without it a run's report in --model, "
    group.add_argument("--attack", action="store_true", help=text + "where there is one, says what they brought back")
    text = "tasks of lm-evaluation-harness, with commas: mmlu,hellaswag; for --original too"
    group.add_argument("--lm-eval", type=_words, default=[], metavar="TASKS", help=text)
    text = "a folder of tasks of your own (--include_path of lm_eval)"
    group.add_argument("--lm-eval-include", type=path_name, metavar="DIR", help=text)
    group.add_argument("--lm-eval-limit", type=whole, metavar="N", help="questions of each task at most [all]")


def _add_outcome(parser: argparse.ArgumentParser) -> None:
    text = f"a folder for {JSON} and {CSV}; that of the run too (kunbr-fast report shows both)"
    parser.add_argument("--out", type=path_name, metavar="DIR", help=text)
    text = "go on with the evaluation that was interrupted in --out"
    parser.add_argument("--resume", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="an evaluation in --out is replaced")
    parser.add_argument(
        "--stream", action="store_true", help="models larger than memory: layers are read when they run"
    )


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.resume and arguments.out is None:
        raise ValueError("--resume needs --out, the folder of the evaluation that was interrupted")
    _check_out(arguments)
    config, say = read_config(arguments), sayer(arguments)
    check_columns(arguments)
    paths = {f"--{name}": getattr(arguments, name) for name in ("forget", "retain", "holdout")}
    check_files(*({name: value} for name, value in paths.items()))
    files = [_load([path], "--forget", arguments, config.equal_choices) for path in arguments.forget]
    forget = [item for items in files for item in items]
    sets = {
        name: _load(of, f"--{name}", arguments, config.equal_choices) if (of := getattr(arguments, name)) else []
        for name in ("retain", "holdout")
    }
    _check_overlap(forget, sets, config.overlap, say)
    folds, attack = [], None
    if arguments.attack:
        if len(files) < 2:
            raise ValueError(f"--attack needs two forget files or more, each a fold: got {len(files)}")
        folds = [Fold(Path(path).stem, *_fold(items)) for path, items in zip(arguments.forget, files)]
        attack = config.attack()
    device = choose_device(arguments)
    found = evaluate(
        arguments.model,
        forget,
        tokenizer=load_tokenizer(arguments.model),
        **sets,
        **{name: getattr(arguments, name) for name in _SAME},
        text=config.text(),
        max_length=config.max_length,
        folds=folds,
        attack=attack,
        rtt=None if arguments.attack else _of_run(arguments.model, arguments.forget, say),
        output_dir=arguments.out,
        device=device,
        impl=config.impl,
        progress=not arguments.quiet,
        on_stage=say,
    )
    if not arguments.json:
        _print(found, arguments)
    if arguments.out:
        _beside_a_run(arguments, {"forget": forget, **sets}, say)
    return found.to_dict()


_SAME = (
    "original retrained suite measures records layer_records max_new_tokens lm_eval lm_eval_include lm_eval_limit "
    "resume overwrite dtype stream"
).split()  # options that are keywords of `evaluate`


def _check_out(arguments: argparse.Namespace) -> None:
    """ValueError where --out cannot be written, or would replace what is not ours. The model's own folder may be it."""
    if arguments.out is not None:
        kind = FolderKind({name.replace(".", r"\."): one for name, one in FILES.items()}, begun=lambda folder: True)
        check([Target("--out", arguments.out, kind)], [(option(name), path) for name, path in named(arguments, READ)])


def _load(paths: Sequence[str], name: str, arguments: argparse.Namespace, equal: str) -> list[Item]:
    columns = getattr(arguments, f"{name.removeprefix('--')}_columns")
    preset = None if columns else arguments.preset
    return load_items(paths, arguments.ignore_keys, equal, columns, preset, arguments.chat, sayer(arguments))


def _fold(items: Sequence[Item]) -> tuple[list[dict], list[dict]]:
    records = [item.record for item in items]
    return records, [record for record in records if "question" in record]


def _check_overlap(forget: Sequence[Item], sets: dict[str, list[Item]], setting: str, say: Any) -> None:
    sides = {"forget": forget, **sets}
    known = {name: facts({name: [item.record for item in items]}) for name, items in sides.items()}
    settle(of_sides(known["forget"], known["retain"]), setting, say)
    settle(of_sides(known["forget"], known["holdout"]), setting, say)


def _of_run(model: str, forget: Sequence[str], say: Any) -> RTTResult | None:
    """What attacks brought back of the forget files, as the run says that made the model."""
    report = finished_report(model)
    if report is None or not report.get("rtt"):
        return None
    path = plain(Path(model) / "report.json")
    check_whole(report, path, "move it away")
    found = RTTResult.from_dict(report["rtt"], where := f"{path}: rtt")
    folds = {row["fold"] for row in found.curves}
    if folds != {Path(path).stem for path in forget}:
        say(f"attacks: {where} is of {shown(sorted(folds), 200)}, not of the forget files: it is left out")
        return None
    say(f"attacks: as report.json in {plain(model)} has them (--attack makes them anew)")
    return found


def _beside_a_run(arguments: argparse.Namespace, sets: dict[str, list[Item]], say: Any) -> None:
    """In the folder of the run that made the model, the certificate takes the figures up, and the page shows them."""
    out = Path(arguments.out)
    if not os.path.samefile(arguments.model, out) or not (out / CERTIFICATE).exists():
        say(f"kunbr-fast report {plain(out)} makes a page of it")
        return
    try:
        refresh(out, {name: [item.record for item in of] for name, of in sets.items()}, not arguments.quiet)
        if not (out / PAGE_NAME).exists() or PAGE.ours(out / PAGE_NAME):
            write_page([out], out / PAGE_NAME)
    except ValueError as error:  # what was measured is written
        say(f"{CERTIFICATE} and {PAGE_NAME} are as before: {error}")
        arguments.status = 1
    else:
        say(f"{CERTIFICATE} and {PAGE_NAME} have these figures too")


def _print(found: Evaluation, arguments: argparse.Namespace) -> None:
    show(*found.table().splitlines())
    for task, of in (found.lm_eval or {}).items():
        models = [f"{name} {100 * of[name]['value']:.1f} %" for name in ("original", "result") if name in of]
        show(f"{task} ({of['metric']}): {', '.join(models)}")
    for one in found.missing:
        show(f"not measured: {one['measure']}: {with_options(one['why'])}")
    if arguments.out:
        show(f"{JSON} and {CSV} are in {arguments.out}")
