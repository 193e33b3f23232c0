"""A full-parameter step of a streamed model, beside that of the same model in memory, in one run.

    python benchmarks/scripts/streamed_step.py [--hidden 4096 --intermediate 14336 --layers 8] [--csv FILE]

A Llama with random weights, gradient difference with Lion, 6 + 6 samples of WMDP's lengths a step (or --samples 100:
100 + 100). The model's files were written just before, so they are in the page cache. One step of each variant in turn,
in wall-clock time. What is counted beside it: bytes to the device and from it (`LayerStream.traffic`), and their rate
over the step's time; FLOPs, 6 for each parameter in a matrix and token.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kunbr_fast.benchmarks.measure import add_rows, percentile, script_parser
from kunbr_fast.benchmarks.shapes import questions
from kunbr_fast.files.models import load_model
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.training.fine_tune import full_training

HEADS = 128  # width of a head
VARIANTS = {
    "in memory": None,
    "streamed, main memory": {"host_bytes": 1 << 40},
    "streamed, files": {"host_bytes": 0},
    "streamed, half of the layers resident": {"host_bytes": 1 << 40, "resident_layers": 0.5},
}


class Steps:
    """The steps of one variant."""

    def __init__(self, name: str, path: Path, device: str, buffers: int, data: tuple, stack: contextlib.ExitStack):
        how = dict(VARIANTS[name] or {})
        if VARIANTS[name] is None:
            model = load_model(path, None, device)
        else:
            layers = LlamaConfig.from_pretrained(path).num_hidden_layers
            how["resident_layers"] = int(how.get("resident_layers", 0) * layers)
            model = open_streamed(path, device, buffers=buffers, **how)
        decoder = Decoder(model)
        self.stream = decoder.weights if decoder.streamed else None
        if self.stream is not None:
            stack.enter_context(self.stream.writable(path))
        stack.enter_context(frozen(model))
        stack.enter_context(fused(model, "auto"))
        self.training = full_training(decoder, lr=1e-7, optimizer="lion")
        self.data, self.device = data, device
        self.seconds: list[float] = []
        self.moved: dict[str, int] = {}
        self.peak = 0

    def step(self) -> None:
        before = dict(self.stream.traffic) if self.stream else {}
        self._settle()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        begin = time.perf_counter()
        self.training.step(*self.data)
        self._settle()
        self.seconds.append(time.perf_counter() - begin)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - held)
        self.moved = {k: v - before.get(k, 0) for k, v in self.stream.traffic.items()} if self.stream else {}

    def _settle(self) -> None:
        if self.stream is not None:
            self.training.state()  # which waits until all that was written is there
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = script_parser(__doc__)
    for name, default in (("hidden", 512), ("intermediate", 2048), ("layers", 8), ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--buffers", type=int, default=2, help="of layers, as of open_streamed")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    D, I, H = arguments.hidden, arguments.intermediate, arguments.layers  # noqa: E741
    heads = max(1, D // HEADS)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=D, intermediate_size=I, num_hidden_layers=H,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    forget = questions(arguments.samples, config.vocab_size)
    retain = [{name: x.flip(0) for name, x in sample.items()} for sample in forget]
    tokens = 2 * sum(len(sample["input_ids"]) for sample in forget)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        with torch.device(device):
            LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).save_pretrained(folder)
        made = {
            n: Steps(n, Path(folder), device, arguments.buffers, (forget, retain), stack) for n in arguments.variants
        }
        for _ in range(arguments.rounds + 1):
            for steps in made.values():
                steps.step()
    flops = 6 * tokens * H * (4 * D * D + 3 * D * I)
    first, rows = next(iter(made.values())), []
    for name, steps in made.items():
        found = steps.seconds[1:]
        ratios = [x / y for x, y in zip(found, first.seconds[1:])]
        seconds, moved = percentile(found, 0.5), steps.moved
        row = {"benchmark": "streamed_step", "variant": name, "hidden": D, "intermediate": I, "layers": H}
        row |= {"buffers": arguments.buffers, "dtype": arguments.dtype, "tokens": tokens, "ms": round(1e3 * seconds, 2)}
        row |= {"ratio": round(percentile(ratios, 0.5), 3), "ratio_p20": round(percentile(ratios, 0.2), 3)}
        row |= {"ratio_p80": round(percentile(ratios, 0.8), 3), "tflops": round(flops / seconds / 1e12, 3)}
        row |= {what: moved.get(what, 0) for what in ("weights_in", "weights_out", "state_in", "state_out")}
        row |= {"gb_s": round(sum(moved.values()) / seconds / 1e9, 2), "peak_mib": round(steps.peak / 2**20)}
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
