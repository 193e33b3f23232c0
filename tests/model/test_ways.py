"""Models whose layers do not run on packed samples: on a padded grid, or one sample at a time, the same results."""

import logging

import pytest
import torch
import transformers as tf
from density_loops import sample_gradients
from helpers import relative
from reference_procedure import padded_loss
from tiny_models import ROTARY, VOCAB, random_samples, tiny_model
from torch import nn

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.density.measure import knowledge_density
from kunbr_fast.model import attention
from kunbr_fast.model import decoder as decoder_module
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import constants
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.training.full import FullTraining

SMALL = dict(vocab_size=VOCAB, hidden_size=32, bos_token_id=1, eos_token_id=2)
PADDED = {
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **SMALL, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4,
        max_position_embeddings=64,
    ),
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1, eos_token_id=2
    ),
    "bloom": lambda: tf.BloomConfig(**SMALL, n_layer=3, n_head=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    # attends within chunks of 8 tokens
    "llama4": lambda: tf.Llama4TextConfig(
        **ROTARY, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
    "mamba": lambda: tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=4),
}  # fmt: skip


KNOWS_FP64 = {"experts_implementation": "eager"}
EXPERTS = dict.fromkeys(("gpt_oss", "qwen2_moe", "ernie4_5_moe"), KNOWS_FP64)


def made(config):
    torch.manual_seed(0)
    model = (
        tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **EXPERTS.get(config.model_type, {}))
        .double()
        .eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


SAMPLES = random_samples(3, seed=1, low=10, high=20) + random_samples(2, seed=2, low=1, high=4)


@torch.no_grad()
def own_logits(model, samples=SAMPLES):
    return torch.cat([model(input_ids=s["input_ids"][None]).logits[0] for s in samples])


@pytest.fixture(scope="module", params=PADDED)
def padded(request):
    return made(PADDED[request.param]())


# GPT-J and GPT-Neo have attention in fp32 also in an fp64 model, and so have Mamba's and Llama 4's steps
LIMIT = 1e-6


@torch.no_grad()
def test_padded_is_the_models_own(padded):
    decoder, truth = Decoder(padded), own_logits(padded)
    assert decoder.way.name == "padded"
    batch = pack(SAMPLES)
    assert relative(decoder.logits(batch), truth) < LIMIT
    assert relative(decoder.logits(pack(SAMPLES[:1])), truth[: batch.lengths[0]]) < LIMIT
    middle = decoder.run(batch, stop=1)
    assert torch.equal(decoder.run(batch, Stretch(1, middle)), decoder.run(batch))
    rows = decoder.run(batch, Stretch(1, middle), rows=True)
    assert torch.equal(rows, decoder.run(batch)[batch.rows])


def test_the_prefix_cache_of_a_padded_model():
    decoder = Decoder(made(PADDED["bloom"]()))
    cache = PrefixCache(decoder, SAMPLES)
    for layer in (1, 2):
        cache.advance(layer)
        batch = cache.batch([4, 0, 2])
        with torch.no_grad():
            truth = decoder.run(pack([SAMPLES[i] for i in (4, 0, 2)]), stop=layer)
        assert relative(batch.hidden, truth) < 1e-13


@pytest.mark.parametrize("recompute", [False, True])
def test_a_neighbour_is_never_seen(padded, recompute):
    """NaN in one sample's hidden states reaches that sample only, forward and backward."""
    decoder, batch = Decoder(padded), pack(SAMPLES)
    clean = decoder.embed(batch).detach().requires_grad_()
    truth = decoder.run(batch, Stretch(0, clean, recompute))
    mine = batch.sample_of_token == 1
    hidden = torch.where(mine[:, None], torch.nan, clean.detach()).requires_grad_()
    out = decoder.run(batch, Stretch(0, hidden, recompute))
    assert torch.equal(out[~mine], truth[~mine]) and bool(out[mine].isnan().any(1).all())
    (true_grad,) = torch.autograd.grad(truth[~mine].square().sum(), clean)
    (grad,) = torch.autograd.grad(out[~mine].square().sum(), hidden)
    assert torch.equal(grad[~mine], true_grad[~mine]) and bool((true_grad[mine] == 0).all())


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_density_of_a_padded_model(name):
    model, samples = made(PADDED[name]()), [s for s in SAMPLES if len(s["input_ids"]) > 1]
    density, gradients = knowledge_density(model, samples, "all"), sample_gradients(model, samples)
    assert len(density.per_module) == len([n for n in gradients[0] if n.startswith(Decoder(model).layer_path(0)[:-1])])
    for path, value in density.per_module.items():
        truth = sum(float(g[path].abs().sum()) for g in gradients) / len(samples)
        assert value == pytest.approx(truth, rel=LIMIT, abs=1e-12), path


def test_the_gradients_of_a_block_of_a_padded_model():
    model, unlearned = made(PADDED["gptj"]()), made(PADDED["gptj"]())
    forget, retain = SAMPLES[:2], SAMPLES[2:3]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name.startswith("transformer.h.1."))
    (padded_loss(model, retain) - padded_loss(model, forget)).backward()
    truth = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.requires_grad_(True)
    with kf.reinserted(model, unlearned, block=range(1, 2), lr=1e-3) as training:
        training.accumulate(training.criterion.pack(forget, retain))
        for name, parameter in training.parameters.items():
            assert relative(parameter.grad, truth[name]) < LIMIT, name


# ---------------------------------------------------------------- one sample at a time


class SeesTheEnd(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        out = super().forward(hidden_states, **kwargs)
        return out + 0.1 * out.mean(1, keepdim=True)


def test_what_depends_on_the_whole_sequence_runs_alone(caplog):
    model = tiny_model()
    model.model.layers[2].__class__ = SeesTheEnd
    decoder_module._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        decoder = Decoder(model)
    assert decoder.way.name == "alone" and "one sample at a time" in caplog.text
    with torch.no_grad():
        assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < 1e-12
    seen = {}

    def tap(hidden):
        seen["shape"] = hidden.shape
        return hidden * 1.5

    batch = pack(SAMPLES)
    out = decoder.run(batch, Stretch(taps={4: tap}), 5)
    assert torch.equal(out, decoder.run(batch, stop=5) * 1.5) and seen["shape"] == out.shape
    samples = [s for s in SAMPLES if len(s["input_ids"]) > 1]
    density, gradients = knowledge_density(model, samples), sample_gradients(model, samples)
    for path, value in density.per_module.items():
        assert value == pytest.approx(sum(float(g[path].abs().sum()) for g in gradients) / len(samples), rel=1e-10)


@torch.no_grad()
def test_attention_that_picks_keys_is_padded_up_to_as_many():
    """Doge takes the best 5 keys of a query; of equal ones (the same token twice), whichever comes to hand."""
    model = made(tf.DogeConfig(**ROTARY, keep_window_size=5))
    decoder = Decoder(model)
    assert decoder.way.name == "picked"
    same = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([3, 4] * 6, [5, 3, 3] * 3, [3])]
    for samples in (SAMPLES, same):
        assert relative(decoder.logits(pack(samples)), own_logits(model, samples)) < LIMIT
    batch = pack([{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (5, 3)])
    assert [piece.lengths for piece in decoder.way.pieces(batch)] == [[5, 3]]
    assert [piece.lengths for piece in decoder.way.pieces(pack(same))] == [[12], [9], [1]]


# ---------------------------------------------------------------- the self-check


class OffWhenLong(tf.models.llama.modeling_llama.LlamaMLP):
    """1 % off on more tokens than a sample of the self-check has."""

    def forward(self, x):
        return super().forward(x) * (1.01 if x.shape[1] > 8 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_percent_in_one_layer_is_seen(dtype):
    model = tiny_model(dtype=dtype)
    model.model.layers[3].mlp.__class__ = OffWhenLong
    assert Decoder(model).way.name == "padded" and Decoder(tiny_model(dtype=dtype)).way.name == "packed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_are_longer_than_the_self_checks_samples(dtype):
    """As users have them: of thousands of tokens."""
    config = PADDED["llama4"]()
    config.attention_chunk_size = 2048
    model = made(config).to(dtype)
    before = [vars(x).copy() for x in (model.config, *model.modules())]
    assert Decoder(model).way.name == "padded"
    assert [vars(x) for x in (model.config, *model.modules())] == before


def test_a_window_in_the_mask_alone_is_kept_packed():
    torch.manual_seed(0)
    config = tf.Qwen2MoeConfig(
        **ROTARY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        use_sliding_window=True, sliding_window=5, max_window_layers=2, layer_types=["sliding_attention"] * 6,
    )  # fmt: skip
    model = made(config)
    decoder = Decoder(model)
    assert decoder.way.name == "packed" and decoder._windows == [5] * 6
    with torch.no_grad():
        assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < LIMIT


SHARED = {}


class Leaves(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        SHARED["states"] = hidden_states
        return super().forward(hidden_states, **kwargs)


class Finds(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + SHARED.pop("states")


def test_states_shared_between_layers(tmp_path):
    """A pass begins below the layer that leaves them behind; a stream, which has one layer at a time, is refused."""
    model = tiny_model()
    model.model.layers[1].__class__, model.model.layers[4].__class__ = Leaves, Finds
    decoder = Decoder(model)
    assert [decoder.entry(layer) for layer in range(7)] == [0, 1, 1, 1, 1, 1, 6]
    with torch.no_grad():
        assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < 1e-12
    cache = PrefixCache(decoder, SAMPLES)
    cache.advance(3)
    assert cache.layer == 1


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="this transformers has no Gemma-4")
@pytest.mark.parametrize("block", [range(2, 3), range(5, 6)])
def test_keys_that_gemma_4_shares(block, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 3
    config = tf.Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=8,
        sliding_window=5, layer_types=kinds, num_kv_shared_layers=2,
    )  # fmt: skip
    model, unlearned = made(config), made(config)
    decoder, data = Decoder(model), SAMPLES[:3]
    assert decoder.entry(5) == decoder.entry(4) < 4 and decoder.entry(2) == 2
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".layers.{block.start}." in name)
    one, two, three = (padded_loss(model, [sample]) for sample in data)  # beside padding its gradient is NaN
    (three - (one + two) / 2).backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(True)
    cache = PrefixCache(decoder, data)
    cache.advance(block.start)
    with kf.reinserted(decoder, unlearned, block=block, lr=1e-3) as training:
        training.accumulate(training.criterion.step_batch(cache.batch([0, 1, 2]), 2))
        assert truth
        for name, gradient in truth.items():
            # its norms and softmax are fp32 inside; tests/architectures, which widens those, has 1e-9
            assert relative(training.parameters[name].grad, gradient) < 1e-5, name
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it takes states of an earlier layer, such as keys"):
        Decoder(open_streamed(tmp_path))


SINKS = {
    "gpt_oss": lambda: tf.GptOssConfig(
        **ROTARY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5, layer_types=None
    ),
    "stablelm": lambda: tf.StableLmConfig(**ROTARY),
    "nemotron": lambda: tf.NemotronConfig(**ROTARY),
}


@pytest.mark.parametrize("name", SINKS)
@torch.no_grad()
def test_sinks_and_layers_that_keep_their_arguments_stay_packed(name):
    model = made(SINKS[name]())
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.normal_(3.0)
    decoder = Decoder(model)
    assert decoder.way.name == "packed"
    assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < LIMIT


def test_attention_without_a_batch():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="attention of packed samples, and no batch: use a Decoder"):
        attention.packed_attention(nn.Module(), x, x, x, None)


def test_a_configuration_without_a_number_of_layers(monkeypatch):
    model = tiny_model()
    monkeypatch.setitem(vars(model.config), "num_hidden_layers", None)
    with pytest.raises(ValueError, match="LlamaForCausalLM: its configuration has no num_hidden_layers"):
        Decoder(model)


# ---------------------------------------------------------------- what a model's own class has frozen


def test_what_a_models_own_class_freezes_is_nobodys_to_train():
    """The bias by which a router of ERNIE's balances its experts: neither refused nor changed."""
    config = tf.Ernie4_5_MoeConfig(
        **ROTARY, moe_intermediate_size=8, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0
    )
    model = made(config).float()
    fixed = constants(model)
    assert len(fixed) == 6 and all(name.endswith("e_score_correction_bias") for name in fixed)
    before = {name: p.clone() for name, p in model.named_parameters() if name in fixed}
    settings = dict(num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1, batch_size=2, rtt=False, warmup_lr=1e-3)
    kf.unlearn(model, SAMPLES[:2], SAMPLES[2:3], kf.KUnBRConfig(**settings, block_lr=1e-3), progress=False)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(after[name].requires_grad for name in fixed)
    model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trains model.layers.0.mlp.gate.weight, which is frozen"):
        kf.unlearn(model, SAMPLES[:2], SAMPLES[2:3], kf.KUnBRConfig(**settings), progress=False)


def test_what_a_models_own_class_freezes_stays_so_in_a_folder(tmp_path):
    """`from_pretrained` has all parameters require grad. A stream of the folder reads no such flag."""
    config = tf.Ernie4_5_MoeConfig(
        **ROTARY, moe_intermediate_size=8, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0
    )
    model = made(config).float()
    fixed = constants(model)
    model.save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fixed and constants(model) == fixed == constants(open_streamed(tmp_path))
    training = FullTraining(Decoder(model), lr=1e-3)
    assert not any(p.requires_grad == (name in fixed) for name, p in model.named_parameters())
    assert not fixed & training.parameters.keys()
    assert training.state().keys() >= dict(model.named_parameters()).keys()  # for a stream, or parts on processes


def test_a_layer_that_the_models_own_forward_leaves_out():
    """Llama 3.2 Vision's cross-attention layers do nothing without an image."""
    model = tiny_model()
    layers = model.model.layers
    forward = tf.LlamaModel.forward

    def without(self, *args, **kwargs):
        self.layers, self.config.num_hidden_layers = nn.ModuleList([*layers[:2], *layers[3:]]), 5
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.layers, self.config.num_hidden_layers = layers, 6

    model.config.use_cache = False
    model.model.__class__ = type("SkipsOne", (tf.LlamaModel,), {"forward": without})
    decoder = Decoder(model)
    with torch.no_grad():
        assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < 1e-12
    unlearned = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model.layers.2 does not run in the model's own forward on text"):
        with kf.reinserted(decoder, unlearned, range(2, 3), lr=1e-3):
            pass


def test_graphs_are_of_packed_samples():
    model = made(PADDED["bloom"]())
    with pytest.raises(ValueError, match="cuda_graphs=True: BloomForCausalLM runs padded, .*leave it out"):
        with kf.reinserted(model, made(PADDED["bloom"]()), range(1, 2), lr=1e-3, cuda_graphs=True):
            pass


@torch.no_grad()
def test_wide_states_and_softcaps_by_other_names():
    config = tf.RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        lru_width=32, attention_window_size=5, logits_soft_cap=1.5,
    )  # fmt: skip
    model = made(config)
    decoder = Decoder(model)
    assert decoder.head.softcap == 1.5 and decoder.hidden_size == 32
    assert relative(decoder.logits(pack(SAMPLES)), own_logits(model)) < LIMIT


@torch.no_grad()
def test_states_wider_than_the_weights():
    """Mamba keeps its residual in fp32: so does the cache, and the head is the model's own again."""
    model = made(PADDED["mamba"]()).bfloat16()
    decoder, samples = Decoder(model), SAMPLES[:2]
    assert decoder.dtype == torch.bfloat16 and decoder.state_dtype == torch.float32
    cache = PrefixCache(decoder, samples)
    cache.advance(2)
    assert cache.is_exact and torch.equal(cache.batch([0, 1]).hidden, decoder.run(pack(samples), stop=2))
    assert decoder.logits(pack(samples)).dtype == torch.bfloat16
    assert relative(decoder.logits(pack(samples)), own_logits(model, samples)) < 8e-3
