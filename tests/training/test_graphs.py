import contextlib
import copy
import types

import pytest
import torch
from graph_emulator import capture, waits
from helpers import rarely
from tiny_models import ARCHITECTURES, random_samples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from kunbr_fast.data import pack
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.dispatch import Unavailable
from kunbr_fast.kernels.optimizers import reference
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives import losses
from kunbr_fast.training.graphs import MAX_GRAPHS, Bucket, StepGraphs, capture_cuda, round_up
from kunbr_fast.training.reinserted import reinserted


class Harness:
    """A block in training, and its step as a function of a batch and its rows' weights."""

    def __init__(self, training, capture=capture):
        self.training, decoder = training, training.decoder

        def forward(batch, rows):
            hidden = batch.hidden
            if hidden is None:
                with torch.no_grad():
                    hidden = decoder.run(batch, stop=training.block.start)
            out = decoder.run(batch, Stretch(training.block.start, hidden), rows=True)
            return losses.linear_loss(decoder.final(out), decoder.head, batch.targets, rows.weight, rows.cap)

        self.forward, self.graphs = forward, StepGraphs(decoder, forward, training.flat.grad, capture)

    def plain(self, batch, rows):
        """loss, nll, gradient of the batch as it is."""
        loss, nll = self.forward(batch, rows)
        loss.backward()
        return loss.detach(), nll, self.gradient()

    def bucketed(self, batch, rows):
        loss, nll = self.graphs(batch, rows)
        return loss.clone(), nll.clone(), self.gradient()

    def gradient(self):
        gradient = self.training.flat.grad.clone()
        self.training.flat.grad.zero_()
        return gradient


def make(architecture="llama", block=range(2, 4), **changes):
    model = tiny_model(architecture, **changes)
    return Decoder(model), copy.deepcopy(model)


def batches(samples, count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(len(samples), generator=generator)[:size].tolist() for _ in range(count)]


@pytest.mark.parametrize("architecture", rarely(ARCHITECTURES, ["llama", "gemma2", "gpt2", "gpt_neox"]))
def test_a_replayed_step_is_the_step(architecture):
    decoder, unlearned = make(architecture)
    samples = random_samples(12, low=5, high=20)
    cache = PrefixCache(decoder, samples)
    cache.advance(2)
    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        harness = Harness(training)
        eager = Harness(training, None)
        # softcapped attention takes its softmax in fp32, over a grid of another width
        close = dict(rtol=1e-4, atol=1e-7) if architecture == "gemma2" else dict(rtol=1e-11, atol=1e-13)
        for indices in batches(samples, 6):
            batch = cache.batch(indices)
            rows = losses.gradient_difference(batch, 2, 1.3)
            truth, found, anew = harness.plain(batch, rows), harness.bucketed(batch, rows), eager.bucketed(batch, rows)
            assert float(truth[2].norm()) > 0
            for expected, got, fallback in zip(truth, found, anew, strict=True):
                torch.testing.assert_close(got, expected, **close)
                assert torch.equal(got, fallback)  # the fallback gives the graph's bits
        assert 1 <= harness.graphs.captured < 6 and eager.graphs.captured == 0


@pytest.mark.parametrize("rows_only", (True, False))
def test_without_a_cache_with_a_cap_and_few_labels(rows_only):
    decoder, unlearned = make()
    samples = random_samples(10, low=5, high=20)
    for sample in samples:
        if rows_only:
            sample["labels"][:-1] = -100
    with reinserted(decoder, unlearned, range(1, 3), 1e-4) as training:
        harness = Harness(training)
        for indices in batches(samples, 4):
            batch = pack([samples[i] for i in indices])
            rows = losses.gradient_difference(batch, 2, 0.7, forget_loss_cap=4.5)
            truth, found = harness.plain(batch, rows), harness.bucketed(batch, rows)
            for expected, got in zip(truth, found, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
        assert 1 <= harness.graphs.captured < 4


def test_training_with_graphs_is_training():
    decoder, unlearned = make()
    samples = random_samples(12, low=5, high=20)
    trained = []
    for graphs in (False, True):
        weights = copy.deepcopy(unlearned)
        with reinserted(decoder, weights, range(2, 4), 1e-3) as training:
            harness = Harness(training)
            for indices in batches(samples, 8):
                batch = pack([samples[i] for i in indices])
                rows = losses.gradient_difference(batch, 2, 1.0)
                if graphs:
                    harness.graphs(batch, rows)
                else:
                    loss, _ = harness.forward(batch, rows)
                    loss.backward()
                training.flat.step(training.optimizer)
        trained.append(weights)
    before = dict(unlearned.named_parameters())
    moved = 0
    for (name, a), b in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)
        moved += int(not torch.equal(a, before[name]))
    assert moved > 0


@pytest.mark.parametrize("micro_batches", (0, 2))
def test_a_capture_that_fails_is_an_error(micro_batches):
    """And leaves the gradient of earlier micro-batches as it was."""
    decoder, unlearned = make()
    batch = pack(random_samples(4, low=5, high=20))
    rows = losses.gradient_difference(batch, 2, 1.0)

    def refuses(function, pool):
        function()  # leaves gradients behind, as the run before a capture does
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        harness = Harness(training, refuses)
        for _ in range(micro_batches):
            harness.forward(batch, rows)[0].backward()
        before = training.flat.grad.clone()
        assert bool(before.any()) == (micro_batches > 0)
        with pytest.raises(Unavailable, match="cuda_graphs=True.*not permitted when stream.*Leave cuda_graphs out"):
            harness.graphs(batch, rows)
        assert torch.equal(training.flat.grad, before) and harness.graphs.captured == 0


def test_a_capture_keeps_the_gradient_of_earlier_micro_batches():
    decoder, unlearned = make()
    batch = pack(random_samples(4, low=5, high=20))
    rows = losses.gradient_difference(batch, 2, 1.0)
    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        harness = Harness(training)
        once = harness.bucketed(batch, rows)[2]
        harness.graphs.drop()
        training.flat.grad.copy_(once)  # an earlier micro-batch's
        assert torch.equal(harness.bucketed(batch, rows)[2], 2 * once) and float(once.norm()) > 0


@pytest.mark.parametrize("capture", (capture, None))
def test_a_step_in_graphs_takes_the_kernels_of_graphs(capture):
    """Launch by launch too, since its bits are to be the graph's."""
    decoder, unlearned = make()
    batch = pack(random_samples(4, low=5, high=20))
    rows, seen = losses.gradient_difference(batch, 2, 1.0), []
    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        harness = Harness(training, capture)

        def forward(batch, rows):
            seen.append(dispatch._in_graphs > 0)
            return harness.forward(batch, rows)

        StepGraphs(decoder, forward, training.flat.grad, capture)(batch, rows)
    assert seen == [True] * (2 if capture else 1) and not dispatch._in_graphs


def test_out_of_memory_in_a_capture_is_told_apart():
    decoder, unlearned = make()
    batch = pack(random_samples(4, low=5, high=20))

    def no_room(function, pool):
        raise torch.OutOfMemoryError("out of memory")

    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        with pytest.raises(torch.OutOfMemoryError):
            Harness(training, no_room).graphs(batch, losses.gradient_difference(batch, 2, 1.0))


class Cuda:
    """torch.cuda and its allocator, as far as a capture asks them. ends: whether the driver can end a capture."""

    def __init__(self, monkeypatch, ends):
        self.ends, self.open, self.users, self.given_back = ends, [], 0, []
        here = types.SimpleNamespace(wait_stream=lambda stream: None)
        replaced = dict(Stream=lambda: here, stream=lambda stream: contextlib.nullcontext(), CUDAGraph=object)
        replaced |= dict(current_stream=lambda: here, current_device=lambda: 3, graph=self.graph)
        replaced |= dict(set_stream=self.given_back.append)
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        self.here = here

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.open.append(pool)
        self.users += 1
        try:
            yield
        finally:
            if not self.ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.open.remove(pool)

    def end(self, device, pool):
        if device != 3 or pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    def release(self, device, pool):
        assert device == 3
        self.users -= 1


@pytest.mark.parametrize("ends", (True, False))
def test_a_failed_capture_leaves_nothing_open(monkeypatch, ends):
    cuda, runs, failed = Cuda(monkeypatch, ends), [], []
    monkeypatch.setattr("kunbr_fast.training.graphs._failed", failed)

    def waits_for_the_device():
        runs.append(list(cuda.open))
        if cuda.open:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted" if ends else "previous error"):
        capture_cuda(waits_for_the_device, "pool")
    assert runs == [[], ["pool"]] and cuda.open == [] and cuda.given_back == [cuda.here]
    # a capture that was ended: the graph itself gives the pool back when it goes
    assert cuda.users == (1 if ends else 0) and len(failed) == (0 if ends else 1)


def test_experts_that_wait_for_the_device_are_refused():
    decoder, unlearned = make("mixtral", range(0, 1))
    batch = pack(random_samples(4, low=5, high=20))
    rows = losses.gradient_difference(batch, 2, 1.0)
    with reinserted(decoder, unlearned, range(0, 1), 1e-4) as training:
        with pytest.raises(Unavailable, match="waits for the device"):
            Harness(training).graphs(batch, rows)


def test_the_emulator_sees_what_a_graph_cannot_hold():
    x = torch.ones(3)

    def branches():
        return (x * float(x.sum()),)

    with pytest.raises(RuntimeError, match="waits for the device"):
        capture(branches)
    taken = []

    def remembers():  # Python state is not replayed
        taken.append(1)
        return (x * len(taken),)

    replay, (out,) = capture(remembers)
    x.fill_(5.0)
    replay()
    assert torch.equal(out, torch.full((3,), 10.0))


INDICES = "cu_seqlens rows targets row_sample rows_per_sample pad_index unpad_index row_grid row_counts".split()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_step_waits_for_its_result_alone(architecture, monkeypatch):
    """Index tensors are the host's own work; of what runs on the device the host reads the metrics, and whether all
    is finite."""
    decoder, unlearned = make(architecture)
    batch = pack(random_samples(6, low=5, high=20))
    for name in INDICES:
        getattr(batch, name)
    seen = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if waits(func, args):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(reference, "sum_is_finite", lambda tensor: False)  # of tensors on the host alone
    with reinserted(decoder, unlearned, range(2, 4), 1e-4) as training:
        training.step_packed(training.criterion.step_batch(batch, 3))
        with Waits():  # also for what the update before has stored
            training.step_packed(training.criterion.step_batch(batch, 3))
    assert seen == ["aten._local_scalar_dense.default"]  # `finite`; the metrics' tolist() is no operator


def test_reinserted_steps_through_graphs(monkeypatch):
    """`cuda_graphs=True`, with the emulator for a GPU: the weights are those of plain steps."""
    samples = random_samples(12, low=5, high=20)
    orders, trained = batches(samples, 6), []
    for graphs in (False, True):
        decoder, unlearned = make()
        with reinserted(decoder, unlearned, range(2, 4), 1e-3, forget_loss_cap=5.0) as training:
            if graphs:
                training.use_graphs(capture)
            found = [training.step([samples[i] for i in o[:2]], [samples[i] for i in o[2:]]) for o in orders]
            assert not graphs or 1 <= training.graphs.captured < 6
        trained.append((unlearned, found))
    for a, b in zip(trained[0][1], trained[1][1], strict=True):
        assert b == pytest.approx(a, rel=1e-9)
    start = dict(make()[1].named_parameters())
    for (name, a), b in zip(trained[0][0].named_parameters(), trained[1][0].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(a, start[name]) == (not name.startswith(("model.layers.2.", "model.layers.3."))), name


def test_cuda_graphs_on_a_cpu_are_refused():
    decoder, unlearned = make()
    with pytest.raises(Unavailable, match="not on a CUDA device"):
        with reinserted(decoder, unlearned, range(2, 4), 1e-3, cuda_graphs=True):
            pass


def test_buckets():
    assert [round_up(n) for n in (1, 16, 17, 127, 128, 129, 834, 1025)] == [16, 16, 32, 128, 128, 144, 896, 1152]
    for n in range(1, 5000):
        assert n <= round_up(n) < n + max(16, n / 8 + 1)
    batch = pack(random_samples(4, low=5, high=20))
    rows = losses.gradient_difference(batch, 2, 1.0)
    bucket = Bucket.of(batch, rows, None)
    assert bucket.longest == 64 and Bucket.of(batch, rows, 40).longest == 40
    assert bucket.takes(bucket, batch, len(rows.weight)) or bucket.tokens - batch.num_tokens > bucket.tokens / 8


def test_no_more_graphs_than_the_limit():
    decoder, unlearned = make()
    held = []
    with reinserted(decoder, unlearned, range(4, 6), 1e-4) as training:
        harness = Harness(training)
        for count in range(1, MAX_GRAPHS + 4):  # each number of samples is a bucket of its own
            batch = pack(random_samples(count, low=3, high=6))
            harness.bucketed(batch, losses.gradient_difference(batch, 1, 1.0))
            held.append(harness.graphs.captured)
    assert held[:MAX_GRAPHS] == list(range(1, MAX_GRAPHS + 1)) and set(held[MAX_GRAPHS:]) == {MAX_GRAPHS}
