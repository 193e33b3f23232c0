"""Predicted and measured memory of re-insertion and warm-up steps: what `kunbr-fast plan` says, and what is.

    python benchmarks/scripts/bench_plan.py --csv benchmarks/results/cpu_plan.csv

Three models of random weights on a CPU, each stage in a process of its own: the most that is resident during two steps
(VmHWM), less what was resident once the same had been done with a tiny model (VmRSS): Python, its libraries, the
samples. The stage's whole memory, so: weights, block, gradient, optimiser state, prefix cache, activations, logits.
Of a streamed warm-up the files in which trained layers lie are mapped, and counted as resident, so predicted too.
With --gpu instead, on a GPU: a streamed warm-up of eight of Llama-3-8B's layers, the most that torch allocates there.
Then Llama-3-8B in bf16 on torch's meta device, as count_step.py counts it: the transient part alone, of blocks at the
bottom, in the middle and at the top. The last column is predicted over measured; the goal is 0.9 to 1.1.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import ChainMap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from kunbr_fast.benchmarks.measure import add_rows, resident, script_parser
from kunbr_fast.benchmarks.scripts import count_step
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.planning.costs import Architecture, Batch, Step
from kunbr_fast.planning.lengths import Data
from kunbr_fast.planning.machines import Setup
from kunbr_fast.planning.predict import Run
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.training.fine_tune import full_training
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.reinserted import reinserted

SMALL = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4
)
SMOLLM2 = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
)
MODELS = {
    "SmolLM2-135M": lambda: LlamaConfig(**SMOLLM2, vocab_size=49152, tie_word_embeddings=True),
    "Llama-60M": lambda: LlamaConfig(**SMALL, vocab_size=32000),
    "GPT-2-124M": lambda: GPT2Config(),
}
BATCH = 6
# block start (None: the warm-up), gradient checkpointing, streamed
STAGES = [(0, False, False), (0, True, False), (None, False, False), (None, False, True)]
# glibc by itself keeps freed pieces of up to 32 MiB in its heap, where they lie in each other's way
HEAPS = {"VmHWM, pages given back": {"MALLOC_MMAP_THRESHOLD_": "262144"}, "VmHWM": {}}


def samples(name):
    return count_step.questions(2 * BATCH, MODELS[name]().vocab_size, "all")


def settings(checkpoint):
    return KUnBRConfig(
        batch_size=BATCH, gradient_checkpointing=checkpoint, rtt=False, block_epochs=1, warmup_epochs=1, impl="torch"
    )


def predicted(name, dtype, start, checkpoint, streamed):
    config, data = MODELS[name](), samples(name)
    a = Architecture.of(config, config.model_type, dtype)
    sizes = [(len(s["input_ids"]), len(s["input_ids"]) - 1) for s in data]
    run = Run(a, Data(sizes[:BATCH], sizes[BATCH:], [], []), settings(checkpoint), Setup("cpu", stream=streamed))
    found = run.stage("", run.warm_up() if start is None else run.block(range(start, start + 3)))
    return found.peak + found.store


def alone(name, dtype, start, checkpoint, streamed):
    """Runs in a process of its own; prints bytes."""
    data = samples(name)
    small = MODELS[name]()
    for key, value in dict(vocab_size=64, hidden_size=64, num_attention_heads=4, num_hidden_layers=4).items():
        setattr(small, key, value)
    if small.model_type != "gpt2":
        small.num_key_value_heads, small.intermediate_size, small.head_dim = 2, 128, 16
    few = [{key: value[:8] % 64 for key, value in sample.items()} for sample in data]
    for _ in range(2):  # libraries load parts of themselves when they are first used
        run(small, few, dtype, None if start is None else 0, checkpoint, streamed)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    print(json.dumps(run(MODELS[name](), data, dtype, start, checkpoint, streamed) - before))


def run(config, data, dtype, start, checkpoint, streamed):
    """The most resident bytes of this process in two steps of a stage."""
    torch.manual_seed(0)
    if streamed:
        return streamed_warm_up(config, data, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    decoder = Decoder(model)
    if start is None:
        with frozen(model), fused(model, "torch"):
            training = FullTraining(decoder, lr=1e-5, optimizer="lion", gradient_checkpointing=checkpoint, impl="torch")
            return steps(lambda: training.step_packed(training.criterion.step_batch(count_step.pack(data), BATCH)))
    with tempfile.TemporaryDirectory() as scratch:
        values = ChainMap({}, WeightSnapshot.save(model, Path(scratch) / "weights.safetensors"))
        cache = PrefixCache(decoder, data, "host")
        cache.advance(start)
        block = range(start, start + 3)
        with reinserted(decoder, values, block, 1e-5, gradient_checkpointing=checkpoint, impl="torch") as training:
            batch = training.criterion.step_batch
            return steps(lambda: training.step_packed(batch(cache.batch(range(2 * BATCH)), BATCH)))


def streamed_warm_up(config, data, dtype):
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
        gc.collect()
        decoder = Decoder(open_streamed(folder))
        with frozen(decoder.model), decoder.weights.writable(folder):
            training = full_training(decoder, lr=1e-5, optimizer="lion", impl="torch", place=Place("host"))
            return steps(lambda: training.step_packed(training.criterion.step_batch(count_step.pack(data), BATCH)))


def steps(step):
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: building the model is no part of it
    for _ in range(2):
        step()
    return resident("VmHWM")


def on_cpu(name, dtype, heaps):
    for start, checkpoint, streamed in STAGES:
        command = [sys.executable, __file__, "--alone", name, "--dtype", dtype, "--checkpoint", str(int(checkpoint))]
        command += ([] if start is None else ["--start", str(start)]) + ["--streamed"] * streamed
        stage = "warm-up" + ", streamed" * streamed if start is None else f"re-insertion {start}-{start + 2}"
        ours = predicted(name, dtype, start, checkpoint, streamed)
        for by, heap in ((by, HEAPS[by]) for by in heaps):
            out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **heap}).stdout
            yield row(name, dtype, stage, checkpoint, by, ours, json.loads(out.splitlines()[-1]))


def on_meta():
    name, dtype = "Llama-3-8B", torch.bfloat16
    a = Architecture.of(count_step.build(name, dtype).config, "llama", "bfloat16")
    data = count_step.questions(2 * BATCH, a.vocabulary, "all")
    batch = Batch.of([(len(s["input_ids"]), len(s["input_ids"]) - 1) for s in data])
    for start in (0, 12, 26):
        block = range(start, start + 4)
        found = count_step.ours(count_step.build(name, dtype), block, data[:BATCH], data[BATCH:])
        step = Step(a, batch, block, torch=False, start=start)
        ours = sum(step.memory().values())
        yield row(name, "bfloat16", f"step {start}-{start + 3}", False, "count_step", ours, found["peak_bytes"])
        print(f"{'':12} FLOPs predicted / counted {step.flops() / found['flops']:.4f}")


# how many layers stay on the device, and how half-precision weights take small updates
STREAMED = [(0, "none"), (0, "stochastic"), (2, "fp32")]


def on_gpu(device="cuda", **shape):
    """Streamed warm-ups of a model with random weights, two steps each."""
    name, sizes = "8 layers of Llama-3-8B", count_step.MODELS["Llama-3-8B"]
    shape = dict(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads, vocab_size=sizes.vocabulary, num_hidden_layers=8,
    ) | shape  # fmt: skip
    config, data = LlamaConfig(**shape), count_step.questions(2 * BATCH, shape["vocab_size"], "all")
    a = Architecture.of(config, "llama", "bfloat16")
    lengths = [(len(s["input_ids"]), len(s["input_ids"]) - 1) for s in data]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        gc.collect()
        for resident, masters in STREAMED:
            how = dict(cache="device", resident_layers=resident, warmup_master_weights=masters)
            how = KUnBRConfig(batch_size=BATCH, rtt=False, warmup_epochs=1, **how)
            run = Run(a, Data(lengths[:BATCH], lengths[BATCH:], [], []), how, Setup("h100", stream=True))
            measured = on_device(folder, device, data, how)
            stage = f"warm-up, streamed, {resident} resident, masters {masters}"
            yield row(name, "bfloat16", stage, False, "allocated", run.stage("", run.warm_up()).peak, measured)


def on_device(folder, device, data, how):
    """The most bytes that are allocated on the device."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(open_streamed(folder, device, host_bytes=1 << 40, resident_layers=how.resident_layers))
    with frozen(decoder.model), fused(decoder.model, "auto"), decoder.weights.writable(folder):
        training = full_training(decoder, settings=how.full_settings(), place=Place("device"))
        for _ in range(2):
            training.step_packed(training.criterion.step_batch(count_step.pack(data).to(device), BATCH))
    return torch.cuda.max_memory_allocated() if device == "cuda" else 1


def row(name, dtype, stage, checkpoint, by, ours, measured):
    found = dict(
        benchmark="plan", model=name, dtype=dtype, stage=stage, checkpointing=checkpoint, measured_by=by,
        predicted_mib=round(ours / 2**20), measured_mib=round(measured / 2**20),
        predicted_over_measured=round(ours / measured, 3),
    )  # fmt: skip
    print(
        f"{name:>12} {dtype:>8} {stage:>18} {'checkpointed' if checkpoint else '':>12} "
        f"{found['predicted_mib']:6d} MiB predicted, {found['measured_mib']:6d} measured, "
        f"{found['predicted_over_measured']:.3f} ({by})",
        flush=True,
    )
    return found


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS), help="[all]")
    parser.add_argument("--heap", choices=list(HEAPS), nargs="+", default=list(HEAPS), help="[both]")
    parser.add_argument("--no-meta", action="store_true", help="leave Llama-3-8B out")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, and nothing on the CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="on the CPU [float32]")
    parser.add_argument("--alone", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--streamed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        how = bool(arguments.checkpoint), arguments.streamed
        return alone(arguments.alone, arguments.dtype, arguments.start, *how)
    if arguments.gpu:
        return add_rows(arguments.csv, list(on_gpu()))
    rows = [found for name in arguments.model for found in on_cpu(name, arguments.dtype, arguments.heap)]
    rows += [] if arguments.no_meta else list(on_meta())
    add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
