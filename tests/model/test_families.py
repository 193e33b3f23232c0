"""Each row of FAMILIES: what it says is fused is fused, and computes what the model's own code does."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from architectures.configurations import ARCHITECTURES, made
from helpers import relative
from packaging.version import Version
from torch import nn

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.kernels import dispatch
from kunbr_fast.model import compat, families, fused_forwards
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.families import FAMILIES, ROLES, identify

TEXT = {"cohere_compass": "cohere_compass_text", "aria": "aria_text"} | {
    name: f"{name}_text" for name in ("gemma3", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_5_moe", "llama4")
}
ROWS = [name for name in FAMILIES if TEXT.get(name, name) in ARCHITECTURES]  # not all are in each release
BY_EYE = ["granite", "gemma4_unified", "gpt_oss", "cohere2", "starcoder2", "glm4", "phi", "deepseek_v3", "gpt2", "opt"]
SEEN = [pytest.param(name, marks=[] if name in BY_EYE else pytest.mark.slow) for name in ROWS]
PACKED = [
    pytest.param(name, marks=[] if name in BY_EYE else pytest.mark.slow)
    for name in ROWS
    if not {"Attention", "DecoderLayer"} & set(FAMILIES[name].own) and name not in ("gpt_oss", "granite_swa", "gemma4")
]


WHOLE = compat.VERSION >= Version("5.17")  # earlier releases write some of these classes otherwise
NEWEST = compat.VERSION >= Version("5.23")


def tiny(name, dtype=torch.float64):
    """Skips what an earlier release does not build or run by itself."""
    try:
        model = made(TEXT.get(name, name), dtype)
        NEWEST or model(input_ids=torch.arange(3, 7)[None], use_cache=False)
    except Exception as error:
        if NEWEST:
            raise
        pytest.skip(f"transformers {compat.VERSION}: {error}")
    return model


def role(module, family):
    return "LayerNorm" if type(module) is nn.LayerNorm and family.cast == "layer" else identify(module)[1]


def results(model, ids):
    out = model(input_ids=ids, use_cache=False).logits
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.square().mean(), list(named.values()), allow_unused=True)
    return {"logits": out.detach()} | {n: g for n, g in zip(named, grads) if g is not None}


@pytest.mark.parametrize("name", SEEN)
def test_a_row_is_the_models_own_code(name):
    model, family = tiny(name), FAMILIES[name]
    ids = torch.arange(3, 27).view(2, 12)  # longer than the windows of 6
    truth = results(model, ids)
    with kf.patched(model):
        fused = {role(m, family) for m in model.modules() if "forward" in m.__dict__}
        ours = results(model, ids)
    there = {role(m, family) for m in model.modules()} & set(ROLES)
    if name == "gemma4":  # with inputs for each layer
        there.remove("DecoderLayer")
    assert fused == there - set(family.own) if WHOLE else fused <= there - set(family.own)
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        # an fp64 model's own norms are fp32 inside, also where they sum their weight's gradient
        limit = 1e-6 if "norm" in key or family.cast == "layer" else 1e-9
        assert torch.equal(ours[key], value) or relative(ours[key], value) < limit, key


@pytest.mark.parametrize("name", SEEN)
def test_norms_round_as_the_models_own(name):
    model = tiny(name, torch.bfloat16)
    found = {}
    with kf.patched(model, impl="torch"):
        for module in model.modules():
            if getattr(module.__dict__.get("forward"), "func", None) is fused_forwards._norm:
                found.setdefault(type(module), module)
        for kind, module in found.items():
            x = torch.randn(3, 50, len(module.weight), generator=torch.Generator().manual_seed(0)).bfloat16()
            ours, own = module(x), kind.forward(module, x)
            assert ours.dtype == own.dtype and (ours != own).double().mean() < 1e-3, kind
    assert found or "LayerNorm" in FAMILIES[name].own or name == "nemotron"


@pytest.mark.skipif(dispatch.why_not("layer_norm", "triton", "cpu") is not None, reason="no triton")
@pytest.mark.parametrize("name", ["starcoder2", "granite"])
def test_the_kernels_in_the_interpreter(name):
    """LayerNorm with a bias, alone and with the residual sum; Granite's factors before that sum."""
    model, ids = tiny(name, torch.float32), torch.arange(3, 8)[None]
    truth = results(model, ids)
    with kf.patched(model, impl="triton"):
        ours = results(model, ids)
    for key, value in truth.items():
        assert relative(ours[key], value) < 1e-4, key


@pytest.mark.skipif(not WHOLE, reason="some layers give tuples, which do not run packed")
@pytest.mark.parametrize("name", PACKED)
def test_some_rows_of_the_last_layer(name):
    if name == "gemma4_unified" and not NEWEST:
        pytest.skip("its last layer keeps keys and values for others, which do not ask")
    model = tiny(name)
    samples = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.tensor([-100] * (n - 2) + [5, 6])} for n in (9, 5)]
    with kf.patched(model):
        decoder, batch, asked = Decoder(model), pack(samples), []
        decoder.layers[-1].mlp.register_forward_hook(lambda module, args, out: asked.append(args[0].shape[1]))
        with torch.no_grad():
            few = decoder.run(batch, rows=True)
            everything = decoder.run(batch)[batch.rows]
    assert asked == [len(batch.rows), batch.num_tokens] and relative(few, everything) < 1e-7  # routers are fp32 inside


def test_the_page_lists_the_rows():
    page = (Path(families.__file__).parents[2] / "docs" / "fused_layers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M)
    assert [name for name, _ in rows] == list(FAMILIES)
    for name, cells in rows:
        marks = ["fused" if role not in FAMILIES[name].own else "" for role in ("MLP", "Attention", "DecoderLayer")]
        assert [cell.strip() for cell in cells.split("|")] == marks, name


def test_every_field_is_explained():
    text = inspect.getdoc(families.Family)
    assert all(re.search(rf"\b{name}\b", text) for name in families.Family.__dataclass_fields__)


def test_dropout_after_attention_and_mlp_draws_the_same_numbers():
    model = tiny("seed_oss", torch.float32).train()
    for module in model.modules():
        if hasattr(module, "residual_dropout"):
            module.residual_dropout = 0.3

    def logits():
        torch.manual_seed(1)
        return model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits

    own = logits()
    with kf.patched(model):
        assert relative(logits(), own) < 1e-5
    assert relative(model.eval()(input_ids=torch.arange(3, 15)[None]).logits, own) > 1e-2
