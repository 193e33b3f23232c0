"""Every causal language model of transformers, tiny, is exact or refused with a reason: checks.py says what that is.

By hand (`make test-slow`, 10 minutes); representatives of each way of running run each time.
"""

import pytest
import table
import transformers
from architectures.checks import examine
from architectures.configurations import ARCHITECTURES, VARIANTS
from architectures.expected import NOT_BUILT, REFUSED

REPRESENTATIVES = {  # name: the way its batches run
    "gpt_oss": "packed",
    "bloom": "padded",
    "mamba": "padded",
    "llama4_text": "padded",
    "deepseek_v32": "picked",
    "qwen3_next, dynamic NTK": "alone",
}


@pytest.mark.parametrize("name, way", REPRESENTATIVES.items())
def test_representatives(name, way):
    """Decoder, density, and a block of two layers."""
    if name.split(",")[0] not in ARCHITECTURES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    result = examine(name, ("decoder", "density", "reinserted"), [range(1, 3)])
    assert (result.verdict, result.way, result.faults) == ("EXACT", way, [])


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
    if result.verdict == "EXACT" and transformers.__version__ == table.measured_with():
        assert table.row(result) in table.rows()


def test_the_page_says_what_is_expected():
    """And of every architecture, if the page is of this release."""
    found = {cells[0]: cells for cells in table.rows()}
    assert {name for name, cells in found.items() if len(cells) == 2} == {*NOT_BUILT, *REFUSED}
    assert all(reason in found[name][1] for name, reason in (NOT_BUILT | REFUSED).items())
    if transformers.__version__ == table.measured_with():
        assert set(found) == {*ARCHITECTURES, *VARIANTS}
    own = set(found) - set(VARIANTS)
    numbers = f"{len(own - set(NOT_BUILT | REFUSED))} of {len(own)}"
    assert f"**{numbers}** entries" in table.PAGE.read_text() and f"[{numbers}](docs/a" in table.README.read_text()
