"""Fingerprints: every bit of the weights, the configuration and the tokenizer counts; one reading checks them too."""

import copy
import json
import math
import random
import shutil

import pytest
import tiny_text
import torch
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.model import fingerprint as module
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.fingerprint import fingerprint, model_fingerprint, tokenizer_fingerprint
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import DAMAGED, check_finite
from kunbr_fast.run import checks

FORGET, RETAIN = random_samples(4, seed=1), random_samples(4, seed=2)
CONFIG = dict(num_blocks=3, top_k=1, batch_size=2, warmup_epochs=1, block_epochs=1, seed=3, rtt=False)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(a model's folder, a function that resumes the run which was interrupted there, with the model of another)."""
    root = tmp_path_factory.mktemp("begun")
    tiny_model("llama", torch.float32).save_pretrained(root / "model")
    tiny_text.tokenizer().save_pretrained(root / "model")

    def run(folder, resume=True, stop=True):
        def say(text):
            if stop and text.startswith("knowledge density"):
                raise InterruptedError

        kf.unlearn(
            load_model(folder), FORGET, RETAIN, kf.KUnBRConfig(**CONFIG), tokenizer=load_tokenizer(folder),
            output_dir=root / "out", progress=False, on_stage=say, resume=resume,
        )  # fmt: skip

    with pytest.raises(InterruptedError):
        run(root / "model", resume=False)
    return root / "model", run


def test_resume_sees_one_bit_anywhere_in_the_weights(begun, tmp_path):
    folder, resume = begun
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    random_ = random.Random(0)
    places = [start, len(data) - 1, *(random_.randrange(start, len(data)) for _ in range(25))]
    with pytest.raises(InterruptedError):  # the same model goes on
        resume(other)
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << random_.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="belongs to another run|NaN or infinite|not finite|all its logits are 0"):
            resume(other)
    file.write_bytes(data)
    with pytest.raises(InterruptedError):
        resume(other)


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=20000.0)),
        ("config.json", lambda c: c.update(rms_norm_eps=2e-6)),
        ("config.json", lambda c: c.update(max_position_embeddings=65)),
        ("tokenizer.json", lambda t: t["model"]["merges"].reverse()),
        ("tokenizer.json", lambda t: t["model"]["merges"].pop()),
        ("tokenizer_config.json", lambda t: t.update(eos_token="<pad>")),
        ("chat_template.jinja", lambda t: t + " "),
    ],
)
def test_resume_sees_another_configuration_or_tokenizer(name, change, begun, tmp_path):
    folder, resume = begun
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / name).read_text()
    if name.endswith(".json"):
        value = json.loads(text)
        change(value)
        (other / name).write_text(json.dumps(value))
    else:
        (other / name).write_text(change(text))
    with pytest.raises(ValueError, match="belongs to another run"):
        resume(other)


def test_what_changes_no_result_does_not_count(tmp_path):
    model = tiny_model("gemma2", torch.float32)
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_model(tmp_path)) == before == model_fingerprint(open_streamed(tmp_path))
    assert model_fingerprint(copy.deepcopy(model)) == before
    model.config.use_cache, model.config._name_or_path = False, "elsewhere"
    assert model_fingerprint(model) == before
    tokenizer = tiny_text.tokenizer()
    made = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == made != tokenizer_fingerprint(None) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_the_same_reading_finds_what_is_not_finite(dtype, value, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    model = tiny_model("llama", dtype)
    model.model.layers[3].mlp.up_proj.weight.data[-1, -1] = value
    with pytest.raises(ValueError, match="its model.layers.3.mlp.up_proj.weight: 1 of 1536 values are NaN or infinite"):
        model_fingerprint(model, "its ")


def test_a_buffer_may_be_infinite_but_not_nan():
    """Gemma-4's towers clamp between bounds that are buffers, infinite until a checkpoint says otherwise."""
    model = tiny_model()
    model.register_buffer("bound", torch.tensor(-math.inf))
    found = model_fingerprint(model)
    model.bound.fill_(math.nan)
    with pytest.raises(ValueError, match="bound: 1 of 1 values are NaN or infinite"):
        model_fingerprint(model)
    model.bound.fill_(0.0)
    assert model_fingerprint(model) != found


def test_names_shapes_dtypes_and_saved_buffers_count():
    values = {"a": torch.arange(6.0), "b": torch.ones(2)}
    found = {
        model_fingerprint(values),
        model_fingerprint({"c": values["a"], "b": values["b"]}),
        model_fingerprint({"a": values["a"].view(2, 3), "b": values["b"]}),
        model_fingerprint({"a": values["a"].view(torch.int32), "b": values["b"]}),
        model_fingerprint({"a": values["a"][:5], "b": values["b"]}),
        model_fingerprint({"a": values["a"].double(), "b": values["b"]}),
        model_fingerprint({"a": values["a"], "b": values["b"], "empty": torch.ones(0)}),
    }
    assert len(found) == 7
    assert model_fingerprint({"a": values["a"].view(2, 3).t()}) == model_fingerprint(
        {"a": values["a"].view(2, 3).t().contiguous()}
    )
    model = tiny_model("llama", torch.float32)
    model.register_buffer("seen", torch.zeros(1), persistent=False)
    before = model_fingerprint(model)
    model.seen += 1
    assert model_fingerprint(model) == before
    model.register_buffer("counted", torch.zeros(1))
    assert model_fingerprint(model) != before


def test_each_model_is_read_once(monkeypatch, tmp_path):
    read, real = [], checks.model_fingerprint
    monkeypatch.setattr(checks, "model_fingerprint", lambda model, *rest: read.append(model) or real(model, *rest))
    model, given = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32, seed=1)
    kf.unlearn(model, FORGET, RETAIN, kf.KUnBRConfig(**CONFIG), unlearned=given, output_dir=tmp_path, progress=False)
    assert len(read) == 2 and read[0] is model and read[1] is given
    assert fingerprint(real(given), FORGET) == fingerprint(given, FORGET) != fingerprint(given, RETAIN)


NARROW = "hold {} up to {}, which {} cannot: load the model in {}".format
F16, F32 = "float16 (up to 65504)", "float32 (up to 3.40282e+38)"


@pytest.mark.parametrize(
    "stored, dtype, values, said",
    [
        ("float32", "float16", [1e5, -7e4], NARROW("float32", "1e+05", F16, "bfloat16 or float32")),
        ("bfloat16", "float16", [1e5], NARROW("bfloat16", "9.984e+04", F16, "bfloat16")),
        ("float64", "float32", [1e300], NARROW("float64", "1e+300", F32, "float64")),
        ("float64", "float16", [1e5], "cannot: load the model in bfloat16 or float32 or float64 (--dtype)"),
        ("float32", "float16", [math.inf], DAMAGED),
        ("float32", "float16", [1e5, math.nan], DAMAGED),
        ("float32", "float32", [math.nan], DAMAGED),
    ],
)
def test_a_dtype_that_is_too_narrow_is_named_and_no_whole_file_is_called_damaged(stored, dtype, values, said, tmp_path):
    """In a model that is loaded, in one that is converted afterwards, in a streamed one."""
    model, name = tiny_model(dtype=getattr(torch, stored)), "model.layers.3.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[: len(values)] = torch.tensor(values, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    for found in (load_model(tmp_path, dtype), load_model(tmp_path).to(getattr(torch, dtype))):
        for look in (model_fingerprint, check_finite, Decoder):
            with pytest.raises(ValueError) as error:
                look(found)
            assert name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError) as error:
        model_fingerprint(open_streamed(tmp_path, "cpu", dtype))
    assert name in str(error.value) and said in str(error.value)


def test_of_a_model_without_files_float16_is_the_cause_that_may_be():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="made float16, which ends at 65504, take bfloat16 or float32; else"):
        check_finite(model.half())
