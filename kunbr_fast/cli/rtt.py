"""`kunbr-fast rtt`: how much comes back when a part of the forget set is taught again."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.cli.argument_types import path_name
from kunbr_fast.cli.arguments import add_files, add_model, add_output, add_reading, add_settings, add_stream
from kunbr_fast.cli.inputs import open_model, read_config, read_folds, reader, sayer
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.show import Shown, add_show, show_samples
from kunbr_fast.cli.terminal import show
from kunbr_fast.data.overlap import settle
from kunbr_fast.evaluation.cautions import of_attack
from kunbr_fast.evaluation.curves import KEYS, Curves, Point, RTTResult, attack_of
from kunbr_fast.evaluation.figures import drawn
from kunbr_fast.evaluation.folds import Fold, overlap_of, taught_of
from kunbr_fast.evaluation.plots import plot_relearning
from kunbr_fast.evaluation.report import attack_table
from kunbr_fast.evaluation.rtt import Attack, RTTConfig, finished_attacks
from kunbr_fast.evaluation.significance import chance_of
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.files.documents import checked
from kunbr_fast.files.scratch import scratch
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.target import PICTURE, FileKind, json_with
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.fingerprint import data_fingerprint, fingerprint
from kunbr_fast.model.frozen import frozen
from kunbr_fast.run.checks import keep_resident
from kunbr_fast.run.setting import OF_SOME_ATTACKS, counts_for

SETTINGS = (
    "max_length separator chat_date split_long overlap equal_choices scoring seed rtt_lrs rtt_attacks "
    "rtt_master_weights rtt_lora_rank rtt_lora_targets rtt_epochs rtt_batch_size rtt_target resident_layers"
)

_SUMMARY = (  # of a finished one
    "metric accuracy standard_error calibrated_accuracy smooth_accuracy before recovery best strongest attacks "
    "diverged leak cautions"
).split()
_TAUGHT = "other_facts"  # of what an --out belongs to: whose, where that attack was asked for once
_OTHERS = "other_curves"  # finished attacks at learning rates that were not asked for last
_OURS = json_with("belongs_to", "curves", also=(*_SUMMARY, _OTHERS, "sha256"))
WRITES = {"out": FileKind("an attack's result", (".json",), _OURS), "plot": PICTURE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_files(parser, "--forget", "F.jsonl", "one file for each fold, two or more", required=True)
    text = "questions, one file for each fold (default: the question lines of --forget)"
    add_files(parser, "--forget-questions", "Q.jsonl", text)
    text = "facts of the same form that are in no fold, for the attack other_facts"
    add_files(parser, "--other-facts", "O.jsonl", text)
    add_reading(parser)
    parser.add_argument(
        "--out",
        type=path_name,
        metavar="FILE.json",
        help="keep the curves; an interrupted attack goes on from there with --resume",
    )
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="relearning curve")
    add_stream(parser, "; files of what is trained lie in a folder for temporary ones (TMPDIR)")
    parser.add_argument("--resume", action="store_true", help="keep the finished attacks in --out")
    add_show(parser)
    add_settings(parser, SETTINGS.split())
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.show:
        check_outputs(arguments, WRITES)
    config = read_config(arguments)
    read, say = reader(arguments, config), sayer(arguments)
    folds = read_folds(arguments.forget, arguments.forget_questions, read)
    others = read(arguments.other_facts, "--other-facts") if arguments.other_facts else []
    taught = "other_facts" in config.rtt_attacks
    if others and not taught:
        raise ValueError("--other-facts without the attack other_facts: add it to --rtt-attacks, or leave them out")
    settle(overlap_of(folds), config.overlap, *([say] * bool(arguments.show)))
    settle(taught_of(folds, others) if taught else None, config.overlap, *([say] * bool(arguments.show)))
    if arguments.show:
        sets = [Shown(f"fold {fold.name}", fold.train_records, config.rtt_target) for fold in folds]
        sets += [Shown("other facts", others, config.rtt_target)] * taught
        return show_samples(arguments, config, sets)
    out = Path(arguments.out) if arguments.out else None
    if arguments.resume and out is None:
        raise ValueError("--resume needs --out, the file with the finished attacks")
    if out is not None and out.exists() and not arguments.resume:
        raise ValueError(f"{out} exists: give another --out, or --resume to go on with it")
    if arguments.resume and not out.exists():
        raise ValueError(f"{plain(out)}: no attack to resume, there is no such file: leave --resume out")
    model, tokenizer = open_model(arguments)
    keep_resident(model, config.resident_layers)
    attack = config.attack()
    belongs = _settings(attack)
    data = [part for fold in folds for part in (fold.train_records, fold.questions)]
    belongs["run"] = fingerprint(model, *data, tokenizer=tokenizer)
    if others:
        belongs[_TAUGHT] = data_fingerprint([others])
    done = _finished_attacks(out, belongs, folds, attack) if arguments.resume else []

    def keep(rows: list[dict]) -> None:
        done.extend(rows)
        if out is not None:
            write_sealed(out, {"belongs_to": belongs, "curves": done})

    with scratch("kunbr-fast-") as folder, frozen(model):
        made = Attack(Decoder(model), tokenizer, folds, attack, say, others)
        result = made.run(folder, not arguments.quiet, list(done), keep)
    if out is not None:
        others = [row for row in done if row not in result.curves]
        write_sealed(out, {"belongs_to": belongs, **_found(result), **({_OTHERS: others} if others else {})})
    if arguments.plot:
        named = {Path(arguments.model).resolve().name: result}
        how = named, arguments.plot, chance_of([question for fold in folds for question in fold.questions])
        arguments.status = 0 if drawn(arguments.plot, lambda: plot_relearning(*how)) else 1
    if not arguments.json:
        _print(result)
    return _found(result)


def _found(result: RTTResult) -> dict[str, Any]:
    return {**result.to_dict(), "cautions": of_attack(result)}


def _print(result: RTTResult) -> None:
    metric, of = ("accuracy", "questions") if result.metric == "accuracy" else ("answer probability", "records")
    show(f"learning rate | {metric} at each measurement (the first is before), over all {of}")
    for attack in result.attacks:
        for lr in result.rates(attack):
            for key in KEYS:
                if (curve := result.curve(lr, key, attack)) is not None:
                    kind = f", {attack}" * (attack != "full")
                    name = key if result.metric == "accuracy" else result.metric
                    rate = f"{lr:g}" if lr else "-"
                    show(f"{rate:>13} | {'  '.join(f'{value:6.1%}' for value in curve)}  {name}{kind}")
    show(*attack_table(result).splitlines())
    attack, lr, epoch = result.strongest
    calibrated = "" if result.calibrated_accuracy is None else f", calibrated {result.calibrated_accuracy:.1%}"
    smooth = "" if result.smooth_accuracy is None else f", smooth {result.smooth_accuracy:.1%}"
    kind = f"{attack}, " * (attack != "full") + f"lr {lr:g}, epoch {epoch}" if lr else attack  # a rounding has no rate
    for caution in of_attack(result):
        show(f"caution: {caution}")
    show(f"RTT {metric} {result.accuracy:.1%} ({kind}){calibrated}{smooth}; before {result.before:.1%}")


def _settings(attack: RTTConfig) -> dict[str, Any]:
    """Those that finished attacks depend on, as JSON has them: each attack is resumable on its own."""
    free, values = ("lrs", "attacks", "overlap"), dataclasses.asdict(attack)
    values["lora_targets"] = list(attack.lora_targets)
    return {name: value for name, value in values.items() if name not in free}


class _Begun(Curves):
    belongs_to: dict[str, Any]


class _Kept(_Begun, total=False):
    other_curves: list[Point]


def _finished_attacks(path: Path, belongs: dict[str, Any], folds: Sequence[Fold], attack: RTTConfig) -> list[dict]:
    """The curves in an earlier --out, if they are of this model, these questions and these settings."""
    found = read_sealed(path, "it was edited, or written by an earlier version: give another --out")
    found = checked(found, _Kept, f"{plain(path)}: not a file of kunbr-fast rtt --out, give another one")
    before = _settings(RTTConfig()) | found["belongs_to"]  # of an earlier version, which had fewer settings
    if (given := before.get(_TAUGHT)) is not None:
        belongs.setdefault(_TAUGHT, given)
    elif _TAUGHT in belongs:
        before = {**before, _TAUGHT: belongs[_TAUGHT]}
    rows = [*found["curves"], *found.get(_OTHERS, ())]
    made = {attack_of(row) for row in rows}
    for name in OF_SOME_ATTACKS:  # nothing may depend on these yet
        if not any(counts_for(attack, name) for attack in made):
            before |= {key: value for key, value in belongs.items() if name == f"rtt_{key}"}
    changed = [name for name, value in belongs.items() if before.get(name) != value]
    if changed:
        was = f"{changed[0]} = {shown(before.get(changed[0]))}"
        names = {"run": "the model or the questions", _TAUGHT: "what --other-facts holds"}
        what = names.get(changed[0], was)
        raise ValueError(f"{plain(path)}: {what} changed since it was begun: put it back, or give another --out")
    finished_attacks(rows, folds, attack, f"{plain(path)}: ")
    return rows
