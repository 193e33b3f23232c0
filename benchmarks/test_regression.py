"""Each suite's quick cases for pytest-benchmark, which keeps runs and compares them:

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare

A case passes the gate first: no time of a wrong result. `kunbr-fast bench` is the harness for numbers to show, with
variants in turn and rooflines; here each variant is timed alone. end_to_end is a whole run, not a function to repeat.
"""

import functools
import os

import pytest
import torch

from kunbr_fast.benchmarks import harness, measure
from kunbr_fast.benchmarks.rows import WRONG
from kunbr_fast.benchmarks.suites import SUITES

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels are not what is measured", allow_module_level=True)

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = harness.Options(device=DEVICE, quick=True)
ROUNDS = 20
CASES = harness.all_cases([suite for suite in SUITES if suite != "end_to_end"], OPTIONS)


def _variants(case):
    small = case.small()  # has the same ones
    return [variant.name for variant in small.chosen(small.draw())]


gate = functools.cache(lambda case: case.gate())
about = functools.cache(lambda: measure.about(DEVICE))


@functools.lru_cache(maxsize=1)
def draw(case):
    return case.draw()


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(case, name, id=f"{case}, {name}") for case in CASES for name in _variants(case)]
)
def test_variant(benchmark, case, name):
    errors, left_out = gate(case)
    variant = next(variant for variant in case.chosen(draw(case)) if variant.name == name)
    if name not in errors:
        (pytest.fail if variant.ours and left_out[name].startswith(WRONG) else pytest.skip)(left_out[name])
    try:
        run = variant.make()
        run()
    except harness.Skip as reason:
        pytest.skip(str(reason))
    benchmark.group = str(case)
    benchmark.extra_info.update(
        **case.identity(), variant=name, ours=variant.ours, error=errors[name], gflop=case.flops / 1e9,
        mib=case.nbytes / 2**20, device=about()["device"], commit=about()["commit"],
    )  # fmt: skip

    def once():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
