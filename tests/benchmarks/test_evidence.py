"""benchmarks/evidence.py, with fewer people, methods and epochs; SmolLM2 has a tiny stand-in."""

import csv
import dataclasses
import json
import statistics
import types
from pathlib import Path

import pytest
import tiny_text
import torch

import kunbr_fast as kf
from kunbr_fast.benchmarks import evidence
from kunbr_fast.benchmarks.forgetting import birthdays, methods, summary
from kunbr_fast.benchmarks.forgetting.methods import METHODS
from kunbr_fast.benchmarks.forgetting.units import Place, Unit, world_of
from kunbr_fast.evaluation.rtt import Attack
from kunbr_fast.files.tensors import load_tensors
from kunbr_fast.run import demo
from kunbr_fast.run.reporter import Reporter


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "GROUPS", {"forget": 8, "retain": 8, "bystanders": 4})
    monkeypatch.setattr(demo, "TEACHING", {**demo.TEACHING, "batch_size": 30, "epochs": 2})
    changes = dict(batch_size=24, warmup_epochs=1, block_epochs=1, rtt_epochs=1, rtt_lrs=1e-3)
    monkeypatch.setattr(demo, "CONFIG", dataclasses.replace(demo.CONFIG, **changes))
    world_of.cache_clear()
    yield
    world_of.cache_clear()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_searches_chooses_tests_and_attacks_and_a_second_one_makes_nothing_again(
    small, tmp_path, capsys, monkeypatch
):
    command = "--methods gradient_difference never --settings 2 --seeds 1 --attacks int8".split()
    command += ["--out", str(tmp_path)]
    assert evidence.main(command) == 0
    text, rows = capsys.readouterr().out, rows_of(tmp_path / "evidence.csv")
    searched = [row for row in rows if row["phase"] == "search"]
    assert {(row["method"], row["seed"]) for row in searched} == {("gradient_difference", "10")}
    assert len({row["setting"] for row in searched}) == 2
    (picked,) = {row["setting"] for row in searched if row["chosen"] == "True"}
    tested = {(row["method"], row["seed"], row["attack"]): row for row in rows if row["phase"] == "seeds"}
    assert set(tested) == {(m, "1", a) for m in ("gradient_difference", "never") for a in ("full", "int8")}
    assert {row["setting"] for (method, *_), row in tested.items() if method != "never"} == {picked}
    assert "| gradient difference |" in text and "chosen" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"evidence-{name}.png" for name in ("attacks", "damage", "relearning")
    }
    monkeypatch.setattr(Unit, "run", None)  # what is finished is not touched again
    before = (tmp_path / "evidence.csv").read_bytes(), (tmp_path / "tables.md").read_bytes()
    assert evidence.main(command) == 0
    assert before == ((tmp_path / "evidence.csv").read_bytes(), (tmp_path / "tables.md").read_bytes())


def test_ablations_have_the_setting_that_was_chosen_for_kunbr(tmp_path, monkeypatch):
    run = evidence.Evidence(Place("demo", tmp_path), ["kunbr", "npo", "no_reinsertion", "never"], [1], 5, [])
    assert list(run.search()) == ["kunbr", "npo"]
    monkeypatch.setattr(
        evidence.Evidence, "_chosen", lambda self, units: None if units[0].method == "npo" else units[3]
    )
    assert run.picked() == {"kunbr": 3, "no_reinsertion": 3, "never": 0}


def test_a_killed_attack_goes_on_and_one_that_fails_does_not_hold_up_the_others(small, tmp_path, monkeypatch, capsys):
    unit, made = Unit(Place("demo", tmp_path), "gradient_difference", 0, 1), []
    one = Attack._one

    def killed(self, job, restore, bar):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(job)
        return one(self, job, restore, bar)

    monkeypatch.setattr(Attack, "_one", killed)
    with pytest.raises(KeyboardInterrupt):
        unit.run()
    assert unit.missing == ["full"] and len(unit._attack("full")["rows"]) == 2  # epochs 0 and 1 of one fold, one rate
    first = unit._attack("full")["rows"]
    made.append(None)
    unit.run()
    assert unit.missing == [] and len(made) == 3 and unit._attack("full")["rows"][:2] == first  # 2 folds, 1 rate
    other = Unit(unit.place, "npo", 0, 1)
    monkeypatch.setattr(Unit, "_train", lambda self: 1 / 0)
    runner = evidence.Runner(1, float("inf"))
    assert not runner.run("seeds", [other, unit]) and runner.failed == [other.name]
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert not evidence.Runner(1, 0.0).run("seeds", [other])  # late: none is begun


def test_by_hand_is_what_the_package_does(small, tmp_path):
    world, kept = world_of(Place("demo", tmp_path), 1), []
    setting = METHODS["kunbr_cumulative"].settings(world)[0]
    config = dataclasses.replace(world.config, **setting)
    train = METHODS["kunbr_cumulative"].train or methods.by_package
    for run in (train, methods.by_hand):
        run(world, config, tmp_path / "unit", Reporter(), lambda model: kept.append(model.state_dict()))
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    blocks = [range(0, 2), range(4, 6)]
    drawn = [methods.others(blocks, dataclasses.replace(config, seed=seed), 8) for seed in range(40)]
    assert all(len(one) == 2 and one != blocks for one in drawn) and len({str(one) for one in drawn}) == 5


def unit(attack=None, retain=1.0, bystanders=1.0, diverged=False):
    accuracy = {"retain": {"smooth": retain}, "bystanders": {"smooth": bystanders}}
    trained = {"diverged": "at step 3"} if diverged else {"accuracy": accuracy}
    result = None if attack is None else types.SimpleNamespace(smooth_accuracy=attack)
    return types.SimpleNamespace(trained=trained, result=lambda kind: result)


def test_the_rule_of_the_search():
    good, better, broken = unit(0.5), unit(0.4, bystanders=0.86), unit(0.1, bystanders=0.84)
    assert summary.chosen([good, better, broken]) is better and broken not in summary.candidates([good, broken])
    worse = unit(0.05, retain=0.90, bystanders=0.84)
    assert summary.chosen([worse, broken, unit(diverged=True)]) is broken  # the one that lacks least
    assert summary.chosen([unit(diverged=True)]) is None


LAYERS = 2


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A tiny Llama in SmolLM2's place, and people of all ten splits, one of them in each."""
    model, tokenizer = tiny_text.model(layers=LAYERS), tiny_text.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for number in range(10):
        lines = [
            {
                "question": f"When was {name} {number} born?",
                "choices": [1900 + n, 1910, 1920, 1930 + n],
                "answer": n % 4,
            }
            for n, name in enumerate(("Ada Ek", "Bo Fu", "Cy Go"))
        ]
        lines[2]["question"] = "When was Di Hu born?"
        tiny_text.write_jsonl(tmp_path / f"split_{number}.jsonl", lines)
    monkeypatch.setattr(birthdays, "fetch", lambda folder: tmp_path / "model")
    world_of.cache_clear()
    return tmp_path


def on_smollm2(folder, *more):
    command = ["--world", "smollm2", "--data", str(folder), "--out", str(folder / "out"), "--device", "cpu", *more]
    return evidence.main(command)


def test_smollm2_in_too_little_time_and_nobody_twice(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(birthdays, "probe", lambda world: (1.0, 1.0))
    assert on_smollm2(stand_in, "--hours", "0.1") == 2
    assert "got time for 0 people of each split" in capsys.readouterr().err
    options = (("data", str(stand_in)), ("model", str(stand_in / "model")))
    world = world_of(Place("smollm2", stand_in / "out", options), 1)
    asked = [line["question"] for group in world.questions.values() for line in group]
    assert len(set(asked)) == len(asked) == 19 and [len(fold.questions) for fold in world.folds] == [3, 2, 2, 2, 2]


@pytest.mark.slow  # the demo's world goes through the same phases
def test_a_run_on_smollm2(stand_in, monkeypatch):
    monkeypatch.setattr(birthdays.BirthdayWorld, "teaching", dict(lr=1e-3, epochs=1, batch_size=8))
    monkeypatch.setattr(birthdays.BirthdayWorld, "epochs", 1)
    some = ["--methods", "gradient_difference", "--settings", "1", "--attacks", "full", "--people", "2"]
    assert on_smollm2(stand_in, *some) == 0
    rows = rows_of(stand_in / "out" / "evidence.csv")
    found = [(row["method"], row["phase"]) for row in rows]
    assert found == [("gradient_difference", "search"), ("gradient_difference", "seeds")]


def test_the_number_of_people_is_in_proportion_to_the_hours():
    assert birthdays.affordable(360.0, 1.0) == 10 and birthdays.affordable(1.0, 10.0) == birthdays.PEOPLE
    with pytest.raises(ValueError, match="--hours 1: got time for 5 people"):
        birthdays.affordable(700.0, 1.0)


def test_all_settings_exist_in_both_worlds_and_are_as_many_for_each_method(small, stand_in, tmp_path, monkeypatch):
    options = (("data", str(stand_in)), ("model", str(stand_in / "model")))
    for place in (Place("demo", tmp_path), Place("smollm2", tmp_path, options)):
        world = world_of(place, 10)
        monkeypatch.setattr(world, "layers", {"demo": 8, "smollm2": 30}[place.world], raising=False)
        for name, method in METHODS.items():
            configs = [dataclasses.replace(world.config, **setting) for setting in method.settings(world)]
            assert len(configs) == (1 if name == "never" else 5) and len({str(c) for c in configs}) == len(configs)
            for config in configs:
                blocks = kf.partition(world.layers, config.num_blocks)
                free = [block for block in blocks if block.stop <= world.layers - config.skip_last_layers]
                assert len(free) >= config.top_k and set(config.retain_layers) <= {*"all", *range(world.layers)}


def test_every_setting_makes_as_many_updates(stand_in, tmp_path, monkeypatch):
    world_of.cache_clear()
    options = (("data", str(stand_in)), ("model", str(stand_in / "model")))
    for place in (Place("demo", tmp_path), Place("smollm2", tmp_path, options)):
        world = world_of(place, 10)
        monkeypatch.setattr(world, "layers", {"demo": 8, "smollm2": 30}[place.world], raising=False)
        for name, method in METHODS.items():
            for setting in method.settings(world) if name != "never" else ():
                config = dataclasses.replace(world.config, **setting)
                assert config.warmup_epochs + config.top_k * config.block_epochs == world.epochs, (name, setting)


def test_what_is_kept_of_a_unit(small, tmp_path):
    done = Unit(Place("demo", tmp_path), "ria", 0, 1, ())
    done.run()
    found = json.loads((done.folder / "trained.json").read_text())
    assert found["setting"] == done.setting and found["seed"] == 1 and found["accuracy"]["bystanders"]["smooth"] <= 1
    taught = done.world.model().state_dict()
    kept = load_tensors(done.folder / "model.safetensors")
    assert any(not torch.equal(value, taught[name]) for name, value in kept.items())
    assert Unit(done.place, "ria", 1, 1, ()).folder != done.folder
    records = done.world.records["forget"]
    wrong = [done.world.mistaken(record)["completion"] for record in records]
    assert all(a != b["completion"] for a, b in zip(wrong, records)) and wrong[0] == wrong[1] == wrong[2]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"


def test_the_page_says_what_the_rows_say():
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    first = next(i for i, line in enumerate(lines) if "strongest attack" in line)
    last = next(i for i, line in enumerate(lines) if i > first and line[0] == "method")
    table = {line[0]: line for line in lines[first + 2 : last]}
    rows = [row for row in rows_of(PAGE.parents[1] / "benchmarks/results/evidence_demo_cpu.csv") if row["attack"]]
    names = {method.title: name for name, method in METHODS.items()}
    kinds = {row["attack"] for row in rows if row["method"] == "robust" and row["phase"] == "seeds"}
    assert len(table) >= 8 and {"full", "lora", "other_facts", "int8", "nf4"} <= kinds
    for title, cells in table.items():
        found = {}  # of each seed
        for row in rows:
            if row["phase"] == "seeds" and row["method"] == names[title]:
                found.setdefault(row["seed"], {})[row["attack"]] = float(row["smooth"])
        assert len(found) == int(cells[1]) >= 3
        full = statistics.mean(of["full"] for of in found.values())
        assert abs(full - smooth_of(cells[5])) < 0.06
        if cells[7] != "-":
            whole = [max(of.values()) for of in found.values() if of.keys() >= kinds]
            assert abs(statistics.mean(whole) - smooth_of(cells[7])) < 0.06


def smooth_of(cell):
    return float(cell.split(" / ")[1].split()[0])
