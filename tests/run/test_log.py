"""`--log-to`: what a run writes of its steps while it works."""

import csv
import sys
from types import SimpleNamespace

import pytest
from helpers import stopping_within
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.run.log import COLUMNS, RunLog

CONFIG = dict(
    batch_size=5, warmup_epochs=2, warmup_lr=1e-3, num_blocks=3, top_k=2, block_epochs=1, block_lr=1e-3, rtt=False
)
STEPS = 4 + 2 * 2


def run(out, kinds, stop_at=None, **options):
    reporter, stop, _ = stopping_within(stop_at)
    data = random_samples(10, seed=1), random_samples(12, seed=2)
    config = kf.KUnBRConfig(**CONFIG, log_to=kinds)
    return kf.unlearn(tiny_model(), *data, config, output_dir=out, reporter=reporter, stop=stop, **options)


def rows(out):
    with open(out / "logs" / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(out := tmp_path_factory.mktemp("whole"), ("csv",)), rows(out)


def timeless(table):
    return [{name: value for name, value in row.items() if name != "time"} for row in table]


def test_a_run_that_is_interrupted_behind_its_last_step_keeps_that_step(whole, tmp_path):
    with pytest.raises(kf.Stopped):
        run(tmp_path, ("csv",), stop_at=STEPS)
    run(tmp_path, ("csv",), resume=True)
    assert timeless(rows(tmp_path)) == timeless(whole[1])


def test_a_resumed_run_without_its_log_says_so(tmp_path, caplog):
    with pytest.raises(kf.Stopped):
        run(tmp_path, ("csv",), stop_at=7)
    before = rows(tmp_path)
    run(tmp_path, (), resume=True)
    assert "logs ends where the run was interrupted: --log-to goes on with it" in caplog.text
    assert rows(tmp_path) == before


def test_each_step_stands_in_the_table_once_also_after_an_interruption(whole, tmp_path):
    report, whole = whole
    assert [int(row["step"]) for row in whole] == [*range(1, STEPS + 2)]
    blocks = [f"blocks.0.{block.start}-{block.stop}" for block in report.blocks]
    assert [row["stage"] for row in whole] == ["warmup"] * 4 + [blocks[0]] * 2 + [blocks[1]] * 2 + ["result"]
    means = [float(row["forget_loss"]) for row in whole[:2]]
    assert sum(means) / 2 == pytest.approx(report.losses["warmup"][0]["forget_loss"])

    with pytest.raises(kf.Stopped):
        run(tmp_path / "b", ("csv",), stop_at=5)
    table = tmp_path / "b" / "logs" / "log.csv"
    with open(table, "a", encoding="utf-8") as file:  # what a kill may leave: steps that are made again, half a line
        file.write(f"7,{blocks[0]},0.0,9.0,9.0,9.0,,,,,,,\n8,blo")
    run(tmp_path / "b", ("csv",), resume=True)
    assert timeless(rows(tmp_path / "b")) == timeless(whole)


def test_a_table_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text("my,own\n1,2\n")
    with pytest.raises(ValueError, match="log.csv is not a log of kunbr-fast"):
        run(tmp_path, ("csv",))
    assert (tmp_path / "logs" / "log.csv").read_text() == "my,own\n1,2\n"


def test_what_cannot_be_logged_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="log_to=wandb: it is not installed .*: pip install wandb"):
        run(tmp_path, ("wandb",))
    with pytest.raises(ValueError, match="log_to=.*: logs lie in output_dir: give one"):
        run(None, ("csv",))
    with pytest.raises(ValueError, match="log_to=.*tensorbord.*: expected different ones of csv, tensorboard, wandb"):
        kf.KUnBRConfig(log_to=("tensorbord",))
    assert kf.KUnBRConfig(log_to=("none",)).log_to == kf.KUnBRConfig(log_to="none").log_to == ()  # as its help says


def test_a_log_that_cannot_be_had_leaves_no_unfinished_run(tmp_path, monkeypatch):
    def refused(self):
        raise ValueError("log_to=wandb: no key")

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "open", refused)
        with pytest.raises(ValueError, match="no key"):
            run(tmp_path, ("csv",))
    run(tmp_path, ("csv",))
    assert len(rows(tmp_path)) == STEPS + 1


def test_a_log_that_fails_does_not_end_the_run(tmp_path, caplog):
    log = RunLog(("csv",), tmp_path)
    log.add(1, "warmup", {"loss": 1.0, "retain_loss": None})
    log._logs["csv"]._file.close()
    log._logs["csv"]._file = open("/dev/full", "w", buffering=1)
    log.add(2, "warmup", {"loss": 1.0})
    log.add(3, "warmup", {"loss": 1.0})
    assert not log and [record.message for record in caplog.records] == [
        "log_to=csv: No space left on device: it ends here, the run goes on"
    ]
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_run_of_wandb_that_ends_does_not_end_ours(tmp_path, caplog, monkeypatch):
    class Lost(Exception):
        pass

    class Run:
        def log(self, values, step):
            raise Lost("the service\nhas gone")

        finish = log

    fake = SimpleNamespace(init=lambda **how: Run(), errors=SimpleNamespace(Error=Lost))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(("wandb",), tmp_path)
    log.open()
    log.add(1, "warmup", {"loss": 1.0})
    assert not log and caplog.messages == ["log_to=wandb: the service has gone: it ends here, the run goes on"]


def test_tensorboard_hides_steps_that_are_made_again(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(kf.Stopped):
        run(tmp_path, ("tensorboard",), stop_at=5)
    run(tmp_path, ("tensorboard",), resume=True)
    found = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in found.Scalars("forget_loss")] == [*range(1, STEPS + 1)]


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    begun = []

    class Run:
        def __init__(self, **how):
            begun.append(how)
            self.values = []

        def log(self, values, step):
            self.values.append((step, values))

        def finish(self):
            begun[-1]["values"] = self.values

    monkeypatch.setattr(wandb, "init", lambda **how: Run(**how))
    with pytest.raises(kf.Stopped):
        run(tmp_path / "mine", ("wandb",), stop_at=5)
    run(tmp_path / "mine", ("wandb",), resume=True)
    first, second = begun
    assert first["id"] == second["id"] and first["name"] == "mine" and first["config"]["block_lr"] == 1e-3
    steps = [step for how in begun for step, values in how["values"] if "forget_loss" in values]
    assert steps == [*range(1, STEPS + 1)]
