"""The command line: `kunbr-fast demo | unlearn | density | rtt | merge | plan | bench | doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from kunbr_fast.benchmarks import compare, harness
from kunbr_fast.benchmarks.bench import bench
from kunbr_fast.benchmarks.report import write_report as write_bench_report
from kunbr_fast.benchmarks.rows import read_rows
from kunbr_fast.benchmarks.shapes import MODELS
from kunbr_fast.benchmarks.suites import SUITES
from kunbr_fast.cli.doctor import doctor, format_doctor
from kunbr_fast.data import is_question, load_records
from kunbr_fast.density.measure import NO_SHARES, NORMS, STATISTICS, Density, knowledge_density
from kunbr_fast.density.select import pareto_front, select_blocks
from kunbr_fast.evaluation.plots import plot_density, plot_pareto, plot_relearning
from kunbr_fast.evaluation.report import table, write_report
from kunbr_fast.evaluation.rtt import Fold, rtt_attack
from kunbr_fast.files.atomic import write_json
from kunbr_fast.files.merge import METHODS, MODES, merge_models
from kunbr_fast.files.models import DTYPES, check_same_architecture, load_model, load_tokenizer, save_model
from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.memory import OutOfMemory, parse_bytes
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.parallel.group import ALONE, Group, ProcessGone, joined, local_device, num_processes
from kunbr_fast.planning.plan import GPUS, plan
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.demo import demo
from kunbr_fast.run.samples import to_samples
from kunbr_fast.run.state import fingerprint
from kunbr_fast.run.unlearn import unlearn
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.version import __version__


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- arguments


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="local Hugging Face model directory (safetensors)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as saved")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def _stream_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--stream", action="store_true", help=f"models larger than memory: layers are read when they run{text}"
    )
    parser.add_argument(
        "--stream-cache",
        default="0",
        metavar="SIZE",
        help="with --stream, main memory in which layers may stay once they were read, such as 64GiB [none]",
    )


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no stage lines")


def _setting_arguments(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """One option for each KUnBRConfig setting: --block-lr 1e-5."""
    group = parser.add_argument_group("settings (each also a line of --config run.yaml; an option wins)")
    group.add_argument("--config", metavar="run.yaml", help="settings, one 'name: value' a line")
    for field in dataclasses.fields(KUnBRConfig):
        if names is not None and field.name not in names:
            continue
        option = f"--{field.name.replace('_', '-')}"
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if isinstance(default, dict):
            group.add_argument(
                option.removesuffix("s"),
                action="append",
                default=argparse.SUPPRESS,
                type=_name_and_value,
                metavar="NAME=VALUE",
                help=f"{field.metadata['help']}; may be given several times",
                dest=f"set_{field.name}",
            )
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["help"] + ("" if default is None else f" [{shown}]")
        kind = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%"), "dest": f"set_{field.name}"}
        if isinstance(default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, **kind)
        elif isinstance(default, tuple):
            group.add_argument(option, nargs="+", type=float, metavar="LR", **kind)
        else:
            group.add_argument(option, type=_scalar, metavar=field.name.rpartition("_")[2].upper(), **kind)


def _name_and_value(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name or not sign or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, such as beta=0.1")
    return name, _scalar(value)


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _positive(kind: type):
    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"{kind.__name__} above 0"  # argparse: "invalid float above 0 value: '-1'"
    return read


def _tokens(text: str) -> str:
    if text != "ragged" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of tokens, or ragged")
    return text


def _config(arguments: argparse.Namespace) -> KUnBRConfig:
    values: dict[str, Any] = {}
    if arguments.config:
        values = KUnBRConfig.load(arguments.config).to_dict()
    for name, value in vars(arguments).items():
        if name.startswith("set_"):
            name = name[4:]
            values[name] = {**values.get(name, {}), **dict(value)} if name.endswith("_options") else value
    return KUnBRConfig.from_dict(values, "settings")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kunbr-fast",
        description="Fast re-insertion unlearning (KUnBR, arXiv 2511.11667) for Hugging Face causal language models.",
    )
    top.add_argument("--version", action="version", version=f"kunbr-fast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo", help="teach a small model invented birthdays and make it forget them (minutes, CPU)"
    )
    command.add_argument(
        "--out", default="demo-out", metavar="DIR", help="where report.json and the plots go [demo-out]"
    )
    command.add_argument("--seed", type=int, default=0, help="people, initial weights and data order [0]")
    _output_arguments(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "unlearn", help="make a model forget: warm-up, density, selection, re-insertion, proof"
    )
    _model_arguments(command)
    command.add_argument(
        "--forget",
        nargs="+",
        required=True,
        metavar="F.jsonl",
        help="what to forget; each file is a fold of the RTT attack",
    )
    command.add_argument("--retain", nargs="+", required=True, metavar="R.jsonl", help="what to keep")
    command.add_argument(
        "--forget-questions",
        nargs="+",
        metavar="Q.jsonl",
        help="questions on the forget files, one file for each (default: the question lines among them)",
    )
    command.add_argument(
        "--retain-questions",
        nargs="+",
        metavar="Q.jsonl",
        help="questions on the retain files (default: the question lines among them)",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the unlearned model, report.json and plots; checkpoints in DIR/work",
    )
    command.add_argument("--unlearned", metavar="DIR", help="your own M_u (made by any method): no warm-up")
    _stream_arguments(command, "; needs --unlearned, and there is no attack")
    command.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --out")
    _output_arguments(command)
    _setting_arguments(command)
    command.set_defaults(run=_unlearn)

    command = commands.add_parser("density", help="knowledge density of each layer for a forget set; changes nothing")
    _model_arguments(command)
    command.add_argument("--forget", nargs="+", required=True, metavar="F.jsonl")
    command.add_argument(
        "--retain", nargs="+", metavar="R.jsonl", help="what to keep: for fisher_ratio, cosine and slug's Pareto front"
    )
    command.add_argument("--out", metavar="FILE.json", help="keep the result (kunbr_fast.Density.load reads it)")
    command.add_argument(
        "--plot",
        metavar="FILE.png",
        help="bars per layer, the chosen blocks marked; slug with --retain: importance against alignment",
    )
    command.add_argument(
        "--statistic",
        choices=STATISTICS,
        default="grad_l1",
        help="of each layer's gradient g: grad_l1 sum|g|, grad_mean_abs mean|g|, grad_l2sq sum g^2, grad_l2 its root, "
        "grad_linf max|g|, fisher E g^2, fisher_ratio forget/retain, cosine of forget and retain, slug |g|/|w| [grad_l1]",
    )
    command.add_argument(
        "--sample-fraction",
        type=float,
        metavar="F",
        help="estimate a sum over weights without bias from this part of each matrix's rows (above 0, at most 1), and "
        "show the standard error [all rows]",
    )
    _stream_arguments(command, "")
    _output_arguments(command)
    _setting_arguments(
        command,
        ["target", "max_length", "modules", "reduction", "num_blocks", "top_k", "skip_last_layers"]
        + ["gradient_checkpointing", "activations", "impl"],
    )
    command.set_defaults(run=_density)

    command = commands.add_parser(
        "rtt", help="the RTT attack: how much comes back when a part of the forget set is taught again"
    )
    _model_arguments(command)
    command.add_argument(
        "--forget", nargs="+", required=True, metavar="F.jsonl", help="one file for each fold, two or more"
    )
    command.add_argument(
        "--forget-questions",
        nargs="+",
        metavar="Q.jsonl",
        help="questions, one file for each fold (default: the question lines of --forget)",
    )
    command.add_argument(
        "--out", metavar="FILE.json", help="keep the curves; an interrupted attack goes on from there with --resume"
    )
    command.add_argument("--plot", metavar="FILE.png", help="relearning curve")
    command.add_argument("--resume", action="store_true", help="keep the finished attacks in --out")
    _output_arguments(command)
    _setting_arguments(command, ["scoring", "seed", "rtt_lrs", "rtt_epochs", "rtt_batch_size", "rtt_target"])
    command.set_defaults(run=_rtt)

    command = commands.add_parser(
        "merge", help="one model from several: task vectors negated or added, by sum, mean or agreement of their signs"
    )
    command.add_argument("--base", required=True, metavar="DIR", help="the model that the others were trained from")
    command.add_argument("--models", nargs="+", required=True, metavar="DIR", help="one or more (safetensors)")
    command.add_argument("--out", required=True, metavar="DIR", help="the merged model, and merge.json")
    command.add_argument(
        "--mode",
        choices=MODES,
        required=True,
        help="negate: the models were fine-tuned on what is to be forgotten; add: they were unlearned",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default="consensus",
        help="of the task vectors; consensus: the mean where they agree in sign, 0 elsewhere [consensus]",
    )
    command.add_argument("--alpha", type=float, default=1.0, metavar="A", help="how far along the task vector [1.0]")
    command.add_argument(
        "--agree",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the models that consensus needs, above 0.5 [1.0: all]",
    )
    command.add_argument("--resume", action="store_true", help="go on with the merge that was interrupted in --out")
    _output_arguments(command)
    command.set_defaults(run=_merge)

    command = commands.add_parser(
        "plan", help="predict memory and time of a run from config.json alone, and choose settings that fit"
    )
    command.add_argument("--model", required=True, metavar="DIR", help="model directory, or only its config.json")
    command.add_argument("--gpu-memory", required=True, metavar="SIZE", help="such as 24GiB or 80GB")
    command.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} [h100]")
    command.add_argument("--gpus", type=int, default=1, metavar="N", help="how many [1]")
    command.add_argument("--dtype", choices=list(DTYPES), help="default: as config.json says")
    command.add_argument("--forget", nargs="+", metavar="F.jsonl", help="as of unlearn (default: sizes of WMDP)")
    command.add_argument("--retain", nargs="+", metavar="R.jsonl")
    command.add_argument("--unlearned", action="store_true", help="M_u will be given: no warm-up")
    command.add_argument(
        "--stream", action="store_true", help="as of unlearn: layers come from the files one by one; needs --unlearned"
    )
    command.add_argument("--out", metavar="run.yaml", help="the settings, for unlearn --config")
    _output_arguments(command)
    _setting_arguments(command)
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "bench",
        help="time the kernels, a step and a whole run on this machine against their rivals, or compare two such runs",
        description="Times each suite's cases on this machine: first a check of results against fp64, then rounds in which\n"
        "ours, the rivals that are installed, and a copy and a matrix product (the roofline) take turns.",
        usage="%(prog)s [SUITE ...] [options]",
        epilog="suites:\n" + "\n".join(f"  {name:<12} {text}" for name, text in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("suites", nargs="*", metavar="SUITE", help="which suites, see below [all]")
    command.add_argument(
        "--out", default="bench-out", metavar="DIR", help="results.csv, results.json, report.html, plots [bench-out]"
    )
    command.add_argument("--resume", action="store_true", help="keep the cases that have numbers in --out already")
    command.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    command.add_argument("--dtype", choices=list(DTYPES), help="[bfloat16 on a GPU, float32 on a CPU]")
    command.add_argument(
        "--models", nargs="+", choices=list(MODELS), metavar="NAME", help=f"shapes of {', '.join(MODELS)}"
    )
    command.add_argument(
        "--tokens",
        nargs="+",
        type=_tokens,
        metavar="T",
        help="where a suite has them as a size; ragged: as questions have",
    )
    command.add_argument("--variants", nargs="+", metavar="NAME", help="only these, and what they are compared with")
    command.add_argument("--quick", action="store_true", help="one small case a suite, to see that everything works")
    command.add_argument("--compile", action="store_true", help="torch.compile's variants on a CPU too (minutes)")
    command.add_argument("--tiles", action="store_true", help="density: each candidate tile of the Triton kernel too")
    command.add_argument("--seconds", type=_positive(float), metavar="S", help="for the rounds of a case [4]")
    command.add_argument(
        "--repeats", type=_positive(int), metavar="N", help="rounds after which a case is done [7; 30 on a GPU]"
    )
    command.add_argument(
        "--budget",
        type=_positive(float),
        default=float("inf"),
        metavar="S",
        help="seconds after which no case is begun",
    )
    command.add_argument("--no-report", action="store_true", help="results.csv and results.json alone")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="say which cases there are, and measure none")
    instead.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.csv", "B.csv"),
        help="measure nothing: what became slower or faster from A to B, beyond noise; exit status 1 where ours became slower",
    )
    instead.add_argument("--report", metavar="FILE.csv", help="measure nothing: the report of this file, in --out")
    _output_arguments(command)
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "doctor", help="versions, devices, and which implementation of each operation can run here"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)
    return top


# ---------------------------------------------------------------- commands


def _load(arguments: argparse.Namespace):
    device, kept = _device(arguments), getattr(arguments, "stream_cache", "0")
    if getattr(arguments, "stream", False):
        kept = parse_bytes(kept, "--stream-cache")
        model = open_streamed(arguments.model, device, arguments.dtype, host_bytes=kept)
    elif kept != "0":
        raise ValueError(f"--stream-cache {kept} without --stream: the model is in memory whole: leave it out")
    else:
        model = load_model(arguments.model, arguments.dtype, device)
    return model, load_tokenizer(arguments.model)


def _device(arguments: argparse.Namespace) -> str:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; `kunbr-fast doctor` says more"
        )
    return local_device() if device == "cuda" and num_processes() > 1 else device


def _folds(forget: Sequence[str], questions: Sequence[str] | None) -> list[Fold]:
    """One fold for each forget file, with its own questions."""
    if questions is not None and len(questions) != len(forget):
        raise ValueError(
            f"--forget-questions has {len(questions)} files and --forget {len(forget)}: give one for each, in the same order"
        )
    folds = []
    for i, path in enumerate(forget):
        records = load_records(path)
        asked = load_records(questions[i]) if questions is not None else records
        folds.append(Fold(Path(path).stem, records, [r for r in asked if is_question(r)]))
    return folds


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    result = demo(arguments.out, arguments.seed, progress=not arguments.quiet, say=_stage(arguments))
    if not arguments.json:
        print(result["table"])
        print(
            "retain: people rehearsed during unlearning; bystanders: known, and never seen by it; RTT: the best that an\n"
            "attacker gets on one half of the forget set by teaching the other half again (chance is 25 %)."
        )
        print(f"report.json, density.png and relearning.png are in {arguments.out}")
    return result


def _stage(arguments: argparse.Namespace):
    return (lambda text: None) if arguments.quiet else _say


def _unlearn(arguments: argparse.Namespace) -> dict[str, Any]:
    config, out, say = _config(arguments), Path(arguments.out), _stage(arguments)
    if not (out / "work").is_dir():
        if (out / "report.json").is_file():
            if arguments.resume:
                raise ValueError(f"{out}: this run is finished (report.json is there): nothing to resume")
            raise ValueError(f"{out} already holds a finished run: give another --out or delete it")
        if (out / "config.json").is_file():
            raise ValueError(f"{out} holds a model, which the result would replace: give another --out")
    folds = _folds(arguments.forget, arguments.forget_questions)
    forget = [record for fold in folds for record in fold.train_records]
    questions = [record for fold in folds for record in fold.questions]
    retain = load_records(arguments.retain)
    retain_questions = load_records(arguments.retain_questions) if arguments.retain_questions else retain
    retain_questions = [record for record in retain_questions if is_question(record)]
    if not questions:
        say("no question lines about the forget set: accuracy is not measured and there is no RTT attack")
    elif len(folds) < 2 and config.rtt:
        say("one forget file: the RTT attack needs two or more (each is a fold), so there is none")
    if arguments.stream and not arguments.unlearned:
        raise ValueError(
            "--stream: the warm-up trains every parameter, which are never in memory together: make M_u elsewhere, by any "
            "method, and give it with --unlearned DIR"
        )
    model, tokenizer = _load(arguments)
    unlearned = None
    if arguments.stream:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        unlearned = open_streamed(arguments.unlearned, "cpu", dtype)
        check_same_architecture(model, unlearned, arguments.unlearned)
    elif arguments.unlearned:
        unlearned = load_model(arguments.unlearned, arguments.dtype, "cpu").to(model.dtype)
        check_same_architecture(model, unlearned, arguments.unlearned)

    def save(report) -> None:
        """All of it while work/ is still there: if the disk is full here, --resume has nothing to compute again."""
        if not arguments.stream:  # else it is there
            say(f"writing the model to {out}")
            save_model(model, tokenizer, out)
        plot_density(report.density, report.blocks, out / "density.png", config.skip_last_layers)
        if report.rtt is not None:
            forget_accuracy = {"KUnBR": report.accuracy["result"]["forget"]["plain"]}
            plot_relearning({"KUnBR": report.rtt}, out / "relearning.png", forget=forget_accuracy)
        config.save(out / "run.yaml")
        write_report(out / "report.json", report.to_dict() | {"model": str(arguments.model)})

    report = unlearn(
        model,
        forget,
        retain,
        config,
        tokenizer=tokenizer,
        unlearned=unlearned,
        forget_questions=questions,
        retain_questions=retain_questions,
        folds=folds if questions and len(folds) > 1 else None,
        output_dir=out,
        resume=arguments.resume,
        progress=not arguments.quiet,
        on_stage=say,
        before_cleanup=save,
        group=arguments.group,
    )
    if not arguments.json:
        rows = [report.row(name, model) for name, model in (("original", "original"), ("warm-up (M_u)", "unlearned"))]
        print(table([*(row for row in rows if "forget" in row or "retain" in row), report.row()]))
        if arguments.stream and config.rtt and questions:
            print(f"the RTT attack trains every parameter: run `kunbr-fast rtt --model {out}` where they fit")
        print(f"model, report.json and plots are in {out}")
    return report.to_dict() | {"model": str(arguments.model)}


def _density(arguments: argparse.Namespace) -> dict[str, Any]:
    config = _config(arguments)
    records = load_records(arguments.forget)
    retain = None if arguments.retain is None else load_records(arguments.retain)
    model, tokenizer = _load(arguments)
    decoder = Decoder(model)
    choice = config.num_blocks, config.top_k, config.skip_last_layers
    if arguments.statistic != "cosine":
        selectable_blocks(decoder.num_layers, *choice)  # fails now or never
    density = knowledge_density(
        decoder,
        to_samples(records, tokenizer, config, decoder, "forget"),
        config.modules,
        arguments.statistic,
        # some statistics have a reduction of their own, which only an option of the command contradicts
        None if arguments.statistic not in NORMS and not hasattr(arguments, "set_reduction") else config.reduction,
        retain=None if retain is None else to_samples(retain, tokenizer, config, decoder, "retain"),
        gradient_checkpointing=config.gradient_checkpointing or None,
        sample_fraction=arguments.sample_fraction,
        activations=config.activations,
        impl=config.impl,
        progress=not arguments.quiet,
        group=arguments.group,
    )
    blocks = [] if density.statistic == "cosine" else select_blocks(density, *choice)
    result = density.to_dict() | {
        "normalized": None if density.statistic in NO_SHARES else density.normalized.tolist(),
        "blocks": [[block.start, block.stop] for block in blocks],
    }
    if density.alignment is not None:
        result["pareto_front"] = pareto_front(density.per_layer, density.alignment)
    if not arguments.group.first:
        return result
    if arguments.out:
        density.save(arguments.out)
    if arguments.plot and density.alignment is not None:
        plot_pareto(density, arguments.plot)
    elif arguments.plot:
        plot_density(density, blocks, arguments.plot, config.skip_last_layers)
    if not arguments.json:
        _print_density(density, blocks, result.get("pareto_front"))
    return result


def _print_density(density: Density, blocks: Sequence[range], front: Sequence[int] | None) -> None:
    marked, meaning = {layer for block in blocks for layer in block}, " (* chosen)" if blocks else ""
    if front is not None:
        marked, meaning = set(front), " (* Pareto front: high importance, low |alignment|)"
    sampled = "" if density.sample_fraction is None else f", estimate from {density.sample_fraction:g} of the rows"
    print(f"knowledge density, {density.modules}, {density.statistic}, {density.num_samples} samples{sampled}{meaning}")
    values = density.per_layer.tolist()
    longest = max(map(abs, values)) or 1.0
    for layer, value in enumerate(values):
        error = "" if density.standard_error is None else f" ± {float(density.standard_error[layer]):<10.3g}"
        if density.alignment is not None:
            after = f"alignment {float(density.alignment[layer]):+.4f}  {'#' * round(40 * value / longest)}"
        elif density.statistic in NO_SHARES:
            after = "#" * round(40 * abs(value) / longest)
        else:
            share = float(density.normalized[layer])
            after = f"{share:7.2%}  {'#' * round(share * 200)}"
        print(f"layer {layer:3d} {'*' if layer in marked else ' '} {value:12.5g}{error}  {after}")


def _rtt(arguments: argparse.Namespace) -> dict[str, Any]:
    config = _config(arguments)
    folds = _folds(arguments.forget, arguments.forget_questions)
    out = Path(arguments.out) if arguments.out else None
    if arguments.resume and out is None:
        raise ValueError("--resume needs --out, the file with the finished attacks")
    if out is not None and out.exists() and not arguments.resume:
        raise ValueError(f"{out} exists: give another --out, or --resume to go on with it")
    model, tokenizer = _load(arguments)
    attack = config.attack()
    belongs = {name: value for name, value in dataclasses.asdict(attack).items() if name != "lrs"}
    belongs["run"] = fingerprint(model, *(part for fold in folds for part in (fold.train_records, fold.questions)))
    done = _finished_attacks(out, belongs) if arguments.resume and out.is_file() else []

    def keep(rows: list[dict]) -> None:
        done.extend(rows)
        if out is not None:
            write_json(out, {"belongs_to": belongs, "curves": done})

    with tempfile.TemporaryDirectory(prefix="kunbr-rtt-") as scratch, frozen(model):
        result = rtt_attack(Decoder(model), tokenizer, folds, attack, scratch, not arguments.quiet, list(done), keep)
    if out is not None:
        write_json(out, {"belongs_to": belongs, **result.to_dict()})
    if arguments.plot:
        plot_relearning({Path(arguments.model).name: result}, arguments.plot)
    if not arguments.json:
        print("learning rate | accuracy after each epoch (0 = before), mean over folds")
        for lr in result.lrs:
            for key in ("plain", "calibrated"):
                if (curve := result.curve(lr, key)) is not None:
                    print(f"{lr:13g} | {'  '.join(f'{value:6.1%}' for value in curve)}  {key}")
        lr, epoch = result.best
        calibrated = "" if result.calibrated_accuracy is None else f", calibrated {result.calibrated_accuracy:.1%}"
        print(f"RTT accuracy {result.accuracy:.1%} (lr {lr:g}, epoch {epoch}){calibrated}; before {result.before:.1%}")
    return result.to_dict()


def _finished_attacks(path: Path, belongs: dict[str, Any]) -> list[dict]:
    """The curves in an earlier --out, if they are of this model, these questions and these settings."""
    try:
        found = json.loads(path.read_text())
        before, curves = found["belongs_to"], list(found["curves"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of kunbr-fast rtt --out ({error}): give another --out") from error
    changed = [name for name, value in belongs.items() if before.get(name) != value]
    if changed:
        what = "the model or the questions" if changed[0] == "run" else f"{changed[0]} = {before.get(changed[0])!r}"
        raise ValueError(f"{path}: {what} changed since it was begun: put it back, or give another --out")
    return curves


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    found = merge_models(
        arguments.base,
        arguments.models,
        arguments.out,
        mode=arguments.mode,
        method=arguments.method,
        alpha=arguments.alpha,
        agree=arguments.agree,
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    if not arguments.json:
        print(f"{found['tensors']} tensors, {found['entries']} entries; {found['agreed_share']:.1%} agree in sign")
        for model, norm in zip(found["models"], found["task_vector_norms"]):
            print(f"task vector of {model}: norm {norm:.4g}")
        print(
            f"change ({arguments.mode}, alpha {arguments.alpha:g}): norm {found['merged_norm']:.4g}, in {arguments.out}"
        )
    return found


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    found = plan(
        arguments.model,
        arguments.gpu_memory,
        gpu=arguments.gpu,
        gpus=arguments.gpus,
        forget=arguments.forget,
        retain=arguments.retain,
        config=_config(arguments),
        dtype=arguments.dtype,
        unlearned=arguments.unlearned,
        stream=arguments.stream,
    )
    if arguments.out:
        found.config.save(arguments.out)
    if not arguments.json:
        print(found.table())
    return found.to_dict()


def _bench(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.compare:
        found = compare.compare(*(read_rows(path) for path in arguments.compare))
        if not arguments.json:
            print(compare.table(found))
        arguments.status = 1 if found.regressions else 0
        return found.to_dict()
    if arguments.report:
        files = [str(path) for path in write_bench_report(read_rows(arguments.report), arguments.out)]
        if not arguments.json:
            print("\n".join(files))
        return {"files": files}
    device = torch.device(_device(arguments))
    options = harness.Options(
        device=device,
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        **{
            name: getattr(arguments, name) and tuple(getattr(arguments, name))
            for name in ("models", "tokens", "variants")
        },
        **{name: getattr(arguments, name) for name in ("quick", "compile", "tiles", "seconds", "repeats")},
    )
    suites = arguments.suites or SUITES
    if arguments.list:
        cases = [str(case) for case in harness.all_cases(suites, options)]
        if not arguments.json:
            print("\n".join(cases))
        return {"cases": cases}
    found = bench(
        suites,
        options,
        arguments.out,
        budget=arguments.budget,
        resume=arguments.resume,
        progress=not arguments.quiet,
        write_report=not arguments.no_report,
        say=(lambda text: None) if arguments.json else lambda text: print(text, flush=True),
    )
    for what, cases in (("WRONG", found["wrong"]), ("left out", found["left_out"])):
        for case, reason in cases.items():
            _say(f"{what}: {case}: {reason}")
    measured = {(row["suite"], row["model"], row["case"], row["tokens"]) for row in found["rows"] if row["ms"]}
    arguments.status = 0 if measured and not found["wrong"] else 1
    if not arguments.json:
        print(
            f"numbers of {len(measured)} cases{'' if arguments.no_report else ', report and plots'} are in {arguments.out}"
        )
    return found


def _doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    found = doctor()
    if not arguments.json:
        print(format_doctor(found))
    return found


# ---------------------------------------------------------------- main


def _as_one_of(group: Group, arguments: argparse.Namespace) -> None:
    """Settles what one of several processes does: the first one speaks."""
    if arguments.command not in ("unlearn", "density"):
        raise ValueError(
            f"{arguments.command} runs in one process (unlearn and density in several): start it without torchrun"
        )
    arguments.group = group
    if not group.first:
        arguments.quiet = arguments.json = True  # of json `main` prints nothing
        logging.getLogger().setLevel(logging.ERROR)
        disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where `bench` found a wrong result or a regression; 2 for bad input, with one line on standard error; 3 where training diverged; 4 where another of several
    processes has failed; 130 for Ctrl-C.

    Anything else is a bug and keeps its traceback.
    """
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if getattr(arguments, "quiet", False):
        disable_progress_bar()
    resumes = hasattr(arguments, "resume") and arguments.out is not None
    arguments.group, arguments.status, name = ALONE, 0, "kunbr-fast"
    try:
        with joined(getattr(arguments, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")) as group:
            if group.size > 1:
                name = f"kunbr-fast, rank {group.rank} of {group.size}"
                _as_one_of(group, arguments)
            result = arguments.run(arguments)
    except ProcessGone as error:
        if not error.told or arguments.group.first:
            _say(f"{name}: {error}" + ("; what was finished is kept, --resume goes on" if resumes else ""))
        return 4
    except OutOfMemory as error:
        _say(f"{name}: {error}" + (" What was finished is kept, --resume goes on" if resumes else ""))
        return 2
    except Diverged as error:
        kept = f". The last good state is kept in {arguments.out}/work; --resume goes on from there" if resumes else ""
        _say(f"{name}: {error}{kept}")
        return 3
    except (ValueError, OSError, Unavailable, FloatingPointError) as error:
        _say(f"{name}: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"{name}: interrupted" + ("; what was finished is kept, --resume goes on" if resumes else ""))
        return 130
    if arguments.json and arguments.group.first:
        print(json.dumps(result, indent=2))
    return arguments.status
