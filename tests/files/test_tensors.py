"""Snapshots of a model's weights: bit for bit, whole or absent, and errors that name the file."""

import os
import stat

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_text import tokenizer

from kunbr_fast.files.models import load_model
from kunbr_fast.files.saving import save_model
from kunbr_fast.files.tensors import WeightSnapshot, load_tensors


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_snapshot_round_trip_is_exact(dtype, architecture, tmp_path):
    model = tiny_model(architecture, dtype)
    before, places = weights(model), [p.data_ptr() for p in model.parameters()]
    snapshot = WeightSnapshot.save(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for _ in range(2):
        snapshot.restore(model)
        assert equal(weights(model), before)
        with torch.no_grad():
            next(model.parameters()).zero_()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert set(snapshot) == set(before) == set(load_file(tmp_path / "w.safetensors"))
    for name, value in before.items():
        assert name in snapshot and torch.equal(snapshot[name], value)
    assert "nothing" not in snapshot


def test_special_values_and_views_survive(tmp_path):
    model = tiny_model(dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
        flat = torch.cat([p.flatten() for p in model.model.layers[1].parameters()])  # views of one vector
        start = 0
        for parameter in model.model.layers[1].parameters():
            parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        model.lm_head.weight.data = model.lm_head.weight.t().contiguous().t()  # not contiguous
    bits = {name: p.detach().clone().contiguous().view(torch.int32) for name, p in model.named_parameters()}
    snapshot = WeightSnapshot.save(model, tmp_path / "w.safetensors")
    for name in bits:
        assert torch.equal(snapshot[name].view(torch.int32), bits[name]), name


def test_snapshot_refusals(tmp_path):
    with pytest.raises(ValueError, match="none.safetensors: no such weights file"):
        WeightSnapshot(tmp_path / "none.safetensors")
    model = tiny_model(dtype=torch.float32)
    before = weights(model)
    name = "model.layers.5.mlp.up_proj.weight"

    def attempt(tensors, message):
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=message):
            WeightSnapshot(tmp_path / "w.safetensors").restore(model)
        assert equal(weights(model), before), "refused half-way"

    other = {key: value + 1 for key, value in before.items()}
    attempt({k: v for k, v in other.items() if k != name}, f"{name} is in only one of the file and LlamaForCausalLM")
    attempt({**other, "extra": torch.zeros(1)}, "extra is in only one")
    attempt(
        {**other, name: other[name][:3].contiguous()},
        rf"{name} is torch.float32 \(3, 32\), the model's is .*\(48, 32\)",
    )
    attempt({**other, name: other[name].double()}, f"{name} is torch.float64 .* the model's is torch.float32")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    path = tmp_path / "w.safetensors"
    WeightSnapshot.save(model, path)
    before = path.read_bytes()

    def full(file, tensor):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kunbr_fast.files.tensors.write_tensor", full)
    with pytest.raises(OSError, match="w.safetensors: No space left"):
        WeightSnapshot.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_disk_that_refuses_is_an_os_error_whichever_library_writes(tmp_path):
    model = tiny_model(dtype=torch.float32)
    with refused("could not write .*w.safetensors: File too large; the file before it"):
        WeightSnapshot.save(model, tmp_path / "w.safetensors")
    with refused("could not write the model to .*out: File too large"):
        save_model(model, None, tmp_path / "out")
    small = tiny_model(dtype=torch.float32, num_hidden_layers=1, hidden_size=4, intermediate_size=4)
    small.lm_head = torch.nn.Identity()
    with refused("could not write the model to .*out: File too large"):
        save_model(small, tokenizer(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_a_saved_model_has_the_permissions_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        save_model(tiny_model(dtype=torch.float32), tokenizer(), tmp_path / "out")
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.keys()
    assert found == dict.fromkeys(found, 0o666 & ~mask)


@pytest.mark.parametrize("length", [0, 5, 500, -1])
def test_a_file_that_was_cut_short_is_named(length, tmp_path):
    model = tiny_model(dtype=torch.float32)
    save_model(model, None, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file"):
        WeightSnapshot(path).restore(model)
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file"):
        load_tensors(path)
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file"):
        load_model(tmp_path)
