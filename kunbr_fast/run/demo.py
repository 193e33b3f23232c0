"""`kunbr-fast demo`: a small model learns invented birthdays, is made to forget some of them, and is attacked.

Everything is made here from one seed: people with invented names, a vocabulary of syllables, a Llama of 8 layers of
width 64, its training. Three groups of people: those to forget, those to retain, and bystanders, whom the model knows
but unlearning never sees (what it loses of them is damage). The rows of the table:

    taught                knows everybody
    warm-up               M_u: a short gradient difference
    KUnBR                 the same warm-up, then re-insertion of the densest blocks
    robust                the package's own method: all parameters, a relearning adversary, hidden states kept
    gradient difference   all parameters; all methods have as many steps as KUnBR has in all
    never saw them        a new model taught without the people to be forgotten: what no unlearning can beat

Settings were searched in the same way for both methods: the lowest RTT accuracy with a forget accuracy of at most
0.33, a retain accuracy of at least 0.95 and a bystander accuracy of at least 0.80 (benchmarks/demo_search.md).
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kunbr_fast.data import Sample, encode
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.figures import drawn
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.plots import plot_density, plot_relearning
from kunbr_fast.evaluation.report import Report, attacks_table, table, write_report
from kunbr_fast.evaluation.rtt import RTTResult, rtt_attack
from kunbr_fast.files.lock import hold
from kunbr_fast.files.scratch import scratch
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.unlearn import unlearn
from kunbr_fast.training.fine_tune import train_all
from kunbr_fast.training.full import FullTraining

# ---------------------------------------------------------------- people

YEARS = range(1900, 2020)
TEMPLATES = ("{} was born in", "the birth year of {} is", "{} came into the world in")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
GROUPS = {"forget": 150, "retain": 300, "bystanders": 150}


def people(seed: int) -> dict[str, list[tuple[str, int]]]:
    """For each group, (name, birth year) pairs; all names differ."""
    rng = random.Random(seed)

    def name(syllables: int) -> str:
        return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))

    names: dict[str, None] = {}
    while len(names) < sum(GROUPS.values()):
        names[f"{name(2)} {name(3)}"] = None
    pairs = [(full, rng.choice(YEARS)) for full in names]
    groups, start = {}, 0
    for group, count in GROUPS.items():
        groups[group] = pairs[start : start + count]
        start += count
    return groups


def facts(group: list[tuple[str, int]]) -> list[dict]:
    """Each birthday in three wordings; the year is the completion, and alone has a loss."""
    return [
        {"prompt": text.format(name) + " ", "completion": str(year), "fact": name}
        for name, year in group
        for text in TEMPLATES
    ]


def questions(group: list[tuple[str, int]], seed: int) -> list[dict]:
    """One four-choice question on each birthday; answered by the likelihood of the year."""
    rng = random.Random(seed)
    out = []
    for name, year in group:
        choices = [year, *rng.sample([y for y in YEARS if y != year], 3)]
        rng.shuffle(choices)
        out.append({"question": TEMPLATES[0].format(name), "choices": choices, "answer": choices.index(year)})
    return out


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, years, and the syllables of names as tokens: every name is new, none of its parts is."""
    words = sorted({word for text in TEMPLATES for word in text.split() if word != "{}"})
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    vocabulary = ["<pad>", "<unk>", *words, *map(str, YEARS), *(s for s in syllables if s not in words)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces = "|".join([*(rf"{word}\b" for word in words), r"\d{4}", f"[{CONSONANTS}][{VOWELS}]"])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(pieces), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.05,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ---------------------------------------------------------------- settings

RATES = (1e-3, 2e-3, 5e-3)  # of the attack
TEACHING = dict(lr=3e-3, epochs=12, batch_size=120, optimizer="adamw")
CONFIG = KUnBRConfig(
    target="answer", scoring="choice", batch_size=50, retain_coeff=3.0,
    forget_loss_cap=5.0,  # ln(120 years) is 4.79: beyond it the model would know which year it was not
    warmup_epochs=3, warmup_lr=6e-4, warmup_optimizer="lion",
    num_blocks=4, top_k=2, insertion="cumulative", block_epochs=3, block_lr=5e-3, optimizer="adamw",
    rtt_target="answer", rtt_lrs=RATES, rtt_epochs=8, rtt_batch_size=50, rtt=False,
)  # fmt: skip
BASELINE = dict(lr=4e-4, optimizer="lion", epochs=9)
ROBUST = KUnBRConfig.from_dict(
    dict(
        method="robust", target="answer", scoring="choice", batch_size=50, retain_coeff=3.0, warmup_epochs=9,
        warmup_lr=6e-4, adversary_lrs=RATES, rtt_target="answer", rtt=False,
    )
)  # fmt: skip
# Those that nobody rehearsed, at a rate that is often the strongest. The others, and other rates, take longer than a
# demo may (benchmarks/evidence.py).
UNREHEARSED, THEIR_RATES = ("lora", "int8", "nf4"), (2e-3,)
ATTACKED = ("KUnBR", "robust", "gradient difference")  # by these too


def gradient_difference(
    decoder: Decoder, forget: list[Sample], retain: list[Sample], config: KUnBRConfig, *, lr: float, optimizer: str,
    epochs: int, progress: str | None = None,
) -> None:  # fmt: skip
    """Gradient difference on all parameters, in place; the data order is that of `unlearn`'s warm-up."""
    schedule = Schedule(len(forget), len(retain), config.batch_size, config.retain_size, epochs, config.seed * 1000)
    with frozen(decoder.model):
        criterion = Criterion(retain_coeff=config.retain_coeff, forget_loss_cap=config.forget_loss_cap)
        training = FullTraining(decoder, lr=lr, optimizer=optimizer, criterion=criterion)
        for f, r in tqdm(schedule, desc=progress, unit="step", leave=False, disable=progress is None):
            training.step([forget[i] for i in f], [retain[i] for i in r])
        training.check()


# ---------------------------------------------------------------- the demo


class Demo:
    def __init__(self, seed: int, reporter: Reporter):
        self.seed, self.reporter = seed, reporter
        self.config = dataclasses.replace(CONFIG, seed=seed)
        self.people, self.tokenizer = people(seed), tokenizer()
        self.facts = {group: facts(members) for group, members in self.people.items()}
        self.samples = {group: encode(lines, self.tokenizer, "answer") for group, lines in self.facts.items()}
        self.questions = {group: questions(members, seed) for group, members in self.people.items()}
        half = GROUPS["forget"] // 2
        self.folds = [
            Fold(name, facts(self.people["forget"][part]), self.questions["forget"][part])
            for name, part in (("first half", slice(0, half)), ("second half", slice(half, None)))
        ]
        self.rows: list[dict[str, Any]] = []
        self.attacks: dict[str, RTTResult] = {}

    def teach(self, groups: tuple[str, ...]) -> LlamaForCausalLM:
        model = new_model(len(self.tokenizer), self.seed)
        samples = [sample for group in groups for sample in self.samples[group]]
        train_all(Decoder(model), samples, seed=self.seed, progress=self.reporter.title("teaching"), **TEACHING)
        return model

    def unlearn_plainly(self, model: LlamaForCausalLM, **settings: Any) -> None:
        data, bar = (self.samples["forget"], self.samples["retain"]), self.reporter.title("gradient difference")
        gradient_difference(Decoder(model), *data, self.config, progress=bar, **settings)

    def measure(self, method: str, model: LlamaForCausalLM, seconds: float, attack: bool = True) -> None:
        decoder = Decoder(model)
        accuracy = {
            group: choice_accuracy(decoder, self.tokenizer, lines, scoring="choice").plain
            for group, lines in self.questions.items()
        }
        row = {
            "method": method, "forget": accuracy["forget"], "retain": accuracy["retain"],
            "other": {"bystanders": accuracy["bystanders"]}, "seconds": {"training": seconds},
        }  # fmt: skip
        if attack:
            with (
                self.reporter.stage(f"{method}, attack", f"{method}: RTT attack") as took,
                scratch("kunbr-fast-") as folder,
            ):
                configs = [how := self.config.attack()]
                if method in ATTACKED:
                    configs.append(dataclasses.replace(how, attacks=UNREHEARSED, lrs=THEIR_RATES))
                more = self.tokenizer, self.folds
                curves = [rtt_attack(decoder, *more, each, folder, self.reporter.progress).curves for each in configs]
                found = RTTResult([row for part in curves for row in part])
            self.attacks[method] = found
            row["rtt"], row["seconds"]["RTT"] = found.accuracy, took.seconds
        self.rows.append(row)

    def run(self) -> Report:
        """All rows, in order; returns KUnBR's report."""
        stage, config = self.reporter.stage, self.config
        says = f"teaching a small Llama {sum(GROUPS.values())} birthdays ({GROUPS['forget']} of them to be forgotten)"
        with stage("taught", says) as took:
            taught = self.teach(tuple(GROUPS))
        self.measure("taught", taught, took.seconds, attack=False)
        unlearned, robust, baseline = (copy.deepcopy(taught) for _ in range(3))
        with stage("warm-up (M_u)") as warm_up:
            settings = dict(lr=config.warmup_lr, optimizer=config.warmup_optimizer, epochs=config.warmup_epochs)
            self.unlearn_plainly(unlearned, **settings)
        self.measure("warm-up (M_u)", unlearned, warm_up.seconds)
        with stage("KUnBR") as took:
            data = self.samples["forget"], self.samples["retain"]
            report = unlearn(taught, *data, config, unlearned=unlearned, reporter=self.reporter)
        self.measure("KUnBR", taught, warm_up.seconds + took.seconds)
        with stage("robust") as took:
            data, how = (self.facts["forget"], self.facts["retain"]), dataclasses.replace(ROBUST, seed=self.seed)
            unlearn(robust, *data, how, tokenizer=self.tokenizer, reporter=self.reporter)
        self.measure("robust", robust, took.seconds)
        with stage("gradient difference") as took:
            self.unlearn_plainly(baseline, **BASELINE)
        self.measure("gradient difference", baseline, took.seconds)
        with stage("never saw them", "a model that never saw the people to be forgotten, as the yardstick") as took:
            never = self.teach(("retain", "bystanders"))
        self.measure("never saw them", never, took.seconds)
        return report


def demo(
    out: str | Path, seed: int = 0, progress: bool = True, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Runs the demo; writes `report.json`, `density.png` and `relearning.png` to `out`; returns the report.

    Runs on one thread: the model is so small that more of them would wait for each other.
    """
    reporter = Reporter(progress, say)
    with hold(out, reporter.say):
        return _demo(Path(out), seed, reporter)


def _demo(out: Path, seed: int, reporter: Reporter) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = Demo(seed, reporter)
        report = run.run()
    finally:
        torch.set_num_threads(threads)
    path, curves = out / "density.png", out / "relearning.png"
    drawn(path, lambda: plot_density(report.density, report.blocks, path, run.config.skip_last_layers))
    shown = ("robust", "KUnBR", "gradient difference", "warm-up (M_u)", "never saw them")
    drawn(curves, lambda: plot_relearning({method: run.attacks[method] for method in shown}, curves))
    result = {
        "kunbr_fast": report.version,
        "seed": seed,
        "people": GROUPS,
        "config": run.config.to_dict(),
        "baseline": BASELINE,
        "robust": ROBUST.to_dict(),
        "blocks": [[block.start, block.stop] for block in report.blocks],
        "density": report.density.to_dict(),
        "losses": report.losses,
        "rows": run.rows,
        "rtt": {method: attack.to_dict() for method, attack in run.attacks.items()},
        "table": table(run.rows),
        "attacks": attacks_table({method: run.attacks[method] for method in ATTACKED}),
    }
    write_report(out / "report.json", result)
    return result
