"""A run that is asked to stop: it ends after its step, with a checkpoint, and goes on to the same bits."""

import dataclasses
import functools
import signal

import pytest
import torch
from helpers import rarely, stopping_within
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf

CONFIG = kf.KUnBRConfig(
    batch_size=5, retain_batch_size=4, warmup_epochs=2, warmup_lr=1e-3, num_blocks=3, top_k=2, block_epochs=2,
    block_lr=1e-3, optimizer="adamw", seed=3, rtt=False,
)  # fmt: skip
STEPS = 4 + 2 * 4  # of the warm-up and of two blocks


def run(out, stop_at=None, resume=False, config=CONFIG, dtype=torch.float64):
    """(the weights or None, how many steps were made); asked to stop within step number `stop_at`."""
    reporter, stop, steps = stopping_within(stop_at)
    model = tiny_model(dtype=dtype)
    data = random_samples(10, seed=1), random_samples(12, seed=2)
    try:
        kf.unlearn(model, *data, config, output_dir=out, resume=resume, reporter=reporter, stop=stop)
    except kf.Stopped:
        return None, len(steps)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, len(steps)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    weights, steps = run(tmp_path_factory.mktemp("truth"))
    assert steps == STEPS
    return weights


@pytest.mark.parametrize("stop_at", rarely(range(1, STEPS + 1), (1, STEPS // 3, STEPS // 2, STEPS - 1, STEPS)))
def test_it_stops_after_its_step_and_goes_on_to_the_same_bits(stop_at, truth, tmp_path):
    """Asked within a step it makes at most one more, also in the last one of a stage; no step is made twice."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    weights, made = run(tmp_path, stop_at)
    assert weights is None and stop_at <= made <= stop_at + 1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before  # the library takes none
    weights, more = run(tmp_path, resume=True)
    assert made + more == STEPS
    assert [name for name, value in weights.items() if not torch.equal(value, truth[name])] == []


def test_stochastic_rounding_goes_on_with_the_same_bits(tmp_path):
    how = dict(master_weights="stochastic", warmup_master_weights="stochastic", warmup_epochs=1, top_k=1)
    config = dataclasses.replace(CONFIG, **how, block_epochs=1)
    rounded = functools.partial(run, config=config, dtype=torch.bfloat16)
    truth, steps = rounded(tmp_path / "truth")
    assert steps == 4 and rounded(tmp_path, 1)[0] is None
    found = rounded(tmp_path, resume=True)[0]
    assert all(torch.equal(value, truth[name]) for name, value in found.items())


def test_a_request_from_before_the_run_stops_its_first_step(tmp_path):
    stop = kf.Stop()
    stop.request()
    data = random_samples(10, seed=1), random_samples(12, seed=2)
    with pytest.raises(KeyboardInterrupt):  # no `except Exception` takes it for a failure
        kf.unlearn(tiny_model(), *data, CONFIG, output_dir=tmp_path, progress=False, stop=stop)
    weights, steps = run(tmp_path, resume=True)
    assert steps == STEPS - 1
