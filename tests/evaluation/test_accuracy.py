"""Multiple-choice accuracy: against a plain loop over the Hugging Face model, and against planted truths."""

import json
import random

import pytest
import torch
from tiny_models import plain_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kunbr_fast import data
from kunbr_fast.evaluation import accuracy, reading
from kunbr_fast.evaluation.accuracy import choice_accuracy, letter_tokens, measure, prepare_questions
from kunbr_fast.model.decoder import Decoder


def scores_of(decoder, questions, monkeypatch):
    """Letter logits, or summed log-probabilities, (questions, choices)."""
    seen, real = [], accuracy._accuracy
    with monkeypatch.context() as patch:
        patch.setattr(
            accuracy, "_accuracy", lambda asked, plain, smooth: seen.append(plain) or real(asked, plain, smooth)
        )
        measure(decoder, questions)
    return seen[0]


def make_records(number=12, seed=0, choices=4):
    rng = random.Random(seed)
    records = []
    for i in range(number):
        years = rng.sample(range(1950, 2010), choices)
        name = f"{rng.choice(['Ada', 'Bo', 'Cy', 'Dee'])} {rng.choice(['Li', 'Fox', 'Ray'])}"
        records.append(
            {
                "question": f"When was {name} {i} born?",
                "choices": years,
                "answer": rng.randrange(choices),
                "_where": f"made_up.jsonl:{i + 1}",
            }
        )
    return records


def wrap(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def corpus():
    return [data.question_prompt(r) + f" {data.LETTERS[r['answer']]}" for r in make_records(60, seed=9)] * 2


def byte_level_bpe():
    """GPT-2's kind: the space is part of the token, "ĠA". No special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return wrap(tokenizer)


def sentencepiece_bpe(closing=False):
    """Llama 2's kind: spaces become "▁", "<s>" opens a text; with `closing`, "</s>" ends it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closing else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram():
    """SentencePiece's other model: the tokens of a word depend on all of it."""
    letters = sorted({c for text in corpus() for c in text if not c.isspace()} | {"\n", "▁"})
    words = ["▁Answer", "▁When", "▁was", "▁born", "▁19", *["▁" + c for c in "ABCD"]]
    vocab = [("<unk>", 0.0), *[(c, -8.0) for c in letters], *[(word, -6.0) for word in words]]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return wrap(tokenizer, unk_token="<unk>")


def characters():
    """One token a character: " A" is two tokens."""
    alphabet = sorted({c for text in corpus() for c in text})
    vocab = {c: i for i, c in enumerate(["<unk>", *alphabet])}
    return wrap(Tokenizer(models.BPE(vocab, [], unk_token="<unk>")), unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level_bpe, "sentencepiece": sentencepiece_bpe, "unigram": unigram}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def make_model(vocab, seed=0, positions=256, dtype=torch.float64, std=0.25):
    settings = dict(max_position_embeddings=positions, initializer_range=std, tie_word_embeddings=False)
    return plain_llama(vocab, seed=seed, **settings).to(dtype).eval()


@torch.no_grad()
def plain_letters(model, tokenizer, records):
    """Letter logits (questions, 4), one Hugging Face forward a question."""
    ids = [tokenizer(f"Answer: {c}", add_special_tokens=False)["input_ids"][-1] for c in "ABCD"]
    rows = []
    for record in records:
        prompt = tokenizer(data.question_prompt(record), return_tensors="pt")["input_ids"]
        rows.append(model(input_ids=prompt).logits[0, -1, ids])
    return torch.stack(rows)


@torch.no_grad()
def plain_choices(model, tokenizer, records):
    """Log-likelihood of " " + choice after the question (questions, 4), one Hugging Face forward a choice."""
    out = torch.zeros(len(records), 4, dtype=torch.float64)
    for i, record in enumerate(records):
        start = len(tokenizer(record["question"])["input_ids"])
        for c, choice in enumerate(record["choices"]):
            ids = tokenizer(f"{record['question']} {choice}", return_tensors="pt")["input_ids"]
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            for t in range(start, ids.shape[1]):
                out[i, c] += log_p[t - 1, ids[0, t]]
    return out


def share(predictions, records):
    return sum(p == r["answer"] for p, r in zip(predictions, records, strict=True)) / len(records)


# ----------------------------------------------------------------------------------- against a plain loop


@pytest.mark.parametrize("tokens", [1, 200, 4096])
def test_letter_scoring_equals_a_plain_loop(tokenizer, tokens, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_TOKENS", tokens)
    model, records = make_model(len(tokenizer)), make_records(13)
    truth = plain_letters(model, tokenizer, records)
    scores = scores_of(Decoder(model), prepare_questions(tokenizer, records), monkeypatch)
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)

    result = choice_accuracy(Decoder(model), tokenizer, records)
    centred = (truth - truth.mean(0)).argmax(1).tolist()
    assert result.predictions == truth.argmax(1).tolist()
    assert result.plain == share(result.predictions, records)
    assert result.calibrated == share(centred, records)
    assert result.num_questions == 13
    assert len(set(result.predictions)) > 1, "a model that always says the same letter tests nothing"


@pytest.mark.parametrize("tokens", [1, 200, 4096])
def test_choice_scoring_equals_a_plain_loop(tokenizer, tokens, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_TOKENS", tokens)
    model, records = make_model(len(tokenizer)), make_records(13)
    truth = plain_choices(model, tokenizer, records)
    scores = scores_of(Decoder(model), prepare_questions(tokenizer, records, scoring="choice"), monkeypatch)
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)

    result = choice_accuracy(Decoder(model), tokenizer, records, scoring="choice")
    assert result.predictions == truth.argmax(1).tolist()
    assert result.plain == share(result.predictions, records)
    assert result.calibrated is None
    assert len(set(result.predictions)) > 1


def test_logits_in_small_pieces_are_the_same(monkeypatch):
    tokenizer = byte_level_bpe()
    decoder = Decoder(make_model(len(tokenizer)))
    questions = prepare_questions(tokenizer, make_records(), scoring="choice")
    whole = scores_of(decoder, questions, monkeypatch)
    monkeypatch.setattr(reading, "_LOGITS_AT_ONCE", 3 * len(tokenizer))
    torch.testing.assert_close(scores_of(decoder, questions, monkeypatch), whole, rtol=1e-12, atol=1e-12)


def test_questions_with_different_numbers_of_choices():
    tokenizer = byte_level_bpe()
    records = [
        *make_records(5, choices=4),
        *make_records(6, seed=1, choices=2),
        *make_records(4, seed=2, choices=3),
    ]
    model = make_model(len(tokenizer))
    truth = plain_letters(model, tokenizer, records)
    for i, record in enumerate(records):
        truth[i, len(record["choices"]) :] = -torch.inf
    means = torch.stack([column[column.isfinite()].mean() for column in truth.T])
    result = choice_accuracy(Decoder(model), tokenizer, records)
    assert result.predictions == truth.argmax(1).tolist()
    assert result.calibrated == share((truth - means).argmax(1).tolist(), records)
    by_text = choice_accuracy(Decoder(model), tokenizer, records, scoring="choice")
    assert all(p < len(r["choices"]) for p, r in zip(by_text.predictions, records, strict=True))


def test_twice_the_same(monkeypatch):
    tokenizer = byte_level_bpe()
    decoder = Decoder(make_model(len(tokenizer), dtype=torch.float32))
    for scoring in accuracy.SCORINGS:
        questions = prepare_questions(tokenizer, make_records(), scoring=scoring)
        assert torch.equal(scores_of(decoder, questions, monkeypatch), scores_of(decoder, questions, monkeypatch))


# --------------------------------------------------------------------------------------- planted truths


def teach(model, tokenizer, texts, steps=150):
    """Teaches the last tokens of each text with a plain Hugging Face loop."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        total = 0.0
        for prompt, text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
            total = total + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if float(total.detach()) < 0.02 * len(texts):
            break
    assert float(total.detach()) < 0.1 * len(texts), "the test's own training failed"
    return model.eval()


@pytest.fixture(scope="module")
def knowing():
    """A model that has learned the letter and the year of six questions, and their records."""
    tokenizer, records = byte_level_bpe(), make_records(6, seed=3)
    for i, record in enumerate(records):
        record["answer"] = i % 4
    texts = []
    for record in records:
        prompt = data.question_prompt(record)
        texts.append((prompt, f"{prompt} {data.LETTERS[record['answer']]}"))
        texts.append((record["question"], f"{record['question']} {record['choices'][record['answer']]}"))
    return (
        teach(make_model(len(tokenizer), dtype=torch.float32, std=0.05), tokenizer, texts),
        tokenizer,
        records,
    )


@pytest.mark.parametrize("scoring", accuracy.SCORINGS)
def test_a_model_that_knows_scores_100_percent(knowing, scoring):
    model, tokenizer, records = knowing
    result = choice_accuracy(Decoder(model), tokenizer, records, scoring=scoring)
    assert result.plain == 1.0
    assert result.predictions == [r["answer"] for r in records]
    wrong = [{**r, "answer": (r["answer"] + 1) % 4} for r in records]
    assert choice_accuracy(Decoder(model), tokenizer, wrong, scoring=scoring).plain == 0.0


def test_calibration_removes_a_liking_for_one_letter(knowing):
    model, tokenizer, records = knowing
    unbiased = choice_accuracy(Decoder(model), tokenizer, records)
    head = model.lm_head
    biased = torch.nn.Linear(head.in_features, head.out_features, bias=True)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        biased.bias[letter_tokens(tokenizer)[2]] = 60.0
    model.lm_head = biased
    try:
        result = choice_accuracy(Decoder(model), tokenizer, records)
    finally:
        model.lm_head = head
    assert result.predictions == [2] * len(records)
    assert result.plain == share([2] * len(records), records) < unbiased.plain
    assert result.calibrated == unbiased.calibrated > result.plain


# ----------------------------------------------------------------------------------------- tokenizers


def test_letter_tokens_of_both_kinds_of_space():
    for make, mark in ((byte_level_bpe, "Ġ"), (sentencepiece_bpe, "▁"), (unigram, "▁")):
        tokenizer = make()
        assert letter_tokens(tokenizer) == tokenizer.convert_tokens_to_ids([mark + c for c in "ABCD"])


def test_a_tokenizer_without_letter_tokens_is_refused_with_the_cure():
    tokenizer = characters()
    tokenizer.name_or_path = "letters-apart"
    with pytest.raises(ValueError, match=r'tokenizer letters-apart: .*" A".*scoring="choice"') as error:
        prepare_questions(tokenizer, make_records())
    assert "Answer: A" in str(error.value)
    decoder = Decoder(make_model(len(tokenizer)))
    assert choice_accuracy(decoder, tokenizer, make_records(), scoring="choice").num_questions == 12


def test_letters_that_are_unknown_to_the_tokenizer_are_refused():
    vocab = {"<unk>": 0, "Answer:": 1, "A": 2, "B": 3, "C": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 0\].*choice"):
        letter_tokens(wrap(tokenizer, unk_token="<unk>"))
    assert letter_tokens(wrap(tokenizer, unk_token="<unk>"), 3) == [2, 3, 4]


def test_closing_tokens_are_left_out():
    """A model is asked what comes after "Answer:", not after "Answer:</s>"."""
    for scoring in accuracy.SCORINGS:
        closing = prepare_questions(sentencepiece_bpe(closing=True), make_records(), scoring=scoring)
        assert closing == prepare_questions(sentencepiece_bpe(), make_records(), scoring=scoring)
        assert closing.sequences[0][0][0] == 1, "the opening token stays"


def test_choices_are_compared_on_the_same_text_when_one_joins_the_question():
    """ " 1" joins the question's "?" in this tokenizer, " 2" does not: all sums begin at the "?"."""
    alphabet = list("When? 12")
    vocab = {c: i for i, c in enumerate([*alphabet, "? ", "? 1"])}
    tokenizer = wrap(Tokenizer(models.BPE(vocab, [("?", " "), ("? ", "1")])))
    record = {"question": "When?", "choices": ["1", "2", "12", "21"], "answer": 0}
    questions = prepare_questions(tokenizer, [record], scoring="choice")
    assert [targets[0][0] for targets in questions.targets[0]] == [3] * 4
    ids = [[token for _, token in targets] for targets in questions.targets[0]]
    assert [tokenizer.decode(i).replace(" ", "") for i in ids] == ["?1", "?2", "?12", "?21"]
    assert ids[0] == [vocab["? 1"]]


# ----------------------------------------------------------------------------------------- bad input


def test_a_prompt_longer_than_the_model_is_named():
    tokenizer = byte_level_bpe()
    records = make_records(4)
    records[2]["question"] += " Tell me." * 60
    decoder = Decoder(make_model(len(tokenizer), positions=120))
    for scoring in accuracy.SCORINGS:
        with pytest.raises(ValueError, match=r"made_up.jsonl:3: the question takes \d+ tokens, the model has 120"):
            choice_accuracy(decoder, tokenizer, records, scoring=scoring)


def test_the_longest_prompt_that_fits_is_taken():
    tokenizer, records = byte_level_bpe(), make_records(1)
    length = len(tokenizer(data.question_prompt(records[0]))["input_ids"])
    prepare_questions(tokenizer, records, decoder=Decoder(make_model(len(tokenizer), positions=length)))
    with pytest.raises(ValueError, match="positions"):
        prepare_questions(tokenizer, records, decoder=Decoder(make_model(len(tokenizer), positions=length - 1)))


@pytest.mark.parametrize("scoring", accuracy.SCORINGS)
def test_a_tokenizer_of_another_model_is_refused(scoring):
    tokenizer = byte_level_bpe()
    ids = [i for r in make_records() for c in r["choices"] for i in tokenizer(f"{r['question']} {c}")["input_ids"]]
    decoder = Decoder(make_model(max(ids)))
    with pytest.raises(ValueError, match=f"token id \\d+, but the model embeds {max(ids)}"):
        choice_accuracy(decoder, tokenizer, make_records(), scoring=scoring)


@pytest.mark.parametrize("scoring", accuracy.SCORINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_weights_are_an_error_and_not_an_answer(scoring, bad):
    tokenizer = byte_level_bpe()
    decoder = Decoder(make_model(len(tokenizer)))
    with torch.no_grad():
        decoder.model.model.layers[1].mlp.down_proj.weight[0, 0] = bad
    with pytest.raises(FloatingPointError, match="diverged"):
        choice_accuracy(decoder, tokenizer, make_records(), scoring=scoring)


def test_unusable_records():
    tokenizer = byte_level_bpe()
    good = make_records(1)[0]
    with pytest.raises(ValueError, match="empty"):
        prepare_questions(tokenizer, [])
    with pytest.raises(ValueError, match=r"corpus.jsonl:4: not a question line, it lacks question, choices, answer"):
        prepare_questions(tokenizer, [good, {"text": "Bo was born.", "_where": "corpus.jsonl:4"}])
    for change in ({"answer": 4}, {"answer": -1}, {"choices": ["1950"]}):
        with pytest.raises(ValueError, match=r"made_up.jsonl:1: '(answer|choices)' must be"):
            prepare_questions(tokenizer, [{**good, **change}])
    with pytest.raises(ValueError, match='scoring=\'letters\': expected "letter" or "choice"'):
        prepare_questions(tokenizer, [good], scoring="letters")


# ----------------------------------------------------------------------------------------- nothing left


def test_the_model_is_left_as_it_was(capsys):
    tokenizer = byte_level_bpe()
    model = make_model(len(tokenizer))
    decoder = Decoder(model)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for scoring in accuracy.SCORINGS:
        choice_accuracy(decoder, tokenizer, make_records(), scoring=scoring)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert capsys.readouterr().err == ""
    choice_accuracy(decoder, tokenizer, make_records(), progress="forget set")
    assert "forget set" in capsys.readouterr().err


def test_to_dict_is_json():
    tokenizer = byte_level_bpe()
    result = choice_accuracy(Decoder(make_model(len(tokenizer))), tokenizer, make_records())
    read = json.loads(json.dumps(result.to_dict()))
    assert accuracy.Accuracy(**read) == result
