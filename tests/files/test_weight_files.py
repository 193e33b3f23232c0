"""What is written in the form of another model: its files, names, settings and tokenizer, byte for byte."""

import json
import shutil

import pytest
import tiny_text
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_models import tiny_model

from kunbr_fast.files import saving
from kunbr_fast.files.model_folder import side_files
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.saving import save_model, with_dtype
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.weight_files import New, write_like

OLD = {  # as transformers 4 wrote it
    "rope_theta": 500000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.45.1",
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
KEPT = {
    "tokenizer.model": b"sentencepiece",
    "special_tokens_map.json": b'{"eos_token":   "<eos>"}',
    "generation_config.json": b'{"max_new_tokens": 3 ,\n"transformers_version": "4.45.1"}',
    "modeling_tiny.py": b"raise RuntimeError\n",
    "qwen.tiktoken": b"YQ== 0\n",
    "preprocessor_config.json": b"{ }",
    "additional_chat_templates/tool.jinja": b"{{ messages }}",
}
LEFT = {
    "README.md": b"card", "trainer_state.json": b"{}", "all_results.json": b"{}", "optimizer.pt": b"x",
    "pytorch_model.bin.index.json": b"{}", "report.json": b"{}", "LICENSE.txt": b"x", ".hidden.json": b"{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama in several files, as the Hub has them."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_text.model().save_pretrained(folder, max_shard_size="60KB")
    tiny_text.tokenizer().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("dtype", "rope_parameters")}
    (folder / "config.json").write_text(json.dumps(values | OLD, indent=1))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, content in (KEPT | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nudged(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def test_a_model_that_was_trained_is_written_in_the_form_of_its_folder(source, tmp_path):
    model = nudged(load_model(source))
    save_model(model, load_tokenizer(source), tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    assert after.keys() == before.keys() - LEFT.keys() and KEPT.keys() <= after.keys()
    for name in after:
        assert (after[name] == before[name]) != name.endswith(".safetensors"), name
        if name.endswith(".safetensors"):  # the headers are the same
            size = int.from_bytes(before[name][:8], "little") + 8
            assert after[name][:size] == before[name][:size]
    back = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_of_a_changed_dtype_only_the_dtype_changes(source, tmp_path):
    model = load_model(source, "bfloat16")
    save_model(model, None, tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    assert after["config.json"] == before["config.json"].replace(b'"float32"', b'"bfloat16"')
    index, old = (json.loads(found["model.safetensors.index.json"]) for found in (after, before))
    assert index["weight_map"] == old["weight_map"] and index["metadata"] != old["metadata"]
    assert index["metadata"]["total_size"] == Shards(tmp_path / "out").nbytes == Shards(source).nbytes // 2
    for path in Shards(tmp_path / "out").paths:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert load_model(tmp_path / "out").dtype == torch.bfloat16
    for text in ('{"torch_dtype" : "torch.float16"}', '{"a": {"dtype":"auto"}}', '{"mamba_dtype": "float32"}'):
        assert with_dtype(text, "float16") == text.replace("torch.f", "f").replace("auto", "float16")


def test_what_was_changed_by_hand_is_written_anew_and_said(source, tmp_path, caplog):
    model, tokenizer = load_model(source), load_tokenizer(source)
    tokenizer.add_tokens(["<new>"])
    model.generation_config.max_new_tokens = 7
    save_model(model, tokenizer, tmp_path / "tokenizer")
    assert "the tokenizer is not" in caplog.text and "<new>" in load_tokenizer(tmp_path / "tokenizer").get_vocab()
    found = contents(tmp_path / "tokenizer")
    assert json.loads(found["generation_config.json"])["max_new_tokens"] == 7
    assert found["config.json"] == (source / "config.json").read_bytes() and "tokenizer.model" not in found
    caplog.clear()
    model.resize_token_embeddings(model.config.vocab_size + 5)
    save_model(model, tokenizer, tmp_path / "resized")
    assert "no longer that of" in caplog.text
    assert load_model(tmp_path / "resized").config.vocab_size == model.config.vocab_size
    model = load_model(source)
    model.config.rope_parameters["factor"] = 4.0
    caplog.clear()
    save_model(model, None, tmp_path / "rope")
    assert "another rope_parameters" in caplog.text
    assert load_model(tmp_path / "rope").config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_changed_setting_of_the_tokenizer_is_written(side, source, tmp_path, caplog):
    """Those too that transformers writes only where the file had them; what a call sets is none."""
    folder = shutil.copytree(source, tmp_path / "model")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    tokenizer.padding_side = "left"
    saving._save_tokenizer(tokenizer, folder)
    for name, value in {"padding_side": side, "model_max_length": 77, "clean_up_tokenization_spaces": True}.items():
        tokenizer, out = load_tokenizer(folder), tmp_path / name
        tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
        changed = getattr(tokenizer, name) != value
        setattr(tokenizer, name, value)
        caplog.clear()
        save_model(model, tokenizer, out)
        assert ("the tokenizer is not" in caplog.text) == changed
        assert [getattr(load_tokenizer(out), key) for key in (name, "padding_side")] == [value, tokenizer.padding_side]


def test_a_folder_that_is_gone_or_another_model_s_by_now(source, tmp_path, caplog):
    folder = shutil.copytree(source, tmp_path / "model")
    model = load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    save_model(model, None, tmp_path / "adapter")
    assert "adapter_config.json: an adapter" in caplog.text and "no longer that of" in caplog.text
    assert load_model(tmp_path / "adapter").config.vocab_size == model.config.vocab_size
    path = Shards(folder).paths[0]
    path.unlink()  # the model in memory is mapped to it; cut short it would be lost
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        save_model(model, None, tmp_path / "damaged")
    assert list((tmp_path / "damaged").iterdir()) == []
    shutil.rmtree(folder)
    save_model(model, None, tmp_path / "gone")
    assert load_model(tmp_path / "gone").config.rope_parameters == model.config.rope_parameters
    tiny_model("gpt2", torch.float32).save_pretrained(folder)
    save_model(model, None, tmp_path / "other")
    assert "no longer that of" in caplog.text and load_model(tmp_path / "other").config.model_type == "llama"


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt2", "gemma2", "phi3"])
def test_each_tensor_keeps_the_name_that_it_has_on_disk(kind, tmp_path):
    """Also of experts, which transformers 5 has in stacks in memory and not in the files."""
    tiny_model(kind, torch.float32).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    model = nudged(load_model(tmp_path / "model"))
    save_model(model, None, tmp_path / "out")
    before, after = (
        {path.name: {n: t.shape for n, t in load_file(path).items()} for path in Shards(tmp_path / name).paths}
        for name in ("model", "out")
    )
    assert before == after
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_an_odd_number_of_half_entries_leaves_wider_ones_aligned(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tensors = {"a": torch.arange(3.0), "b": torch.arange(5.0), "c": torch.arange(4), "d": torch.zeros(0)}
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    new = {"a": New("F16", lambda: tensors["a"] + 1), "d": New("F16", lambda: tensors["d"])}
    write_like(Shards(tmp_path / "a"), tmp_path / "b", new)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["a"], (tensors["a"] + 1).half()) and found["d"].dtype == torch.float16
    assert all(torch.equal(found[name], tensors[name]) for name in "bc")


def test_side_files_of_a_folder_without_any(tmp_path):
    assert side_files(tmp_path) == {}
