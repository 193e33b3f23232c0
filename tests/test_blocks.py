"""The partition of the layers, and the choice of blocks."""

import pytest
import torch

from kunbr_fast.blocks import check_block, partition, select_blocks
from kunbr_fast.density import Density


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


@pytest.mark.parametrize(
    "block", [range(2, 2), range(3, 2), range(-1, 2), range(4, 7), range(0, 4, 2), (0, 1), 3, None]
)
def test_what_is_no_block(block):
    with pytest.raises(ValueError, match=r"expected a range of layers within range\(6\)"):
        check_block(block, 6)
    assert check_block(range(0, 6), 6) == range(0, 6)
