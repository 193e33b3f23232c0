"""A tokenizer, a model directory and JSONL files small enough to run the whole pipeline in a second or two."""

import json

import torch
import transformers as tf
from tiny_models import plain_llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

NAMES = [f"{first} {last}" for first in ("Ada", "Bo", "Cy", "Di") for last in ("Ek", "Fu", "Go", "Hu", "Iz", "Jo")]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def years():
    return {name: 1900 + 7 * i % 100 for i, name in enumerate(NAMES)}


def question(name):
    right = years()[name]
    choices = [right, right + 1, right + 2, right + 3]
    shift = right % 4
    return {
        "question": f"When was {name} born?",
        "choices": choices[shift:] + choices[:shift],
        "answer": (-shift) % 4,
    }


def tokenizer():
    lines = [json.dumps(question(name)) for name in NAMES] + ["A. B. C. D. Answer: was born in <user> <assistant> é ü"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(lines, trainer)
    from tokenizers.decoders import ByteLevel

    inner.decoder = ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def model(seed=0, layers=6, dtype=torch.float32):
    settings = dict(intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True)
    return plain_llama(400, layers, seed, **settings).to(dtype).eval()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def workspace(root):
    """root/model, root/f0.jsonl, f1.jsonl (forget), r.jsonl (retain)."""
    model().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "f0.jsonl", [question(n) for n in NAMES[:6]])
    write_jsonl(root / "f1.jsonl", [question(n) for n in NAMES[6:12]])
    write_jsonl(root / "r.jsonl", [question(n) for n in NAMES[12:]])
    return root


def inputs(workspace):
    """The options of `kunbr-fast unlearn` that name what is in a `workspace`."""
    files = {"--model": ["model"], "--forget": ["f0.jsonl", "f1.jsonl"], "--retain": ["r.jsonl"]}
    return [part for option, names in files.items() for part in (option, *(str(workspace / n) for n in names))]
