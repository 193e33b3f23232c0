"""`kunbr-fast density`: the knowledge density of each layer; changes nothing."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from kunbr_fast.cli.argument_types import number, path_name
from kunbr_fast.cli.arguments import add_files, add_model, add_output, add_reading, add_settings, add_stream
from kunbr_fast.cli.inputs import open_model, read_config, reader
from kunbr_fast.cli.outputs import check_outputs
from kunbr_fast.cli.show import Shown, add_show, show_samples
from kunbr_fast.cli.terminal import say, show
from kunbr_fast.data.content import check_files
from kunbr_fast.data.overlap import facts, of_sides, settle
from kunbr_fast.data.text import say_separator
from kunbr_fast.density.measure import NO_SHARES, Density, knowledge_density
from kunbr_fast.density.select import pareto_front
from kunbr_fast.evaluation.figures import drawn
from kunbr_fast.evaluation.plots import plot_density, plot_pareto
from kunbr_fast.files.target import PICTURE, FileKind, json_with
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.parallel.group import ALONE
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.samples import to_samples
from kunbr_fast.values import SHARE

SETTINGS = (
    "target max_length separator chat_date split_long overlap equal_choices modules statistic reduction num_blocks "
    "rule top_k threshold skip_last_layers gradient_checkpointing cache impl"
)

_FIELDS = [field.name for field in dataclasses.fields(Density)]
WRITES = {
    "out": FileKind("a density file", (".json",), json_with(*_FIELDS[:4], also=_FIELDS)),
    "plot": PICTURE,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_files(parser, "--forget", "F.jsonl", "what to forget", required=True)
    add_files(parser, "--retain", "R.jsonl", "what to keep: for fisher_ratio, cosine and slug's Pareto front")
    add_reading(parser)
    parser.add_argument(
        "--out", type=path_name, metavar="FILE.json", help="keep the result (kunbr_fast.Density.load reads it)"
    )
    parser.add_argument(
        "--plot",
        type=path_name,
        metavar="FILE.png",
        help="bars per layer, the chosen blocks marked; slug with --retain: importance against alignment",
    )
    parser.add_argument(
        "--sample-fraction",
        type=number(SHARE),
        metavar="F",
        help="estimate a sum over weights without bias from this part of each matrix's rows (above 0, at most 1), and "
        "show the standard error [all rows]",
    )
    add_stream(parser)
    add_show(parser)
    add_settings(parser, SETTINGS.split())
    add_output(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.show:
        check_outputs(arguments, WRITES)
    config, group = read_config(arguments), arguments.group or ALONE
    read = reader(arguments, config)
    records, retain = read(arguments.forget, "--forget"), None
    if arguments.retain is not None:
        retain = read(arguments.retain, "--retain")
    check_files({"--forget": arguments.forget}, {"--retain": arguments.retain})
    settle(of_sides(facts({"": records}), facts({"": retain or []})), config.overlap, say)
    if arguments.show:
        sets = [Shown("forget", records, config.target)]
        sets += [Shown("retain", retain, config.target)] if retain else []
        return show_samples(arguments, config, sets)
    density = _measure(config, arguments, records, retain)
    blocks = [] if density.statistic == "cosine" else _chosen(config, density)
    result = density.to_dict() | {
        "normalized": None if density.statistic in NO_SHARES else density.normalized.tolist(),
        "blocks": [[block.start, block.stop] for block in blocks],
    }
    if density.alignment is not None:
        result["pareto_front"] = pareto_front(density.per_layer, density.alignment)
    if not group.first:
        return result
    if arguments.out:
        density.save(arguments.out)
    if arguments.plot and not drawn(arguments.plot, lambda: _plot(density, blocks, arguments.plot, config)):
        arguments.status = 1
    if not arguments.json:
        _print(density, blocks, result.get("pareto_front") if config.rule == "top_k" else None)
    return result


def _chosen(config: KUnBRConfig, density: Density) -> list[range]:
    """No block where none is above the threshold: what was measured is shown and kept all the same."""
    try:
        return config.select(density)
    except ValueError as error:
        if config.rule != "threshold":
            raise
        say(str(error))
        return []


def _plot(density: Density, blocks: Sequence[range], path: str, config: KUnBRConfig) -> None:
    if density.alignment is not None:
        plot_pareto(density, path)
    else:
        plot_density(density, blocks, path, config.skip_last_layers)


def _measure(
    config: KUnBRConfig, arguments: argparse.Namespace, records: Sequence[dict], retain: Sequence[dict] | None
) -> Density:
    if config.rule == "pareto" and retain is None:
        raise ValueError("--rule pareto: what is aligned with the retain set is known with --retain R.jsonl: give it")
    model, tokenizer = open_model(arguments)
    decoder = Decoder(model)
    if config.statistic != "cosine":
        config.selectable(decoder.num_layers)  # fails now or never
    forget = to_samples(records, tokenizer, config, decoder, "forget")
    kept = None if retain is None else to_samples(retain, tokenizer, config, decoder, "retain")
    say_separator(config.separator, records, retain or ())
    return knowledge_density(
        decoder,
        forget,
        config.modules,
        config.statistic,
        config.reduction,
        retain=kept,
        gradient_checkpointing=config.gradient_checkpointing or None,
        sample_fraction=arguments.sample_fraction,
        activations=config.cache,
        impl=config.impl,
        progress=not arguments.quiet,
        group=arguments.group or ALONE,
    )


def _print(density: Density, blocks: Sequence[range], front: Sequence[int] | None) -> None:
    marked, meaning = {layer for block in blocks for layer in block}, " (* chosen)" if blocks else ""
    if front is not None:
        marked, meaning = set(front), " (* Pareto front: high importance, low |alignment|)"
    sampled = "" if density.sample_fraction is None else f", estimate from {density.sample_fraction:g} of the rows"
    show(f"knowledge density, {density.modules}, {density.statistic}, {density.num_samples} samples{sampled}{meaning}")
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
        show(f"layer {layer:3d} {'*' if layer in marked else ' '} {value:12.5g}{error}  {after}")
