"""Knowledge density against a loop over samples with autograd in fp64."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
import transformers as tf
from density_loops import loop, mean_of, sample_gradients, trace, wanted
from helpers import rarely
from reference_procedure import left_padded, padded, padded_loss
from tiny_models import ARCHITECTURES, MIXTURES, ROTARY, live_tensor_bytes, peak_bytes, random_samples, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.density import layer_kinds
from kunbr_fast.density.layer_kinds import LAYER_KINDS, How
from kunbr_fast.density.measure import NORMS, REDUCTIONS, Density, knowledge_density
from kunbr_fast.density.passes import Measurement, PassSettings
from kunbr_fast.density.watch import MODULES, watch_list
from kunbr_fast.kernels.grad_density import reference
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives import losses

SAMPLED = ("grad_l1", "grad_l2sq", "grad_mean_abs")  # and fisher, which is grad_l2sq of each sample


@pytest.mark.parametrize(
    "reduction, architecture",
    [
        pytest.param(r, a, marks=pytest.mark.slow if r == "sample" and a not in ("llama", "gpt2", "gemma2") else ())
        for r, a in itertools.product(REDUCTIONS, ARCHITECTURES)
    ],
)
def test_equals_a_loop_over_samples(architecture, reduction):
    model, samples = tiny_model(architecture), random_samples(5, low=6, high=12)
    parameters = dict(model.named_parameters())
    for modules in MODULES:
        truth, per_layer, prefix = loop(model, samples, modules, reduction)
        ours = knowledge_density(model, samples, modules, reduction=reduction, batch_tokens=30)
        assert set(ours.per_module) == set(truth) and truth
        limit = 1e-6 if architecture == "gemma2" else 1e-10
        for name, value in truth.items():
            if value > 1e-9:  # a key bias has no gradient but rounding
                assert abs(ours.per_module[name] - value) <= limit * value, name
            else:
                assert ours.per_module[name] < 1e-9
        for layer in range(6):
            mine = [name for name in truth if name.startswith(f"{prefix}{layer}.")]
            assert abs(float(ours.per_layer[layer]) - per_layer[layer]) <= limit * per_layer[layer]
            assert int(ours.num_weights[layer]) == sum(parameters[n].numel() for n in mine)
        assert ours.per_layer.dtype == torch.float64 and ours.num_samples == 5
        assert (ours.modules, ours.statistic, ours.reduction) == (modules, "grad_l1", reduction)
        torch.testing.assert_close(ours.normalized.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_every_statistic_equals_a_loop_over_samples(architecture):
    model, samples = tiny_model(architecture), random_samples(5, low=6, high=12)
    decoder, gradients = Decoder(model), sample_gradients(model, samples)
    for statistic in NORMS:
        for reduction in REDUCTIONS:
            truth, per_layer, _ = loop(model, samples, "all", reduction, statistic, gradients)
            for batch_tokens in (30, 1000):  # one batch needs no gradient for the mean, several do
                ours = knowledge_density(decoder, samples, "all", statistic, reduction, batch_tokens=batch_tokens)
                for name, value in truth.items():
                    assert abs(ours.per_module[name] - value) <= max(1e-10 * value, 1e-15), name
                torch.testing.assert_close(ours.per_layer.tolist(), per_layer, rtol=1e-10, atol=0)
                assert (ours.statistic, ours.standard_error) == (statistic, None)


def test_the_mean_of_one_batch_holds_no_gradient(monkeypatch):
    model, samples = tiny_model(), random_samples(5)
    several = knowledge_density(model, samples, "all", reduction="mean", batch_tokens=20)
    for name, kind in LAYER_KINDS.items():
        monkeypatch.setitem(LAYER_KINDS, name, dataclasses.replace(kind, gradient=None))
    one = knowledge_density(model, samples, "all", reduction="mean", batch_tokens=1000)
    torch.testing.assert_close(one.per_layer, several.per_layer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
@pytest.mark.parametrize("lengths", [(8,), (3, 5), (4, 4), (3, 6, 4)])
def test_norms_of_queries_and_keys(name, lengths):
    """Gemma-3 gives them (1, heads, T, d) and Qwen-3 (1, T, heads, d); with 8 heads T = 8 fits both forms, and a
    mistake would mix samples."""
    settings = {**ROTARY, "head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = (
        tf.Gemma3TextConfig(**settings, attn_implementation="sdpa") if name == "gemma3" else tf.Qwen3Config(**settings)
    )
    model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    samples = [random_samples(1, seed=n, low=n, high=n)[0] for n in lengths]
    truth, _, _ = loop(model, samples, "norms", "sample")
    ours = knowledge_density(model, samples, "norms")
    assert sum("q_norm" in path or "k_norm" in path for path in truth) == 4
    for path, value in truth.items():
        assert value > 1e-6
        # Gemma-3 multiplies by `weight.float()`: its weight gradient is summed in fp32 whatever the model's dtype
        limit = torch.finfo(torch.float32).eps if name == "gemma3" else 1e-10
        assert abs(ours.per_module[path] - value) <= limit * value, path


def test_sample_is_not_mean_and_is_no_less():
    model, samples = tiny_model(), random_samples(6)
    a, b = (knowledge_density(model, samples, reduction=r).per_layer for r in ("sample", "mean"))
    assert bool((a > 1.05 * b).all())  # the triangle inequality, strictly


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
def test_batches_and_tiles_do_not_matter(reduction, batch_tokens, monkeypatch):
    model, samples = tiny_model("qwen3"), random_samples(7)
    truth = knowledge_density(model, samples, "all", reduction=reduction)
    for tile in (100 * 8, 7 * 32 * 8, 1 << 30):
        monkeypatch.setattr(reference, "TILE_BYTES_CPU", tile)
        ours = knowledge_density(model, samples, "all", reduction=reduction, batch_tokens=batch_tokens)
        torch.testing.assert_close(ours.per_layer, truth.per_layer, rtol=1e-12, atol=0)


def test_additive_over_samples():
    model, samples = tiny_model(), random_samples(7)
    whole = knowledge_density(model, samples)
    parts = [knowledge_density(model, part) for part in (samples[:3], samples[3:])]
    together = sum(part.per_layer * part.num_samples for part in parts) / 7
    torch.testing.assert_close(whole.per_layer, together, rtol=1e-12, atol=0)
    same = knowledge_density(model, samples + samples)
    torch.testing.assert_close(whole.per_layer, same.per_layer, rtol=1e-12, atol=0)
    backwards = knowledge_density(model, samples[::-1])
    torch.testing.assert_close(whole.per_layer, backwards.per_layer, rtol=1e-12, atol=0)


def test_a_sample_with_one_target_has_rank_one_gradients_of_the_last_matrix():
    """Two tokens, one target, last layer: dY has one row, and ||dy x^T||_1 = ||dy||_1 ||x||_1."""
    model = tiny_model()
    ids = torch.tensor([5, 9])
    ours = knowledge_density(model, [{"input_ids": ids, "labels": ids}]).per_module[
        "model.layers.5.mlp.down_proj.weight"
    ]
    kept = {}

    def keep(module, args, output):
        output.retain_grad()
        kept.update(x=args[0], y=output)

    handle = model.model.layers[5].mlp.down_proj.register_forward_hook(keep)
    padded_loss(model, [{"input_ids": ids, "labels": ids}]).backward()
    handle.remove()
    dy, x = kept["y"].grad[0], kept["x"][0]
    assert int((dy != 0).any(1).sum()) == 1
    assert abs(ours - float(dy[0].abs().sum() * x[0].detach().abs().sum())) <= 1e-12 * ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grad_l1_of_the_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 0, 3, 1]
    x = torch.randn(10, 63, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(10, 123, generator=generator, dtype=torch.float64).to(dtype)
    (ours,) = reference.grad_density(x, [dy], lengths)
    truth = torch.stack([(b.double().T @ a.double()).abs().sum() for a, b in zip(x.split(lengths), dy.split(lengths))])
    assert ours.dtype == torch.float64 and float(ours[2]) == 0
    torch.testing.assert_close(ours, truth, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)
    for i in (0, 4):
        row = sum(lengths[:i])
        rank_one = x[row].double().abs().sum() * dy[row].double().abs().sum()
        torch.testing.assert_close(ours[i], rank_one, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)
    # views with gaps between their rows, as the pieces of a fused projection are
    wide = torch.zeros(10, 200, dtype=dtype)
    wide[:, 40:163] = dy
    assert torch.equal(reference.grad_density(x, [wide[:, 40:163]], lengths)[0], ours)


def test_scaling_the_loss_scales_the_density():
    """A sample's weight of -4 gives 4 times its norm (a power of two: also the models' inner fp32 steps are exact)."""
    model, samples = tiny_model(), random_samples(4)
    once = knowledge_density(model, samples)
    likelihood = losses.likelihood

    def fourfold(batch):
        rows = likelihood(batch)
        return losses.RowWeights(rows.weight * -4, rows.cap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "likelihood", fourfold)
        scaled = knowledge_density(model, samples)
    torch.testing.assert_close(scaled.per_layer, 4 * once.per_layer, rtol=1e-12, atol=0)


def test_every_form_of_samples():
    model, samples = tiny_model(), random_samples(6)
    truth = knowledge_density(model, samples).per_layer
    for side in (padded, left_padded):
        ids, mask, labels = side(samples, 3)
        halves = [slice(0, 4), slice(4, 6)]
        hf = [{"input_ids": ids[h], "attention_mask": mask[h], "labels": labels[h]} for h in halves]
        torch.testing.assert_close(kf.knowledge_density(model, iter(hf)).per_layer, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(kf.knowledge_density(Decoder(model), samples).per_layer, truth, rtol=0, atol=0)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_low_precision(dtype, limit):
    model, samples = tiny_model(dtype=dtype), random_samples(5)
    truth = knowledge_density(tiny_model(dtype=dtype).double(), samples, "all")
    for reduction in REDUCTIONS:
        ours = knowledge_density(model, samples, "all", reduction=reduction)
        assert bool(ours.per_layer.isfinite().all()) and len(ours.per_module) == len(truth.per_module)
    ours = knowledge_density(model, samples, "all")
    assert float((ours.per_layer - truth.per_layer).norm() / truth.per_layer.norm()) < limit


# ---------------------------------------------------------------- taps


def close_to_loop(model, samples, modules="mlp", **settings):
    truth, _, _ = loop(model, samples, modules, "sample")
    ours = knowledge_density(model, samples, modules, **settings).per_module
    assert set(ours) == set(truth)
    for name, value in truth.items():
        assert abs(ours[name] - value) <= 1e-10 * value, name
    return ours


class InPlace(nn.Module):
    """Goes on in place on a layer's output, as Falcon does."""

    def __init__(self, bias):
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=bias, dtype=torch.float64)

    def forward(self, x):
        out = self.inner(x)
        out += x
        return out.mul_(2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_that_are_changed_in_place(bias, checkpointing):
    model, samples = tiny_model(), random_samples(3)
    model.model.layers[1].mlp = InPlace(bias)
    model.model.layers[4].input_layernorm.register_forward_hook(lambda module, args, output: output.add_(args[0]))
    close_to_loop(model, samples, "all", gradient_checkpointing=checkpointing)


class HalfUsed(nn.Module):
    """Two layers share an input, and the loss does not depend on one of them; a third never runs."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.idle = (nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        return self.used(x) + self.unused(x).detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_without_a_gradient_counts_0_and_does_not_hold_up_the_others(checkpointing):
    model, samples = tiny_model(), random_samples(3)
    model.model.layers[1].mlp = HalfUsed()
    ours = close_to_loop(model, samples, gradient_checkpointing=checkpointing)
    values = [ours[f"model.layers.1.mlp.{name}.weight"] for name in ("used", "unused", "idle")]
    assert values[0] > 0 and values[1:] == [0.0, 0.0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_share_an_input_are_measured_together_and_it_is_freed_at_once(checkpointing, monkeypatch):
    calls, inputs, measure = [], [], layer_kinds.operators.grad_density

    def watched(x, dys, *args, **kwargs):
        assert all(ref.expired() for ref in inputs)
        inputs.append(StorageWeakRef(x.untyped_storage()))
        calls.append(len(dys))
        return measure(x, dys, *args, **kwargs)

    monkeypatch.setattr(layer_kinds.operators, "grad_density", watched)
    knowledge_density(tiny_model(), random_samples(3), "all", gradient_checkpointing=checkpointing)
    assert calls == [1, 2, 1, 3] * 6  # down; gate and up; output; queries, keys and values


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpointing_gives_the_same_bits(architecture, reduction):
    model, samples = tiny_model(architecture), random_samples(5)
    plain = knowledge_density(model, samples, "all", reduction=reduction, batch_tokens=20)
    again = knowledge_density(model, samples, "all", reduction=reduction, batch_tokens=20, gradient_checkpointing=True)
    assert again.per_module == plain.per_module and torch.equal(again.per_layer, plain.per_layer)


def test_checkpointing_lowers_the_peak_and_is_taken_from_the_model():
    model, samples = tiny_model(), random_samples(8, low=12, high=12)
    decoder = Decoder(model)
    peak = {
        flag: peak_bytes(lambda flag=flag: knowledge_density(decoder, samples, gradient_checkpointing=flag))
        for flag in (False, True, None)
    }
    assert peak[True] < peak[False] / 2 < peak[None]
    for layer in model.model.layers:
        layer.gradient_checkpointing = True  # as the model's own method sets it
    assert peak_bytes(lambda: knowledge_density(decoder, samples)) < peak[False] / 2
    off = peak_bytes(lambda: knowledge_density(decoder, samples, gradient_checkpointing=False))
    assert off > peak[False] / 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nothing_leaks_from_one_sample_into_another(architecture, monkeypatch):
    """With NaN in one sample's embedding all others' values keep their bits."""
    decoder = Decoder(tiny_model(architecture))
    measurement, batch = Measurement(decoder, watch_list(decoder, "all"), How("grad_l1")), pack(random_samples(4))
    reading = measurement._reading(whole=False)
    first, last = batch.cu_seqlens[1], batch.cu_seqlens[2]
    embed = decoder.embed

    def with_nan(batch):
        out = embed(batch)
        out[first:last] = torch.nan
        return out

    with frozen(decoder.model):
        (clean,) = measurement._pass([batch], reading)
        monkeypatch.setattr(decoder, "embed", with_nan)
        (dirty,) = measurement._pass([batch], reading)
    others = [0, 2, 3]
    assert clean.keys() == dirty.keys() and clean
    for path, values in clean.items():
        assert torch.equal(values[:, others], dirty[path][:, others]) and bool(values.isfinite().all()), path
        assert bool(dirty[path][:, 1].isnan().all()), path


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_the_measurement(checkpointing, monkeypatch):
    """At its peak a pass with density allocates less than 1 % of the model more than the same pass without.

    The model has 29 M weights; 1 % of it is 1.2 MB, and dW of one of its MLP matrices would be 2.9 MB. The CPU's
    tile of dW is a constant, 4 MiB, so it would need a model of 420 MB and more: here it is 256 KiB. Without
    checkpointing the layers' inputs are part of the activations, as in training: there the pass without density has
    taps too, which measure nothing.
    """
    monkeypatch.setattr(reference, "TILE_BYTES_CPU", 1 << 18)
    settings = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10}
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**ROTARY, **settings})).eval()
    size = sum(p.nbytes for p in model.parameters())
    assert 20e6 < size / 4 < 50e6 and 1408 * 512 * 4 > 0.02 * size
    decoder, batch = Decoder(model), pack(random_samples(4, low=5, high=12))
    watched = watch_list(decoder, "mlp")
    idle = [
        dataclasses.replace(i, kind=dataclasses.replace(i.kind, values=lambda parts, how: [{} for _ in parts]))
        for i in watched
    ]
    peaks = {}
    with frozen(model):
        for name, items in (("with", watched), ("without", [] if checkpointing else idle)):
            measurement = Measurement(
                decoder, items, How("grad_l1"), PassSettings(gradient_checkpointing=checkpointing)
            )
            args = ([batch], measurement._reading(whole=False))
            peaks[name] = peak_bytes(lambda pass_=measurement._pass, args=args: pass_(*args))
    assert 0 < peaks["with"] - peaks["without"] < 0.01 * size, peaks


# ---------------------------------------------------------------- an estimate from some of the tiles


def wide_model():
    """13 tiles of output rows where gate and up have them, the last one of 8 rows; 4 in down."""
    return tiny_model(hidden_size=64, intermediate_size=200, num_hidden_layers=2)


def test_all_tiles_give_the_whole():
    model, samples = wide_model(), random_samples(4)
    for statistic in SAMPLED:
        for reduction in REDUCTIONS:
            for batch_tokens in (20, 1000):
                settings = {"statistic": statistic, "reduction": reduction, "batch_tokens": batch_tokens}
                whole = knowledge_density(model, samples, "all", **settings)
                ours = knowledge_density(model, samples, "all", sample_fraction=1.0, **settings)
                torch.testing.assert_close(ours.per_layer, whole.per_layer, rtol=1e-12, atol=0)
                assert ours.standard_error.tolist() == [0.0, 0.0] and ours.sample_fraction == 1.0
                assert whole.standard_error is None and whole.sample_fraction is None
                assert ours.per_module.keys() == whole.per_module.keys()


@pytest.mark.parametrize("statistic", rarely(SAMPLED, ["grad_l1"]))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_estimate_is_unbiased_and_knows_its_error(statistic, reduction):
    """Over 100 seeds: the mean lies within 4 of its standard errors of the truth. The reported variance is unbiased
    too; with 100 squared errors of about normal estimates their ratio scatters by 14 %, and 1.6 is four times that."""
    model, samples = Decoder(wide_model()), random_samples(3)
    settings = {"statistic": statistic, "reduction": reduction, "batch_tokens": 20 if reduction == "mean" else 1000}
    whole = knowledge_density(model, samples, **settings)
    parts = [knowledge_density(model, samples, sample_fraction=0.3, sample_seed=n, **settings) for n in range(100)]
    errors = torch.stack([part.per_layer for part in parts]) - whole.per_layer
    variance = torch.stack([part.standard_error for part in parts]).square().mean(0)
    assert bool((variance > 0).all()) and len({part.per_layer[0].item() for part in parts}) == 100
    assert bool((errors.mean(0).abs() < 4 * (variance / 100).sqrt()).all())
    ratio = errors.square().mean(0) / variance
    assert bool((ratio > 1 / 1.6).all()) and bool((ratio < 1.6).all()), ratio


def test_the_estimate_is_reproducible_and_does_not_depend_on_batches():
    model, samples = wide_model(), random_samples(5)
    one = knowledge_density(model, samples, sample_fraction=0.3, sample_seed=7)
    same = knowledge_density(model, samples, sample_fraction=0.3, sample_seed=7)
    assert torch.equal(one.per_layer, same.per_layer) and torch.equal(one.standard_error, same.standard_error)
    batches = knowledge_density(model, samples, sample_fraction=0.3, sample_seed=7, batch_tokens=1)
    torch.testing.assert_close(batches.per_layer, one.per_layer, rtol=1e-12, atol=0)
    torch.testing.assert_close(batches.standard_error, one.standard_error, rtol=1e-9, atol=0)
    other = knowledge_density(model, samples, sample_fraction=0.3, sample_seed=8)
    assert not torch.equal(one.per_layer, other.per_layer)


def test_only_the_chosen_columns_are_multiplied(monkeypatch):
    shapes, measure = [], layer_kinds.operators.grad_density

    def watched(x, dys, *args, **kwargs):
        shapes.append(sorted(dy.shape[1] for dy in dys))
        return measure(x, dys, *args, **kwargs)

    monkeypatch.setattr(layer_kinds.operators, "grad_density", watched)
    knowledge_density(wide_model(), random_samples(2), sample_fraction=0.3)
    assert shapes == [[32], [64, 64]] * 2  # down: 2 tiles of 4 at least; gate and up: round(0.3 * 13) = 4 tiles


@pytest.mark.parametrize("statistic", ["grad_l2", "grad_linf"])
def test_statistics_without_an_unbiased_estimate_are_refused(statistic):
    with pytest.raises(ValueError, match=f"sample_fraction with statistic='{statistic}': only a sum over weights"):
        knowledge_density(tiny_model(), random_samples(1), statistic=statistic, sample_fraction=0.5)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_fractions_that_are_none(fraction):
    with pytest.raises(ValueError, match="sample_fraction=.*: expected a number above 0 and at most 1"):
        knowledge_density(tiny_model(), random_samples(1), sample_fraction=fraction)


# ---------------------------------------------------------------- statistics made of others


def layer_vectors(gradients, names, layer):
    """The flattened gradients (or weights) of one layer's parameters in one vector."""
    return torch.cat([gradients[name].flatten() for name in names if re.search(rf"\.{layer}\.", name)])


def matrices(gradients, names):
    """{path: flat gradient}, of each expert's matrix apart."""
    for name in names:
        if ".experts." in name:
            yield from ((f"{name}[{e}]", part.flatten()) for e, part in enumerate(gradients[name]))
        else:
            yield name, gradients[name].flatten()


def cosine(a, b):
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else 0.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("modules", rarely(["mlp", "all"], ["all"]))
def test_statistics_of_two_sets_equal_loops_over_samples(architecture, modules):
    model = tiny_model(architecture)
    forget, retain = random_samples(4, low=6, high=10), random_samples(3, seed=1, low=4, high=9)
    limit = 1e-6 if architecture in MIXTURES else 1e-10
    decoder, weights = Decoder(model), {n: p.detach() for n, p in model.named_parameters()}
    of_forget, of_retain = sample_gradients(model, forget), sample_gradients(model, retain)
    f, r = mean_of(of_forget), mean_of(of_retain)
    prefix = decoder.layer_path(0)[:-1]
    names = [
        n for n, p in weights.items() if n.startswith(prefix) and wanted(modules, n[len(prefix) :].partition(".")[2], p)
    ]
    vectors = [[layer_vectors(x, names, layer) for layer in range(decoder.num_layers)] for x in (f, r, weights)]

    def close(ours, truth):
        ours, truth = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, truth))
        torch.testing.assert_close(ours, truth, rtol=limit, atol=1e-12)

    def fisher(gradients):
        return [sum(float(layer_vectors(g, names, n).square().sum()) for g in gradients) / len(gradients)
                for n in range(decoder.num_layers)]  # fmt: skip

    # one batch and several, for each of the two sets
    for batch_tokens in (1000, 20, 1):
        ours = {
            statistic: knowledge_density(
                decoder, forget, modules, statistic, retain=None if statistic == "fisher" else retain,
                batch_tokens=batch_tokens, impl="torch",
            )
            for statistic in ("fisher", "fisher_ratio", "cosine", "slug")
        }  # fmt: skip
        close(ours["fisher"].per_layer, fisher(of_forget))
        close(ours["fisher_ratio"].per_layer, [a / b for a, b in zip(fisher(of_forget), fisher(of_retain))])
        close(ours["cosine"].per_layer, [cosine(a, b) for a, b, _ in zip(*vectors)])
        close(ours["slug"].alignment, ours["cosine"].per_layer)
        close(ours["slug"].per_layer, [a.norm() / w.norm() for a, _, w in zip(*vectors)])
        pieces = [dict(matrices(x, names)) for x in (f, r, weights)]
        for path in pieces[0]:
            a, b, w = (x[path] for x in pieces)
            if a.norm() > 1e-8 and b.norm() > 1e-8:  # a key bias has no gradient but rounding
                close(ours["cosine"].per_module[path], cosine(a, b))
                close(ours["slug"].per_module[path], a.norm() / w.norm())
            elif not a.any() or not b.any():  # an expert that no token of one set reaches
                assert ours["cosine"].per_module[path] == 0.0
        assert set(ours["cosine"].per_module) == set(pieces[0]) == set(ours["fisher_ratio"].per_module)
        squares = [{n: g[n].square() for n in names} for g in of_forget + of_retain]
        f2, r2 = (dict(matrices(mean_of(x), names)) for x in (squares[:4], squares[4:]))
        for path, value in ours["fisher_ratio"].per_module.items():
            a, b = float(f2[path].sum()), float(r2[path].sum())
            if a > 1e-16 and b > 1e-16:
                close(value, a / b)
            elif a == 0 or b == 0:
                assert value == (0.0 if a == 0 else math.inf)
        assert [ours[s].reduction for s in ours] == ["sample", "sample", "mean", "mean"]
        assert all(ours[s].statistic == s and ours[s].num_samples == 4 for s in ours)
    # without the retain set SLUG's importance is the same, and holds no gradient if there is one batch
    close(knowledge_density(decoder, forget, modules, "slug", batch_tokens=1000).per_layer, ours["slug"].per_layer)
    close(knowledge_density(decoder, forget, modules, "slug", batch_tokens=20).per_layer, ours["slug"].per_layer)


def test_identities_of_the_statistics():
    model, samples = tiny_model(), random_samples(3)
    same = knowledge_density(model, samples, statistic="cosine", retain=samples)
    torch.testing.assert_close(same.per_layer, torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)
    assert knowledge_density(model, samples, statistic="fisher_ratio", retain=samples).per_layer.tolist() == [1.0] * 6
    fisher, square = (knowledge_density(model, samples, "all", s) for s in ("fisher", "grad_l2sq"))
    assert fisher.per_module == square.per_module and torch.equal(fisher.per_layer, square.per_layer)
    part, whole = (
        knowledge_density(model, samples, statistic=s, sample_fraction=0.5) for s in ("grad_mean_abs", "grad_l1")
    )
    torch.testing.assert_close(part.per_layer * part.num_weights, whole.per_layer, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.standard_error * part.num_weights, whole.standard_error, rtol=1e-12, atol=0)


def test_one_gradient_is_held_for_a_cosine_and_a_second_one_for_several_batches(monkeypatch):
    """In units of the MLPs' fp64 gradients, above what a pass without holding any allocates."""
    model = tiny_model(hidden_size=128, intermediate_size=256)
    forget, retain = random_samples(3, low=4, high=4), random_samples(3, seed=1, low=4, high=4)
    decoder = Decoder(model)
    size = sum(p.nbytes for n, p in model.named_parameters() if ".mlp." in n)
    base = peak_bytes(lambda: knowledge_density(decoder, forget, batch_tokens=4))
    for tokens, gradients in ((1000, 1), (4, 2)):
        peak = peak_bytes(
            lambda tokens=tokens: knowledge_density(
                decoder, forget, statistic="cosine", retain=retain, batch_tokens=tokens
            )
        )
        assert gradients - 0.3 < (peak - base) / size < gradients + 0.6, (tokens, (peak - base) / size)


def test_what_goes_with_which_statistic():
    model, samples = tiny_model(), random_samples(2)
    decoder = Decoder(model)
    for statistic in ("fisher_ratio", "cosine"):
        with pytest.raises(ValueError, match=f"statistic='{statistic}' compares with a retain set: give retain="):
            knowledge_density(decoder, samples, statistic=statistic)
    for statistic in ("grad_l1", "fisher"):
        with pytest.raises(ValueError, match=f"statistic='{statistic}' takes no retain set"):
            knowledge_density(decoder, samples, statistic=statistic, retain=samples)
    for statistic, wrong in (("fisher", "mean"), ("fisher_ratio", "mean"), ("cosine", "sample"), ("slug", "sample")):
        with pytest.raises(
            ValueError, match=f"reduction='{wrong}': {statistic} is of .* leave reduction out, or set '"
        ):
            knowledge_density(decoder, samples, statistic=statistic, reduction=wrong, retain=samples)
    for statistic in ("fisher_ratio", "cosine", "slug"):
        with pytest.raises(ValueError, match=f"sample_fraction with statistic='{statistic}'"):
            knowledge_density(decoder, samples, statistic=statistic, retain=samples, sample_fraction=0.5)
        found = knowledge_density(decoder, samples, statistic=statistic, retain=samples)
        with pytest.raises(ValueError, match=f"{statistic} is no sum over weights, so no layer has a share"):
            assert found.normalized is None
    blank = [{"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, -100])}]
    with pytest.raises(ValueError, match="retain sample 2: no token after its first has a label"):
        knowledge_density(decoder, samples, statistic="cosine", retain=samples + blank)


def test_divisors_that_are_0():
    model, samples = tiny_model(), random_samples(2)
    model.model.layers[1].mlp = HalfUsed()  # two of its three matrices have no gradient
    ratio = knowledge_density(model, samples, statistic="fisher_ratio", retain=samples)
    idle = "model.layers.1.mlp.idle.weight"
    assert ratio.per_module[idle] == 0.0 and ratio.per_module["model.layers.1.mlp.used.weight"] == 1.0
    assert knowledge_density(model, samples, statistic="cosine", retain=samples).per_module[idle] == 0.0
    with torch.no_grad():
        model.model.layers[1].mlp.used.weight.zero_()
    slug = knowledge_density(model, samples, statistic="slug")
    assert slug.per_module["model.layers.1.mlp.used.weight"] == math.inf and slug.per_module[idle] == 0.0
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="layer 1: the norm of its weights is 0, so there is no quotient"):
        knowledge_density(model, samples, statistic="slug")


def test_infinite_ratios_and_alignment_survive_a_file(tmp_path):
    values = {"a": math.inf, "b": 2.0}
    one = torch.ones(1)
    ours = Density(2 * one.double(), values, one.long(), 1, statistic="slug", alignment=-0.5 * one.double())
    ours.save(tmp_path / "d.json")
    again = Density.load(tmp_path / "d.json")
    assert again.per_module == values and again.alignment.tolist() == [-0.5] and again.alignment.dtype == torch.float64
    assert again.to_dict() == ours.to_dict()


# ---------------------------------------------------------------- what is refused


def test_a_sample_without_a_loss():
    samples = random_samples(3)
    samples[2]["labels"] = torch.full_like(samples[2]["labels"], -100)
    samples[2]["labels"][0] = 5
    with pytest.raises(ValueError, match="sample 2: no token after its first has a label"):
        knowledge_density(tiny_model(), samples)
    with pytest.raises(ValueError, match="no samples"):
        knowledge_density(tiny_model(), [])


@pytest.mark.parametrize("setting", ["modules", "statistic", "reduction"])
def test_unknown_settings(setting):
    with pytest.raises(ValueError, match=f"{setting}='x': expected one of"):
        knowledge_density(tiny_model(), random_samples(1), **{setting: "x"})


def test_tied_weights_are_refused_by_name():
    model = tiny_model()
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    match = r"model.layers.1.mlp.up_proj.weight is tied to model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=match):
        knowledge_density(model, random_samples(1))
    assert knowledge_density(model, random_samples(1), "attention").per_layer.min() > 0  # does not touch it
    shared = tiny_model()
    shared.model.layers[2].mlp = shared.model.layers[4].mlp  # the whole module
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.gate_proj.weight is tied to model.layers.4.mlp.gate"):
        knowledge_density(shared, random_samples(1))
    inside = tiny_model()  # within one module's own layer
    inside.model.layers[0].self_attn.v_proj.weight = inside.model.layers[0].self_attn.k_proj.weight
    with pytest.raises(ValueError, match="model.layers.0.self_attn.k_proj.weight is tied to .*v_proj"):
        knowledge_density(inside, random_samples(1), "all")


# ---------------------------------------------------------------- modules that are no plain product


class Falcons(nn.Linear):
    """The same product, written otherwise."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Squared(nn.Linear):
    """Another function of the weight."""

    def forward(self, x):
        return x @ self.weight.square().T


class Low(nn.Linear):
    """A product, and a branch with weights of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_a = nn.Parameter(torch.randn(2, self.in_features, dtype=torch.float64))
        self.lora_b = nn.Parameter(torch.randn(self.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Router(nn.Linear):
    """Gives two tensors, as Llama 4's."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.sigmoid()


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.other = Router(32, 32, dtype=torch.float64), nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x):
        y, scores = self.router(x)
        return self.other(x) * scores + y


class Rounded(nn.Linear):
    """The input is rounded first, as with 8-bit activations: the gradient differs by less than one percent."""

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class Twice(nn.Module):
    """Runs one linear layer twice: its gradient is a sum of two products."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Outside(nn.Module):
    """Uses a weight beside the layer that has it too, and one only so."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.one(x) + x @ self.one.weight @ self.two.weight


class Kernel(nn.Module):
    """A short convolution that mixes tokens, a matrix that is stacked, and a vector."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(32, 32, 3, groups=32, padding=2, dtype=torch.float64)
        self.stacked = nn.Parameter(torch.randn(3, 32, 32, dtype=torch.float64))
        self.A_log = nn.Parameter(torch.randn(32, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([x @ m for m in self.stacked]).sum(0) * self.A_log.exp() + self.conv1d.bias


def down_proj(kind):
    linear = kind(48, 32, bias=False, dtype=torch.float64)
    return lambda layer: setattr(layer.mlp, "down_proj", linear)


def whole_mlp(kind):
    module = kind()
    return lambda layer: setattr(layer, "mlp", module)


ODD = {
    "no product": (down_proj(Squared), "mlp.down_proj"),
    "a branch": (down_proj(Low), "mlp.down_proj"),
    "rounded input": (down_proj(Rounded), "mlp.down_proj"),
    "runs twice": (whole_mlp(Twice), "mlp.inner"),
    "used outside": (whole_mlp(Outside), "mlp.one"),
    "no layers": (whole_mlp(Kernel), "mlp"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_product_is_exact_one_sample_at_a_time(odd, caplog):
    change, path = ODD[odd]
    model, samples = tiny_model(), random_samples(3)
    change(model.model.layers[1])
    before = trace(model)
    for modules in ("mlp", "all"):
        close_to_loop(model, samples, modules, gradient_checkpointing=odd == "runs twice")
    assert f"model.layers.1.{path} (" in caplog.text and caplog.text.count("one sample at a time") == 2
    assert trace(model)[:1] == before[:1] and trace(model)[2:] == before[2:]
    caplog.clear()
    truth, per_layer, _ = loop(model, samples, "mlp", "mean")  # needs no batches of one sample
    for batch_tokens in (8, 1000):
        ours = knowledge_density(model, samples, reduction="mean", batch_tokens=batch_tokens)
        torch.testing.assert_close(ours.per_layer.tolist(), per_layer, rtol=1e-10, atol=0)
        assert ours.per_module.keys() == truth.keys()
    assert "one sample at a time" not in caplog.text


def test_a_linear_layer_that_gives_two_tensors():
    model = tiny_model()
    whole_mlp(Routed)(model.model.layers[1])
    close_to_loop(model, random_samples(3), "all")


def test_a_product_of_another_class_is_measured_as_a_product(caplog):
    model, samples = tiny_model(), random_samples(3)
    down_proj(Falcons)(model.model.layers[1])
    model.model.layers[2].mlp.up_proj = Falcons(32, 48, dtype=torch.float64)
    close_to_loop(model, samples, "all")
    assert not caplog.text


def test_a_module_that_cannot_be_taken_apart_is_not_sampled():
    model = tiny_model()
    whole_mlp(Twice)(model.model.layers[1])
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.inner runs twice .*: leave sample_fraction out$"):
        knowledge_density(model, random_samples(2), sample_fraction=0.5)


def test_not_finite():
    model = tiny_model(dtype=torch.float16)
    decoder = Decoder(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
        model.model.norm.weight.mul_(10)
    with pytest.raises(ValueError, match="not finite although all weights are: try a wider dtype"):
        knowledge_density(decoder, random_samples(2))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: 1 of 1536 values are NaN"):
        knowledge_density(decoder, random_samples(2))


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "mean of two sets"])
def test_nothing_is_left_behind(reduction, monkeypatch):
    model, samples = tiny_model("gpt2"), random_samples(3)
    model.train()
    model.transformer.h[2].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    before = trace(model)
    settings = {"reduction": reduction}
    if reduction not in REDUCTIONS:
        settings = {"statistic": "cosine", "retain": samples[:2]}
    knowledge_density(model, samples, "all", **settings)
    assert trace(model) == before

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("linear_loss", "likelihood"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(losses, place, fail)
            knowledge_density(model, samples, "all", **settings)
        assert trace(model) == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # within the backward pass
        linear = LAYER_KINDS["linear"]
        patch.setitem(LAYER_KINDS, "linear", dataclasses.replace(linear, values=fail, gradient=fail))
        knowledge_density(model, samples, "all", **settings)
    assert trace(model) == before


def test_memory_is_flat_in_the_number_of_samples(monkeypatch):
    """After every batch the live tensors are as many bytes with 20 samples as with 5."""
    model = tiny_model()
    decoder = Decoder(model)
    peaks = {}
    measure = Measurement._pass
    for count in (5, 20):
        samples, seen = random_samples(count, low=8, high=8), []
        base = live_tensor_bytes()

        def watched(*args, seen=seen):
            found = measure(*args)
            seen.append(live_tensor_bytes())
            return found

        monkeypatch.setattr(Measurement, "_pass", watched)
        knowledge_density(decoder, samples, "all", batch_tokens=40)
        peaks[count] = max(seen) - base
        assert len(seen) == count // 5
    assert abs(peaks[20] - peaks[5]) < 2000, peaks


# ---------------------------------------------------------------- the result


def test_json_round_trip_is_exact(tmp_path):
    ours = knowledge_density(tiny_model(), random_samples(3), "all")
    ours.save(tmp_path / "density.json")
    again = Density.load(tmp_path / "density.json")
    assert torch.equal(again.per_layer, ours.per_layer) and again.per_layer.dtype == torch.float64
    assert torch.equal(again.num_weights, ours.num_weights) and again.num_weights.dtype == torch.int64
    assert again.per_module == ours.per_module and list(again.per_module) == list(ours.per_module)
    assert again.to_dict() == ours.to_dict() == json.loads((tmp_path / "density.json").read_text())


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"per_layer": [1.0]}', "", '"x"'])
def test_what_is_no_density_file(text, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match="d.json: (not a density file|not JSON|empty)"):
        Density.load(tmp_path / "d.json")


def test_a_sampled_result_and_one_of_an_earlier_version(tmp_path):
    ours = knowledge_density(tiny_model(), random_samples(2), sample_fraction=0.5)
    ours.save(tmp_path / "density.json")
    again = Density.load(tmp_path / "density.json")
    assert torch.equal(again.standard_error, ours.standard_error) and again.sample_fraction == 0.5
    values = ours.to_dict()
    del values["standard_error"], values["sample_fraction"]
    (tmp_path / "density.json").write_text(json.dumps(values))
    earlier = Density.load(tmp_path / "density.json")
    assert earlier.standard_error is None and earlier.sample_fraction is None
    assert torch.equal(earlier.per_layer, ours.per_layer)


def test_what_is_almost_a_density_file(tmp_path):
    good = knowledge_density(tiny_model(), random_samples(1)).to_dict()
    for key, value in (("per_layer", ["a"]), ("per_layer", [[1.0], [2.0, 3.0]]), ("num_weights", None)):
        (tmp_path / "d.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(ValueError, match="d.json: (not a density file|not JSON|empty)"):
            Density.load(tmp_path / "d.json")


def test_normalized_needs_something():
    zero = Density(torch.zeros(3, dtype=torch.float64), {}, torch.ones(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="every layer's density is zero"):
        assert zero.normalized is None
