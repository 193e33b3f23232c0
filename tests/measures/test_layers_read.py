"""The logit lens and the states of sets of records, against plain torch, text by text."""

import pytest
import tiny_text
import torch
from streamed_models import streamed, whole
from test_states import plain_states

from kunbr_fast.data import question_prompt
from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.accuracy import choice_accuracy, letter_tokens
from kunbr_fast.measures.layers import read_layers
from kunbr_fast.model.decoder import Decoder

QUESTIONS = [tiny_text.question(name) for name in tiny_text.NAMES]
OTHERS = [
    {"prompt": "Ada Ek was born in", "completion": " 1900"},
    {"text": "Bo Fu was born in 1907 and in 1908."},
    {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "In 1900."}]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


@pytest.fixture(scope="module")
def model():
    """Attention of random weights adds little: larger ones, so that layers differ in their answers."""
    made = tiny_text.model(dtype=torch.float64)
    with torch.no_grad():
        for layer in made.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
    return made


def items(*records):
    return [Item(record) for record in records]


def head(model, states):
    """(H + 1, T, V) log-probabilities of states (H + 1, T, D), by the model's own norm and head."""
    with torch.no_grad():
        return model.lm_head(model.model.norm(states)).double().log_softmax(-1)


def test_states_and_lens_are_those_of_plain_torch(model, tokenizer, monkeypatch):
    monkeypatch.setattr("kunbr_fast.measures.states.BATCH_TOKENS", 90)  # several batches of several questions
    read = read_layers(Decoder(model), tokenizer, {"forget": items(*QUESTIONS)}, most=None)["forget"]
    letters = letter_tokens(tokenizer)
    for number, record in enumerate(QUESTIONS):
        sums, stem = [], tokenizer(record["question"])["input_ids"]
        for place, choice in enumerate(record["choices"]):
            ids, text = tokenizer(f"{record['question']} {choice}")["input_ids"], 4 * number + place
            assert ids[: len(stem)] == stem and list(read.texts[text]) == ids
            assert read.items[text] == number and read.right[text] == (place == record["answer"])
            states = plain_states(model, ids)
            torch.testing.assert_close(read.states[:, text], states[:, -1], rtol=1e-6, atol=1e-9)
            log_probs = head(model, states)
            sums.append(sum(log_probs[:, t - 1, ids[t]] for t in range(len(stem), len(ids))))
        right = (torch.stack(sums).argmax(0) == record["answer"]).double()
        assert torch.equal(read.choice[:, number], right)
        prompt = plain_states(model, tokenizer(question_prompt(record))["input_ids"])[:, -1:]
        right = (head(model, prompt)[:, 0, letters].argmax(-1) == record["answer"]).double()
        assert torch.equal(read.letter[:, number], right)
    assert (
        len(read.choice.unique(dim=0)) > 3 and len(read.letter.unique(dim=0)) > 2
    )  # levels that say the same show little
    assert read.chance == 0.25 and len(read.questions) == len(QUESTIONS)


def test_a_model_that_runs_no_trees(model, tokenizer):
    """Texts go through it one by one, what several begin with too."""
    sets, decoder = {"forget": items(*QUESTIONS[:5], OTHERS[0], QUESTIONS[0])}, Decoder(model)
    assert decoder.trees
    truth = read_layers(decoder, tokenizer, sets)["forget"]
    decoder.trees = False
    found = read_layers(decoder, tokenizer, sets)["forget"]
    torch.testing.assert_close(found.states, truth.states, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.choice, truth.choice) and torch.equal(found.letter, truth.letter)
    assert torch.equal(found.states[:, 20:24], found.states[:, :4])  # the question that is there twice


def test_the_last_level_is_the_models_own_accuracy(model, tokenizer):
    decoder = Decoder(model)
    read = read_layers(decoder, tokenizer, {"": items(*QUESTIONS)}, most=None)[""]
    for scoring, lens in (("choice", read.choice), ("letter", read.letter)):
        assert lens[-1].tolist() == choice_accuracy(decoder, tokenizer, QUESTIONS, scoring=scoring).values


def test_records_without_choices_end_with_their_answer(model, tokenizer):
    read = read_layers(Decoder(model), tokenizer, {"": items(OTHERS[0], QUESTIONS[3], *OTHERS[1:])})[""]
    assert read.items == [1, 1, 1, 1, 0, 2, 3] and read.right[4:] == [None] * 3
    ends = [tokenizer.decode(read.texts[i]) for i in (4, 5, 6)]
    assert ends == ["Ada Ek was born in 1900", OTHERS[1]["text"], "<user> When?\n<assistant> In 1900.\n"]
    assert read.own == [QUESTIONS[3]["answer"], 4, 5, 6]
    truth = torch.stack([plain_states(model, list(ids))[:, -1] for ids in read.texts], 1)
    torch.testing.assert_close(read.states, truth, rtol=1e-6, atol=1e-9)
    alone = read_layers(Decoder(model), tokenizer, {"": items(*OTHERS)})[""]
    assert alone.choice is None and alone.letter is None and alone.chance is None


def test_of_many_items_some_spread_evenly(model, tokenizer):
    sets = {"forget": items(*QUESTIONS), "retain": items(*OTHERS), "none": []}
    read = read_layers(Decoder(model), tokenizer, {k: v for k, v in sets.items() if v}, most=6)
    assert sorted(set(read["forget"].items)) == [0, 4, 8, 12, 16, 20] and read["retain"].items == [0, 1, 2]
    assert read["forget"].states.shape == (7, 24, 32)


def test_a_tokenizer_without_letters(model, tokenizer, monkeypatch):
    def none(*arguments):
        raise ValueError("no letters")

    monkeypatch.setattr("kunbr_fast.evaluation.accuracy.letter_tokens", none)
    read = read_layers(Decoder(model), tokenizer, {"": items(*QUESTIONS[:4])})[""]
    assert read.letter is None and read.choice.shape == (7, 4)


def test_a_streamed_model_reads_each_layer_once_for_all_sets(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("kunbr_fast.measures.states.BATCH_TOKENS", 90)
    tiny_text.model().save_pretrained(tmp_path, max_shard_size="70KB")
    sets = {"forget": items(*QUESTIONS[:6]), "retain": items(*OTHERS)}
    decoder, orders = Decoder(streamed(tmp_path)), []
    visit = decoder.weights.visit
    monkeypatch.setattr(decoder.weights, "visit", lambda order: orders.append(list(order)) or visit(order))
    found = read_layers(decoder, tokenizer, sets)
    assert orders == [list(range(6))]
    truth = read_layers(Decoder(whole(tmp_path)), tokenizer, sets)
    for name in sets:
        assert torch.equal(found[name].states, truth[name].states) and found[name].texts == truth[name].texts
    for name in ("choice", "letter"):
        assert torch.equal(getattr(found["forget"], name), getattr(truth["forget"], name))
