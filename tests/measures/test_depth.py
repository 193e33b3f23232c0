"""The measures of the group "depth", each against a plain formula."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import transformers as tf
from architectures.configurations import made
from streamed_models import folders_of_models, streamed, whole
from test_probes import plain_probe, planted
from tiny_models import moved, tiny_model

from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.measures import depth
from kunbr_fast.measures.answers import Readout, Subject
from kunbr_fast.measures.layers import LayerReadout
from kunbr_fast.measures.registry import MEASURES
from kunbr_fast.measures.value_vectors import compare_values, value_parameters

LEVELS, QUESTIONS = 4, 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_of_models(tmp_path_factory)


def subject(states, original=None, name="result", **more):
    def subject_of(name, states, of=None):
        number = 0 if states is None else max(states.items) + 2  # more items than were read
        items = [Item({"prompt": f"Who is {i}?", "completion": " Ada"}) for i in range(number)]
        return Subject(name, {"forget": Readout(items, (), (), (), states=states)}, of, **more)

    return subject_of(name, states, None if original is None else subject_of("original", original))


def readout(seed=0, strengths=(0, 0, 1.0, 0.3), others=3):
    """Questions of four choices, planted levels, and some records without choices."""
    levels = [planted(strength, QUESTIONS, 16, seed=0) for strength in strengths]
    generator = torch.Generator().manual_seed(seed)
    states = torch.stack([level[0] for level in levels])
    states = torch.cat([states, states.new_empty(LEVELS, others, 16).normal_(generator=generator)], 1)
    states += 0.1 * seed * torch.randn(states.shape, generator=generator).double()
    right = [i == answer for answer in levels[0][2] for i in range(4)] + [None] * others
    items = [i // 4 for i in range(4 * QUESTIONS)] + [QUESTIONS + i for i in range(others)]
    lens = (torch.rand(2, LEVELS, QUESTIONS, generator=generator) < 0.5).double()
    return LayerReadout([[i] for i in range(len(items))], items, right, states, *lens), levels


def test_distances_of_hidden_states():
    result, original = readout(1)[0], readout(0)[0]
    texts = [4 * q + answer for q, answer in enumerate(planted(0, QUESTIONS, 16)[2])] + [
        4 * QUESTIONS + i for i in range(3)
    ]
    h, h0 = (of.states.numpy()[:, texts] for of in (result, original))
    sizes = [np.sqrt((x**2).sum(-1)) for x in (h, h0)]
    truths = {
        "hidden_cosine_distance": 1 - (h * h0).sum(-1) / sizes[0] / sizes[1],
        "hidden_relative_distance": np.sqrt(((h - h0) ** 2).sum(-1)) / sizes[1],
    }
    for name, truth in truths.items():
        found = MEASURES[name](subject(result, original), "forget")
        assert found.value == pytest.approx(truth[1:].mean(), rel=1e-12) and found.number == QUESTIONS + 3
        assert found.values[:-1] == pytest.approx(list(truth[1:].mean(0)), rel=1e-10) and found.values[-1] is None
        assert found.detail["layers"] == [0, 1, 2, 3]
        assert found.detail["values"] == pytest.approx(truth.mean(1), rel=1e-12)
        assert found.detail["standard_errors"] == pytest.approx(truth.std(1, ddof=1) / len(texts) ** 0.5, rel=1e-10)
        itself = MEASURES[name](subject(original, original), "forget")
        assert itself.value == 0 and set(itself.detail["values"]) == {0}
        assert MEASURES[name](subject(original), "forget") is None  # the original itself
        assert MEASURES[name](subject(None, original), "forget") is None


def test_states_of_other_tokens_are_not_compared():
    result, original = readout(1)[0], readout(0)[0]
    other = dataclasses.replace(original, texts=[[7], *original.texts[1:]])
    with pytest.raises(ValueError, match="result and original have other layers, or their tokenizers"):
        depth.hidden_cosine_distance(subject(result, other), "forget")
    fewer = dataclasses.replace(original, states=original.states[1:])
    with pytest.raises(ValueError, match="other layers"):
        depth.hidden_relative_distance(subject(result, fewer), "forget")


def plain_choice(values):
    """Of each question its value at the level, 1 and up, that is best on the questions of the other folds (i % 5)."""
    fold, own = np.arange(values.shape[1]) % 5, []
    for i in range(values.shape[1]):
        means = values[1:, fold != fold[i]].mean(1)
        own.append(values[1 + int(np.argmax(means)), i])
    return own


def test_linear_probe():
    read, levels = readout()
    found = depth.linear_probe(subject(read), "forget")
    truth = np.array([plain_probe(*level) for level in levels])
    assert found.detail["values"] == pytest.approx(truth.mean(1), abs=1e-12)
    own = plain_choice(truth)
    assert found.values == [*own, *[None] * 4] and found.value == pytest.approx(np.mean(own))
    assert found.detail["best"] == {"layer": 2, "value": truth[2].mean()} and truth[2].mean() > truth[1].mean() + 0.3
    assert found.detail["middle"]["layer"] == 2 and found.detail["last"] == {"layer": 3, "value": truth[3].mean()}
    assert found.detail["chance"] == 0.25 and "biased" in found.detail["note"] and found.number == QUESTIONS


@pytest.mark.parametrize(("name", "of"), [("logit_lens", "choice"), ("logit_lens_letter", "letter")])
def test_logit_lens(name, of):
    read = readout()[0]
    found, values = MEASURES[name](subject(read), "forget"), getattr(read, of).numpy()
    own = plain_choice(values)
    assert found.values == [*own, *[None] * 4] and found.value == pytest.approx(np.mean(own))
    assert found.detail["values"] == pytest.approx(values.mean(1)) and found.detail["chance"] == 0.25
    assert found.standard_error == pytest.approx(np.std(own) / QUESTIONS**0.5, rel=0.1)  # the bootstrap's
    assert MEASURES[name](subject(dataclasses.replace(read, **{of: None})), "forget") is None


def test_the_choice_of_a_layer_does_not_favour_one():
    """Of many layers that know nothing the best is far above chance; a layer chosen by other questions is not."""
    generator, number, seeds = torch.Generator().manual_seed(0), 100, 16
    best, own = [], []
    for _ in range(seeds):
        values = (torch.rand(41, number, generator=generator) < 0.25).double()
        right, items = [True, False, False, False] * number, [i // 4 for i in range(4 * number)]
        read = LayerReadout([[1]] * 4 * number, items, right, torch.ones(1, 4 * number, 2), values)
        found = depth.logit_lens(subject(read), "forget")
        best.append(found.detail["best"]["value"])
        own.append(found.value)
    error = (0.25 * 0.75 / number) ** 0.5
    assert np.mean(best) > 0.25 + 1.5 * error
    assert abs(np.mean(own) - 0.25) < 3 * error / seeds**0.5


def test_questions_about_one_fact_are_in_one_fold():
    """What a probe was trained on does not answer the same question in other words."""
    read, levels = readout()
    made, facts = subject(read), [number // 2 for number in range(QUESTIONS)]
    for item, fact in zip(made.sets["forget"].items, facts):
        item.record["fact"] = fact
    truth = np.array([plain_probe(*level, facts) for level in levels])
    assert truth.tolist() != [plain_probe(*level) for level in levels]
    assert depth.linear_probe(made, "forget").detail["values"] == pytest.approx(truth.mean(1))
    for item in made.sets["forget"].items:
        item.record["fact"] = "one"
    assert depth.linear_probe(made, "forget") is None and depth.logit_lens(made, "forget") is None


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_questions_have_no_figure(count):
    read = LayerReadout([[1]] * 4, [0] * 4, [True, False, False, False][:4] if count else [None] * 4,
                        torch.ones(3, 4, 2), torch.ones(3, count) if count else None)  # fmt: skip
    assert depth.linear_probe(subject(read), "forget") is None and depth.logit_lens(subject(read), "forget") is None
    assert depth.linear_probe(subject(None), "forget") is None and depth.logit_lens(subject(None), "forget") is None


# ---------------------------------------------------------------- value vectors


def vectors(architecture, model, layer):
    """(number, D) of a layer, in plain words."""
    if architecture == "llama":
        return model.model.layers[layer].mlp.down_proj.weight.T
    if architecture == "gpt2":
        return model.transformer.h[layer].mlp.c_proj.weight
    mlp = model.model.layers[layer].mlp
    if architecture == "mixtral":
        return torch.cat([expert.T for expert in mlp.experts.down_proj])
    parts = [mlp] if hasattr(mlp, "down_proj") else [mlp.shared_expert]
    experts = [expert.T for expert in mlp.experts.down_proj] if hasattr(mlp, "experts") else []
    return torch.cat([*(part.down_proj.weight.T for part in parts), *experts])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_value_vectors(architecture, monkeypatch):
    monkeypatch.setattr("kunbr_fast.measures.value_vectors.AT_ONCE", 200)  # several pieces
    original = tiny_model(architecture)
    model = moved(original, size=0.1)
    found = compare_values(model, original)
    layers = range(model.config.num_hidden_layers)
    truth = []
    for layer in layers:
        v, v0 = (vectors(architecture, m, layer).detach().numpy() for m in (model, original))
        truth.append((v * v0).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(v0, axis=1))
    assert found.layers == list(layers) and found.number == sum(map(len, truth))
    assert found.mean == pytest.approx([t.mean() for t in truth], rel=1e-12)
    assert found.smallest == pytest.approx([t.min() for t in truth], rel=1e-12)
    figure = depth.value_vector_cosine(subject(None, value_vectors=found), "forget")
    assert figure.value == pytest.approx(np.mean([t.mean() for t in truth])) and figure.number == found.number
    assert figure.detail["smallest"] == found.smallest and 0.1 < min(found.smallest) < 0.999
    same = compare_values(original, original)
    assert same.mean == same.smallest == [1.0] * len(layers)


def test_a_square_down_projection_and_vectors_of_zeros():
    original = tiny_model("llama", intermediate_size=32)  # any of the three matrices has the shape
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
        model.model.layers[2].mlp.down_proj.weight[:, 0] = 0
        for one in (model, original):
            one.model.layers[3].mlp.down_proj.weight[:, 5] = 0
    found = compare_values(model, original)
    assert found.smallest == [1, 1, 0, 1, 1, 1] and found.mean[2] == 31 / 32


def test_transposed_experts():
    original = tf.GptOssForCausalLM(
        tf.GptOssConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    assert [(v.name, v.rows) for v in value_parameters(original)] == [
        (f"model.layers.{i}.mlp.experts.down_proj", True) for i in range(2)
    ]
    joined = made("dbrx")  # its experts' matrices, one below the other
    assert [(v.name, v.rows) for v in value_parameters(joined)] == [
        (f"transformer.blocks.{i}.ffn.experts.mlp.w2", True) for i in range(4)
    ]


def test_streamed_models_folders_and_those_in_memory(folder, tmp_path, monkeypatch):
    path = folder("mixtral")
    model = moved(whole(path))
    in_memory = compare_values(model, whole(path))
    assert compare_values(model, streamed(path)) == compare_values(model, path) == in_memory
    assert compare_values(streamed(path), str(path)).smallest == [1.0, 1.0]
    model.save_pretrained(tmp_path)

    def not_this_one(*arguments):
        raise ValueError("this architecture cannot be streamed")

    assert compare_values(tmp_path, path) == in_memory
    monkeypatch.setattr("kunbr_fast.measures.value_vectors.open_streamed", not_this_one)
    assert compare_values(tmp_path, path) == in_memory


def test_models_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj.weight: the original has none of this shape"):
        compare_values(tiny_model(), tiny_model(intermediate_size=40))
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=2))
    assert compare_values(mamba, mamba) is None


# ---------------------------------------------------------------- attacks

RIGHT = {"full": {"a": [1, 3, 6, 6], "b": [1, 2, 0, 1]}, "lora": {"a": [1, 2, 2, 2], "b": [1, 1, 1, 2]}}
NUMBER = {"a": 12, "b": 2}


def curves(known=True, smooth=True):
    return RTTResult(
        [
            {
                "attack": attack, "fold": fold, "lr": 1e-3, "epoch": epoch, "plain": right / NUMBER[fold],
                "calibrated": None, **({"num_questions": NUMBER[fold]} if known else {}), "change_error": 0.05 * epoch,
                **({"smooth": right / NUMBER[fold] / 2, "smooth_error": 0.1} if smooth else {}),
            }
            for attack, folds in RIGHT.items() for fold, curve in folds.items() for epoch, right in enumerate(curve)
        ]
    )  # fmt: skip


def test_what_attacks_bring_back():
    after, before, back = (subject(None, rtt=curves()) for _ in range(3))
    found = depth.rtt_accuracy(after, "forget")
    assert found.value == 7 / 14 and found.number == 14 and found.detail["before"] == pytest.approx(2 / 14)
    assert found.standard_error == pytest.approx((12 * 0.5 * 0.5 + 2 * 0.5 * 0.5) ** 0.5 / 14)
    assert found.detail["attack"] == "full" and found.detail["epoch"] == 3 and found.detail["lr"] == 1e-3
    assert found.detail["attacks"] == pytest.approx({"full": 7 / 14, "lora": 4 / 14})
    found = depth.recovery(before, "forget")
    assert found.value == pytest.approx(5 / 14)
    assert found.standard_error == pytest.approx(0.15 * (12**2 + 2**2) ** 0.5 / 14)
    (name, full), (other, lora) = depth.attack_figures(curves())
    assert (name, other) == ("full", "lora") and full.value == 7 / 14 and lora.value == pytest.approx(4 / 14)
    assert lora.detail["recovery"] == pytest.approx(2 / 14) and lora.detail["epoch"] == 3
    assert lora.detail["recovery_error"] == pytest.approx(0.15 * (12**2 + 2**2) ** 0.5 / 14)
    assert lora.standard_error == pytest.approx((12 * 2 / 12 * 10 / 12 + 2 * 0) ** 0.5 / 14)
    assert (
        full.detail["smooth"] == pytest.approx(7 / 28)
        and "smooth" not in depth.attack_figures(curves(smooth=False))[0][1].detail
    )


def test_no_attack_no_figure():
    assert depth.rtt_accuracy(subject(None), "forget") is None and depth.recovery(subject(None), "forget") is None
    unknown = subject(None, rtt=curves(known=False))  # an earlier version's
    assert depth.rtt_accuracy(unknown, "forget") is None and depth.recovery(unknown, "forget") is None
    assert depth.attack_figures(curves(known=False)) == []


def test_what_is_registered():
    mine = {name: m for name, m in MEASURES.items() if m.group == "depth"}
    assert set(mine) == {
        "hidden_cosine_distance", "hidden_relative_distance", "linear_probe", "logit_lens", "logit_lens_letter",
        "value_vector_cosine", "rtt_accuracy", "recovery",
    }  # fmt: skip
    assert all(re.search("Source|arXiv|[Aa]s hidden|As logit", m.formula) for m in mine.values())
