"""Knowledge density of a whole model, end to end, against one backward pass for each sample.

    python benchmarks/bench_density_model.py                  # CPU: 8 layers of SmolLM2-135M; GPU: Llama-3-8B
    python benchmarks/bench_density_model.py --csv benchmarks/results/gpu_density_model.csv

Random weights, random tokens of the lengths that questions have, loss on every token. Variants, in turn in one process:
  torch, triton  kf.knowledge_density(..., impl=...): MLP weights, grad_l1, packed batches
  loop           what it replaces: for each sample the model's own forward and backward, gradients for the MLP's weights
                 only, .grad.abs().sum()
  plain          the same packed forward and backward passes with no gradient of any weight
  products       of one layer, dy_i.T @ x_i of each sample written to memory, times the number of layers

Goals on an H200: loop / ours at least 5, ours / (plain + products) at most 1.15, memory beyond plain's under 1 % of
the model. Before timing, ours and the loop must agree on a small sibling model, and on the timed one to its rounding.
"""

import argparse
import dataclasses
import os
import statistics
import sys

import torch
import torch.nn.functional as F
from bench_grad_density import Case, bare
from transformers import LlamaConfig, LlamaForCausalLM

import kunbr_fast as kf
from kunbr_fast import dispatch, losses
from kunbr_fast.benchmarks.measure import add_rows, interleaved, peak_memory, percentile, spare_cores
from kunbr_fast.benchmarks.shapes import MODELS, ragged
from kunbr_fast.data import pack
from kunbr_fast.decoder import Decoder
from kunbr_fast.kernels import operators  # noqa: F401  registers its kernels
from kunbr_fast.schedule import token_batches
from kunbr_fast.training import frozen

GPU = torch.cuda.is_available()
BATCH_TOKENS = 2048
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of a layer's density on the small sibling
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # and of all layers' on the timed model


def build(shape, layers, dtype, device):
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2048, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def draw(lengths, vocabulary):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


# ---------------------------------------------------------------- variants: each returns (H,) float64 or None


def ours(decoder, samples, impl):
    return lambda: kf.knowledge_density(decoder, samples, impl=impl, batch_tokens=BATCH_TOKENS).per_layer


def loop(decoder, samples):
    model, device, wide = decoder.model, decoder.device, torch.promote_types(decoder.dtype, torch.float32)
    weights = [[p for n, p in layer.named_parameters() if n.startswith("mlp.")] for layer in decoder.layers]
    inputs = [sample["input_ids"].to(device) for sample in samples]

    def run():
        sums = torch.zeros(len(weights), dtype=torch.float64, device=device)
        with frozen(model):
            for layer in weights:
                for weight in layer:
                    weight.requires_grad_()
            for ids in inputs:  # the models' own loss rounds logits to fp32, which would show in the gate
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                F.cross_entropy(logits.to(wide), ids[1:]).backward()
                for index, layer in enumerate(weights):
                    for weight in layer:
                        sums[index] += weight.grad.abs().sum(dtype=wide)
                        weight.grad = None
        return sums.cpu() / len(samples)

    return run


def plain(decoder, samples, impl):
    batches = [[samples[i] for i in indices] for indices in batches_of(samples)]

    def run():
        with frozen(decoder.model):
            for group in batches:
                batch = pack(group).to(decoder.device)
                with torch.no_grad():
                    embedded = decoder.embed(batch)
                hidden = decoder.run(batch, 0, None, embedded.requires_grad_())
                rows = losses.likelihood(batch, reduction="sum")
                loss, _ = losses.linear_loss(
                    decoder.final(hidden[batch.rows]), decoder.head, batch.targets, rows.weight, impl=impl
                )
                del hidden
                loss.backward(inputs=[embedded])

    return run


def products(decoder, samples, shape):
    """Of one layer: gate, up and down."""
    runs = []
    for indices in batches_of(samples):
        lengths = [len(samples[i]["input_ids"]) for i in indices]
        for name, count in (("up", 2), ("down", 1)):
            run = bare(Case.draw(*shape.projections()[name], lengths, decoder.dtype, decoder.device))
            runs += [run] * count
    return lambda: [run() for run in runs] and None


def batches_of(samples):
    return token_batches([len(s["input_ids"]) for s in samples], BATCH_TOKENS)


# ---------------------------------------------------------------- the whole run


def worst(a, b):
    return float(((a - b).abs() / b).max()) if a.isfinite().all() else float("inf")


def gate(shape, device, impls):
    """Ours against the loop on a small sibling of two layers: exit where they differ."""
    small = dataclasses.replace(shape, hidden=16 * shape.heads, intermediate=40 * shape.heads, vocabulary=1024)
    for impl in impls:
        dtype = torch.float32 if impl == "triton" else torch.float64
        decoder = Decoder(build(small, 2, dtype, device))
        samples = draw([3, 40, 17, 131], small.vocabulary)
        error = worst(ours(decoder, samples, impl)(), loop(decoder, samples)())
        print(
            f"gate: {impl} against the loop, {dtype}: largest relative difference {error:.1e} (limit {LIMITS[dtype]})"
        )
        if not error <= LIMITS[dtype]:
            sys.exit("ours and the loop measure different things: no numbers")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="Llama-3-8B" if GPU else "SmolLM2-135M")
    parser.add_argument("--layers", type=int, default=None if GPU else 8, help="[8; on a GPU the model's]")
    parser.add_argument("--samples", type=int, default=96 if GPU else 12, help="[%(default)s]")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16" if GPU else "float32", help="[%(default)s]"
    )
    parser.add_argument("--device", default="cuda" if GPU else "cpu", help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=5 if GPU else 3, help="rounds [%(default)s]")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the rounds [%(default)s]")
    parser.add_argument("--csv", help="append rows here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: interpreted kernels are not what is measured; unset it")
    shape, dtype, device = MODELS[arguments.model], getattr(torch, arguments.dtype), arguments.device
    layers = arguments.layers or shape.layers
    missing = dispatch.why_not("grad_density", "triton", device)
    impls = ["torch"] if missing else ["triton", "torch"]
    gate(shape, device, impls)
    decoder = Decoder(build(shape, layers, dtype, device))
    model_bytes = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    lengths = ragged(arguments.samples)
    samples = draw(lengths, shape.vocabulary)
    running = {impl: ours(decoder, samples, impl) for impl in impls}
    running |= {"loop": loop(decoder, samples), "plain": plain(decoder, samples, impls[0])}
    running["products"] = products(decoder, samples, shape)
    found = {name: run() for name, run in running.items()}
    for impl in impls:
        error = worst(found[impl], found["loop"])
        print(f"gate: {impl} against the loop on the timed model: {error:.1e} (limit {SAME[dtype]})")
        if not error <= SAME[dtype]:
            sys.exit("ours and the loop differ: no numbers")
    peaks = {name: peak_memory(run, device) for name, run in running.items()}
    times, others = interleaved(running, device, arguments.repeats, arguments.seconds)
    times["products"] = [layers * value for value in times["products"]]
    floor = [a + b for a, b in zip(times["plain"], times["products"])]
    disturbed = others is not None and others > spare_cores()
    print(f"\n{arguments.model} shapes, {layers} layers, {arguments.dtype}, {len(samples)} samples, {sum(lengths)} "
          f"tokens in {len(batches_of(samples))} batches, {torch.get_num_threads()} threads"
          + (f", DISTURBED: others used {others:.2f} cores" if disturbed else ""))  # fmt: skip
    print(f"{'variant':<10} {'ms':>10} {'p20':>10} {'p80':>10} {'loop is':>8} {'/ (plain + products)':>21} "
          f"{'peak MiB':>9} {'beyond plain':>13}")  # fmt: skip
    rows = []
    for name, values in times.items():
        gain = statistics.median(b / a for a, b in zip(values, times["loop"]))
        over = statistics.median(a / b for a, b in zip(values, floor))
        peak = "" if peaks[name] is None or name == "products" else round(peaks[name] / 2**20)
        beyond = (
            ""
            if peaks[name] is None or name in ("plain", "products")
            else round(100 * (peaks[name] - peaks["plain"]) / model_bytes, 2)
        )
        rows.append(
            {
                "benchmark": "density_model", "model": arguments.model, "layers": layers, "samples": len(samples),
                "tokens": sum(lengths), "longest": max(lengths), "dtype": arguments.dtype, "variant": name,
                "ms": round(statistics.median(values), 2), "p20_ms": round(percentile(values, 0.2), 2),
                "p80_ms": round(percentile(values, 0.8), 2), "rounds": len(values), "loop_over_this": round(gain, 3),
                "over_plain_and_products": round(over, 3), "peak_mib": peak, "beyond_plain_percent_of_model": beyond,
                "others_cores": "" if others is None else round(others, 2),
            }
        )  # fmt: skip
        r = rows[-1]
        print(f"{name:<10} {r['ms']:10.1f} {r['p20_ms']:10.1f} {r['p80_ms']:10.1f} {gain:7.2f}x {over:21.3f} {peak:>9} "
              f"{beyond:>12}{'%' * (beyond != '')}")  # fmt: skip
    if GPU and "triton" in times:
        r = rows[0]
        for what, value, met, wanted in (
            ("times the loop", r["loop_over_this"], r["loop_over_this"] >= 5, ">= 5"),
            ("over plain + products", r["over_plain_and_products"], r["over_plain_and_products"] <= 1.15, "<= 1.15"),
            ("% of the model beyond plain", r["beyond_plain_percent_of_model"],
             r["beyond_plain_percent_of_model"] < 1, "< 1"),
        ):  # fmt: skip
            print(f"goal {'met   ' if met else 'MISSED'} triton {what}: {value}, wanted {wanted}")
    if arguments.csv:
        add_rows(arguments.csv, rows, kernels=True)


if __name__ == "__main__":
    main()
