"""The order of visits, and the names of stages."""

import pytest

from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.visits import Stage, Visit, layers, visits

BLOCKS = [range(0, 2), range(4, 6)]


@pytest.mark.parametrize(
    "insertion, order",
    [("independent", [(0, 0), (1, 0), (0, 1), (1, 1)]), ("cumulative", [(0, 0), (0, 1), (1, 0), (1, 1)])],
)
def test_order(insertion, order):
    found = visits(KUnBRConfig(rounds=2, insertion=insertion), BLOCKS)
    assert [(visit.round, visit.index) for visit in found] == order
    assert all(visit.block == BLOCKS[visit.index] for visit in found)
    # its data order is the visit's own, wherever it stands
    assert {(visit.round, visit.index): visit.number for visit in found} == {(0, 0): 1, (0, 1): 2, (1, 0): 3, (1, 1): 4}


def test_names_are_those_on_disk():
    visit = Visit(1, 0, range(4, 6), 2)
    assert visit.stage == "blocks.1.4-6" and visit.in_round(0).stage == "blocks.0.4-6"
    assert (visit.stage.group, visit.stage.block) == ("blocks", range(4, 6))
    assert Stage.evaluation("original") == "evaluation.original"
    attack = Stage.attack("f.0", 1e-05)
    assert attack == "rtt.f.0.1e-05" and (attack.group, attack.block) == ("rtt", None)
    assert Stage("reference.blocks").group == "reference" and layers(range(4, 6)) == "4-5"
