"""Seconds of a measure, OpenUnlearning's and ours, on the same model, records and machine, in one run.

    git clone https://github.com/locuslab/open-unlearning; pip install '.[open-unlearning]'
    python benchmarks/scripts/evaluation.py --checkout open-unlearning --model runs/smollm2 [--records 40] [--csv FILE]

Theirs is the checkout's metric with its TOFU settings: batches of 32, padded, logits of all positions, a pass for each
metric (a metric's own parts, such as truth ratio's two probabilities, are passes too). Ours is `kf.evaluate` with that
measure alone, all of it: tokens, Decoder and its self-check, the pass, standard errors. Last all of them: theirs one by
one, as OpenUnlearning makes them, ours in one call. On a CPU the seconds are the processor's, of all threads
(OMP_NUM_THREADS=1 has those of one core, whoever else is on the machine). Rounds in turns; before them the first case
runs once, unmeasured (on a GPU each one). The ratio is the median over rounds of theirs / ours.

Records are TOFU's form, made of the questions of a file (--questions, RTT's four-choice form): a sentence as answer,
the same in other words, and three wrong ones. Without --model: a Llama of --shape with random weights and --tokenizer.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers as tf

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import about
from kunbr_fast.integrations.open_unlearning_trainers import get_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHAPES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip
COLUMNS = (
    "measure records tokens_new model device dtype theirs_s ours_s ratio p20 p80 rounds threads torch transformers "
    "commit command"
).split()
LIKELIHOODS = "probability truth_ratio exact_memorisation extraction_strength"
ATTACKS = "mia_loss mia_zlib mia_min_k mia_min_k_plus_plus"


def lines(path: Path, number: int, first: int) -> list[dict[str, Any]]:
    """TOFU's form, of four-choice questions."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[first : first + number]]
    made = []
    for one in found:
        right = one["choices"][one["answer"]]
        asked = one["question"].rstrip("?. ")
        wrong = [choice for choice in one["choices"] if choice != right]
        made.append(
            {
                "question": one["question"],
                "answer": f"The answer to the question, {asked[0].lower()}{asked[1:]}, is {right}, as is well known.",
                "paraphrased_answer": f"It is well known that it was {right}: {asked}.",
                "perturbed_answer": [f"It is well known that it was {choice}: {asked}." for choice in wrong],
            }
        )
    return made


def metrics(theirs: Any, model: Any, new: int) -> dict[str, Callable[[], Any]]:
    """OpenUnlearning's metrics under our measures' names, each with all its passes."""
    forget = theirs.questions("forget")
    both = {"forget": forget, "holdout": theirs.questions("holdout")}

    def of(metric: str, data: Any = None, **given: Any) -> Any:
        return theirs.of(metric, model, data, **given)

    def generated() -> Any:
        from omegaconf import OmegaConf

        settings = OmegaConf.create({"do_sample": False, "max_new_tokens": new, "use_cache": True})
        data = theirs.questions("forget", asked=True)
        return theirs.of("rouge", model, data, "left", rouge_type="rougeL_recall", generation_args=settings)

    return {
        "probability": lambda: of("probability", forget),
        "truth_ratio": lambda: theirs.ratio(model, "forget", "closer_to_1_better"),
        "exact_memorisation": lambda: of("exact_memorization", forget),
        "extraction_strength": lambda: of("extraction_strength", forget),
        "mia_loss": lambda: of("mia_loss", both),
        "mia_zlib": lambda: of("mia_zlib", both),
        "mia_min_k": lambda: of("mia_min_k", both, k=0.4),
        "mia_min_k_plus_plus": lambda: of("mia_min_k_plus_plus", both, k=0.4),
        "rouge_l_recall": generated,
    }


def made(options: argparse.Namespace) -> tuple[Any, str]:
    """The model, and what it is called."""
    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        model = tf.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        return model.to(options.device).eval(), options.model.resolve().name
    tokenizer = tf.AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=len(tokenizer), **SHAPES[options.shape])
    with torch.device(options.device):
        model = tf.LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # random weights: all go to the end, theirs and ours
    return model, f"random {options.shape}"


def seconds(function: Callable[[], Any], device: str) -> float:
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--new", type=int, default=32, help="tokens of a generated answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    from open_unlearning_measures import Theirs

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, first in (("forget", 0), ("holdout", options.records)):
            text = "".join(json.dumps(line) + "\n" for line in lines(options.questions, options.records, first))
            (work / f"{name}.json").write_text(text, encoding="utf-8")
        model, called = made(options)
        tokenizer = tf.AutoTokenizer.from_pretrained(options.model or options.tokenizer)
        for_theirs = get_tokenizer(tf.AutoTokenizer.from_pretrained)(options.model or options.tokenizer)
        for_theirs.pad_token = for_theirs.pad_token or for_theirs.eos_token
        Theirs.batch_size = 32
        theirs = Theirs(options.checkout.resolve(), work, for_theirs)
        rows = list(compare(theirs, model, tokenizer, work, options))
    about_here = about(options.device)
    for row in rows:
        row |= {
            "model": called, "device": about_here["device"], "dtype": options.dtype, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": importlib.metadata.version("transformers"),
            "commit": about_here["commit"], "command": " ".join(["python", *sys.argv]),
        }  # fmt: skip
    if options.csv is not None:
        new = not options.csv.exists()
        with open(options.csv, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader() if new else None
            writer.writerows(rows)


def compare(theirs: Any, model: Any, tokenizer: Any, work: Path, options: argparse.Namespace) -> Any:
    sets = {name: kf.load_items(work / f"{name}.json", chat=True) for name in ("forget", "holdout")}

    def ours(names: list[str]) -> Any:
        how = dict(tokenizer=tokenizer, holdout=sets["holdout"] if any("mia" in one for one in names) else ())
        return kf.evaluate(
            model,
            sets["forget"],
            measures=names,
            max_new_tokens=options.new,
            progress=False,
            device=options.device,
            **how,
        )

    every = metrics(theirs, model, options.new)
    likelihoods = [name for name in every if name != "rouge_l_recall"]
    cases = {name: [name] for name in every} | {"all likelihoods": likelihoods}
    for case, names in cases.items():
        if not options.only or case in options.only:
            both = (lambda names=names: [every[name]() for name in names], lambda names=names: ours(names))
            if case == "probability" or options.device.startswith("cuda"):
                timed(*both, argparse.Namespace(device=options.device, rounds=1))
            yield row_of(case, timed(*both, options), options)


def timed(theirs: Callable[[], Any], ours: Callable[[], Any], options: argparse.Namespace) -> list[tuple[float, float]]:
    """(theirs, ours) of each round."""
    return [tuple(seconds(one, options.device) for one in (theirs, ours)) for _ in range(options.rounds)]


def row_of(case: str, times: list[tuple[float, float]], options: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = (statistics.median(column) for column in zip(*times))
    ratios = sorted(a / b for a, b in times)
    at = int(0.2 * (len(ratios) - 1))
    found = {"measure": case, "records": options.records, "rounds": options.rounds}
    found |= {"tokens_new": options.new if case == "rouge_l_recall" else "", "theirs_s": round(theirs, 3)}
    found |= {"ours_s": round(ours, 3), "ratio": round(statistics.median(ratios), 2)}
    found |= {"p20": round(ratios[at], 2), "p80": round(ratios[-1 - at], 2)}
    print(f"{case:22} theirs {theirs:8.3f} s  ours {ours:8.3f} s  {found['ratio']:6.2f}x", flush=True)
    return found


if __name__ == "__main__":
    main()
