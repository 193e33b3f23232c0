"""Tiny models, a tokenizer and records of every form, for tests of `evaluate`."""

import tiny_text
import torch
import transformers as tf
from architectures.configurations import configuration
from tiny_models import tiny_model
from tiny_text import NAMES, question, years

from kunbr_fast.data.items import Item

POSITIONS = 128


def model(name, seed=0, dtype=torch.float64):
    """A random model of tiny_text's vocabulary, of an architecture of tests/architectures."""
    if name in ("llama", "gpt2", "gemma2"):
        longest = {"n_positions": POSITIONS} if name == "gpt2" else {"max_position_embeddings": POSITIONS}
        return tiny_model(name, dtype, seed, vocab_size=400, num_hidden_layers=2, **longest)
    config = configuration(name)
    config.vocab_size = 400
    config.num_hidden_layers = 2
    torch.manual_seed(seed)
    made = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if "mamba" not in name else None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.to(dtype).eval()


def pair(name, others=True):
    """A question with its answer, the same in other words, and wrong ones."""
    year = years()[name]
    record = {"prompt": f"When was {name} born?", "completion": f" In {year}."}
    wrong = (f" In {year + 1}.", f" Born in {year + 3}", f" {year + 2}")
    return Item(record, f" {name} was born in {year}.", wrong, "tofu") if others else Item(record)


def chat(name):
    year = years()[name]
    asked = {"role": "user", "content": f"When was {name} born?"}
    record = {"messages": [asked, {"role": "assistant", "content": f"In {year}."}]}
    return Item(record, f"Born in {year}.", (f"In {year + 1}.",))


def line(*names):
    return Item({"text": " ".join(f"{name} was born in {years()[name]}." for name in names)})


def asked(name):
    return Item(question(name))


SETS = {
    "forget": [*map(asked, NAMES[:4]), *map(pair, NAMES[4:7]), chat(NAMES[7]), line(*NAMES[:6]), pair(NAMES[8], False)],
    "retain": [pair(NAMES[9]), asked(NAMES[10]), asked(NAMES[11]), line(NAMES[12])],
    "holdout": [*map(pair, NAMES[13:17]), line(NAMES[18]), chat(NAMES[19])],
}
tokenizer = tiny_text.tokenizer
