"""Long text lines in pieces: each token has its loss once, at its own place."""

import logging
import random

import pytest
import tiny_text
import torch
from test_text import special

from kunbr_fast.data import TextSettings, encode, encode_named
from kunbr_fast.data.encode import _say_cut

WORDS = "Ada was born in 1907".split()
OFF = TextSettings(split_long=False)


@pytest.fixture(autouse=True)
def said_anew():
    _say_cut.cache_clear()


def losses(sample, offset=0):
    """(place, token) of each loss."""
    labels = sample["labels"].tolist()
    return [(offset + i, label) for i, label in enumerate(labels) if i and label != -100]


@pytest.mark.parametrize("single, head", [("$A", 0), ("<s> $A", 1), ("$A </s>", 0), ("<s> <t> $A </s>", 2)])
@pytest.mark.parametrize("target", ["all", "number"])
def test_each_token_has_its_loss_once(single, head, target):
    tokenizer, rng = special(single), random.Random(0)
    for _ in range(60):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 40))) + " Ada 1907 in"
        (whole,) = encode([{"text": text}], tokenizer, target)
        length = len(whole["input_ids"])
        limit = rng.randrange(head + 2, length + 2)
        found, names, _ = encode_named([{"text": text}], tokenizer, target, limit)
        if length <= limit:
            assert len(found) == 1 and names == ["record 0"] and torch.equal(found[0]["input_ids"], whole["input_ids"])
            continue
        count = -(-(length - head - 1) // (limit - head - 1))
        if target == "number":  # the pieces without it are left out
            assert sum(len(losses(sample)) for sample in found) == 1 == len(found)
        else:
            assert names == [f"record 0, piece {i + 1} of {count}" for i in range(count)]
        numbers = [int(name.split("piece ")[1].split()[0]) - 1 for name in names]
        steps, mine = length - head - 1, []
        for number, sample in zip(numbers, found):
            assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
            assert torch.equal(sample["input_ids"][:head], whole["input_ids"][:head])
            first, stop = (head + n * steps // count for n in (number, number + 1))
            assert torch.equal(sample["input_ids"][head:], whole["input_ids"][first : stop + 1])
            assert len(sample["input_ids"]) <= limit
            if number:
                assert bool((sample["labels"][: head + 1] == -100).all())
            mine += losses(sample, first - head)
        assert mine == losses(whole)  # each place and token, once and in order
        sizes = [len(sample["input_ids"]) for sample in found]
        assert max(sizes) - min(sizes) <= 1


def test_the_texts_own_first_token_begins_each_piece():
    tokenizer = special("<s> $A")
    found = encode([{"text": "<s>" + " ".join(WORDS * 3)}], tokenizer, max_length=6)
    begins = [tokenizer.convert_ids_to_tokens(sample["input_ids"][:2].tolist()) for sample in found]
    assert len(found) == 4 and all(begin[0] == "<s>" and begin[1] != "<s>" for begin in begins)


def test_only_text_lines_are_cut():
    tokenizer, long = tiny_text.tokenizer(), "Ada was born. " * 40
    for record in (
        {"prompt": "Who?", "completion": long},
        {"question": long, "choices": [1, 2], "answer": 0},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": long}]},
    ):
        with pytest.raises(ValueError, match="longer than max_length=50: record 0 .* nothing is cut but text lines"):
            encode([record], tokenizer, max_length=50)
    with pytest.raises(ValueError, match="longer than max_length=50: record 0 .* as split_long is False$"):
        encode([{"text": long}], tokenizer, max_length=50, text=OFF)
    line = {"text": long, "alternate": "Nobody."}
    with pytest.raises(ValueError, match="record 0 .* text lines with a second answer are not cut$"):
        encode([line], tokenizer, max_length=50, alternate="given")
    with pytest.raises(ValueError, match="the alternate of record 0 .* text lines with a second answer are not cut$"):
        encode([{"text": "Ada.", "alternate": long}], tokenizer, max_length=50, alternate="given")
    for limit in (1, 2):  # no room for a token beside the head
        with pytest.raises(
            ValueError, match=f"longer than max_length={limit}: record 0 .* at least 3 tokens, 1 special and 2 more"
        ):
            encode([{"text": "Ada was born"}], special("<s> $A"), max_length=limit)


def test_what_was_cut_is_said_once_a_file(caplog, monkeypatch):
    tokenizer, long = tiny_text.tokenizer(), "Ada was born. " * 40
    records = [{"text": text, "_where": f"a:b/book.jsonl:{i}"} for i, text in enumerate((long, "short", long))]
    with caplog.at_level(logging.WARNING, "kunbr_fast"):
        samples = encode(records, tokenizer, max_length=100)
        encode(records, tokenizer, max_length=100)
        encode([{"text": "short"}], tokenizer, max_length=100)
    (message,) = caplog.messages
    what = f"2 text lines were longer than 100 tokens and cut into {len(samples) - 1} samples"
    assert message.startswith(f"a:b/book.jsonl: {what}")
    assert "samples, each token with its loss once (split_long=False" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # transformers' own too
        monkeypatch.setattr(tokenizer, "model_max_length", 10)
        (sample,) = encode([{"text": f"{long} 1907"}], tokenizer, "number", max_length=100)
    (message,) = caplog.messages
    assert "cut into 2 samples, of which 1 have a loss (split_long=False" in message


def test_a_text_of_many_characters_is_cut_too():
    text = "1." * 40_000
    (whole,) = encode([{"text": text}], tiny_text.tokenizer())
    found = encode([{"text": text}], tiny_text.tokenizer(), max_length=128)
    assert sum(len(losses(sample)) for sample in found) == len(losses(whole)) == len(whole["input_ids"]) - 1
