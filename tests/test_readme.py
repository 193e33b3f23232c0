"""The README is short, and every figure that it and docs/ quote is what the code has or what was measured."""

import csv
import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
import readme_tables

from kunbr_fast.benchmarks.rows import read_rows
from kunbr_fast.density.attribution import METHODS
from kunbr_fast.density.measure import STATISTICS
from kunbr_fast.objectives.methods import OBJECTIVES
from kunbr_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def rows(name):
    with open(RESULTS / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def table(text, heading):
    """The rows of the first table below a heading, each a list of cells."""
    lines = text.split(heading + "\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found[2:]


def percent(value):
    return f"{float(value):.1f} %"


# ---------------------------------------------------------------- the README


def test_the_readme_is_read_in_a_minute():
    assert len(README.encode()) <= 8192
    first = "\n".join(README.splitlines()[:10])
    assert "**Status:" in first and "(docs/results.md#what-has-run-where)" in first


def test_the_picture_shows_committed_rows():
    Image = pytest.importorskip("PIL.Image")
    spec = importlib.util.spec_from_file_location("docs_figure", ROOT / "docs" / "figure.py")
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    times, faster = figure.steps(read_rows(figure.STEP))
    shown = json.loads(Image.open(figure.PICTURE).text["Description"])
    assert shown == {"steps": times, "faster": faster, "stages": figure.stages(read_rows(figure.RUN))}


def forgotten(method):
    """Means over seeds of smooth accuracies: forget, retain, bystanders, under `full`; and under the strongest attack,
    over the seeds that met every kind."""
    mine = [r for r in rows("evidence_demo_cpu") if r["phase"] == "seeds" and r["attack"]]
    kinds = {r["attack"] for r in mine if r["method"] == "robust"}
    mine = [r for r in mine if r["method"] == method]
    seeds = [[other for other in mine if other["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in mine)]
    assert len(seeds) >= 3
    found = [statistics.mean(float(of[0][f"{k}_smooth"]) for of in seeds) for k in ("forget", "retain", "bystanders")]
    found.append(statistics.mean(float(r["smooth"]) for r in mine if r["attack"] == "full"))
    whole = [max(float(r["smooth"]) for r in of) for of in seeds if {r["attack"] for r in of} >= kinds]
    return found + ([statistics.mean(whole)] if whole else [])


def test_what_is_forgotten_is_quoted_from_committed_rows():
    names = {"KUnBR, as published": "kunbr", "gradient difference": "gradient_difference"}
    names |= {f"`--method {name}`": name for name in ("robust", "robust_blocks")} | {"never saw the facts": "never"}
    found = {method: values for method, *values in table(README, "## Does it forget?")}
    assert found.keys() == names.keys()
    for method, values in found.items():
        assert [float(value) for value in values] == pytest.approx(forgotten(names[method]), abs=0.06)
    attack = {method: float(values[3]) for method, values in found.items()}
    gaps = [attack["gradient difference"] - attack[f"`--method {name}`"] for name in ("robust", "robust_blocks")]
    assert "{:.0f} and {:.0f} points under gradient difference".format(*gaps) in " ".join(README.split())
    above = [attack[f"`--method {name}`"] - attack["never saw the facts"] for name in ("robust", "robust_blocks")]
    assert "{:.0f} and {:.0f} above a model".format(*above) in " ".join(README.split())
    assert f"without it the attack gets {forgotten('no_reinsertion')[3]:.1f}" in README


# ---------------------------------------------------------------- docs


def test_the_demos_table_quotes_committed_rows():
    text = page("demo")
    found = re.findall(r"^\| ([a-zA-Z].*?) +\|(.*)\|$", text.split("| method", 1)[1], re.M)
    found = [line for line in found if line[0] != "method"]
    mine = [row for row in rows("demo_cpu") if row["seed"] == "0"]
    attacked = [row for row in mine if row["lora"]]
    assert len(found) == len(mine) + len(attacked)
    for (method, cells), row in zip(found, mine):
        forget, retain, bystanders, rtt, recovery, training, attack = (cell.strip() for cell in cells.split("|"))
        assert (method, training) == (row["method"], row["training_s"])
        assert [forget, retain, bystanders] == [percent(row[k]) for k in ("forget", "retain", "bystanders")]
        if rtt != "-":
            assert (rtt, attack) == (percent(row["rtt"]), row["rtt_s"])
            assert float(recovery) == pytest.approx(float(row["rtt"]) - float(row["forget"]), abs=0.11)
    for (method, cells), row in zip(found[len(mine) :], attacked):
        assert method == row["method"]
        wanted = [percent(row[k]) for k in ("full", "lora", "int8", "nf4", "smooth")]
        assert [cell.strip() for cell in cells.split("|")] == wanted


def test_what_a_robust_step_costs_is_quoted_from_committed_rows():
    measured = {(row["trained"], row["variant"]): row for row in rows("robust_step_cpu")}
    names = ("hidden layers", "adversary", "robust", "robust, frozen")
    found = table(page("robust"), "## What it costs")
    assert len(found) == len(names)
    for name, (_, *values) in zip(names, found):
        block, every = (measured[trained, name] for trained in ("block", "all parameters"))
        wanted = block["ratio"], every["ratio"], block["counted"]
        assert [float(value) for value in values] == pytest.approx([float(value) for value in wanted], abs=0.0051)


def test_smollm2s_table_quotes_committed_rows():
    text, measured = page("smollm2"), {row["method"]: row for row in rows("smollm2_cpu") if row["forget"]}
    found = re.findall(r"^\| ([a-zA-Z].*?) +\|(.*)\|$", text.split("| method", 1)[1], re.M)
    assert [method for method, _ in found] == ["original", "warm-up (M_u)", "KUnBR"]
    for method, cells in found:
        forget, retain, rtt, *_, warmup, _, trained, attack = (cell.strip() for cell in cells.split("|"))
        row = measured[method]
        assert (forget, retain) == (percent(row["forget"]), percent(row["retain"]))
    assert (rtt, attack) == (percent(row["rtt"]), row["rtt_s"])
    assert float(warmup) + float(trained) == pytest.approx(float(row["training_s"]), abs=0.11)
    plain = measured["gradient difference, Lion 1e-5"]
    quoted = f"{plain['forget']} % forget, {float(plain['retain']):.0f} % retain and {plain['rtt']} % RTT accuracy"
    times = f"in {float(plain['training_s']):.0f} s of training against {float(row['training_s']):.0f} s"
    assert f"{quoted}, {times}" in " ".join(text.split())


def test_the_low_precision_table_quotes_committed_rows():
    measured, text = rows("cover_precision_cpu"), page("large_models")
    found = table(text, "## Low-precision cover")
    assert found[0][0] == "none" and len(found) >= 4
    for cover, _, cosine, *means, seeds in found:
        mine = [row for row in measured if row["cover"] == cover]
        lowest = min(float(row[name]) for row in mine for name in ("cosine_0", "cosine_1"))
        assert float(cosine) == pytest.approx(lowest, abs=6e-6)
        for value, name in zip(means, ("forget", "retain", "bystanders", "rtt")):
            assert float(value) == pytest.approx(statistics.mean(float(row[name]) for row in mine), abs=0.06), name
        assert seeds == ", ".join(row["rtt"] for row in mine)


def test_every_objective_is_in_the_table_with_what_it_needs():
    found = {}
    for _, names, original, alternate, way in table(page("objectives"), "# Objectives"):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = original, alternate, way
    assert set(found) == set(OBJECTIVES)
    words = {"nll": "NLL", "hidden": "hidden", None: "-"}
    for name, (original, alternate, way) in found.items():
        objective = OBJECTIVES[name]
        assert original == ("layer" if objective.states else words[objective.original]), name
        assert alternate == (objective.alternate or "-"), name
        assert (way == "fused, weights") == objective.weighted and way.startswith("none") == objective.states, name


def test_every_statistic_and_attribution_is_in_its_table():
    text = page("density")
    for heading, wanted in (("## Statistics", STATISTICS), ("## Single weights", METHODS)):
        named = [name for cells in table(text, heading) for name in re.findall(r"`(\w+)`", cells[0])]
        assert sorted(named) == sorted(wanted)


def test_the_counted_table_quotes_committed_rows():
    counted = [row for row in rows("counted") if row["model"] == "Llama-3-8B"]
    quoted = table(page("results"), "## One step of an 8B model, counted")
    assert len(quoted) == 6
    for block, target, reference, here, fewer, kept, in_all, launches in quoted:
        kind = {"all tokens": "all", "the letter": "letter"}[target]
        a, b = (
            next(r for r in counted if (r["block"], r["target"], r["variant"]) == (block, kind, side))
            for side in ("reference", "kunbr_fast")
        )
        assert reference == f"{float(a['gflop']) / 1e3:.1f} TFLOP" and here == f"{float(b['gflop']) / 1e3:.1f} TFLOP"
        assert float(fewer[:-1]) == pytest.approx(float(a["gflop"]) / float(b["gflop"]), abs=0.006)
        assert float(kept[:-1]) == pytest.approx(float(b["saved_mib"]) / float(a["saved_mib"]), abs=0.006)
        whole = [float(r["peak_mib"]) + float(r["standing_mib"]) for r in (a, b)]
        assert float(in_all[:-1]) == pytest.approx(whole[1] / whole[0], abs=0.006)
        assert launches == f"{a['launches']}, {b['launches']}"


def test_the_pipelines_tables_quote_committed_rows():
    text = page("integrations")
    pipelines = {row["pipeline"]: row for row in rows("pipelines_cpu")}
    found = table(text, "## Trainer and the authors' script: before and after")
    for (name, before, after, same), kind in zip(found, ("trainer", "authors", "corpus"), strict=True):
        row = pipelines[kind]
        assert before.startswith(f"{float(row['before_tflop']):.2f} TFLOP"), name
        assert after.startswith(f"{float(row['after_tflop']):.2f} TFLOP"), name
        assert same == f"{row['entries_that_differ']} of {int(row['entries_moved']) / 1e6:.1f} million entries differ"
    theirs = {(row["trainer"], row["dtype"], row["transformers"][0]): row for row in rows("open_unlearning_cpu")}
    for name, *cells in table(text, "### What it saves"):
        full, half = (theirs[name, dtype, "5"] for dtype in ("float32", "bfloat16"))
        expected = [full["weights_apart"], half["weights_apart"], half["bf16_from_fp32"], f"{full['flops']}x"]
        expected += [f"{full[column]}x, {half[column]}x" for column in ("saved_bytes", "peak_bytes")]
        assert cells == expected and full["flops"] == half["flops"], name


@pytest.mark.parametrize(
    "name, heading, make", [(name, *item) for name, tables in readme_tables.PAGES.items() for item in tables.items()]
)
def test_what_was_measured_is_quoted_from_committed_rows(name, heading, make):
    assert table(page(name), heading) == make()


def test_the_sentence_on_a_whole_models_density_is_quoted_from_committed_rows():
    assert readme_tables.whole_model() in page("results")


# ---------------------------------------------------------------- files beside them


def test_pre_commit_and_constraints_have_one_ruff():
    wanted = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n    rev: v(\S+)$", hooks, re.M)[1] == wanted


def test_the_citation_is_of_this_version_and_paper():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    paper = cited["preferred-citation"]
    assert f"title   = {{{paper['title']}}}" in README
    names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"author  = {{{names}}}" in README
    assert paper["url"].rpartition("/")[2] in README
