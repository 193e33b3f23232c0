"""A sample's result does not depend on what it is packed with: logits, density, gradients, accuracy.

The truth is each sample alone, through the model's own forward in its first state.
"""

import copy
import functools
import itertools
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from graph_emulator import capture
from helpers import relative
from tiny_models import MIXTURES, ROTARY, VOCAB
from torch import nn

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.evaluation import accuracy, reading
from kunbr_fast.evaluation.accuracy import Questions
from kunbr_fast.files.models import load_model
from kunbr_fast.model import attention, ways
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.objectives import losses
from kunbr_fast.run.readback import ReadBack
from kunbr_fast.training.graphs import StepGraphs

LIMIT = 1e-12
EDGE = 12  # tokens up to which scaled rotary angles are those of training
LENGTHS = (5, EDGE, EDGE + 1, 20, 30, 3)
GROUPS = ([[i] for i in range(6)], [[0, 4], [3, 5], [1, 2]], [[4, 1, 3, 0, 5, 2]])
SMALL = ROTARY | {"num_hidden_layers": 3}
LONG = dict(
    rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=EDGE,
    short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0],
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
BY_LENGTH = {
    "llama, longrope": lambda: tf.LlamaConfig(**SMALL, rope_parameters=dict(LONG)),
    "phi3, longrope": lambda: tf.Phi3Config(**SMALL, original_max_position_embeddings=EDGE, rope_parameters=dict(LONG)),
    "llama, dynamic": lambda: tf.LlamaConfig(
        **SMALL | {"max_position_embeddings": EDGE}, rope_parameters=dict(DYNAMIC)
    ),
    "gemma3, dynamic in one type of layer": lambda: tf.Gemma3TextConfig(
        **SMALL | {"max_position_embeddings": EDGE, "tie_word_embeddings": True},
        head_dim=8,
        sliding_window=7,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            "full_attention": dict(DYNAMIC),
        },
    ),
}
OTHERS = {
    "llama, yarn": lambda: tf.LlamaConfig(
        **SMALL,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=EDGE
        ),
    ),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=8),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": MIXTURES["mixtral"],
    "qwen2_moe, window in its masks only": lambda: tf.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=24,
        use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip
ALL = BY_LENGTH | OTHERS


class Wide:
    """torch, for the models' own code: what they have in fp32 within an fp64 model is in fp64. The order of an fp32 sum
    is another in each batch."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True, scope="module")
def _fp64_throughout():
    with pytest.MonkeyPatch.context() as patch:
        modules = {type(module).__module__ for name in ALL for module in made(name).modules()}
        for name in {"transformers.modeling_rope_utils", *modules}:
            if name.startswith("transformers.") and hasattr(sys.modules[name], "torch"):
                patch.setattr(sys.modules[name], "torch", Wide())
        patch.setattr(attention, "torch", Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
    alone.cache_clear()


@functools.cache
def made(name):
    torch.manual_seed(0)
    options = (
        {"experts_implementation": "eager"} if name == "mixtral" or "moe" in name else {}
    )  # the others know no fp64
    model = tf.AutoModelForCausalLM.from_config(ALL[name](), attn_implementation="sdpa", **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def fresh(name):
    return copy.deepcopy(made(name))


@functools.cache
def samples():
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        found.append(
            {"input_ids": ids, "labels": torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)}
        )
        found[-1]["labels"][-1] = ids[-1]
    return found


@functools.cache
def alone(name):
    """Of each sample in a fresh model: logits, and the gradient of its mean NLL by parameter."""
    found = []
    for sample in samples():
        model, labels = fresh(name), sample["labels"][1:]
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1][labels != -100], labels[labels != -100]).backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


def state(model):
    return [(n, b.clone()) for n, b in model.named_buffers()] + [
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | torch.Tensor) or name == "forward"
    ]


def same(before, after):
    assert len(before) == len(after)
    assert all(a[0] == b[0] and bool(torch.as_tensor(a[1] == b[1]).all()) for a, b in zip(before, after))


@pytest.mark.parametrize("name", ALL)
def test_logits(name):
    model = fresh(name)
    before = state(model)
    decoder = Decoder(model)
    for group in itertools.chain(*GROUPS):
        ours = decoder.logits(pack([samples()[i] for i in group])).split([LENGTHS[i] for i in group])
        for i, logits in zip(group, ours):
            assert relative(logits, alone(name)[i][0]) < LIMIT, (group, i)
    same(before, state(model))


@pytest.mark.parametrize("name", ALL)
def test_density(name):
    truth = [{n: float(g.abs().sum()) for n, g in gradients.items()} for _, gradients in alone(name)]
    model = fresh(name)
    for group in itertools.chain(*GROUPS):
        found = kf.knowledge_density(model, [samples()[i] for i in group], modules="mlp").per_module
        whole = {}
        for path, value in found.items():  # of experts in a stack together
            whole[path.partition("[")[0]] = whole.get(path.partition("[")[0], 0.0) + value
        assert len(whole) >= 2 * model.config.num_hidden_layers
        for path, value in whole.items():
            assert value == pytest.approx(sum(truth[i][path] for i in group) / len(group), rel=LIMIT), (group, path)


@pytest.mark.parametrize("name", ALL)
def test_gradient_of_a_training_step(name):
    model = fresh(name)
    with kf.reinserted(model, fresh(name), block=range(1, 2), lr=1e-3, retain_coeff=2.0) as training:
        for group in itertools.chain(*GROUPS):
            forget = -(-2 * len(group) // 3)
            shares = [-1 / forget] * forget + [2.0 / max(1, len(group) - forget)] * (len(group) - forget)
            training.accumulate(training.criterion.step_batch(pack([samples()[i] for i in group]), forget))
            ours = torch.cat([parameter.grad.flatten() for parameter in training.parameters.values()])
            truth = [torch.cat([alone(name)[i][1][path].flatten() for path in training.parameters]) for i in group]
            assert relative(ours, sum(share * gradient for share, gradient in zip(shares, truth))) < LIMIT, group
            training.drop_gradient()


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_prefix_cache_holds_each_samples_own_states(name):
    decoder = Decoder(fresh(name))
    cache = PrefixCache(decoder, samples(), batch_tokens=2 * EDGE)
    cache.advance(2)
    for group in ([0], [4, 0], [5, 3, 2, 1]):
        batch = cache.batch(group)
        ours = decoder.logits(batch, None, Stretch(2, batch.hidden)).detach()
        assert relative(ours, torch.cat([alone(name)[i][0] for i in group])) < LIMIT


@pytest.mark.parametrize("name", BY_LENGTH)
def test_accuracy_of_a_question(name, monkeypatch):
    """The choices of a question are of lengths on both sides too."""
    sequences = [[samples()[i]["input_ids"].tolist() for i in pair] for pair in ([0, 4], [3, 5], [1, 2])]
    targets = [[[(1, 9), (2, 7)], [(1, 9), (2, 8)]] for _ in sequences]
    questions = Questions(sequences, targets, None, [0, 1, 0], [2, 2, 2])
    truth = []
    for pair in ([0, 4], [3, 5], [1, 2]):
        nats = [alone(name)[i][0].log_softmax(-1) for i in pair]
        truth.append(torch.stack([nats[0][1, 9] + nats[0][2, 7], nats[1][1, 9] + nats[1][2, 8]]))
    seen, real = [], accuracy._accuracy
    monkeypatch.setattr(accuracy, "_accuracy", lambda asked, *scores: seen.append(scores[0]) or real(asked, *scores))
    for tokens in (1, 20, 4096):
        monkeypatch.setattr(reading, "BATCH_TOKENS", tokens)
        accuracy.measure(Decoder(fresh(name)), questions)
        assert relative(seen[-1], torch.stack(truth)) < LIMIT


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_streamed_model(name, tmp_path):
    fresh(name).save_pretrained(tmp_path / "model")
    decoder = Decoder(open_streamed(tmp_path / "model", "cpu", "float64"))
    whole = load_model(tmp_path / "model", "float64")
    truth = [copy.deepcopy(whole)(input_ids=sample["input_ids"][None]).logits[0].detach() for sample in samples()]
    for group in ([4], [0, 4], [5, 3, 2, 1]):
        ours = decoder.logits(pack([samples()[i] for i in group])).detach()
        assert relative(ours, torch.cat([truth[i] for i in group])) < LIMIT


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_steps_in_graphs(kind, caplog):
    """A bucket knows its width only, 64 here: where no sample can reach the edge a step is captured, else it is not."""
    rope, most = {"longrope": (LONG | {"original_max_position_embeddings": 70}, 200), "dynamic": (DYNAMIC, 70)}[kind]
    config = tf.LlamaConfig(**SMALL | {"max_position_embeddings": most}, rope_parameters=dict(rope))
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (60, 64, 33, 70, 71, 20)]
    data = [{"input_ids": x, "labels": x} for x in ids]
    other = copy.deepcopy(model)
    with kf.reinserted(model, other, block=range(1, 2), lr=1e-3) as training:
        decoder, grad = training.decoder, training.flat.grad

        def forward(batch, rows):
            return losses.linear_loss(
                decoder.final(decoder.run(batch, rows=True)), decoder.head, batch.targets, rows.weight, rows.cap
            )

        graphs = StepGraphs(decoder, forward, grad, capture)
        for group in ([0, 5], [1, 2], [0, 5], [3, 5], [4, 0], [4, 3, 1]):
            found = []
            for i in group:
                one = pack([data[i]])
                forward(one, losses.gradient_difference(one, 1, 1.0))[0].backward()
            found.append(grad.clone() / len(group))
            grad.zero_()
            batch = pack([data[i] for i in group])
            graphs(batch, losses.gradient_difference(batch, len(group), 1.0))
            assert relative(grad, found[0]) < LIMIT
            grad.zero_()
        assert graphs.captured == 2 and "beyond 70 tokens" in caplog.text


def test_a_model_that_has_run_something_long(tmp_path):
    """Its own state is another; what we compute is the same, and what a saved model is compared with."""
    model, first = fresh("llama, dynamic"), fresh("llama, dynamic")
    with torch.no_grad():
        model(input_ids=torch.arange(3, 53)[None])

    def longest():  # transformers 5.0 keeps it under another name
        return {name: int(n) for name, n in vars(model.model.rotary_emb).items() if "max_seq_len_cached" in name}

    before = longest()
    decoder, parts = Decoder(model), types.SimpleNamespace(parts={"forget": samples()[3:5]})
    assert relative(decoder.logits(pack([samples()[3]])), alone("llama, dynamic")[3][0]) < LIMIT
    truth = first(input_ids=torch.stack([sample["input_ids"][:20] for sample in samples()[3:5]])).logits
    assert relative(ReadBack(tmp_path, decoder, parts, True).truth, truth) < LIMIT
    assert longest() == before and 50 in before.values()


class OtherRotary(nn.Module):
    """A user's own: its base grows with the longest position, and it remembers how long the longest was."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def forward(self, x, position_ids):
        self.longest = max(self.longest, int(position_ids.max()) + 1)
        frequencies = (100.0 + self.longest) ** -(torch.arange(4, dtype=torch.float64) / 4)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_rotary_module_that_is_not_known():
    model = fresh("qwen3")
    model.model.rotary_emb = OtherRotary()
    truth = [copy.deepcopy(model)(input_ids=sample["input_ids"][None]).logits[0].detach() for sample in samples()]
    decoder = Decoder(model)
    for group in itertools.chain(*GROUPS):
        ours = decoder.logits(pack([samples()[i] for i in group])).detach()
        assert relative(ours, torch.cat([truth[i] for i in group])) < LIMIT, group
    assert model.model.rotary_emb.longest == 0 and "forward" not in vars(model.model.rotary_emb)
    assert Decoder(fresh("qwen3")).rotary.same_up_to == math.inf


def test_a_rotary_module_that_is_not_known_where_samples_are_not_packed(monkeypatch):
    """Padded, a short sample would have the angles of the longest one beside it."""
    monkeypatch.setattr(ways, "odd_types", lambda config: {"odd"})
    model = fresh("qwen3")
    model.model.rotary_emb = OtherRotary()
    truth = [copy.deepcopy(model)(input_ids=sample["input_ids"][None]).logits[0].detach() for sample in samples()]
    decoder = Decoder(model)
    assert decoder.way.name == "alone"
    assert relative(decoder.logits(pack(samples())).detach(), torch.cat(truth)) < LIMIT
    config = SimpleNamespace(index_topk=64)
    assert [way.name for way in ways.ways_of(config, SimpleNamespace(same_up_to=8))] == ["alone"]
    assert [way.name for way in ways.ways_of(config, SimpleNamespace(same_up_to=math.inf))] == ["picked", "alone"]


def test_attention_scaled_by_the_place_in_a_batch():
    """Llama 4's layers without RoPE count places in the batch, not in the sample."""
    config = tf.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=1,
        layer_types=["full_attention"] * 3, no_rope_layers=[1, 0, 1], floor_scale=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    decoder = Decoder(model)
    for group in ([4], [0, 1]):
        truth = torch.cat([model(input_ids=samples()[i]["input_ids"][None]).logits[0] for i in group])
        assert relative(decoder.logits(pack([samples()[i] for i in group])), truth) < LIMIT
    with pytest.raises(ValueError, match="2 samples or trees of 50 tokens in one batch: from 24 tokens on .*make"):
        decoder.logits(pack([samples()[4], samples()[3]]))
