"""Gradient difference and the mean likelihood against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from reference_procedure import padded_loss
from tiny_models import random_samples, tiny_model

from kunbr_fast.data import pack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives import losses


def packed_loss(decoder, batch, rows):
    out = decoder.run(batch)
    return losses.linear_loss(decoder.final(out[batch.rows]), decoder.head, batch.targets, rows.weight, rows.cap)


def unequal():
    """Samples whose numbers of labelled tokens differ much, so that a mean over tokens would be another number."""
    return random_samples(2, seed=1, low=3, high=4) + random_samples(1, seed=2, low=19, high=20)


def all_grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("retain_coeff", [1.0, 2.5, 0.0])
def test_gradient_difference_is_the_padded_two_pass_formula(architecture, retain_coeff):
    model = tiny_model(architecture)
    model.config._attn_implementation = "sdpa" if architecture != "gemma2" else "eager"
    decoder = Decoder(model)
    forget, retain = unequal(), random_samples(5, seed=3, low=6)
    if architecture == "gemma2":  # transformers' fp64 eager mask makes NaN of a padded place far behind its sample
        forget = random_samples(3, seed=1, low=8, high=12)
    truth = -padded_loss(model, forget) + retain_coeff * padded_loss(model, retain)
    expected = all_grads(model, truth)
    batch = pack(forget + retain)
    loss, nll = packed_loss(decoder, batch, losses.gradient_difference(batch, len(forget), retain_coeff))
    limit = 1e-6 if architecture == "gemma2" else 1e-11
    assert abs(float(loss.detach()) - float(truth.detach())) < limit
    ours = all_grads(model, loss)
    for name, value in expected.items():
        assert float((ours[name] - value).norm()) <= limit * max(float(value.norm()), 1e-3), name
    means = losses.mean_nll(batch, nll)
    with torch.no_grad():
        assert abs(float(means[: len(forget)].mean() - padded_loss(model, forget))) < limit
        assert abs(float(means[len(forget) :].mean() - padded_loss(model, retain))) < limit


def test_likelihood_is_a_sum_over_samples_of_means_over_tokens():
    model, samples = tiny_model(), unequal()
    batch = pack(samples)
    with torch.no_grad():
        loss, nll = packed_loss(Decoder(model), batch, losses.likelihood(batch))
        each = []
        for sample in samples:
            logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1]
            each.append(F.cross_entropy(logits, sample["labels"][1:], ignore_index=-100))
    each = torch.stack(each)
    torch.testing.assert_close(losses.mean_nll(batch, nll), each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, each.sum(), rtol=1e-12, atol=1e-12)


def test_the_cap_stops_forget_tokens_only_and_token_by_token():
    batch = pack(unequal() + random_samples(3, seed=4))
    nll = torch.rand(len(batch.rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    rows = losses.gradient_difference(batch, 3, 2.0, forget_loss_cap=4.0)
    forget = batch.row_sample < 3
    assert bool((rows.cap[forget] == 4.0).all()) and bool(rows.cap[~forget].isinf().all())
    assert torch.equal(rows.weight, losses.gradient_difference(batch, 3, 2.0).weight)
    assert bool((rows.weight[forget] < 0).all()) and bool((rows.weight[~forget] > 0).all())
    expected = 0.0
    for sample in range(batch.num_samples):
        mine = nll[batch.row_sample == sample]
        expected += -mine.clamp(max=4.0).mean() / 3 if sample < 3 else 2.0 * mine.mean() / 3
    torch.testing.assert_close((rows.weight * nll.minimum(rows.cap)).sum(), expected, rtol=1e-12, atol=1e-12)
    assert losses.gradient_difference(batch, 3, 2.0).cap is None


def test_only_forget_or_only_retain():
    batch = pack(unequal())
    only_forget = losses.gradient_difference(batch, 3, 5.0).weight
    only_retain = losses.gradient_difference(batch, 0, 5.0).weight
    torch.testing.assert_close(only_forget.sum(), torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(only_retain.sum(), torch.tensor(5.0, dtype=torch.float64))


def test_a_sample_without_a_label_is_named():
    """It has no mean; the other samples' weights would silently be shares of a larger number."""
    samples = unequal()
    samples[1]["labels"] = torch.full_like(samples[1]["labels"], -100)
    samples[1]["labels"][0] = samples[1]["input_ids"][0]  # nothing predicts a first token
    batch = pack(samples)
    with pytest.raises(ValueError, match="sample 1 of the batch has no token with a loss"):
        losses.likelihood(batch)
    with pytest.raises(ValueError, match="sample 1 of the batch has no token with a loss"):
        losses.gradient_difference(batch, 2, 1.0)
