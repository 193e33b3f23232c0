"""The ahead-of-time check: everything compiles for every architecture, and what should fail it does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

from kunbr_fast.kernels import aot
from kunbr_fast.kernels import tiles as config


def run(*arguments, code=None, **environment):
    """The check in a process of its own, where kernels are compiled, not interpreted as in these tests."""
    everything = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = ["-c", code] if code else ["-m", "kunbr_fast.kernels.aot"]
    return subprocess.run([sys.executable, *command, *arguments], env=everything, capture_output=True, text=True)


def test_everything_compiles_without_spills_on_the_matrix_units():
    done = run("--json", "--arch", "sm_80,sm_90,sm_100")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {r["architecture"] for r in results} == {80, 90, 100}
    for architecture, instruction in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")):
        mine = [r for r in results if r["architecture"] == architecture]
        labels = [r["label"] for r in mine]
        for (entry, kind), tiles in config.TABLE.items():  # no configuration of the table is left out
            for tile in tiles if entry == architecture else ():
                assert any(f" {kind} K=" in label and label.endswith(str(tile)) for label in labels), (kind, tile)
        assert all(r["spills"] == 0 and 0 < r["registers"] <= 255 and r["problem"] is None for r in mine)
        assert {r["instruction"] for r in mine if r["matrix"]} == {instruction}
        assert {r["instruction"] for r in mine if not r["matrix"]} == {""}
        # of the products only those in fp32 run elsewhere
        assert all(r["matrix"] != ("fp32" in r["label"]) for r in mine if r["label"].startswith("grad_"))
    assert {r["label"].split()[0] for r in results} >= {"grad_density"}
    # what tiles.py's reasons count on: how many programs share a multiprocessor (228 KiB on sm_90, 164 on sm_80)
    for architecture, kind, count in ((90, "short 32", 3), (90, "short 64", 3), (90, "short", 2), (80, "short", 3)):
        tile = config.TABLE[architecture, kind][0]
        mine = [r for r in results if r["architecture"] == architecture and r["label"].endswith(f" {tile}")]
        assert mine
        for r in mine:
            by_registers = 65536 // (32 * tile.num_warps * (-(-r["registers"] // 8) * 8))
            by_memory = ({80: 164, 90: 228}[architecture] << 10) // (r["shared"] + 1024)
            assert min(by_registers, by_memory) >= count, r


GREEDIEST = """
import sys
from kunbr_fast.kernels import aot

every = aot.jobs((120,))
aot.jobs = lambda architectures: [job for job in every if "grad_density l1 by row" in job[1]]
sys.exit(aot.main())
"""


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_small_shared_memory(all_of_them):
    """sm_120 has 99 KiB and no wgmma: sm_80's tiles fit. Of all kernels these hold most, with three projections."""
    done = run("--json", "--arch", "sm_120", code=None if all_of_them else GREEDIEST)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    kinds = [kind for (entry, kind), tiles in config.TABLE.items() if entry == 80 for _ in tiles]
    greediest = [r for r in results if "grad_density l1 by row" in r["label"]]
    assert all(any(f" {kind} K=" in r["label"] for r in greediest) for kind in kinds)
    assert all(r["architecture"] == 120 and r["problem"] is None and r["spills"] == 0 for r in results)
    assert {r["instruction"] for r in results if r["matrix"]} == {"mma.sync"}
    assert max(r["shared"] for r in results) == max(r["shared"] for r in greediest) <= 99 << 10
    assert len(results) > len(greediest) or not all_of_them


def test_a_gpu_takes_the_tiles_that_were_compiled_for_it(monkeypatch):
    import torch

    for architecture, entry in aot.TABLE_OF.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, a=architecture: divmod(a, 10))
        assert config.architecture(torch.device("cuda", 0)) == entry


BAD = """
import sys
import torch
from kunbr_fast.kernels import aot, tiles as config
from kunbr_fast.kernels.grad_density import triton_kernel as grad_density

def call(tile, dtype=torch.bfloat16):
    x, dy = (torch.empty(512, n, dtype=dtype, device="meta") for n in (4096, 14336))
    cu = torch.empty(9, dtype=torch.int32, device="meta")
    return grad_density.call_grad_density(x, [dy], cu, "grad_l1", None, tile, 132)

Tile = config.Tile
kind = sys.argv[1]
aot.MODULES = ("grad_density",)
grad_density.aot_calls = lambda architecture: iter([{
    "spill": lambda: ("bad", call(Tile(128, 256, 64, 4, 2)), True),  # 256 accumulators a thread
    "shared": lambda: ("bad", call(Tile(128, 128, 128, 8, 4)), True),  # 256 KiB
    "instruction": lambda: ("bad", call(Tile(64, 32, 16, 4, 2), torch.float32), True),
    "broken": lambda: ("bad", call(Tile(96, 128, 64, 4, 2)), True),  # not a power of two
}[kind]()])
sys.argv[1:] = ["--arch", "sm_90"]
sys.exit(aot.main())
"""


@pytest.mark.parametrize(
    "kind, message",
    [
        ("spill", "spills: "),
        pytest.param("shared", "bytes of shared memory, at most 232448 are there", marks=pytest.mark.slow),
        pytest.param("instruction", "matrix instruction none, expected wgmma", marks=pytest.mark.slow),
        pytest.param("broken", "does not compile: ", marks=pytest.mark.slow),
    ],
)
def test_what_must_fail_it(kind, message):
    done = run(kind, code=BAD)
    assert done.returncode == 1, done.stdout
    assert any(line.startswith("sm_90 bad: ") and message in line for line in done.stderr.splitlines()), done.stderr
    assert "1 compiled, 1 with a problem" in done.stdout


ORDER = """
import re
import torch
import triton
from kunbr_fast.kernels import aot, tiles as config
from kunbr_fast.kernels.grad_density import triton_kernel as grad_density

x, dy = (torch.empty(512, n, dtype=torch.bfloat16, device="meta") for n in (4096, 14336))
cu = torch.empty(9, dtype=torch.int32, device="meta")
for kind in ("short 32", "short 64", "short", "long"):
    call = grad_density.call_grad_density(x, [dy], cu, "grad_l1", None, config.TABLE[90, kind][0], 132)
    compiled = triton.compile(aot.source(call), target=aot.GPUTarget("cuda", 90, 32), options=call.options)
    events = r"wgmma\\.mma_async|wgmma\\.wait_group\\.sync\\.aligned (\\d)|cp\\.async\\.bulk\\.(tensor)"
    found = ["".join((wait, "L" * bool(load))) or "m" for wait, load in re.findall(events, compiled.asm["ptx"])]
    print(kind, re.sub("m+", "m", "".join(found)), sep=":")
"""


def test_the_next_load_goes_before_the_sum():
    """m: products are issued; 1, 0: a wait until so many groups of them are left; L: a load is issued. In a loop
    the next loads go between a product and the wait for it, and no product is waited for at once."""
    done = run(code=ORDER)
    assert done.returncode == 0, done.stderr
    order = dict(line.split(":") for line in done.stdout.splitlines())
    fitting = {"short 32": 1, "short 64": 2, "short": 3, "long": 0}
    assert order.keys() == fitting.keys()
    for kind, loops in fitting.items():
        assert "m0" not in order[kind], order
        assert order[kind].count("m1L0") == loops and order[kind].count("m1LL0") == 1, order


def test_arguments():
    done = run("--arch", "sm_90,sm_70")
    assert done.returncode == 2 and "sm_70: expected some of sm_80,sm_90,sm_100,sm_120" in done.stderr
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1 is set" in done.stderr


def test_source_specialises_as_a_launch_does():
    import torch
    from test_grad_density_triton import batch

    from kunbr_fast.kernels.grad_density import triton_kernel as grad_density

    x, dys, cu = batch([16, 16], 48, (32, 33), torch.float16)
    tile = config.TABLE[90, "long"][1]
    call = grad_density.call_grad_density(x, dys, cu, "grad_l1", None, tile, 1)
    source = aot.source(call)
    names = call.kernel.arg_names
    aligned = {names[index] for (index,) in source.attrs}
    assert source.signature["x"] == "*fp16" and source.signature["cu_seqlens"] == "*i32"
    assert source.signature["K"] == "i32" and "K" in aligned and "N0" in aligned and "N1" not in aligned
    assert source.constants[(names.index("stride_xk"),)] == 1 and source.signature["stride_xk"] == "constexpr"
    assert source.constants[(names.index("BN"),)] == 128
