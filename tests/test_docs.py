"""The README and docs/: what they link to exists, what they name can be imported, what they show runs."""

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tiny_text

ROOT = Path(__file__).resolve().parent.parent
README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "demo_search.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def links(page):
    """The relative targets of a page's links and pictures."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """GitHub's names of the page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M):
        heading = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return [name if name not in found[:i] else f"{name}-{found[:i].count(name)}" for i, name in enumerate(found)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_index():
    found = {(INDEX.parent / target.partition("#")[0]).resolve() for target in links(INDEX)}
    assert found >= {page for page in (ROOT / "docs").glob("*.md") if page != INDEX}
    assert found >= {ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff")}


BUILT = "kernels/libkunbr_cuda.so"  # by csrc/build.py, where there is an nvcc


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names_of_the_code_exist(page):
    """Dotted names and paths: `kunbr_fast.data.pack`, `tests/run/test_parity.py`, `kernels/norms/`."""
    text = re.sub(r"\w+\.kunbr_fast|\+kunbr_fast", "", page.read_text())
    if page.name == "CHANGELOG.md":  # the column of its table that says what is now
        text = "\n".join(line.rpartition("| `")[2] for line in text.splitlines() if line.startswith("  | `"))
    elif page.name == "CONTRIBUTING.md":  # made by following it: tests/test_contributing.py
        text = re.sub(r"[\w./]*relu2[\w./]*", "", text)
    for name in sorted(
        set(re.findall(r"kunbr_fast(?:\.\w+)+", text)) - {"kunbr_fast.json", "kunbr_fast.patch", "kunbr_fast.measure"}
    ):
        found, path = None, ""
        for part in name.split("."):
            path = f"{path}.{part}".lstrip(".")
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    places = r"(?:kunbr_fast|kernels|csrc|benchmarks|tests|examples|docs|\.ci|\.github)/[\w./*-]*[\w/]"
    for path in re.findall(rf"(?<![\w./-])({places})", text):
        assert list(ROOT.glob(path.rstrip("/"))) or path == BUILT, path


def test_the_floors_are_those_that_are_tested():
    from test_layers import FLOORS

    helpers = {"version", "checkout", "keywords", "machine", "stopping"}  # single files without a room of their own
    found = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    assert set(found) == {(str(i), room) for i, rooms in enumerate(FLOORS) for room in {*rooms.split()} - helpers}


# ---------------------------------------------------------------- what is shown


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(page):
    """The words of each kunbr-fast command in a page's blocks and lists of indented lines."""
    for line in re.sub(r"\\\n", " ", page.read_text()).splitlines():
        found = re.match(r"^ *(?:\$ |torchrun .* -m )?(?:kunbr-fast|kunbr_fast) +(\w.*)$", line)
        if found:
            yield shlex.split(re.sub(r"\[|\]|\.\.\.", "", found[1]), comments=True)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_their_options_exist(page):
    from kunbr_fast.cli.command import COMMANDS, parser

    for command, *words in commands(page):
        assert command in COMMANDS
        (choices,) = (action.choices for action in parser([command])._actions if action.choices)
        known = choices[command]._option_string_actions
        assert [word for word in words if word.startswith("--") and word not in known] == [], command


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the README's lines name: DIR, f1.jsonl, f2.jsonl, r.jsonl, forget.jsonl, retain.jsonl."""
    folder = tmp_path_factory.mktemp("desk")
    tiny_text.model(layers=8).save_pretrained(folder / "DIR")
    tiny_text.tokenizer().save_pretrained(folder / "DIR")
    ask = [tiny_text.question(name) for name in tiny_text.NAMES]
    for name, records in (("f1", ask[:6]), ("f2", ask[6:12]), ("r", ask[12:]), ("retain", ask[12:])):
        tiny_text.write_jsonl(folder / f"{name}.jsonl", records)
    (data,) = blocks(README, "json")
    (folder / "forget.jsonl").write_text(data)
    return folder


def test_the_readmes_two_commands_run(desk, monkeypatch):
    from kunbr_fast.cli.command import main

    monkeypatch.chdir(desk)
    found = list(commands(README))
    assert [words[0] for words in found] == ["unlearn", "density"]
    for words in found:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*words, "--quiet"]) == 0
    assert {"report.json", "run.yaml", "model.safetensors"} <= {path.name for path in (desk / "OUT").iterdir()}
    assert (desk / "density.png").is_file()


def test_the_readmes_python_runs_on_the_readmes_data(desk, monkeypatch):
    monkeypatch.chdir(desk)
    (code,) = blocks(README, "python")
    names = {"model": tiny_text.model(layers=8), "tokenizer": tiny_text.tokenizer()}
    exec(code, names)
    assert len(names["forget"]) == 4 and names["report"].blocks


def samples():
    import kunbr_fast as kf

    return kf.encode([tiny_text.question(name) for name in tiny_text.NAMES], tiny_text.tokenizer())


def test_usage_step_by_step_runs():
    import kunbr_fast as kf

    encoded, model, trained = samples(), tiny_text.model(layers=8), []

    class trainer:
        train = staticmethod(lambda: trained.append(model(encoded[0]["input_ids"][None]).logits))

    names = {
        "kf": kf, "model": model, "samples": encoded[:4], "original": model, "unlearned": tiny_text.model(1, layers=8),
        "batches": [(encoded[:2], encoded[2:4])], "trainer": trainer,
    }  # fmt: skip
    for code in blocks(ROOT / "docs" / "usage.md", "python"):
        exec(code, names)
    assert names["metrics"] and trained


def test_what_extending_shows_works(monkeypatch):
    import torch

    import kunbr_fast as kf
    from kunbr_fast.density.layer_kinds import LAYER_KINDS
    from kunbr_fast.kernels import dispatch
    from kunbr_fast.objectives.methods import OBJECTIVES

    # The registries as they were, afterwards.
    monkeypatch.setitem(OBJECTIVES, "half_npo", None)
    monkeypatch.setitem(LAYER_KINDS, "my_linear", None)
    monkeypatch.setitem(dispatch._registry, ("swiglu", "triton"), dispatch._registry["swiglu", "triton"])
    names = {}
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(code, names)
    reason = dispatch.why_not("swiglu", "triton", "cpu") or "not wanted here"
    assert dispatch.why_not_auto("swiglu", "triton", "cpu") == reason

    encoded = samples()
    trained = {}
    for beta in (0.1, 0.2):
        config = dataclasses.replace(
            names["config"], objective_options={"beta": beta}, num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1,
            block_lr=1e-3, warmup_optimizer="adamw", optimizer="adamw", warmup_lr=1e-2,
        )  # fmt: skip
        model = tiny_text.model()
        kf.unlearn(model, encoded[:6], encoded[6:12], config, progress=False)
        trained[beta] = torch.cat([p.flatten() for p in model.parameters()])
    assert not trained[0.1].equal(trained[0.2])

    plain, own = tiny_text.model(), tiny_text.model()
    for layer in own.model.layers:
        layer.mlp.up_proj.__class__ = names["MyLinear"]
    found = [kf.knowledge_density(model, encoded[:4]).per_layer for model in (plain, own)]
    torch.testing.assert_close(*found)


def test_the_trainer_of_integrations_trains(tmp_path):
    pytest.importorskip("accelerate")
    import transformers as tf

    import kunbr_fast as kf

    code, _ = blocks(ROOT / "docs" / "integrations.md", "python")  # the second one says what to give beside
    encoded = samples()
    names = {
        "kf": kf, "model": tiny_text.model(layers=8), "forget": encoded[:4], "retain": encoded[4:8],
        "args": tf.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, save_strategy="no"),
    }  # fmt: skip
    exec(code, names)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 8


def test_large_models_python_runs(tmp_path, monkeypatch):
    import kunbr_fast as kf

    for seed, name in enumerate(("M0", "MU")):
        tiny_text.model(seed, layers=16).save_pretrained(tmp_path / name)
        tiny_text.tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "large_models.md", "python")
    encoded = samples()
    names = {
        "kf": kf, "forget": encoded[:4], "retain": encoded[4:8], "tokenizer": tiny_text.tokenizer(),
        "config": kf.KUnBRConfig(block_epochs=1, top_k=1),
    }  # fmt: skip
    exec(code.replace('"cuda"', '"cpu"'), names)
    assert (tmp_path / "OUT" / "model.safetensors").is_file()
