"""The proof's clock on a GPU, by a stand-in for its events: what is timed, and what runs ahead of it."""

from types import SimpleNamespace

import pytest
import torch

from kunbr_fast.kernels.dispatch import OPERATIONS
from kunbr_fast.kernels.proof import cases, clock


@pytest.fixture
def seen(monkeypatch):
    """What is queued, in order, on a device that there is not."""
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def elapsed_time(self, last):
            return 2.0

    monkeypatch.setattr(clock, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    monkeypatch.setattr(clock, "finish", lambda device: seen.append("wait"))
    return seen


@pytest.mark.parametrize("ahead", [False, True])
def test_what_runs_ahead_is_not_timed_and_not_waited_for(seen, ahead):
    before = (lambda: seen.append("long work")) if ahead else None
    assert clock._once(lambda: seen.append("run"), torch.device("cuda", 0), before) == 2.0
    assert seen == ["long work"] * ahead + ["event", "run", "event", "wait"]


def test_the_host_is_ahead_of_density_alone():
    found = {kind.operation: kind.host_ahead for operation in OPERATIONS for kind in cases.kinds(operation)}
    assert [operation for operation, ahead in found.items() if ahead] == ["grad_density"]
    assert set(found) == set(OPERATIONS)
