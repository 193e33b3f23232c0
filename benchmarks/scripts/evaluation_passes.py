"""Seconds of each pass of `kf.evaluate`, and of four-choice accuracy with and without trees, on a random Llama.

    python benchmarks/scripts/evaluation_passes.py --tokenizer DIR --questions Q.jsonl [--shape 1b] [--device cuda]
        [--dtype bfloat16] [--csv FILE]

80 forget, 40 retain and 30 holdout questions of a file; original and result. The suites run twice: the first time
kernels are compiled and what a device plans is planned.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
import transformers as tf
from evaluation import SHAPES

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import about
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.model.decoder import Decoder

COLUMNS = "what round seconds model device driver dtype torch triton commit command".split()


def made(options: argparse.Namespace, vocabulary: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.device(options.device):
        config = tf.LlamaConfig(vocab_size=vocabulary, **SHAPES[options.shape])
        model = tf.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    tokenizer = tf.AutoTokenizer.from_pretrained(options.tokenizer)
    result, original = (made(options, len(tokenizer), seed) for seed in (0, 1))
    items, rows = kf.load_items(options.questions), []
    sets = dict(forget=items[:80], retain=items[80:120], holdout=items[120:150])

    def add(what: str, number: int, seconds: float) -> None:
        rows.append({"what": what, "round": number, "seconds": round(seconds, 3)})
        print(f"{what:40} round {number}  {seconds:8.3f} s", flush=True)

    for suite in ("core", "all"):
        for number in (1, 2):
            start = time.perf_counter()
            how = dict(tokenizer=tokenizer, original=original, suite=suite, max_new_tokens=32, progress=False)
            found = kf.evaluate(result, **sets, **how)
            add(f"{suite}: all of it", number, time.perf_counter() - start)
            for name, seconds in found.seconds.items():
                add(f"{suite}: {name}", number, seconds)
    decoder, records = Decoder(result), [item.record for item in items]
    for number in (1, 2):
        for decoder.trees in (True, False):
            start = time.perf_counter()
            choice_accuracy(decoder, tokenizer, records, scoring="choice")
            add(f"{len(records)} questions by choice, trees {decoder.trees}", number, time.perf_counter() - start)
    if options.csv is not None:
        here = about(options.device)
        more = {name: here.get(name, "") for name in ("device", "driver", "torch", "triton", "commit", "command")}
        more |= {"model": f"random {options.shape}", "dtype": options.dtype}
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {**row, **more, "model": f"random {options.shape}", "dtype": options.dtype} for row in rows
            )


if __name__ == "__main__":
    main()
