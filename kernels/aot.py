"""Compile every Triton kernel, in every configuration of the table, with no GPU: `python -m kunbr_fast.kernels.aot`.

Prints registers a thread, shared memory, spills and the matrix instruction of each. Exits with 1 if a kernel does not
compile, spills registers to memory, wants more shared memory than there is, or lacks the matrix instruction of its
architecture (mma.sync on sm_80 and sm_120, wgmma on sm_90, tcgen05 on sm_100). The launchers describe what is compiled,
with tensors on the meta device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tiles as config
from .launch import INTERPRETED, Call

# Folders whose triton_kernel.py has `aot_calls(architecture)`: (label, Call, whether it uses the matrix units).
MODULES = ("grad_density", "norms", "rotary", "gated", "linear_loss", "optimizers")
TABLE_OF = {a: a for a in config.ARCHITECTURES} | {120: 80}  # whose tiles a GPU takes (`config.architecture`)
ARCHITECTURES = {f"sm_{a}": a for a in TABLE_OF}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes, the most of one program
_INSTRUCTIONS = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel became. Bytes; `registers` of one thread; `problem` is None when all is well.

    matrix: whether it must multiply on the matrix units; instruction: the matrix instruction in its code, or "".
    """

    architecture: int
    label: str
    matrix: bool = False
    registers: int = 0
    shared: int = 0
    spills: int = 0
    instruction: str = ""
    seconds: float = 0.0
    problem: str | None = None


def source(call: Call) -> ASTSource:
    """The kernel, specialised as a launch does: an int of 1 is a constant; multiples of 16 and tensors are aligned."""
    signature, constants, attributes = {}, dict(call.constexprs), {}
    for index, name in enumerate(call.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = call.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value != 1 and value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compile_call(architecture: int, label: str, call: Call, matrix: bool) -> Compiled:
    """Compile one launch for sm_`architecture`. A compiler's failure is a `problem`, not an exception."""
    start = time.perf_counter()
    try:
        compiled = triton.compile(source(call), target=GPUTarget("cuda", architecture, 32), options=call.options)
    except Exception as error:  # whatever a compiler pass raises: reported with the kernel's name, and exit code 1
        return Compiled(architecture, label, matrix, problem=f"does not compile: {type(error).__name__}: {error}")
    registers, stack = _resources(compiled.asm["cubin"])
    found = [name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, compiled.asm["ptx"])]
    wanted = [MATRIX_INSTRUCTION[architecture]] if matrix else []
    problem = None
    if stack:
        problem = f"spills: {stack} bytes of stack a thread"
    elif compiled.metadata.shared > SHARED_MEMORY[architecture]:
        problem = f"{compiled.metadata.shared} bytes of shared memory, at most {SHARED_MEMORY[architecture]} are there"
    elif found != wanted:
        problem = f"matrix instruction {' and '.join(found) or 'none'}, expected {' and '.join(wanted) or 'none'}"
    shared = compiled.metadata.shared
    seconds = time.perf_counter() - start
    return Compiled(architecture, label, matrix, registers, shared, stack, " ".join(found), seconds, problem)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of one thread. No kernel here has arrays or calls, so all stack is spilled values."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resources: {text!r}")
    return int(match[1]), int(match[2])


@functools.cache
def jobs(architectures: tuple[int, ...]) -> list[tuple[int, str, Call, bool]]:
    """The arguments of `compile_call` for every kernel."""
    kernels = [importlib.import_module(f".{name}.triton_kernel", __package__) for name in MODULES]
    return [(a, *described) for a in architectures for module in kernels for described in module.aot_calls(TABLE_OF[a])]


def _compile_job(architectures: tuple[int, ...], index: int) -> Compiled:
    torch.set_num_threads(1)
    return compile_call(*jobs(architectures)[index])


def compile_all(architectures: tuple[int, ...], workers: int | None = None) -> list[Compiled]:
    """Everything for the given architectures, in `workers` processes (default: one a core), with a progress bar."""
    job, count = functools.partial(_compile_job, architectures), len(jobs(architectures))
    # forked: the children have the kernels already and import nothing
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), context) as pool:
        results = pool.map(job, range(count))
        return list(tqdm(results, total=count, desc="compiling", unit="kernel", leave=False, disable=None))


def _architectures(text: str) -> tuple[int, ...]:
    unknown = [name for name in text.split(",") if name not in ARCHITECTURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(ARCHITECTURES)}")
    return tuple(ARCHITECTURES[name] for name in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kunbr_fast.kernels.aot", description=__doc__.split("\n")[0])
    of = "GPU generations, comma-separated (default: %(default)s)"
    parser.add_argument("--arch", type=_architectures, default=",".join(ARCHITECTURES), help=of)
    parser.add_argument("--workers", type=int, help="processes that compile (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled; unset it")
    results = compile_all(options.arch, options.workers)
    bad = [result for result in results if result.problem]
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        print(f"triton {triton.__version__}")
        print(f"{'arch':<7}{'registers':>9}{'shared':>8}{'spills':>7}  instruction  kernel")
        for r in results:
            numbers = f"{r.registers:>9}{r.shared:>8}{r.spills:>7}"
            print(f"sm_{r.architecture:<4}{numbers}  {r.instruction or '-':<11}  {r.label}")
        print(f"{len(results)} compiled, {len(bad)} with a problem")
    for result in bad:
        print(f"sm_{result.architecture} {result.label}: {result.problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
