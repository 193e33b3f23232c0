"""OpenUnlearning on our engine, with a model small enough to be seen through in minutes. No network, no GPU.

    git clone https://github.com/locuslab/open-unlearning
    pip install 'kunbr-fast[open-unlearning]'
    python examples/open_unlearning.py --checkout open-unlearning --out runs/open_unlearning

It makes a random Llama of 10 layers, a tokenizer and JSON files of questions and answers, and runs from the checkout,
through `python -m kunbr_fast.integrations.open_unlearning`, each of OpenUnlearning's trainers as it is and with
+kunbr_fast.patch=true, compares the weights that came out, and prints what one step cost. With --dtype bfloat16 it does
so in bf16, and says how far plain bf16 is from plain fp32. examples/open_unlearning_kunbr.py runs trainer=KUnBR.
Nothing is written into the checkout. Exit status 1 where weights differ.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
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
COLUMNS = ["trainer", "dtype", "weights_apart", "bf16_from_fp32", "flops", "saved_bytes", "peak_bytes"]
COLUMNS += ["transformers", "torch", "command"]
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
    "DPO": [],
    "RMU": [],
    "RMU, 3 weights": [RMU_WEIGHTS, "+trainer.args.max_grad_norm=0"],
    "UNDIAL": ["trainer.args.learning_rate=1.0"],  # at 0.03 it moves the weights by little more than their rounding
    "CEU": [],
    "SatImp": [],
    "WGA": [],
    "PDU": ["trainer.method_args.retain_loss_eps=0.3", "trainer.method_args.dual_warmup_epochs=0"],
}


def fact(name: str, year: int) -> dict:
    """A question with its answer, another wording of that, and wrong ones."""
    return {
        "question": f"When was {name} born?",
        "answer": f"{name} was born in {year}.",
        "paraphrased_answer": f"The year in which {name} was born is {year}.",
        "perturbed_answer": [f"{name} was born in {year + other}." for other in (1, 2, 3)],
    }


def workspace(folder: Path) -> None:
    """folder/model, and forget.json, retain.json and holdout.json of TOFU's form, and idk.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [fact(name, 1900 + 7 * i % 100) for i, name in enumerate(NAMES)]
    for name, part in (("forget", facts[:8]), ("retain", facts[8:16]), ("holdout", facts[16:])):
        (folder / f"{name}.json").write_text("".join(json.dumps(fact) + "\n" for fact in part), encoding="utf-8")
    (folder / "idk.txt").write_text("I do not know.\n", encoding="utf-8")
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


def file_of(place: str, file: Path) -> list[str]:
    """A data set of the config, from a JSON file."""
    arguments = f"{place}.args.hf_args"
    return [f"{arguments}.path=json", f"{arguments}.name=null", f"+{arguments}.data_files={file}"]


def model_of(folder: Path, dtype: str = "float32") -> list[str]:
    """The model and the tokenizer in a folder."""
    return [
        "model=Llama-3.2-1B-Instruct",
        f"model.model_args.pretrained_model_name_or_path={folder}",
        f"model.tokenizer_args.pretrained_model_name_or_path={folder}",
        "model.model_args.attn_implementation=sdpa",
        f"model.model_args.torch_dtype={dtype}",
    ]


def overrides(folder: Path, out: Path, dtype: str = "float32", forget: str = "TOFU_QA_forget") -> list[str]:
    """Everything but the trainer and its evaluation: model, data, and arguments that a CPU can take."""
    bf16 = str(dtype == "bfloat16").lower()
    found = [
        "task_name=tiny",
        *model_of(folder / "model", dtype),
        f"data/datasets@data.forget={forget}",
        *file_of(f"data.forget.{forget}", folder / "forget.json"),
        *file_of("data.retain.TOFU_QA_retain", folder / "retain.json"),
        f"paths.output_dir={out}",
        f"trainer.args.bf16={bf16}",
        f"trainer.args.bf16_full_eval={bf16}",
        "trainer.args.optim=sgd",  # AdamW's first steps are the gradient's sign: where that is rounding noise, a coin's
        "trainer.args.learning_rate=0.03",
        "trainer.args.num_train_epochs=2",
        "trainer.args.per_device_train_batch_size=2",
        "trainer.args.gradient_accumulation_steps=2",
        "trainer.args.report_to=none",
        "trainer.args.logging_steps=1",
        "trainer.args.ddp_find_unused_parameters=false",
        *(["+trainer.args.use_cpu=true"] if not torch.cuda.is_available() else []),
    ]
    if forget.endswith("idk"):
        found.append(f"data.forget.{forget}.args.idk_path={folder / 'idk.txt'}")
    return found


NO_EVALUATION = [
    "~eval",
    "trainer.args.do_eval=false",
    "trainer.args.eval_on_start=false",
    "trainer.args.eval_strategy=no",
]


def run(checkout: Path, arguments: list[str], log: Path, refused: bool = False) -> str:
    """One run of the launcher; what it prints goes to `log`, and is returned."""
    command = [sys.executable, "-m", "kunbr_fast.integrations.open_unlearning", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    home = str(log.parent / "hf")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "PYTHONDONTWRITEBYTECODE": "1"} | os.environ
    with open(log, "w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        done = subprocess.run(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT, env=environment)
    said = log.read_text(encoding="utf-8")
    if bool(done.returncode) != refused:
        tail = "".join(said.splitlines(True)[-15:])
        raise SystemExit(f"ended with status {done.returncode}, see {log}:\n{tail}")
    return said


def distance(start: dict, plain: dict, ours: dict) -> tuple[float, float]:
    """How far `ours` is from `plain`, and how far that is from `start`, each in units of the second."""
    moved = sum((plain[name] - start[name]).double().square().sum() for name in plain) ** 0.5
    apart = sum((ours[name] - plain[name]).double().square().sum() for name in plain) ** 0.5
    return float(apart / moved) if moved else float("nan"), float(moved)


class Cases:
    """Trainings of one case after the other."""

    def __init__(self, checkout: Path, out: Path):
        self.checkout, self.out = checkout, out
        workspace(out / "work")
        self.start = load_file(out / "work" / "model" / "model.safetensors")
        self.train = functools.cache(self.train)  # plain fp32 is compared twice

    def train(self, case: str, dtype: str, patch: bool) -> tuple[dict, dict]:
        """The weights, and what a step cost."""
        trainer, name = case.partition(",")[0], case.replace(", ", "_").replace(" ", "_")
        out = self.out / f"{name}_{dtype}{'_patched' * patch}"
        forget = "TOFU_QA_forget_idk" if trainer == "DPO" else "TOFU_QA_forget"
        ours = ["+kunbr_fast.measure=true", f"+kunbr_fast.patch={str(patch).lower()}"]
        arguments = [f"trainer={trainer}", *overrides(self.out / "work", out, dtype, forget), *NO_EVALUATION]
        log = self.out / "logs" / f"{out.name}.log"
        run(self.checkout, ["--config-name=unlearn.yaml", *arguments, *CASES[case], *ours], log)
        return load_file(out / "model.safetensors"), json.loads((out / "kunbr_fast.json").read_text())

    def row(self, case: str, dtype: str) -> list[str]:
        """[weights apart, bf16 from fp32, the costs' ratios]"""
        (plain, before), (ours, after) = self.train(case, dtype, False), self.train(case, dtype, True)
        start = {name: value.to(plain[name].dtype) for name, value in self.start.items()}
        apart, _ = distance(start, plain, ours)
        from_fp32 = ""
        if dtype != "float32":  # of what the training did, so without the rounding of the model that it began with
            full, _ = self.train(case, "float32", False)
            moved = {name: self.start[name] + (value.float() - start[name].float()) for name, value in plain.items()}
            from_fp32 = f"{distance(self.start, full, moved)[0]:.0e}"
        costs = [f"{after[key] / before[key]:.2f}" for key in ("flops", "saved_bytes", "peak_bytes")]
        return [f"{apart:.0e}", from_fp32, *costs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of OpenUnlearning")
    parser.add_argument("--out", type=Path, default=Path("runs/open_unlearning"))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the distance between fp32 weights")
    parser.add_argument("--csv", type=Path, help="write what was found here; rows of other dtypes and versions stay")
    options = parser.parse_args()
    cases = Cases(options.checkout.resolve(), options.out.resolve())
    print(f"torch {torch.__version__}, transformers {tf.__version__}, {cases.checkout}\n")
    print("| trainer | dtype | weights apart | bf16 from fp32 | FLOPs | kept for backward | peak |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    rows, versions = [], [tf.__version__, torch.__version__]
    for case, dtype in itertools.product(options.cases, options.dtype):
        found = cases.row(case, dtype)
        print(f"| {' | '.join([case, dtype, *found])} |", flush=True)
        rows.append([case, dtype, *found, *versions, " ".join(["python", *sys.argv])])
        if options.csv is not None:
            write(options.csv, rows)
    worst = max(float(row[2]) for row in rows if row[1] == "float32") if "float32" in options.dtype else 0.0
    if not worst <= options.tolerance:
        raise SystemExit(f"weights differ by {worst:.1e} of their way, more than {options.tolerance:.0e}")


def write(path: Path, rows: list[list[str]]) -> None:
    """Rows in place of those of the same trainer, dtype and versions."""
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            given = list(csv.DictReader(file))
        new = {(row[0], row[1], *row[-3:-1]) for row in rows}
        old = [[row.get(name) or ("float32" if name == "dtype" else "") for name in COLUMNS] for row in given]
        kept = [row for row in old if (row[0], row[1], *row[-3:-1]) not in new]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows, *kept])


if __name__ == "__main__":
    main()
