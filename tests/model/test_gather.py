"""Gathers of packed tokens: their gradients are those of torch's own, and nothing is added up for them."""

import copy

import pytest
import torch
from tiny_models import random_samples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from kunbr_fast.data import pack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.gather import take, to_places
from kunbr_fast.objectives import losses
from kunbr_fast.training.graphs import Bucket, StaticBatch, unused
from kunbr_fast.training.reinserted import reinserted

ADDING = ("index_add", "index_put", "scatter_add", "_index_put_impl")  # by atomics, or after a sort


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::").rstrip("_"))
        return func(*args, **(kwargs or {}))


def gradients(function, *xs):
    outs = function(*(x.requires_grad_() for x in xs))
    return [out.detach() for out in outs], lambda ds: torch.autograd.grad(outs, xs, ds)


def test_to_places_is_index_select():
    batch = pack(random_samples(5, low=2, high=9))
    index, back, T = batch.pad_index, batch.unpad_index, batch.num_tokens
    xs = [torch.randn(T, heads, 3, dtype=torch.float64) for heads in (4, 2, 2)]
    ours, to_ours = gradients(lambda *xs: to_places(*((x, index, back) for x in xs)), *xs)
    truth, to_truth = gradients(lambda *xs: [x.index_select(0, index) for x in xs], *xs)
    real = torch.zeros(len(index), 1, 1, dtype=torch.bool)
    real[back] = True
    assert not bool(real.all())
    ds = [torch.randn_like(out) * real for out in ours]  # padding has a gradient of 0
    with Operators() as seen:
        found = to_ours(ds)
    assert not set(seen.names) & set(ADDING) and "index_select" in seen.names
    for a, b in zip([*ours, *found], [*truth, *to_truth(ds)], strict=True):
        assert torch.equal(a, b)


def test_some_without_an_index_and_some_without_a_gradient():
    x, y, z = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, 3), torch.randn(4, 1, 3, requires_grad=True)
    index, back = torch.tensor([0, 1, 2, 3, 3, 3]), torch.arange(4)
    found = to_places((x, None, None), (y, index, back), (z, index, back))
    assert found[0] is x and torch.equal(found[1], y[index]) and torch.equal(found[2], z[index])
    assert torch.autograd.grad(found[1].sum(), z, retain_graph=True, allow_unused=True) == (None,)
    (dz,) = torch.autograd.grad(found[2][:4].sum(), z)
    assert torch.equal(dz, torch.ones_like(z))


@pytest.mark.parametrize("dim", (0, 1))
def test_take_is_index_select(dim):
    x = torch.randn(7, 7, 3)
    index = torch.tensor([5, 0, 3])
    ours, to_ours = gradients(lambda x: [take(x, index, dim)], x)
    truth, to_truth = gradients(lambda x: [x.index_select(dim, index)], x)
    ds = [torch.randn_like(ours[0]).transpose(0, 2).contiguous().transpose(0, 2)]
    with Operators() as seen:
        found = to_ours(ds)
    assert not set(seen.names) & set(ADDING) and "index_copy" in seen.names
    assert torch.equal(ours[0], truth[0]) and torch.equal(found[0], to_truth(ds)[0]) and float(found[0].norm()) > 0


@pytest.mark.parametrize("few_labels", (False, True))
@pytest.mark.parametrize("architecture", ("llama", "phi3", "gemma2", "gpt2"))
def test_a_step_adds_nothing_up_for_its_gathers(architecture, few_labels):
    model = tiny_model(architecture)
    decoder, unlearned = Decoder(model), copy.deepcopy(model)
    samples = random_samples(6, low=5, high=20)
    if few_labels:  # the last layer's queries are of labelled rows alone
        for sample in samples:
            sample["labels"][:-2] = -100
    batch = pack(samples)
    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        step = training.criterion.step_batch(batch, 3)
        with Operators() as seen:
            training.loss(step).backward()
        assert not set(seen.names) & set(ADDING) and {"index_copy", "index_select"} <= set(seen.names)
        assert float(training.flat.grad.norm()) > 0


def test_the_filling_of_a_bucket_has_places_of_its_own():
    generator, filled = torch.Generator().manual_seed(0), 0
    for count in (1, 2, 5, 17):
        for low, high in ((2, 4), (5, 70), (60, 65), (64, 65), (127, 129)):
            samples = random_samples(count, low=low, high=high, seed=int(torch.randint(99, (), generator=generator)))
            for sample in samples[1:]:
                sample["labels"][: len(sample["labels"]) // 2] = -100
            batch = pack(samples)
            rows = losses.gradient_difference(batch, 1, 1.0)
            for limit in (None, 129):
                static = StaticBatch(Bucket.of(batch, rows, limit), 8, torch.float32, torch.device("cpu"))
                static.fill(batch, rows)
                found, bucket = static.batch, static.bucket
                assert bucket.rows <= bucket.tokens <= bucket.samples * bucket.longest
                row_index, row_back, _ = found.row_grid
                for index, size in ((found.rows, bucket.tokens), (found.unpad_index, len(found.pad_index))):
                    assert len(index.unique()) == len(index) and int(index.max()) < size
                assert len(row_back.unique()) == len(row_back) and int(row_back.max()) < len(row_index)
                T, R = batch.num_tokens, len(batch.rows)
                assert torch.equal(found.pad_index[found.unpad_index[:T]], torch.arange(T))
                assert torch.equal(row_index[row_back[:R]], torch.arange(R))
                filled += bucket.tokens - T + bucket.rows - R
    assert filled > 100


def test_unused():
    assert unused(torch.tensor([3, 0, 5]), 7, 3).tolist() == [1, 2, 4]
