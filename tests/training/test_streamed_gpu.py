"""A streamed model on a GPU: streams, pinned buffers and threads give the bits of the model in memory."""

import pytest
import torch
from tiny_models import plain_llama, random_samples

from kunbr_fast.data import pack
from kunbr_fast.files.models import load_model
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.training.fine_tune import full_training
from kunbr_fast.training.updates import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FORGET, RETAIN = random_samples(6, seed=1), random_samples(7, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = plain_llama(400, 10, 0, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    model.save_pretrained(path, max_shard_size="8MB")
    return path


def trained(decoder, optimizer, micro, **how):
    with frozen(decoder.model), fused(decoder.model, "auto"):
        training = full_training(decoder, lr=1e-3, optimizer=optimizer, micro_batch_tokens=micro, **how)
        losses = [training.step(FORGET, RETAIN)["loss"] for _ in range(4)]
        training.check()
        state = {name: value.detach().cpu().clone() for name, value in training.state().items()}
    with torch.no_grad():
        return losses, state, decoder.logits(pack(FORGET).to("cuda")).cpu()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("optimizer, micro", [("lion", None), ("adamw", 40)])
def test_the_bits_of_the_model_in_memory(optimizer, micro, dtype, folder, tmp_path):
    truth = trained(Decoder(load_model(folder, dtype, "cuda")), optimizer, micro)
    again = trained(Decoder(load_model(folder, dtype, "cuda")), optimizer, micro)
    assert truth[0] == again[0]  # else there is nothing to compare with
    size = sum(value.nbytes for value in truth[1].values())
    for budget, resident, buffers in ((0, 0, 2), (size // 3, 0, 3), (2 * size, 3, 2), (2 * size, 0, 4)):
        model = open_streamed(folder, "cuda", dtype, host_bytes=budget, resident_layers=resident, buffers=buffers)
        decoder = Decoder(model)
        with decoder.weights.writable(tmp_path):
            losses, state, logits = trained(decoder, optimizer, micro)
        assert losses == truth[0] and state.keys() == truth[1].keys()
        for name, value in truth[1].items():
            assert torch.equal(state[name], value), (name, budget, resident, buffers)
        assert torch.equal(logits, truth[2])


@pytest.mark.parametrize("master", ["fp32", "stochastic"])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_masters_and_rounding(optimizer, master, folder, tmp_path, monkeypatch):
    """After a checkpoint too; an update waits for no number from the device."""
    update = Updates.step

    def unwaiting(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def steps(decoder, state, done, count):
        with frozen(decoder.model), fused(decoder.model, "auto"):
            training = full_training(decoder, lr=1e-5, optimizer=optimizer, master_weights=master, rounding_seed=3)
            if state is not None:
                training.load_state(state, done)
                monkeypatch.setattr(Updates, "step", unwaiting)  # from here on: kernels are compiled
            for _ in range(count):
                training.step(FORGET, RETAIN)
            training.check()
            return {name: value.detach().cpu().clone() for name, value in training.state().items()}

    memory = Decoder(load_model(folder, "bfloat16", "cuda"))
    two, four = steps(memory, None, 0, 2), steps(Decoder(load_model(folder, "bfloat16", "cuda")), None, 0, 4)
    taken_up = steps(memory, two, 2, 2)
    decoder = Decoder(open_streamed(folder, "cuda", "bfloat16", resident_layers=3))
    with decoder.weights.writable(tmp_path) as reset:
        mine = steps(decoder, None, 0, 2)
        reset()
        ours = steps(decoder, two, 2, 2)
    for truth, found in ((two, mine), (four, taken_up), (four, ours)):
        assert truth.keys() == found.keys()
        for name, value in truth.items():
            assert torch.equal(found[name], value), name


def test_what_is_on_the_device(folder, tmp_path):
    """Buffers, one layer's gradient, what is outside of the layers: not the model."""
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    (x @ x).sum().backward()  # cuBLAS' workspaces, one for each thread
    others = torch.cuda.memory_allocated()
    decoder = Decoder(open_streamed(folder, "cuda", "float32", host_bytes=1 << 30))
    layers = sum(p.numel() * 4 for p in decoder.layers.parameters())
    with decoder.weights.writable(tmp_path), frozen(decoder.model):
        training = full_training(decoder, lr=1e-3, optimizer="adamw")
        training.step(FORGET, RETAIN)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training.step(FORGET, RETAIN)
        peak = torch.cuda.max_memory_allocated()
    assert before - others < layers and peak - before < layers // 2
