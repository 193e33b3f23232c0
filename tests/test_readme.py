"""What the README says of objectives and of counted steps is what the code has and what was measured."""

import csv
import re
from pathlib import Path

import pytest
import readme_tables

from kunbr_fast.objectives.methods import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def table(heading):
    """The rows of the first table below a heading, each a list of cells."""
    lines = README.split(heading + "\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_every_objective_is_in_the_table_with_what_it_needs():
    found = {}
    for _, names, reference, alternate, way in table("## Objectives"):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = reference, alternate, way
    assert set(found) == set(OBJECTIVES)
    words = {"nll": "NLL", "hidden": "hidden", None: "-"}
    for name, (reference, alternate, way) in found.items():
        objective = OBJECTIVES[name]
        assert reference == ("layer" if objective.states else words[objective.reference]), name
        assert alternate == (objective.alternate or "-"), name
        assert (way == "fused, weights") == objective.weighted and way.startswith("none") == objective.states, name


def test_the_counted_table_quotes_committed_rows():
    with open(ROOT / "benchmarks" / "results" / "counted.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["model"] == "Llama-3-8B"]
    quoted = table("### One step of an 8B model, counted")
    assert len(quoted) == 6
    for block, target, reference, here, fewer, kept, in_all, launches in quoted:
        kind = {"all tokens": "all", "the letter": "letter"}[target]
        a, b = (
            next(r for r in rows if (r["block"], r["target"], r["variant"]) == (block, kind, side))
            for side in ("reference", "kunbr_fast")
        )
        assert reference == f"{float(a['gflop']) / 1e3:.1f} TFLOP" and here == f"{float(b['gflop']) / 1e3:.1f} TFLOP"
        assert float(fewer[:-1]) == pytest.approx(float(a["gflop"]) / float(b["gflop"]), abs=0.006)
        assert float(kept[:-1]) == pytest.approx(float(b["saved_mib"]) / float(a["saved_mib"]), abs=0.006)
        whole = [float(r["peak_mib"]) + float(r["standing_mib"]) for r in (a, b)]
        assert float(in_all[:-1]) == pytest.approx(whole[1] / whole[0], abs=0.006)
        assert launches == f"{a['launches']}, {b['launches']}"


def test_the_pipelines_table_quotes_committed_rows():
    results = ROOT / "benchmarks" / "results"
    with open(results / "pipelines_cpu.csv") as file:
        pipelines = {r["pipeline"]: r for r in csv.DictReader(file)}
    with open(results / "open_unlearning_cpu.csv") as file:
        theirs = {r["trainer"]: r for r in csv.DictReader(file) if r["transformers"].startswith("5.")}
    rows = table("### Before and after")
    for (name, before, after, same), kind in zip(rows, ("trainer", "authors")):
        row = pipelines[kind]
        assert before.startswith(f"{float(row['before_tflop']):.2f} TFLOP"), name
        assert after.startswith(f"{float(row['after_tflop']):.2f} TFLOP"), name
        assert same == f"{row['entries_that_differ']} of {int(row['entries_moved']) / 1e6:.1f} million entries differ"
    for name, _, after, apart in rows[2:]:
        row = theirs[name.removeprefix("OpenUnlearning ")]
        assert (
            after.startswith(f"{row['flops']}x FLOPs, {row['saved_bytes']}x kept")
            and apart == f"{row['weights_apart']} apart"
        )


@pytest.mark.parametrize(
    "heading, make",
    [
        ("### One step, against the reference procedure", readme_tables.step),
        ("### A whole run", readme_tables.end_to_end),
        ("### Density, against its rivals", readme_tables.density),
        ("### Elsewhere, on a CPU", readme_tables.elsewhere),
    ],
)
def test_what_bench_measured_is_quoted_from_committed_rows(heading, make):
    assert table(heading) == make()


def test_the_sentence_on_a_whole_models_density_is_quoted_from_committed_rows():
    assert readme_tables.whole_model() in README
