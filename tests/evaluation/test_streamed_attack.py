"""Evaluation and attack of a streamed model: the bits of the model in memory, and what is read for them."""

import functools
import re

import pytest
import torch
from streamed_models import streamed, whole
from test_attacks import OTHERS
from test_rtt import NAMES, YEARS, make_config, make_folds, question, tokenizer
from tiny_models import plain_llama, random_samples, tiny_model

from kunbr_fast.data import pack
from kunbr_fast.evaluation import rtt
from kunbr_fast.evaluation.accuracy import choice_accuracy, measure, measure_all, prepare_questions
from kunbr_fast.evaluation.attacks import ATTACKS, rounded
from kunbr_fast.evaluation.lora import Lora, train_lora
from kunbr_fast.evaluation.rtt import Attack, AttackDiverged
from kunbr_fast.files.models import load_model
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed

assert tokenizer  # a fixture
LAYERS = 4


@pytest.fixture(scope="module")
def path(tokenizer, tmp_path_factory):
    """A model directory of the tokenizer's size."""
    folder = tmp_path_factory.mktemp("model")
    model = plain_llama(len(tokenizer), LAYERS, max_position_embeddings=64, tie_word_embeddings=True)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def attack_of(decoder, tokenizer, say=print, **change):
    config = make_config(**{"lrs": (1e-2,), "epochs": 1, **change})
    return Attack(decoder, tokenizer, make_folds(2), config, say, OTHERS)


def values(decoder):
    return {name: decoder.weights[name].clone() for name in decoder.weights}


def assert_untouched(decoder, before):
    assert all(torch.equal(value, before[name]) for name, value in values(decoder).items())
    assert all(p.grad is None and not p.requires_grad for p in decoder.model.parameters())
    assert decoder.weights.store is None


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("scoring, storage", [("letter", "host"), ("choice", "file")])
def test_all_questions_with_one_read_of_each_layer(path, tokenizer, tmp_path, scoring, storage):
    memory, decoder = Decoder(whole(path)), Decoder(streamed(path))
    sets = {
        "forget": [question(name, year) for name in NAMES[:3] for year in YEARS],
        "retain": [{**question(name, YEARS[0]), "choices": YEARS[:3]} for name in NAMES[3:]],
    }
    asked = {name: prepare_questions(tokenizer, part, scoring=scoring) for name, part in sets.items()}
    decoder.weights.release()  # or a layer may be in place already
    decoder.weights.loads.clear()
    found = measure_all(decoder, asked, place=Place(storage, tmp_path))
    assert decoder.weights.loads == {i: 1 for i in range(LAYERS)}
    assert found == measure_all(memory, asked)
    assert found == {name: measure(memory, questions) for name, questions in asked.items()}
    records = sets["forget"]
    assert choice_accuracy(decoder, tokenizer, records, scoring=scoring) == found["forget"]
    assert 0 < found["forget"].plain < 1
    assert measure_all(decoder, {}) == {}


def test_an_answer_that_is_not_finite_names_its_set(path, tokenizer):
    decoder = Decoder(whole(path))
    questions = prepare_questions(tokenizer, [question("Ada", 1951)])
    with torch.no_grad():
        decoder.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="answer to question 0 of forget is not a finite number"):
        measure_all(decoder, {"forget": questions})
    with pytest.raises(FloatingPointError, match="answer to question 0 is not a finite number"):
        measure(decoder, questions)


# ------------------------------------------------------------------------------------------------- the attack


@pytest.fixture(scope="module")
def truth(path, tokenizer, tmp_path_factory):
    """The result of all kinds of attack on the model in memory."""
    attack = attack_of(Decoder(whole(path)), tokenizer, attacks="all", lora_rank=3, lora_targets=("mlp", "q_proj"))
    return attack.run(tmp_path_factory.mktemp("memory"), False)


@pytest.mark.parametrize("budget, resident", [(0, 0), (None, 1)])
def test_every_kind_of_attack_has_the_bits_of_the_model_in_memory(
    path, tokenizer, truth, tmp_path, monkeypatch, budget, resident
):
    decoder = Decoder(streamed(path, host_bytes=budget, resident_layers=resident))
    before, loads = values(decoder), []
    attack = attack_of(decoder, tokenizer, attacks="all", lora_rank=3, lora_targets=("mlp", "q_proj"))
    real = rtt.measure_all

    def counted(*args, **how):
        at = dict(decoder.weights.loads)
        found = real(*args, **how)
        loads.append([decoder.weights.loads[i] - at.get(i, 0) for i in range(resident, LAYERS)])
        return found

    monkeypatch.setattr(rtt, "measure_all", counted)
    result = attack.run(tmp_path, False, place=Place("file", tmp_path))
    assert result == truth and set(result.attacks) == set(ATTACKS)
    assert all(result.leaks(kind) != result.leaks() for kind in ATTACKS), "something was done"
    assert_untouched(decoder, before)
    assert not list(tmp_path.iterdir())
    jobs = 2 * (1 + 2 + 2 + 1 + 1) + 1 + 2  # by fold and rate; other facts, and two roundings, for all folds
    assert len(loads) == 1 + jobs, "before the attacks once for all folds"
    assert max(map(max, loads)) == 1, "each layer once for all questions"


def test_an_attack_at_a_rate_that_bf16_rounds_away(path, tokenizer, tmp_path, monkeypatch):
    """Of a weight that is 1: without masters it stands still, with them it trains. Streamed or not."""
    name = "model.layers.1.input_layernorm.weight"

    def attacked(decoder, master):
        seen, real = [], rtt.measure_all
        with monkeypatch.context() as patch:
            patch.setattr(
                rtt, "measure_all", lambda d, *a, **h: seen.append(d.weights[name].clone()) or real(d, *a, **h)
            )
            attack_of(decoder, tokenizer, lrs=(1e-3,), epochs=6, master_weights=master).run(tmp_path, False)
        return seen

    for master in ("none", "fp32", "stochastic"):
        truth = attacked(Decoder(whole(path, "bfloat16")), master)
        assert torch.equal(truth[0], truth[6]) == (master == "none") and len(truth) == 13
        ours = attacked(Decoder(streamed(path, "bfloat16")), master)
        assert all(map(torch.equal, ours, truth))
    with pytest.raises(ValueError, match="rtt_master_weights='stochastic': the model is in float16"):
        attack_of(Decoder(whole(path, "float16")), tokenizer, master_weights="stochastic")
    with pytest.raises(ValueError, match="master_weights='half': expected one of fp32, none, stochastic"):
        make_config(master_weights="half")


@pytest.mark.parametrize("attack", ["full", "lora", "nf4"])
def test_the_weights_come_back_after_an_exception(path, tokenizer, tmp_path, monkeypatch, attack):
    decoder = Decoder(streamed(path))
    before, batch = values(decoder), pack(random_samples(2, vocab=len(tokenizer)))
    with torch.no_grad():
        logits = decoder.logits(batch)
    made, calls, real = attack_of(decoder, tokenizer, attacks=attack), [], rtt.measure_all

    def failing(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                assert not torch.equal(decoder.logits(batch), logits)
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(rtt, "measure_all", failing)
    with pytest.raises(KeyboardInterrupt):
        made.run(tmp_path, False)
    assert_untouched(decoder, before)
    with torch.no_grad():
        assert torch.equal(decoder.logits(batch), logits)
    assert not list(tmp_path.iterdir())


def test_a_diverged_attack(path, tokenizer, tmp_path):
    """As of the model in memory, in rows and words; what follows it begins at the unlearned weights."""
    found, how = [], dict(lrs=(3e29, 1e-3), attacks=("lion", "lora", "int8"))
    for decoder in (Decoder(whole(path)), Decoder(streamed(path))):
        said = []
        before = values(decoder)
        found.append((attack_of(decoder, tokenizer, said.append, **how).run(tmp_path, False), said))
        assert all(torch.equal(value, before[name]) for name, value in values(decoder).items())
        with pytest.raises(AttackDiverged, match="on fold split_0 at learning rate 3e.29: diverged at step") as error:
            attack_of(decoder, tokenizer, lrs=(3e29,)).run(tmp_path, False)
        found[-1] += (str(error.value),)
        assert all(torch.equal(value, before[name]) for name, value in values(decoder).items())
    assert found[0] == found[1]
    assert {row["attack"] for row in found[0][0].diverged} == {"lion", "lora"} and len(found[0][1]) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("budget, resident", [(0, 0), (1 << 20, 2)])
def test_on_a_gpu(path, tokenizer, tmp_path, budget, resident):
    """Layers that are changed as they come into place, on the stream that computes."""
    how = dict(attacks="all", lrs=(1e-2,), epochs=2)
    truth = attack_of(Decoder(load_model(path, "float32", "cuda")), tokenizer, **how).run(tmp_path, False)
    decoder = Decoder(open_streamed(path, "cuda", "float32", host_bytes=budget, resident_layers=resident))
    before = values(decoder)
    assert attack_of(decoder, tokenizer, **how).run(tmp_path, False) == truth
    assert_untouched(decoder, before)


def test_the_bar_tells_parts_of_an_epoch(path, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rtt, "tqdm", functools.partial(rtt.tqdm, mininterval=0, miniters=0))
    attack_of(Decoder(streamed(path)), tokenizer, batch_size=1).run(tmp_path, True)
    shown = capsys.readouterr().err
    for done in ("0.5", "1.5"):
        assert re.search(rf"\| {done}/2 \[\d\d:\d\d<\d\d:\d\d, +[0-9.]+(s/epoch|epoch/s), split_", shown)
    assert " 2/2 [" in shown and "questions: " in shown and "token" in shown


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, torch.float32, 0).save_pretrained(made[architecture], max_shard_size="70KB")
        return made[architecture]

    return make


@pytest.mark.parametrize(
    "architecture, dtype, lora",
    [
        ("llama", "bfloat16", Lora()),
        ("gpt2", "float64", Lora(2)),
        ("gpt2", "float32", Lora(8, ("mlp",))),
        ("qwen2_moe", "float32", Lora()),
        ("qwen2_moe", "float32", Lora(4, ("mlp.gate_proj",))),  # in layer 1 alone
    ],
)
def test_adapters_and_rounding_of_every_kind_of_layer(architecture, dtype, lora, folder):
    samples, batch, path = random_samples(5), pack(random_samples(3, seed=9)), folder(architecture)
    found = []
    for decoder in (Decoder(whole(path, dtype)), Decoder(streamed(path, dtype))):
        logits = []

        def keep(epoch, decoder=decoder, logits=logits):
            with torch.no_grad():
                logits.append(decoder.logits(batch))

        train_lora(decoder, samples, lr=1e-2, epochs=2, batch_size=2, seed=3, lora=lora, on_epoch=keep)
        fresh = decoder if decoder.streamed else Decoder(whole(path, dtype))
        for precision in ("int8", "nf4"):
            with rounded(fresh, precision):
                keep(None, fresh)
            fresh = decoder if decoder.streamed else Decoder(whole(path, dtype))
        found.append(logits)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(logits) == 4
    assert not any(torch.equal(a, b) for a, b in zip(logits, logits[1:]))


def test_what_lora_reads_in_a_step(path, tokenizer):
    """Each layer twice, but for the two that are in place where the pass turns; nothing goes out."""
    decoder = Decoder(streamed(path, host_bytes=0))
    seen, samples = [], random_samples(4, vocab=len(tokenizer))

    def count(metrics):
        seen.append(dict(decoder.weights.loads))

    train_lora(decoder, samples, lr=1e-2, epochs=1, batch_size=1, on_step=count)
    steps = [{i: b[i] - a[i] for i in b} for a, b in zip(seen, seen[1:])]
    assert steps == [{0: 2, 1: 2, 2: 1, 3: 1}] * 3
    assert {"weights_out", "state_in", "state_out"} & decoder.weights.traffic.keys() == set()
