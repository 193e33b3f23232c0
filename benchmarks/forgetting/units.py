"""One measurement as a unit: a method with one setting in one seed's world, trained, asked and attacked.

All that is found lies in the unit's folder, each part in a file that is written in one step: `trained.json` with the
weights, and `NAME.json` of each kind of attack, to which every finished curve is added. A killed unit goes on there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.benchmarks.forgetting.birthdays import BirthdayWorld
from kunbr_fast.benchmarks.forgetting.methods import METHODS, Setting, training_of
from kunbr_fast.benchmarks.forgetting.worlds import DemoWorld, World
from kunbr_fast.benchmarks.measure import about
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.report import write_report
from kunbr_fast.evaluation.rtt import Attack, AttackDiverged
from kunbr_fast.files.documents import read_json
from kunbr_fast.files.tensors import load_tensors, save_tensors
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.training.diverged import Diverged

REHEARSED = "full"
WEIGHTS, TRAINED = "model.safetensors", "trained.json"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and in which world: make(seed, folder) of `WORLDS`, and options of its own."""

    world: str
    out: Path
    options: tuple[tuple[str, Any], ...] = ()


WORLDS: dict[str, Callable[..., World]] = {"demo": DemoWorld, "smollm2": BirthdayWorld}


@functools.lru_cache(maxsize=2)
def world_of(place: Place, seed: int) -> World:
    return WORLDS[place.world](seed, place.out / "taught", **dict(place.options))


@dataclasses.dataclass(frozen=True)
class Unit:
    """number: of the setting, among those of its method. kinds: of attack."""

    place: Place
    method: str
    number: int
    seed: int
    kinds: tuple[str, ...] = (REHEARSED,)

    @property
    def name(self) -> str:
        return f"{self.method} {self.number + 1}, seed {self.seed}"

    @property
    def world(self) -> World:
        return world_of(self.place, self.seed)

    @functools.cached_property
    def setting(self) -> Setting:
        return METHODS[self.method].settings(self.world)[self.number]

    @functools.cached_property
    def config(self) -> KUnBRConfig:
        return dataclasses.replace(self.world.config, **self.setting)

    @functools.cached_property
    def folder(self) -> Path:
        """Of what is measured: another setting, or another world, is another folder."""
        usual = KUnBRConfig().to_dict()
        config = {name: value for name, value in self.config.to_dict().items() if value != usual[name]}
        known = [self.world.facts, self.world.teaching, config, self.method]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return self.place.out / "units" / f"{self.method}-{self.seed}-{digest}"

    @property
    def missing(self) -> list[str]:
        """What is not finished: "trained", kinds of attack."""
        if (trained := self.trained) is None:
            return ["trained", *self.kinds]
        if "diverged" in trained:
            return []
        return [kind for kind in self.kinds if not self._attack(kind)["whole"]]

    @property
    def trained(self) -> dict[str, Any] | None:
        path = self.folder / TRAINED
        return read_json(path) if path.exists() else None

    def result(self, kind: str) -> RTTResult | None:
        """None where it is not finished, or no training of that kind went through."""
        found = self._attack(kind)
        return RTTResult(found["rows"]) if found["whole"] and found["rows"] else None

    def _attack(self, kind: str) -> dict[str, Any]:
        path = self.folder / f"{kind}.json"
        return read_json(path) if path.exists() else {"rows": [], "seconds": 0.0, "whole": False}

    def work(self, parts: Sequence[str] | None = None) -> tuple[int, int]:
        """Of parts (what is missing): samples that are trained on, and questions that are asked."""
        world, config = self.world, self.config
        facts, lines = len(world.records["forget"]), len(world.questions["forget"])
        samples = questions = 0
        for part in self.missing if parts is None else parts:
            if part == "trained":
                rounds = world.epochs * (2 + bool(config.adversary_every))
                samples += facts * rounds
                questions += sum(map(len, world.questions.values()))
                continue
            kind, folds = ATTACKS[part], len(world.folds)
            rates, taught = len(kind.lrs(world.lrs_of(part))), facts * (folds - 1)
            if kind.others:
                taught = len(world.other_facts)
            samples += 0 if kind.rounds else rates * taught * config.rtt_epochs * kind.passes
            questions += rates * lines * len(kind.measured(config.rtt_epochs))
        return samples, questions

    # ------------------------------------------------ the work

    def run(self) -> Unit:
        """Makes what is missing."""
        if "trained" in self.missing:
            self._train()
        if left := self.missing:
            model = self.world.untaught()
            values = load_tensors(self.folder / WEIGHTS)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(values[name])
            for kind in left:
                self._attacked(Decoder(model), kind)
        return self

    def _train(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter(), time.process_time()

        def keep(model: nn.Module) -> None:
            found = {"seconds": time.perf_counter() - begin[0], "cpu_seconds": time.process_time() - begin[1]}
            save_tensors(self.folder / WEIGHTS, dict(model.named_parameters()))
            asked = {group: _asked(model, self.world, lines) for group, lines in self.world.questions.items()}
            self._write(TRAINED, found | {"accuracy": asked})

        try:
            training_of(METHODS[self.method])(self.world, self.config, self.folder, Reporter(), keep)
        except (Diverged, FloatingPointError) as error:
            self._write(TRAINED, {"diverged": str(error).partition("\n")[0]})

    def _attacked(self, decoder: Decoder, kind: str) -> None:
        world, found, begin = self.world, self._attack(kind), time.perf_counter()
        before = found["seconds"]

        def write(rows: Sequence[dict] = (), whole: bool = False) -> None:
            found["rows"] += rows
            self._write(f"{kind}.json", {**found, "seconds": before + time.perf_counter() - begin, "whole": whole})

        config = dataclasses.replace(self.config.attack(), attacks=(kind,), lrs=world.lrs_of(kind))
        attack = Attack(decoder, world.tokenizer, world.folds, config, other_facts=world.other_facts)
        try:
            attack.run(self.folder / "attack", False, list(found["rows"]), write)
        except AttackDiverged as error:
            found |= {"rows": [], "diverged": str(error)}
        write(whole=True)

    def _write(self, name: str, found: dict[str, Any]) -> None:
        of = {"method": self.method, "setting": self.setting, "seed": self.seed, "config": self.config.to_dict()}
        write_report(self.folder / name, of | found | {"about": _about(self.world.device)})


_about = functools.cache(about)


def _asked(model: nn.Module, world: World, lines: list[dict]) -> dict[str, Any]:
    found = choice_accuracy(Decoder(model), world.tokenizer, lines, scoring=world.config.scoring)
    return {name: getattr(found, name) for name in ("plain", "smooth", "smooth_error", "leak", "num_questions")}
