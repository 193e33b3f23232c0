"""The command line as a user meets it."""

import json
import shutil

import pytest
import tiny_text
import transformers as tf
import yaml
from safetensors.torch import load_file

from kunbr_fast import KUnBRConfig
from kunbr_fast.cli import command as cli
from kunbr_fast.cli import terminal
from kunbr_fast.density.measure import Density
from kunbr_fast.density.select import pareto_front
from kunbr_fast.files.checksums import read_sealed, write_sealed

QUICK = (
    "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --target letter --rtt-epochs 1 --rtt-lrs 1e-3".split()
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("cli"))


def unlearn(workspace, out, *more, forget=("f0.jsonl", "f1.jsonl"), model="model", retain=("r.jsonl",)):
    return [
        "unlearn", "--model", str(workspace / model), "--forget", *(str(workspace / f) for f in forget),
        "--retain", *(str(workspace / r) for r in retain), "--out", str(out), *QUICK, "--quiet", *more,
    ]  # fmt: skip


def test_unlearn_writes_a_loadable_model_report_settings_and_plots(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(unlearn(workspace, out, "--block-lr", "1e-3", "--warmup-lr", "1e-3")) == 0
    printed = capsys.readouterr().out
    assert "| KUnBR " in printed and "| original " in printed and "recovery" in printed
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert tf.AutoTokenizer.from_pretrained(out).get_vocab() == tiny_text.tokenizer().get_vocab()
    report = json.loads((out / "report.json").read_text())
    before, after = load_file(workspace / "model" / "model.safetensors"), dict(model.named_parameters())
    ((start, stop),) = report["blocks"]
    assert (start, stop) != (4, 6)
    assert not before[f"model.layers.{start}.mlp.up_proj.weight"].equal(
        after[f"model.layers.{start}.mlp.up_proj.weight"].data
    )
    assert report["recovery"] == pytest.approx(
        report["rtt"]["accuracy"] - report["accuracy"]["result"]["forget"]["plain"]
    )
    settings = KUnBRConfig.load(out / "run.yaml")
    assert settings.block_lr == 1e-3 and settings.target == "letter"
    for name in ("density.png", "relearning.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (out / "kunbr-checkpoints").exists()


def test_options_win_over_the_config_file(workspace, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("block_lr: 1e-3\nseed: 4\n")
    out = tmp_path / "out"
    assert (
        cli.main(unlearn(workspace, out, "--config", str(tmp_path / "run.yaml"), "--seed", "5", "--no-rtt", "--json"))
        == 0
    )
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["block_lr"], config["seed"], config["rtt"]) == (1e-3, 5, False)
    assert yaml.safe_load((out / "run.yaml").read_text())["seed"] == 5


def test_a_finished_run_is_neither_overwritten_nor_resumed(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(unlearn(workspace, out, "--no-rtt")) == 0
    assert cli.main(unlearn(workspace, out, "--no-rtt")) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert cli.main(unlearn(workspace, out, "--no-rtt", "--resume")) == 0  # as often as one likes
    assert "this run is finished" in capsys.readouterr().out
    assert cli.main(unlearn(workspace, out, "--no-rtt", "--resume", "--seed", "7")) == 2
    assert "holds a finished run with seed = 0" in capsys.readouterr().err


def test_attacks_that_a_finished_run_has_not_made_are_named(workspace, tmp_path, capsys):
    command = unlearn(workspace, tmp_path / "out", "--warmup-epochs", "0", "--rtt-attacks")
    assert cli.main([*command, "int8", "nf4"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "int8", "--resume"]) == 0
    assert "it was attacked" not in capsys.readouterr().out
    assert cli.main([*command, "int8", "lora", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "attacked with rtt_attacks = ['int8', 'nf4']: kunbr-fast rtt --model" in said and "lrs" not in said


def test_corpus_lines_with_questions_in_files_of_their_own(workspace, tmp_path):
    for i in range(3):
        names = tiny_text.NAMES[6 * i : 6 * i + 6]
        lines = [{"text": f"{n} was born in {tiny_text.years()[n]}."} for n in names]
        tiny_text.write_jsonl(workspace / f"c{i}.jsonl", lines)
    out = tmp_path / "out"
    questions = ["--forget-questions", str(workspace / "f0.jsonl"), str(workspace / "f1.jsonl")]
    command = unlearn(
        workspace, out, *questions, "--target", "number", "--rtt-target", "all", forget=("c0.jsonl", "c1.jsonl")
    )
    command[command.index("--retain") + 1] = str(workspace / "c2.jsonl")
    assert cli.main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["accuracy"]["result"]["forget"]["num_questions"] == 12
    assert {row["fold"] for row in report["rtt"]["curves"]} == {"c0", "c1"}


def test_an_own_unlearned_model(workspace, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(workspace / "model", mine)
    tiny_text.model(seed=1).save_pretrained(mine)
    out = tmp_path / "out"
    assert cli.main(unlearn(workspace, out, "--unlearned", str(mine), "--no-rtt")) == 0
    result, given = load_file(out / "model.safetensors"), load_file(mine / "model.safetensors")
    ((start, stop),) = json.loads((out / "report.json").read_text())["blocks"]
    inside = tuple(f"model.layers.{i}." for i in range(start, stop))
    same = {name for name, value in result.items() if value.equal(given[name])}
    assert same == {name for name in result if not name.startswith(inside)}


def test_density_prints_saves_and_plots(workspace, tmp_path, capsys):
    out, plot = tmp_path / "density.json", tmp_path / "density.png"
    command = ["density", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl"),
               "--num-blocks", "3", "--top-k", "1", "--quiet", "--out", str(out), "--plot", str(plot)]  # fmt: skip
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("layer ") == 6
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["normalized"]) == pytest.approx(1)
    assert Density.load(out).per_layer.tolist() == printed["per_layer"]
    (tmp_path / "run.yaml").write_text("num_blocks: 6\nmodules: attention\n")
    assert cli.main([*command[:5], *command[9:], "--config", str(tmp_path / "run.yaml"), "--top-k", "2", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["modules"] == "attention" and len(other["blocks"]) == 2
    assert plot.stat().st_size > 1000


def test_density_statistics_estimates_and_checkpointing(workspace, capsys):
    command = ["density", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl"),
               "--num-blocks", "3", "--top-k", "1", "--quiet", "--impl", "torch"]  # fmt: skip
    results = {}
    for name, more in {
        "l1": [],
        "checkpointed": ["--gradient-checkpointing"],
        "linf": ["--statistic", "grad_linf"],
        "part": ["--sample-fraction", "0.5"],
    }.items():
        assert cli.main([*command, *more, "--json"]) == 0
        results[name] = json.loads(capsys.readouterr().out)
    assert results["checkpointed"]["per_layer"] == results["l1"]["per_layer"]
    assert (
        results["linf"]["statistic"] == "grad_linf"
        and max(results["linf"]["per_layer"]) < results["l1"]["per_layer"][0]
    )
    assert results["l1"]["standard_error"] is None and min(results["part"]["standard_error"]) > 0
    assert cli.main([*command, "--sample-fraction", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ± ") == 6 and "grad_l1" in printed and "estimate from 0.5 of the rows" in printed
    assert cli.main([*command, "--sample-fraction", "0.5", "--statistic", "grad_linf"]) == 2
    assert "only a sum over weights has an unbiased estimate" in capsys.readouterr().err


def test_density_of_two_sets(workspace, tmp_path, capsys):
    plot = tmp_path / "density.png"
    command = ["density", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl"),
               "--num-blocks", "3", "--top-k", "1", "--quiet", "--impl", "torch", "--plot", str(plot)]  # fmt: skip
    retain = ["--retain", str(workspace / "r.jsonl")]
    results = {}
    for statistic in ("fisher", "fisher_ratio", "cosine", "slug"):
        more = [] if statistic == "fisher" else retain
        out = ["--out", str(tmp_path / f"{statistic}.json")]
        assert cli.main([*command, *more, *out, "--statistic", statistic, "--json"]) == 0
        results[statistic] = json.loads(capsys.readouterr().out)
        assert Density.load(tmp_path / f"{statistic}.json").per_layer.tolist() == results[statistic]["per_layer"]
        assert plot.stat().st_size > 1000
        plot.unlink()
        assert cli.main([*command, *more, "--statistic", statistic]) == 0
        printed = capsys.readouterr().out
        assert printed.count("layer ") == 6 and statistic in printed
    assert "Pareto front" in printed and printed.count("alignment ") == 6
    assert results["slug"]["alignment"] == pytest.approx(results["cosine"]["per_layer"])
    front = pareto_front(results["slug"]["per_layer"], results["slug"]["alignment"])
    assert results["slug"]["pareto_front"] == front and printed.count(" * ") == len(front)
    assert results["cosine"]["blocks"] == [] and len(results["slug"]["blocks"]) == 1
    assert results["cosine"]["normalized"] is None and sum(results["fisher"]["normalized"]) == pytest.approx(1)
    assert cli.main([*command, "--statistic", "slug"]) == 0  # alone it is a bar for each layer
    assert "alignment" not in capsys.readouterr().out and plot.stat().st_size > 1000
    for wrong, message in (
        (["--statistic", "cosine"], "compares with a retain set"),
        ([*retain, "--statistic", "grad_l1"], "takes no retain set"),
        ([*retain, "--statistic", "cosine", "--reduction", "sample"], "cosine is of the mean gradient"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_density_with_the_rules_of_a_run(workspace, capsys):
    command = ["density", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl"),
               "--num-blocks", "3", "--skip-last-layers", "0", "--quiet", "--impl", "torch", "--json"]  # fmt: skip
    assert cli.main([*command, "--rule", "threshold", "--threshold", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["blocks"]) == 3 and found["statistic"] == "grad_l1"
    assert cli.main([*command, "--rule", "threshold", "--threshold", "1e9"]) == 0  # what was measured is not lost
    assert (printed := capsys.readouterr()) and "no block is above it, the highest has" in printed.err
    assert json.loads(printed.out) == {**found, "blocks": []}
    pareto = ["--rule", "pareto", "--statistic", "slug"]
    assert cli.main([*command, *pareto]) == 2
    assert "--rule pareto: what is aligned with the retain set is known with --retain" in capsys.readouterr().err
    assert cli.main([*command, *pareto, "--retain", str(workspace / "r.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["reduction"] == "mean"
    assert cli.main([*command, "--statistic", "slug", "--reduction", "sample"]) == 2
    assert "reduction='sample': slug is of the mean gradient; leave reduction out" in capsys.readouterr().err


def test_rtt_prints_the_curve_and_resumes(workspace, tmp_path, capsys):
    out = tmp_path / "rtt.json"
    command = ["rtt", "--model", str(workspace / "model"), "--forget", str(workspace / "f0.jsonl"),
               str(workspace / "f1.jsonl"), "--rtt-lrs", "1e-3", "--rtt-epochs", "2", "--quiet",
               "--out", str(out)]  # fmt: skip
    assert cli.main([*command, "--plot", str(tmp_path / "r.png")]) == 0
    printed = capsys.readouterr().out
    assert "RTT accuracy" in printed and printed.count("plain") == 1 and printed.count("calibrated") == 3
    first = json.loads(out.read_text())
    assert cli.main(command) == 2 and "--resume" in capsys.readouterr().err
    # one of the two folds is taken away, as if the attack had been interrupted before it
    del first["sha256"]
    half = {**first, "curves": [row for row in first["curves"] if row["fold"] == "f0"]}
    write_sealed(out, half)
    assert cli.main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in first.items() if k != "belongs_to"}
    assert read_sealed(out, "") == first
    for change, message in [
        ([*command, "--seed", "1"], "seed = 0 changed"),
        ([*command[:5], str(workspace / "r.jsonl"), *command[6:]], "the model or the questions changed"),
    ]:
        write_sealed(out, half)
        assert cli.main([*change, "--resume"]) == 2
        assert f"{out}: {message}" in capsys.readouterr().err
    for content in ("{", "[]", '{"curves": []}'):
        out.write_text(content)
        assert cli.main([*command, "--resume"]) == 2
        assert f"--out {out}: exists and is not an attack's result of kunbr-fast" in capsys.readouterr().err


def test_rtt_of_a_model_that_is_streamed(workspace, tmp_path, capsys):
    files = [str(workspace / name) for name in ("f0.jsonl", "f1.jsonl")]
    command = ["rtt", "--model", str(workspace / "model"), "--forget", *files, "--rtt-lrs", "1e-3", "--rtt-epochs", "1"]
    command += ["--rtt-attacks", "full", "lora", "--quiet"]
    found, mlp = [], ["--rtt-lora-targets", "mlp"]
    for more in ((), ("--stream", "--stream-cache", "50kB", "--resident-layers", "1")):
        out = tmp_path / f"{len(more)}.json"
        assert cli.main([*command, *mlp, "--rtt-lora-rank", "2", *more, "--out", str(out), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert json.loads(out.read_text())["belongs_to"]["lora_targets"] == ["mlp"]
    assert found[0] == found[1] and found[0]["attacks"].keys() == {"full", "lora"}
    for more, message in (
        (["--resident-layers", "1"], "resident_layers=1: the model is in memory whole: leave it out"),
        (["--stream", "--rtt-lora-targets", "gate"], "lora_targets='gate': LlamaForCausalLM's layers have no linear"),
        ([*mlp, "--resume", "--out", str(out)], "lora_rank = 2 changed since it was begun"),
    ):
        assert cli.main([*command, *more]) == 2 and message in capsys.readouterr().err


def test_adapters_of_another_rank_beside_finished_attacks(workspace, tmp_path, capsys):
    """Their settings are free until there is a curve that they have made."""
    files, out = [str(workspace / name) for name in ("f0.jsonl", "f1.jsonl")], str(tmp_path / "rtt.json")
    command = ["rtt", "--model", str(workspace / "model"), "--forget", *files, "--rtt-lrs", "1e-3", "--rtt-epochs", "1"]
    command += ["--quiet", "--out", out, "--rtt-attacks", "int8"]
    assert cli.main(command) == 0
    lora = [*command, "lora", "--resume", "--rtt-lora-rank"]
    assert cli.main([*lora, "2"]) == 0 and cli.main([*lora, "3"]) == 2
    assert "lora_rank = 2 changed since it was begun" in capsys.readouterr().err


def test_an_attack_that_is_resumed_loses_and_believes_nothing(workspace, tmp_path, capsys):
    out = tmp_path / "rtt.json"
    files = [str(workspace / name) for name in ("model", "f0.jsonl", "f1.jsonl")]
    command = ["rtt", "--model", files[0], "--forget", *files[1:], "--rtt-epochs", "1", "--quiet", "--out", str(out)]
    assert cli.main([*command, "--resume", "--rtt-lrs", "1e-4"]) == 2 and not out.exists()
    assert f"{out}: no attack to resume" in capsys.readouterr().err
    assert cli.main([*command, "--rtt-lrs", "1e-4", "1e-3"]) == 0
    both = json.loads(out.read_text())

    # fewer learning rates: what was found at the others stays, and is there for a later run
    assert cli.main([*command, "--resume", "--rtt-lrs", "1e-4"]) == 0
    one = json.loads(out.read_text())
    assert one["best"]["lr"] == 1e-4 and {row["lr"] for row in one["curves"]} == {1e-4}
    assert one["other_curves"] == [row for row in both["curves"] if row["lr"] == 1e-3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kunbr_fast.evaluation.rtt.train_all", None)  # no attack is made again
        assert cli.main([*command, "--resume", "--rtt-lrs", "1e-4", "1e-3"]) == 0
    assert json.loads(out.read_text()) == both

    # a value that was changed, and a file of a version that wrote no checksum
    text = out.read_text()
    at = text.index('"plain": ') + len('"plain": ')
    changed = text[:at] + "0.75" + text[text.index(",", at) :]
    without = json.dumps({name: value for name, value in both.items() if name != "sha256"})
    capsys.readouterr()
    for content in (changed, without):
        out.write_text(content)
        assert cli.main([*command, "--resume", "--rtt-lrs", "1e-4"]) == 2 and out.read_text() == content
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{out}: damaged" in error and "by an earlier version" in error


def test_attacks_that_were_not_rehearsed(workspace, tmp_path, capsys):
    out = tmp_path / "rtt.json"
    model, *forget, retain = (str(workspace / name) for name in ("model", "f0.jsonl", "f1.jsonl", "r.jsonl"))
    command = ["rtt", "--model", model, "--forget", *forget, "--rtt-epochs", "1", "--rtt-lrs", "1e-3", "--quiet"]
    command += ["--scoring", "choice", "--out", str(out), "--rtt-attacks"]
    others = ["other_facts", "--other-facts"]
    for wrong, message in (
        (
            ["other_facts"],
            "other_facts has nothing to teach: give facts of the folds' form that are not in them (--other-",
        ),
        (["full", "--other-facts", retain], "--other-facts without the attack other_facts"),
        ([*others, forget[0]], f"{forget[0]}:1 and {forget[0]}:1 are the same fact, in a fold and in the other facts"),
        (["lyon"], "rtt_attacks='lyon': expected some of full, "),
    ):
        assert cli.main([*command, *wrong]) == 2 and message in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, "int8", *others, retain, "--plot", str(tmp_path / "r.png")]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["attack", "-" * 11, "before", "guessing", "int8", "other_facts"]
    assert " ± " in printed and printed.count("smooth") == 2 + 2 and "leak at 64" in printed
    assert set(written["attacks"]) == {"int8", "other_facts"} and written["strongest"]["attack"] in written["attacks"]
    # another attack later; what was taught is not forgotten, and may not change
    assert cli.main([*command, "int8", "--resume"]) == 0
    assert json.loads(out.read_text())["belongs_to"] == written["belongs_to"]
    (tmp_path / "o.jsonl").write_text((workspace / "r.jsonl").read_text().split("\n")[0])
    capsys.readouterr()
    assert cli.main([*command, *others, str(tmp_path / "o.jsonl"), "--resume"]) == 2
    assert f"{out}: what --other-facts holds changed" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kunbr_fast.evaluation.rtt.train_all", None)
        assert cli.main([*command, "int8", *others, retain, "--resume"]) == 0
    assert json.loads(out.read_text()) == written


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "grad_density" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert "torch" in json.dumps(json.loads(capsys.readouterr().out))


def _write(path, text):
    path.write_text(text)
    return path.name


BAD = {
    "malformed line": (
        lambda w: {"forget": [_write(w / "x.jsonl", '{"text": "a b c"}\n{"text": \n')]}, "x.jsonl:2: not JSON"
    ),
    "wrong answer": (
        lambda w: {"forget": [_write(w / "x.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2}\n')]},
        "x.jsonl:1: 'answer' must be the index of the right choice, 0 to 1, got 2",
    ),
    "empty file": (lambda w: {"retain": [_write(w / "x.jsonl", "\n")]}, "x.jsonl: empty"),
    "no such file": (lambda w: {"forget": ["none.jsonl"]}, "none.jsonl: no such file"),
    "no such model": (lambda w: {"model": "nowhere"}, "nowhere: no such directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, workspace, tmp_path, capsys):
    change, message = BAD[case]
    assert cli.main(unlearn(workspace, tmp_path / "out", **change(workspace))) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "data check", "density"])
def test_a_model_that_is_not_there_is_said_to_be_missing(command, workspace, tmp_path, capsys):
    files = [workspace / "f0.jsonl"] if command == "data check" else ["--forget", workspace / "f0.jsonl"]
    assert cli.main([*command.split(), *map(str, files), "--model", str(tmp_path / "nothing")]) == 2
    assert "nothing: no such directory: expected a local Hugging Face model directory" in capsys.readouterr().err


def test_a_model_without_tokenizer_weights_or_with_pickles_is_refused(workspace, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    (model / "tokenizer.json").unlink()
    for remove, message in [
        (None, "no tokenizer"),
        ("model.safetensors", "pytorch_model.bin: pickled weights; only safetensors are read"),
        ("config.json", "pytorch_model.bin: pickled weights"),
        ("pytorch_model.bin", "no config.json"),
    ]:
        if remove:
            (model / remove).unlink()
        if remove == "model.safetensors":
            (model / "pytorch_model.bin").write_bytes(b"pickle")
        assert (
            cli.main(
                unlearn(tmp_path, tmp_path / "out", forget=[workspace / "f0.jsonl"], retain=[workspace / "r.jsonl"])
            )
            == 2
        )
        assert message in capsys.readouterr().err


def test_a_checkpoint_with_missing_weights_is_refused(workspace, tmp_path, capsys):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert (
        cli.main(unlearn(tmp_path, tmp_path / "out", forget=[workspace / "f0.jsonl"], retain=[workspace / "r.jsonl"]))
        == 2
    )
    assert "has no weights for model.layers.2.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_misspelt_setting_gets_the_nearest_name(workspace, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("blok_lr: 1e-3\n")
    assert cli.main(unlearn(workspace, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 2
    assert "run.yaml: unknown setting 'blok_lr': did you mean 'block_lr'?" in capsys.readouterr().err


def test_an_implementation_that_is_not_there_is_refused(workspace, tmp_path, capsys):
    assert cli.main(unlearn(workspace, tmp_path / "out", "--impl", "cuda")) == 2
    assert 'impl="cuda" cannot run on cpu' in capsys.readouterr().err


def test_a_model_is_not_overwritten(workspace, capsys):
    before = (workspace / "model" / "model.safetensors").read_bytes()
    assert cli.main(unlearn(workspace, workspace / "model")) == 2
    assert "what a run reads is never overwritten" in capsys.readouterr().err
    assert (workspace / "model" / "model.safetensors").read_bytes() == before


def test_weights_that_were_cut_short_are_named(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    command = unlearn(workspace, tmp_path / "out", "--unlearned", str(tmp_path / "model"))
    assert cli.main(command) == 2
    assert f"{path}: not a whole safetensors file" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(workspace, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("kunbr_fast.cli.unlearn.carry_out", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        cli.main(unlearn(workspace, tmp_path / "out"))


@pytest.mark.parametrize("command", ["", "demo", "unlearn", "density", "rtt", "doctor"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: kunbr-fast" in capsys.readouterr().out


def test_messages_of_the_library_name_options_here():
    said = terminal.with_options(
        "x: go on (resume=True), or bring it (unlearned=, alpha=1): gpu_memory='24': stream=True, gpus=2"
    )
    assert said == "x: go on (--resume), or bring it (--unlearned, alpha=1): --gpu-memory '24': --stream, --gpus 2"
    assert (
        terminal.with_options("cut (split_long=False refuses such lines)") == "cut (--no-split-long refuses such lines)"
    )
    assert terminal.with_options("needs a set (holdout=, --holdout H.jsonl)") == "needs a set (--holdout H.jsonl)"
    assert terminal.with_options("forget= and retain= go together; retain_coeff=2 stays") == (
        "--forget and --retain go together; retain_coeff=2 stays"
    )
