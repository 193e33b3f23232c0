"""Knowledge density against a loop over samples with autograd in fp64."""

import json

import pytest
import torch
import transformers as tf
from reference_procedure import left_padded, padded, padded_loss
from tiny_models import ARCHITECTURES, ROTARY, live_tensor_bytes, random_samples, tiny_model
from torch import nn

import kunbr_fast as kf
from kunbr_fast import density as density_module
from kunbr_fast.decoder import Decoder
from kunbr_fast.density import MODULES, REDUCTIONS, Density, knowledge_density
from kunbr_fast.kernels import reference

ATTENTION = ("self_attn.", "attn.", "attention.")


def wanted(modules, name, parameter):
    """The documented meaning of `modules`, on a name relative to its layer."""
    attention, matrix = name.startswith(ATTENTION), parameter.dim() == 2
    return {
        "all": True,
        "mlp": matrix and not attention,
        "attention": matrix and attention,
        "norms": not matrix and name.endswith("weight"),
    }[modules]


def loop(model, samples, modules, reduction):
    """{parameter path: density}, one sample at a time through the model's own forward."""
    total = {}
    for sample in samples:
        model.zero_grad()
        padded_loss(model, [sample]).backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad.clone()
            grad = grad.abs().sum() if reduction == "sample" else grad
            total[name] = total.get(name, 0) + grad / len(samples)
    model.zero_grad()
    prefix = Decoder(model).layer_path(0)[:-1]
    parameters, out = dict(model.named_parameters()), {}
    for name, value in total.items():
        if name.startswith(prefix) and wanted(modules, name[len(prefix) :].split(".", 1)[1], parameters[name]):
            out[name] = float(value.abs().sum())
    return out, prefix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_a_loop_over_samples(architecture, reduction):
    model, samples = tiny_model(architecture), random_samples(5, low=6, high=12)
    parameters = dict(model.named_parameters())
    for modules in MODULES:
        truth, prefix = loop(model, samples, modules, reduction)
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
            assert abs(float(ours.per_layer[layer]) - sum(truth[n] for n in mine)) <= limit * float(
                ours.per_layer[layer]
            )
            assert int(ours.num_weights[layer]) == sum(parameters[n].numel() for n in mine)
        assert ours.per_layer.dtype == torch.float64 and ours.num_samples == 5
        assert (ours.modules, ours.statistic, ours.reduction) == (modules, "grad_l1", reduction)
        torch.testing.assert_close(ours.normalized.sum(), torch.tensor(1.0, dtype=torch.float64))


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
    truth, _ = loop(model, samples, "norms", "sample")
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
    monkeypatch.setattr(reference, "DENSITY_TILE_BYTES", 3 * 32 * 8)
    tiles = reference.weight_gradient_tiles
    for tile in (1, 7 * 32 * 8, 1 << 30):
        monkeypatch.setattr(reference, "weight_gradient_tiles", lambda x, dy, tile=tile: tiles(x, dy, tile))
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
    ours = reference.grad_l1(x, dy, lengths)
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
    assert torch.equal(reference.grad_l1(x, wide[:, 40:163], lengths), ours)


def test_scaling_the_loss_scales_the_density():
    """A sample's weight of -4 gives 4 times its norm (a power of two: also the models' inner fp32 steps are exact)."""
    model, samples = tiny_model(), random_samples(4)
    once = knowledge_density(model, samples)
    likelihood = density_module.losses.likelihood

    def fourfold(batch, reduction):
        rows = likelihood(batch, reduction)
        return density_module.losses.RowWeights(rows.weight * -4, rows.cap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(density_module.losses, "likelihood", fourfold)
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


def test_unknown_kinds_are_refused_by_name():
    class Lora(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[2].mlp.down_proj = Lora(48, 32, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^model.layers.2.mlp.down_proj: Lora is of no known kind \(known: linear"):
        knowledge_density(model, random_samples(1))
    torch.manual_seed(0)
    experts = tf.MixtralForCausalLM(tf.MixtralConfig(**ROTARY, num_local_experts=2, num_experts_per_tok=1)).eval()
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.*: Mixtral\w+ is of no known kind"):
        knowledge_density(experts, random_samples(1))
    assert knowledge_density(experts, random_samples(1), "attention").per_layer.min() > 0


class Twice(nn.Module):
    """Runs one linear layer twice: its gradient is a sum of two products."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def test_a_module_that_runs_twice_is_refused_by_name():
    model = tiny_model()
    model.model.layers[1].mlp = Twice()
    with pytest.raises(ValueError, match="model.layers.1.mlp.inner runs twice in one forward pass"):
        knowledge_density(model, random_samples(2))


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


def trace(model):
    return (
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        [(p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone().sum())) for p in model.parameters()],
        [(p.data_ptr(), p._version) for p in model.parameters()],
        model.config._attn_implementation,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_left_behind(reduction, monkeypatch):
    model, samples = tiny_model("gpt2"), random_samples(3)
    model.train()
    model.transformer.h[2].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    before = trace(model)
    knowledge_density(model, samples, "all", reduction=reduction)
    assert trace(model) == before

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("linear_loss", "likelihood"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(density_module.losses, place, fail)
            knowledge_density(model, samples, "all", reduction=reduction)
        assert trace(model) == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # within the backward pass
        patch.setattr(reference, "grad_l1", fail)
        patch.setattr(density_module, "_linear_gradient", fail)
        kinds = dict(density_module.LAYER_KINDS)
        linear = kinds["linear"]
        kinds["linear"] = density_module.LayerKind(linear.matches, fail, fail)
        patch.setattr(density_module, "LAYER_KINDS", kinds)
        knowledge_density(model, samples, "all", reduction=reduction)
    assert trace(model) == before


def test_memory_is_flat_in_the_number_of_samples(monkeypatch):
    """After every batch the live tensors are as many bytes with 40 samples as with 5."""
    model = tiny_model()
    decoder = Decoder(model)
    peaks = {}
    measure = density_module._measure
    for count in (5, 40):
        samples, seen = random_samples(count, low=8, high=8), []
        base = live_tensor_bytes()

        def watched(*args, seen=seen):
            measure(*args)
            seen.append(live_tensor_bytes())

        monkeypatch.setattr(density_module, "_measure", watched)
        knowledge_density(decoder, samples, "all", batch_tokens=16)
        peaks[count] = max(seen) - base
        assert len(seen) == -(-count // 2)
    assert abs(peaks[40] - peaks[5]) < 2000, peaks


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
    with pytest.raises(ValueError, match="d.json: not a density file"):
        Density.load(tmp_path / "d.json")


def test_what_is_almost_a_density_file(tmp_path):
    good = knowledge_density(tiny_model(), random_samples(1)).to_dict()
    for key, value in (("per_layer", ["a"]), ("per_layer", [[1.0], [2.0, 3.0]]), ("num_weights", None)):
        (tmp_path / "d.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(ValueError, match="d.json: not a density file"):
            Density.load(tmp_path / "d.json")


def test_normalized_needs_something():
    zero = Density(torch.zeros(3, dtype=torch.float64), {}, torch.ones(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="every layer's density is zero"):
        assert zero.normalized is None
