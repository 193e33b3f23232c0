"""Every causal language model of transformers, tiny, is exact or refused with a reason: checks.py says what that is."""

import pytest
from architectures.checks import examine
from architectures.configurations import ARCHITECTURES, VARIANTS
from architectures.expected import NOT_BUILT, REFUSED


def test_every_block_of_a_mixture_is_reinserted():
    result = examine("mixtral", ("decoder", "reinserted"))
    assert (result.verdict, result.faults) == ("EXACT", [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIANTS])
def test_exact_or_refused(name):
    result = examine(name)
    expected = "NOT BUILT" if name in NOT_BUILT else "REFUSED" if name in REFUSED else "EXACT"
    assert (result.verdict, result.faults) == (expected, []), result.refused
    assert (NOT_BUILT | REFUSED).get(name, "") in result.reason
