"""Model folders that are damaged, hostile or another model's: one line, the same from all that read them."""

import json
import os
import re
import shutil
import socket
import struct
import time

import pytest
import tiny_text
import torch
import transformers as tf
from fuzz import HOSTILE_JSON, as_json, mutated, one_line, replaced
from helpers import python
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS as CONFIGS_OF_MODELS
from tiny_models import MIXTURES, MORE, tiny_model

import kunbr_fast as kf
from kunbr_fast.files.models import ModelFolder, load_model, load_tokenizer
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.planning.costs import Architecture

INDEX = "model.safetensors.index.json"
LAST = "model.layers.5.mlp.up_proj.weight"
SINGLE = "model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "three", max_shard_size="80KB")
    tied = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    tied.tie_weights()
    tied.save_pretrained(root / "tied")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "m")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved / "three", tmp_path / "m")


def merging(path):
    kf.merge_models(path, [path.parent / "nowhere"], path.parent / "out", mode="add")


WAYS = (load_model, open_streamed, merging)
ALL = (*WAYS, Architecture.load)  # `plan` too


def refused(path, message, ways=WAYS):
    """All ways say the same, in one line that names a file of the folder."""
    said = set()
    for way in ways:
        start = time.process_time()
        with pytest.raises(ValueError, match=message) as caught:
            way(path)
        assert time.process_time() - start < 2
        one_line(caught.value, path)
        said.add(str(caught.value))
    assert len(said) == 1


def edit(path, change):
    value = json.loads(path.read_text())
    found = change(value)
    path.write_text(json.dumps(value if found is None else found))


def header(path, change):
    """Rewrites a file's header: change(entries) in place, or what it returns."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    raw = json.dumps(change(entries) or entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def retensor(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# ---------------------------------------------------------------- which files

INDICES = {
    "../elsewhere/x.safetensors": "weights are read from the model's own folder only",
    "/tmp/x.safetensors": "weights are read from the model's own folder only",
    "sub/x.safetensors": "weights are read from the model's own folder only",
    "..\\x.safetensors": "weights are read from the model's own folder only",
    "gone.safetensors": "gone.safetensors: no such file: copy it too",
    "pytorch_model.bin": "expected the name of a .safetensors file",
    "a\n.safetensors": "expected the name of a .safetensors file",
    "": "expected the name of a .safetensors file",
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_points_elsewhere(name, shards):
    elsewhere = shards.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(next(shards.glob("*.safetensors")), elsewhere / "x.safetensors")
    edit(shards / INDEX, lambda index: index["weight_map"].update({LAST: name}))
    refused(shards, re.escape(INDICES[name]))


@pytest.mark.parametrize(
    "index, message",
    [
        ([], "expected an object with a weight_map"),
        ({}, "expected an object with a weight_map"),
        ({"weight_map": []}, "expected an object with a weight_map"),
        ({"weight_map": {}}, "its weight_map is empty"),
        ({"weight_map": {"a": 3}}, "'a' is to be in 3, expected the name"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "expected the name of a .safetensors file"),
        ({"weight_map": {"": "x.safetensors"}}, "is no name of a tensor"),
        ({"weight_map": {"a": "x.safetensors"}}, "its metadata is None, expected an object"),
        ({"metadata": {"total_size": "many"}, "weight_map": {"a": "x.safetensors"}}, "its total_size is 'many'"),
        ({"metadata": {"total_size": -1}, "weight_map": {"a": "x.safetensors"}}, "its total_size is -1"),
        ({"metadata": {"total_size": True}, "weight_map": {"a": "x.safetensors"}}, "its total_size is True"),
        ({"metadata": {"total_size": 0.5}, "weight_map": {"a": "x.safetensors"}}, "its total_size is 0.5"),
    ],
)
def test_an_index_that_is_none(index, message, shards):
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, message)


def test_an_index_and_its_files_that_disagree(shards):
    before = (shards / INDEX).read_text()
    edit(shards / INDEX, lambda index: index["metadata"].update(total_size=10**18))
    refused(shards, "total_size is 1000000000000000000, its tensors have")
    (shards / INDEX).write_text(before)
    edit(shards / INDEX, lambda index: index["weight_map"].pop(LAST) and None)
    refused(shards, f"{LAST} is in model-.*, the index does not name it")
    (shards / INDEX).write_text(before)
    edit(shards / INDEX, lambda index: index["weight_map"].update(more=index["weight_map"][LAST]))
    refused(shards, "more is in none of its files, the index names model-")
    (shards / INDEX).write_text(before)
    first, *_, last = sorted(shards.glob("*.safetensors"))
    retensor(first, lambda tensors: tensors.update({LAST: torch.zeros(48, 32)}))
    assert LAST in load_file(last) or len(list(shards.glob("*.safetensors"))) > 2
    refused(shards, f"{LAST} is in model-.* too: keep one")
    (shards / INDEX).write_text(before.rstrip()[:-1] + ', "weight_map": {}}')
    refused(shards, "'weight_map' occurs twice")


def test_the_single_file_comes_before_the_index_and_others_are_named(shards, saved, caplog):
    """As transformers does. A stale index beside it is not read."""
    shutil.copy(saved / "one" / SINGLE, shards)
    (shards / INDEX).write_text("[]")
    with caplog.at_level("WARNING"):
        found = load_model(shards)
    assert "the weights are in model.safetensors; not read: 'model-00001-of-" in caplog.text
    truth = load_file(saved / "one" / SINGLE)
    assert all(torch.equal(p, truth[name]) for name, p in found.named_parameters())


def test_links_are_followed(saved, tmp_path):
    """Hugging Face's cache: snapshots/REVISION/FILE is a link to ../../blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((saved / "three").iterdir())):
        shutil.copy(file, blobs / f"{number}")
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    truth = load_model(saved / "three").state_dict()
    for model in (load_model(snapshot), load_model(snapshot.resolve())):
        assert all(torch.equal(value, truth[name]) for name, value in model.state_dict().items())
    open_streamed(snapshot)
    (blobs / "2").unlink()
    refused(snapshot, "a link to '../../blobs/2', where nothing is")


def fifo(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def listening(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def null(path):
    os.symlink("/dev/null", path)


def loop(path):
    os.symlink(path.name, path)


@pytest.mark.parametrize(
    "make", [fifo, directory, listening, null, loop, None], ids=lambda make: make.__name__ if make else "nothing"
)
@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "generation_config.json", "model-00001"])
def test_what_is_no_file(make, name, saved, tmp_path, monkeypatch):
    kind = "three" if name in (INDEX, "model-00001") else "one"
    path = shutil.copytree(saved / kind, tmp_path / "m")
    monkeypatch.chdir(path)  # a socket's path must be short
    file = next(file for file in path.iterdir() if file.name.startswith(name))
    file.unlink()
    if make is None:
        file.write_bytes(b"")
    else:
        make(file if make is not listening else file.relative_to(path))
    refused(path, re.escape(str(file)))


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_whose_name_is_no_text(first, saved, tmp_path):
    odd = tmp_path / os.fsdecode(b"m\xff")
    shutil.copytree(saved / "one", odd)
    base, other = (odd, saved / "one") if first else (saved / "one", odd)
    with pytest.raises(ValueError, match=r"m\\udcff: .*whose name is not UTF-8: rename it"):
        kf.merge_models(base, [other], tmp_path / "out", mode="add")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- headers

ENTRY = "model.norm.weight"


def entry(**changes):
    return lambda entries: entries[ENTRY].update(changes)


HEADERS = {
    "float8": (entry(dtype="F8_E4M3"), "'F8_E4M3', quantised: expected one of F64, F32, F16, BF16"),
    "a dtype of no one": (entry(dtype="\x1b[31m"), r"'\\x1b\[31m', quantised"),
    "a dtype that is a list": (entry(dtype=[1]), r"has dtype \[1\]"),
    "another dtype": (entry(dtype="F16"), "has 128 bytes, which F16 of shape"),
    "sizes of 1e18": (entry(shape=[10**18]), r"has 128 bytes, which F32 of shape \[1000000000000000000\]"),
    "sizes that overflow": (entry(shape=[2**62, 4, 2**62]), "has 128 bytes"),
    "a size below 0": (entry(shape=[-32]), r"has shape \[-32\]"),
    "a size of a half": (entry(shape=[32.0]), r"has shape \[32.0\]"),
    "a shape that is a text": (entry(shape="32"), "has shape '32'"),
    "many sizes": (entry(shape=[1] * 100 + [32]), "has shape"),
    "offsets outside": (entry(data_offsets=[10**15, 10**15 + 128]), "leaves a gap before it"),
    "offsets that are reversed": (entry(data_offsets=[128, 0]), "has -128 bytes"),
    "one offset": (entry(data_offsets=[0]), "has data_offsets"),
    "offsets below 0": (entry(data_offsets=[-128, 0]), "has data_offsets"),
    "a field too many": (entry(more=1), "expected dtype, shape and data_offsets"),
    "an entry that is a list": (lambda e: e.update({ENTRY: []}), "expected dtype, shape and data_offsets"),
    "metadata that is a list": (lambda e: e.update(__metadata__=[]), "__metadata__ is"),
    "metadata of numbers": (lambda e: e.update(__metadata__={"a": 1}), "__metadata__ is"),
    "a list": (lambda e: [e], "expected an object"),
    "a name of control characters": (lambda e: e.update({"a\n": e.pop(ENTRY)}), r"'a\\n' is no name of a tensor"),
    "a long name": (lambda e: e.update({"a" * 3000: e.pop(ENTRY)}), "is no name of a tensor"),
    "no tensors": (lambda e: {"__metadata__": {}}, "describes"),
    "a tensor fewer": (lambda e: e.pop(ENTRY) and None, "leaves a gap before it|describes"),
    "one over the other": (
        lambda e: e[ENTRY].update(data_offsets=e["model.layers.0.input_layernorm.weight"]["data_offsets"]),
        "overlaps the one before|gap before",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie(kind, folder):
    change, message = HEADERS[kind]
    header(folder / SINGLE, change)
    refused(folder, message, ALL)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "its header is to have 9223372036854775808 bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header is to have 100 bytes, of 2 that follow"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "its header is no UTF-8"),
        (struct.pack("<Q", 2) + b"{]", "its header: not JSON"),
        (struct.pack("<Q", 4) + b"null", "its header is None, expected an object"),
        (struct.pack("<Q", 10) + b'{"a":1,"a"', "not JSON"),
        (struct.pack("<Q", 4000) + b"[" * 4000, "nested deeper"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_what_is_no_header(content, message, folder):
    (folder / SINGLE).write_bytes(content)
    refused(folder, message)


def test_a_header_of_gigabytes(folder):
    with open(folder / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", 3 << 30))
        file.truncate(4 << 30)  # sparse
    refused(folder, "its header is to have 3221225472 bytes, at most")


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "weight.absmax", "qzeros", "weight"])
def test_packed_weights(name, folder):
    stem = LAST.removesuffix(".weight")
    retensor(folder / SINGLE, lambda t: t.update({f"{stem}.{name}": torch.zeros(48, 4, dtype=torch.int32)}))
    refused(folder, f"{stem}.{name} is I32, packed or quantised", ALL)


# ---------------------------------------------------------------- tensors and the model

MODELS = (load_model, open_streamed)


def test_tensors_too_many_too_few_or_of_other_shapes(folder):
    whole = (folder / SINGLE).read_bytes()
    for change, message in (
        (lambda t: t.update({"model.layers.2.extra": torch.ones(3)}), "model.layers.2.extra is no tensor of"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.bias": torch.ones(48)}), "up_proj.bias is no tensor of"),
        (lambda t: t.pop(LAST), rf"has no weights for {LAST} \(1 missing\)"),
        (lambda t: t.update({LAST: torch.ones(32, 48)}), rf"{LAST} is \(32, 48\), expected \(48, 32\)"),
        (lambda t: t.update({ENTRY: torch.ones(32, dtype=torch.bool)}), f"{ENTRY} is BOOL, packed or quantised"),
    ):  # fmt: skip
        (folder / SINGLE).write_bytes(whole)
        retensor(folder / SINGLE, change)
        refused(folder, message, MODELS)


def test_buffers_that_older_releases_saved_are_no_tensors_too_many(saved, tmp_path):
    truth = load_model(saved / "one").state_dict()
    path = shutil.copytree(saved / "one", tmp_path / "m")
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(6)]
    retensor(path / SINGLE, lambda t: t.update({name: torch.ones(4) for name in names}))
    for model in (load_model(path), open_streamed(path)):
        assert torch.equal(model.get_input_embeddings().weight, truth["model.embed_tokens.weight"])
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path / "gpt2")
    retensor(
        tmp_path / "gpt2" / SINGLE,
        lambda t: t.update(
            {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril() for i in range(6)}
            | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(6)}
        ),
    )
    load_model(tmp_path / "gpt2"), open_streamed(tmp_path / "gpt2")


def test_tied_weights_that_differ(saved, tmp_path):
    path = shutil.copytree(saved / "tied", tmp_path / "m")
    assert "lm_head.weight" not in load_file(path / SINGLE)
    retensor(path / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    for model in (load_model(path), open_streamed(path)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    retensor(path / SINGLE, lambda t: t["lm_head.weight"][-1, -1].mul_(1.5))
    refused(path, "model.embed_tokens.weight and lm_head.weight differ, and config.json ties them")
    edit(path / "config.json", lambda config: config.pop("tie_word_embeddings") and None)  # llama's default is false
    assert load_model(path).lm_head.weight is not load_model(path).model.embed_tokens.weight


@pytest.mark.parametrize("number", [7, 1000, 10**9, 2**62, 5, 1])
def test_layers_too_many_or_too_few(number, folder):
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=number))
    message = "the weights have 6 layers" if number <= 1000 else "expected a whole number from 1 to 1000"
    refused(folder, f"config.json: num_hidden_layers is {number}, .*{message}")


def test_an_adapter_beside_the_weights(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused(folder, "adapter_config.json: an adapter, which transformers would put on top")


# ---------------------------------------------------------------- config.json

CONFIGS = {
    "hidden_size": ("32", None, 0, -32, 33, 32.0, True, [32], {}, 10**15, 2**63),
    "num_attention_heads": ("4", None, 0, -4, 3, 4.0, 10**9),
    "num_key_value_heads": ("2", 0, -2, 3, 8, 1.5),
    "head_dim": ("8", 0, -8, 7, 10**9),
    "num_hidden_layers": ("6", None, 0, -6, 6.0, 10**18),
    "vocab_size": ("97", None, 0, -1, 96, 10**12),
    "intermediate_size": ("48", None, 0, 47, -48, 1e9),
    "max_position_embeddings": ("64", None, 0, -64, 1e30),
    "rms_norm_eps": ("1e-6", 0, -1e-6, 1e30, [1e-6]),
    "rope_theta": ("1e4", 0, -1e4, [1.0]),
    "rope_parameters": ([], "linear", 3, {"rope_type": "bogus", "rope_theta": 1e4}, {"rope_type": 3},
                        {"rope_type": "linear", "factor": "2"}, {"rope_type": "linear", "factor": -1}),
    "rope_scaling": ([], "linear", {"type": "bogus", "factor": 2.0}),
    "hidden_act": ("swoosh", None, 3, "", "relu\n", ["silu"]),
    "tie_word_embeddings": ("false", None, 0, []),
    "attention_bias": ("true", 2, []),
    "model_type": ("nothing_known", None, 3, "", [], "../llama"),
    "dtype": ("float8_e4m3fn", "int8", "nonsense", 3, []),
    "torch_dtype": ("float8_e4m3fn", "object"),
    "quantization_config": ({}, {"quant_method": "gptq", "bits": 4}, "fp8", []),
    "architectures": ("LlamaForCausalLM", {}, [3]),
    "transformers_weights": ("other.safetensors", "../x.safetensors"),
    "attention_dropout": ("0.1", -1, 2),
    "initializer_range": ("0.02", -1),
    "layer_types": ("full_attention", ["full_attention"], ["bogus"] * 6),
    "text_config": (3, [], "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_no_model_has(name, folder):
    """By load_model, --stream and plan alike, in one line that names the file."""
    before = (folder / "config.json").read_text()
    for value in CONFIGS[name]:
        (folder / "config.json").write_text(before)
        edit(folder / "config.json", lambda config: config.update({name: value}))  # noqa: B023
        refused(folder, re.escape(str(folder)), MODELS)
        if name not in ("vocab_size", "intermediate_size") or type(value) is not int or value < 1:
            with pytest.raises(ValueError) as caught:
                plan_of(folder)
            one_line(caught.value, folder / "config.json")


def plan_of(folder):
    """What plan reads of a model: config.json, and the meta model's constructor judges what that leaves."""
    Architecture.load(folder)
    ModelFolder(folder).on_meta(ModelFolder(folder).configuration(), torch.float32)


@pytest.mark.parametrize("kind", HOSTILE_JSON)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(kind, name, shards):
    (shards / name).write_bytes(HOSTILE_JSON[kind])
    refused(shards, re.escape(str(shards / name)))


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_that_are_damaged(name, tmp_path):
    tiny_text.tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    load_tokenizer(tmp_path)
    cases = [b"", b"[]", b"null", whole[:-5], b"\xff" + whole, b'{"a": 1}', b"[" * 3000]
    if name == "tokenizer_config.json":
        cases += [b'{"fast_tokenizer_files": ["../b/tokenizer.4.0.0.json"]}', b'{"model_max_length": "long"}']
    cases += [b'{"tokenizer_class": "Nothing"}', b'{"tokenizer_class": 3}', b'{"model": {"type": "BPE"}}']
    refusals = 0
    for content in cases:
        (tmp_path / name).write_bytes(content)
        try:
            load_tokenizer(tmp_path)
        except ValueError as error:
            one_line(error, tmp_path / name)
            refusals += 1
    assert refusals >= 7


BESIDE = {
    "chat_template.jinja": (b"\xff\xfe", b"x" * (2**20 + 1)),
    "additional_chat_templates/one.jinja": (b"\xff\xfe", b"x" * 30_000_000, None),
    "added_tokens.json": (b'{"a": "x"}', b'{"a": {}}', b'{"a": -1}', b'{"a": 1e3}', b"[]", b"x" * 17_000_000),
    "special_tokens_map.json": (b'{"eos_token": {"content": 5}}', b'{"eos_token": 5}', b'{"pad_token": ["a"]}', b"5"),
    "tokenizer_config.json": tuple(
        as_json(value)
        for value in (
            {"model_max_length": "x"}, {"auto_map": 5}, {"tokenizer_class": 5}, {"fast_tokenizer_files": 5},
            {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, {"fast_tokenizer_files": ["../x"]},
            {"fast_tokenizer_files": [5]}, {"chat_template": 5}, {"chat_template": [5]}, {"chat_template": [{}]},
            {"chat_template": {"a": "b"}}, {"eos_token": 5}, {"added_tokens_decoder": []},
        )
    ),
    "tokenizer.json": (b"[]", b"null", b"{}", b"5", b'"x"', b"[" * 10**5),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_tokenizers_files_are_named(name, tmp_path, capfd):
    tiny_text.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    load_tokenizer(tmp_path)
    for content in BESIDE[name]:
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(content) if content is not None else os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError) as caught:
            load_tokenizer(tmp_path)
        one_line(caught.value, tmp_path / name)
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}},
    ],
)  # fmt: skip
def test_a_panic_of_tokenizers_is_one_line(changes, tmp_path, capfd):
    tiny_text.tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda value: value.update(changes))
    with pytest.raises(ValueError, match="PanicException") as caught:
        load_tokenizer(tmp_path)
    one_line(caught.value, tmp_path / "tokenizer.json")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_fuzzed_tokenizers(name, tmp_path):
    tiny_text.tokenizer().save_pretrained(tmp_path)
    data, refusals = (tmp_path / name).read_bytes(), 0
    cases = [*mutated(data, seed=5, count=100), *map(as_json, replaced(json.loads(data), seed=6, count=100))]
    for content in cases:
        (tmp_path / name).write_bytes(content)
        try:
            load_tokenizer(tmp_path)
        except ValueError as error:
            one_line(error, tmp_path)
            refusals += 1
    assert refusals > 100


# ---------------------------------------------------------------- a fuzz


def judged(path, seconds=2.0):
    """Opens a folder as far as nothing heavy is read: done, or a message in one line."""
    start = time.process_time()
    try:
        folder = ModelFolder(path)
        folder.on_meta(folder.configuration(), torch.float32)
        ended = True
    except ValueError as error:
        one_line(error, path)
        ended = False
    assert time.process_time() - start < seconds
    return ended


def test_fuzzed_headers(folder):
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries, refusals = json.loads(data[8 : 8 + length]), 0
    for raw in mutated(data[: 8 + length], seed=1, count=150):
        (folder / SINGLE).write_bytes(raw + data[8 + length :])
        refusals += not judged(folder)
    for value in replaced(entries, seed=2, count=150):
        raw = as_json(value)
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
        refusals += not judged(folder)
    assert refusals > 280  # a changed letter of the metadata is no fault


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_fuzzed_json(name, shards):
    data, refusals = (shards / name).read_bytes(), 0
    for raw in mutated(data, seed=3, count=150):
        (shards / name).write_bytes(raw)
        refusals += not judged(shards)
    for value in replaced(json.loads(data), seed=4, count=150):
        (shards / name).write_bytes(as_json(value))
        refusals += not judged(shards)
    assert refusals > (280 if name == INDEX else 150)


def test_nothing_heavy_is_imported_to_refuse(folder):
    """transformers takes a second and more to import."""
    header(folder / SINGLE, entry(dtype="F8_E4M3"))
    said = shutil.copytree(folder, folder.parent / "said")
    edit(said / "config.json", lambda values: values.update(quantization_config={"quant_method": "awq"}))
    done = python(
        "-c",
        "import sys; from kunbr_fast.files.models import load_model\n"
        f"for folder in ({str(folder)!r}, {str(said)!r}):\n"
        "    try: load_model(folder)\n"
        "    except ValueError as error: print('transformers' in sys.modules, 'quantised' in str(error))",
    )
    assert done.stdout.split() == ["False", "True"] * 2, done.stderr


# ---------------------------------------------------------------- settings that show late, or in a part

FAMILIES = {
    "mixtral": {"num_experts_per_tok": (0, 7, -1, "2", None, 10**9), "num_local_experts": (0, 10**9)},
    "qwen2_moe": {"num_experts_per_tok": (0, 7), "decoder_sparse_step": (0,)},
    "deepseek_v3": {
        "n_group": (0, 3, None, "x"), "topk_group": (0, 9, None), "q_lora_rank": (0,), "num_experts_per_tok": (0, 9)
    },
    "cohere": {"logit_scale": (None, "x")},
    "gpt_neo": {"max_position_embeddings": (2**17, 2**24)},
    "gemma3_both": {
        "vision_config": ({"num_hidden_layers": 10**9}, {"image_size": 2**30}, {"num_labels": 3 * 10**7},
                          {"patch_size": 0}, {"hidden_size": "x"}, {"deeper": [{"encoder_layers": 10**6}]}),
        "audio_config": ({"depths": [2, 10**9]},),
    },
    "llama": {
        "num_labels": (3 * 10**7, "x", -1, 2**62), "id2label": ("x", [], {"a": "b"}), "n_blocks": (10**9,),
        "text_config": ({}, {"model_type": "gpt2"}, {"text_config": {"text_config": {}}}), "decoder": ({"a": 1},),
        "max_position_embeddings": (2**31 - 1,), "bos_token_id": ("x",), "to_dict": ("x",), "get_text_config": ("x",),
        "model_type": ("gpt2", "whisper", "auto"),
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    others = {
        "deepseek_v3": tf.DeepseekV3Config(
            **text, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8, first_k_dense_replace=0,
        ),
        "cohere": tf.CohereConfig(**text),
        "gpt_neo": tf.GPTNeoConfig(
            vocab_size=97, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        ),
        "gemma3_both": tf.Gemma3Config(
            text_config=dict(text, head_dim=8, num_key_value_heads=1),
            vision_config=dict(sizes, image_size=28, patch_size=14),
        ),
    }  # fmt: skip
    for name, config in others.items():
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    for name in {**CONFIGS_OF_MODELS, **MORE, **MIXTURES}:
        tiny_model(name, torch.float32).save_pretrained(root / name)
    return root


def test_every_known_architecture_loads(families):
    for path in sorted(families.iterdir()):
        assert load_model(path).config._name_or_path == str(path), path
        ended = judged(path, seconds=5)
        assert ended, path


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_that_show_late(name, families, tmp_path, capfd):
    for setting, values in FAMILIES[name].items():
        for value in values:
            path = shutil.copytree(families / name, tmp_path / "m", dirs_exist_ok=True)
            edit(path / "config.json", lambda config: config.update({setting: value}))  # noqa: B023
            start = time.process_time()
            with pytest.raises(ValueError) as caught:
                load_model(path)
            assert time.process_time() - start < 2
            one_line(caught.value, path)
            assert capfd.readouterr().err == "", (setting, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "torch.bfloat16"},
        {"torch_dtype": "torch.bfloat16", "dtype": None},
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "x", "experts_implementation": 5},
        {"return_dict": False, "use_return_dict": False, "torchscript": True},
        {"output_hidden_states": "x", "output_attentions": True},
        {"rope_theta": 10**11, "total_params": 7 * 10**9, "seed": 2**40},
        {"num_labels": 2, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    ],
)
def test_settings_of_a_program_are_left_out(changes, folder):
    """What older releases wrote, and what says how a model is run."""
    truth = load_model(folder, "float32")(torch.tensor([[1, 2, 3]])).logits
    edit(folder / "config.json", lambda config: config.update(changes))
    found = load_model(folder)
    assert found.dtype == (torch.bfloat16 if any("dtype" in name for name in changes) else torch.float32)
    assert torch.equal(load_model(folder, "float32")(torch.tensor([[1, 2, 3]])).logits, truth)
    assert open_streamed(folder) is not None
    tiny_text.tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder)("a").input_ids


# ---------------------------------------------------------------- which files are the weights

NOT_WEIGHTS = {  # {what lies there: what is said of it}
    ("model.fp16.safetensors",): "model.fp16.safetensors: a variant",
    ("model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"): "and 1 more: a variant",
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"): "no model.safetensors.index.json",
    ("adapter.safetensors",): "an adapter, and no model",
    ("consolidated.00.pth", "params.json"): "their maker's own form",
    ("consolidated.safetensors",): "their maker's own form",
    ("lora.safetensors",): "name it model.safetensors",
    ("pytorch_model.bin",): "pickled weights; only safetensors are read",
    ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"): "and 1 more: pickled weights",
    ("model-q4.gguf",): "model-q4.gguf: a GGUF file",
    ("tf_model.h5",): "weights of another form",
}


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("names", NOT_WEIGHTS, ids=" ".join)
def test_what_lies_there_in_place_of_weights_is_named(names, configured, folder):
    weights = (folder / SINGLE).read_bytes()
    (folder / SINGLE).unlink()
    for name in names:
        (folder / name).write_bytes(weights)
    if not configured:
        (folder / "config.json").unlink()
    refused(folder, NOT_WEIGHTS[names], ALL)


def test_a_plan_needs_no_weights_but_plain_ones(folder, tmp_path, caplog):
    """config.json alone, beside what no weights are, and an index that was fetched without its files, is enough."""
    truth = Architecture.load(folder / "config.json")
    assert Architecture.load(folder) == truth and not caplog.records
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert Architecture.load(folder) == truth and "not read: 'pytorch_model.bin'" in caplog.text
    (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    refused(folder, "a git-lfs pointer", ALL)
    assert Architecture.load(folder / "config.json") == truth
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").unlink()
    for name in (INDEX, "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    assert Architecture.load(folder) == truth
    shutil.copy(folder / INDEX, folder / "model-00001-of-00002.safetensors")
    refused(folder, "not an index of safetensors files", ALL)


@pytest.mark.parametrize("sharded", [False, True])
def test_whatever_weights_lie_beside_those_that_are_read_are_named(sharded, saved, tmp_path, caplog):
    folder = shutil.copytree(saved / ("three" if sharded else "one"), tmp_path / "m")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(b"of a training, and no weights")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    ModelFolder(folder)
    assert not caplog.records
    for name in (
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
        "consolidated.safetensors", "model.fp16.safetensors", "model-00009-of-00009.safetensors", "model.q4.gguf",
        "tf_model.h5", "original/consolidated.00.pth",
    ):  # fmt: skip
        (folder / name).write_bytes(b"x")
        ModelFolder(folder)
        read = "model-00001-of-00003.safetensors" if sharded else SINGLE
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"{folder}: the weights are in {read}; not read: '{name.partition('/')[0]}'"]
        caplog.clear()
        (folder / name).unlink()


def test_a_single_file_goes_before_an_index_and_what_is_not_read_is_named(shards, saved, caplog):
    """Read by each way; the same as transformers reads."""
    shutil.copy(saved / "one" / SINGLE, shards)
    retensor(shards / SINGLE, lambda tensors: tensors[LAST].add_(1))
    (shards / "model.fp16.safetensors").write_bytes(b"not looked at")
    truth = tf.AutoModelForCausalLM.from_pretrained(shards).state_dict()
    caplog.clear()
    model, streamed = load_model(shards), weights_of(open_streamed(shards))
    said = [record.message for record in caplog.records if "not read" in record.message]
    assert len(said) == 2 and all("'model-00001" in text and " more" in text for text in said)
    for name, tensor in truth.items():
        assert torch.equal(model.state_dict()[name], tensor) and torch.equal(streamed[name], tensor)
    kf.merge_models(shards, [saved / "one"], shards.parent / "out", mode="add")
    assert sorted(path.name for path in (shards.parent / "out").glob("*.safetensors*")) == [SINGLE]


# ---------------------------------------------------------------- quantised checkpoints

SAYS_QUANTISED = [
    ("config.json", {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}),
    ("config.json", {"quantization_config": {}}),
    ("config.json", {"compression_config": {"format": "pack-quantized"}}),
    ("config.json", {"quantization": {"group_size": 64, "bits": 4}}),
    ("config.json", {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}),
    ("config.json", {"a": {"b": {"quantization_config": {"bits": 8}}}}),
    ("quantize_config.json", {"bits": 4, "group_size": 128}),
    ("quant_config.json", {"w_bit": 4, "zero_point": True}),
    ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
]


@pytest.mark.parametrize(("name", "values"), SAYS_QUANTISED)
def test_a_quantised_checkpoint_is_one_line(name, values, folder):
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))
    refused(folder, f"{name}: .*its weights are quantised", ALL)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"quantization_config": None, "compression_config": None}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}),
    ],
)
def test_what_says_that_nothing_is_quantised_is_right(name, values, folder):
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))
    assert load_model(folder) is not None and Architecture.load(folder)


@pytest.mark.parametrize("name", ["gate_up_proj_blocks", "down_proj_scales", "weight_packed", "anything"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_bytes_are_packed_weights(name, dtype, folder):
    stem = "model.layers.0.mlp.experts"
    retensor(folder / SINGLE, lambda t: t.update({f"{stem}.{name}": torch.zeros(48, 4, dtype=dtype)}))
    refused(folder, f"{stem}.{name} is .8, packed or quantised", ALL)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused_by_name(name, folder):
    (folder / name).write_text("{}")
    refused(folder, f"{name}: an adapter", ALL)
