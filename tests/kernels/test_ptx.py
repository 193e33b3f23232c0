"""The Triton kernels as they are compiled, executed on the host: project tests, run on PTX in a process of their own.

What this sees and the interpreter does not: tests/ptxsim/__init__.py. What it saw: docs/verified.md.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

from ptxsim import run

from kunbr_fast.kernels.tiles import TABLE

# One project test for each kind of launch: folder of the kernel -> (test file, its tests, kernels that must run)
KINDS = {
    "norms": (
        "test_norms.py",
        [
            "test_against_fp64[True-bfloat16-llama-triton]",
            "test_against_fp64[False-float16-layer without bias-triton]",
            "test_against_fp64[True-float32-layer-triton]",
            "test_shapes[shape2-layer-triton]",
            "test_the_widest[layer]",
            "test_layouts[how3-llama]",
            "test_nothing_uninitialised_is_read_and_bits_repeat[layer-triton]",
        ],
        ["norm_forward_kernel", "norm_backward_kernel"],
    ),
    "rotary": (
        "test_rotary.py",
        [
            "test_against_fp64[partial-triton-dtype3]",
            "test_against_fp64[odd-triton-dtype1]",
            "test_parts_of_one_product[triton]",
            "test_equal_bits_twice_on_poisoned_memory[triton]",
        ],
        ["rotary_kernel"],
    ),
    "gated": (
        "test_gated.py",
        [
            "test_against_fp64[float16-silu-triton]",
            "test_packed_against_fp64[bfloat16-gelu_none-triton]",
            "test_backward_overwrites_what_it_saved[silu-triton]",
            "test_layouts[triton]",
        ],
        ["gated_kernel", "gated_backward_kernel"],
    ),
    "linear_loss": (
        "test_linear_loss_triton.py",
        [
            "test_against_fp64[False-True-2.5-3.0-bfloat16]",
            "test_against_fp64[True-False-0.37-None-float32]",
            "test_shapes[1-8-63-None-bfloat16]",
            "test_nothing_uninitialised_is_read_and_bits_repeat[2.0-bfloat16]",
        ],
        ["linear_loss_kernel"],
    ),
    "optimizers": (
        "test_optimizers_triton.py",
        [
            "test_one_step_against_fp64[lion-0.1-1-1024-float32-bfloat16-float32-bfloat16]",
            "test_one_step_against_fp64[adamw-0.1-1000-3195-bfloat16-float32-float32-]",
            "test_memory_beyond_the_end_is_left_alone[adamw]",
            "test_rounding_to_nearest[float32]",
            "test_the_flag_tells_what_is_not_finite[lion-float32-bfloat16-float32-bfloat16-triton]",
            "test_the_flag_tells_what_is_not_finite[adamw-float32-float16-float32-float16-triton]",
        ],
        ["lion_kernel", "adamw_kernel"],
    ),
}
FIRST = {kind: tests[0] for kind, (_, tests, _) in KINDS.items()}


def density(architecture, kinds):
    """Every tile of the table for these kinds, each with samples of none, one and up to 131 tokens."""
    every = [str(tile) for tile in {tile for tiles in TABLE.values() for tile in tiles}]
    test, names = "tests/kernels/test_grad_density_triton.py::test_every_tile_of_the_table", []
    for kind in kinds:
        dtype = "float32" if kind == "fp32" else "bfloat16"
        for name in map(str, TABLE[architecture, kind]):  # pytest counts the tiles that read alike
            count = every.count(name)
            names += [f"{test}[{dtype}-{name}{i if count > 1 else ''}]" for i in range(count)]
    return names


def check(architecture, tests, kernels, folder, seconds):
    """Each test ran and passed on PTX, and launched what it was chosen for."""
    output, report = run.run(architecture, tests, folder, seconds)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= len(tests) and "skipped" not in output, output
    assert set(kernels) <= set(report["launches"]) and report["instructions"] > 1000 * len(kernels), report


@pytest.mark.slow  # tests/kernels/test_aot.py compiles them all, Triton's interpreter runs them
def test_one_launch_of_every_kernel(tmp_path):
    """For sm_90, with density's loads by tensor map and its products in the background; and faults, named."""
    tests = density(90, ["short"])[:1] + [f"tests/kernels/{KINDS[kind][0]}::{FIRST[kind]}" for kind in KINDS]
    tests += [f"tests/kernels/{KINDS['optimizers'][0]}::{KINDS['optimizers'][1][1]}", "tests/ptxsim/faulty_kernels.py"]
    kernels = ["grad_density_kernel", *(kernel for *_, kernels in KINDS.values() for kernel in kernels)]
    check(90, tests, kernels, tmp_path, seconds=600)


def test_a_test_that_fails_is_a_failure(tmp_path):
    (tmp_path / "test_bad.py").write_text("def test_bad():\n    assert False, 'on purpose'\n")
    with pytest.raises(AssertionError, match="on purpose"):
        run.run(80, [str(tmp_path / "test_bad.py")], tmp_path, seconds=600)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_faults_planted_in_density(architecture, tmp_path):
    check(architecture, ["tests/ptxsim/planted.py"], ["grad_density_kernel"], tmp_path, seconds=1200)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_launch(kind, architecture, tmp_path):
    file, tests, kernels = KINDS[kind]
    check(architecture, [f"tests/kernels/{file}::{test}" for test in tests], kernels, tmp_path, seconds=1200)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kind", ["short", "long", "any", "fp32"])
def test_every_tile_of_density(kind, architecture, tmp_path):
    check(architecture, density(architecture, [kind]), ["grad_density_kernel"], tmp_path, seconds=1200)
