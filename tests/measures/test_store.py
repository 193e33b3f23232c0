"""An evaluation that was interrupted goes on: what is finished is taken as it is, and only for the same."""

import shutil

import evaluation_inputs as inputs
import pytest
import torch
from evaluation_inputs import NAMES, asked, line, pair
from helpers import rarely

import kunbr_fast as kf
from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.rtt import Attack, RTTConfig
from kunbr_fast.measures import UNFINISHED, evaluation, passes
from kunbr_fast.measures import evaluate as module
from kunbr_fast.measures.store import Store

SETS = {
    "forget": [*map(asked, NAMES[:5]), pair(NAMES[5])],
    "retain": [asked(NAMES[10]), asked(NAMES[11]), line(NAMES[12])],
    "holdout": [*map(pair, NAMES[13:16])],
}
FOLDS = [Fold(f"f{i}", of, of) for i in (0, 1) if (of := [asked(name).record for name in NAMES[2 * i : 2 * i + 2]])]
ATTACK = RTTConfig(lrs=(1e-4,), epochs=1, scoring="choice")
# what each pass calls
CALLS = {
    "likelihoods": (passes, "read_all"),
    "generation": (passes, "generate"),
    "states": (passes, "read_layers"),
    "attack": (Attack, "_one"),
    "value vectors": (module, "compare_values"),
    "writing": (evaluation, "write_sealed"),
}
EVERY = {"likelihoods": 2, "generation": 6, "states": 2, "attack": 2, "value vectors": 1, "writing": 1}
# the call that fails: of the second model, where a pass is made of two
FAILS = {"likelihoods": 2, "generation": 4, "states": 2, "attack": 2, "value vectors": 1, "writing": 1}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return inputs.tokenizer()


@pytest.fixture(scope="module")
def models():
    return [inputs.model("llama", seed, torch.float32) for seed in (0, 1, 2)]


@pytest.fixture
def calls(monkeypatch):
    """{pass: finished calls}; an entry of `fails` says at which call it raises."""
    counts, fails = dict.fromkeys(CALLS, 0), {}

    def counted(name, call):
        def wrapped(*arguments, **options):
            if fails.get(name) == counts[name] + 1:
                raise Stopped(name)
            found = call(*arguments, **options)
            counts[name] += 1
            return found

        return wrapped

    for name, (owner, function) in CALLS.items():
        monkeypatch.setattr(owner, function, counted(name, getattr(owner, function)))
    counts["fails"] = fails
    return counts


def evaluate(models, tokenizer, folder, *, model=None, sets=SETS, **more):
    how = dict(suite="all", max_new_tokens=4, layer_records=3, folds=FOLDS, attack=ATTACK, progress=False)
    how |= dict(tokenizer=tokenizer, original=models[1], output_dir=folder) | more
    return kf.evaluate(model or models[0], **sets, **how)


def said(found):
    """All but the time it took."""
    return {name: value for name, value in found.to_dict().items() if name != "seconds"}


@pytest.fixture(scope="module")
def whole(models, tokenizer, tmp_path_factory):
    return evaluate(models, tokenizer, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", rarely(CALLS, ["generation", "attack", "value vectors"]))
def test_what_is_finished_is_not_made_again(name, models, tokenizer, whole, tmp_path, calls):
    calls["fails"][name] = FAILS[name]
    with pytest.raises(Stopped, match=name):
        evaluate(models, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / UNFINISHED).is_dir() and not (tmp_path / "out" / "evaluation.json").exists()
    with pytest.raises(ValueError, match="holds an unfinished evaluation: go on with it"):
        evaluate(models, tokenizer, tmp_path / "out")
    calls["fails"].clear()
    found = evaluate(models, tokenizer, tmp_path / "out", resume=True)
    assert {key: calls[key] for key in CALLS} == EVERY
    assert found.seconds.keys() == whole.seconds.keys()
    assert said(found) == said(whole)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.csv", "evaluation.json"]


def made(calls):
    """What was made since the last look."""
    found = {key: calls[key] for key in CALLS if calls[key]}
    calls.update(dict.fromkeys(CALLS, 0))
    return found


@pytest.fixture(scope="module")
def unfinished(models, tokenizer, tmp_path_factory):
    """A folder in which all but the writing is done."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluation, "write_sealed", lambda *a: 1 / 0)
        evaluate(models, tokenizer, out)
    (out / "evaluation.csv").unlink()
    return out


@pytest.fixture
def unwritten(unfinished, tmp_path):
    """A copy of it."""
    return shutil.copytree(unfinished, tmp_path / "out")


OF_RESULT = {"likelihoods": 1, "generation": 3, "states": 1, "attack": 2, "value vectors": 1}
OF_RECORDS = {key: count for key, count in EVERY.items() if key not in ("value vectors", "writing")}
OTHERS = {
    "another model": (dict(model=2), OF_RESULT),
    "another original": (dict(original=2), {"likelihoods": 1, "generation": 3, "states": 1, "value vectors": 1}),
    "other records": (dict(sets=SETS | {"retain": SETS["retain"][:2]}), OF_RECORDS),
    "another answer": (dict(sets=SETS | {"holdout": [Item(SETS["holdout"][0].record, " 1", (" 2",))]}), OF_RECORDS),
    "fewer records": (dict(records=3), OF_RECORDS),
    "max_length": (dict(max_length=60), OF_RECORDS),
    "impl": (dict(impl="torch"), OF_RECORDS),
    "max_new_tokens": (dict(max_new_tokens=3), {"generation": 6}),
    "layer_records": (dict(layer_records=2), {"states": 2}),
    "attack": (dict(attack=RTTConfig(lrs=(1e-3,), epochs=1, scoring="choice")), {"attack": 2}),
    "folds": (dict(folds=FOLDS[::-1] + [Fold("f3", *[[asked(NAMES[6]).record]] * 2)]), {"attack": 3}),
    "measures of other texts": (dict(suite="core"), {"likelihoods": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", rarely(OTHERS, ["another model", "other records", "max_new_tokens", "attack"]))
def test_what_was_found_of_something_else_is_not_taken(name, models, tokenizer, unwritten, calls, tmp_path):
    changes, again = OTHERS[name]
    changes = {key: models[value] if key in ("model", "original") else value for key, value in changes.items()}
    found = evaluate(models, tokenizer, unwritten, resume=True, **changes)
    assert made(calls) == again | {"writing": 1}
    assert said(found) == said(evaluate(models, tokenizer, tmp_path / "fresh", **changes))
    assert not (unwritten / UNFINISHED).exists()


def test_what_somebody_else_has_put_there_stays(models, tokenizer, unwritten):
    (unwritten / UNFINISHED / "notes.txt").write_text("mine")
    (unwritten / UNFINISHED / "result.states.json.txt").write_text("mine too")
    evaluate(models, tokenizer, unwritten, suite="core", resume=True)
    left = {path.name for path in (unwritten / UNFINISHED).iterdir()}
    assert left == {"notes.txt", "result.states.json.txt"}
    with pytest.raises(ValueError, match="holds an evaluation: give another directory"):  # a folder is none
        evaluate(models, tokenizer, unwritten)


def test_overwrite_forgets_what_was_begun(models, tokenizer, unwritten, calls):
    (unwritten / "evaluation.json").write_text("{}")
    evaluate(models, tokenizer, unwritten, overwrite=True)
    assert made(calls) == EVERY and not (unwritten / UNFINISHED).exists()


@pytest.mark.parametrize("name", ["result.likelihoods.safetensors", "result.likelihoods.json", "result.values.json"])
def test_a_damaged_file_is_named(name, models, tokenizer, unwritten, calls):
    path = unwritten / UNFINISHED / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: damaged .*: delete it, and that part is measured again"):
        evaluate(models, tokenizer, unwritten, resume=True)
    path.unlink()
    path.with_suffix(".json").unlink(missing_ok=True)
    made(calls)
    evaluate(models, tokenizer, unwritten, resume=True)
    assert made(calls) == {"writing": 1, **({"value vectors": 1} if "values" in name else {"likelihoods": 1})}


def test_nothing_to_go_on_with(models, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="resume without an output directory"):
        evaluate(models, tokenizer, None, resume=True)
    with pytest.raises(ValueError, match="out holds no unfinished evaluation: leave resume out"):
        evaluate(models, tokenizer, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    evaluate(models, tokenizer, tmp_path / "out", suite="core")
    with pytest.raises(ValueError, match="holds no unfinished evaluation"):
        evaluate(models, tokenizer, tmp_path / "out", resume=True)


def test_an_evaluation_killed_behind_its_writing_is_finished_by_resume(models, tokenizer, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "clear", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(models, tokenizer, tmp_path)
    assert (tmp_path / "evaluation.json").exists() and (tmp_path / UNFINISHED).is_dir()
    assert said(evaluate(models, tokenizer, tmp_path, resume=True)) == said(whole)
    assert not (tmp_path / UNFINISHED).exists()


def test_a_file_without_its_tensors_is_an_error(tmp_path):
    store = Store(tmp_path)
    store.put("result.likelihoods", "one", {"a": 1}, {"x": torch.arange(3)})
    values, tensors = store.get("result.likelihoods", "one")
    assert values == {"a": 1} and torch.equal(tensors["x"], torch.arange(3))
    assert store.get("result.likelihoods", "two") is None and store.get("result.states", "one") is None
    (tmp_path / UNFINISHED / "result.likelihoods.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: delete it"):
        store.get("result.likelihoods", "one")
    store.clear()
    assert not (tmp_path / UNFINISHED).exists()
    Store(None).put("result.likelihoods", "one", {})
    assert Store(None).get("result.likelihoods", "one") is None and not Store(None).begun()
