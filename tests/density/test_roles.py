"""What counts as attention and what as MLP: by any module on the way from the layer to the weight."""

import pytest
from torch import nn

from kunbr_fast.density.roles import in_attention


def named(kind, **children):
    """A module of a class called `kind`."""
    module = type(kind, (nn.Module,), {})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


LEAF = nn.Linear(2, 2)
CASES = [
    (f"{name}.inner", named("X", **{name: named("Y", inner=LEAF)}), True)
    for name in (
        "self_attn", "attention", "linear_attn", "encoder_attn", "multi_head_attention", "temporal_block", "mamba",
        "self_att", "rel_attn", "kda", "mlstm_layer",
    )
] + [
    (f"{name}.inner", named("X", **{name: named("Y", inner=LEAF)}), False)
    for name in ("mlp", "feed_forward", "block_sparse_moe", "intermediate", "laurel", "shared_mlp")
] + [
    ("mixer.in_proj", named("X", mixer=named("NemotronHMamba2Mixer", in_proj=LEAF)), True),
    ("mixer.q_proj", named("X", mixer=named("NemotronHAttention", q_proj=LEAF)), True),
    ("mixer.up_proj", named("X", mixer=named("NemotronHMLP", up_proj=LEAF)), False),
    ("mixer.experts", named("X", mixer=named("NemotronHMoE", experts=LEAF)), False),
    ("shared.self_attn", named("X", shared=named("ZambaAttentionDecoderLayer", self_attn=LEAF)), True),
    ("shared.feed_forward", named("X", shared=named("ZambaAttentionDecoderLayer", feed_forward=LEAF)), False),
    ("self_attention.experts.router", named("X", self_attention=named("Y", experts=named("Z", router=LEAF))), True),
    ("input_layernorm.mlp", named("X", input_layernorm=named("AttentionGatedNorm", mlp=LEAF)), False),
    ("conv.in_proj", named("X", conv=named("Lfm2ShortConv", in_proj=LEAF)), True),
    ("foo.bar", named("X", foo=named("Unknown", bar=LEAF)), False),
    ("c_fc", named("X", c_fc=named("Conv1D")), False),
    ("fc1", named("X", fc1=LEAF), False),
]  # fmt: skip


@pytest.mark.parametrize("path, layer, attention", CASES)
def test_the_way_says_whether_it_is_attention(path, layer, attention):
    assert in_attention(layer, path) == attention
