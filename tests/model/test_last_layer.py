"""The last layer for labelled rows only: same values and gradients as for all rows, less work."""

import pytest
import torch
from patch_problem import FUSED
from tiny_models import random_samples, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from kunbr_fast.data import IGNORE, pack
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.patch import patched


def few_labels(count=4, low=6, high=12, labelled=2):
    """Samples of which only some tokens have a label, a different number in each."""
    samples = random_samples(count, low=low, high=high)
    for number, sample in enumerate(samples):
        keep = torch.zeros(len(sample["labels"]), dtype=torch.bool)
        keep[-1 - number % labelled :] = True
        sample["labels"] = torch.where(keep, sample["input_ids"], IGNORE)
    return samples


def test_row_grid():
    batch = pack(few_labels(5))
    index, back, place = batch.row_grid
    assert torch.equal(index[back], torch.arange(len(batch.rows)))
    assert torch.equal(place.flatten()[back], batch.position_ids[batch.rows])
    sample = torch.arange(5)[:, None].expand_as(place)
    assert torch.equal(batch.row_sample[index], sample.flatten())  # padded places repeat a row of their own sample


def run(decoder, batch, start, recompute=False, **kwargs):
    """The labelled rows' hidden states, and the gradients of a sum of them in the last layer and in the input."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch.num_tokens, 32, generator=generator, dtype=torch.float64).requires_grad_()
    out = decoder.run(batch, Stretch(start, hidden, recompute), **kwargs)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    parameters = list(decoder.layers[-1].parameters())
    grads = torch.autograd.grad((out * weight).sum(), [hidden, *parameters])
    return out.detach(), grads


# OLMo-2's layer keeps its own forward; a SmolLM3 of six layers has its one without rotary in the middle
@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_of_the_last_layer(architecture, recompute):
    decoder, batch = Decoder(tiny_model(architecture)), pack(few_labels())
    asked = []
    with patched(decoder.model):
        layer = decoder.layers[-1]
        handle = layer.register_forward_hook(lambda module, args, out: asked.append(out.shape[1]))
        ours, our_grads = run(decoder, batch, 4, recompute=recompute, rows=True)
        handle.remove()
        everything = decoder.run
        decoder.run = lambda *args, **kwargs: everything(*args, **kwargs)[batch.rows]
        truth, true_grads = run(decoder, batch, 4)
    fused = architecture != "olmo2"
    assert set(asked) == {len(batch.rows) if fused else batch.num_tokens}
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    # norms and rotary angles are fp32 inside in the models' own code, and sums come in another order
    for a, b in zip(our_grads, true_grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-6 * float(b.abs().max()))


def test_where_most_rows_have_labels_all_are_computed():
    decoder, batch = Decoder(tiny_model()), pack(random_samples(4))
    assert 2 * len(batch.rows) > batch.num_tokens
    with patched(decoder.model):
        asked = []
        handle = decoder.layers[-1].register_forward_hook(lambda module, args, out: asked.append(out.shape[1]))
        out = decoder.run(batch, rows=True)
        handle.remove()
        assert asked == [batch.num_tokens] and torch.equal(out, decoder.run(batch)[batch.rows])
    assert torch.equal(decoder.run(batch, rows=True), decoder.run(batch)[batch.rows])  # not patched


def test_fewer_flops():
    """One label a sample: the last layer's q, o and MLP on 4 rows, its k and v on all."""
    samples = few_labels(4, low=12, high=12, labelled=1)
    decoder, batch = Decoder(tiny_model()), pack(samples)
    hidden = torch.randn(batch.num_tokens, 32, dtype=torch.float64)
    flops = {}
    with patched(decoder.model), torch.no_grad():
        for rows in (False, True):
            with FlopCounterMode(display=False) as counter:
                decoder.run(batch, Stretch(5, hidden), rows=rows)
            flops[rows] = counter.get_total_flops()
    q_o_mlp = 2 * 32 * (32 + 32 + 3 * 48)
    k_v = 2 * 32 * 32
    products = {False: 48 * (q_o_mlp + k_v), True: 4 * q_o_mlp + 48 * k_v}
    for rows, count in products.items():
        assert count <= flops[rows] <= 1.35 * count  # and attention itself
