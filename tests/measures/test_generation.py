"""Continuations of many prompts: each is what transformers' generate gives for the prompt alone."""

import copy
import itertools
import logging

import pytest
import torch
import transformers as tf
from architectures.configurations import made
from tiny_models import ARCHITECTURES, MIXTURES, MORE, VOCAB, tiny_model

from kunbr_fast.measures import generation, sequence_batch
from kunbr_fast.measures.generation import Sampling, generate
from kunbr_fast.measures.sequence_batch import WAYS, Batch, Way, find_way
from kunbr_fast.memory import OutOfMemory
from kunbr_fast.model.streaming import open_streamed

NEW = 13
RESERVED, RESERVED_EQUAL, OWN, OWN_EQUAL = WAYS
# of architectures of transformers beside those of tiny_models: how their prompts run together
OTHERS = {
    "opt": RESERVED,  # positions from the mask
    "bloom": RESERVED_EQUAL,  # alibi from the mask
    "deepseek_v3": RESERVED,  # keys and values of different widths
    "moss_transcribe_diarize": OWN,  # takes no positions: right where all begin in one column
    "qwen3_next": OWN,  # states of a linear attention beside keys and values
    "gemma4_text": OWN,  # layers that take the keys of earlier ones
    "roformer": OWN_EQUAL,
    "mamba": None,
    "rwkv": None,
    "phi3, longrope": None,  # angles by length
    "llama, dynamic NTK": None,
    "gemma3, dynamic in one type of layer": None,
}


def prompts(vocab=VOCAB, lengths=(3, 17, 9, 1, 12, 17, 8)):
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
    return [*found, found[2]]


def cut(tokens, stop):
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop), len(tokens))]


def alone(model, asked, stop=frozenset(), new=NEW):
    """transformers' generate, a prompt at a time, each by a model that has run nothing before."""
    found = []
    for prompt in asked:
        ids, fresh = torch.tensor([prompt]), copy.deepcopy(model)
        how = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=[*stop] or None, pad_token_id=0)
        found.append(cut(fresh.generate(ids, max_new_tokens=new, **how)[0, len(prompt) :].tolist(), stop))
    return found


def truth_of(model, asked):
    """Stop tokens with which continuations end at different places, and these continuations."""
    config = model.generation_config
    model.generation_config = tf.GenerationConfig()  # without an end token of its own
    whole = alone(model, asked)
    model.generation_config = config
    stop = frozenset(tokens[1 + 2 * i] for i, tokens in enumerate(whole[:4]))
    return stop, [cut(tokens, stop) for tokens in whole]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE, *MIXTURES])
def test_each_is_the_prompt_alone(name, dtype):
    """Windows of attention are shorter than the prompts; some continuations stop early."""
    model, asked = tiny_model(name, dtype), prompts()
    stop, truth = truth_of(model, asked)
    assert alone(model, asked, stop) == truth and min(map(len, truth)) < NEW
    assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth
    # A padded query sees nothing: its mask is all of -1.8e308, and -inf after the softmax's cast from fp64 to fp32.
    way = find_way(model, asked, 30)
    assert way == (RESERVED_EQUAL if (name, dtype) == ("gemma2", torch.float64) else RESERVED)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    model, asked = made(name), prompts(100)
    stop, truth = truth_of(model, asked)
    assert find_way(model, asked, 30) == OTHERS[name]
    assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way(way, monkeypatch):
    model, asked = tiny_model(), prompts()
    stop, truth = truth_of(model, asked)
    monkeypatch.setattr(generation, "find_way", lambda *given: way)
    assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth


@pytest.mark.parametrize("at_once", [1, 64, 100])
def test_small_batches(at_once):
    model, asked = tiny_model(), prompts()
    stop, truth = truth_of(model, asked)
    assert generate(model, asked, max_new_tokens=NEW, stop=stop, tokens_at_once=at_once) == truth


def test_without_a_stop_token_and_without_prompts():
    model = tiny_model()
    found = generate(model, prompts(), max_new_tokens=4, stop=frozenset())
    assert [len(tokens) for tokens in found] == [4] * 8
    assert generate(model, [], max_new_tokens=4, stop=frozenset()) == []


def test_ended_sequences_are_dropped_and_equal_prompts_read_once(monkeypatch):
    sizes, step = [], Batch.step

    def noted(batch, tokens):
        sizes.append(len(tokens))
        return step(batch, tokens)

    model, asked = tiny_model(), prompts()
    stop, _ = truth_of(model, asked)
    monkeypatch.setattr(generation, "find_way", lambda *given: RESERVED)
    monkeypatch.setattr(Batch, "step", noted)
    found = generate(model, asked, max_new_tokens=NEW, stop=stop)
    ends = [len(tokens) + 1 for tokens in found]  # steps until the stop token
    assert sizes[0] == 8 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)
    for step_number, size in enumerate(sizes, 1):
        left = sum(end > step_number for end in ends)
        assert left <= size and (left > 0.75 * size)
    batch = Batch(model, RESERVED, asked, NEW)
    assert len(batch.once) == 7 and batch.read().shape == (8, VOCAB)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_attention_reads_blocks_of_columns(name, monkeypatch):
    """As on a GPU. Columns behind the last token are masked."""
    model, asked = tiny_model(name), prompts()
    stop, truth = truth_of(model, asked)
    monkeypatch.setattr(sequence_batch, "block", lambda device: 8)
    assert find_way(model, asked, 30) == RESERVED
    assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth
    same_lengths = prompts(lengths=(5, 5, 5))[:3]  # with nothing to mask on the left
    assert generate(model, same_lengths, max_new_tokens=NEW, stop=frozenset()) == alone(model, same_lengths)


def test_looks_for_the_end_now_and_then(monkeypatch):
    """As on a GPU: the host waits every few steps only, and what was made after a stop token is cut off."""
    model, asked = tiny_model(), prompts()
    stop, truth = truth_of(model, asked)
    monkeypatch.setattr(generation, "looks", lambda device: 5)
    assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth


# ------------------------------------------------------------------------------------------------ sampling

STOP = frozenset([2, 5, 9])


@pytest.mark.parametrize("sampling", [Sampling(seed=3), Sampling(0.7, 0.6, 4)], ids=str)
@pytest.mark.parametrize("way", [RESERVED, None], ids=str)
@pytest.mark.parametrize("few", [2, 256])
def test_sampling(sampling, way, few, monkeypatch):
    """Token by token without a cache: the first token at which the sum of the shares passes the number drawn."""
    model, asked = tiny_model(dtype=torch.float32), prompts()
    monkeypatch.setattr(generation, "FEW", few)
    monkeypatch.setattr(generation, "find_way", lambda *given: way)
    drawn = torch.rand(8, NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(sampling.seed))
    truth = []
    for prompt, numbers in zip(asked, drawn.tolist()):
        ids = list(prompt)
        for number in numbers:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            shares = dict(enumerate((logits / sampling.temperature).softmax(0).tolist()))
            if sampling.top_p < 1:
                kept, reached = {}, 0.0
                for token in sorted(shares, key=lambda token: -shares[token]):
                    if reached < sampling.top_p:
                        kept[token] = shares[token]
                    reached += shares[token]
                shares = kept
            total = sum(shares.values())
            sums = zip(shares, itertools.accumulate(shares.values()))
            ids.append(next(token for token, reached in sums if reached > number * total))
        truth.append(cut(ids[len(prompt) :], STOP))
    found = generate(model, asked, max_new_tokens=NEW, stop=STOP, sample=sampling)
    assert found == truth
    assert found[2] != found[7]  # equal prompts, other numbers


def test_shares_of_samples():
    """10000 draws of one distribution: each token's share is within 5 standard errors of its probability."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0])
    drawn = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(), Sampling(2.0), Sampling(1.0, 0.8)):
        shares = (logits.double() / sampling.temperature).softmax(0)
        if sampling.top_p < 1:  # 2 alone has 0.64, with 1 it is 0.88
            shares = torch.where(logits >= 1, shares, 0.0)
            shares /= shares.sum()
        counts = sampling.draw(logits.expand(10_000, -1), drawn).bincount(minlength=5) / 10_000
        assert ((counts - shares).abs() <= 5 * (shares * (1 - shares) / 10_000).sqrt()).all()


@pytest.mark.parametrize("given", [dict(temperature=0), dict(top_p=0), dict(top_p=1.5), dict(seed=-1)], ids=str)
def test_sampling_refuses(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Sampling(**given)


# ------------------------------------------------------------------------------------------------ the model, memory


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_the_model_stays_as_it_was(name):
    model = made(name).train()
    model.generation_config.repetition_penalty = 5.0  # of the model's own generate: nothing of it is taken
    model.generation_config.max_new_tokens = 1
    before, settings = {n: p.detach().clone() for n, p in model.named_parameters()}, model.generation_config
    config = model.config.to_dict()
    generate(model, prompts(100), max_new_tokens=NEW, stop=STOP)
    assert model.training and all(module.training for module in model.modules())
    assert model.generation_config is settings and settings.repetition_penalty == 5.0
    assert model.config.to_dict() == config
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[parameter_name]) and parameter.grad is None and parameter.requires_grad
    stop, truth = truth_of(made(name), prompts(100))
    assert generate(model, prompts(100), max_new_tokens=NEW, stop=stop) == truth


class Small:
    """A model that has memory for `most` sequences at once."""

    def __init__(self, model, most, monkeypatch):
        self.calls, forward = [], model.forward

        def limited(input_ids, **options):
            self.calls.append(len(input_ids))
            if len(input_ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return forward(input_ids=input_ids, **options)

        monkeypatch.setattr(generation, "find_way", lambda *given: RESERVED)
        monkeypatch.setattr(model, "forward", limited)


def test_out_of_memory_halves_the_batch(monkeypatch, caplog):
    model, asked = tiny_model(), prompts()
    stop, truth = truth_of(model, asked)
    small = Small(model, 3, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert generate(model, asked, max_new_tokens=NEW, stop=stop) == truth
    assert "going on with 2" in caplog.text and max(small.calls[-5:]) <= 3


def test_out_of_memory_of_one_prompt(monkeypatch):
    model = tiny_model()
    Small(model, 0, monkeypatch)
    with pytest.raises(OutOfMemory, match="prompt 1 of 17 tokens and 13 to follow"):
        generate(model, prompts(), max_new_tokens=NEW, stop=STOP)


def test_progress_counts_tokens(capsys):
    generate(tiny_model(), prompts(), max_new_tokens=NEW, stop=STOP, progress="continuations")
    said = capsys.readouterr().err
    assert "continuations" in said and "token/s" in said


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "asked, given, message",
    [
        ([[3], []], {}, "prompt 1 is empty"),
        ([[3], [3] * 60], {}, "prompt 1 has 60 tokens, and 13 are to follow .* has 64 positions"),
        ([[3] * 8], {"limit": 20}, "prompt 0 has 8 tokens.* 20 positions"),
        ([[3], [VOCAB]], {}, f"prompt 1: token id {VOCAB}"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[3]], {"tokens_at_once": 0}, "tokens_at_once=0"),
    ],
)
def test_errors(asked, given, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), asked, **{"max_new_tokens": NEW, "stop": STOP} | given)


def test_positions_are_used_to_the_last():
    model = tiny_model("gpt2")
    assert len(generate(model, [[3] * 51], max_new_tokens=13, stop=frozenset())[0]) == 13


def test_a_streamed_model_is_refused(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="streamed.*load it whole"):
        generate(open_streamed(tmp_path), prompts(), max_new_tokens=NEW, stop=STOP)


@pytest.mark.parametrize("way", [RESERVED, None], ids=str)
def test_logits_that_are_not_finite(way, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(generation, "find_way", lambda *given: way)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, prompts(), max_new_tokens=NEW, stop=STOP)


def test_a_model_that_mixes_its_texts_runs_them_alone(monkeypatch, caplog):
    """A model that adds something of the batch's other texts, as none of transformers does."""
    model, own = tiny_model(), torch.nn.Linear.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: own(model.lm_head, x + x.mean(0)))
    stop, truth = truth_of(model, prompts())
    with caplog.at_level(logging.WARNING):
        assert find_way(model, prompts(), 30) is None
        assert generate(model, prompts(), max_new_tokens=NEW, stop=stop) == truth
    assert "one at a time" in caplog.text


def test_ways_differ():
    assert len(set(WAYS)) == 4 and WAYS[0] == Way(True, True)
