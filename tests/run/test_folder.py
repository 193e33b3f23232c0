"""Nothing of the user's is lost: what lies in --out stays, byte for byte; what is not ours is not read or removed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text
from safetensors.torch import load_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.files.lock import hold
from kunbr_fast.files.models import load_model
from kunbr_fast.run.folder import FINISHED, MARKER, NAME, CheckpointFolder

HERE = Path(__file__).parent.parent
SETTINGS = """--num-blocks 3 --top-k 2 --batch-size 6 --warmup-epochs 1 --warmup-lr 1e-3 --block-epochs 1
    --block-lr 1e-3 --target letter --rtt-lrs 1e-3 --rtt-epochs 1 --checkpoint-every 1""".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("folder"))


def arguments(workspace, *more):
    return ["unlearn", *tiny_text.inputs(workspace), *SETTINGS, *map(str, more)]


def contents(folder):
    """Every file below, and every link, by name."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in paths}


def refusal(capsys, command):
    capsys.readouterr()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def begun(workspace, tmp_path_factory):
    """A run that was interrupted when both blocks were trained."""
    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kunbr_fast.run.stages.Stages.merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(arguments(workspace, "--out", out, "--quiet")) == 130
    return out


@pytest.fixture
def interrupted(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(workspace, begun, tmp_path_factory):
    out = Path(shutil.copytree(begun, tmp_path_factory.mktemp("finished") / "out"))
    assert cli.main(arguments(workspace, "--out", out, "--resume", "--quiet")) == 0
    return out


# ---------------------------------------------------------------- kills

RUNNER = HERE / "kill_everywhere.py"


def killed_at_events(workspace, root, first, stride, limit):
    command = [sys.executable, RUNNER, root, first, stride, limit, *arguments(workspace), "--quiet"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert not found["wrong"], found["wrong"]
    return found


def test_killed_at_any_change_on_the_disk_it_resumes_to_the_same_bits(workspace, tmp_path):
    """At every 60th unlink, rename, fsync, mkdir and rmdir; `make test-slow` has them all."""
    found = killed_at_events(workspace, tmp_path, 4, 60, 24)
    assert found["events"] > 200 and found["tried"] > 4


def test_killed_at_the_last_changes_on_the_disk_it_is_known_to_be_finished(workspace, finished, tmp_path, capsys):
    """After any of the removals at the end, and whatever the next run is."""
    out = shutil.copytree(finished, tmp_path / "run")
    report = (finished / "report.json").read_bytes()
    for left in ("blocks.0.0-2.safetensors", "state.json", MARKER, None):  # what the removal had come to
        folder = out / NAME
        folder.mkdir()
        if left is not None:
            write_sealed(folder / MARKER, {"phase": FINISHED, "overwrite": False})
            (folder / left).exists() or (folder / left).write_bytes(b"half of it is gone")
        for more in (["--seed", 7], ["--warmup-lr", 1e-4]):
            assert "already holds a finished run" in refusal(capsys, arguments(workspace, "--out", out, *more))
            assert "finished run with" in refusal(capsys, arguments(workspace, "--out", out, *more, "--resume"))
        assert cli.main(arguments(workspace, "--out", out, "--resume", "--quiet")) == 0
        assert "this run is finished" in capsys.readouterr().out and not folder.exists()
        assert (out / "report.json").read_bytes() == report
    assert cli.main(arguments(workspace, "--out", out, "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(report)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_killed_at_every_change_on_the_disk(part, workspace, tmp_path):
    assert killed_at_events(workspace, tmp_path, 1 + part, 8, 1000)["tried"] > 20


# ---------------------------------------------------------------- what is in --out


def test_foreign_files_stay(workspace, tmp_path, capsys):
    """Beside the result, in folders that earlier versions took for theirs, and in the checkpoint folder itself."""
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    victim.write_text("elsewhere")
    for name in (
        "work/thesis",
        "kunbr/thesis",
        "thesis.txt",
        ".saving-me/x",
        ".report.json.0123456789ab.tmp",
        "data.bin",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    inside = (
        "thesis",
        "rank-0/thesis",
        "rank-x/rtt-weights.safetensors",
        "warmup.safetensors.bak",
        ".warmup.tmp",
        "state.old",
    )

    def stop(*args):
        for name in inside:
            path = out / NAME / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        for name in ("link", "reference.safetensors"):
            (out / NAME / name).symlink_to(victim)
        raise KeyboardInterrupt

    before = contents(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kunbr_fast.run.stages.Stages.merge", stop)
        assert cli.main(arguments(workspace, "--out", out, "--quiet")) == 130
    capsys.readouterr()
    assert cli.main(arguments(workspace, "--out", out, "--resume")) == 0
    after = contents(out)
    assert {name: after[name] for name in before} == before and victim.read_text() == "elsewhere"
    left = {name.removeprefix(f"{NAME}/"): value for name, value in after.items() if name.startswith(NAME)}
    links = dict.fromkeys(("link", "reference.safetensors"), str(victim))
    assert left == {name: name.encode() for name in inside} | links
    assert "stays, since it holds what is not of this run: .warmup.tmp, link, rank-0 and" in capsys.readouterr().err
    assert cli.main(arguments(workspace, "--out", out, "--resume", "--quiet")) == 0
    assert contents(out) == after


NAMES = """report.json run.yaml density.png relearning.png unlearning.json report.html evaluation.json evaluation.csv
    config.json generation_config.json model.safetensors
    model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json tokenizer_config.json
    other.safetensors pytorch_model.bin chat_template.jinja""".split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_files_named_like_ours_are_not_replaced(name, kind, workspace, tmp_path, capsys):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("mine")
    if kind == "link":
        (out / name).symlink_to(victim)
    elif kind == "folder":
        (out / name).mkdir()
        (out / name / "x").write_text("mine")
    else:
        (out / name).write_text("mine")
    before = contents(tmp_path)
    error = refusal(capsys, arguments(workspace, "--out", out))
    assert name in error and contents(tmp_path) == before
    if not name.endswith((".safetensors", ".bin")) and name != "config.json":  # that is a model
        refusal(capsys, arguments(workspace, "--out", out, "--overwrite"))
        assert contents(tmp_path) == before


def test_a_checkpoint_folder_that_is_not_ours_is_refused(workspace, begun, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "state.json").write_text("{}")
    for make, said in (
        (lambda: (out / NAME).symlink_to(tmp_path / "elsewhere"), "symbolic link"),
        (lambda: (out / NAME).symlink_to(begun / NAME), "symbolic link"),
        (lambda: (out / NAME).write_text("mine"), "it is a file"),
        (lambda: shutil.copytree(tmp_path / "elsewhere", out / NAME), "not made by kunbr-fast"),
    ):
        make()
        before = contents(tmp_path)
        for more in ([], ["--resume"], ["--overwrite"]):
            assert said in refusal(capsys, arguments(workspace, "--out", out, *more))
        with pytest.raises(ValueError, match=said):
            samples = random_samples(4)
            kf.unlearn(tiny_model("llama"), samples, samples, output_dir=out, progress=False)
        assert contents(tmp_path) == before
        shutil.rmtree(out / NAME) if (out / NAME).is_dir() and not (out / NAME).is_symlink() else (out / NAME).unlink()


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_what_a_run_reads_is_never_its_output(more, workspace, tmp_path, monkeypatch, capsys):
    shutil.copytree(workspace, tmp_path / "w")
    shutil.copytree(workspace / "model", tmp_path / "mu")
    (tmp_path / "link").symlink_to(tmp_path / "w" / "model")
    (tmp_path / "w" / "model" / "work").mkdir()
    (tmp_path / "w" / "model" / "work" / "thesis").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "w")
    model = tmp_path / "w" / "model"
    for out in (".", "", "..", tmp_path / "w", "./x/..", model, "model/", model / "out", tmp_path / "link",
                "../link/new", tmp_path / "mu", tmp_path / "mu" / "a" / "b", tmp_path / "w" / "r.jsonl"):  # fmt: skip
        try:
            refusal(capsys, arguments(tmp_path / "w", "--out", out, "--unlearned", tmp_path / "mu", *more))
        except SystemExit as stop:  # argparse has refused it
            assert stop.code == 2
        assert contents(tmp_path) == before, out
    samples = random_samples(4)
    loaded = load_model(model)
    for out in ("", ".", model, model / "out", tmp_path / "link"):
        with pytest.raises(ValueError, match="current one|never overwritten"):
            kf.unlearn(loaded, samples, samples, output_dir=out, progress=False)
    assert contents(tmp_path) == before


def test_overwrite_replaces_a_model_and_a_finished_run(workspace, finished, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_text.model(seed=3, layers=8).save_pretrained(other, max_shard_size="100kB")
    assert len(list(other.glob("*.safetensors"))) > 1
    (other / "README.md").write_text("mine")
    assert "holds a model" in refusal(capsys, arguments(workspace, "--out", other))
    truth = load_file(finished / "model.safetensors")
    run = shutil.copytree(finished, tmp_path / "run")
    for out in (other, run):
        assert cli.main(arguments(workspace, "--out", out, "--overwrite", "--quiet")) == 0
        found = load_file(out / "model.safetensors")
        assert found.keys() == truth.keys() and all(found[name].equal(truth[name]) for name in truth)
        assert load_model(out).config.num_hidden_layers == 6
        assert not list(out.glob("model-*")) and not (out / "model.safetensors.index.json").exists()
    assert (other / "README.md").read_text() == "mine"
    (run / "run.yaml").write_text((run / "run.yaml").read_text() + "# edited\n")
    assert "run.yaml is no file of" in refusal(capsys, arguments(workspace, "--out", run, "--overwrite"))


def test_overwrite_leaves_what_the_run_reads(workspace, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    before = contents(out)
    for name in ("run.yaml", "../link.yaml"):
        (tmp_path / "link.yaml").exists() or (tmp_path / "link.yaml").symlink_to(out / "run.yaml")
        command = arguments(workspace, "--out", out, "--overwrite", "--config", out / name)
        assert "is read by this run" in refusal(capsys, command)
    assert contents(out) == before


def test_the_library_keeps_to_the_same(tmp_path):
    samples, out = random_samples(6), tmp_path / "out"
    config = kf.KUnBRConfig(overlap="allow", num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1, rtt=False)
    (out / "work").mkdir(parents=True)
    (out / "work" / "thesis").write_text("mine")

    def run(**options):
        return kf.unlearn(tiny_model("llama"), samples, samples, config, output_dir=out, progress=False, **options)

    with pytest.raises(ValueError, match="holds no run to resume"):
        run(resume=True)
    run(before_cleanup=lambda report: CheckpointFolder(out).check())
    assert contents(out) == {"work/thesis": b"mine"}
    (out / NAME).mkdir()
    write_sealed(out / NAME / MARKER, {"phase": FINISHED, "overwrite": False})
    with pytest.raises(ValueError, match="its run is finished, and what was left"):
        run(resume=True)
    assert contents(out) == {"work/thesis": b"mine"} and not (out / NAME).exists()


def test_an_unfinished_run_is_neither_overwritten_nor_begun_twice(workspace, interrupted, capsys):
    before = contents(interrupted)
    for more in ([], ["--overwrite"], ["--seed", 5]):
        assert "unfinished run" in refusal(capsys, arguments(workspace, "--out", interrupted, *more))
    with hold(interrupted):
        for more in (["--resume"], [], ["--overwrite"]):
            said = refusal(capsys, arguments(workspace, "--out", interrupted, *more))
            assert f"{interrupted} is in use by process {os.getpid()} on " in said
    assert contents(interrupted) == before


def test_resume_needs_a_run(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    command = arguments(workspace, "--out", out, "--resume")
    assert "holds no run to resume: leave resume out (--resume)" in refusal(capsys, command) and not out.exists()
    (out / "work").mkdir(parents=True)
    (out / "work" / "state.json").write_text('{\n  "format": 1,\n  "identity": "00", "config": {}, "stages": {}}')
    assert f"{out / 'work'} is of an earlier version" in refusal(capsys, command)
    before = contents(out)
    assert cli.main(arguments(workspace, "--out", out)) == 0
    assert f"{out / 'work'} holds checkpoints of an earlier version" in capsys.readouterr().err
    assert {name: value for name, value in contents(out).items() if name in before} == before


def test_bad_settings_leave_nothing(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    refusal(capsys, arguments(workspace, "--out", out, "--top-k", 5))
    assert contents(tmp_path) == {} and not (out / NAME).exists()


# ---------------------------------------------------------------- state.json


def test_no_flipped_bit_of_a_state_passes(interrupted, tmp_path):
    for path in (interrupted / NAME / "state.json", interrupted / NAME / MARKER):
        data, changed = path.read_bytes(), tmp_path / path.name
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            changed.write_bytes(flipped)
            with pytest.raises(ValueError, match="damaged"):
                read_sealed(changed, "")
        for cut in (0, 1, 100, len(data) - 1):
            changed.write_bytes(data[:cut])
            with pytest.raises(ValueError, match="damaged"):
                read_sealed(changed, "")


def test_a_changed_density_is_not_taken(workspace, interrupted, capsys):
    """Neither with its checksum as it was, nor with one made anew: the blocks would be others than those recorded."""
    path = interrupted / NAME / "state.json"
    text = path.read_text()
    state = json.loads(text)
    values = state["stages"]["density"]["density"]["per_layer"]
    path.write_text(text.replace(repr(values[0]), repr(values[0] + 1.0), 1))
    assert "damaged" in refusal(capsys, arguments(workspace, "--out", interrupted, "--resume"))
    del state["sha256"]
    state["stages"]["selection"]["blocks"] = [[2, 4], [4, 6]]
    write_sealed(path, state)
    said = refusal(capsys, [*arguments(workspace, "--out", interrupted, "--resume"), "--quiet"])
    assert "blocks [[2, 4], [4, 6]] were selected" in said


def hostile(state, place, value):
    """The state with `value` at a place in it, "a/b/c"."""
    here, keys = state, place.split("/")
    for key in keys[:-1]:
        here = here[int(key) if isinstance(here, list) else key]
    here[int(keys[-1]) if isinstance(here, list) else keys[-1]] = value


ELSEWHERE = "../../victim.txt ../victim.txt /etc/hostname thesis . state.json a/b warmup.safetensors/..".split() + [
    "",
    "x\0y",
]
EXTRA = {"epochs": [], "sums": None, "recent": [], "seconds": 0.0, "micro_batch_tokens": None}
PROGRESS, SHA = {"step": 1, "extra": EXTRA, "confirmed": True}, {"sha256": "0" * 64}
MINE = {"file": "blocks.0.0-2-step-1.safetensors"} | SHA
PLACES = {
    "stages/warmup/file": ELSEWHERE,
    "stages/blocks.0.0-2/file": [*ELSEWHERE, "warmup.safetensors"],
    "progress": [
        {"blocks.0.0-2": [PROGRESS | files]}
        for files in (
            *({"file": file} | SHA for file in ELSEWHERE),
            *({"ranks": [{"file": file} | SHA]} for file in (*ELSEWHERE[:4], "blocks.0.0-2-step-1.rank-1.safetensors")),
            *({"ranks": []}, {"ranks": [MINE]}, {}, SHA, MINE | {"ranks": [MINE]}),
        )
    ],
    "kept": [{"original": {"file": file, "sha256": "0" * 64}} for file in ELSEWHERE]
    + [{"thesis": {"file": "thesis", "sha256": "0" * 64}}, {"..": {"file": "...safetensors", "sha256": ""}}],
    "stages/..": [{"file": "...safetensors", "sha256": "0" * 64}],
    "stages": [
        [],
        None,
        "x",
        {"blocks.0.a-b": {}},
        {"blocks.0.0-2/../../victim": {}},
        {"warmup": None},
        {"warmup": []},
    ],
    "stages/warmup/sha256": [None, 5, [], "0" * 64, ""],
    "stages/density/seconds": [-1, 1e308, None, "x"],
    "stages/evaluation.original": [
        {"accuracy": {"forget": {"plain": share, "calibrated": None, "num_questions": number}}, "seconds": 1}
        for share, number in ((7.0, 3), (-0.1, 3), (0.5, -3), (0.5, 0), (0.5, 1.5))
    ],
    "stages/rtt.\x1b[31m": [
        {"rows": [{"fold": "\x1b", "lr": 1.0, "epoch": 0, "plain": 0.5, "calibrated": None}], "seconds": 1}
    ],
    "stages/density/density": [None, [], 3, "x", {}],
    "stages/selection/blocks": [None, 3, [[0]], [["a", "b"]], {}],
    "config": [None, [], 3],
    "config/nothing": [9],
    "config/block_lr": [-1, "x", None, []],
    "identity": [None, 3, []],
    "format": [1, 3, None, "2", 2.5, []],
}


def test_hostile_states_are_refused_and_nothing_is_removed(workspace, interrupted, tmp_path, capsys):
    (tmp_path / "victim.txt").write_text("mine")
    (interrupted / "victim.txt").write_text("mine")
    (interrupted / NAME / "thesis").write_text("mine")
    path = interrupted / NAME / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    command = [*arguments(workspace, "--out", interrupted, "--resume"), "--quiet"]
    passed = []
    for place, values in PLACES.items():
        for value in values:
            changed = json.loads(json.dumps(state))
            hostile(changed, place, value)
            write_sealed(path, changed)
            before = contents(tmp_path)
            capsys.readouterr()
            status, error = cli.main(command), capsys.readouterr().err
            after = contents(tmp_path)
            lost = {name for name in before if name not in after}
            if status != 2 or error.count("\n") != 1 or lost or "Traceback" in error:
                passed.append((place, value, status, error, lost))
            shutil.rmtree(interrupted / NAME)
            (interrupted / NAME).mkdir()
            for name, content in before.items():
                if name.startswith(f"run/{NAME}/"):
                    (tmp_path / name).parent.mkdir(exist_ok=True)
                    (tmp_path / name).write_bytes(content)
    assert not passed


@pytest.mark.parametrize("name", ["state.json", "warmup.safetensors", "blocks.0.0-2.safetensors", MARKER])
def test_a_link_in_place_of_a_file_is_refused(name, workspace, interrupted, tmp_path, capsys):
    path, moved = interrupted / NAME / name, tmp_path / "moved"
    shutil.move(path, moved)
    path.symlink_to(moved)
    before = contents(tmp_path)
    refusal(capsys, arguments(workspace, "--out", interrupted, "--resume", "--quiet"))
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- files that change while a run is on


@pytest.mark.parametrize(
    "name, when",
    [
        ("original.safetensors", "in the warm-up"),
        ("warmup.safetensors", "before the merge"),
        ("blocks.0.0-2.safetensors", "before the merge"),
        ("rtt-weights.safetensors", "in the attack"),
    ],
)
def test_a_file_that_changes_while_the_run_is_on_is_not_read_back(name, when, workspace, tmp_path, monkeypatch, capsys):
    """One bit of it, and its time of modification as it was."""
    out, done = tmp_path / "out", []

    def flip():
        path = out / NAME / name
        if done or not path.is_file():
            return
        done.append(path)
        times, data = path.stat(), bytearray(path.read_bytes())
        data[-7] ^= 4
        with open(path, "r+b") as file:
            file.write(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def before(owner, method):
        real = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *args, **kwargs: (flip(), real(*args, **kwargs))[1])

    from kunbr_fast.evaluation import rtt
    from kunbr_fast.run.stages import Stages
    from kunbr_fast.training.full import FullTraining

    if when == "before the merge":
        before(Stages, "merge")
    elif when == "in the warm-up":
        before(FullTraining, "step_packed")
    else:
        before(rtt, "measure_all")
    error = refusal(capsys, arguments(workspace, "--out", out, "--quiet"))
    assert done and str(done[0]) in error and "damaged (SHA-256" in error
    assert not (out / "config.json").exists()


# ---------------------------------------------------------------- a model that is replaced


def test_what_is_no_model_is_not_replaced(workspace, finished, tmp_path, capsys):
    """Judged by content: names that a model's files have are anybody's."""
    mine = {"config.json": '{"port": 8080}', "tokenizer.json": '{"mine": 1}', "vocab.txt": "my words"}
    for name, text in (*mine.items(), ("model-00001-of-00001.safetensors", "results"), ("chat_template.jinja", "x")):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(text)
        assert f"{name} is no file of a model" in refusal(capsys, arguments(workspace, "--out", out, "--overwrite"))
        if name in mine and name != "vocab.txt":  # also beside a model
            model = shutil.copytree(finished, tmp_path / f"model-{name}")
            (model / name).write_text(text)
            before = contents(model)
            refusal(capsys, arguments(workspace, "--out", model, "--overwrite"))
            assert contents(model) == before
    for name in ("adapter_config.json", "pytorch_model.bin"):
        model = shutil.copytree(finished, tmp_path / f"model-{name}")
        (model / name).write_text("{}")
        for more in ([], ["--overwrite"]):
            refusal(capsys, arguments(workspace, "--out", model, *more))
        assert (model / name).read_text() == "{}"


def test_nothing_of_the_replaced_model_is_mixed_with_the_result(workspace, tmp_path):
    """Neither its tokenizer's files nor its plots; other files stay."""
    fresh, out = tmp_path / "fresh", tmp_path / "out"
    assert cli.main(arguments(workspace, "--out", out, "--quiet")) == 0
    assert (out / "relearning.png").exists()
    (out / "special_tokens_map.json").write_text('{"eos_token": "B"}')
    (out / "added_tokens.json").write_text('{"was": 401}')
    (out / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (out / "vocab.json").write_text('{"a": 0}')
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "default.jinja").write_text("old")
    (out / "README.md").write_text("mine")
    assert cli.main(arguments(workspace, "--out", fresh, "--no-rtt", "--quiet")) == 0
    assert cli.main(arguments(workspace, "--out", out, "--no-rtt", "--quiet", "--overwrite")) == 0
    there, new = contents(out), contents(fresh)
    assert there.pop("README.md") == b"mine"
    assert there.keys() == new.keys() and "relearning.png" not in there
    assert all(
        there[name] == new[name] for name in new if name not in ("report.json", "report.html", "unlearning.json")
    )


def test_overwrite_removes_nothing_before_the_result_is_complete(workspace, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "run")
    before = contents(out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kunbr_fast.files.saving.write_like", full)
        assert cli.main(arguments(workspace, "--out", out, "--overwrite", "--seed", 3, "--quiet")) == 2
    assert {name: value for name, value in contents(out).items() if not name.startswith(NAME)} == before
    assert cli.main(arguments(workspace, "--out", out, "--resume", "--seed", 3, "--quiet")) == 0
    assert not contents(out)["model.safetensors"] == before["model.safetensors"]


def test_the_library_removes_nothing_where_it_writes_nothing(workspace, finished, tmp_path, monkeypatch):
    samples, settings = random_samples(6), dict(num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1)
    config, out = kf.KUnBRConfig(**settings, overlap="allow"), shutil.copytree(finished, tmp_path / "run")
    before = contents(out)
    kf.unlearn(tiny_model("llama"), samples, samples, config, output_dir=out, progress=False, overwrite=True)
    assert contents(out) == before
    monkeypatch.chdir(out.parent)
    model = load_model("run")
    monkeypatch.chdir(tmp_path.parent)  # where the name that it was loaded by leads nowhere
    for name in (model.config.name_or_path, "", "someone/model"):
        model.config.name_or_path = name
        with pytest.raises(ValueError, match="has the weights of the one given"):
            kf.unlearn(model, samples, samples, config, output_dir=out, progress=False, overwrite=True)
        assert contents(out) == before


def test_a_place_that_can_be_no_folder_is_said(workspace, tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for out, said in (("link", "link to nothing"), ("link/x", "link to nothing"), ("file/x/y", "it is a file")):
        assert f"{said}: give the result a folder" in refusal(capsys, arguments(workspace, "--out", tmp_path / out))


# ---------------------------------------------------------------- a finished run is the one that was asked for


def test_a_finished_run_resumes_only_as_the_same(workspace, finished, tmp_path, capsys):
    other = shutil.copytree(workspace, tmp_path / "w")
    tiny_text.model(seed=1).save_pretrained(other / "mu")
    same = arguments(workspace, "--out", finished, "--resume")
    before = contents(finished)
    for change, said in (
        (["--dtype", "float64"], "dtype was float32 and is float64 now"),
        (["--unlearned", other / "mu"], "with another unlearned model"),
        (["--retain-questions", other / "f0.jsonl", "--overlap", "allow"], "its data are not those given now"),
    ):
        assert said in refusal(capsys, [*same, *map(str, change)])
    tiny_text.write_jsonl(other / "r.jsonl", [tiny_text.question(n) for n in tiny_text.NAMES[13:]])
    assert "its data are not" in refusal(capsys, arguments(other, "--out", finished, "--resume"))
    shutil.copy(workspace / "r.jsonl", other / "r.jsonl")
    assert cli.main([*arguments(other, "--out", finished, "--resume"), "--quiet"]) == 0  # wherever it lies
    tiny_text.model(seed=1).save_pretrained(other / "model")
    assert "its model is not the one given now" in refusal(capsys, arguments(other, "--out", finished, "--resume"))
    assert contents(finished) == before


def test_a_finished_run_whose_model_is_not_whole_says_so(workspace, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    command = arguments(workspace, "--out", out, "--resume")
    assert cli.main(command) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        path, data = out / name, (finished / name).read_bytes()
        for content, said in (
            (None, "missing"),
            (data[:100], f"damaged (it has 100 bytes, {len(data)} were written)"),
            (data[:-7] + bytes([data[-7] ^ 4]) + data[-6:], "damaged (its bytes changed)"),
        ):
            path.unlink() if content is None else path.write_bytes(content)
            error = refusal(capsys, command)
            assert f"{path}: {said}" in error and "move it away, or give another output directory" in error
        path.write_bytes(data)
    text = (out / "report.json").read_text()
    for changed, said in ((text.replace('"blocks"', '"blocks" ').replace("0.25", "0.75"), "damaged or edited"),
                          (text[:-30], "is not that of a finished run, or damaged")):  # fmt: skip
        (out / "report.json").write_text(changed)
        assert f"report.json{'' if said[0] == 'i' else ':'} {said}" in refusal(capsys, command)
    report = json.loads(text)
    del report["result"]
    (out / "report.json").write_text(json.dumps(report))
    assert "an earlier version wrote it" in refusal(capsys, command)


def test_resume_names_the_setting_that_makes_it_another_run(workspace, interrupted, capsys):
    for option, value, said in (
        ("--dtype", "float64", "dtype was float32"),
        ("--target", "all", "target was 'letter'"),
    ):
        assert said in refusal(capsys, arguments(workspace, "--out", interrupted, "--resume", option, value))
