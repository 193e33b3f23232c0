"""Texts that begin alike go through a model once, as trees: against each text by itself in plain transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from kunbr_fast.data.trees import Trees
from kunbr_fast.evaluation import reading as reading_module
from kunbr_fast.evaluation.reading import Reading, read_all
from kunbr_fast.model.attention import check_places
from kunbr_fast.model.decoder import Decoder

STEM = [5, 9, 2, 11, 4, 8, 3, 17]
TEXTS = [
    [*STEM, 7, 8, 9],
    [*STEM, 7, 8],  # the beginning of another one
    [*STEM, 8, 1],
    [*STEM[:3], 20, 21, 22, 23, 24, 25, 26],
    [*STEM, 7, 30, 31, 32],
    [40],
]
OTHERS = [[50, 51, 52], [5, 9, 2, 60, 61]]  # of a family of their own


def make(name, seed=0):
    torch.manual_seed(seed)
    how = {"attn_implementation": "eager"} if name == "gemma2" else {}  # SDPA leaves its softcap out
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), **how).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def asked(decoder, texts=TEXTS, others=OTHERS):
    """A reading, and of each text its rows and where the logit of each token but the first is."""
    reading, found = Reading(decoder), []
    for family, mine in enumerate((texts, others)):
        for ids in mine:
            rows = reading.rows(reading.add(ids, family))
            found.append((ids, rows, reading.tokens(rows[:-1], ids[1:])))
    return reading, found


@torch.no_grad()
def check(model, read, found, rtol=1e-9):
    for ids, rows, at in found:
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        deviation = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
        truth = {
            "log_sums": logits.logsumexp(-1),
            "means": mean,
            "deviations": deviation,
            "best": logits.argmax(-1),
        }
        for name, value in truth.items():
            np.testing.assert_allclose(getattr(read, name)[rows], value.numpy(), rtol=rtol, atol=rtol, err_msg=name)
        targets = logits[range(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(read.logits[at], targets.numpy(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_every_row_is_that_of_the_text_alone(name, tokens, monkeypatch):
    monkeypatch.setattr(reading_module, "BATCH_TOKENS", tokens)
    model = make(name)
    decoder = Decoder(model)
    assert decoder.trees, "all of these run packed"
    reading, found = asked(decoder)
    # gemma2's softmax is in fp32
    check(model, reading.read(decoder), found, 1e-6 if name == "gemma2" else 1e-9)


def test_without_trees_the_same(monkeypatch):
    model = make("llama")
    decoder = Decoder(model)
    trees = asked(decoder)[0].read(decoder)
    decoder.trees = False
    reading, found = asked(decoder)
    read = reading.read(decoder)
    check(model, read, found)
    np.testing.assert_allclose(read.logits, trees.logits, rtol=1e-9)


def test_what_texts_have_in_common_goes_through_once(monkeypatch):
    model = make("llama")
    decoder, seen, real = Decoder(model), [], Trees.pack
    monkeypatch.setattr(Trees, "pack", lambda *a: seen.append(real(*a)) or seen[-1])
    assert decoder.trees
    seen.clear()
    reading, _ = asked(decoder)
    reading.read(decoder)
    nodes = {(0, tuple(ids[:n])) for ids in TEXTS for n in range(1, len(ids) + 1)}
    nodes |= {(1, tuple(ids[:n])) for ids in OTHERS for n in range(1, len(ids) + 1)}
    assert sum(batch.num_tokens for batch in seen) == len(nodes) == len(reading)
    # the same text under another name is the text that is there
    assert reading.add(TEXTS[0], "another") == reading.add(TEXTS[0], 0) and len(reading) == len(nodes)


def test_readings_have_the_bits_that_they_have_alone():
    decoder = Decoder(make("qwen2").float())
    one, two = asked(decoder)[0], asked(decoder, TEXTS[::-1][:3], [[1, 2, 3]])[0]
    together = read_all(decoder, [one, two, Reading(decoder)])
    for alone, beside in zip((one.read(decoder), two.read(decoder)), together):
        for name, value in vars(alone).items():
            assert np.array_equal(value, getattr(beside, name)), name
    assert len(together[2].logits) == 0


def test_a_model_whose_trees_are_wrong_runs_texts(monkeypatch):
    """Of an attention that looks at places: found out on the model, not guessed from its name."""
    model = make("llama")
    with monkeypatch.context() as patch:
        patch.setattr("kunbr_fast.model.attention._in_trees", lambda batch, window: None)
        decoder = Decoder(model)
    assert not decoder.trees
    reading, found = asked(decoder)
    check(model, reading.read(decoder), found)


def test_less_at_a_time_where_memory_runs_out(monkeypatch):
    model = make("llama")
    decoder, real, sizes = Decoder(model), Decoder.run, []

    def run(self, batch, *arguments, **more):
        sizes.append(batch.num_tokens)
        if batch.num_tokens > 30:
            raise torch.OutOfMemoryError("no memory")
        return real(self, batch, *arguments, **more)

    monkeypatch.setattr(Decoder, "run", run)
    reading, found = asked(decoder)
    check(model, reading.read(decoder), found)
    assert max(sizes) > 30 >= sizes[-1]
    monkeypatch.setattr(Decoder, "run", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        reading.read(decoder)


def test_families_that_begin_alike_grow_on_one_tree():
    stem = list(range(1, 11))
    trees = Trees()
    for number in range(60):
        for branch in ([11, 12], [13]):
            trees.add([*stem, 20 + number, *branch], number)
    grown = trees.grown()
    # a tree has the stem once and 4 tokens of each family, as long as another text fits into 384
    assert sum(map(len, grown)) == len(trees) == 60 * 4 + 10 * len(grown) and len(grown) == 1
    for number in range(60, 200):
        trees.add([*stem, 20 + number, 11, 12], number)
    sizes = sorted(map(len, trees.grown()))
    assert len(sizes) == 2 and max(sizes) <= 384 and sum(sizes) == 60 * 4 + 140 * 3 + 20
    others = Trees()
    for number in range(3):
        others.add([1, 2, 3, 4, 5, 6, 7, number], number)  # 8 tokens: nothing stands behind what is shared
    assert len(others.grown()) == 3


def test_families_on_one_tree_are_read_as_alone():
    model = make("gemma2")
    decoder = Decoder(model)
    stem = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]
    reading, found = Reading(decoder), []
    for number in range(7):
        for tail in ([number + 40, 8], [number + 40, 9, 7, 9, 3]):
            ids = [*stem, *tail]
            rows = reading.rows(reading.add(ids, number))
            found.append((ids, rows, reading.tokens(rows[:-1], ids[1:])))
    assert len(reading) == 10 + 7 * 6
    check(model, reading.read(decoder), found, 1e-6)


def test_depths_and_ends():
    trees = Trees()
    for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 6]):
        trees.add(ids, 0)
    (grown,) = trees.grown()
    batch = trees.pack([grown, grown], True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6] * 2 and batch.lengths == [6, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 1] * 2 and batch.longest == 4
    assert batch.ends.tolist() == [5, 4, 2, 4, 4, 5] * 2
    assert batch.samples()[1].ends.tolist() == [5, 4, 2, 4, 4, 5]
    assert [[trees.tokens[n] for n in text] for text in trees.texts()] == [[1, 2, 3], [1, 2, 4, 5], [1, 6]]


def test_families_that_are_not_joined_share_no_token():
    """Of models whose angles depend on a text's length, the beginning of another text is read apart."""
    for joined, tokens in ((True, 11), (False, 21)):
        trees = Trees(joined)
        trees.add([*STEM, 20, 21], "one")
        trees.add([*STEM, 20, 21, 22], "two")
        assert len(trees) == tokens


def test_texts_that_have_nothing_in_common_are_packed_as_texts():
    trees = Trees()
    for number, ids in enumerate(([1, 2, 3], [4, 5])):
        trees.add(ids, number)
    grown = trees.grown()
    batch = trees.pack(grown, True)
    assert batch.ends is None and batch.lengths == [3, 2] and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    trees.add([4, 6], 1)
    assert trees.pack(trees.grown(), True).ends is not None and trees.pack(grown[:1], True).ends is None


def test_a_tree_is_refused_where_attention_is_scaled_by_the_place_in_a_batch():
    """As Llama 4's: a branch's tokens have other places in the batch than in their text."""
    config, trees = SimpleNamespace(attn_temperature_tuning=True, floor_scale=4), Trees()
    for ids in ([1, 2, 3, 4], [1, 5]):
        trees.add(ids, 0)
    check_places(config, trees.pack(trees.texts()[:1], False), "a model")
    with pytest.raises(ValueError, match="trees of 5 tokens in one batch: from 4 tokens on a model"):
        check_places(config, trees.pack(trees.grown(), True), "a model")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_on_a_gpu(name):
    """fp64 as on a CPU; in bf16 trees are as near to fp64 as texts by themselves are."""
    model = make(name).cuda()
    decoder = Decoder(model)
    assert decoder.trees
    reading, found = asked(decoder)
    truth = reading.read(decoder)
    cpu = make(name)
    check(cpu, truth, found, 1e-6)
    half = Decoder(model.to(torch.bfloat16))
    errors = []
    for half.trees in (True, False):
        read = asked(half)[0].read(half)
        errors.append(np.linalg.norm(read.logits - truth.logits) / np.linalg.norm(truth.logits))
    assert errors[0] <= 2 * errors[1] < 0.1
