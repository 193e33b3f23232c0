"""The model taken apart: equal to the model's own logits, leaving no trace, refusing what does not fit."""

import copy

import pytest
import torch
import transformers as tf
from helpers import relative
from tiny_models import ARCHITECTURES, ROTARY, VOCAB, random_samples, tiny_model
from torch import nn

from kunbr_fast.data import pack
from kunbr_fast.files.models import load_model
from kunbr_fast.model.attention import ATTENTION
from kunbr_fast.model.decoder import Decoder, Head, Stretch

# Gemma-2's attention softmax runs in fp32 also in an fp64 model, in its own code and here: equal up to its rounding.
LIMIT = {"gemma2": 1e-6}


def mixed_samples(seed=0):
    """Lengths 1 to 20, so that windows of 7 tokens are exceeded and padding is large."""
    return random_samples(3, seed=seed, low=14, high=20) + random_samples(2, seed=seed + 1, low=1, high=4)


@torch.no_grad()
def own_logits(model, samples):
    return torch.cat([model(input_ids=s["input_ids"][None]).logits[0] for s in samples])


def state(model):
    """Everything that a run could leave behind."""
    return (
        [
            (id(m), m.training, set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ],
        [(id(p), p.data_ptr(), p.requires_grad, p.grad, p._version) for p in model.parameters()],
        model.config._attn_implementation,
    )


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_a_packed_batch_are_the_models_own(architecture):
    model = tiny_model(architecture)
    decoder, samples = Decoder(model), mixed_samples()
    truth = own_logits(model, samples)
    with torch.no_grad():
        ours = decoder.logits(pack(samples))
        assert ours.shape == (sum(len(s["input_ids"]) for s in samples), VOCAB)
        assert relative(ours, truth) < LIMIT.get(architecture, 1e-12)
        for one, part in zip(samples, truth.split([len(s["input_ids"]) for s in samples])):  # no padding at all
            assert relative(decoder.logits(pack([one])), part) < LIMIT.get(architecture, 1e-12)


MORE = {
    "gemma3": lambda: tf.Gemma3TextConfig(**{**ROTARY, "tie_word_embeddings": True}, head_dim=8, sliding_window=7),
    "granite": lambda: tf.GraniteConfig(
        **ROTARY, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.3
    ),
    "cohere": lambda: tf.CohereConfig(**ROTARY, logit_scale=0.3),
    "cohere2": lambda: tf.Cohere2Config(**ROTARY, logit_scale=0.3, sliding_window=7),
    "starcoder2": lambda: tf.Starcoder2Config(**ROTARY, sliding_window=7),
    "smollm3": lambda: tf.SmolLM3Config(**ROTARY),
    "phi": lambda: tf.PhiConfig(**ROTARY),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "gpt2 by layer": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_architectures_that_nobody_named(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MORE[name]()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        samples = mixed_samples()
        assert relative(Decoder(model).logits(pack(samples)), own_logits(model, samples)) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_the_models_own(architecture, dtype):
    """Error against fp64 at most twice that of the model's own forward in the same dtype."""
    model, samples = tiny_model(architecture, dtype), mixed_samples()
    truth = own_logits(copy.deepcopy(model).double(), samples)
    with torch.no_grad():
        ours = Decoder(model).logits(pack(samples))
    assert ours.dtype == dtype
    native = relative(own_logits(model, samples), truth)
    assert 0 < native < 0.1
    assert relative(ours, truth) <= 2 * native


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stretches_are_the_whole(architecture):
    decoder, batch = Decoder(tiny_model(architecture)), pack(mixed_samples())
    with torch.no_grad():
        whole = decoder.run(batch)
        for cuts in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 3, 3, 6]):
            hidden = decoder.embed(batch)
            for start, stop in zip(cuts, cuts[1:]):
                hidden = decoder.run(batch, Stretch(start, hidden), stop)
            assert torch.equal(hidden, whole)
        rows = torch.tensor([3, 0, 17])
        middle = decoder.run(batch, stop=4)
        some = decoder.logits(batch, rows, Stretch(4, middle))
        assert relative(some, decoder.logits(batch)[rows]) < 1e-13 and some.shape == (3, VOCAB)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_neighbour_is_never_seen(architecture):
    """NaN in one sample's hidden states reaches that sample only, forward and backward."""
    decoder, samples = Decoder(tiny_model(architecture)), mixed_samples()
    batch = pack(samples)
    clean = decoder.embed(batch).detach().requires_grad_()
    truth = decoder.run(batch, Stretch(0, clean))
    for poisoned in range(len(samples)):
        mine = batch.sample_of_token == poisoned
        hidden = torch.where(mine[:, None], torch.nan, clean.detach()).requires_grad_()
        out = decoder.run(batch, Stretch(0, hidden))
        assert torch.equal(out[~mine], truth[~mine])
        assert bool(out[mine].isnan().any(1).all())
        (true_grad,) = torch.autograd.grad(truth[~mine].square().sum(), clean, retain_graph=True)
        assert bool((true_grad[~mine] != 0).any(1).all()) and bool((true_grad[mine] == 0).all())
        (grad,) = torch.autograd.grad(out[~mine].square().sum(), hidden)
        assert torch.equal(grad[~mine], true_grad[~mine])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_what_a_token_sees(architecture):
    """Nothing to its right; with a window of 7, over 1 layer, nothing more than 6 tokens to its left."""
    decoder, batch = Decoder(tiny_model(architecture)), pack(random_samples(1, low=20, high=20))
    hidden = decoder.embed(batch).detach().requires_grad_()
    out = decoder.run(batch, Stretch(0, hidden), 1)
    windowed = architecture != "llama"
    for t in range(20):
        (grad,) = torch.autograd.grad(out[t].sum(), hidden, retain_graph=True)
        seen = torch.nonzero(grad.abs().sum(1)).flatten().tolist()
        assert seen == list(range(max(0, t - 6) if windowed else 0, t + 1))


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, None), (1.0, 2.0), (3.0, 2.0)])
def test_head(scale, softcap):
    torch.manual_seed(0)
    linear, hidden = nn.Linear(8, 11).double(), torch.randn(5, 8, dtype=torch.float64)
    truth = scale * (hidden @ linear.weight.T + linear.bias)
    truth = truth if softcap is None else softcap * torch.tanh(truth / softcap)
    torch.testing.assert_close(Head(linear, scale, softcap)(hidden), truth, rtol=1e-14, atol=1e-14)


def test_names():
    decoder = Decoder(tiny_model("gpt2"))
    assert decoder.layer_path(3) == "transformer.h.3" and decoder.num_layers == 6 and decoder.hidden_size == 32
    assert decoder.model.get_submodule(decoder.layer_path(3)) is decoder.layers[3]
    assert decoder.dtype == torch.float64 and decoder.max_positions == 64


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_left_behind(architecture):
    model, samples = tiny_model(architecture), mixed_samples()
    logits = own_logits(model, samples)
    Decoder(model).layers[2].train()  # a mixture of modes comes back as it was
    before = state(model)
    decoder = Decoder(model)
    assert state(model) == before
    model.eval()
    before = state(model)
    decoder.logits(pack(samples)).sum().backward()
    model.zero_grad()
    assert state(model) == before
    assert torch.equal(own_logits(model, samples), logits)


def test_nothing_is_left_behind_by_an_exception(monkeypatch):
    model = tiny_model()
    decoder, batch = Decoder(model), pack(mixed_samples())
    before = state(model)

    def fail(*args, **kwargs):
        assert model.config._attn_implementation == ATTENTION
        raise RuntimeError("inside")

    for path in ("embed_tokens", "rotary_emb"):  # inside the recorded forward
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="inside"):
            patch.setattr(getattr(model.model, path), "forward", fail)
            decoder.run(batch)
        assert state(model) == before
    handle = model.model.layers[3].mlp.register_forward_pre_hook(fail)  # inside a layer
    with pytest.raises(RuntimeError, match="inside"):
        decoder.run(batch)
    handle.remove()
    assert state(model) == before
    model.train()
    before = state(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Decoder(model)
    handle.remove()
    assert state(model) == before


def test_a_forward_that_someone_else_has_replaced_stays():
    """Accelerate's hooks and other patches live on the instance."""
    model, samples = tiny_model(), mixed_samples()
    layer, calls = model.model.layers[1], []
    own = layer.forward

    def patched(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = patched
    decoder = Decoder(model)
    assert layer.__dict__["forward"] is patched
    calls.clear()
    with torch.no_grad():
        assert relative(decoder.logits(pack(samples)), own_logits(model, samples)) < 1e-12
    assert layer.__dict__["forward"] is patched and len(calls) == 1 + len(samples)


def test_attention_that_leaves_the_softcap_out(tmp_path):
    """transformers 5.20 and older loads Gemma 2 with SDPA, which knows no softcap."""
    model, ids = tiny_model("gemma2", torch.float32), torch.arange(3, 12)[None]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config._attn_implementation == "eager" and torch.equal(loaded(ids).logits, model(ids).logits)
    assert Decoder(loaded).num_layers == model.config.num_hidden_layers
    loaded.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"leaves out the softcap .*\(2.0\): load it with attn_implementation='eager'"):
        Decoder(loaded)


def test_training_mode_is_refused():
    model = tiny_model()
    decoder = Decoder(model)
    model.train()
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode: call model.eval"):
        decoder.run(pack(mixed_samples()))
    with pytest.raises(ValueError, match="start=2 needs the hidden states"):
        Decoder(model.eval()).run(pack(mixed_samples()), Stretch(2), 3)


# ---------------------------------------------------------------- refusals


def small(config):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_a_damaged_weight_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[3, 5:7] = torch.nan
        model.model.layers[4].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^model.layers.4.mlp.up_proj.weight: 3 of 1536 values are NaN or infinite"):
        Decoder(model)
    wide = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        wide.lm_head.weight.fill_(6e4)
    with pytest.raises(ValueError, match="logits are not finite although all weights are: try a wider dtype"):
        Decoder(wide)


def test_a_head_that_is_no_linear():
    class LoRA(nn.Linear):
        pass

    model = tiny_model()
    model.lm_head = LoRA(32, VOCAB, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="LlamaForCausalLM: its head is LoRA, expected nn.Linear"):
        Decoder(model)
    model.lm_head = None
    with pytest.raises(ValueError, match="its head is NoneType"):
        Decoder(model)


@torch.no_grad()
def test_several_modules_after_the_layers():
    """OPT's final norm, then a projection to the embeddings' size."""
    config = tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = small(config).double()
    decoder, samples = Decoder(model), mixed_samples()
    assert decoder.final(decoder.run(pack(samples))).shape[1] == 16
    assert relative(decoder.logits(pack(samples)), own_logits(model, samples)) < 1e-12


def test_no_list_of_layers_or_several():
    model = tiny_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no nn.ModuleList of num_hidden_layers=5 layers"):
        Decoder(model)
    model.config.num_hidden_layers = 6
    model.model.others = copy.deepcopy(model.model.layers)
    with pytest.raises(ValueError, match=r"several lists of 6 layers \(model.layers, model.others\)"):
        Decoder(model)


class ScalesLogits(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out


class ScalesHidden(tf.LlamaModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.01
        return out


@pytest.mark.parametrize("where", ["logits", "hidden", "unknown softcap", "unpadded head bias"])
def test_a_step_that_is_not_known_fails_the_self_check(where):
    torch.manual_seed(0)
    model = (ScalesLogits if where == "logits" else tf.LlamaForCausalLM)(tf.LlamaConfig(**ROTARY)).double().eval()
    if where == "hidden":
        model.model.__class__ = ScalesHidden
    if where == "unknown softcap":
        model.lm_head.register_forward_hook(lambda module, args, out: torch.tanh(out / 3) * 3)
        model.config.final_logit_softcapping = 2.0  # says one thing, does another
    if where == "unpadded head bias":
        model.config.logit_scale = 1.5  # a setting that this model's code does not read
    with pytest.raises(ValueError, match="taken apart, its logits differ from its own by .* relative"):
        Decoder(model)


@pytest.mark.parametrize(
    "architecture, zeroed",
    [
        ("llama", ""),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed"),
        ("gpt2", ""),
    ],
)
def test_weights_of_zeros_are_blamed_themselves(architecture, zeroed):
    """Not "something around its layers": 0 / 0 is no difference of logits."""
    model, first = tiny_model(architecture), None
    for name, parameter in model.named_parameters():
        if name.startswith(zeroed):
            parameter.data.zero_()
            first = first or name
    with pytest.raises(ValueError, match=rf"all its logits are 0, {first} holds only zeros \(\d+ of \d+ weights do\)"):
        Decoder(model)
