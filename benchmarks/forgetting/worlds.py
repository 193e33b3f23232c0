"""Worlds: people to forget, people to retain, bystanders, and a model that was taught all of them.

Bystanders are known to the model and never seen by unlearning: what it loses of them is damage. A further group is
never taught, for the attack that teaches other facts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import Sample, encode
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.files.tensors import load_tensors, save_tensors
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run import demo
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.training.fine_tune import train_all

Records = list[dict[str, Any]]
GROUPS = ("forget", "retain", "bystanders")


class World(abc.ABC):
    """One seed's world.

    folder: where taught models are kept. config: what methods change. lion, adamw: gradient difference's usual rates on
    all parameters; block_adamw: on a block. epochs: of a method without blocks, as many updates as those with blocks
    make in all. finer: settings for more and smaller blocks with as many updates.
    """

    name: str
    config: KUnBRConfig
    tokenizer: Any
    layers: int
    lion: float
    adamw: float
    block_adamw: float
    epochs: int
    finer: dict[str, Any]
    teaching: dict[str, Any]
    records: dict[str, Records]  # of each group
    questions: dict[str, Records]
    folds: list[Fold]
    other_facts: Records
    attack_lrs: dict[str, tuple[float, ...]]  # of kinds of attack that have others than config.rtt_lrs
    device: str = "cpu"

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder

    def lrs_of(self, kind: str) -> tuple[float, ...]:
        """The rates of which a kind of attack makes its own."""
        return self.attack_lrs.get(kind, self.config.rtt_lrs)

    @abc.abstractmethod
    def untaught(self) -> nn.Module:
        """A new model, to be taught."""

    @property
    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the world is, apart from its seed: what is measured is kept under it."""

    def model(self, groups: tuple[str, ...] = GROUPS) -> nn.Module:
        """A model that was taught these groups, the same each time."""
        known = json.dumps([self.facts, self.teaching, self.seed, groups], sort_keys=True, default=str)
        path = self.folder / f"{'-'.join(groups)}-{hashlib.sha256(known.encode()).hexdigest()[:12]}.safetensors"
        model = self.untaught()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            samples = [sample for group in groups for sample in self.samples(group)]
            train_all(Decoder(model), samples, seed=self.seed, **self.teaching)
            save_tensors(path, dict(model.named_parameters()))
        values = load_tensors(path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        return model

    def samples(self, group: str) -> list[Sample]:
        return encode(self.records[group], self.tokenizer, self.config.target)

    def data(self, config: KUnBRConfig) -> tuple[list, list]:
        """What `kf.unlearn` takes: records, or for training on wrong answers samples that bring one."""
        if config.objective != "ria":
            return self.records["forget"], self.records["retain"]
        wrong = encode([self.mistaken(record) for record in self.records["forget"]], self.tokenizer, config.target)
        both = zip(self.samples("forget"), wrong, strict=True)
        return [{**sample, "alternate": other} for sample, other in both], self.samples("retain")

    def mistaken(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with a wrong answer: the same for all records of a fact."""
        rng = random.Random(f"{self.seed} {record['fact']}")
        return {
            **record,
            "completion": rng.choice([answer for answer in self.answers if answer != record["completion"]]),
        }

    @functools.cached_property
    def answers(self) -> list[str]:
        return sorted({record["completion"] for record in self.records["forget"]})


class DemoWorld(World):
    """The demo's: a Llama of 8 layers of 64 that learns 600 invented birthdays."""

    name, layers, lion, adamw, block_adamw, epochs = "demo", 8, demo.BASELINE["lr"], 3e-3, 5e-3, demo.BASELINE["epochs"]
    finer = dict(num_blocks=8, top_k=6, block_epochs=1)
    # what costs most has fewer rates; LoRA's are ten times these
    attack_lrs = {"lion": (1e-3, 5e-3), "long": (1e-3, 2e-3), "lora": (3e-4, 1e-3, 3e-3), "other_facts": (1e-3, 2e-3)}

    def __init__(self, seed: int, folder: Path):
        super().__init__(seed, folder)
        self.config = dataclasses.replace(demo.CONFIG, seed=seed, checkpoint_every=10**6)
        people, self.tokenizer, self.teaching = demo.people(seed), demo.tokenizer(), demo.TEACHING
        self.records = {group: _taught(members) for group, members in people.items()}
        self.questions = {group: demo.questions(members, seed) for group, members in people.items()}
        half = len(people["forget"]) // 2
        self.folds = [
            Fold(name, _taught(people["forget"][part]), self.questions["forget"][part])
            for name, part in (("first half", slice(0, half)), ("second half", slice(half, None)))
        ]
        known = {name for members in people.values() for name, _ in members}
        strangers = [pair for pair in demo.people(seed + 1000)["forget"] if pair[0] not in known]
        self.other_facts = _taught(strangers)

    def untaught(self) -> nn.Module:
        return demo.new_model(len(self.tokenizer), self.seed)

    @property
    def facts(self) -> dict[str, Any]:
        return {"world": self.name, "people": dict(demo.GROUPS)}


def _taught(members: list[tuple[str, int]]) -> Records:
    """The demo's facts, each with whom it is about: the wordings of one birthday stay together."""
    return [{**record, "fact": name} for name, year in members for record in demo.facts([(name, year)])]
