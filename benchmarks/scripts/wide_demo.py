"""A small whole run on the device at hand: teach, make forget, attack, table.

    python benchmarks/scripts/wide_demo.py --out evidence.json --limit 120

The demo's world at ten times its width (43 million parameters; --width). Density and re-insertion run in bf16; the
block's master weights, teaching and attack are fp32. On a GPU steps are CUDA graphs, of what `impl="auto"` takes there.
Learning rates are the demo's over the width's factor; nothing was searched at this width, so the table shows that a
whole run works, and no more.

A real model does not travel to a rented machine: a transfer holds 64 MiB, and SmolLM2-135M is 93 MB at five bits a
weight (docs/smollm2.md).

Each row is printed, and the file written anew, as soon as it is there; after --limit seconds no further row is begun.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kunbr_fast.benchmarks.measure import about
from kunbr_fast.evaluation.report import table, write_report
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run import demo
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.unlearn import unlearn
from kunbr_fast.training.fine_tune import train_all

SAFE = 1.3  # a method may take so many times the one before it


class Wide(demo.Demo):
    """The demo `factor` times as wide, on a device; `rows` as the demo's."""

    def __init__(self, factor: int, device: torch.device, seed: int, reporter: Reporter):
        super().__init__(seed, reporter)
        self.factor, self.device = factor, device
        rates = {name: getattr(self.config, name) / factor for name in ("warmup_lr", "block_lr")}
        rates["rtt_lrs"] = tuple(lr / factor for lr in self.config.rtt_lrs)
        self.config = dataclasses.replace(self.config, cuda_graphs=device.type == "cuda", **rates)

    def teach(self, groups: tuple[str, ...]) -> LlamaForCausalLM:
        small = demo.new_model(len(self.tokenizer), self.seed).config
        width = small.hidden_size * self.factor
        heads = max(small.num_attention_heads, width // 64)
        config = LlamaConfig(**small.to_dict() | dict(
            hidden_size=width, intermediate_size=small.intermediate_size * self.factor, num_attention_heads=heads,
            num_key_value_heads=heads, head_dim=width // heads,
            initializer_range=small.initializer_range / self.factor**0.5,
        ))  # fmt: skip
        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(config).eval().to(self.device)
        samples = [sample for group in groups for sample in self.samples[group]]
        train_all(Decoder(model), samples, seed=self.seed, **demo.TEACHING | {"lr": demo.TEACHING["lr"] / self.factor})
        return model

    def methods(self):
        """(what it is called, whether it is attacked, a function that gives its model), in order."""
        made: dict[str, LlamaForCausalLM] = {}

        def taught():
            made["taught"] = self.teach(tuple(demo.GROUPS))
            return made["taught"]

        def warm_up():
            made["unlearned"] = model = copy.deepcopy(made["taught"])
            config = self.config
            self.unlearn_plainly(
                model, lr=config.warmup_lr, optimizer=config.warmup_optimizer, epochs=config.warmup_epochs
            )
            return model

        def kunbr():
            original, unlearned = (copy.deepcopy(made[name]).to(torch.bfloat16) for name in ("taught", "unlearned"))
            data = self.samples["forget"], self.samples["retain"]
            unlearn(original, *data, self.config, unlearned=unlearned, reporter=self.reporter)
            return original.float()

        def baseline():
            model = copy.deepcopy(made["taught"])
            self.unlearn_plainly(model, **demo.BASELINE | {"lr": demo.BASELINE["lr"] / self.factor})
            return model

        return (
            ("taught", False, taught),
            ("warm-up (M_u)", False, warm_up),
            ("KUnBR", True, kunbr),
            ("gradient difference", True, baseline),
            ("never saw them", True, lambda: self.teach(("retain", "bystanders"))),
        )


def run(world: Wide, out: str, limit: float) -> bool:
    """All methods, or as many as the time suffices for; False where KUnBR's row is not there."""
    begin, longest = time.monotonic(), 0.0
    facts = {"what": __doc__.split("\n")[0], "width": world.factor, "seed": world.seed, "people": demo.GROUPS,
             "config": world.config.to_dict(), "about": about(world.device)}  # fmt: skip
    for name, attack, make in world.methods():
        spent = time.monotonic() - begin
        if world.rows and spent + SAFE * longest > limit:
            print(f"{name}: left out after {spent:.0f} s of {limit:.0f}", flush=True)
            break
        with world.reporter.stage(name, name) as took:
            model = make()
        world.measure(name, model, took.seconds, attack)
        longest = max(longest, time.monotonic() - begin - spent)
        write_report(out, facts | {"rows": world.rows, "table": table(world.rows)})
        print(table(world.rows[-1:]), flush=True)
    print(table(world.rows), flush=True)
    return any(row["method"] == "KUnBR" for row in world.rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="evidence.json", metavar="FILE", help="rows and settings [evidence.json]")
    parser.add_argument("--width", type=int, default=10, metavar="N", help="times the demo's [10]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="seconds [none]")
    arguments = parser.parse_args()
    begin = time.monotonic()
    reporter = Reporter(say=lambda text: print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True))
    world = Wide(arguments.width, torch.device(arguments.device), arguments.seed, reporter)
    return 0 if run(world, arguments.out, arguments.limit) else 1


if __name__ == "__main__":
    raise SystemExit(main())
