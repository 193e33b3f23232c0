"""Merged files equal plain torch on state dicts; resumed, bounded in memory, and refused where they should be."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import rarely, refused
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_text import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.files import merge, merge_folder
from kunbr_fast.files.shards import Shards

SHARD = "30KB"  # of a tiny fp32 model: several files


def moved(model, seed, share=0.7):
    """A copy of the model's weights with a part of them changed."""
    generator = torch.Generator().manual_seed(seed)
    other = {}
    for name, value in model.state_dict().items():
        step = torch.randn(value.shape, generator=generator) * 0.02
        step *= torch.rand(value.shape, generator=generator) < share
        other[name] = (value.double() + step.double()).to(value.dtype)
    if model.config.tie_word_embeddings:
        other["lm_head.weight"] = other["model.embed_tokens.weight"]
    return other


def write(model, path, weights=None, shard=None):
    if weights is not None:
        model = AutoModelForCausalLM.from_config(model.config).to(next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
    model.save_pretrained(path, max_shard_size=shard or "1GB")
    return path


def read(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def plain(base, others, mode, method, alpha=1.0, agree=1.0):
    """The formulas, a tensor at a time."""
    merged = {}
    for name, value in base.items():
        wide = torch.promote_types(value.dtype, torch.float32)
        tau = torch.stack([other[name].to(wide) - value.to(wide) for other in others])
        if method == "sum":
            tau = tau.sum(0)
        elif method == "mean":
            tau = tau.mean(0)
        else:
            sign = torch.sign(torch.sign(tau).sum(0))
            same = torch.sign(tau) == sign
            kept = (same.sum(0) / len(others) >= agree - 1e-9) & (sign != 0)
            tau = torch.where(kept, (tau * same).sum(0) / same.sum(0), 0)
        merged[name] = (value.to(wide) + (-alpha if mode == "negate" else alpha) * tau).to(value.dtype)
    return merged


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A tied fp32 model and four changed copies; base and the third in several files, the last in bf16."""
    root, model = tmp_path_factory.mktemp("merge"), tiny_model("gemma2", torch.float32)
    others = [moved(model, seed) for seed in range(4)]
    others[3] = {name: value.bfloat16() for name, value in others[3].items()}
    write(model, root / "base", shard=SHARD)
    tokenizer().save_pretrained(root / "base")
    (root / "base" / "pytorch_model.bin").write_bytes(b"a pickle")
    (root / "base" / "report.json").write_text("{}")
    for number, other in enumerate(others):
        write(model, root / f"m{number}", other, SHARD if number == 2 else None)
    assert len(list((root / "base").glob("*.safetensors"))) >= 3
    return root, model, others


def models(root, count):
    return [root / f"m{number}" for number in range(count)]


@pytest.mark.parametrize("mode", merge.MODES)
@pytest.mark.parametrize(
    "count,options",
    [
        (1, dict(method="mean", alpha=0.7)),
        (1, dict()),
        (3, dict(method="sum", alpha=0.5)),
        (4, dict(method="mean")),
        (4, dict(alpha=1.3)),
        (4, dict(agree=0.75)),
        (3, dict(agree=2 / 3)),
    ],
)
def test_equals_plain_torch(five, mode, count, options, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "CHUNK", 1000)  # odd ends everywhere
    root, model, others = five
    found = kf.merge_models(root / "base", models(root, count), tmp_path / "out", mode=mode, **options)
    base = read(root / "base")
    truth = plain(base, others[:count], mode, **({"method": "consensus"} | options))
    ours = read(tmp_path / "out")
    assert ours.keys() == truth.keys() == base.keys()
    for name, value in truth.items():
        assert ours[name].dtype == torch.float32 and torch.allclose(ours[name], value, rtol=1e-6, atol=1e-7), name
    entries = sum(value.numel() for value in base.values())
    assert found["entries"] == entries and found["tensors"] == len(base)
    norms = [
        torch.cat([(other[name].float() - base[name]).flatten() for name in base]).double().norm().item()
        for other in others[:count]
    ]
    assert found["task_vector_norms"] == pytest.approx(norms, rel=1e-5)
    change = torch.cat([(truth[name] - base[name]).flatten() for name in base])
    assert found["merged_norm"] == pytest.approx(float(change.double().norm()), rel=1e-3)
    assert found["changed_share"] == pytest.approx(float((change != 0).sum()) / entries, abs=0.003)
    signs = torch.cat(
        [torch.stack([torch.sign(o[n].float() - base[n]) for o in others[:count]]).flatten(1) for n in base], 1
    )
    needed = options.get("agree", 1.0) * count - 1e-6
    agreed = ((signs > 0).sum(0) >= needed) | ((signs < 0).sum(0) >= needed)
    assert found["agreed_share"] == pytest.approx(float(agreed.double().mean()), abs=1e-9)


def test_negating_what_was_added_gives_the_base_back(five, tmp_path):
    root, _, _ = five
    kf.merge_models(root / "base", [root / "m0"], tmp_path / "same", mode="add")
    base, same, m0 = read(root / "base"), read(tmp_path / "same"), read(root / "m0")
    assert all(torch.allclose(same[name], m0[name], rtol=1e-6, atol=1e-7) for name in base)


def test_files_are_laid_out_as_the_bases_and_the_model_is_loadable(five, tmp_path):
    root, model, others = five
    found = kf.merge_models(root / "base", models(root, 3), tmp_path / "out", mode="negate")
    base, out = root / "base", tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"pytorch_model.bin", "report.json"} | {"merge.json"}
    for file in base.glob("*.safetensors"):
        a, b = file.read_bytes(), (out / file.name).read_bytes()
        header = 8 + int.from_bytes(a[:8], "little")
        assert len(a) == len(b) and a[:header] == b[:header] and a != b
    assert json.loads((out / "merge.json").read_text()) == found
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")  # SDPA knows no softcap
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    truth = tiny_model("gemma2", torch.float32)
    weights = plain(read(base), others[:3], "negate", "consensus")
    truth.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(loaded(ids).logits, truth(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    """The base's dtype is kept; sums are fp32 (fp64 for fp64), so bf16 is rounded once."""
    model = tiny_model("llama", dtype, num_hidden_layers=2)
    others = [moved(model, seed) for seed in range(3)]
    write(model, tmp_path / "base")
    for number, other in enumerate(others):
        write(model, tmp_path / f"m{number}", other)
    kf.merge_models(tmp_path / "base", models(tmp_path, 3), tmp_path / "out", mode="negate", alpha=0.3)
    truth, ours = plain(model.state_dict(), others, "negate", "consensus", 0.3), read(tmp_path / "out")
    for name, value in truth.items():
        assert ours[name].dtype == dtype
        if dtype == torch.float64:
            assert torch.allclose(ours[name], value, rtol=1e-14, atol=1e-16)
        else:  # where a mean of three lies at the border between two values of the dtype, one of both
            different = ours[name] != value
            assert float(different.double().mean()) < 0.01
            assert torch.allclose(ours[name].float(), value.float(), rtol=float(torch.finfo(dtype).eps))


def test_cuts_of_the_files_do_not_matter(tmp_path):
    model = tiny_model("llama", torch.float32)
    for cut, shard in (("one", None), ("three", "80KB")):
        write(model, tmp_path / cut / "base", shard=shard)
        write(model, tmp_path / cut / "m0", moved(model, 1), shard=None if shard else "40KB")
        kf.merge_models(tmp_path / cut / "base", [tmp_path / cut / "m0"], tmp_path / cut / "out", mode="add", alpha=0.4)
    assert len(list((tmp_path / "three" / "out").glob("*.safetensors"))) == 3
    one, three = read(tmp_path / "one" / "out"), read(tmp_path / "three" / "out")
    assert one.keys() == three.keys() and all(torch.equal(one[name], three[name]) for name in one)


def raw_model(path, **tensors):
    path.mkdir(parents=True)
    save_file(
        {name.replace("_", "."): value.contiguous() for name, value in tensors.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text("{}")
    return path


def test_odd_tensors(tmp_path):
    """Scalars, empty ones, integers, entries that did not move; -0.0 stays."""
    steps = torch.arange(5)
    base = raw_model(
        tmp_path / "b", scalar=torch.tensor(2.0), empty=torch.zeros(0, 3), steps=steps, still=-torch.zeros(3)
    )
    other = raw_model(
        tmp_path / "o", scalar=torch.tensor(3.0), empty=torch.zeros(0, 3), steps=steps, still=-torch.zeros(3)
    )
    found = kf.merge_models(base, [other], tmp_path / "out", mode="negate")
    out = read(tmp_path / "out")
    assert float(out["scalar"]) == 1 and out["empty"].shape == (0, 3) and torch.equal(out["steps"], steps)
    assert found["tensors"] == 3 and found["entries"] == 4 and found["agreed_share"] == 0.25
    bad = raw_model(
        tmp_path / "p", scalar=torch.tensor(3.0), empty=torch.zeros(0, 3), steps=steps + 1, still=torch.zeros(3)
    )
    with pytest.raises(ValueError, match=r"p/model.safetensors: steps \(I64\) is no float and differs from the base's"):
        kf.merge_models(base, [bad], tmp_path / "out2", mode="negate")


# ---------------------------------------------------------------- interrupted

KILLED = """
import os, signal, sys
from kunbr_fast.cli import command as cli
from kunbr_fast.files import atomic, merge, merge_folder
real, calls = getattr({owner}, {name!r}), 0
def wrapped(*args, **kwargs):
    global calls
    calls += 1
    if calls > {passes}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr({owner}, {name!r}, wrapped)
sys.exit(cli.main(sys.argv[1:]))
"""
POINTS = {
    "in the second file": ("merge", "_merge_tensor", 30),
    "a file is written, it has no name": ("atomic.os", "replace", 3),
    "the weights are there, config.json is not": ("merge_folder", "write_json", 5),
}


@pytest.mark.parametrize("point", rarely(POINTS, ["the weights are there, config.json is not"]))
def test_killed_and_resumed(five, point, tmp_path, monkeypatch):
    root, _, _ = five
    out, (owner, name, passes) = tmp_path / "out", POINTS[point]
    command = [
        "merge",
        "--base",
        str(root / "base"),
        "--models",
        *map(str, models(root, 3)),
        "--mode",
        "negate",
        "--quiet",
    ]
    program = KILLED.format(owner=owner, name=name, passes=passes)
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--out", str(out)], capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    files = len(list((root / "base").glob("*.safetensors")))
    whole = json.loads((out / "merge.partial.json").read_text())["files"]
    assert not (out / "config.json").exists() or point.startswith("the weights")
    merged, real = [], merge._merge_file
    monkeypatch.setattr(merge, "_merge_file", lambda path, *rest: merged.append(path.name) or real(path, *rest))
    assert cli.main([*command, "--out", str(out)]) == 2  # not without being asked
    assert cli.main([*command, "--out", str(out), "--resume"]) == 0
    assert len(merged) == files - len(whole) and not {*merged} & {*whole}
    assert cli.main([*command, "--out", str(tmp_path / "straight")]) == 0
    for path in (tmp_path / "straight").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "straight").iterdir()}


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(number):
    """From the `number`-th call on that changes a file no such call is done, as after a kill. Yields the calls."""
    calls, real = [], {name: getattr(os, name) for name in ("mkdir", "open", "unlink", "rmdir", "replace", "fsync")}

    def hooked(name):
        def call(*args, **kwargs):
            if number and len(calls) + 1 >= number:
                raise Killed
            calls.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(os, name, hooked(name))
    try:
        yield calls
    except Killed:
        pass
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def test_killed_at_any_call_that_changes_a_file(tmp_path):
    base = raw_model(tmp_path / "b", w_x=torch.ones(4), w_y=torch.arange(6.0))
    (base / "tokenizer.json").write_text("{}")
    other = raw_model(tmp_path / "o", w_x=torch.zeros(4), w_y=torch.ones(6))

    def merged(out, **options):
        return kf.merge_models(base, [other], out, mode="add", **options)

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    with killed_at(0) as calls:
        merged(tmp_path / "out")
    truth = content(tmp_path / "out")
    assert len(truth) == 4 and len(calls) > 60
    for number in range(1, len(calls) + 2):
        out = tmp_path / f"out{number}"
        with killed_at(number) as done:
            merged(out)
        assert done == calls[: number - 1]
        merged(out, resume=out.is_dir())
        assert content(out) == truth, number
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], number


def test_a_finished_merge_has_nothing_to_resume(five, tmp_path):
    root, _, _ = five
    out, options = tmp_path / "out", dict(mode="negate")
    first = kf.merge_models(root / "base", models(root, 2), out, **options)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert kf.merge_models(root / "base", models(root, 2), out, resume=True, **options) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="alpha changed since this merge was finished"):
        kf.merge_models(root / "base", models(root, 2), out, resume=True, alpha=2, **options)
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{file}: changed since this merge was finished"):
        kf.merge_models(root / "base", models(root, 2), out, resume=True, **options)
    with pytest.raises(ValueError, match="is not empty: give another one, or delete it"):
        kf.merge_models(root / "base", models(root, 2), out, **options)


@pytest.mark.parametrize("name", ["model-00002", "tokenizer.json", "config.json", "notes.txt", ".x.0123456789ab.tmp"])
def test_what_is_not_the_merges_own_stays(five, name, tmp_path):
    """Files that came into the folder between a kill and the resumed merge."""
    root, _, _ = five
    with refused("File too large"):
        kf.merge_models(root / "base", models(root, 2), tmp_path / "out", mode="negate")
    name = next((path.name for path in (root / "base").glob(f"{name}*")), name)
    mine = tmp_path / "out" / name
    mine.write_bytes(b"mine")
    known = (root / "base" / name).exists()
    if known:
        with pytest.raises(ValueError, match=f"{mine}: not of this merge, which would replace it: move it away"):
            kf.merge_models(root / "base", models(root, 2), tmp_path / "out", mode="negate", resume=True)
    else:
        kf.merge_models(root / "base", models(root, 2), tmp_path / "out", mode="negate", resume=True)
    assert mine.read_bytes() == b"mine"
    assert known == (name not in ("notes.txt", ".x.0123456789ab.tmp"))


def test_resume_begins_where_nothing_was_written(five, tmp_path):
    """A kill between the folder and its first file leaves an empty one."""
    root, _, _ = five
    (tmp_path / "out").mkdir()
    kf.merge_models(root / "base", models(root, 1), tmp_path / "out", mode="negate", resume=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_resume_looks_at_what_it_finds(five, tmp_path):
    root, _, _ = five
    out, options = tmp_path / "out", dict(mode="negate")
    with pytest.raises(ValueError, match="no merge to resume"):
        kf.merge_models(root / "base", models(root, 2), out, resume=True, **options)
    straight = kf.merge_models(root / "base", models(root, 2), tmp_path / "straight", **options)
    kf.merge_models(root / "base", models(root, 2), out, **options)
    job = json.loads((out / "merge.json").read_text())
    identity = {
        "job": {"mode": "negate", "method": "consensus", "alpha": 1.0, "agree": 1.0},
        "files": {name: {"sha256": digest, "tensors": {}} for name, digest in job["sha256"].items()},
    }
    (out / "merge.partial.json").write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="inputs changed since this merge was begun"):
        kf.merge_models(root / "base", models(root, 2), out, resume=True, **options)
    (out / "merge.partial.json").write_text("{")
    with pytest.raises(ValueError, match="merge.partial.json: not JSON .* delete .* and begin again"):
        kf.merge_models(root / "base", models(root, 2), out, resume=True, **options)
    assert straight["sha256"] == job["sha256"]


def test_a_full_disk_is_said_and_resumed(five, tmp_path, capsys):
    root, _, _ = five
    out = tmp_path / "out"
    with refused("could not write .*out.model-00001.*File too large; the file before it is untouched"):
        kf.merge_models(root / "base", models(root, 2), out, mode="negate")
    assert [path.name for path in out.iterdir()] == ["merge.partial.json"]
    kf.merge_models(root / "base", models(root, 2), out, mode="negate", resume=True)
    truth = kf.merge_models(root / "base", models(root, 2), tmp_path / "straight", mode="negate")
    assert json.loads((out / "merge.json").read_text()) == truth


def test_no_space_is_said_before(five, tmp_path, monkeypatch):
    root, _, _ = five
    usage = type(merge_folder.shutil.disk_usage("/"))
    monkeypatch.setattr(merge_folder.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match=r"out: 64.\d MiB are needed and 0.0 MiB free"):
        kf.merge_models(root / "base", models(root, 2), tmp_path / "out", mode="negate")
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Files of 80 MB each, in one tensor: the process grows by less than one of the four."""
    big = torch.zeros(20, 1000, 1000)
    for value, name in enumerate(("b", "m0", "m1")):
        big[:, 0] = value
        raw_model(tmp_path / name, big=big)
    program = (
        "import sys, resource, torch; from kunbr_fast.files import merge\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge.merge_models(sys.argv[1], sys.argv[2:4], sys.argv[4], mode='add')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    arguments = [str(tmp_path / name) for name in ("b", "m0", "m1", "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 80e6, done.stdout
    out = Shards(tmp_path / "out")
    assert float(out["big"][:, 0].min()) == float(out["big"][:, 0].max()) == 1.5


# ---------------------------------------------------------------- refusals


def test_refusals(five, tmp_path):
    root, model, others = five
    base = root / "base"

    def attempt(message, given=None, out=None, start=base, mode="negate", **options):
        with pytest.raises(ValueError, match=message):
            kf.merge_models(
                start, [root / "m0"] if given is None else given, out or tmp_path / "out", mode=mode, **options
            )
        assert not list((tmp_path / "out").glob("*")), message

    with pytest.raises(TypeError, match="unexpected keyword argument 'methd': did you mean 'method'"):
        kf.merge_models(base, [root / "m0"], tmp_path / "out", mode="add", methd="sum")
    attempt("mode='subtract': expected one of negate, add", mode="subtract")
    attempt("method='ties': expected one of sum, mean, consensus", method="ties")
    attempt("alpha=-1.0: expected a number above 0; mode says", alpha=-1)
    attempt("alpha=nan", alpha=float("nan"))
    attempt("agree=0.5: expected a share above 0.5", agree=0.5)
    attempt("no model to merge", [])
    attempt("output .*m0: is what an input names, and would be replaced", out=root / "m0")
    attempt("base/../base: is what an input names", out=root / "base" / ".." / "base")
    attempt("base/new: lies in the folder of an input", out=base / "new")
    attempt("m0 is given twice", [root / "m0", root / "m0"])
    attempt("base is given twice", [base])
    attempt("nowhere: no such directory", [tmp_path / "nowhere"])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    attempt("pickled/pytorch_model.bin: pickled weights; only safetensors are read", [tmp_path / "pickled"])
    weights = {name: value for name, value in others[0].items() if name != "lm_head.weight"}
    norm = "model.layers.3.mlp.up_proj.weight"

    def variant(name, changed):
        (tmp_path / name).mkdir()
        save_file(changed, tmp_path / name / "model.safetensors")
        return [root / "m1", tmp_path / name]

    attempt(
        rf"{norm} is in .*base/model-0000.-of-0000..safetensors and not in .*fewer \(1 tensors differ\)",
        variant("fewer", {n: v for n, v in weights.items() if n != norm}),
    )
    attempt("lm_head.weight is in .*untied/model.safetensors and not in .*base .*if it is a tied weight",
            variant("untied", {**weights, "lm_head.weight": torch.zeros(97, 32)}))  # fmt: skip
    attempt(rf"{norm} is \(2, 32\) in .*narrow/model.safetensors and \(48, 32\) in .*base/model-",
            variant("narrow", {**weights, norm: torch.zeros(2, 32)}))  # fmt: skip
    attempt(
        f"integer/model.safetensors: {norm} is I32, packed or quantised: expected one of F64",
        variant("integer", {**weights, norm: weights[norm].int()}),
    )
    cut = variant("cut", weights)
    path = cut[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    attempt(f"{path}: not a whole safetensors file", cut)
    raw = raw_model(tmp_path / "quantised", x=torch.zeros(1))
    (raw / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    attempt(
        "quantised/config.json: quantization_config: its weights are quantised, expected plain ones",
        start=raw,
        given=[raw_model(tmp_path / "q2", x=torch.zeros(1))],
    )
    (tmp_path / "mixed").mkdir()
    for source in base.iterdir():
        if not source.name.startswith("model-00002-of"):
            os.link(source, tmp_path / "mixed" / source.name)
    attempt("model-00002-of-0000..safetensors: no such file: copy it too", start=tmp_path / "mixed")


@pytest.mark.parametrize("who", ["base", "m0"])
def test_nan_and_overflow_are_named(who, tmp_path):
    good, bad = torch.ones(3, 4), torch.tensor([[1, 2, float("nan"), 3]] * 3)
    base = raw_model(tmp_path / "base", w_x=bad if who == "base" else good)
    other = raw_model(tmp_path / "m0", w_x=bad if who == "m0" else good)
    with pytest.raises(ValueError, match=f"{who}/model.safetensors: w.x holds NaN or infinity"):
        kf.merge_models(base, [other], tmp_path / "out", mode="add")
    small = raw_model(tmp_path / "small", w_x=good.half())
    large = raw_model(tmp_path / "large", w_x=good.half() * 6e4)
    with pytest.raises(ValueError, match="w.x: the merged values go beyond F16: lower alpha"):
        kf.merge_models(small, [large], tmp_path / "out2", mode="add", alpha=3)


def test_the_command_line(five, tmp_path, capsys):
    root, _, _ = five
    command = [
        "merge",
        "--base",
        str(root / "base"),
        "--models",
        str(root / "m0"),
        str(root / "m1"),
        "--mode",
        "negate",
    ]
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a" / "merge.json").read_text()) and printed["method"] == "consensus"
    assert cli.main([*command, "--out", str(tmp_path / "b"), "--method", "mean", "--alpha", "0.5"]) == 0
    shown = capsys.readouterr()
    assert "entries" in shown.out and "agree in sign" in shown.out and "B/s" in shown.err  # the bar
    assert cli.main([*command, "--out", str(root / "m1")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("m1: is what --models names, and would be replaced: give another") and "\n" not in said
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 2
    assert "is not empty: give another one, or delete it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(command[:-2] + ["--out", str(tmp_path / "c")])
    assert "--mode" in capsys.readouterr().err
