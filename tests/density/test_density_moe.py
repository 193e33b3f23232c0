"""Knowledge density of mixtures of experts, against batch-of-one autograd through the model's own forward."""

import pytest
import torch
import transformers as tf
from density_loops import loop, sample_gradients
from tiny_models import MIXTURES, random_samples, tiny_model
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import LAYER_KINDS, How, Watched
from kunbr_fast.density.measure import NORMS, REDUCTIONS, knowledge_density
from kunbr_fast.density.taps import Segments, Taps
from kunbr_fast.density.watch import choose_tiles
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.ways import Places

try:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
except ImportError:  # transformers 5.0
    NemotronHExperts = None

# Both models' routers take their softmax in fp32 whatever the weights' dtype. A last-bit difference of a hidden state
# can turn the rounding of a routing weight, 6e-8 relative, which then scales what its expert adds to a gradient.
LIMIT = 1e-6


def close(ours, truth):
    assert set(ours) == set(truth) and truth
    for path, value in truth.items():
        if value > 1e-9:  # a key bias has no gradient but rounding
            assert abs(ours[path] - value) <= LIMIT * value, path
        else:
            assert ours[path] < 1e-9, path


@pytest.mark.parametrize("architecture", MIXTURES)
def test_equals_a_loop_over_samples(architecture):
    model, samples = tiny_model(architecture), random_samples(4, low=4, high=10)
    gradients = sample_gradients(model, samples)
    for statistic in NORMS:
        for reduction in REDUCTIONS:
            for modules in ("mlp", "all") if statistic == "grad_l1" else ("all",):
                truth, per_layer, _ = loop(model, samples, modules, reduction, statistic, gradients)
                for batch_tokens in (12, 1000):
                    ours = knowledge_density(
                        model, samples, modules, statistic, reduction, batch_tokens=batch_tokens, impl="torch"
                    )
                    close(ours.per_module, truth)
                    torch.testing.assert_close(ours.per_layer.tolist(), per_layer, rtol=LIMIT, atol=0)
    assert {"model.layers.0.mlp.experts.down_proj[5]", "model.layers.0.mlp.gate.weight"} <= set(truth)
    layer = model.model.layers[0]
    assert int(ours.num_weights[0]) == sum(p.numel() for p in layer.parameters())
    assert ("model.layers.0.mlp.shared_expert.up_proj.weight" in truth) == (architecture == "qwen2_moe")


def test_attention_and_norms_of_a_mixture():
    model, samples = tiny_model("mixtral"), random_samples(3)
    for modules in ("attention", "norms"):
        truth, _, _ = loop(model, samples, modules, "sample")
        close(knowledge_density(model, samples, modules).per_module, truth)


def test_experts_that_saw_no_token_give_0():
    """The router's rows are v, -v, w, -w, 0, 0: of each pair one logit is above 0, so 4 and 5 are never among two."""
    model, samples = tiny_model("mixtral"), random_samples(4)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1], weight[3], weight[4:] = -weight[0], -weight[2], 0
    for reduction in REDUCTIONS:
        for batch_tokens in (10, 1000):
            ours = knowledge_density(model, samples, reduction=reduction, batch_tokens=batch_tokens)
            for layer in range(2):
                for name in ("gate_up_proj", "down_proj"):
                    values = [ours.per_module[f"model.layers.{layer}.mlp.experts.{name}[{e}]"] for e in range(6)]
                    assert values[4:] == [0.0, 0.0] and min(values[:4]) > 0
    truth, _, _ = loop(model, samples, "mlp", "mean")
    close(ours.per_module, truth)


def test_checkpointing_gives_the_same_bits_and_nothing_is_left_behind():
    model, samples = tiny_model("qwen2_moe"), random_samples(4)
    plain = knowledge_density(model, samples, "all")
    again = knowledge_density(model, samples, "all", gradient_checkpointing=True)
    assert again.per_module == plain.per_module and torch.equal(again.per_layer, plain.per_layer)
    assert model.config._experts_implementation == "eager" and not experts._watching
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("modules", ["mlp", pytest.param("all", marks=pytest.mark.slow)])
def test_sampled_experts(modules):
    """Each expert's matrix has its own tiles; all of them give the whole."""
    model, samples = Decoder(tiny_model("mixtral")), random_samples(3)
    whole = knowledge_density(model, samples, modules)
    same = knowledge_density(model, samples, modules, sample_fraction=1.0)
    torch.testing.assert_close(same.per_layer, whole.per_layer, rtol=1e-12, atol=0)
    assert same.standard_error.tolist() == [0.0, 0.0]
    parts = [
        knowledge_density(model, samples, modules, sample_fraction=0.4, sample_seed=seed, batch_tokens=12)
        for seed in range(40)
    ]
    errors = torch.stack([part.per_layer for part in parts]) - whole.per_layer
    variance = torch.stack([part.standard_error for part in parts]).square().mean(0)  # each one is unbiased
    assert bool((errors.mean(0).abs() < 4 * (variance / 40).sqrt()).all())
    ratio = errors.square().mean(0) / variance
    assert bool((ratio > 0.5).all()) and bool((ratio < 2).all())


# ---------------------------------------------------------------- the experts' own forward, in every layout


def layouts():
    oss = tf.GptOssConfig(hidden_size=8, intermediate_size=12, num_local_experts=5, num_hidden_layers=1)
    aria = tf.AriaTextConfig(hidden_size=8, intermediate_size=12, moe_num_experts=5, num_attention_heads=2)
    nemotron = NemotronHExperts and tf.NemotronHConfig(hidden_size=8, moe_intermediate_size=12, n_routed_experts=5)
    return {"transposed, biases, interleaved": (GptOssExperts, oss), "transposed": (AriaExperts, aria),
            "no gate": (NemotronHExperts, nemotron)}  # fmt: skip


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("fraction", [None, 1.0])
def test_layouts_of_experts(layout, fraction):
    kind, config = layouts()[layout]
    if kind is None:
        pytest.skip(f"transformers {tf.__version__} has no Nemotron-H")
    if kind is AriaExperts and not experts.is_experts(kind(config)):
        pytest.skip(f"transformers {tf.__version__}'s Aria has no experts interface: its experts route by themselves")
    config._experts_implementation = "eager"
    module = kind(config).double()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    lengths, top_k = [3, 1, 4], 2
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in x])  # never expert 4
    weight = torch.rand(8, top_k, dtype=torch.float64, generator=generator)
    toward = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    truth = {name: [] for name, _ in module.named_parameters()}
    for part in torch.arange(8).split(lengths):
        module.zero_grad()
        (module(x[part], index[part], weight[part]) * toward[part]).sum().backward()
        for name, parameter in module.named_parameters():
            truth[name].append(parameter.grad.flatten(1).abs().sum(1))
    own = module(x, index, weight)

    module.requires_grad_(False)
    parameters = tuple(truth)
    item = Watched(module, LAYER_KINDS["experts"], "experts", 0, parameters, 5)
    found = {}
    how = How("grad_l1", tiles={} if fraction is None else choose_tiles([item], fraction, 0, x.device))
    places = Places((1, 8), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
    taps = Taps(Segments.of(lengths, x.device), places, lambda parts: found.update(*item.kind.values(parts, how)))
    with experts.watched([item], taps):
        ours = module(x.requires_grad_(), index, weight)
        taps.forward_is_over()
        (ours * toward).sum().backward()
        taps.finish()
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-14)
    assert module.config._experts_implementation == "eager"
    for name in parameters:
        values = found[name] if found[name].dim() == 2 else found[name].sum(1)
        torch.testing.assert_close(values, torch.stack(truth[name], 1), rtol=1e-11, atol=0)
        assert values[4].tolist() == [0.0] * 3


# ---------------------------------------------------------------- what is refused


def test_experts_that_compute_something_else():
    model, samples = tiny_model("mixtral"), random_samples(3)
    decoder = Decoder(model)
    module = model.model.layers[1].mlp.experts
    theirs = module.forward
    module.forward = lambda *args: 1.5 * theirs(*args)
    truth, _, _ = loop(model, samples, "mlp", "sample")
    close(knowledge_density(decoder, samples).per_module, truth)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.experts: its experts are spread over processes"):
        knowledge_density(decoder, random_samples(1))
    assert knowledge_density(decoder, random_samples(1), "attention").per_layer.min() > 0


def test_parameters_of_experts_that_are_not_known():
    model, samples = tiny_model("mixtral"), random_samples(3)
    model.model.layers[0].mlp.experts.extra = nn.Parameter(torch.zeros(6, 3, 3, dtype=torch.float64))
    truth, _, _ = loop(model, samples, "mlp", "sample")
    close(knowledge_density(model, samples).per_module, truth)


class OneByOne(nn.Module):
    """Experts as separate layers, each of which sees its own tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(32, 32, dtype=torch.float64) for _ in range(2)])

    def forward(self, x):
        second = x[..., 0] > 0
        out = torch.empty_like(x)
        out[~second], out[second] = self.inner[0](x[~second]), self.inner[1](x[second])
        return out


def test_layers_that_do_not_see_every_token():
    model, samples = tiny_model(), random_samples(3)
    model.model.layers[1].mlp = OneByOne()
    truth, _, _ = loop(model, samples, "mlp", "sample")
    close(knowledge_density(Decoder(model), samples).per_module, truth)


def test_half_precision():
    model, samples = tiny_model("mixtral", dtype=torch.bfloat16), random_samples(3)
    ours = knowledge_density(model, samples, "all")
    truth = knowledge_density(tiny_model("mixtral", dtype=torch.bfloat16).double(), samples, "all")
    assert float((ours.per_layer - truth.per_layer).norm() / truth.per_layer.norm()) < 0.1
