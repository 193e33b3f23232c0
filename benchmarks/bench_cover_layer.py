"""One cover layer and one active layer, patched and not: bytes kept for the backward pass, and time.

    python benchmarks/bench_cover_layer.py --csv benchmarks/results/cpu_cover_layer.csv

Shapes are those of a named model with every width divided by --divide (heads keep their size); bytes a token in units
of the hidden size do not depend on it. Kept bytes are counted (saved_tensors_hooks, each storage once, no weights), not
timed. The gate: the same output and input gradient, patched and not.
"""

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import add_rows, interleaved, percentile

GPU = torch.cuda.is_available()
MODELS = {  # hidden, intermediate, heads, key and value heads
    "Llama-3-8B": (4096, 14336, 32, 8),
    "Llama-3.2-1B": (2048, 8192, 32, 8),
    "SmolLM2-135M": (576, 1536, 9, 3),
}


def build(name, divide, dtype, device):
    hidden, intermediate, heads, kv_heads = MODELS[name]
    width = hidden // heads
    heads, kv_heads = max(1, heads // divide), max(1, kv_heads // divide)
    config = LlamaConfig(
        vocab_size=256, hidden_size=heads * width, intermediate_size=intermediate // divide, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def kept_bytes(layer, run):
    """Bytes of what autograd keeps of one call, each storage once; no weights, no rotary angles."""
    found = {}
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="Llama-3-8B" if GPU else "SmolLM2-135M")
    parser.add_argument("--divide", type=int, default=1, help="widths by this [%(default)s]")
    parser.add_argument("--tokens", type=int, default=4096 if GPU else 512, help="[%(default)s]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if GPU else "float32")
    parser.add_argument("--device", default="cuda" if GPU else "cpu")
    parser.add_argument("--impl", default="triton" if GPU else "torch", help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=12.0, help="for the rounds of each row [%(default)s]")
    parser.add_argument("--csv", help="append rows here")
    arguments = parser.parse_args()
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    model = build(arguments.model, arguments.divide, dtype, device)
    layer, hidden_size = model.model.layers[0], model.config.hidden_size
    x = torch.randn(1, arguments.tokens, hidden_size, device=device).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    with torch.no_grad():
        places = torch.arange(arguments.tokens, device=device)[None]
        angles = model.model.rotary_emb(x, places)
    shared = sum(a.untyped_storage().nbytes() for a in angles)
    rows = []
    for role in ("cover", "active"):
        model.requires_grad_(role == "active")
        wanted = [x, *(p for p in layer.parameters() if role == "active")]

        def forward():
            return layer(x, position_embeddings=angles, attention_mask=None)

        def once(patched):
            if not patched:
                y = forward()
                return y, torch.autograd.grad(y, wanted, dy)[0]  # noqa: B023
            with kf.patched(model, impl=arguments.impl):
                y = forward()
                return y, torch.autograd.grad(y, wanted, dy)[0]  # noqa: B023

        (y, dx), (own_y, own_dx) = once(True), once(False)
        limit = 4 * torch.finfo(dtype).eps
        for a, b in ((y, own_y), (dx, own_dx)):
            error = float((a.detach() - b.detach()).float().norm() / b.detach().float().norm())
            if not error <= limit:
                sys.exit(f"{role}: patched and not differ by {error:.1e} (limit {limit:.1e}): no numbers")
        kept = {"own": kept_bytes(layer, forward) - shared}
        with kf.patched(model, impl=arguments.impl):
            kept["patched"] = kept_bytes(layer, forward) - shared
        times, others = interleaved(
            {"own": lambda: once(False), "patched": lambda: once(True)}, device, 200, arguments.seconds
        )
        for name in ("own", "patched"):
            values = times[name]
            rows.append(
                {
                    "benchmark": "cover_layer", "model": arguments.model, "divide": arguments.divide, "role": role,
                    "variant": name, "impl": arguments.impl if name == "patched" else "", "tokens": arguments.tokens,
                    "dtype": arguments.dtype, "kept_bytes": kept[name],
                    "kept_per_token_and_d": round(kept[name] / arguments.tokens / hidden_size, 2),
                    "kept_over_own": round(kept[name] / kept["own"], 3),
                    "ms": round(sorted(values)[len(values) // 2], 3), "p20_ms": round(percentile(values, 0.2), 3),
                    "p80_ms": round(percentile(values, 0.8), 3), "rounds": len(values),
                    "own_over_this": round(sorted(a / b for a, b in zip(times["own"], values))[len(values) // 2], 3),
                    "others_cores": "" if others is None else round(others, 2),
                }
            )  # fmt: skip
            r = rows[-1]
            print(f"{role:<7} {name:<8} kept {r['kept_per_token_and_d']:6.2f} bytes a token and D ({r['kept_over_own']:.2f}) "
                  f"{r['ms']:9.2f} ms ({r['own_over_this']:.2f}x)")  # fmt: skip
    if arguments.csv:
        add_rows(arguments.csv, rows, kernels=True)


if __name__ == "__main__":
    main()
