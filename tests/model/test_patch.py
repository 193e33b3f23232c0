"""Fused layers in a model: its own logits and gradients, less kept for the backward pass, and no trace left."""

import contextlib
import copy
import functools
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import relative
from patch_problem import FUSED, batch_of_ids, block_parameters, own_loss, results
from tiny_models import ROTARY, peak_bytes, random_samples, tiny_model
from torch import nn

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.kernels.projections import linears
from kunbr_fast.model import attention, fused_forwards, patch
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.flops import flop_counter

BLOCKS = [range(0, 2), range(2, 4), range(4, 6), None]


# ---------------------------------------------------------------- own code where that is faster


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_short_calls_run_a_layers_own_code_and_long_ones_fused_layers(architecture, monkeypatch):
    model, calls = tiny_model(architecture, torch.float32), []
    for name in ("rms_norm", "swiglu", "apply_rotary"):
        whole = getattr(fused_forwards, name)
        monkeypatch.setattr(fused_forwards, name, lambda *a, w=whole, n=name, **k: calls.append(n) or w(*a, **k))
    short, long = (torch.arange(2 * length).view(2, length) for length in (5, 6))
    own = [model(input_ids=ids).logits for ids in (short, long)]
    with contextlib.ExitStack() as changes:
        patch._fuse(model, patch._layers(model), changes, "auto", tokens=12)
        assert torch.equal(model(input_ids=short).logits, own[0]) and not calls
        assert patch.left_alone(model) == "calls of fewer than 12 tokens, where a layer's own code is faster"
        assert relative(model(input_ids=long).logits, own[1]) < 1e-5 and calls.count("rms_norm") >= 12
        assert patch.left_alone(model) is None
        assert torch.equal(copy.deepcopy(model)(input_ids=short).logits, own[0])
        mlp = model.model.layers[0].mlp
        for length in (5, 12):
            x, before = torch.randn(length, model.config.hidden_size), calls.count("swiglu")
            assert relative(mlp(x=x), type(mlp).forward(mlp, x)) < 1e-5
            assert calls.count("swiglu") - before == (length == 12)
    assert patch.left_alone(model) == "no fused forwards for this model"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_runs_fused_is_a_matter_of_weights_and_tokens():
    layer = tiny_model().model.layers[0]
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert (patch._worth(layer) - 1) * weights < patch.WORTH <= patch._worth(layer) * weights


# ---------------------------------------------------------------- several products of one input


def projections(rows=7, width=5, out=3, dtype=torch.float64, biases=(True, False, True)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weights = [torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 2, out)]
    return x, weights, [torch.randn(len(w), generator=generator).to(w) if b else None for w, b in zip(weights, biases)]


@contextlib.contextmanager
def saved_tensors(keep=lambda: True):
    """The tensors that autograd saves inside, each storage once, no parameters."""
    found = {}

    def pack_hook(tensor):
        if keep() and not isinstance(tensor, nn.Parameter):
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("asked", range(1, 64))  # x, three weights, two biases: every subset
def test_linears_computes_what_is_asked_for_and_saves_only_that(asked):
    x, weights, biases = projections()
    tensors = [x, *weights, biases[0], biases[2]]
    flags = [bool(asked >> place & 1) for place in range(6)]
    inputs = [t.requires_grad_(flag) for t, flag in zip(tensors, flags)]
    wanted = [t for t, flag in zip(inputs, flags) if flag]
    dys = [torch.randn(3, 7, len(w), dtype=torch.float64) for w in weights]

    truth = [F.linear(x, w, b) for w, b in zip(weights, biases)]
    with saved_tensors() as saved:
        ours = linears(x, weights, biases)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth))
    expected = [x] * any(flags[1:4]) + weights * flags[0]
    assert set(saved) == {t.untyped_storage().data_ptr() for t in expected}
    live = [place for place, y in enumerate(ours) if y.requires_grad]
    for a, b in zip(
        torch.autograd.grad([ours[p] for p in live], wanted, [dys[p] for p in live]),
        torch.autograd.grad(
            [y for y in truth if y.requires_grad], wanted, [dy for y, dy in zip(truth, dys) if y.requires_grad]
        ),
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_linears_twice_differentiable_and_unused_outputs():
    x, weights, biases = projections()
    inputs = [t.requires_grad_() for t in (x, *weights, biases[0], biases[2])]
    call = lambda x, a, b, c, bias_a, bias_c: linears(x, [a, b, c], [bias_a, None, bias_c])  # noqa: E731
    small = [t.detach()[..., :3].requires_grad_() if t.dim() > 1 else t for t in inputs]
    assert torch.autograd.gradcheck(call, small) and torch.autograd.gradgradcheck(call, small)
    grads = torch.autograd.grad(call(*inputs)[1].sum(), inputs, allow_unused=True)
    assert [g is None for g in grads] == [False, True, False, True, True, True]
    torch.testing.assert_close(grads[0], weights[1].sum(0).expand_as(x))


@pytest.mark.parametrize("rows", [0, 1, 123])
def test_linears_on_odd_shapes_and_strides(rows):
    x, weights, biases = projections(rows=rows, width=63, out=123)
    x = x.transpose(0, 1).requires_grad_()
    weights[0] = weights[0].t().contiguous().t().requires_grad_()  # column-major
    ours, truth = linears(x, weights, biases), [F.linear(x, w, b) for w, b in zip(weights, biases)]
    dys = [torch.randn(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0) for y in truth]
    for a, b in zip(
        torch.autograd.grad(ours, [x, weights[0]], dys), torch.autograd.grad(truth, [x, weights[0]], dys), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(linears(x, weights, biases), [x, weights[0]], dys)
    first = torch.autograd.grad(linears(x, weights, biases), [x, weights[0]], dys)
    assert all(torch.equal(a, b) for a, b in zip(again, first))


def test_linears_bfloat16_is_as_good_as_torch():
    x, weights, biases = projections(rows=32, width=64, out=63, dtype=torch.bfloat16)
    dys = [torch.randn(3, 32, len(w)).bfloat16() for w in weights]

    def dx(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        ys = function(leaf, [w.to(dtype) for w in weights], [b if b is None else b.to(dtype) for b in biases])
        return torch.autograd.grad(ys, leaf, [dy.to(dtype) for dy in dys])[0].double()

    plain = lambda x, weights, biases: [F.linear(x, w, b) for w, b in zip(weights, biases)]  # noqa: E731
    truth = dx(plain, torch.float64)
    assert (dx(linears, torch.bfloat16) - truth).norm() <= 2 * (dx(plain, torch.bfloat16) - truth).norm()


def test_linears_needs_one_buffer_for_the_input_gradient():
    x, weights, _ = projections(rows=512, width=64)
    weights = [torch.randn(8, 64, dtype=torch.float64) for _ in weights]
    size = x.numel() * 8

    def backward_peak(function):
        leaf = x.clone().requires_grad_()
        ys = function(leaf)
        dys = [torch.ones_like(y) for y in ys]
        return peak_bytes(lambda: torch.autograd.grad(ys, leaf, dys))

    assert size <= backward_peak(lambda x: linears(x, weights)) < 1.1 * size
    assert backward_peak(lambda x: [F.linear(x, w) for w in weights]) >= 2 * size


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("forward_inside", [True, False])
def test_linears_under_autocast(forward_inside, backward_inside):
    def run(function):
        x, weights, biases = projections(dtype=torch.float32)
        inputs = [t.requires_grad_() for t in (x, *weights, biases[0])]
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
            ys = function(x, weights, biases)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            return ys, torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys])

    ours, ours_grads = run(linears)
    truth, truth_grads = run(lambda x, weights, biases: [F.linear(x, w, b) for w, b in zip(weights, biases)])
    assert [y.dtype for y in ours] == [torch.bfloat16 if forward_inside else torch.float32] * 3
    assert all(torch.equal(a, b) for a, b in zip(ours, truth))
    eps = 2.0**-8  # several roundings to bf16, in another order; torch's own backward rounds where autocast is on
    for a, b in zip(ours_grads, truth_grads):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 4 * eps * b.norm()


def test_linears_leave_float64_alone_under_autocast():
    x, weights, biases = projections()
    with torch.autocast("cpu", torch.bfloat16):
        ours, truth = linears(x, weights, biases), [F.linear(x, w, b) for w, b in zip(weights, biases)]
    assert all(a.dtype == torch.float64 and torch.equal(a, b) for a, b in zip(ours, truth))


def test_linears_refuses():
    x, weights, biases = projections()
    with pytest.raises(ValueError, match="3 weights and 1 biases"):
        linears(x, weights, biases[:1])
    with pytest.raises(ValueError, match="0 weights"):
        linears(x, [])


@pytest.mark.parametrize("asked", ["x", "weight", "both", "neither"])
def test_a_single_linear_layer_of_torch_saves_what_is_asked_for(asked):
    """The discipline that lets down and output projections stay torch's own."""
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    x.requires_grad_(asked in ("x", "both")), weight.requires_grad_(asked in ("weight", "both"))
    with saved_tensors() as saved:
        F.linear(x, weight)
    expected = [weight] * (asked in ("x", "both")) + [x] * (asked in ("weight", "both"))
    assert set(saved) == {t.untyped_storage().data_ptr() for t in expected}


# ---------------------------------------------------------------- the models' own results


class Wide:
    """torch, in which float32 is float64: what a model's own code computes in fp32 it then computes in fp64.

    Norms (and the softmax of eager attention) are fp32 also in an fp64 model of transformers, so that its own code is
    no truth beyond 1e-7. The source that runs stays the model's.
    """

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def widened(monkeypatch):
    def apply(model):
        for name in {type(m).__module__ for m in model.modules()} | {attention.__name__}:
            if name.startswith("transformers.models") or name == attention.__name__:
                monkeypatch.setattr(sys.modules[name], "torch", Wide())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model

    return apply


def packed_loss(decoder):
    batch = pack(random_samples(3, seed=0, low=9, high=14) + random_samples(1, seed=1, low=1, high=1))
    logits = decoder.logits(batch)
    return logits, F.cross_entropy(logits[:-1], batch.input_ids[1:])


@pytest.mark.parametrize("architecture", FUSED + ["gpt2"])
def test_fp64_logits_loss_and_gradients_are_the_models_own(architecture, widened):
    """By the model's own forward and by `Decoder` on packed samples, for each block."""
    model = widened(tiny_model(architecture))
    decoder = Decoder(model)
    runs = {"own": lambda: own_loss(model), "packed": lambda: packed_loss(decoder)}
    truth = {name: results(run, dict(model.named_parameters())) for name, run in runs.items()}
    for block in BLOCKS:
        inside = block_parameters(model, block)
        with kf.patched(model, active_block=block) as same:
            assert same is model
            assert {n for n, p in model.named_parameters() if p.requires_grad} == set(inside)
            fused = sum("forward" in module.__dict__ for module in model.modules())
            assert fused >= (6 * 2 + 1 if architecture == "gpt2" else 6 * 4 + 1)
            for name, run in runs.items():
                ours = results(run, inside)
                for key, value in ours.items():
                    assert relative(value, truth[name][key]) < 1e-9, (block, name, key)
            own_loss(model)[1].backward()
            assert {n for n, p in model.named_parameters() if p.grad is not None} == set(inside)
        model.zero_grad()


@pytest.mark.parametrize("architecture", FUSED)
def test_fp64_keeps_the_models_own_fp32_steps(architecture):
    """Against the model's own code as it is, with norms that are fp32 inside."""
    model = tiny_model(architecture)
    parameters = block_parameters(model, None)
    truth = results(lambda: own_loss(model), parameters)
    with kf.patched(model):
        ours = results(lambda: own_loss(model), parameters)
    for key, value in truth.items():
        # Gemma's norms multiply by `weight.float()`: its gradient is a sum in fp32, in the order of x's layout
        assert relative(ours[key], value) < (4 * 2.0**-23 if "norm" in key and "gemma" in architecture else 1e-9), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", FUSED)
def test_low_precision_is_as_good_as_the_models_own(architecture, dtype, widened):
    """The same bits forward. Backward each kind of gradient's error, root mean square over 3 layers and 2 models (of
    one vector of 8 it is a matter of luck), is at most twice the model's own in that dtype."""
    block, found = range(1, 4), []
    for seed in range(2):
        model = tiny_model(architecture, dtype, seed)
        native = results(lambda: own_loss(model), block_parameters(model, block))  # noqa: B023
        with kf.patched(model, active_block=block):
            ours = results(lambda: own_loss(model), block_parameters(model, block))  # noqa: B023
        assert torch.equal(ours["logits"], native["logits"]) and torch.equal(ours["loss"], native["loss"])
        found.append((native, ours, copy.deepcopy(model).double()))
    squares = {}
    for native, ours, exact in found:
        truth = results(lambda: own_loss(widened(exact)), block_parameters(exact, block))  # noqa: B023
        for key, value in truth.items():
            assert ours[key].dtype == native[key].dtype
            kind = key.split(".layers.")[-1].partition(".")[2]
            both = squares.setdefault(kind, [0.0, 0.0])
            both[0] += relative(ours[key], value) ** 2
            both[1] += relative(native[key], value) ** 2
    for kind, (mine, own) in squares.items():
        assert mine <= 4 * own, kind


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_kernels_in_the_interpreter(architecture):
    model, block = tiny_model(architecture, torch.float32, num_hidden_layers=2), range(0, 1)
    ids, found = torch.arange(3, 8)[None], {}
    for impl in ("torch", "triton"):
        with kf.patched(model, active_block=block, impl=impl):
            run = lambda: (model(ids).logits, model(ids, labels=ids).loss)  # noqa: E731
            found[impl] = results(run, block_parameters(model, block))
    for key, value in found["torch"].items():
        assert relative(found["triton"][key], value) < 1e-5, key


# ---------------------------------------------------------------- what is kept for the backward pass


def kept_by_layer(model, index):
    """What a layer keeps if the gradient of its input is asked for and that of no weight: {storage: tensor}."""
    inside, layer = [], patch._layers(model)[index]
    hooks = [
        layer.register_forward_pre_hook(lambda *_: inside.append(True)),
        layer.register_forward_hook(lambda *_: inside.clear()),
    ]
    ids = batch_of_ids()["input_ids"]
    shared = []
    hooks.append(  # made once for all layers, and kept whatever one of them does
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: shared.extend([*kwargs["position_embeddings"], kwargs["attention_mask"]]),
            with_kwargs=True,
        )
    )
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    try:
        with saved_tensors(lambda: bool(inside)) as found:
            model(inputs_embeds=embeds, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    known = {t.untyped_storage().data_ptr() for t in shared if t is not None}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return {place: t for place, t in found.items() if place not in known | weights}


def stored_bytes(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", FUSED)
def test_a_cover_layer_keeps_less(architecture, dtype):
    model = tiny_model(architecture, dtype)
    with kf.patched(model, active_block=range(0, 1)):
        ours = stored_bytes(kept_by_layer(model, 4))
    model.requires_grad_(False)
    own = stored_bytes(kept_by_layer(model, 4))
    print(f"{architecture} {dtype}: {own} bytes, patched {ours}: {ours / own:.2f}")
    assert ours < (0.9 if dtype == torch.float32 else 0.75) * own  # fp32 copies are what its own code keeps in bf16


def test_what_a_cover_layer_of_llama_keeps():
    model = tiny_model("llama", torch.bfloat16)
    with kf.patched(model, active_block=range(0, 1)):
        kept = kept_by_layer(model, 4)
        shapes = sorted((str(t.dtype)[6:], t.untyped_storage().nbytes()) for t in kept.values())
    tokens, width, inner, kv = 3 * 12, 32, 48, 16
    expected = (
        [("bfloat16", 2 * tokens * width)] * 2  # the norms' inputs: the residual stream before each
        + [("bfloat16", 2 * tokens * width)] * 2  # rotated queries, attention's output
        + [("bfloat16", 2 * tokens * kv)] * 2  # rotated keys, values
        + [("bfloat16", 2 * tokens * inner)] * 2  # gate, up
        + [("float32", 4 * tokens)] * 2  # 1/rms
        + [("float32", 4 * tokens * 4)]  # attention's log-sum-exp, of 4 heads
    )
    assert shapes == sorted(expected)


# ---------------------------------------------------------------- in and out again


def everything(model):
    """All that a patch could leave changed, with identities."""
    return (
        [
            (
                id(module),
                {name: id(value) for name, value in module.__dict__.items()},
                [id(hook) for name in vars(module) if "hook" in name for hook in (getattr(module, name) or ())],
                [(name, id(buffer), buffer.data_ptr(), buffer._version) for name, buffer in module.named_buffers()],
            )
            for module in model.modules()
        ],
        [(id(p), p.data_ptr(), p._version, p.requires_grad, id(p.grad)) for p in model.parameters()],
        list(model.state_dict()),
    )


@pytest.mark.parametrize("ends", ["normally", "by an exception", "while being patched"])
@pytest.mark.parametrize("architecture", FUSED + ["gpt2"])
def test_nothing_is_left(architecture, ends, monkeypatch):
    model = tiny_model(architecture)
    layers = patch._layers(model)
    layers[3].mlp.register_forward_hook(lambda *_: None)
    layers[1].requires_grad_(False)
    model.get_input_embeddings().train()
    foreign = functools.partial(type(layers[5].mlp).forward, layers[5].mlp)
    layers[5].mlp.forward = foreign
    own_loss(model)  # makes what a model makes at its first call
    before, logits = everything(model), own_loss(model)[0]
    forwards = [module.forward for module in model.modules()]
    if ends == "normally":
        with kf.patched(model, active_block=range(1, 3)):
            own_loss(model)
            model.train(), layers[1].requires_grad_(False)
    elif ends == "by an exception":
        with pytest.raises(ZeroDivisionError):
            with kf.patched(model, active_block=range(1, 3)):
                own_loss(model)
                model.train()
                raise ZeroDivisionError
    else:
        put = patch._fuse
        monkeypatch.setattr(patch, "_fuse", lambda *args: (put(*args), 1 / 0))
        with pytest.raises(ZeroDivisionError), kf.patched(model, active_block=range(1, 3)):
            pass
    assert everything(model) == before
    assert [module.forward for module in model.modules()] == forwards and layers[5].mlp.forward is foreign
    assert torch.equal(own_loss(model)[0], logits)


def test_flags_within_the_block_stay_as_they_are_set():
    model = tiny_model("llama")
    layers = patch._layers(model)
    layers[2].mlp.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    with kf.patched(model, active_block=range(2, 3)):
        assert not any(p.requires_grad for p in layers[2].mlp.parameters())
        assert all(p.requires_grad for p in layers[2].self_attn.parameters())
        layers[2].input_layernorm.requires_grad_(False)  # a user's, and theirs to take back
        model.model.norm.requires_grad_(True)
        own_loss(model)[1].backward()
        assert model.model.norm.weight.grad is not None
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "lm_head.weight",
        "model.layers.2.input_layernorm.weight",
        *(f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_a_second_patch_names_the_first():
    model = tiny_model("llama")
    with kf.patched(model, active_block=range(2, 4)):
        before = everything(model)
        for again in (model, model.model, nn.ModuleDict({"wrapped": model})):
            with pytest.raises(RuntimeError, match=r"patched\(LlamaForCausalLM, active_block=range\(2, 4\)"):
                with kf.patched(again):
                    pass
        assert everything(model) == before
    with kf.patched(model):
        pass


@pytest.mark.parametrize("block", [range(4, 7), range(3, 3), range(0, 4, 2), [1, 2], 3, range(-1, 2)], ids=str)
def test_a_block_that_is_none(block):
    model = tiny_model("llama")
    before = everything(model)
    with pytest.raises(ValueError, match="expected a range of layers within"), kf.patched(model, active_block=block):
        pass
    assert everything(model) == before


def test_what_is_refused():
    model = tiny_model("llama")
    before = everything(model)
    with pytest.raises(ValueError, match="unknown impl 'fast'"), kf.patched(model, impl="fast"):
        pass
    with pytest.raises(Unavailable), kf.patched(model, impl="cuda"):
        pass
    with pytest.raises(ValueError, match="no module in it has a model's config"), kf.patched(nn.Linear(2, 2)):
        pass
    assert everything(model) == before


def test_it_says_what_a_block_costs(caplog):
    model, ids = tiny_model("llama").train(), torch.arange(60).view(2, 30)
    model.set_attn_implementation("eager")  # torch counts no FLOPs of SDPA's kernel on a CPU

    def flops():
        with flop_counter() as counter:
            model.model(input_ids=ids)[0].sum().backward()
        return counter.get_total_flops()

    whole = flops()
    with caplog.at_level(logging.INFO, logger="kunbr_fast.model.patch"), kf.patched(model, range(2, 4), "torch"):
        block = flops()
    (line,) = [record.message for record in caplog.records if "train" in record.message]
    assert line == "layers 2 to 3 of 6 train: about 0.67 of the FLOPs of training every layer"
    assert block / whole == pytest.approx(0.67, abs=0.03)


def test_an_unknown_architecture_says_so_once(caplog):
    patch.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kunbr_fast.model.patch"):
        for _ in range(3):
            model = tf.NanoChatForCausalLM(tf.NanoChatConfig(**ROTARY))
            with kf.patched(model, active_block=range(1, 2)):
                assert not any("forward" in module.__dict__ for module in model.modules())
                assert sum(p.requires_grad for p in model.parameters()) == len(list(model.model.layers[1].parameters()))
        assert [r.message for r in caplog.records] == [
            "NanoChatDecoderLayer: no fused layers for this type of layer; it runs its own code (and frozen layers "
            "stay frozen)"
        ]
        caplog.clear()
        with kf.patched(tiny_model("llama")):
            pass
        assert not caplog.records


# ---------------------------------------------------------------- modules that are not what is expected


class Scaled(nn.Module):
    """As an adapter does it: the plain layer inside, and something added."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = nn.Parameter(torch.randn_like(base.weight) * 0.1)

    def forward(self, x):
        return self.base(x) + F.linear(x, self.extra)


def check_equal(model, parameters, while_patched=lambda: None):
    truth = results(lambda: own_loss(model), parameters)
    with kf.patched(model):
        while_patched()
        ours = results(lambda: own_loss(model), parameters)
    for key, value in truth.items():
        assert relative(ours[key], value) < 1e-9, key


@pytest.mark.parametrize(
    "path",
    ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
)
def test_wrapped_projections_are_called(path, widened):
    model = widened(tiny_model("llama"))
    for layer in model.model.layers[::2]:
        parent, _, name = path.partition(".")
        setattr(layer.get_submodule(parent), name, Scaled(layer.get_submodule(path)).double())
    check_equal(model, dict(model.named_parameters()))


def test_a_projection_with_a_forward_of_its_own_is_called(widened):
    model = widened(tiny_model("qwen2"))
    calls = []
    for layer in model.model.layers:
        linear = layer.self_attn.k_proj
        linear.forward = functools.partial(lambda linear, x: (calls.append(1), F.linear(x, linear.weight))[1], linear)
    check_equal(model, {n: p for n, p in model.named_parameters() if "k_proj.bias" not in n}, calls.clear)
    assert len(calls) == 6


def test_hooks_inside_fused_modules_run():
    """Also those that are registered inside the context, and on a norm that would take the residual sum in."""
    model, seen = tiny_model("llama"), []
    layer = model.model.layers[2]
    paths = ["self_attn.q_proj", "mlp.up_proj", "mlp.act_fn", "post_attention_layernorm", "input_layernorm", "mlp"]
    with kf.patched(model):
        plain = own_loss(model)[0]
        hooks = [layer.get_submodule(p).register_forward_hook(lambda m, x, y: seen.append(m)) for p in paths]
        hooks.append(layer.mlp.gate_proj.register_full_backward_hook(lambda m, dx, dy: seen.append(m)))
        logits, loss = own_loss(model)
        loss.backward()
        assert relative(logits, plain) < 1e-12
        for hook in hooks:
            hook.remove()
    assert {id(m) for m in seen} == {id(layer.get_submodule(p)) for p in [*paths, "mlp.gate_proj"]}


def test_an_mlp_with_another_activation_keeps_its_own_forward(widened):
    model = widened(tiny_model("llama", hidden_act="relu"))
    check_equal(model, dict(model.named_parameters()))
    with kf.patched(model):
        layer = model.model.layers[0]
        assert "forward" not in layer.mlp.__dict__ and "forward" in layer.self_attn.__dict__
    for act, approximate in (("gelu", "none"), ("gelu_pytorch_tanh", "tanh"), ("swish", None)):
        model = tiny_model("llama", hidden_act=act)
        with kf.patched(model):
            gated = model.model.layers[0].mlp.forward.keywords["gated"]
            assert getattr(gated, "keywords", {}).get("approximate") == approximate
        check_equal(model, dict(model.named_parameters()))


def test_a_subclass_keeps_its_own_forward(widened):
    model = widened(tiny_model("llama"))
    kind = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Mine", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})
    check_equal(model, block_parameters(model, range(1, 2)))
    with kf.patched(model):
        assert "forward" not in model.model.layers[0].mlp.__dict__


def test_only_another_tools_forwards_says_so(caplog):
    patch.say_once.cache_clear()
    model = tiny_model("llama")
    for module in model.modules():
        module.forward = functools.partial(type(module).forward, module)
    before = everything(model)
    with caplog.at_level(logging.WARNING, logger="kunbr_fast.model.patch"), kf.patched(model):
        assert everything(model)[0][5] == before[0][5]
    assert "nothing is fused" in caplog.text
    assert everything(model) == before


def test_a_copy_made_inside_is_its_own():
    """Its fused forwards are bound to its own modules, not to the original's."""
    model = tiny_model("llama")
    with kf.patched(model):
        other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(own_loss(other)[0], own_loss(copy.deepcopy(other))[0]) and own_loss(other)[0].abs().sum() > 0
