"""Tiny random models of every architecture that the package names, and random samples for them."""

import contextlib
import copy
import gc

import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

VOCAB = 97
COMMON = dict(vocab_size=VOCAB, max_position_embeddings=64)
ROTARY = dict(
    **COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**ROTARY),
    "qwen2": lambda: tf.Qwen2Config(**ROTARY),
    "qwen3": lambda: tf.Qwen3Config(**ROTARY, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**ROTARY, sliding_window=7),
    "gemma2": lambda: tf.Gemma2Config(
        **{**ROTARY, "tie_word_embeddings": True},
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": lambda: tf.Phi3Config(**ROTARY),
    "olmo2": lambda: tf.Olmo2Config(**ROTARY),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ARCHITECTURES = list(CONFIGS)

MORE = {
    "gemma3": lambda: tf.Gemma3TextConfig(
        **{**ROTARY, "tie_word_embeddings": True},
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "smollm3": lambda: tf.SmolLM3Config(**ROTARY, no_rope_layer_interval=3),
}

MIXTURES = {
    "mixtral": lambda: tf.MixtralConfig(
        **ROTARY | {"num_hidden_layers": 2}, num_local_experts=6, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **ROTARY | {"num_hidden_layers": 3},
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
}


def tiny_model(architecture="llama", dtype=torch.float64, seed=0, **changes):
    """A random model; every parameter is random, biases and norms too, so that none is inert.

    Attention by SDPA, which is fp64 throughout (the eager form takes its softmax in fp32); but SDPA knows no softcap.
    """
    attention = "eager" if architecture == "gemma2" else "sdpa"
    config = (CONFIGS | MORE | MIXTURES)[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    experts = {"experts_implementation": "eager"} if architecture in MIXTURES else {}  # the others know no fp64
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64).to(dtype) * 0.1)
    return model.eval()


def plain_llama(vocab, layers=2, seed=0, **settings):
    """As transformers makes it, for text: of a tokenizer's size, fp32, in train mode."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, **(sizes | settings)))


def random_samples(count, seed=0, low=3, high=12, vocab=VOCAB):
    """Samples of different lengths, some tokens without a label."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(length, generator=generator) < 0.3] = -100
        labels[-1] = ids[-1]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def live_tensor_bytes():
    """Bytes of every tensor in this process, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided:
            storage = item.untyped_storage()
            with contextlib.suppress(RuntimeError):  # what torch.compile traced has no memory (torch 2.11)
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(function, largest=float("inf")):
    """The most bytes that `function()` has allocated on the CPU and not yet freed, at any time while it runs.

    From the allocator's own log: also what lives only within autograd or within an operator is counted. So is a file
    that safetensors maps, each time it does, though that is no memory: what is larger than `largest` is not counted.
    """
    gc.collect()  # or garbage of earlier tests is freed in the log, and counts against the peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes() if abs(event.nbytes()) <= largest else 0
        peak = max(peak, now)
    return peak


def rotary_flops(model, tokens):
    """Of a llama's rotary angles, which transformers 5.17 makes by a product: no work of a step, but counted as such.
    Later releases multiply element by element, which counts as nothing."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as flops:
        model.model.rotary_emb(torch.empty(1, device=device), torch.zeros(1, tokens, dtype=torch.int64, device=device))
    return flops.get_total_flops()


def moved(model, seed=5, size=0.02):
    """A stand-in for M_u: a copy with every weight moved."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_((torch.randn(p.shape, generator=generator, dtype=torch.float64) * size).to(p.dtype))
    return other
