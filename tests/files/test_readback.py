"""What is written is read back before anything is replaced or removed."""

import json
import shutil

import pytest
import tiny_text
import torch
from fuzz import one_line
from safetensors.torch import load_file, save_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.files import merge, readback, saving
from kunbr_fast.files.models import load_model
from kunbr_fast.files.readback import NotWritten
from kunbr_fast.files.saving import save_model
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.run.folder import NAME


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("readback"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flipped(path, name="model.safetensors"):
    """A disk that changes a bit of a file between writing and reading."""
    if path.name == name:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)


def changed(name, change):
    """A disk, or a library, that changes a JSON file."""

    def forget(path):
        if path.name == name:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return forget


def reshaped(path):
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name].clone().half()}, path)


def lacking(path):
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({name: tensors[name] for name in list(tensors)[1:]}, path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (flipped, "model.safetensors: .* is not what is in memory"),
        (reshaped, "model.safetensors: .* is not what is in memory"),
        (lacking, "has no weights for"),
        (lambda path: path.name == "model.safetensors" and path.unlink(), "no weights"),
        (changed("config.json", lambda values: values | {"rms_norm_eps": 0.1}), "another rms_norm_eps"),
        (lambda path: flipped(path, "tokenizer.json"), "tokenizer.json: it is not .*copied from"),
    ],
)
def test_what_is_read_back_otherwise_replaces_nothing(fault, message, workspace, tmp_path, monkeypatch):
    out = shutil.copytree(workspace / "model", tmp_path / "out")
    before, model = contents(out), load_model(workspace / "model")
    with monkeypatch.context() as patch:
        patch.setattr(readback, "forget", fault)
        with pytest.raises(NotWritten, match=message) as caught:
            save_model(model, None, out, replace=True)
    one_line(caught.value, out)
    assert contents(out) == before and ".saving" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_model_of_no_folder_is_read_back_too(kind, tmp_path, monkeypatch):
    model = tiny_model(kind, torch.float32)
    save_model(model, None, tmp_path / "right")
    real = type(model).save_pretrained

    def other(self, folder, **settings):
        with torch.no_grad():
            next(self.parameters())[0, 0] += 1
            real(self, folder, **settings)
            next(self.parameters())[0, 0] -= 1

    monkeypatch.setattr(type(model), "save_pretrained", other)
    with pytest.raises(NotWritten, match="is not what is in memory"):
        save_model(model, None, tmp_path / "wrong")
    assert list((tmp_path / "wrong").iterdir()) == []


def test_a_library_that_writes_no_model_is_found_out(tmp_path, monkeypatch):
    """As save_pretrained did of a model with an adapter on top (peft#1381)."""
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(NotWritten, match="no config.json"):
        save_model(model, None, tmp_path / "out")


def test_a_streamed_model_is_read_back(workspace, tmp_path, monkeypatch):
    decoder = Decoder(open_streamed(workspace / "model"))
    monkeypatch.setattr(readback, "forget", flipped)
    with pytest.raises(NotWritten, match="out/model.safetensors: .* is not what is in memory"):
        decoder.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_keeps_its_checkpoints_and_writes_again(workspace, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    quick = "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --no-rtt --target letter --quiet".split()
    arguments = ["unlearn", *tiny_text.inputs(workspace), "--out", str(out), *quick]
    with monkeypatch.context() as patch:
        patch.setattr(readback, "forget", flipped)
        assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "out/model.safetensors" in said and "--resume" in said and "\n" not in said
    assert (out / NAME).is_dir() and not (out / "config.json").exists()
    with monkeypatch.context() as patch:  # what is in the folder's place differs: found by its logits
        real = saving.check_model

        def other(model, directory):
            real(model, directory)
            changed("config.json", lambda values: values | {"rms_norm_eps": 0.5})(directory / "config.json")

        patch.setattr(saving, "check_model", other)
        patch.setattr(saving, "check_copies", lambda *args: None)
        assert cli.main([*arguments, "--resume"]) == 2
    said = capsys.readouterr().err.strip()
    assert "logits differ" in said and "--resume" in said and "\n" not in said and (out / NAME).is_dir()
    assert cli.main([*arguments, "--resume"]) == 0
    assert not (out / NAME).exists() and load_model(out).config.rms_norm_eps < 0.1


def test_only_a_model_that_the_run_wrote_is_read_back(tmp_path):
    """Another one that is in the folder of its checkpoints is the user's."""
    sets = random_samples(4), random_samples(4, seed=1)
    config = kf.KUnBRConfig(num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1)
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path)
    before, lines = contents(tmp_path), []
    how = dict(output_dir=tmp_path, progress=False, on_stage=lines.append, before_cleanup=lambda report: None)
    kf.unlearn(tiny_model("llama"), *sets, config, **how)
    assert contents(tmp_path) == before and not any("read back" in line for line in lines)
    model = tiny_model("llama", torch.float32)
    how["before_cleanup"] = lambda report: save_model(model, None, tmp_path, replace=True)
    kf.unlearn(model, *sets, config, **how)
    assert any(line.startswith("read back: ") and line.endswith("0.0e+00 relative") for line in lines)


def test_a_merge_is_read_back(workspace, tmp_path, monkeypatch):
    """Its state stays, and --resume writes the file again."""
    base, tuned, out = workspace / "model", tmp_path / "tuned", tmp_path / "out"
    tiny_text.model(seed=1).save_pretrained(tuned)
    (tmp_path / "base").mkdir()
    base = shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
    (base / "tokenizer.model.v3").write_bytes(b"x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (base / "all_results.json").write_text("{}")
    for name in ("model.safetensors", "tokenizer.json"):
        with monkeypatch.context() as patch:
            patch.setattr(merge, "forget", lambda path, name=name: flipped(path, name))
            with pytest.raises(ValueError, match=f"out/{name}: .*it is not"):
                kf.merge_models(base, [tuned], out, mode="add", resume=out.exists())
        assert (out / "merge.partial.json").exists() and not (out / "merge.json").exists()
        if name == "tokenizer.json":
            (out / name).unlink()
    kf.merge_models(base, [tuned], out, mode="add", resume=True)
    there = contents(out).keys() - {"merge.json", ".kunbr-fast.lock"}
    assert there == contents(base).keys() - {"all_results.json"}
    kf.merge_models(base, [tuned], tmp_path / "again", mode="add")
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
