"""Launches of csrc's Hopper kernel for sentryward: its PTX as nvcc makes it, its arguments as the host code makes them.

What sentryward does not know is written anew. Products become accesses to shared memory (wgmma.py), insertions of bits
shifts and masks. The tensor maps, which the kernel finds through a pointer, become an array that is passed by value:
that each copy takes the right map is verified, that maps_kernel wrote the map is not. Samples' lengths are constants of
a launch: they say how far the kernel loops.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import wgmma
from launches import Launch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
NVCC = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ptx", "-arch=sm_90a")  # csrc/build.py's, without -lineinfo
SECONDS = 120
MAP_BYTES = 128

# (file of csrc, text that stands in it once, what takes its place)
Edit = tuple[str, str, str]


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


@functools.cache
def compiled(edits: tuple[Edit, ...] = ()) -> str:
    """The PTX of grad_density_sm90.cu, after `edits`. ValueError where the text of one is not there, or twice."""
    with tempfile.TemporaryDirectory(prefix="kunbr-verify-") as folder:
        for path in CSRC.iterdir():
            if path.suffix in (".cu", ".cuh", ".h"):
                shutil.copy(path, folder)
        for name, old, new in edits:
            path = Path(folder) / name
            text = path.read_text()
            if text.count(old) != 1:
                raise ValueError(f"csrc/{name} has {text.count(old)} times, not once, the text of a fault:\n{old}")
            path.write_text(text.replace(old, new))
        source, output = Path(folder) / "grad_density_sm90.cu", Path(folder) / "out.ptx"
        run([shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", *NVCC, str(source), "-o", str(output)])
        return output.read_text()


@functools.cache
def launch_of(samples: int, K: int, along: int, N: int) -> dict:
    """What arguments.cpp prints."""
    with tempfile.TemporaryDirectory(prefix="kunbr-verify-") as folder:
        program = str(Path(folder) / "arguments")
        run(["g++", "-std=c++17", str(HERE / "arguments.cpp"), "-o", program])
        return json.loads(run([program, *map(str, (samples, K, 0, along, N))]))


def kernel(ptx: str, entry: str, maps: int) -> str:
    """The one kernel of the file: products as accesses, an array of tensor maps in place of the pointer to them."""
    head, body = ptx[: ptx.index(".visible .entry")], ptx[ptx.index(f".visible .entry {entry}(") :]
    body = body.partition("\n\t// .globl")[0]  # which announces the next kernel
    name = f"{entry}_param_2"
    body, declared = re.subn(rf"\.param \.u64 {name}\b", f".param .align 128 .b8 {name}[{maps * MAP_BYTES}]", body)
    body, read = re.subn(rf"ld\.param\.u64\s+(%rd\d+), \[{name}\];", rf"mov.b64 \1, {name};", body)
    if (declared, read) != (1, 1):
        raise ValueError(f"{name}, the pointer to the tensor maps, is declared {declared} times and read {read} times")
    return without_bfi(wgmma.as_accesses(head + body))


def without_bfi(ptx: str) -> str:
    """Insertions of bits as shifts and masks: an address with one in it is unknown to sentryward."""

    def written(found: re.Match) -> str:
        to, low, into, at, width = found.groups()
        mask = (1 << int(width)) - 1 << int(at) & 0xFFFFFFFF
        lines = [f"shl.b32 %group_at, {low}, {at};", f"and.b32 %group_at, %group_at, {mask};"]
        return "\n".join([*lines, f"and.b32 {to}, {into}, {mask ^ 0xFFFFFFFF};", f"or.b32 {to}, {to}, %group_at;"])

    return re.sub(r"bfi\.b32\s+(%r\d+), (\S+), (\S+), (\d+), (\d+);", written, ptx)


def tensor_map(parameter: str, place: int, name: str, start: int, tokens: int, columns: int) -> dict:
    """As maps_kernel makes it: boxes of 64 tokens x 64 columns, what lies beyond the sample's tokens is zeros."""
    described = dict(parameter=parameter, offset=place * MAP_BYTES, object=name, base_byte_offset=2 * start * columns)
    described |= dict(element_type="bf16", swizzle="128B", interleave="none", oob_fill="zero", rank=2)
    described |= dict(global_shape=[columns, max(tokens, 1)], global_strides_bytes=[2 * columns])
    return described | dict(box_shape=[64, 64], element_strides=[1, 1])


def describe(lengths: Sequence[int], N: int, K: int, blocks: int = 1, along: int = 0, edits: tuple[Edit, ...] = ()):
    """(PTX, sentryward's description) of `blocks` persistent blocks on samples of these lengths."""
    ptx = compiled(edits)
    entry = re.search(r"\.visible \.entry (\w*hopper_kernel\w*Bf16\w*)\(", ptx)[1]
    host = launch_of(len(lengths), K, along, N)
    if blocks > host["items"]:
        raise ValueError(f"{blocks} blocks for {host['items']} items: the host launches no more blocks than items")
    ranked = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    maps, segments = [], []
    for rank, sample in enumerate(ranked):
        start, tokens = sum(lengths[:sample]), lengths[sample]
        segments.append([tokens, sample])
        for operand, (name, columns) in enumerate((("x", K), ("dy", N))):
            maps.append(tensor_map(f"{entry}_param_2", 2 * rank + operand, name, start, tokens, columns))
    words, partial = host["words"], host["partial"]
    values = [
        dict(parameter=f"{entry}_param_0", offset=4 * place, type="u32", value=word)
        for place, word in enumerate(words)
        if not partial <= 4 * place < partial + 8
    ]
    pointer = dict(parameter=f"{entry}_param_0", offset=partial, type="pointer", space="global", object="partial")
    size = {"grid_dim": [blocks, 1, 1], "block_dim": [host["threads"], 1, 1], "dynamic_shared_bytes": host["shared"]}
    described = dict(schema="spverify.kernel-input/v1", entry=entry, launch=size, declarations=[pointer])
    described |= dict(arguments=values, tma_descriptors=maps)
    described |= dict(shape_arrays=[{"parameter": f"{entry}_param_1", "shapes": segments}])
    return kernel(ptx, entry, len(maps)), described


def launch(label: str, *arguments, **rest) -> Launch:
    return Launch("csrc density", label, "sm_90a", functools.partial(describe, *arguments, **rest))


LAUNCHES = (
    launch("64 tokens, 256 x 128", [64], 256, 128),
    launch("70 tokens by row, N=200 K=72", [70], 200, 72, along=1),
    launch("64+130+0+17 tokens, 256 x 256: both rings go round", [64, 130, 0, 17], 256, 256),
    launch("40+100 tokens, 512 x 512, two blocks", [40, 100], 512, 512, blocks=2),
    launch("270 tokens, 256 x 384: dy loaded for each tile", [270], 256, 384),
)
