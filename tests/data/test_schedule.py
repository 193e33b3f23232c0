"""The order of the data: every epoch a permutation, any step by its number alone."""

from collections import Counter

import pytest
import torch

from kunbr_fast.data.schedule import Schedule, token_batches


@pytest.mark.parametrize(
    "num_forget, num_retain, batch, retain", [(13, 7, 4, 3), (6, 50, 6, 5), (1, 1, 4, 4), (10, 3, 5, 8)]
)
def test_every_epoch_is_a_permutation_and_the_retain_stream_is_even(num_forget, num_retain, batch, retain):
    schedule = Schedule(num_forget, num_retain, batch, retain, epochs=6, seed=3)
    steps = [schedule[i] for i in range(len(schedule))]
    per_epoch = schedule.steps_per_epoch
    assert len(steps) == 6 * per_epoch == 6 * -(-num_forget // batch)
    orders = []
    for epoch in range(6):
        seen = [i for forget, _ in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for i in forget]
        assert sorted(seen) == list(range(num_forget))
        orders.append(tuple(seen))
    if num_forget > 5:
        assert len(set(orders)) == 6  # each epoch in its own order
    stream = [i for _, part in steps for i in part]
    assert all(len(part) == retain for _, part in steps)
    for start in range(0, len(stream) - num_retain + 1, num_retain):
        assert sorted(stream[start : start + num_retain]) == list(range(num_retain))
    counts = Counter(stream)
    if len(stream) >= num_retain:
        assert len(counts) == num_retain and max(counts.values()) - min(counts.values()) <= 1


def test_random_access_is_sequential_access():
    schedule = Schedule(11, 9, 3, 2, epochs=4, seed=5)
    sequential = list(schedule)
    assert len(sequential) == len(schedule) == 16
    for step in torch.randperm(16).tolist():
        assert Schedule(11, 9, 3, 2, epochs=4, seed=5)[step] == sequential[step]
    assert list(Schedule(11, 9, 3, 2, epochs=4, seed=6)) != sequential
    # more epochs only go on: what was done stays as it was
    assert list(Schedule(11, 9, 3, 2, epochs=9, seed=5))[:16] == sequential
    for step in (-1, 16):
        with pytest.raises(IndexError):
            schedule[step]
    assert list(Schedule(5, 0, 2, 3, epochs=1, seed=0))[0][1] == []


def test_forget_and_retain_orders_are_not_the_same_shuffle():
    schedule = Schedule(40, 40, 40, 40, epochs=3, seed=0)
    assert len({tuple(order) for step in schedule for order in step}) == 6


def test_token_batches():
    assert token_batches([3, 3, 4, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert token_batches([9, 9], 4) == [[0], [1]]
    assert token_batches([], 4) == []
    assert token_batches([1] * 5, 100) == [[0, 1, 2, 3, 4]]
