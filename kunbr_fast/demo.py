"""`kunbr-fast demo`: a small model learns invented birthdays, is made to forget some of them, and is attacked.

Everything is made here from one seed: people with invented names, a word-piece vocabulary, a Llama of 8 layers of
width 64, its training. Three groups of people: those to forget, those to retain, and bystanders, whom the model knows
but unlearning never sees (what it loses of them is damage). Compared, with as many optimiser steps each and learning
rates searched in the same way (benchmarks/demo_search.md has what was tried):

    gradient difference   all parameters
    KUnBR                 a warm-up by gradient difference, then re-insertion of the densest block
    never saw them        a new model taught without the people to be forgotten: what no unlearning can beat
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kunbr_fast import losses
from kunbr_fast.config import KUnBRConfig
from kunbr_fast.data import Sample, Schedule, encode, pack
from kunbr_fast.decoder import Decoder
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.plots import plot_density, plot_relearning
from kunbr_fast.evaluation.report import table, write_report
from kunbr_fast.evaluation.rtt import Fold, RTTResult, rtt_attack
from kunbr_fast.training import FullTraining, frozen, train_all
from kunbr_fast.unlearn import rtt_config, unlearn

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
        {"prompt": text.format(name), "completion": str(year)} for name, year in group for text in TEMPLATES
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


def gradient_difference(
    decoder: Decoder, forget: list[Sample], retain: list[Sample], config: KUnBRConfig, *, lr: float, optimizer: str,
    epochs: int, progress: bool,
) -> None:  # fmt: skip
    """The baseline: gradient difference on all parameters, in place."""
    schedule = Schedule(len(forget), len(retain), config.batch_size, config.retain_size, epochs, config.seed)
    with frozen(decoder.model):
        training = FullTraining(decoder, lr=lr, optimizer=optimizer)
        for step in tqdm(
            range(len(schedule)), desc="gradient difference", unit="step", leave=False, disable=not progress
        ):
            f, r = schedule[step]
            batch = pack([*(forget[i] for i in f), *(retain[i] for i in r)]).to(decoder.device)
            rows = losses.gradient_difference(batch, len(f), config.retain_coeff, config.forget_loss_cap)
            training.step(batch, rows, len(f))
