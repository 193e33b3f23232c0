"""What is written is read back before anything is replaced or removed."""

import json
import os
import re
import shutil
import types

import pytest
import tiny_text
import torch
from fuzz import one_line
from safetensors.torch import load_file, save_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.cli import unlearn as cli_unlearn
from kunbr_fast.files import merge, readback
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.readback import NotWritten
from kunbr_fast.files.saving import save_model
from kunbr_fast.model import weights
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.run import identity
from kunbr_fast.run.folder import NAME
from kunbr_fast.run.readback import ReadBack


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
    real = cli_unlearn.save_model
    for fault, message in FAULTS[::6]:  # in the folder's own place, after the save
        with monkeypatch.context() as patch:
            patch.setattr(cli_unlearn, "save_model", lambda *a, fault=fault, **k: (real(*a, **k), damage(out, fault)))
            assert cli.main([*arguments, "--resume"]) == 2, message
        said = capsys.readouterr().err.strip()
        assert re.search(message, said) and "--resume" in said and "\n" not in said and (out / NAME).is_dir(), message
    assert cli.main([*arguments, "--resume"]) == 0
    assert not (out / NAME).exists() and load_model(out).config.rms_norm_eps < 0.1
    report = json.loads((out / "report.json").read_text())
    (out / "model.safetensors").write_bytes(b"")
    report["result"]["files"]["model.safetensors"] = identity._file(out / "model.safetensors")
    (out / "report.json").write_text(json.dumps(report))
    assert cli.main([*arguments, "--resume"]) == 2
    said = capsys.readouterr().err.strip()
    assert "model.safetensors: not a whole safetensors file" in said and "\n" not in said


def damage(folder, fault):
    for path in sorted(folder.iterdir()):
        if path.exists():
            fault(path)


def one_value(path):
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        next(tensor for name, tensor in tensors.items() if "gate_proj" in name)[0, 0] += 0.001
        save_file(tensors, path)


def in_bfloat16(path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


def named(name, change):
    return lambda path: path.name == name and change(path)


FAULTS = [
    (changed("config.json", lambda values: values | {"rms_norm_eps": 1e-4}), "another rms_norm_eps"),
    (changed("config.json", lambda values: {}), "config.json: model_type"),
    (named("config.json", lambda path: path.unlink()), "no config.json"),
    (named("config.json", lambda path: os.truncate(path, 100)), "config.json"),
    (named("model.safetensors", lambda path: path.unlink()), "no weights"),
    (named("model.safetensors", lambda path: os.truncate(path, 0)), "not a whole safetensors file"),
    (named("model.safetensors", lambda path: os.truncate(path, 10**4)), "not a whole safetensors file"),
    (one_value, "is not what is in memory"),
    (in_bfloat16, "is not what is in memory"),
    (named("tokenizer.json", lambda path: path.unlink()), "no tokenizer"),
    (
        changed("tokenizer.json", lambda values: values | {"normalizer": {"type": "Lowercase"}}),
        "its tokenizer is another",
    ),
]


@pytest.fixture(scope="module")
def saved(workspace, tmp_path_factory):
    """(a folder that holds a model and its tokenizer, a `ReadBack` of them made before). written: by the run."""
    model, tokenizer = load_model(workspace / "model"), load_tokenizer(workspace / "model")
    decoder, samples = Decoder(model), types.SimpleNamespace(parts={"forget": random_samples(2)})

    def make(written, save=lambda model, out: save_model(model, None, out)):
        out = tmp_path_factory.mktemp("out")
        back = ReadBack(out, decoder, samples, written, tokenizer if written else None)
        save(model, out)
        return out, back

    return make


@pytest.mark.parametrize("written", [True, False])
def test_a_damaged_model_is_no_result(written, saved, caplog):
    for fault, message in FAULTS if written else FAULTS[:-2]:
        out, back = saved(written)
        damage(out, fault)
        if fault is in_bfloat16 and not written:  # another dtype may be the user's own wish: it is said
            assert back.check().startswith("read back: ")
            assert f"{out} is in BF16, the model in memory in F32" in caplog.text
            continue
        with pytest.raises(NotWritten, match=message) as caught:
            back.check()
        one_line(caught.value, out)


def test_a_model_that_is_not_there_is_no_result(saved, caplog):
    out, back = saved(True, lambda model, out: None)
    with pytest.raises(NotWritten, match="no config.json"):
        back.check()
    elsewhere = out / "final"
    out, back = saved(False, lambda model, out: model.save_pretrained(elsewhere))
    assert back.check() is None and caplog.messages == [f"not read back: no model was written to {out}"]
    out, back = saved(False, lambda model, out: model.save_pretrained(out, variant="mine"))
    assert back.check() is None and len(caplog.messages) == 2
    assert caplog.messages[1].startswith("not read back") and "model.mine.safetensors: a variant" in caplog.text


def test_a_fresh_reader_has_the_last_word(saved, monkeypatch):
    out, back = saved(True)
    damage(out, changed("config.json", lambda values: values | {"rms_norm_eps": 0.5}))
    monkeypatch.setattr(weights, "check_model", lambda *args: None)
    with pytest.raises(NotWritten, match="logits differ"):
        back.check()


def test_what_lies_in_the_folder_already_is_the_user_s(tmp_path, caplog):
    """What the user's code raises stays, too."""
    sets = random_samples(4), random_samples(4, seed=1)
    config = kf.KUnBRConfig(num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1)
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def save(report):
        raise UnicodeError("mine")

    how = dict(output_dir=tmp_path, progress=False, before_cleanup=save)
    with pytest.raises(UnicodeError, match="^mine$"):
        kf.unlearn(tiny_model("llama"), *sets, config, **how)
    how["before_cleanup"] = lambda report: None
    kf.unlearn(tiny_model("llama"), *sets, config, resume=True, **how)
    assert f"not read back: no model was written to {tmp_path}" in caplog.messages and contents(tmp_path) == before


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
        with monkeypatch.context() as patch:  # lost
            (out / name).unlink()
            patch.setattr(merge, "forget", lambda path, name=name: path.name == name and path.unlink())
            with pytest.raises(ValueError, match=f"out/{name}: .*such file.*resume .resume=True. writes it again"):
                kf.merge_models(base, [tuned], out, mode="add", resume=True)
    kf.merge_models(base, [tuned], out, mode="add", resume=True)
    there = contents(out).keys() - {"merge.json", ".kunbr-fast.lock"}
    assert there == contents(base).keys() - {"all_results.json"}
    kf.merge_models(base, [tuned], tmp_path / "again", mode="add")
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
