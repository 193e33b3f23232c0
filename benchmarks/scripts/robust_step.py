"""What an adversary and kept hidden layers add to a step, beside a plain step, in one run.

    python benchmarks/scripts/robust_step.py [--width 512] [--threads 1] [--csv FILE]

A Llama of 8 layers with random weights, 6 + 6 samples of WMDP's lengths a step, gradient difference with Lion, through
the prefix cache (a block) or from the embeddings (all parameters). 9 steps of each variant in turn, from one fork of
the adversary to the next, so that its steps there count with their share. On a CPU it is processor time. Counted
beforehand, in passes (forward and backward) over half of a step's samples: plain 2, adversary 3 + 1/9, frozen 2 + 4/9;
hidden layers add traffic alone.
"""

from __future__ import annotations

import contextlib
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import add_rows, percentile, script_parser
from kunbr_fast.benchmarks.shapes import questions
from kunbr_fast.data import pack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.training import relearned_batch

EVERY, BATCH, BLOCK = 9, 6, range(2, 4)
ADVERSARY = {"adversary_every": EVERY, "adversary_steps": 2}
HIDDEN = {"retain_loss": "hidden_layers"}
VARIANTS = {
    "plain": ({}, {}, 2.0),
    "hidden layers": ({}, HIDDEN, 2.0),
    "adversary": (ADVERSARY, {}, 3 + 1 / EVERY),
    "robust": (ADVERSARY, HIDDEN, 3 + 1 / EVERY),
    "robust, frozen": (ADVERSARY | {"adversary_steps": 4, "adversary_frozen": True}, HIDDEN, 2 + 4 / EVERY),
}


class Steps:
    """The steps of one variant, a fork at a time."""

    def __init__(self, where: str, name: str, decoder: Decoder, data: list, stack: contextlib.ExitStack):
        settings, objective, self.passes = VARIANTS[name]
        block = BLOCK if where == "block" else None
        criterion = Criterion(**objective, block=block)
        self.batch, forget = pack, data
        if block is None:
            model = decoder.model
            stack.enter_context(frozen(model))
            stack.enter_context(fused(model, "auto"))
            self.training = FullTraining(decoder, criterion, lr=1e-7, optimizer="lion", **settings)
        else:
            cache = PrefixCache(decoder, data)
            cache.advance(block.start)
            self.batch, forget = cache.batch, list(range(len(data)))
            values = {n: p.detach().clone() for n, p in decoder.model.named_parameters()}
            how = dict(criterion=criterion, lr=1e-7, **settings)
            self.training = stack.enter_context(kf.reinserted(decoder, values, block, **how))
        self.needed, self.data = forget, data
        parts = {"forget": data[:BATCH], "retain": data[BATCH : 2 * BATCH]}
        self.original = OriginalValues.of(decoder, parts, criterion.needs) if criterion.needs else None

    def fork(self) -> None:
        training = self.training
        for _ in range(EVERY):
            whole = self.batch(self.needed[: 2 * BATCH]).to(training.decoder.device)
            step = training.criterion.step_batch(whole, BATCH, self.original)
            relearned = [
                relearned_batch(self.batch(self.needed[:BATCH]), training.decoder.device)
                for _ in range(training.relearned_before)
            ]
            training.step_packed(step, relearned)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    width, device = arguments.width, "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    # a step ends with a read of its loss; processor time on a CPU, which others on the machine do not lengthen
    clock = time.perf_counter if device == "cuda" else time.process_time
    forget, rows = questions(BATCH, config.vocab_size), []
    data = forget + [{name: x.flip(0) for name, x in sample.items()} for sample in forget]  # to retain: as long
    for where in ("block", "all parameters"):
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        with contextlib.ExitStack() as stack:
            models = [LlamaForCausalLM(config).eval().to(device) for _ in VARIANTS]
            made = {n: Steps(where, n, Decoder(m), data, stack) for n, m in zip(VARIANTS, models)}
            for steps in made.values():
                steps.fork()  # warm
            for _ in range(arguments.rounds):
                for name, steps in made.items():
                    begin = clock()
                    steps.fork()
                    seconds[name].append((clock() - begin) / EVERY)
        plain = percentile(seconds["plain"], 0.5)
        for name, found in seconds.items():
            ratios = [x / y for x, y in zip(found, seconds["plain"])]
            row = {"benchmark": "robust_step", "trained": where, "variant": name, "width": width}
            row |= {"ms": round(1e3 * percentile(found, 0.5), 2), "ratio": round(percentile(ratios, 0.5), 3)}
            row |= {"ratio_p20": round(percentile(ratios, 0.2), 3), "ratio_p80": round(percentile(ratios, 0.8), 3)}
            row |= {"counted": round(VARIANTS[name][2] / 2, 3)}
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), f"(plain {1e3 * plain:.1f} ms)")
    add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
