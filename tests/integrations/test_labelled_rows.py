"""A model's forward that makes no more than what is wanted of it: the model's own numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import rarely, relative
from padded_batches import padded, sums
from tiny_models import random_samples, tiny_model

from kunbr_fast.integrations import labelled_rows
from kunbr_fast.integrations.labelled_rows import Known, Unfit

FP64 = 1e-6  # transformers computes an fp64 model's loss in fp32


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sequence_nll(model, batch):
    with labelled_rows.of(model).want("nll"):
        return model(**batch).loss


@pytest.mark.parametrize(
    "architecture, side",
    [("llama", "right"), ("llama", "left"), ("gemma2", "right"), ("phi3", "right"), ("gpt2", "left")],
)
def test_loss_and_gradients_are_the_models_own(architecture, side):
    model, batch = tiny_model(architecture), padded(random_samples(4), side)
    own = model(**batch)
    own.loss.backward()
    truth, _ = grads(model), model.zero_grad()
    rows = labelled_rows.install(model)
    with rows.want("loss"):
        ours = model(**batch)
        asked = model(**{**batch, "labels": None})  # for its logits
    ours.loss.backward()
    assert ours.logits is None and relative(ours.loss, own.loss) < FP64
    assert asked.loss is None and torch.equal(asked.logits, own.logits)
    found = grads(model)
    assert found.keys() == truth.keys()
    assert all(relative(found[name], value) < 100 * FP64 for name, value in truth.items() if value.abs().max() > 1e-6)
    assert torch.equal(model(**batch).logits, own.logits)  # nothing asked: its own forward


def test_sequence_sums():
    model, batch = tiny_model(), padded(random_samples(4))
    rows = labelled_rows.install(model)
    truth = sums(model(**batch).logits, batch["labels"])
    assert relative(sequence_nll(model, batch), truth) < 1e-12
    assert rows.wanted is None


def test_layers_above_are_not_run():
    model, batch = tiny_model(), padded(random_samples(3))
    layers, ran, seen = labelled_rows.layers(model), [], []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    layers[2].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    rows = labelled_rows.install(model)
    model(**batch)
    rows.stop, ran[:] = 3, []
    with rows.want("layers"):
        model(**batch)
    assert ran == [0, 1, 2] and torch.equal(seen[-2], seen[-1])
    assert labelled_rows.layers(model) is layers and len(layers) == 6


def test_a_reference_model_is_asked_once_for_each_sequence():
    model, samples = tiny_model(), random_samples(5)
    rows = labelled_rows.install(model)
    rows.known, sizes = Known(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    first, second = padded(samples[:3]), padded(samples[1:])
    with torch.no_grad():
        ours = [sequence_nll(model, batch) for batch in (first, second, first)]
        assert sizes == [3, 2]
        truth = [sums(model(**batch).logits, batch["labels"]) for batch in (first, second, first)]
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, truth))
    other = {**first, "labels": torch.where(first["labels"] == first["labels"][0, 1], -100, first["labels"])}
    with torch.no_grad():
        sequence_nll(model, other)
    assert len(sizes) == 6 and len(rows.known.nll) == 6  # other labels are another question


@pytest.mark.parametrize("architecture, runs", [("llama", [5, 2, 2]), ("gemma2", [5, 2, 2, 2])])
def test_a_reference_models_layers_run_once_for_each_sequence(monkeypatch, architecture, runs):
    """For logits at all positions: in a batch with less padding than before, with more, and beyond the limit."""
    model, samples = tiny_model(architecture), random_samples(5)
    rows = labelled_rows.install(model)
    batches = [padded(part) for part in (samples, samples[:2], samples[2:])]
    narrow = padded(samples[:2])
    wide = {name: F.pad(x, (0, 20), value=-100 if name == "labels" else 0) for name, x in narrow.items()}
    other_padding = {**wide, "input_ids": torch.where(wide["attention_mask"], wide["input_ids"], 5)}
    batches += [wide, other_padding]
    with torch.no_grad():
        truth = [model(**batch).logits for batch in batches]
        rows.known, rows.wanted, sizes = Known(), "logits", []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: sizes.append(len(out)))
        ours = [model(**batch).logits for batch in batches]
    assert sizes == runs  # Llama's: nothing of the second and third, which have less padding
    for a, b in zip(ours, truth):  # padding that may attend to nothing is NaN in either
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert rows.known.bytes == sum(hidden.nbytes for _, hidden in rows.known.hidden.values()) > 0
    monkeypatch.setattr(labelled_rows, "LIMIT", 0)
    rows.known = Known()
    with torch.no_grad():
        again = [model(**batches[0]).logits for _ in range(2)]
    assert sizes[-2:] == [5, 5] and torch.equal(again[0], truth[0]) and rows.known.bytes == 0
    assert model(**batches[0]).logits.requires_grad  # a training pass is its own


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_values_of_labelled_rows(architecture):
    model, batch = tiny_model(architecture), padded(random_samples(4))
    rows, targets = labelled_rows.install(model), batch["labels"][:, 1:]
    logits = model(**batch).logits[:, :-1][targets != -100]
    with rows.want("tokens"):
        nll = model(**batch).loss
    assert relative(nll, F.cross_entropy(logits, targets[targets != -100], reduction="none")) < 1e-12
    with rows.want(lambda z, targets, original: z.max(1).values):
        values = model(**batch).loss
    assert relative(values, logits.max(1).values) < 1e-12


def test_install_and_copies():
    model = tiny_model()
    rows = labelled_rows.install(model)
    assert labelled_rows.install(model) is rows and labelled_rows.of(SimpleNamespaceModule(model)) is rows
    twin = copy.deepcopy(model)
    assert labelled_rows.of(twin) is not rows and twin.forward.__self__ is twin
    model = tiny_model()
    model.forward = lambda **_: None
    with pytest.raises(Unfit, match="its own forward"):
        labelled_rows.install(model)
    model = tiny_model(num_hidden_layers=1)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(Unfit, match="its weights are in parts .DeepSpeed ZeRO-3. before the trainer is made"):
        labelled_rows.install(model)
    labelled_rows.remove(twin)
    assert labelled_rows.of(twin) is None and "forward" not in twin.__dict__


class SimpleNamespaceModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


def test_a_model_with_another_loss_is_refused():
    model = tiny_model()
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    with pytest.raises(Unfit, match="its loss differs"):
        labelled_rows.install(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("compiled_first", rarely([False, True], [False]))
def test_of_a_compiled_model(compiled_first):
    """Its layers are compiled, what reads the labels is not; and what is wanted is found through the wrapper."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model, batch = tiny_model(num_hidden_layers=2), padded(random_samples(4))
    own = model(**batch)
    own.loss.backward()
    truth, _ = grads(model), model.zero_grad()
    compiled = torch.compile(model, backend=backend)
    rows = labelled_rows.install(compiled if compiled_first else model)
    assert labelled_rows.of(compiled) is labelled_rows.of(SimpleNamespaceModule(compiled)) is rows
    with rows.want("loss"):
        ours = compiled(**batch)
    ours.loss.backward()
    assert ours.logits is None and relative(ours.loss, own.loss) < FP64
    found = grads(model)
    assert all(relative(found[name], value) < 100 * FP64 for name, value in truth.items() if value.abs().max() > 1e-6)
    assert max(graphs) > 20  # the layers
    rows.stop, seen, before = 1, [], len(graphs)
    hook = labelled_rows.layers(compiled)[0].register_forward_hook(lambda *_: seen.append(1))
    with rows.want("layers"):
        compiled(**batch)
    hook.remove()
    assert seen == [1] and len(graphs) == before
    torch._dynamo.reset()
