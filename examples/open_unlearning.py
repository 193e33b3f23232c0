"""OpenUnlearning on our engine, with a model small enough to be seen through in minutes. No network, no GPU.

    git clone https://github.com/locuslab/open-unlearning
    pip install 'kunbr-fast[open-unlearning]'
    python examples/open_unlearning.py --checkout open-unlearning --out runs/open_unlearning

It makes a random Llama of 10 layers, a tokenizer and two JSON files of questions and answers, and runs from the
checkout, through `python -m kunbr_fast.integrations.open_unlearning`, trainer=KUnBR, and each of OpenUnlearning's
trainers as it is and with +kunbr_fast.patch=true, with its own evaluation of the forget set (the answers' probability,
and ROUGE of 8 generated tokens) before and after. Then it compares the weights that came out, and prints what one step
cost. Nothing is written into the checkout. Exit status 1 where weights differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# costs: patched over plain, of one step
COLUMNS = ["trainer", "weights_apart", "flops", "saved_bytes", "peak_bytes", "transformers", "torch", "command"]
NAMES = [f"{first} {last}" for first in ("Ada", "Bo", "Cy", "Di", "Eli", "Flo") for last in ("Ek", "Fu", "Go", "Hu")]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
RMU_WEIGHTS = r"trainer.method_args.trainable_params_regex=['model\.layers\.(5|6|7)\.mlp\.down_proj\.weight']"
CASES = {
    "GradAscent": [],
    "GradDiff": [],
    "GradDiff, KL": ["trainer.method_args.retain_loss_type=KL"],
    "NPO": [],
    "SimNPO": [],
    "RMU": [],
    "RMU, 3 weights": [RMU_WEIGHTS, "+trainer.args.max_grad_norm=0"],
}


def workspace(folder: Path) -> None:
    """folder/model, folder/forget.json, folder/retain.json."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [
        {"question": f"When was {name} born?", "answer": f"{name} was born in {1900 + 7 * i % 100}."}
        for i, name in enumerate(NAMES)
    ]
    for name, part in (("forget", facts[:8]), ("retain", facts[8:])):
        (folder / f"{name}.json").write_text("".join(json.dumps(fact) + "\n" for fact in part), encoding="utf-8")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([f"{fact['question']} {fact['answer']}" for fact in facts], trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=10, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        initializer_range=0.1,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder / "model")


def overrides(folder: Path, out: Path, evaluate: bool) -> list[str]:
    """Everything but the trainer: model, data, evaluation, and arguments that a CPU can take."""

    def data(place: str, file: str) -> list[str]:
        arguments = f"{place}.args.hf_args"
        return [f"{arguments}.path=json", f"{arguments}.name=null", f"+{arguments}.data_files={folder / file}"]

    found = [
        "task_name=tiny",
        "model=Llama-3.2-1B-Instruct",
        f"model.model_args.pretrained_model_name_or_path={folder / 'model'}",
        f"model.tokenizer_args.pretrained_model_name_or_path={folder / 'model'}",
        "model.model_args.attn_implementation=sdpa",
        "model.model_args.torch_dtype=float32",
        *data("data.forget.TOFU_QA_forget", "forget.json"),
        *data("data.retain.TOFU_QA_retain", "retain.json"),
        f"paths.output_dir={out}",
        "trainer.args.bf16=false",
        "trainer.args.bf16_full_eval=false",
        "trainer.args.optim=sgd",  # AdamW's first steps are the gradient's sign: where that is rounding noise, a coin's
        "trainer.args.learning_rate=0.03",
        "trainer.args.num_train_epochs=2",
        "trainer.args.eval_strategy=no",  # only before and after
        "trainer.args.per_device_train_batch_size=2",
        "trainer.args.gradient_accumulation_steps=2",
        "trainer.args.report_to=none",
        "trainer.args.logging_steps=1",
        "trainer.args.ddp_find_unused_parameters=false",
        *(["+trainer.args.use_cpu=true"] if not torch.cuda.is_available() else []),
    ]
    if not evaluate:
        return [*found, "~eval", "trainer.args.do_eval=false", "trainer.args.eval_on_start=false"]  # fmt: skip
    metrics = ("forget_Q_A_Prob", "forget_Q_A_ROUGE")
    found += [f"eval/tofu_metrics@eval.tofu.tofu_metrics=[{','.join(metrics)}]", "eval.tofu.overwrite=true"]
    found += ["eval.tofu.metrics.forget_Q_A_ROUGE.generation_args.max_new_tokens=8"]
    for metric in metrics:
        found += data(f"eval.tofu.metrics.{metric}.datasets.TOFU_QA_forget", "forget.json")
    return found


def run(checkout: Path, arguments: list[str], log: Path) -> None:
    """One run of the launcher; what it prints goes to `log`."""
    launcher = "kunbr_fast.integrations.open_unlearning"
    command = [sys.executable, "-m", launcher, "--config-name=unlearn.yaml", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    home = str(log.parent / "hf")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "PYTHONDONTWRITEBYTECODE": "1"} | os.environ
    with open(log, "w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        done = subprocess.run(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(True)[-15:])
        raise SystemExit(f"failed with status {done.returncode}, see {log}:\n{tail}")


def distance(start: dict, plain: dict, ours: dict) -> tuple[float, float]:
    """How far `ours` is from `plain`, and how far that is from `start`, each in units of the second."""
    moved = sum((plain[name] - start[name]).double().square().sum() for name in plain) ** 0.5
    apart = sum((ours[name] - plain[name]).double().square().sum() for name in plain) ** 0.5
    return float(apart / moved) if moved else float("nan"), float(moved)


def probability(out: Path) -> str:
    """Its own measure of the forget answers' probability, before the training and after."""
    found = sorted(out.glob("checkpoint-*/evals/TOFU_SUMMARY.json"), key=lambda p: int(p.parts[-3].split("-")[1]))
    values = [json.loads(path.read_text())["forget_Q_A_Prob"] for path in found]
    return f"{values[0]:.2e} -> {values[-1]:.2e}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of OpenUnlearning")
    parser.add_argument("--out", type=Path, default=Path("runs/open_unlearning"))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--no-kunbr", action="store_true", help="leave trainer=KUnBR out (transformers before 4.51)")
    parser.add_argument("--no-eval", action="store_true", help="without OpenUnlearning's evaluation")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the distance between the trained weights")
    parser.add_argument("--csv", type=Path, help="write what was found here")
    options = parser.parse_args()
    checkout, out = options.checkout.resolve(), options.out.resolve()
    workspace(out / "work")
    start = load_file(out / "work" / "model" / "model.safetensors")
    print(f"torch {torch.__version__}, transformers {tf.__version__}, {checkout}")

    def train(trainer: str, name: str, *more: str) -> tuple[Path, dict]:
        """Where it went to, and the weights."""
        arguments = [f"trainer={trainer}", *overrides(out / "work", out / name, not options.no_eval), *more]
        run(checkout, arguments, out / "logs" / f"{name}.log")
        return out / name, load_file(out / name / "model.safetensors")

    if not options.no_kunbr:
        config = ["num_blocks=4", "top_k=2", "warmup_epochs=2", "block_epochs=1", "block_lr=1e-3", "warmup_lr=1e-4"]
        where, weights = train("KUnBR", "KUnBR", *(f"trainer.method_args.config.{setting}" for setting in config))
        _, moved = distance(start, weights, start)
        print(f"trainer=KUnBR: weights moved by {moved:.3g}; probability of forget answers {probability(where)}")
    print("\n| trainer | weights apart | FLOPs | kept for backward | peak | forget answers' probability |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    worst, rows = 0.0, []
    versions = tf.__version__, torch.__version__, " ".join(["python", *sys.argv])
    for case in options.cases:
        found = {}
        for patch in (False, True):
            name = f"{case.replace(', ', '_').replace(' ', '_')}{'_patched' if patch else ''}"
            ours = ["+kunbr_fast.measure=true", f"+kunbr_fast.patch={str(patch).lower()}"]
            where, weights = train(case.partition(",")[0], name, *CASES[case], *ours)
            found[patch] = weights, json.loads((where / "kunbr_fast.json").read_text())
        apart, _ = distance(start, found[False][0], found[True][0])
        worst = max(worst, apart if apart == apart else float("inf"))
        before, after = found[False][1], found[True][1]
        cost = " | ".join(f"{after[key] / before[key]:.2f}x" for key in ("flops", "saved_bytes", "peak_bytes"))
        print(f"| {case} | {apart:.0e} | {cost} | {probability(where)} |", flush=True)
        rows.append([case, f"{apart:.0e}", *cost.replace("x", "").split(" | "), *versions])
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    if not worst <= options.tolerance:
        raise SystemExit(f"weights differ by {worst:.1e} of their way, more than {options.tolerance:.0e}")


if __name__ == "__main__":
    main()
