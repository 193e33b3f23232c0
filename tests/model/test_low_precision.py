"""Low precision of the cover: how far weights and gradients are off, what is held, and that nothing is left behind."""

import copy
import dataclasses
import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import relative
from tiny_models import ROTARY, peak_bytes, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli.command import main
from kunbr_fast.data import pack
from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.model import low_precision as quantized
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.low_precision import low_precision_cover, quantize
from kunbr_fast.model.patch import patched
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.training.approximation import cosine, gradient_cosine

NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)
LOSSY = ["fp8", "int8", NF4]
DTYPES = [torch.float32, torch.bfloat16]
BLOCK = range(2, 4)
FORGET, RETAIN = random_samples(5, seed=1), random_samples(4, seed=2)
BYTES = {"fp8": 1, "int8": 1, "nf4": 0.5625}
# the most that a weight can be off, in parts of its row's (nf4: its block's) largest: half a step
OFF = {"fp8": 16 / 448, "int8": 0.5 / 127, "nf4": 0.16}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def training_of(model, precision, block=BLOCK, **settings):
    source = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    return kf.reinserted(model, source, block, lr=1e-3, cover_precision=precision, **settings)


def gradient_of(training, batch=None):
    batch = batch or pack(FORGET + RETAIN)
    loss = training.loss(training.criterion.step_batch(batch, len(FORGET))).loss
    loss.backward()
    gradient = training.flat.grad.clone()
    training.flat.grad.zero_()
    return gradient


def snapshot(model):
    return {
        name: (p, p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()
    }


def assert_as_before(model, before):
    for name, parameter in model.named_parameters():
        same, address, value, flag, gradient = before[name]
        assert parameter is same and parameter.data_ptr() == address, name
        assert torch.equal(parameter, value) and parameter.requires_grad == flag and parameter.grad is gradient, name
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(name.startswith("_kunbr") for module in model.modules() for name in module.__dict__)
    model.state_dict()


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", LOSSY)
def test_a_weight_comes_back_within_half_a_step(precision, dtype):
    weight = random(48, 128, dtype=dtype) * torch.logspace(-3, 2, 48)[:, None].to(dtype)  # rows of very different size
    found = quantize(weight, precision).dense(dtype)
    assert found.dtype == dtype and found.shape == weight.shape
    parts = (64,) if precision == "nf4" else (128,)
    weight, found = (x.double().reshape(-1, *parts) for x in (weight, found))
    largest = weight.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps * weight.abs() if dtype != torch.float64 else 1e-6 * largest
    assert bool(((found - weight).abs() <= OFF[precision] * largest * (1 + 1e-6) + rounding).all())


@pytest.mark.parametrize("precision", LOSSY)
def test_rows_of_zeros_stay_zero_and_shapes_are_free(precision):
    weight = random(3, 35)
    weight[1] = 0.0
    found = quantize(weight, precision).dense(torch.float32)
    assert found.shape == (3, 35) and bool(found.isfinite().all())
    if precision != "nf4":  # its blocks know no rows
        assert bool((found[1] == 0).all())
    assert bool((quantize(torch.zeros(2, 64), precision).dense(torch.float32) == 0).all())


def test_fp8_holds_what_e4m3_can_hold_exactly():
    values = torch.tensor([[448.0, -416.0, 0.0, 1.125, 2.0**-9]])
    assert torch.equal(quantize(values, "fp8").dense(torch.float32), values)
    values = torch.tensor([[127.0, -3.0, 0.0, 64.0]])
    assert torch.equal(quantize(values, "int8").dense(torch.float32), values)


@pytest.mark.parametrize("precision", LOSSY)
def test_bytes_are_counted(precision):
    weight = random(256, 512, dtype=torch.bfloat16)
    assert quantize(weight, precision).nbytes == pytest.approx(BYTES[precision] * weight.numel(), rel=0.02)


# ---------------------------------------------------------------- products


def run(weight, x, bias, dy):
    x = x.clone().requires_grad_()
    y = quantized._Product.apply(x, bias, weight)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("precision", LOSSY)
def test_products_are_those_with_the_dense_weight(precision, with_bias, dtype):
    weight = quantize(random(48, 64, dtype=dtype), precision)
    x, dy = random(2, 7, 64, dtype=dtype, seed=1), random(2, 7, 48, dtype=dtype, seed=2)
    bias = random(48, dtype=dtype, seed=3) if with_bias else None
    y, dx = run(weight, x, bias, dy)
    dense = weight.dense(dtype)
    truth_x = x.double().requires_grad_()
    truth = F.linear(truth_x, dense.double(), None if bias is None else bias.double())
    truth.backward(dy.double())
    theirs_x = x.clone().requires_grad_()
    theirs = F.linear(theirs_x, dense, bias)
    theirs.backward(dy)
    assert y.dtype == dx.dtype == dtype
    assert relative(y, truth) <= 2 * relative(theirs, truth)
    assert relative(dx, truth_x.grad) <= 2 * relative(theirs_x.grad, truth_x.grad)


def test_small_gradients_do_not_vanish():
    weight = quantize(random(16, 32, dtype=torch.float16), "fp8")
    dy = (random(4, 16, seed=1) * 1e-4).half()
    _, dx = run(weight, random(4, 32, seed=2).half(), None, dy)
    assert relative(dx, dy.double() @ weight.dense(torch.float64)) < 0.05


@pytest.mark.parametrize("precision", LOSSY)
def test_nothing_but_one_dense_weight_at_a_time(precision):
    """torchao's weight-only layers fail this: autograd saves each dense weight."""
    weights = [quantize(random(256, 256, seed=i), precision) for i in range(8)]
    x = random(2, 256).requires_grad_()

    def chain():
        y = x
        for weight in weights:
            y = quantized._Product.apply(y, None, weight)
        y.sum().backward()

    chain()
    dense = 256 * 256 * 4
    assert peak_bytes(chain) < 2.5 * dense
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        quantized._Product.apply(x, None, weights[0])
    assert not saved


def test_a_second_derivative_is_refused():
    x = random(3, 64).requires_grad_()
    y = quantized._Product.apply(x, None, quantize(random(48, 64), "int8"))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---------------------------------------------------------------- gradients of a block

LIMITS = {"fp8": 0.998, "int8": 0.9995, "nf4": 0.98}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("precision", LOSSY)
def test_the_gradient_has_nearly_the_exact_direction(precision, architecture):
    model = tiny_model(architecture, torch.float32)
    batch = pack(FORGET + RETAIN)
    with training_of(model, "none") as training:
        truth = gradient_of(training)
    with training_of(model, precision) as training:
        found = gradient_cosine(training, training.criterion.step_batch(batch, len(FORGET)))
        assert not training.flat.grad.any() and training.steps == 0
        ours = gradient_of(training)
        with training.cover.exact():
            assert relative(gradient_of(training), truth) < 1e-4  # fused layers add up in another order
    assert found == pytest.approx(cosine(ours, truth), abs=1e-6)
    assert LIMITS[precision] < found < 1


def test_none_changes_no_bit():
    samples = pack(FORGET + RETAIN)
    gradients = []
    for settings in ({}, {"cover_precision": "none"}):
        model = tiny_model("llama", torch.bfloat16)
        source = dict(tiny_model("llama", torch.bfloat16, seed=1).named_parameters())
        with kf.reinserted(model, source, BLOCK, lr=1e-3, **settings) as training:
            assert (
                training.cover is None
                and gradient_cosine(training, training.criterion.step_batch(samples, len(FORGET))) == 1.0
            )
            gradients.append(gradient_of(training))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("precision", ["int8"])
def test_the_gradient_is_that_of_a_model_with_these_weights(precision):
    model = tiny_model("qwen2", torch.float64)  # with biases
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for layer in rounded.model.layers[BLOCK.stop :]:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(quantize(module.weight, precision).dense(torch.float64))
    gradients = []
    for one, mode in ((rounded, "none"), (model, precision)):
        with kf.reinserted(
            one, dict(tiny_model("qwen2", seed=3).named_parameters()), BLOCK, 1e-3, cover_precision=mode
        ) as t:
            gradients.append(gradient_of(t))
    assert relative(*gradients) < 1e-9


@pytest.mark.parametrize("precision", LOSSY)
def test_gradient_checkpointing_gives_the_same_bits(precision):
    gradients = []
    for again in (False, True):
        with training_of(tiny_model("llama", torch.float32), precision, gradient_checkpointing=again) as training:
            gradients.append(gradient_of(training))
            cosine_ = gradient_cosine(training, training.criterion.pack(FORGET, RETAIN))
            gradients.append(torch.tensor(cosine_))
    assert torch.equal(gradients[0], gradients[2]) and gradients[1] == gradients[3]


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_fused_layers_and_the_models_own_agree(impl):
    gradients = []
    for fuse in (True, False):
        model = tiny_model("llama", torch.float64)
        decoder = Decoder(model)
        with frozen(model), low_precision_cover(decoder, BLOCK, "int8"):
            with patched(model, impl=impl) if fuse else frozen(model):
                hidden = random(1, 32, seed=5)[0].expand(pack(FORGET).num_tokens, 32).double().requires_grad_()
                decoder.run(pack(FORGET), Stretch(4, hidden)).sum().backward()
        gradients.append(hidden.grad)
    assert relative(*gradients) < 1e-7  # norms: fp32 inside


def test_below_the_block_all_is_exact_with_and_without_a_prefix_cache():
    model = tiny_model("llama", torch.float64)
    decoder = Decoder(model)
    truth = decoder.run(pack(FORGET), stop=BLOCK.start)
    source = dict(tiny_model("llama", seed=1).named_parameters())
    with kf.reinserted(decoder, source, BLOCK, lr=1e-3, cover_precision="int8") as training:
        cache = PrefixCache(decoder, FORGET + RETAIN)
        cache.advance(BLOCK.start)
        batch = cache.batch(range(len(FORGET) + len(RETAIN)))
        assert relative(decoder.run(pack(FORGET), stop=BLOCK.start), truth) < 1e-12
        assert relative(batch.hidden[: len(truth)], truth) < 1e-7  # batched otherwise
        assert relative(gradient_of(training, batch), gradient_of(training)) < 1e-6
        # they lie in main memory, the parameters on the device are placeholders
        assert decoder.layers[0].mlp.up_proj.weight.stride() == (0, 0)
        assert decoder.layers[5].mlp.up_proj.weight.stride() == (0, 0)
        assert decoder.layers[2].mlp.up_proj.weight.stride() != (0, 0)


def test_autocast():
    model = tiny_model("qwen2", torch.float32)
    decoder = Decoder(model)
    with frozen(model), low_precision_cover(decoder, BLOCK, "int8"):
        hidden = random(pack(FORGET).num_tokens, 32, seed=5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder.layers[5].mlp.up_proj(hidden)
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("precision", LOSSY)
def test_a_steps_metrics_and_updates_stay_close(precision):
    ends = []
    for mode in ("none", precision):
        model, source = tiny_model("llama", torch.float32), dict(tiny_model("llama", torch.float32).named_parameters())
        source = {name: value.detach().clone() for name, value in source.items()}
        with kf.reinserted(model, source, BLOCK, lr=1e-3, optimizer="adamw", cover_precision=mode) as training:
            for _ in range(3):
                metrics = training.step(FORGET, RETAIN)
        start = dict(model.named_parameters())
        moved = torch.cat([(source[n] - start[n]).detach().flatten() for n in training.parameters])
        ends.append((metrics["forget_loss"], moved))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=0.05)
    assert cosine(ends[0][1], ends[1][1]) > 0.8


def test_cosine():
    a = random(1 << 10, seed=1)
    assert cosine(a, a) == pytest.approx(1.0) and cosine(a, -a) == pytest.approx(-1.0)
    assert cosine(a, a * 0) == 0.0 and cosine(a * 0, a * 0) == 1.0


# ---------------------------------------------------------------- in and out


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])  # gemma2: embeddings and head are tied
@pytest.mark.parametrize("precision", LOSSY)
def test_everything_is_put_back(precision, architecture):
    model = tiny_model(architecture, torch.bfloat16)
    before = snapshot(model)
    with training_of(model, precision) as training:
        training.step(FORGET, RETAIN)
    assert_as_before(model, before)
    with pytest.raises(KeyError, match="stop"):
        with training_of(model, precision):
            raise KeyError("stop")
    assert_as_before(model, before)


def test_also_after_a_failure_half_way(monkeypatch):
    model = tiny_model("llama", torch.float32)
    before = snapshot(model)
    real, calls = quantized.quantize, []

    def fails(weight, precision):
        calls.append(precision)
        if len(calls) == 4:
            raise MemoryError("no")
        return real(weight, precision)

    monkeypatch.setattr(quantized, "quantize", fails)
    with pytest.raises(MemoryError):
        with training_of(model, "int8"):
            raise AssertionError
    assert len(calls) == 4
    assert_as_before(model, before)


@pytest.mark.parametrize("precision", ["none", "int8"])
def test_a_cumulative_block_stays_and_is_rounded_as_a_cover(precision):
    """Low to high the next block's cover lies above; on a second round a trained block is in it, rounded once more from
    its exact weights."""
    model = tiny_model("llama", torch.float32)
    source = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    with kf.reinserted(
        model, source, range(4, 5), lr=1e-2, insertion="cumulative", cover_precision=precision
    ) as training:
        training.step(FORGET, RETAIN)
    trained = dict(model.named_parameters())["model.layers.4.mlp.up_proj.weight"].detach().clone()
    assert torch.equal(trained, source["model.layers.4.mlp.up_proj.weight"])
    with low_precision_cover(Decoder(model.requires_grad_(False)), range(0, 1), "int8"):
        held = model.model.layers[4].mlp.up_proj.forward.weight.dense(torch.float32)
        assert torch.equal(held, quantize(trained, "int8").dense(torch.float32))
    assert torch.equal(model.model.layers[4].mlp.up_proj.weight, trained)


@pytest.mark.parametrize("precision", LOSSY)
def test_the_covers_bytes(precision):
    model = tiny_model("llama", torch.bfloat16, hidden_size=128, intermediate_size=192, head_dim=32)
    decoder = Decoder(model)
    count = sum(p.numel() for layer in decoder.layers[4:] for p in layer.parameters() if p.dim() == 2)
    with frozen(model), low_precision_cover(decoder, BLOCK, precision) as cover:
        assert cover.nbytes == pytest.approx(BYTES[precision] * count, rel=0.03)
        linears = [m for layer in decoder.layers[4:] for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == 14 and all(m.weight.untyped_storage().nbytes() == 2 for m in linears)


def test_what_needs_exact_weights_is_refused_inside(tmp_path):
    model = tiny_model("llama", torch.float32)
    with training_of(model, "int8"):
        for call in (
            lambda: kf.knowledge_density(model, FORGET),
            lambda: kf.attribute(model, FORGET, method="grad"),
        ):
            with pytest.raises(RuntimeError, match="cover is in int8 now"):
                call()
        for call in (model.state_dict, functools.partial(model.save_pretrained, tmp_path / "out")):
            with pytest.raises(RuntimeError, match="would hold placeholders"):
                call()
        with pytest.raises(RuntimeError, match="re-insertion: this model's cover is in int8 now"):
            with training_of(model, "fp8"):
                raise AssertionError
        model.model.layers[5].mlp.up_proj(torch.randn(2, 32))  # still installed
        assert model.model.layers[5].mlp.up_proj.weight.isnan().all()
    kf.knowledge_density(model, FORGET)


# ---------------------------------------------------------------- what it refuses


def test_unknown_precisions():
    with pytest.raises(ValueError, match="cover_precision='int3': expected one of none, fp8, int8, nf4$"):
        with training_of(tiny_model("llama"), "int3"):
            raise AssertionError
    with pytest.raises(ValueError, match="cover_precision='int3'"):
        kf.KUnBRConfig(cover_precision="int3")
    assert kf.KUnBRConfig().cover_precision == "none" and kf.KUnBRConfig().changed({}) == {}
    assert kf.KUnBRConfig(cover_precision="fp8").changed({}) == {"cover_precision": "blocks"}


def test_a_missing_library_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(Unavailable, match=r"needs bitsandbytes.*pip install 'kunbr-fast\[nf4\]'"):
        with training_of(tiny_model("llama"), "nf4"):
            raise AssertionError
    config = kf.KUnBRConfig(num_blocks=3, top_k=1, cover_precision="nf4", rtt=False)
    with pytest.raises(Unavailable, match="needs bitsandbytes"):  # before the warm-up
        kf.unlearn(tiny_model("llama"), FORGET, RETAIN, config, on_stage=pytest.fail)


def test_modules_it_cannot_take_are_named():
    model = tiny_model("mixtral", torch.float32, num_hidden_layers=4)
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.mlp\.\w+: low precision takes .* not weight of MixtralTop"
    ):
        with training_of(model, "int8", range(0, 2)):
            raise AssertionError
    with training_of(model, "int8", range(2, 4)):  # none above: the experts below stay where they are
        pass

    model = tiny_model("llama", torch.float32)
    model.model.layers[5].mlp.up_proj.weight = model.model.layers[4].mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"model\.layers\.4\.mlp\.up_proj: its weight is tied to model\.layers\.5\.mlp"
    ):
        with training_of(model, "int8"):
            raise AssertionError

    model = tiny_model("llama", torch.float32)
    module = model.model.layers[4].self_attn.q_proj
    module.forward = functools.partial(type(module).forward, module)
    with pytest.raises(ValueError, match=r"layers\.4\.self_attn\.q_proj: another tool has put its own forward"):
        with training_of(model, "int8"):
            raise AssertionError

    model = tiny_model("llama", torch.float32)
    model.model.layers[5].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(
        ValueError, match=r"layers\.5\.mlp\.up_proj: low precision takes the weights of nn.Linear and Conv1D"
    ):
        list(quantized._linears(_Bare(model), range(6), strict=True))

    with pytest.raises(ValueError, match=r"layers\.4\.self_attn\.q_proj requires grad, but cover layers are frozen"):
        with low_precision_cover(Decoder(tiny_model("llama")), BLOCK, "int8"):
            raise AssertionError


class _Bare:
    """What `_linears` needs of a decoder, without its self-check."""

    def __init__(self, model):
        self.model, self.layers = model, model.model.layers

    def layer_path(self, index):
        return f"model.layers.{index}"


def test_experts_fail_before_the_warm_up():
    model = tiny_model("mixtral", torch.float32, num_hidden_layers=4)
    config = kf.KUnBRConfig(num_blocks=4, top_k=1, skip_last_layers=1, cover_precision="int8", rtt=False)
    with pytest.raises(ValueError, match="set cover_precision none"):
        kf.unlearn(model, FORGET, RETAIN, config, on_stage=pytest.fail)


# ---------------------------------------------------------------- whole runs

CONFIG = kf.KUnBRConfig(
    batch_size=3, warmup_epochs=1, warmup_lr=1e-3, num_blocks=3, top_k=2, block_epochs=2, block_lr=1e-3, rtt=False,
)  # fmt: skip


def whole_run(precision, said=None, **settings):
    model = tiny_model("llama", torch.float32)
    config = dataclasses.replace(CONFIG, cover_precision=precision, **settings)
    report = kf.unlearn(model, FORGET, RETAIN, config, progress=False, on_stage=said)
    return model, report


@pytest.mark.parametrize("insertion", ["independent", "cumulative"])
def test_a_run_reports_each_blocks_cosine(insertion):
    said = []
    model, report = whole_run("int8", said.append, insertion=insertion)
    exact, plain = whole_run("none", insertion=insertion)
    assert plain.gradient_cosines == {} and "gradient_cosines" not in plain.to_dict()
    assert list(report.gradient_cosines) == [f"blocks.0.{b.start}-{b.stop}" for b in report.blocks]
    assert all(0.999 < found < 1 for found in report.gradient_cosines.values())
    assert report.to_dict()["gradient_cosines"] == report.gradient_cosines
    assert sum("cover in int8: the block's gradient has a cosine of 0.999" in text for text in said) == 2
    assert report.blocks == plain.blocks and torch.equal(report.density.per_layer, plain.density.per_layer)
    differences = [not torch.equal(a, b) for a, b in zip(model.parameters(), exact.parameters())]
    assert any(differences)


def test_measuring_does_not_change_the_training(monkeypatch):
    first, _ = whole_run("int8")
    monkeypatch.setattr("kunbr_fast.run.steps.gradient_cosine", lambda *a: 0.5)
    second, report = whole_run("int8")
    assert set(report.gradient_cosines.values()) == {0.5}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_objectives_with_a_reference_and_parts():
    _, report = whole_run("fp8", retain_loss="kl")
    assert all(found > 0.99 for found in report.gradient_cosines.values())
    with training_of(tiny_model("llama", torch.float32), "int8", retain_loss="kl", micro_batch_tokens=20) as training:
        assert gradient_cosine(training, training.criterion.pack(FORGET, RETAIN)) > 0.999


def test_the_command_line_has_the_setting(capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--help"])
    assert "--cover-precision" in capsys.readouterr().out


def test_lora_wrappers():
    peft = pytest.importorskip("peft")
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=97, **{k: v for k, v in ROTARY.items() if k != "vocab_size"} | {"max_position_embeddings": 64}
        )
    ).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = snapshot(wrapped)
    decoder = Decoder(wrapped.base_model.model)
    with frozen(wrapped), low_precision_cover(decoder, BLOCK, "int8") as cover:
        assert len(cover.linears) == 2 * 9 + 2 * 9  # two layers above, two below: 7, and the two factors
        decoder.run(pack(FORGET))
    assert all(torch.equal(p, before[name][2]) for name, p in wrapped.named_parameters())
