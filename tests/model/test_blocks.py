"""The partition of the layers, and the choice of blocks."""

import dataclasses

import pytest
import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.density.select import above, highest, pareto_front, select_blocks
from kunbr_fast.model.blocks import check_block, partition


def density(*values):
    per_layer = torch.tensor(values, dtype=torch.float64)
    return Density(per_layer, {}, torch.ones(len(values), dtype=torch.int64), 1)


def test_every_layer_is_in_exactly_one_block():
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            blocks = partition(layers, count)
            assert [i for block in blocks for i in block] == list(range(layers))
            assert all(len(block) == layers // count for block in blocks[:count])
            assert len(blocks) == count + (layers % count > 0)
            assert sum(len(block) for block in blocks[count:]) == layers - count * (layers // count)


def test_the_published_partition():
    assert partition(32, 8) == [range(i, i + 4) for i in range(0, 32, 4)]
    assert partition(30, 8) == [*(range(i, i + 3) for i in range(0, 24, 3)), range(24, 30)]


@pytest.mark.parametrize("count", [0, -1, 7])
def test_a_number_of_blocks_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"num_blocks={count}: expected 1 to 6"):
        partition(6, count)


def test_the_densest_blocks_from_low_to_high():
    layers = density(1, 1, 9, 0, 2, 2, 5, 5, 100, 100)  # block sums 2, 9, 4, 10, 200
    assert select_blocks(layers, 5, 1) == [range(6, 8)]
    assert select_blocks(layers, 5, 2) == [range(2, 4), range(6, 8)]
    assert select_blocks(layers, 5, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert select_blocks(layers, 5, 1, skip_last_layers=0) == [range(8, 10)]


def test_a_block_that_holds_any_of_the_last_layers_is_never_chosen():
    layers = density(1, 2, 3, 4, 5, 6, 7, 1000, 1000)
    assert select_blocks(layers, 3, 2, skip_last_layers=2) == [range(0, 3), range(3, 6)]
    # 4 blocks of 2 layers and one of 1: skipping 2 layers also skips the block that holds layers 6 and 7
    assert select_blocks(layers, 4, 3, skip_last_layers=2) == [range(0, 2), range(2, 4), range(4, 6)]
    assert select_blocks(layers, 4, 1, skip_last_layers=1) == [range(6, 8)]
    with pytest.raises(ValueError, match="top_k=3: expected 1 to 2; 9 layers in 3 blocks leave 2"):
        select_blocks(layers, 3, 3, skip_last_layers=2)
    with pytest.raises(ValueError, match="top_k=0"):
        select_blocks(layers, 3, 0)
    with pytest.raises(ValueError, match="expected 1 to 0; .* leave 0"):
        select_blocks(layers, 1, 1)


def test_equal_densities_go_to_the_lower_block():
    assert select_blocks(density(*[1] * 10), 5, 2) == [range(0, 2), range(2, 4)]


def test_it_is_the_sum_that_counts_not_the_normalised_mean():
    # 5 layers in 2 blocks of 2 and a left-over block of 1
    assert select_blocks(density(3, 3, 2, 2, 5), 2, 1, skip_last_layers=0) == [range(0, 2)]


def test_places_of_values():
    values = [3, 9, 9, 1, 5]
    assert highest(values, 1) == [1] and highest(values, 3) == [1, 2, 4] and highest(values, 5) == [0, 1, 2, 3, 4]
    assert highest(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]
    assert above(values, 3) == [1, 2, 4] and above(values, 9) == []
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}: expected 1 to 5"):
            highest(values, k)


def test_the_pareto_front_is_what_nothing_beats():
    # the second is as important as the first and less aligned; the fourth beats the fifth in both
    assert pareto_front([5, 5, 1, 4, 3, 9], [0.5, -0.2, 0.3, 0.1, 0.15, 0.9]) == [1, 3, 5]
    assert pareto_front([2, 2, 2], [-0.1, 0.1, 0.1]) == [0, 1, 2]  # equals do not beat each other
    assert pareto_front(torch.tensor([1.0]), torch.tensor([-1.0])) == [0] and pareto_front([], []) == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = torch.randint(0, 6, (2, 12), generator=generator)
        front = pareto_front(a, -b)
        for i in range(12):
            beaten = any(a[j] >= a[i] and b[j] <= b[i] and (a[j], b[j]) != (a[i], b[i]) for j in range(12))
            assert (i in front) != beaten
    with pytest.raises(ValueError, match="2 values of importance and 1 of alignment"):
        pareto_front([1, 2], [0])


def test_the_other_rules_choose_blocks():
    layers = density(1, 1, 9, 0, 2, 2, 5, 5, 100, 100)  # block sums 2, 9, 4, 10, 200
    assert select_blocks(layers, 5, rule="threshold", threshold=4) == [range(2, 4), range(6, 8)]
    assert select_blocks(layers, 5, rule="threshold", threshold=4, skip_last_layers=0)[-1] == range(8, 10)
    slug = dataclasses.replace(
        layers, statistic="slug", alignment=torch.tensor([0.1, -0.1, 0.2, 0.2, 0, 0.3, 0.5, -0.5, 0, 0]).double()
    )  # means 0.1, 0.2, 0.15, 0.5
    assert select_blocks(slug, 5, rule="pareto") == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    slug = dataclasses.replace(slug, alignment=torch.tensor([0.3, -0.3, 0.2, 0.2, 0.2, -0.4, 0.5, -0.5, 0, 0]).double())
    assert select_blocks(slug, 5, rule="pareto") == [range(2, 4), range(6, 8)]
    assert select_blocks(slug, 5, 1) == [range(6, 8)]


def test_rules_and_what_they_need():
    layers = density(*range(10))
    with pytest.raises(ValueError, match="rule='x': expected one of top_k, threshold, pareto"):
        select_blocks(layers, 5, 1, rule="x")
    with pytest.raises(ValueError, match="top_k=None with rule='top_k': rule='top_k' needs top_k"):
        select_blocks(layers, 5)
    with pytest.raises(ValueError, match="top_k=2 with rule='pareto': .* the others do not take it"):
        select_blocks(layers, 5, 2, rule="pareto")
    with pytest.raises(ValueError, match="threshold=None with rule='threshold'"):
        select_blocks(layers, 5, rule="threshold")
    with pytest.raises(ValueError, match="threshold=1 with rule='top_k'"):
        select_blocks(layers, 5, 1, threshold=1)
    with pytest.raises(ValueError, match="threshold=99: no block is above it, the highest has 13"):
        select_blocks(layers, 5, rule="threshold", threshold=99)
    with pytest.raises(ValueError, match='rule="pareto" needs alignment: measure statistic="slug" with retain='):
        select_blocks(layers, 5, rule="pareto")
    with pytest.raises(ValueError, match='statistic="cosine" says how alike two gradients are'):
        select_blocks(dataclasses.replace(layers, statistic="cosine"), 5, 1)


@pytest.mark.parametrize(
    "block", [range(2, 2), range(3, 2), range(-1, 2), range(4, 7), range(0, 4, 2), (0, 1), 3, None]
)
def test_what_is_no_block(block):
    with pytest.raises(ValueError, match=r"expected a range of layers within range\(6\)"):
        check_block(block, 6)
    assert check_block(range(0, 6), 6) == range(0, 6)
