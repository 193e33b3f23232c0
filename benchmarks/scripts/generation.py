"""Greedy continuations of a file's questions, beside transformers' `generate` as OpenUnlearning's evaluation calls it.

    python benchmarks/scripts/generation.py MODEL_FOLDER QUESTIONS.jsonl [--prompts 64] [--new-tokens 200] [--csv FILE]

As OpenUnlearning: batches of 32 in the file's order, left-padded, `model.generate(do_sample=False, max_new_tokens=200)`
(its configs/generation/default.yaml, which the static cache of transformers is tried with too). Each question is a
user's turn of the tokenizer's chat template. One run of each variant in turn, of the same model; times_as_fast is by
processor time on a CPU, so that others' work does not count. equal: share of the continuations that are those of the
first variant.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.benchmarks.measure import add_rows, percentile, script_parser
from kunbr_fast.measures.generation import TOKENS_AT_ONCE, generate

BATCH = 32  # OpenUnlearning's eval.batch_size
DYNAMIC, STATIC, OURS = "transformers", "transformers, static cache", "kunbr-fast"
Prompts = list[list[int]]


def transformers_generate(model: nn.Module, prompts: Prompts, new: int, end: int, **how: str) -> Prompts:
    found = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        settings = dict(do_sample=False, top_p=None, temperature=None, max_new_tokens=new, use_cache=True)
        made = model.generate(ids, attention_mask=mask, pad_token_id=end, eos_token_id=end, **settings, **how)
        for row in made[:, width:].tolist():
            found.append(row[: row.index(end)] if end in row else row)
    return found


def variants(model: nn.Module, prompts: Prompts, new: int, end: int, at_once: int) -> dict[str, Callable[[], Prompts]]:
    return {
        DYNAMIC: lambda: transformers_generate(model, prompts, new, end),
        STATIC: lambda: transformers_generate(model, prompts, new, end, cache_implementation="static"),
        OURS: lambda: generate(model, prompts, max_new_tokens=new, stop=frozenset([end]), tokens_at_once=at_once),
    }


def measured(runs: dict[str, Callable[[], Prompts]], rounds: int) -> tuple[dict[str, list[tuple]], dict[str, Prompts]]:
    """Seconds (of the processor, of the clock) of each variant's rounds, and what it has made."""
    times: dict[str, list[tuple]] = {name: [] for name in runs}
    made = {}
    for _ in range(rounds):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            made[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.process_time() - processor, time.perf_counter() - clock))
            print(f"{name}: {times[name][-1][1]:.1f} s, {times[name][-1][0]:.1f} s of the processor", flush=True)
    return times, made


def main(given: list[str] | None = None) -> None:
    import transformers

    parser = script_parser(__doc__)
    parser.add_argument("model", type=Path, help="a folder of a model that fits in memory")
    parser.add_argument("questions", type=Path, help='lines with a "question"')
    for name, default in (("prompts", 64), ("new-tokens", 200), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens-at-once", type=int, default=TOKENS_AT_ONCE)
    parser.add_argument("--variants", nargs="+", default=[DYNAMIC, STATIC, OURS], choices=[DYNAMIC, STATIC, OURS])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    device, new = "cuda" if torch.cuda.is_available() else "cpu", options.new_tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.eval().to(device)
    lines = options.questions.read_text(encoding="utf-8").splitlines()[: options.prompts]
    turns = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    runs = variants(model, prompts, new, tokenizer.eos_token_id, options.tokens_at_once)
    with torch.no_grad():
        times, made = measured({name: runs[name] for name in options.variants}, options.rounds)
    rows = []
    for name, found in times.items():
        ratios = [first[0 if device == "cpu" else 1] / own[0 if device == "cpu" else 1]
                  for first, own in zip(times[options.variants[0]], found)]  # fmt: skip
        equal = [ours == theirs for ours, theirs in zip(made[name], made[options.variants[0]])]
        row = {"benchmark": "generation", "model": options.model.name, "dtype": options.dtype, "variant": name}
        row |= {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "new_tokens": new}
        row |= {"made": sum(map(len, made[name])), "equal": round(sum(equal) / len(equal), 3), "rounds": len(found)}
        row |= {"cpu_seconds": round(percentile([x for x, _ in found], 0.5), 2)}
        row |= {"seconds": round(percentile([x for _, x in found], 0.5), 2)}
        row |= {f"times_as_fast{part}": round(percentile(ratios, share), 2)
                for part, share in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))}  # fmt: skip
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_rows(options.csv, rows, device)


if __name__ == "__main__":
    main()
