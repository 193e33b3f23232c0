"""Whole runs on streamed models: the weights and the report of the run in memory, by the library and the command
line."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import streamed_models
import tiny_text
import torch
from helpers import python
from safetensors.torch import load_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.files.models import load_model, load_tokenizer
from kunbr_fast.files.saving import save_model
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.fingerprint import fingerprint
from kunbr_fast.model.streaming import open_streamed
from kunbr_fast.model.weights import weights_of
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.training.streamed import LayerMajorTraining

HERE = Path(__file__).resolve().parent
SETTINGS = dict(
    batch_size=3, retain_batch_size=3, num_blocks=3, top_k=2, block_epochs=2, block_lr=1e-3, seed=3, rtt=False
)
FORGET, RETAIN = random_samples(5, seed=1), random_samples(6, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """M0 and M_u as directories of several files."""
    paths = [tmp_path_factory.mktemp(name) for name in ("original", "unlearned")]
    for seed, path in enumerate(paths):
        tiny_model("llama", torch.float32, seed).save_pretrained(path, max_shard_size="70KB")
    return paths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The workspace of tiny_text, and an M_u beside its model."""
    root = tiny_text.workspace(tmp_path_factory.mktemp("text"))
    shutil.copytree(root / "model", root / "mu")
    tiny_text.model(seed=1).save_pretrained(root / "mu")
    return root


def run(opening, folders, out, dtype=None, **settings):
    """(report, the result's weights) of a whole run; opening: streamed_models's `whole` or `streamed`. folders: M0's,
    and M_u's if it is given."""
    model, *others = (opening(path, dtype) for path in folders)
    other = others[0] if others else None
    config = kf.KUnBRConfig(**{**SETTINGS, **settings})
    report = kf.unlearn(model, FORGET, RETAIN, config, unlearned=other, output_dir=out, progress=False)
    weights = weights_of(model)
    return report, {name: weights[name].clone() for name in weights}


def same(a, b):
    assert torch.equal(a.density.per_layer, b.density.per_layer)
    assert (a.blocks, a.losses, a.accuracy) == (b.blocks, b.losses, b.accuracy)
    assert (a.gradient_cosines, a.cache_errors) == (b.gradient_cosines, b.cache_errors)


@pytest.mark.parametrize(
    "settings",
    [
        dict(dtype="float64"),
        dict(insertion="cumulative", rounds=2, optimizer="adamw", retain_loss="hidden_layers"),
        pytest.param(
            dict(dtype="float64", objective="npo", retain_loss="kl", micro_batch_tokens=30), marks=pytest.mark.slow
        ),
        dict(objective="rmu", cache="file"),
        dict(mask="wagle", mask_ratio=0.3, adversary_every=2, adversary_lrs=(1e-3,)),
        dict(cover_precision="int8", retain_loss="kl", rounds=2),
        dict(cache_dtype="fp8", num_blocks=2, top_k=2, skip_last_layers=0),
    ],
    ids=["plain", "cumulative", "npo", "rmu", "mask", "cover", "cache"],
)
def test_a_streamed_run_has_the_resident_bits(settings, folders, tmp_path):
    truth, weights = run(streamed_models.whole, folders, tmp_path / "whole", **settings)
    ours, streamed = run(streamed_models.streamed, folders, tmp_path / "streamed", **settings)
    same(ours, truth)
    assert list(streamed) == list(weights) and not (tmp_path / "streamed/kunbr-checkpoints").exists()
    for name in weights:
        assert torch.equal(streamed[name], weights[name].to(torch.float32).to(weights[name].dtype)), name
    given = Shards(folders[1])
    changed = {name for name in weights if not torch.equal(weights[name].float(), given[name])}
    assert changed and all(any(f"layers.{i}." in name for b in truth.blocks for i in b) for name in changed)
    saved = load_model(tmp_path / "streamed")  # the files: the same, embeddings and head M_u's too
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, weights[name].float()), name
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) == len(list(folders[0].glob("*.safetensors")))


@pytest.mark.parametrize(
    "settings",
    [
        dict(dtype="float64", warmup_optimizer="adamw", micro_batch_tokens=30),
        dict(insertion="cumulative", retain_loss="hidden_layers", resident_layers=2),
        dict(dtype="bfloat16", objective="npo", retain_loss="kl", cache="file"),
        dict(objective="rmu", objective_options={"layer": 3}, top_k=0, num_blocks=6),
    ],
    ids=["adamw", "hidden", "npo", "rmu"],
)
def test_the_warm_up_of_a_streamed_run_has_the_resident_bits(settings, folders, tmp_path):
    settings = dict(warmup_epochs=2, warmup_lr=1e-3) | settings
    alone = {name: value for name, value in settings.items() if name != "resident_layers"}
    truth, weights = run(streamed_models.whole, folders[:1], tmp_path / "whole", **alone)
    ours, streamed = run(streamed_models.streamed, folders[:1], tmp_path / "streamed", **settings)
    same(ours, truth)
    assert truth.losses["warmup"] and not (tmp_path / "streamed/kunbr-checkpoints").exists()
    for name in weights:
        assert torch.equal(streamed[name], weights[name].to(torch.float32).to(weights[name].dtype)), name
    given = Shards(folders[0])
    assert any(not torch.equal(weights[name].float(), given[name]) for name in weights)


def test_no_more_than_the_buffers_and_a_block_in_memory(folders, tmp_path, monkeypatch):
    """M_u never runs as a model of its own, and layers are read a few times for a whole run, not for each batch."""
    model, other = (open_streamed(path) for path in folders)
    stream = weights_of(model)
    config = kf.KUnBRConfig(**{**SETTINGS, "objective": "npo"})
    before = fingerprint(other)
    report = kf.unlearn(model, FORGET, RETAIN, config, unlearned=other, output_dir=tmp_path, progress=False)
    assert "_slots" not in weights_of(other).__dict__ and fingerprint(other) == before
    steps = 2 * 2 * len(report.blocks)  # of two epochs each
    # the Decoder's checks, reference, density (up and down), cache, result, the logits that those of the written files
    # are compared with, and twice a step above the block
    assert max(stream.loads.values()) <= 3 + 1 + 2 + 1 + 1 + 1 + 2 * steps
    assert stream.loads[0] <= 3 + 1 + 2 + 1 + 1 + 1


def test_fingerprints_and_references_are_those_of_the_whole_model(folders):
    ours, truth = (
        Decoder(opening(folders[0], "float64")) for opening in (streamed_models.streamed, streamed_models.whole)
    )
    assert fingerprint(ours.model, FORGET) == fingerprint(truth.model, FORGET)
    needs = {"nll": ("forget",), "hidden_all": ("retain",), "layer.1": ("forget",), "layer.3": ("forget", "retain")}
    samples, stream = {"forget": FORGET, "retain": RETAIN}, ours.weights
    stream.release()
    stream.loads.clear()
    a, b = (OriginalValues.of(decoder, samples, needs, batch_tokens=30) for decoder in (ours, truth))
    assert stream.loads == {i: 1 for i in range(6)}
    assert a.values.keys() == b.values.keys()
    for kind in a.values:
        for x, y in zip(a.values[kind], b.values[kind], strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("scoring", ["letter", "choice"])
def test_accuracy_reads_each_layer_once(scoring, text, monkeypatch):
    monkeypatch.setattr("kunbr_fast.evaluation.reading.BATCH_TOKENS", 200)  # several batches
    questions = [{**tiny_text.question(name), "_where": "here"} for name in tiny_text.NAMES]
    tokenizer = load_tokenizer(text / "model")
    ours, truth = (Decoder(opening(text / "model")) for opening in (streamed_models.streamed, streamed_models.whole))
    stream = ours.weights
    stream.release()
    stream.loads.clear()
    a, b = (choice_accuracy(d, tokenizer, questions, scoring=scoring) for d in (ours, truth))
    assert a == b and stream.loads == {i: 1 for i in range(6)}


def test_another_models_values_for_a_while(folders):
    model, other = (open_streamed(path) for path in folders)
    stream, ids = weights_of(model), torch.arange(9)[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    first, second = logits(model), logits(load_model(folders[1]))
    with stream.instead(weights_of(other)):
        assert torch.equal(logits(model), second)
        with pytest.raises(ValueError, match="the model is read from there"):
            stream.save(folders[1])
    assert torch.equal(logits(model), first)


# ---------------------------------------------------------------- what is refused


def test_what_a_streamed_model_cannot_do(folders, tmp_path):
    model, other = (open_streamed(path) for path in folders)
    resident = load_model(folders[0])

    def refused(message, model, unlearned, out=tmp_path / "out", **settings):
        stages = []
        with pytest.raises(ValueError, match=message):
            kf.unlearn(
                model, FORGET, RETAIN, kf.KUnBRConfig(**{**SETTINGS, **settings}), unlearned=unlearned, output_dir=out,
                progress=False, on_stage=stages.append,
            )  # fmt: skip
        assert not stages

    refused("adversary_every=3: the warm-up's adversary is a second model", model, None, adversary_every=3)
    refused("resident_layers=7: expected 0 to 6", model, other, resident_layers=7)
    refused("resident_layers=2: the model is in memory whole", resident, None, resident_layers=2)
    refused("open the unlearned model with open_streamed too", model, resident)
    refused("open the unlearned model with open_streamed too", model, model)
    refused("the unlearned model is streamed and the original is not", resident, other)
    refused("give output_dir=", model, other, out=None)
    refused("the model is read from there", model, other, out=folders[1])
    refused("cuda_graphs=True: a streamed model", model, other, cuda_graphs=True)
    with pytest.raises(ValueError, match="is not in memory: this model is streamed"):
        WeightSnapshot.save(model, tmp_path / "weights")


def test_an_unlearned_model_that_is_not_finite(folders, tmp_path):
    def spoil(tensors):
        tensors["model.layers.5.mlp.up_proj.weight"][0, 0] = torch.inf

    broken = open_streamed(streamed_models.changed(folders[1], tmp_path, spoil))
    with pytest.raises(
        ValueError, match="the unlearned model's model.layers.5.mlp.up_proj.weight: 1 of 1536 values are NaN"
    ):
        kf.unlearn(
            open_streamed(folders[0]), FORGET, RETAIN, kf.KUnBRConfig(**SETTINGS), unlearned=broken, progress=False,
            output_dir=tmp_path / "out",
        )  # fmt: skip


# ---------------------------------------------------------------- the command line

QUICK = [
    *"--num-blocks 3 --top-k 2 --block-epochs 2 --target letter --block-lr 1e-3 --quiet".split(),
    *"--rtt-lrs 1e-3 --rtt-epochs 1".split(),
]


def command(root, out, *more, unlearned="mu", model="model"):
    files = ["--forget", str(root / "f0.jsonl"), str(root / "f1.jsonl"), "--retain", str(root / "r.jsonl")]
    given = ["--unlearned", str(root / unlearned)] if unlearned else []
    return ["unlearn", "--model", str(root / model), *given, *files, "--out", str(out), *QUICK, *more]


@pytest.fixture(scope="module")
def resident(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("resident") / "out"
    assert cli.main(command(text, out)) == 0
    return out


def as_resident(out, resident):
    ours, truth = (load_file(path / "model.safetensors") for path in (out, resident))
    assert set(ours) == set(truth) and all(torch.equal(ours[name], truth[name]) for name in truth)
    a, b = (json.loads((path / "report.json").read_text()) for path in (out, resident))
    for key in ("accuracy", "blocks", "density", "losses", "rtt"):
        assert a[key] == b[key]
    assert load_model(out) is not None and load_tokenizer(out) is not None and not (out / "kunbr-checkpoints").exists()


def test_the_command(text, resident, tmp_path, capsys):
    out = tmp_path / "out"
    (text / "model" / "pytorch_model.bin").write_bytes(b"the former weights")
    try:
        assert cli.main(command(text, out, "--stream", "--stream-cache", "20 kB")) == 0
    finally:
        (text / "model" / "pytorch_model.bin").unlink()
    printed = capsys.readouterr().out
    assert "| KUnBR " in printed
    as_resident(out, resident)
    assert not (out / "pytorch_model.bin").exists() and (out / "density.png").is_file() and (out / "run.yaml").is_file()
    assert (out / "relearning.png").is_file()


def test_the_command_with_a_cover_in_low_precision(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(command(text, out, "--stream", "--no-rtt", "--cover-precision", "int8")) == 0
    report = json.loads((out / "report.json").read_text())
    cosines = report["gradient_cosines"]
    assert len(cosines) == 2 and all(0.999 < found <= 1 for found in cosines.values())
    assert capsys.readouterr().out and (out / "model.safetensors").is_file()


KILLED = {
    "in the second block": ["--insertion", "cumulative"],
    "a shard of the result is written": [],
}


@pytest.mark.parametrize("point", [pytest.param(p, marks=[pytest.mark.slow] if "block" in p else []) for p in KILLED])
def test_killed_and_resumed(point, text, resident, tmp_path):
    out, more = tmp_path / "out", ["--stream", *KILLED[point]]
    done = python(HERE.parent / "kill_runner.py", point, *command(text, out, *more))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (out / "kunbr-checkpoints" / "state.json").is_file() and not (out / "config.json").exists()
    assert cli.main(command(text, out, *more, "--resume")) == 0
    if KILLED[point]:
        resident = tmp_path / "resident"
        assert cli.main(command(text, resident, *KILLED[point])) == 0
    as_resident(out, resident)


def test_all_five_stages_killed_in_the_warm_up_and_in_the_attack(text, tmp_path, monkeypatch, capsys):
    """No M_u is given. The first process is killed in the warm-up, the second one ends in the attack."""
    more = ["--warmup-epochs", "2", "--warmup-lr", "1e-3", "--checkpoint-every", "1", "--resident-layers", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli.main(command(text, whole, *more[:-2], unlearned=None)) == 0
    mine = [*command(text, out, *more, unlearned=None), "--stream", "--stream-cache", "30 kB"]
    done = python(HERE.parent / "kill_runner.py", "in the warm-up, half of the layers updated", *mine)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    state = json.loads((out / "kunbr-checkpoints/state.json").read_text())
    assert state["progress"]["warmup"] and "blocks" not in str(list(state["stages"]))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kunbr_fast.evaluation.rtt.train_all", stop)
        assert cli.main([*mine, "--resume"]) == 130
    assert cli.main([*mine, "--resume"]) == 0
    capsys.readouterr()
    as_resident(out, whole)


def test_a_file_that_changes_under_the_run(text, resident, tmp_path, monkeypatch, capsys):
    """Another model's file, of the same size, in the second block: one line; with the file back the resident bits."""
    model, out, steps = tmp_path / "model", tmp_path / "out", []
    shutil.copytree(text / "model", model)
    real = LayerMajorTraining.step_packed

    def step(training, *args, **kwargs):
        steps.append(training)
        if training is not steps[0]:
            shutil.copyfile(text / "mu/model.safetensors", model / "model.safetensors")
        return real(training, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LayerMajorTraining, "step_packed", step)
        assert cli.main(command(text, out, "--stream", "--checkpoint-every", "1", model=model)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{model / 'model.safetensors'}: changed while it was in use" in said[0]
    assert not (out / "config.json").exists()
    assert cli.main(command(text, out, "--stream", "--resume", model=model)) == 2  # it is another model
    assert "its model is not the one given now" in capsys.readouterr().err
    shutil.copyfile(text / "model/model.safetensors", model / "model.safetensors")
    assert cli.main(command(text, out, "--stream", "--resume", model=model)) == 0
    as_resident(out, resident)


def test_resuming_with_another_unlearned_model(text, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kunbr_fast.run.output.write_report", stop)
        assert cli.main(command(text, tmp_path / "out", "--stream")) == 130
    assert cli.main(command(text, tmp_path / "out", "--stream", "--resume", unlearned="model")) == 2
    assert "with another unlearned model" in capsys.readouterr().err


def test_density_of_a_streamed_model(text, tmp_path, capsys):
    arguments = ["density", "--model", str(text / "model"), "--forget", str(text / "f0.jsonl"), "--num-blocks", "3",
                 "--top-k", "1", "--quiet", "--json"]  # fmt: skip
    found = []
    for more in ([], ["--stream"], ["--stream", "--cache", "file"]):
        assert cli.main([*arguments, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]


def test_wrong_options(text, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    shutil.copytree(text / "model", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for arguments, message in (
        (command(text, tmp_path / "out", "--stream-cache", "1GiB"), "--stream-cache without --stream"),
        (
            command(text, tmp_path / "out", "--stream", model=pickled),
            "pickled weights; only safetensors are read",
        ),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory


def run_in_little_memory(original, unlearned, out):
    """In a process of its own: at most streamed_models.HEADROOM bytes of private memory above what the imports take."""
    import kunbr_fast.run.unlearn  # noqa: F401 -- `kf.unlearn` imports it late, which would count (75 MB)

    limit = streamed_models.memory("VmData") + streamed_models.HEADROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = streamed_models.memory("VmRSS")
    config = kf.KUnBRConfig(batch_size=4, num_blocks=32, top_k=1, skip_last_layers=8, block_epochs=1, block_lr=1e-4)
    report = kf.unlearn(
        open_streamed(original), FORGET[:4], RETAIN[:4], config, unlearned=open_streamed(unlearned), output_dir=out,
        progress=False,
    )  # fmt: skip
    print(json.dumps({"resident": streamed_models.memory("VmHWM") - start, "block": report.blocks[0].start}))


@pytest.mark.slow
def test_a_whole_run_of_a_model_that_does_not_fit(tmp_path):
    """537 MB of weights (and as much for M_u, here the same files), 200 MiB of private memory, from density to the
    files."""
    original, out = tmp_path / "original", tmp_path / "out"
    original.mkdir()
    streamed_models.write_large(original)
    unlearned = tmp_path / "unlearned"
    shutil.copytree(original, unlearned, copy_function=os.link)
    code = (
        f"import test_stream_unlearn as t; t.run_in_little_memory({str(original)!r}, {str(unlearned)!r}, {str(out)!r})"
    )
    code = f"import sys; sys.path.append({str(HERE)!r}); {code}"
    # what is freed goes back to the system and does not stay in the heap
    done = python("-c", code, MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="1000000")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] < streamed_models.HEADROOM + (64 << 20)  # with the pages of a file or two
    before, after = Shards(original), Shards(out)
    assert set(before.files) == set(after.files)
    inside = f"model.layers.{found['block']}."
    for name in before.files:
        if ".layers." not in name or name.split(".")[2] in (str(found["block"]), "0", "31"):
            assert torch.equal(before[name], after[name]) != name.startswith(inside), name


def five_stages(opening, path, out, private=None):
    """A whole run, from the warm-up to the attack, of `write_large`'s model. private: the most bytes of private memory
    above what the imports take."""
    import kunbr_fast.run.unlearn  # noqa: F401 -- as above

    torch.set_num_threads(1)
    if private is not None:
        limit = streamed_models.memory("VmData") + private
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(private + (8 << 20), dtype=torch.uint8)
    folds = [Fold(name, found, found) for name, found in zip("ab", LARGE_RECORDS)]
    config = kf.KUnBRConfig(
        batch_size=4, num_blocks=32, top_k=1, skip_last_layers=8, warmup_epochs=2, warmup_lr=1e-4, block_epochs=1,
        block_lr=1e-4, rtt_lrs=(1e-4,), rtt_epochs=1, checkpoint_every=1, cache="file",
    )  # fmt: skip
    model = opening(path)
    report = kf.unlearn(
        model, LARGE_RECORDS[0] + LARGE_RECORDS[1], LARGE_RECORDS[2], config, tokenizer=tiny_text.tokenizer(),
        folds=folds, output_dir=out, progress=False,
    )  # fmt: skip
    if private is None:
        save_model(model, None, out)
    found = report.to_dict()
    return {name: found[name] for name in ("accuracy", "blocks", "density", "losses", "rtt")}


LARGE_RECORDS = [[tiny_text.question(name) for name in tiny_text.NAMES[i : i + 2]] for i in (0, 2, 4)]


@pytest.mark.slow
def test_five_stages_of_a_model_that_does_not_fit(tmp_path):
    """540 MB of weights, as much of momentum, 200 MiB of private memory: the bits of the run in memory."""
    original = tmp_path / "original"
    original.mkdir()
    streamed_models.write_large(original)
    code = "import json, sys; sys.path.append({!r}); import test_stream_unlearn as t; from pathlib import Path; "
    code += "print(json.dumps(t.five_stages(t.open_streamed, Path({!r}), {!r}, t.streamed_models.HEADROOM)))"
    code = code.format(str(HERE), str(original), str(tmp_path / "ours"))
    done = python("-c", code, MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="1000000")
    assert done.returncode == 0, done.stderr[-3000:]
    truth = five_stages(streamed_models.whole, original, tmp_path / "truth")
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(truth))
    before, ours, resident = (Shards(path) for path in (original, tmp_path / "ours", tmp_path / "truth"))
    for name in before.files:
        assert torch.equal(ours[name], resident[name]), name
        assert not torch.equal(ours[name], before[name]), name
