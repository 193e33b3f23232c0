"""From how many tokens on fused layers are faster than a model's own, launched one by one: `model.patch.WORTH`.

    python benchmarks/scripts/fused_layers.py [--models Llama-3.2-1B] [--csv FILE]

Four layers of each shape, bf16, SDPA. Milliseconds a layer of a forward, and of a forward and backward (gradients of
all weights), the model's own code and fused layers in turns, the host's time included: eight passes are queued, then
the device is waited for. weights x tokens is what decides: it is what the products take, while a launch's price is the
same at any size.
"""

import functools
import statistics
import time

import torch

from kunbr_fast.benchmarks.measure import add_rows, script_parser
from kunbr_fast.benchmarks.models import build, matrices
from kunbr_fast.benchmarks.shapes import MODELS, Shape
from kunbr_fast.model.patch import fused

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
LENGTH, LAYERS, PASSES = 128, 4, 8


def seconds(run, device):
    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    for _ in range(PASSES):
        run()
    return (now() - begin) / PASSES


def run(decoder, hidden, backward):
    with torch.set_grad_enabled(backward):
        out = decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
    if backward:
        torch.autograd.grad(out, [*decoder.layers.parameters(), hidden], out.detach())


def measured(name, shape, device, tokens, rounds):
    model = build(name, torch.bfloat16, device, shape)
    for count in tokens:
        hidden = torch.randn(count // LENGTH, LENGTH, shape.hidden, device=device, dtype=torch.bfloat16)
        hidden.requires_grad_()
        for backward in (False, True):
            one = functools.partial(run, model.model, hidden, backward)
            found = {False: [], True: []}
            for number in range(rounds + 1):
                for side in found:
                    if side:
                        with fused(model, "auto"):
                            took = seconds(one, device)
                    else:
                        took = seconds(one, device)
                    if number:  # the first compiles
                        found[side].append(1e3 * took / LAYERS)
            own, ours = (statistics.median(found[side]) for side in (False, True))
            yield dict(
                benchmark="fused_layers", model=name, tokens=count, backward=backward,
                weights_x_tokens=f"{matrices(shape) * count:.2e}", own_ms=round(own, 3), fused_ms=round(ours, 3),
                ratio=round(statistics.median(b / a for a, b in zip(found[False], found[True])), 3), rounds=rounds,
            )  # fmt: skip


def main(arguments=None):
    parser = script_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["Llama-3.2-1B", "Llama-3-8B"], choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help=f"multiples of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="hidden size 64: whether the script runs")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in options.models:
        whole = MODELS[name]
        if options.tiny:
            whole = Shape(64, 128, LAYERS, 4, 2, 64)
        shape = Shape(whole.hidden, whole.intermediate, LAYERS, whole.heads, whole.key_value_heads, 512)
        for row in measured(name, shape, device, options.tokens, options.rounds):
            print(row, flush=True)
            add_rows(options.csv, [row], device)


if __name__ == "__main__":
    main()
