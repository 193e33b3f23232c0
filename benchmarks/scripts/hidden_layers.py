"""What `retain_loss: hidden_layers` adds to a step: processor time beside that of the same step with nll, in turns.

    python benchmarks/scripts/hidden_layers.py [--threads 1] [--rounds 15] [--csv FILE]

demo: all parameters of the demo's model (8 layers of 64), 50 + 50 short samples with a loss on one token alone, so that
with nll the last layer leaves most tokens out. block: a block in the middle of SmolLM2-135M's shape, 6 + 6 samples of
WMDP's lengths, a loss on all tokens, from the prefix cache. Weights are random, fp32; the original's states lie in main
memory. On a CPU; others' work does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import about
from kunbr_fast.benchmarks.models import build
from kunbr_fast.benchmarks.shapes import Shape, questions, samples
from kunbr_fast.data import Sample, pack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.hidden_layers import HiddenLayers
from kunbr_fast.objectives.layer_states import LayerStates
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.training.full import FullTraining

DEMO = Shape(hidden=64, intermediate=192, layers=8, heads=4, key_value_heads=4, vocabulary=400)
# by name: retain_loss, and the layers of the two models
VARIANTS = {
    "nll": lambda layers: {},
    "all layers": lambda layers: dict(retain_loss="hidden_layers"),
    "all but the last": lambda layers: dict(retain_loss="hidden_layers", hidden=HiddenLayers(range(layers - 1))),
}


def original(decoder: Decoder, data: list[Sample]) -> OriginalValues:
    """Of the second half of the data, which is retained."""
    half = len(data) // 2
    return OriginalValues({}).with_states(LayerStates(decoder, data[half:], range(decoder.num_layers)), half)


@contextlib.contextmanager
def demo() -> Iterator[dict[str, Callable]]:
    data, steps = samples([16 + i % 5 for i in range(100)], DEMO.vocabulary, "letter"), {}
    with contextlib.ExitStack() as stack:
        for name, made in VARIANTS.items():
            torch.manual_seed(0)
            model = build("demo", torch.float32, "cpu", DEMO)
            decoder, criterion = Decoder(model), Criterion(**made(DEMO.layers))
            values = original(decoder, data) if name != "nll" else None
            stack.enter_context(frozen(model))
            stack.enter_context(fused(model, "auto"))
            training = FullTraining(decoder, criterion, lr=1e-5, optimizer="lion")

            def step(training=training, values=values):
                found = values and values.batch(range(100))
                return training.step_packed(training.criterion.step_batch(pack(data), 50, found))

            steps[name] = step
        yield steps


@contextlib.contextmanager
def block() -> Iterator[dict[str, Callable]]:
    steps, inside = {}, range(12, 15)
    with contextlib.ExitStack() as stack:
        for name, made in VARIANTS.items():
            torch.manual_seed(0)
            model = build("SmolLM2-135M", torch.float32, "cpu")
            data, decoder = questions(12, model.config.vocab_size, "all"), Decoder(model)
            values = original(decoder, data) if name != "nll" else None
            cache = kf.PrefixCache(decoder, data, "host")
            cache.advance(inside.start)
            own = {n: p.detach().clone() for n, p in model.named_parameters()}
            criterion = Criterion(**made(decoder.num_layers), block=inside)
            training = stack.enter_context(kf.reinserted(decoder, own, inside, 1e-5, criterion=criterion))

            def step(training=training, values=values, cache=cache):
                found = values and values.batch(range(12))
                return training.step_packed(training.criterion.step_batch(cache.batch(range(12)), 6, found))

            steps[name] = step
        yield steps


def measured(steps: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if number:  # the first time some things are made
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in (demo, block):
        with case() as steps:
            seconds = measured(steps, options.rounds)
        for name, value in seconds.items():
            row = {"case": case.__name__, "retain": name, "cpu_ms": f"{1e3 * value:.1f}"}
            rows.append(row | {"ratio": f"{value / seconds['nll']:.3f}"})
            print(*rows[-1].values(), sep="  ", flush=True)
    if options.csv is not None:
        rows = [row | {"rounds": options.rounds} | about() for row in rows]
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
