"""A streamed model whose files change while it is in use: an error that names the file, never other weights."""

import dataclasses
import os
import shutil

import pytest
import torch
from tiny_models import random_samples, tiny_model

from kunbr_fast.data import pack
from kunbr_fast.files.headers import Header
from kunbr_fast.model import layer_files
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed

BATCH = pack(random_samples(3, seed=1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two models of one architecture: the same files, of the same sizes."""
    paths = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for seed, path in enumerate(paths):
        tiny_model("llama", torch.float32, seed).save_pretrained(path, max_shard_size="70KB")
    return paths


def written(path, other):
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x00\x3f")


def replaced(path, other):
    """By another file of the same size, and time."""
    times, copy = path.stat(), shutil.copy(other, f"{path}.new")
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(copy, path)


def copied_over(path, other):
    shutil.copyfile(other, path)


def cut_short(path, other):
    os.truncate(path, path.stat().st_size // 2)


def grown(path, other):
    with open(path, "ab") as file:
        file.write(b"more")


def removed(path, other):
    path.unlink()


CHANGED = "changed while it was in use"
CASES = {
    written: f"{CHANGED} .it has been written to.",
    replaced: f"{CHANGED} .it has been written to.",
    copied_over: f"{CHANGED} .it has been written to.",
    cut_short: rf"{CHANGED} .\d+ bytes, \d+ before.",
    grown: rf"{CHANGED} .\d+ bytes, \d+ before.",
    removed: "no such file",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_each_way_to_change_a_file(change, saved, tmp_path):
    folder, kept = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(saved[0], folder)
    decoder = Decoder(open_streamed(folder))
    with torch.no_grad():
        truth = decoder.logits(BATCH)
    name = next(name for name in decoder.weights if "layers.3.mlp.up_proj" in name)
    file = decoder.weights.shards.files[name]
    shutil.copy2(file, kept)
    change(file, saved[1] / file.name)
    decoder.weights.release()
    message = rf"{file.name}: {CASES[change]}[^\n]*$"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        decoder.logits(BATCH)
    with pytest.raises(ValueError, match=message):  # as a mapping
        decoder.weights[name]
    with pytest.raises(ValueError, match=message):  # what is copied to another model's files
        decoder.save(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    os.replace(kept, file)  # it is another file by now: opened anew
    with torch.no_grad():
        assert torch.equal(Decoder(open_streamed(folder)).logits(BATCH), truth)


def test_the_file_itself_put_back(saved, tmp_path):
    """Renamed away and back, with a second name and other permissions: the same file."""
    folder = tmp_path / "model"
    shutil.copytree(saved[0], folder)
    decoder = Decoder(open_streamed(folder))
    with torch.no_grad():
        truth = decoder.logits(BATCH)
        file = decoder.weights.shards.paths[1]
        os.rename(file, tmp_path / "away")
        decoder.weights.release()
        with pytest.raises(ValueError, match=f"{file.name}: no such file"):
            decoder.logits(BATCH)
        os.rename(tmp_path / "away", file)
        decoder.weights.release()
        os.link(file, tmp_path / "link")
        os.chmod(file, 0o400)
        assert torch.equal(decoder.logits(BATCH), truth)


def test_a_change_while_a_layer_is_read(saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(saved[0], folder)
    decoder = Decoder(open_streamed(folder))
    real, changed = layer_files.read_tensor, []

    def reads(file, found, out):
        real(file, found, out)
        if not changed:
            changed.append(found.file)
            written(found.file, None)
        return out

    monkeypatch.setattr(layer_files, "read_tensor", reads)
    decoder.weights.release()
    with pytest.raises(ValueError, match=f"{CHANGED} .it has been written to") as raised, torch.no_grad():
        decoder.logits(BATCH)
    assert str(changed[0]) in str(raised.value)


def test_another_number_of_the_same_inode(saved):
    """As network drives give it; another file has another ctime too."""
    header = Header.read(next(saved[0].glob("*.safetensors")))
    moved = header.mark._replace(place=(0, 0))
    dataclasses.replace(header, mark=moved).open().close()
    with pytest.raises(ValueError, match=CHANGED):
        dataclasses.replace(header, mark=moved._replace(changed=1)).open()
