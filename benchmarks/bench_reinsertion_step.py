"""One re-insertion step against the reference procedure's, at the first, a middle and the last block.

    python benchmarks/bench_reinsertion_step.py                      # SmolLM2-135M shapes, random weights, CPU
    python benchmarks/bench_reinsertion_step.py --target letter --csv benchmarks/results/cpu.csv

Reference: tests/reference_procedure.py (two whole models, two padded passes with full logits, a gradient for every
parameter of the block). Ours: one model and the block, one packed pass, prefix cache, head on labelled rows only.
Both train the same samples, and the test of equal weights is run first: no numbers on red. Variants take turns step
by step in one process (time); each also runs alone in a process of its own (peak memory above the loaded weights and
data). FLOPs are counted by torch while a step runs, and give the predicted ratio. The questions are Years questions
where shared/data is there, else random tokens of the same mean length; the CSV says which.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kunbr_fast.benchmarks.measure import add_rows, flop_counter, percentile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from reference_procedure import ReferenceLion, block_names, padded, reference_step, swap  # noqa: E402

import kunbr_fast as kf  # noqa: E402
from kunbr_fast.data import encode, load_records  # noqa: E402
from kunbr_fast.decoder import Decoder  # noqa: E402

BATCH, LAYERS_IN_BLOCK, LR = 6, 3, 1e-5
SHAPES = dict(  # SmolLM2-135M
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def samples(target, tokenizer_dir):
    """12 samples (6 forget, 6 retain) and a word on where they come from."""
    data = next((d for d in (ROOT.parent / "shared/data", ROOT / "shared/data") if d.is_dir()), None)
    if data and tokenizer_dir and Path(tokenizer_dir).is_dir():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
        records = load_records([data / "years/split_0.jsonl", data / "years/split_1.jsonl"])
        half = len(records) // 2
        records = records[:BATCH] + records[half : half + BATCH]
        return encode(records, tokenizer, target), "Years questions"
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(2 * BATCH):
        ids = torch.randint(3, 49152, (int(torch.randint(45, 80, (), generator=generator)),), generator=generator)
        labels = ids.clone() if target == "all" else torch.where(torch.arange(len(ids)) == len(ids) - 4, ids, -100)
        out.append({"input_ids": ids, "labels": labels})
    return out, "random tokens, 45 to 79 a sample"


def build(dtype):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES)).to(dtype).eval()


class Reference:
    name = "reference"

    def __init__(self, dtype, block, data):
        self.original, self.unlearned = build(dtype), build(dtype)
        self.forget, self.retain = data[:BATCH], data[BATCH:]
        names = block_names(self.original, "model.layers", block)
        swap(self.original, self.unlearned, names)
        for name, parameter in self.original.named_parameters():
            parameter.requires_grad_(name in set(names))
        self.optimizer = ReferenceLion([p for p in self.original.parameters() if p.requires_grad], LR)

    def step(self):
        return reference_step(self.original, self.optimizer, self.forget, self.retain, 1.0)

    def weights(self):
        return {n: p.detach() for n, p in self.original.named_parameters() if p.requires_grad}


class Ours:
    name = "kunbr_fast"

    def __init__(self, dtype, block, data):
        model = build(dtype)
        values = {
            n: p.detach().clone()
            for n, p in model.named_parameters()
            if n in set(block_names(model, "model.layers", block))
        }
        self.decoder = Decoder(model)
        self.cache = kf.PrefixCache(self.decoder, data)
        self.cache.advance(block.start)
        self.context = kf.reinserted(self.decoder, values, block, lr=LR)
        self.training = self.context.__enter__()

    def step(self):
        batch = self.cache.batch(range(2 * BATCH))
        return self.training.step_packed(batch, BATCH)

    def weights(self):
        return self.training.tensors()


VARIANTS = {v.name: v for v in (Reference, Ours)}


def same_weights(block, data):
    """The gate: three fp64 steps give the same weights, to 1e-9."""
    global SHAPES
    full, SHAPES = SHAPES, {**SHAPES, "num_hidden_layers": 6, "vocab_size": 49152}
    try:
        small = range(2, 4)
        a, b = Reference(torch.float64, small, data), Ours(torch.float64, small, data)
        start = {name: value.clone() for name, value in a.weights().items()}
        for _ in range(3):
            a.step(), b.step()
        if any(value.equal(start[name]) for name, value in a.weights().items()):
            sys.exit("the reference trained nothing: no numbers")
        theirs = b.weights()
        return max(float((v - theirs[n]).norm() / v.norm()) for n, v in a.weights().items())
    finally:
        SHAPES = full


def resident(field):
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_memory(name, start, target, tokenizer_dir):
    """Resident bytes at the peak of three steps, above the process with all libraries and data loaded."""
    command = [sys.executable, __file__, "--alone", name, "--start", str(start), "--target", target]
    command += ["--tokenizer", tokenizer_dir or ""]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def alone(arguments):
    data, _ = samples(arguments.target, arguments.tokenizer)
    before = resident("VmRSS")
    variant = VARIANTS[arguments.alone](torch.float32, range(arguments.start, arguments.start + LAYERS_IN_BLOCK), data)
    variant.step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: building a random model is no part of it
    for _ in range(2):
        variant.step()
    print(json.dumps(resident("VmHWM") - before))


def flops(variant):
    with flop_counter() as counter:
        variant.step()
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["all", "letter"], default="all", help="tokens whose loss counts [all]")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each variant and block [9]")
    parser.add_argument(
        "--tokenizer", default="smollm2", help="directory with SmolLM2's tokenizer (examples/smollm2.py)"
    )
    parser.add_argument("--csv", help="append rows here")
    parser.add_argument("--alone", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments)
    data, source = samples(arguments.target, arguments.tokenizer)
    tokens, pad = (
        sum(len(s["input_ids"]) for s in data),
        padded(data[:BATCH])[0].numel() + padded(data[BATCH:])[0].numel(),
    )
    error = same_weights(range(2, 4), copy.deepcopy(data))
    print(f"gate: largest relative difference of the trained weights after 3 fp64 steps: {error:.1e} (limit 1e-9)")
    if error > 1e-9:
        sys.exit("the two sides do not train the same weights: no numbers")
    print(
        f"{source}, target {arguments.target}: {tokens} tokens, {pad} with padding; {torch.get_num_threads()} threads"
    )
    print(f"{'block':>7} {'variant':>11} {'ms':>8} {'p20':>8} {'p80':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'peak MiB':>9}")
    rows = []
    for start in (0, 15, 27):
        block = range(start, start + LAYERS_IN_BLOCK)
        variants = [cls(torch.float32, block, data) for cls in VARIANTS.values()]
        counted = {v.name: flops(v) for v in variants}
        times = {v.name: [] for v in variants}
        for _ in range(arguments.repeats):
            for variant in variants:
                begin = time.perf_counter()
                variant.step()
                times[variant.name].append(time.perf_counter() - begin)
        del variants, variant
        for name, values in times.items():
            rows.append(
                {
                    "benchmark": "reinsertion_step", "block": f"{start}-{start + LAYERS_IN_BLOCK - 1}", "variant": name,
                    "target": arguments.target, "data": source, "tokens": tokens,
                    "ms": round(statistics.median(values) * 1e3, 1), "p20_ms": round(percentile(values, 0.2) * 1e3, 1),
                    "p80_ms": round(percentile(values, 0.8) * 1e3, 1), "gflop": round(counted[name] / 1e9, 1),
                    "gflop_per_s": round(counted[name] / 1e9 / statistics.median(values), 1),
                    "peak_mib": round(peak_memory(name, start, arguments.target, arguments.tokenizer) / 2**20),
                }
            )  # fmt: skip
            r = rows[-1]
            print(f"{r['block']:>7} {name:>11} {r['ms']:8.1f} {r['p20_ms']:8.1f} {r['p80_ms']:8.1f} {r['gflop']:8.1f} "
                  f"{r['gflop_per_s']:8.1f} {r['peak_mib']:9d}", flush=True)  # fmt: skip
        a, b = rows[-2:]
        print(
            f"{'':7} step {a['ms'] / b['ms']:.2f}x faster (FLOPs predict {a['gflop'] / b['gflop']:.2f}x), "
            f"peak memory {b['peak_mib'] / a['peak_mib']:.2f}x"
        )
    if arguments.csv:
        add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
