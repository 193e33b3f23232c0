"""What a run keeps: progress that is confirmed, or not yet."""

import shutil
from types import SimpleNamespace

import pytest
import torch

import kunbr_fast as kf
from kunbr_fast.data import Schedule
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.run.state import RunState
from kunbr_fast.run.steps import Run
from kunbr_fast.run.visits import Stage


def extra(n):
    return {"epochs": [], "sums": None, "recent": [], "seconds": float(n), "micro_batch_tokens": None}


LOSSES = {"forget_loss": 1.5, "retain_loss": None}


def opened(directory, resume=False):
    return RunState(directory, "run", kf.KUnBRConfig(), resume)


@pytest.mark.parametrize("apart", [False, True])
def test_progress_is_kept_twice_until_it_is_confirmed(apart, tmp_path):
    """Unconfirmed beside confirmed; a rank's own progress counts in place of what the whole state has."""
    x = [{"x": torch.full((2,), float(i))} for i in range(6)]
    stage, other, folder = "blocks.0.2-4", "blocks.0.0-2", tmp_path / "run"

    def kept(*steps):
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        return files == [f"{stage}-step-{step}.safetensors" for step in steps]

    def after_a_kill():
        shutil.copytree(folder, tmp_path / "again", dirs_exist_ok=True)
        return opened(tmp_path / "again", True)

    whole = opened(folder)
    for step in (1, 2):
        whole.save_progress(stage, step, x[step], extra(step))
    assert kept(2)  # what was never confirmed does not pile up
    whole.confirm(stage)
    whole.save_progress(stage, 3, x[3], extra(3))
    assert kept(2, 3) and after_a_kill().progress(stage)[0] == 3
    whole.save_progress(stage, 3, x[5], extra(5))  # the same step again: its file is in use
    assert whole.progress(stage)[1]["x"].tolist() == [3, 3]
    whole.reject(stage)
    whole.reject(stage)  # nothing is unconfirmed
    assert kept(2) and whole.progress(stage)[2] == extra(2)
    whole.save_progress(stage, 4, x[4], extra(4))
    with whole.apart(0) as state:
        assert state.progress(stage)[0] == 4
        state.confirm(stage)
        state.save_progress(stage, 5, x[5], extra(5))
        state.save_progress(other, 1, x[1], extra(1))
        state.reject(other)
        assert state.progress(other) is None
        assert after_a_kill().progress(stage)[0] == 5 and after_a_kill().progress(other) is None
        if apart:
            state.reject(stage)
            assert after_a_kill().progress(stage)[1]["x"].tolist() == [4, 4]
            state.finish(stage, {"epochs": []}, x[0])
    if not apart:
        assert whole.progress(stage)[0] == 5 and kept(4, 5)
        whole.reject(stage)
        assert after_a_kill().progress(stage)[1]["x"].tolist() == [4, 4]
        whole.finish(stage, {"epochs": []}, x[0])
    assert [path.name for path in folder.glob("*.safetensors")] == [f"{stage}.safetensors"]
    assert whole.progress(stage) is None and after_a_kill().progress(stage) is None


def test_progress_whose_file_is_damaged_or_missing_falls_back(tmp_path):
    stage, told, x = "blocks.0.2-4", [], {"x": torch.ones(3)}

    def resumed():
        return RunState(tmp_path, "run", kf.KUnBRConfig(), True, say=told.append)

    state = opened(tmp_path)
    state.save_progress(stage, 2, x, extra(2))
    state.confirm(stage)
    state.save_progress(stage, 4, {"x": torch.zeros(3)}, extra(4))
    (tmp_path / f"{stage}-step-4.safetensors").write_bytes(b"something else")
    assert resumed().progress(stage)[0] == 2 and not (tmp_path / f"{stage}-step-4.safetensors").exists()
    assert told == [f"{tmp_path / stage}-step-4.safetensors is damaged or missing: {stage} goes on from step 2"]
    (tmp_path / f"{stage}-step-2.safetensors").unlink()
    state = resumed()
    assert state.progress(stage) is None and told[-1].endswith("goes on from its beginning")
    state.save_progress(stage, 2, x, extra(2))
    assert resumed().progress(stage)[0] == 2 and len(told) == 2


ACCOUNTS = {
    "epochs": [None, [1], [{"forget_loss": "x"}], [{"forget_loss": 1.0}] * 9],
    "sums": [5, {"x": 1e308}, {"forget_loss": 1.0, "retain_loss": 1.0, "steps": 0}, {**LOSSES, "steps": 9}],
    "recent": [None, [1.0] * 11, ["x"]],
    "seconds": [None, -1, 1e308, "x"],
    "micro_batch_tokens": [0, -5, 2**60, "x", 1.5],
}


@pytest.mark.parametrize("field", ACCOUNTS)
def test_an_account_has_values_that_steps_can_have(field, tmp_path):
    stage, path = "blocks.0.2-4", tmp_path / "state.json"
    opened(tmp_path).save_progress(stage, 8, {"x": torch.ones(3)}, extra(8))
    state = read_sealed(path, "")
    for value in ACCOUNTS[field]:
        state["progress"][stage][0]["extra"] = {**extra(8), field: value}
        write_sealed(path, state)
        with pytest.raises(ValueError, match=f"(?s)state.json.*{stage}.*{field[:-1]}") as refused:
            opened(tmp_path, True)
        assert str(refused.value).count("\n") == 0
    state["progress"][stage][0]["extra"] = {**extra(8), "epochs": [LOSSES], "sums": {**LOSSES, "steps": 3}}
    write_sealed(path, state)
    assert opened(tmp_path, True).progress(stage)[2]["sums"]["steps"] == 3


@pytest.mark.parametrize("changed", [{"epochs": [LOSSES] * 3}, {"epochs": []}, {"sums": None}, {"sums": {"steps": 2}}])
def test_an_account_fits_the_schedule(changed, tmp_path):
    """Of 8 steps in epochs of 5: one is done, and 3 steps of the next."""
    stage, schedule = Stage("blocks.0.2-4"), Schedule(5, 5, 1, 1, 4, 0)
    state, good = opened(tmp_path), {**extra(8), "epochs": [LOSSES], "sums": {**LOSSES, "steps": 3}}
    training, took = SimpleNamespace(load_state=lambda *_: None, micro_batch_tokens=None), SimpleNamespace()
    state.save_progress(stage, 8, {"x": torch.ones(3)}, good)
    assert Run._taken_up(SimpleNamespace(state=state), stage, training, schedule, took)[0] == 8
    state.state["progress"][stage][0]["extra"] = {**good, **changed}
    with pytest.raises(ValueError, match="state.json: blocks.0.2-4: extra.epochs, .* 1 and 3: start"):
        Run._taken_up(SimpleNamespace(state=state), stage, training, schedule, took)


def test_settings_of_attacks_are_free_until_an_attack_depends_on_them(tmp_path):
    state = opened(tmp_path)

    def locked():
        names = ("rtt_epochs", "rtt_master_weights", "rtt_lora_rank", "rtt_lora_targets")
        return [name for name in names if state.is_locked(name, kf.KUnBRConfig.stage_of(name))]

    assert locked() == []
    for attack, expected in (
        ("int8", ["rtt_epochs"]),
        ("full", ["rtt_epochs", "rtt_master_weights"]),
        ("lora", ["rtt_epochs", "rtt_master_weights", "rtt_lora_rank", "rtt_lora_targets"]),
    ):
        rows = [{"attack": attack, "fold": "a", "lr": 1e-3}]
        state.finish(Stage.attack("a", 1e-3, attack), {"rows": rows, "seconds": 1.0})
        assert locked() == expected
