"""The fast path gives the reference procedure's trained weights: fp64, 30 steps over 3 blocks, 1e-9 relative."""

import copy

import pytest
import torch
from reference_procedure import reference_block
from tiny_models import ARCHITECTURES, moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.model.decoder import Decoder

BLOCKS = [range(0, 2), range(2, 4), range(4, 5)]
LR, RETAIN_COEFF = 1e-3, 1.5


def invariant(architecture, name, shape):
    """Entries that the model's function does not depend on: their gradient is zero but for rounding, and Lion takes
    the sign of that. A key bias adds the same score to every key of a query, which softmax cancels. Under rotary
    embedding that holds for the dimensions that are not rotated only (GPT-NeoX rotates a quarter)."""
    free = torch.zeros(shape, dtype=torch.bool)
    if architecture == "gpt2" and name.endswith("attn.c_attn.bias"):
        free.view(3, -1)[1] = True  # q, k, v
    if architecture == "gpt_neox" and name.endswith("attention.query_key_value.bias"):
        heads = free.view(4, 3, 8)  # heads; q, k, v; head size
        heads[:, 1, 2:] = True
    return free


def run_fast(original, unlearned, schedules, forget, retain, storage, tmp_path, insertion):
    decoder = Decoder(original)
    cache = kf.PrefixCache(decoder, forget + retain, storage=storage, directory=tmp_path, batch_tokens=40)
    for block, schedule in zip(BLOCKS, schedules):
        cache.advance(block.start)
        with kf.reinserted(
            decoder, unlearned, block, lr=LR, retain_coeff=RETAIN_COEFF, insertion=insertion
        ) as training:
            for f, r in (schedule[i] for i in range(len(schedule))):
                training.step(cache.batch(f), cache.batch([len(forget) + i for i in r]))


@pytest.mark.parametrize(
    "insertion, architecture",
    [("independent", architecture) for architecture in ARCHITECTURES]
    + [
        pytest.param("cumulative", architecture, marks=() if architecture in ("llama", "gpt2") else pytest.mark.slow)
        for architecture in ARCHITECTURES
    ],
)
def test_same_trained_weights(architecture, insertion, tmp_path):
    # at least 6 tokens: transformers' eager fp64 mask makes NaN of a padded place whose whole window is padding
    forget, retain = random_samples(10, seed=1, low=6), random_samples(12, seed=2, low=6)
    schedules = [Schedule(len(forget), len(retain), 5, 4, epochs=5, seed=s) for s in range(3)]
    assert sum(map(len, schedules)) == 30
    original = tiny_model(architecture)
    unlearned = moved(original)
    truth_original, truth = copy.deepcopy(original), copy.deepcopy(unlearned)
    layers_path = Decoder(original).layer_path(0).rpartition(".")[0]
    for block, schedule in zip(BLOCKS, schedules):
        batches = [
            ([forget[i] for i in f], [retain[i] for i in r]) for f, r in (schedule[k] for k in range(len(schedule)))
        ]
        reference_block(truth_original, truth, layers_path, block, batches, LR, RETAIN_COEFF, insertion)

    before = {n: p.clone() for n, p in original.named_parameters()}
    start = {n: p.clone() for n, p in unlearned.named_parameters()}
    run_fast(original, unlearned, schedules, forget, retain, "file", tmp_path, insertion)

    trained = 0
    for (name, ours), theirs in zip(unlearned.named_parameters(), truth.parameters()):
        counts = ~invariant(architecture, name, ours.shape)
        difference = (ours - theirs)[counts].norm() / theirs[counts].norm()
        assert difference <= 1e-9, (name, float(difference))
        trained += int(not torch.equal(ours, start[name]))
    assert trained > 20  # the test would be empty if nothing had trained
    if insertion == "independent":
        for name, parameter in original.named_parameters():
            assert torch.equal(parameter, before[name]), name
    else:
        for (name, ours), theirs in zip(original.named_parameters(), truth_original.parameters()):
            counts = ~invariant(architecture, name, ours.shape)
            assert (ours - theirs)[counts].norm() <= 1e-9 * theirs[counts].norm(), name
