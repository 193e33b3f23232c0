"""What a run tells, and what a benchmark's clock hears."""

import contextlib

import pytest
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.run.reporter import Reporter, Timer


def test_lines_seconds_and_what_surrounds_stages():
    heard, said = [], []

    @contextlib.contextmanager
    def around(stage, part):
        heard.append((stage, part))
        yield
        heard.append(("end", stage, part))

    reporter = Reporter(say=said.append, around=around)
    with pytest.raises(ValueError), reporter.stage("outer", "it begins") as took:
        with reporter.stage("inner"), reporter.part("step"):
            pass
        with reporter.part("step"):
            pass
        raise ValueError
    assert said == ["it begins"]
    assert heard == [
        ("outer", ""), ("inner", ""), ("inner", "step"), ("end", "inner", "step"), ("end", "inner", ""),
        ("outer", "step"), ("end", "outer", "step"),
    ]  # fmt: skip
    assert reporter.seconds["outer"] == took.seconds >= reporter.seconds["inner"] > 0
    assert took.seconds == took.seconds  # it stands still
    assert reporter.silent().say("nobody hears this") is None and said == ["it begins"]


def test_a_timer_counts_what_was_before(monkeypatch):
    now = [1.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timer = Timer()
    now[0] = 3.0
    assert timer.lap() == 2 and timer.lap() == 0
    timer.before = 10.0
    assert timer.seconds == 12
    timer.stop()
    now[0] = 9.0
    assert timer.seconds == 12


def test_a_run_tells_its_stages_and_steps():
    heard = []

    def around(stage, part):
        heard.append((str(stage), part))
        return contextlib.nullcontext()

    config = kf.KUnBRConfig(batch_size=3, warmup_epochs=1, num_blocks=3, top_k=2, block_epochs=1, rtt=False)
    reporter = Reporter(around=around)
    report = kf.unlearn(tiny_model(), random_samples(6, seed=1), random_samples(6, seed=2), config, reporter=reporter)
    first, second = (f"blocks.0.{block.start}-{block.stop}" for block in report.blocks)
    visit = ["", "prefix cache", "step", "step"]
    assert heard == [
        ("evaluation.original", ""), ("warmup", ""), ("warmup", "step"), ("warmup", "step"), ("density", ""),
        *((first, part) for part in visit), *((second, part) for part in visit), ("merge", ""),
        ("evaluation.result", ""),
    ]  # fmt: skip
    assert set(reporter.seconds) == {stage for stage, part in heard if not part}
    assert report.seconds["density"] == reporter.seconds["density"]


def test_a_keyword_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match=r"unlearn\(\) got an unexpected keyword argument 'output': did you mean"):
        kf.unlearn(tiny_model(), [], [], output="x")
