"""Hidden states of all layers, against the model's own forward text by text."""

import itertools

import pytest
import torch
from streamed_models import folders_of_models, streamed, whole
from tiny_models import VOCAB, tiny_model

from kunbr_fast.measures.states import hidden_states
from kunbr_fast.model.decoder import Decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_of_models(tmp_path_factory)


def some_texts(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def plain_states(model, ids):
    """(H + 1, T, D) of one text, by the model's own forward. What transformers calls the last hidden state comes after
    the final norm: the last layer's output is taken from the layer."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    last = []
    handle = layers[-1].register_forward_hook(lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    handle.remove()
    return torch.stack([*(h[0] for h in out.hidden_states[:-1]), last[0].view(1, len(ids), -1)[0]])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_states_are_the_models_own(architecture, monkeypatch):
    monkeypatch.setattr("kunbr_fast.measures.states.BATCH_TOKENS", 20)  # several batches, and texts by themselves
    model, texts = tiny_model(architecture), some_texts()
    found = hidden_states(Decoder(model), texts)
    truth = torch.stack([plain_states(model, ids)[:, -1] for ids in texts], 1)
    assert found.dtype == torch.float64 and found.shape == truth.shape
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)  # norms and rotary angles are in fp32 in both
    assert all((a - b).norm() > 0.01 * b.norm() for a, b in itertools.pairwise(found))  # no level is another


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_streamed_model_has_the_same_bits(architecture, folder, monkeypatch):
    monkeypatch.setattr("kunbr_fast.measures.states.BATCH_TOKENS", 20)
    path, texts = folder(architecture), some_texts()
    loads = []
    model = streamed(path)
    decoder = Decoder(model)
    visit = decoder.weights.visit
    monkeypatch.setattr(decoder.weights, "visit", lambda order: loads.append(list(order)) or visit(order))
    found = hidden_states(decoder, texts)
    assert loads == [list(range(decoder.num_layers))]  # each layer once
    assert found.dtype == torch.float32
    assert torch.equal(found, hidden_states(Decoder(whole(path)), texts))


def test_what_is_refused():
    decoder = Decoder(tiny_model())
    for texts in ([], [[5], []]):
        with pytest.raises(ValueError, match="no texts, or an empty one"):
            hidden_states(decoder, texts)
    with pytest.raises(ValueError, match="text 1: token id 97, but the model embeds 97"):
        hidden_states(decoder, [[5], [97]])
    with pytest.raises(ValueError, match="65 tokens: LlamaForCausalLM has 64 positions"):
        hidden_states(decoder, [[5] * 65])
    decoder.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="hidden states at level 4 are not finite"):
        hidden_states(decoder, [[5, 6]])
