"""Scores and masks of single weights, against the formulas on gradients from a loop over samples with autograd."""

import math

import pytest
import torch
from density_loops import mean_of, sample_gradients, trace, wanted
from tiny_models import MIXTURES, peak_bytes, random_samples, tiny_model
from torch import nn

from kunbr_fast.density import attribution
from kunbr_fast.density.attribution import METHODS, Attribution, attribute, top_ratio
from kunbr_fast.model.decoder import Decoder

FORGET, RETAIN = random_samples(4, low=6, high=10), random_samples(3, seed=1, low=4, high=9)
WITHOUT = ("grad", "sure")


def chosen_names(decoder, modules, layers=range(99)):
    prefix = decoder.layer_path(0)[:-1]
    return [
        name
        for name, p in decoder.model.named_parameters()
        if name.startswith(prefix)
        and int(name[len(prefix) :].partition(".")[0]) in layers
        and wanted(modules, name[len(prefix) :].partition(".")[2], p)
    ]


def row_norms(model, name, g):
    """|g| of each output neuron's weights, in g's shape: an own reading of where a parameter has its neurons."""
    if g.dim() == 1 or name.endswith("bias"):
        return g.abs()
    module = model.get_submodule(name.rpartition(".")[0])
    turned = type(module).__name__ == "Conv1D"  # (K, N); the experts here are (E, N, K)
    g = g.t() if turned else g
    out = torch.stack([row.norm() for row in g.flatten(0, -2)]).reshape(*g.shape[:-1], 1).expand(g.shape)
    return out.t() if turned else out


def truth_scores(model, name, method, of_forget, of_retain, mu=1e-6, max_cosine=0.92):
    """Full-shape scores of one parameter, by the formulas of the papers."""
    f, r = (torch.stack([g[name] for g in x]) for x in (of_forget, of_retain))
    squares = f.square().mean(0), r.square().mean(0)
    f, r, w = f.mean(0), r.mean(0), dict(model.named_parameters())[name].detach()
    if method == "grad":
        return f.abs()
    if method == "fisher":
        return squares[0]
    if method == "fisher with retain":
        return torch.where(squares[0] == 0, 0.0, squares[0] / squares[1])
    if method == "wagle":
        return ((w - r / mu) * f).abs()
    if method == "sure":
        return row_norms(model, name, f)
    if method == "memflex":
        parts = zip(f, r) if ".experts." in name else [(f, r)]
        out = []
        for a, b in parts:
            cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0, eps=1e-300)
            out.append(torch.full_like(a, float(a.abs().mean()) if cosine < max_cosine else 0.0))
        return torch.stack(out).reshape(f.shape)
    return ((-f).sign() == r.sign()).double() - (f.sign() == r.sign()).double() * (f != 0)


@pytest.mark.parametrize(
    "modules, architecture",
    [("all", "llama"), ("mlp", "gpt2"), ("mlp", "mixtral"), ("all", "qwen2_moe")]
    + [pytest.param(*both, marks=pytest.mark.slow)
       for both in (("mlp", "llama"), ("all", "gpt2"), ("all", "mixtral"), ("mlp", "qwen2_moe"))],
)  # fmt: skip
def test_scores_equal_the_formulas(architecture, modules):
    model = tiny_model(architecture)
    decoder = Decoder(model)
    of_forget, of_retain = sample_gradients(model, FORGET), sample_gradients(model, RETAIN)
    names = chosen_names(decoder, modules)
    parameters = dict(model.named_parameters())
    for method in (*METHODS, "fisher with retain"):
        retain = None if method in (*WITHOUT, "fisher") else RETAIN
        for batch_tokens in (1000, 20):
            ours = attribute(
                decoder, FORGET, retain, method.split()[0], modules, max_cosine=0.1, mu=1e-3,
                batch_tokens=batch_tokens, impl="torch",
            )  # fmt: skip
            assert list(ours.scores) == names and ours.method == method.split()[0]
            for name in names:
                theirs = truth_scores(model, name, method, of_forget, of_retain, 1e-3, 0.1)
                scores = ours.scores[name].expand(parameters[name].shape)
                assert ours.shapes[name] == parameters[name].shape and scores.dtype == torch.float64
                if name.endswith("c_attn.bias") or name.endswith("k_proj.bias"):
                    continue  # keys' biases have no gradient but rounding
                if method == "sign_agreement":
                    f, r = (sum(g[name] for g in x) / len(x) for x in (of_forget, of_retain))
                    clear = (f.abs() > 1e-9 * f.abs().max()) & (r.abs() > 1e-9 * r.abs().max())
                    clear |= (f == 0) | (r == 0)
                    assert torch.equal(scores[clear], theirs[clear]) and clear.double().mean() > 0.9
                    continue
                # a mixture's routing rounds in fp32, and a difference of two gradients loses digits
                size = 1e-6 if architecture in MIXTURES else 1e-9
                floor = size * float(theirs[theirs.isfinite()].max())
                torch.testing.assert_close(scores, theirs, rtol=3 * size, atol=floor, msg=f"{method} {name}")


def test_published_rules():
    """wagle: the top 80 % of all weights; sure: the top 10 % of all rows; memflex: whole matrices by both limits;
    sign_agreement: what ascent on the forget set and descent on the retain set move the same way."""
    model = tiny_model()
    f, r = mean_of(sample_gradients(model, FORGET)), mean_of(sample_gradients(model, RETAIN))
    names = chosen_names(Decoder(model), "mlp")
    masks = {
        method: attribute(model, FORGET, None if method in WITHOUT else RETAIN, method).mask() for method in METHODS[2:]
    }
    for mask in masks.values():
        assert list(mask) == names
        assert all(m.dtype == torch.bool and m.is_contiguous() and m.shape == f[n].shape for n, m in mask.items())
    total = sum(f[n].numel() for n in names)
    assert sum(int(m.sum()) for m in masks["wagle"].values()) == round(0.8 * total)
    w = dict(model.named_parameters())
    lowest_in = min(
        float(((w[n].detach() - r[n] / 1e-6) * f[n]).abs()[m].min()) for n, m in masks["wagle"].items() if m.any()
    )
    highest_out = max(
        float(((w[n].detach() - r[n] / 1e-6) * f[n]).abs()[~m].max()) for n, m in masks["wagle"].items() if not m.all()
    )
    assert highest_out <= lowest_in * (1 + 1e-9)

    norms = torch.cat([f[n].norm(dim=1) for n in names])
    limit = norms.sort(descending=True)[0][round(0.1 * len(norms)) - 1]
    for name, mask in masks["sure"].items():
        assert torch.equal(mask, (f[name].norm(dim=1, keepdim=True) >= limit).expand(mask.shape))
    for name, mask in masks["memflex"].items():
        located = float(f[name].abs().mean()) > 6e-4 and float(
            torch.nn.functional.cosine_similarity(f[name].flatten(), r[name].flatten(), 0)
        ) < 0.92  # fmt: skip
        assert mask.all() if located else not mask.any()
    for name, mask in masks["sign_agreement"].items():
        assert torch.equal(mask, -f[name] * r[name] > 0)
        assert torch.equal(mask, (-f[name]).sign() == r[name].sign())  # MUDMAN's form: neither is 0 here


def test_memflex_uses_both_limits():
    model = tiny_model()
    same = attribute(model, FORGET, FORGET, "memflex")  # cosine 1: nothing may change
    assert not any(m.any() for m in same.mask(threshold=0.0).values())
    found = attribute(model, FORGET, RETAIN, "memflex", max_cosine=1.1)
    assert all(m.all() for m in found.mask(threshold=0.0).values())
    assert not any(m.any() for m in found.mask(threshold=1e9).values())


def test_blocks_alone_give_the_same_scores_and_cost_less():
    model = tiny_model()
    decoder = Decoder(model)
    whole = attribute(decoder, FORGET, RETAIN, "wagle", "all")
    part = attribute(decoder, FORGET, RETAIN, "wagle", "all", blocks=[range(2, 3), range(4, 6)])
    assert list(part.scores) == chosen_names(decoder, "all", {2, 4, 5})
    for name, scores in part.scores.items():
        torch.testing.assert_close(scores, whole.scores[name], rtol=1e-12, atol=0)
    seen = []
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: seen.append(i) if out.requires_grad else None)
        for i, layer in enumerate(model.model.layers)
    ]
    attribute(decoder, FORGET, method="grad", blocks=[range(3, 5)])
    for hook in hooks:
        hook.remove()
    assert 3 in seen and min(seen) >= 2  # 2: where a recorder hands the input of layer 3 through


def test_half_precision_and_checkpointing():
    truth = attribute(tiny_model(dtype=torch.bfloat16).double(), FORGET, RETAIN, "wagle", "all")
    ours = attribute(tiny_model(dtype=torch.bfloat16), FORGET, RETAIN, "wagle", "all", gradient_checkpointing=True)
    assert all(scores.dtype == torch.float32 for scores in ours.scores.values())
    a, b = (torch.cat([s.flatten().double() for s in x.scores.values()]) for x in (ours, truth))
    assert float((a - b).norm() / b.norm()) < 0.2
    model = tiny_model()
    plain, again = (attribute(model, FORGET, method="fisher", gradient_checkpointing=flag) for flag in (False, True))
    assert all(torch.equal(plain.scores[n], again.scores[n]) for n in plain.scores)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = (nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", METHODS)
def test_what_no_set_reaches_scores_0(method):
    model = tiny_model()
    model.model.layers[1].mlp = Idle()
    ours = attribute(model, FORGET, None if method in WITHOUT else RETAIN, method, max_cosine=1.1)
    assert not ours.scores["model.layers.1.mlp.idle.weight"].any()
    assert ours.scores["model.layers.1.mlp.used.weight"].any()


def test_a_weight_that_is_used_outside_of_its_module():
    """One batch for each set, whose gradients are not held: none of a pass that had to begin again remains."""
    model = tiny_model()
    layer = model.model.layers[1].mlp
    linear = layer.down_proj
    layer.register_forward_hook(lambda module, args, y: y + args[0] @ module.gate_proj.weight.T @ linear.weight.T)
    of_forget, of_retain = sample_gradients(model, FORGET), sample_gradients(model, RETAIN)
    for method, retain in (("wagle", RETAIN), ("fisher", None)):
        scores = attribute(model, FORGET, retain, method).scores
        for name in ("gate_proj", "down_proj"):
            name = f"model.layers.1.mlp.{name}.weight"
            truth = truth_scores(model, name, method, of_forget, of_retain)
            torch.testing.assert_close(scores[name], truth, rtol=1e-9, atol=1e-12)


def test_memory_is_one_gradient_for_each_set(monkeypatch):
    model = tiny_model(hidden_size=128, intermediate_size=256)
    forget, retain = random_samples(3, low=4, high=4), random_samples(3, seed=1, low=4, high=4)
    decoder = Decoder(model)
    size = sum(p.nbytes for n, p in model.named_parameters() if ".mlp." in n)
    base = peak_bytes(lambda: attribute(decoder, forget, method="sure", batch_tokens=1000))  # holds none
    for tokens, gradients in ((1000, 1), (4, 2)):
        peak = peak_bytes(lambda tokens=tokens: attribute(decoder, forget, retain, "wagle", batch_tokens=tokens))
        assert gradients - 0.3 < (peak - base) / size < gradients + 0.6, (tokens, (peak - base) / size)


@pytest.mark.parametrize("method", ["wagle", "fisher"])
def test_nothing_is_left_behind(method, monkeypatch):
    model = tiny_model("gpt2")
    model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    before = trace(model)
    attribute(model, FORGET, RETAIN, method, "all", batch_tokens=20)
    assert trace(model) == before

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attribution._Weight, "score", fail)
        attribute(model, FORGET, RETAIN, method, "all")
    assert trace(model) == before


def test_refusals():
    model = tiny_model()
    decoder = Decoder(model)
    for method in ("wagle", "memflex", "sign_agreement"):
        with pytest.raises(ValueError, match=f"method='{method}' compares with a retain set: give retain="):
            attribute(decoder, FORGET, method=method)
    for method in WITHOUT:
        with pytest.raises(ValueError, match=f"method='{method}' takes no retain set: leave it out"):
            attribute(decoder, FORGET, RETAIN, method)
    with pytest.raises(ValueError, match="method='x': expected one of grad, fisher"):
        attribute(decoder, FORGET, RETAIN, "x")
    with pytest.raises(ValueError, match="modules='x': expected one of mlp"):
        attribute(decoder, FORGET, RETAIN, modules="x")
    with pytest.raises(ValueError, match="mu=0: expected above 0"):
        attribute(decoder, FORGET, RETAIN, mu=0)
    with pytest.raises(ValueError, match=r"block=range\(5, 7\): expected a range of layers within range\(6\)"):
        attribute(decoder, FORGET, RETAIN, blocks=[range(5, 7)])
    with pytest.raises(ValueError, match=r"blocks=\[\]: these layers have no parameters"):
        attribute(decoder, FORGET, RETAIN, blocks=[])
    with pytest.raises(ValueError, match="no samples"):
        attribute(decoder, FORGET, [])
    blank = [{"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, -100])}]
    with pytest.raises(ValueError, match="forget sample 4: no token after its first has a label"):
        attribute(decoder, FORGET + blank, RETAIN)
    grad = attribute(decoder, FORGET, method="grad")
    with pytest.raises(ValueError, match=r"grad has no rule of its own: give ratio=... or threshold="):
        grad.mask()
    with pytest.raises(ValueError, match="ratio=0.1 and threshold=0.2: give one of them"):
        grad.mask(ratio=0.1, threshold=0.2)
    with pytest.raises(ValueError, match="a score is NaN or below 0; what goes by the sign has a threshold"):
        attribute(decoder, FORGET, RETAIN, "sign_agreement").mask(ratio=0.5)


def test_a_gradient_that_is_not_finite():
    model = tiny_model(dtype=torch.float16)
    decoder = Decoder(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
        model.model.norm.weight.mul_(10)
    with pytest.raises(ValueError, match="not finite although all weights are: try a wider dtype"):
        attribute(decoder, FORGET, method="grad")


# ---------------------------------------------------------------- the top of all scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_ratio_is_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        shapes = [(3, 5), (7,), (2, 1, 4), (1,)]
        scores = {f"p{i}": torch.rand(s, generator=generator, dtype=dtype) for i, s in enumerate(shapes)}
        if number % 3 == 0:  # many ties
            scores = {n: (s * 3).floor() for n, s in scores.items()}
        if number % 3 == 1:  # extremes
            scores["p1"][:4] = torch.tensor([0.0, math.inf, torch.finfo(dtype).tiny / 4, -0.0], dtype=dtype)
        scores["p0"] = scores["p0"].t().contiguous().t()
        flat = torch.cat([s.flatten() for s in scores.values()])
        for ratio in (0, 0.013, 0.1, 0.37, 0.5, 0.9, 1):
            wanted = round(ratio * len(flat))
            truth = torch.zeros(len(flat), dtype=torch.bool)
            truth[(-flat).argsort(stable=True)[:wanted]] = True
            ours = top_ratio(scores, ratio)
            assert torch.equal(torch.cat([m.flatten() for m in ours.values()]), truth), (number, ratio)
            assert all(ours[n].shape == s.shape for n, s in scores.items())


def test_equal_scores_go_to_the_first():
    ones = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    mask = top_ratio(ones, 0.4)
    assert mask["a"].flatten().tolist() == [True] * 4 + [False] * 2 and not mask["b"].any()
    assert Attribution("grad", ones, {n: t.shape for n, t in ones.items()}).mask(ratio=1.0)["b"].all()


def test_top_ratio_refuses():
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ratio=.*: expected 0 to 1"):
            top_ratio({"a": torch.ones(2)}, ratio)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="^a: a score is NaN or below 0"):
            top_ratio({"a": torch.tensor([1.0, bad])}, 0.5)
    for scores in ({"a": torch.ones(2), "b": torch.ones(2).double()}, {"a": torch.ones(2).half()}, {}):
        with pytest.raises(TypeError, match="expected float32, or float64, in all"):
            top_ratio(scores, 0.5)
