"""What all checking costs a run: the seconds spent in each kind of check, and their share of `unlearn`, in one run.

    python benchmarks/scripts/check_cost.py [--width 512] [--samples 60] [--threads 2] [--csv FILE]

A Llama of 8 layers with random weights, samples of WMDP's lengths, warm-up and two blocks, checkpoints after each
epoch, weights and result on disk. Each check is the function that makes it, with a clock around it; one inside another
counts once. It is a run with few steps: hashing the model and looking at files does not grow with them.

    fingerprint    all weights, hashed and looked at for NaN, before the first stage
    files          SHA-256 of what is written and read again; state.json with its own
    folder         OUT, its marker, its lock
    updates        on a CPU a reading pass after each update; on a GPU the optimiser's kernel does it
    end of stage   a forward pass after the last update, and what else `Training.check` does
    result         that the model to be saved is finite, and so is a forward pass of it
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import about
from kunbr_fast.benchmarks.shapes import questions
from kunbr_fast.files.saving import save_model

CHECKS = {  # kind: functions, as module:name
    "fingerprint": ("run.checks:model_fingerprint", "run.checks:run_identity"),
    "files": ("files.checksums:sha256", "run.state:write_sealed", "run.state:read_sealed"),
    "folder": ("run.folder:CheckpointFolder.begin", "run.folder:CheckpointFolder.mark", "run.unlearn:check_output"),
    "updates": ("kernels.optimizers.reference:note_not_finite", "training.training:Training.check_update"),
    "end of stage": ("training.training:Training.check",),
    "result": ("run.stages:Stages.check_result", "run.stages:Stages._check_forward"),
}


@contextlib.contextmanager
def clocks(seconds: dict[str, float]) -> Iterator[None]:
    """Adds the processor time of each kind to `seconds`."""
    inside, undo = [0], []

    def timed(kind, function):
        def wrapper(*arguments, **options):
            begin, outermost = time.process_time(), inside[0] == 0
            inside[0] += 1
            try:
                return function(*arguments, **options)
            finally:
                inside[0] -= 1
                seconds[kind] += outermost * (time.process_time() - begin)

        return wrapper

    for kind, names in CHECKS.items():
        for name in names:
            module, _, path = name.partition(":")
            owner = importlib.import_module(f"kunbr_fast.{module}")
            *parents, last = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            undo.append((owner, last, getattr(owner, last)))
            setattr(owner, last, timed(kind, getattr(owner, last)))
    try:
        yield
    finally:
        for owner, last, function in undo:
            setattr(owner, last, function)


def run(width: int, samples: int) -> tuple[dict[str, float], float]:
    """({kind: seconds}, seconds of the whole run), in processor time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    data = questions(2 * samples, config.vocab_size)
    settings = kf.KUnBRConfig(
        batch_size=6, warmup_epochs=2, num_blocks=4, top_k=2, block_epochs=2, warmup_lr=1e-6, block_lr=1e-6, rtt=False
    )
    seconds = dict.fromkeys(CHECKS, 0.0)
    with tempfile.TemporaryDirectory() as folder, clocks(seconds):
        out, begin = Path(folder) / "out", time.process_time()
        kf.unlearn(
            model, data[:samples], data[samples:], settings, output_dir=out, progress=False,
            before_cleanup=lambda report: save_model(model, None, out),
        )  # fmt: skip
        whole = time.process_time() - begin
    return seconds, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=60, help="of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds, whole = run(options.width, options.samples)
    rows = [*seconds.items(), ("all checks", sum(seconds.values())), ("the run", whole)]
    for kind, value in rows:
        print(f"{kind:14}{value:9.3f} s {100 * value / whole:7.2f} %")
    if options.csv is not None:
        same = {"width": options.width, "samples": options.samples, **about(torch.device("cpu"))}
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["check", "cpu_seconds", "percent", *same], lineterminator="\n")
            writer.writeheader()
            for kind, value in rows:
                found = {"check": kind, "cpu_seconds": f"{value:.3f}", "percent": f"{100 * value / whole:.2f}"}
                writer.writerow(found | same)


if __name__ == "__main__":
    main()
