"""Tiny random models of every causal language model of transformers.

A configuration is its class's default with its fields shrunk by name (`SHRINK`), and what a class needs beside that
(`OVERRIDES`). `VARIANTS` are settings that change how a model computes, and that the defaults leave out.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, WIDTH, WINDOW, LARGEST = 120, 32, 6, 4_000_000


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SHRINK = (
    _each(VOCAB, "vocab_size vocab_size_per_layer_input")
    | _each(WIDTH, "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim lru_width")
    | _each(4, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers")
    | _each(4, "num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads")
    | _each(4, "encoder_attention_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads")
    | _each(4, "mamba_d_conv mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads rotary_dim")
    | _each(4, "swa_num_attention_heads")
    | _each(2, "num_key_value_heads num_kv_heads index_n_heads linear_num_key_heads swa_num_key_value_heads")
    | _each(2, "num_experts_per_tok moe_topk moe_k")
    | _each(8, "head_dim d_head dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim")
    | _each(8, "linear_value_head_dim linear_head_dim swa_head_dim kv_channels query_pre_attn_scalar d_rel laurel_rank")
    | _each(8, "mamba_d_state mamba_chunk_size state_size chunk_size ssm_state_size hidden_size_per_layer_input")
    | _each(16, "kv_lora_rank q_lora_rank index_head_dim mamba_d_head mamba_head_dim rel_extent")
    | _each(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner n_inner ffn_hidden_size")
    | _each(48, "dense_intermediate_size")
    | _each(24, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size")
    | _each(24, "shared_experts_intermediate_size shared_intermediate_size")
    | _each(24, "moe_shared_expert_intermediate_size")
    | _each(6, "num_experts n_routed_experts num_local_experts moe_num_experts")
    | _each(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace")
    | _each(1, "num_dense_layers mamba_n_groups")
    | _each(0, "num_mtp_layers num_nextn_predict_layers")
    | _each(3, "conv_L_cache")
    | _each(WINDOW, "index_topk sliding_window attention_window_size sliding_window_size window_size")
    | _each(WINDOW, "attention_chunk_size floor_scale keep_window_size")
    | _each(2 * WINDOW, "local_attention")
    | _each(64, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions")
    | _each(32, "max_source_positions")
    | _each(True, "is_decoder")
    | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2, decoder_start_token_id=1)
    | dict(sep_token_id=3, image_token_id=110, image_token_index=110, video_token_id=111, audio_token_id=112)
    | dict(boi_token_id=113, boi_token_index=113, eoi_token_id=114, eoi_token_index=114, boa_token_id=115)
    | dict(eoa_token_id=116, eoa_token_index=116, vision_start_token_id=117, vision_end_token_id=118)
)
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
PLAIN = dict(rope_type="default", rope_theta=1e4)
LOW = WINDOW + 2  # tokens up to which scaled rotary angles are those of training: shorter than the longest samples
TIMES = [1.0, 1.1, 1.2, 1.3]
LONG = dict(
    rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=LOW,
    short_factor=TIMES, long_factor=[1.5, 2.0, 3.0, 4.0],
)  # fmt: skip


def _overrides() -> dict[str, dict[str, Any]]:
    """What the configuration of a type needs beside small sizes."""
    latent = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa longcat_flash"
    latent = f"{latent} minicpm3 youtu bailing_hybrid kimi_linear"
    found = {name: dict(num_key_value_heads=4) for name in latent.split()}
    vision = dict(num_hidden_layers=2)
    found["dots3_note_text"] |= dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16,
        swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8,
    )  # fmt: skip
    shared = dict(num_hidden_layers=6, layer_types=[SLIDING, FULL] * 3, num_kv_shared_layers=2)
    gemma4 = shared | dict(global_head_dim=16)
    unified = {name: value for name, value in gemma4.items() if name != "num_kv_shared_layers"}
    qwen4 = dict(
        hc_lowrank=8, heads_per_ngram=2, ngram_vocab_size_base=50, split_ngram_parts=2, indexer_n_heads=2,
        make_ngram_vocab_size_divisible_by=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=6,
        indexer_compress_ratio=2,
    )  # fmt: skip
    both = dict(layer_types=[LINEAR, FULL] * 2)  # the defaults' first layers are all of one type
    found["bailing_hybrid"] |= both
    found["kimi_linear"] |= both
    return found | {
        "bamba": dict(attn_layer_indices=[1, 3]),
        "granitemoehybrid": both,
        "inkling_text": dict(layer_types=["hybrid_sliding", "hybrid"] * 2),
        "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
        "kolibri1": dict(layer_types=[SLIDING, FULL] * 2),
        "ministral": dict(layer_types=[SLIDING, FULL] * 2),
        "blt": dict(
            vocab_size=260, encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[3, 4],
            encoder_config=dict(hidden_size_global=WIDTH, vocab_size=260), patcher_config=dict(vocab_size=260),
            decoder_config=dict(hidden_size_global=WIDTH, vocab_size=260), global_config=dict(hidden_size=WIDTH),
        ),
        "cohere_compass_text": dict(
            layer_types=[SLIDING, SLIDING, SLIDING, FULL], rope_parameters={FULL: dict(PLAIN), SLIDING: dict(PLAIN)},
            num_key_value_heads=2,
        ),
        "dbrx": dict(
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0), rope_parameters=dict(PLAIN),
            ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
        ),
        "dots3_note": dict(
            text_config=found["dots3_note_text"],
            vision_config=dict(
                mlp_layer_types=["dense"] * 4, per_layer_config={}, adapter_in_dim=WIDTH, adapter_out_dim=WIDTH
            ),
            audio_config=dict(adapter_input_size=WIDTH, adapter_out_dim=WIDTH, downsample_hidden_size=8),
        ),
        "falcon_h1": dict(mamba_d_ssm=64),
        "gemma3": dict(text_config=dict(num_hidden_layers=6)),
        "gemma3_text": dict(num_hidden_layers=6),
        "gemma3n": dict(text_config=shared),
        "gemma3n_text": shared,
        "gemma4": dict(text_config=gemma4),
        "gemma4_text": gemma4,
        "gemma4_unified": dict(
            text_config=unified,
            vision_config=dict(
                mm_embed_dim=WIDTH, output_proj_dims=WIDTH, mm_posemb_size=8, patch_size=2, pooling_kernel_size=1
            ),
        ),
        "gemma4_unified_text": unified,
        "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
        "lfm2": dict(layer_types=["conv", FULL, "conv", FULL]),
        "lfm2_moe": dict(layer_types=["conv", FULL, "conv", FULL]),
        "mamba2": dict(head_dim=16, num_heads=4, n_groups=1),
        "nemotron_h": dict(n_groups=1, layer_types=[LINEAR, "moe", FULL, "mlp"]),
        "phi4_multimodal": dict(
            audio_config=dict(
                num_blocks=1, hidden_size=WIDTH, intermediate_size=48, ext_pw_out_channel=16, nemo_conv_channels=16,
                depthwise_separable_out_channel=16, input_size=16,
            ),
            vision_config=dict(hidden_size=WIDTH, intermediate_size=48, image_size=28, **vision),
        ),
        "qwen4_exp": dict(text_config=qwen4),
        "qwen4_exp_text": qwen4,
        "reformer": dict(
            axial_pos_embds=False, attn_layers=["local", "lsh"] * 2, local_attn_chunk_length=4,
            lsh_attn_chunk_length=4, num_buckets=2, hash_seed=0, attention_head_size=8, feed_forward_size=48,
        ),
        "roc_bert": dict(
            pronunciation_vocab_size=20, shape_vocab_size=20, pronunciation_embed_dim=8, shape_embed_dim=8
        ),
        "xmod": dict(default_language="en_XX"),
        "zamba": dict(
            num_hidden_layers=6, layers_block_type=[LINEAR, LINEAR, "hybrid"] * 2, mamba_dt_rank=4, n_mamba_heads=2
        ),
        "zamba2": dict(layers_block_type=[LINEAR, "hybrid"] * 2, n_mamba_heads=4),
        "zaya": dict(num_experts_per_tok=1, router_hidden_size=8),
    }  # fmt: skip


OVERRIDES = _overrides()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # rotary angles by length, with samples on both sides
    "llama, longrope": ("llama", dict(rope_parameters=LONG)),
    "phi3, longrope": ("phi3", dict(rope_parameters=LONG, original_max_position_embeddings=LOW)),
    "llama, dynamic NTK": (
        "llama", dict(max_position_embeddings=LOW, rope_parameters=PLAIN | dict(rope_type="dynamic", factor=2.0))
    ),
    "llama, yarn": (
        "llama",
        dict(rope_parameters=PLAIN | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=LOW)),
    ),
    "llama, llama3": (
        "llama",
        dict(rope_parameters=PLAIN | dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=LOW,
        )),
    ),
    # heads
    "llama, tied, biases": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama, one kv head of 10": ("llama", dict(num_key_value_heads=1, head_dim=10)),
    "llama, as many kv heads": ("llama", dict(num_key_value_heads=4)),
    "gpt_bigcode, many kv heads": ("gpt_bigcode", dict(multi_query=False)),
    "gpt2, scaled by layer": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)),
    "gpt_neox, residuals in turn": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False)),
    "opt, norms last": ("opt", dict(do_layer_norm_before=False)),
    "opt, projections": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "falcon, 7B": ("falcon", dict(multi_query=True, parallel_attn=True, bias=False)),
    "falcon, 40B": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon, 11B": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    "falcon, rw": (
        "falcon", dict(alibi=True, multi_query=False, num_kv_heads=4, parallel_attn=False, bias=True)
    ),
    "stablelm, norms of heads": ("stablelm", dict(qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True)),
    "phi, norms of heads": ("phi", dict(qk_layernorm=True, num_key_value_heads=4)),
    "cohere, norms of heads": ("cohere", dict(use_qk_norm=True)),
    "mpt, no alibi": ("mpt", dict(attn_config=dict(alibi=False, clip_qkv=8.0))),
    "bloom, residual after the norm": ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    # windows
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "qwen2, windows above": (
        "qwen2", dict(use_sliding_window=True, max_window_layers=2, layer_types=[FULL, FULL, SLIDING, SLIDING])
    ),
    "qwen2_moe, windows in masks": (
        "qwen2_moe", dict(use_sliding_window=True, layer_types=[SLIDING, FULL, SLIDING, FULL])
    ),
    "gemma3, one in three": (
        "gemma3_text", dict(layer_types=[SLIDING, SLIDING, FULL] * 2, attn_logit_softcapping=None)
    ),
    "gemma3, dynamic in one type of layer": (
        "gemma3_text",
        dict(max_position_embeddings=LOW, layer_types=[SLIDING, SLIDING, FULL] * 2, rope_parameters={
            SLIDING: PLAIN, FULL: PLAIN | dict(rope_type="dynamic", factor=2.0),
        }),
    ),
    "llama4, chunks alone": ("llama4_text", dict(layer_types=["chunked_attention"] * 4, no_rope_layers=[1] * 4)),
    "llama4, full": ("llama4_text", dict(layer_types=[FULL] * 4, no_rope_layers=[1, 0, 1, 0], floor_scale=4)),
    "qwen3_next, dynamic NTK": (
        "qwen3_next",
        dict(
            max_position_embeddings=LOW,
            rope_parameters=PLAIN | dict(rope_type="dynamic", factor=2.0, partial_rotary_factor=1.0),
        ),
    ),
    "llama4, longrope": (
        "llama4_text",
        dict(rope_parameters=LONG, layer_types=["chunked_attention", FULL] * 2, no_rope_layers=[1, 0, 1, 0]),
    ),
    "gptj, all rotated": ("gptj", dict(rotary_dim=8)),
    # experts
    "qwen3_moe, one expert a token": ("qwen3_moe", dict(num_experts_per_tok=1, norm_topk_prob=False)),
    "qwen3_moe, every other layer": ("qwen3_moe", dict(mlp_only_layers=[0, 2], norm_topk_prob=True)),
    "deepseek_v3, groups": ("deepseek_v3", dict(n_group=3, topk_group=2, q_lora_rank=None)),
    "granitemoehybrid, dense": ("granitemoehybrid", dict(num_local_experts=0)),
    "gemma4, no shared keys": ("gemma4_text", dict(num_kv_shared_layers=0)),
    "gemma4, experts beside": (
        "gemma4_text",
        dict(num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24)
    ),
    "jamba, experts in every layer": ("jamba", dict(expert_layer_period=1, expert_layer_offset=0)),
    # softcaps
    "gemma2, no softcaps": ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
}  # fmt: skip


def fields_of(cls: type) -> set[str]:
    """The names of a configuration's settings; earlier releases have no dataclasses."""
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters)


def shrunk(cls: type, overrides: dict[str, Any] | None = None) -> tf.PreTrainedConfig:
    """A tiny instance of a configuration class; the configurations inside it are shrunk too."""
    overrides, fields = dict(overrides or {}), fields_of(cls)
    values = {name: value for name, value in SHRINK.items() if name in fields}
    for name, inner in (getattr(cls, "sub_configs", None) or {}).items():
        if name in overrides and not isinstance(overrides[name], dict):
            continue
        if inner is tf.AutoConfig:
            kind = (overrides.get(name) or {}).get("model_type")
            inner = CONFIG_MAPPING[kind] if kind else type(getattr(cls(), name, None))
        if inner is not None and issubclass(inner, tf.PretrainedConfig):
            given = overrides.pop(name, None) or {}
            if "vision" in name or "audio" in name:  # not as deep as the text model
                deep = {"num_hidden_layers", "encoder_layers", "depth", "num_layers"}
                given = dict.fromkeys(deep & fields_of(inner), 2) | given
            values[name] = shrunk(inner, given).to_dict()
    return cls(**values | overrides)


def configuration(name: str) -> tf.PreTrainedConfig:
    kind, changes = VARIANTS.get(name, (name, {}))
    config = shrunk(CONFIG_MAPPING[kind], copy.deepcopy(OVERRIDES.get(kind, {}) | changes))
    if kind == "dbrx":  # its attention reads what its configuration does not hand on
        config.attn_config.rope_theta = 1e4
    return config


def _forms(name: str) -> list[dict[str, str]]:
    """Options of loading: attention and experts that know fp64, and all that a model offers if it has no such."""
    sdpa, eager, experts = (
        {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}, {"experts_implementation": "eager"}
    )  # fmt: skip
    text = configuration(name).get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None) is not None or text.model_type == "gpt_oss"
    first = [eager | experts, eager] if softcap else []  # SDPA would leave it out
    return [*first, sdpa | experts, sdpa, experts, eager, {}]


def made(name: str, dtype: torch.dtype = torch.float64, own: bool = False, noise: float = 0.1) -> tf.PreTrainedModel:
    """A random model, in eval mode; every parameter is random, biases and norms too. own: attention and experts as
    somebody gets them who says nothing. Errors: transformers' own."""
    first = None
    for options in [{}] if own else _forms(name):
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in tf.AutoModelForCausalLM.from_config(configuration(name)).parameters())
            assert count < LARGEST, f"{name}: {count} parameters"
            model = tf.AutoModelForCausalLM.from_config(configuration(name), **options).to(dtype).eval()
            break
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            first = first or error
    else:
        raise first
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * noise
            parameter.add_(change.to(dtype))
    return model
