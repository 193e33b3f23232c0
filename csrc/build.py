"""Builds csrc/ into one shared library with nvcc: no torch, no Python headers, no network.

    python csrc/build.py                       into kernels/, where an editable installation finds it
    python csrc/build.py --output FILE         elsewhere
    python csrc/build.py --ptxas               and prints what ptxas says of registers and spills

setup.py runs the same when it finds nvcc. Machine code for sm_80 and sm_90a, and PTX that drivers of other GPUs
(sm_86 and sm_89 run sm_80's; 10.0, 12.0) compile when the library is first used.

nvcc: $KUNBR_NVCC, else $CUDA_HOME/bin/nvcc, else the one on the path. KUNBR_BUILD_CUDA=0 leaves the library out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = "libkunbr_cuda.so"
DEFAULT = CSRC.parent / "kernels" / LIBRARY
TARGETS = "sm_80 sm_90a, PTX for later ones"
# A kernel for sm_90a alone is not compiled for the others.
PORTABLE = ("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a")
HOPPER = ("-gencode=arch=compute_90a,code=sm_90a",)
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-O2")
FLAGS += ("-Xptxas=-v", "-Xptxas=-warn-spills")
TIMEOUT = 120  # seconds for one file; several times what it takes


class Skipped(Exception):
    """There is no library, and why; the package works without it."""


def sources() -> list[Path]:
    return sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cuh", ".h"))


def source_hash() -> str:
    digest = hashlib.sha256()
    for path in [*sources(), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether `library` was built from these sources."""
    return library.is_file() and f"kunbr-source-hash:{source_hash()}".encode() in library.read_bytes()


def find_nvcc() -> str:
    """nvcc's path. Skipped with the reason where there is none, or where it is not wanted."""
    if os.environ.get("KUNBR_BUILD_CUDA") == "0":
        raise Skipped("KUNBR_BUILD_CUDA=0 is set")
    if not sys.platform.startswith("linux"):
        raise Skipped(f"it is built on Linux only, this is {sys.platform}")
    if "KUNBR_NVCC" in os.environ:
        named = shutil.which(os.environ["KUNBR_NVCC"])
        if named is None:
            raise Skipped(f"KUNBR_NVCC={os.environ['KUNBR_NVCC']} is not there")
        return named
    for home in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(home):
            found = shutil.which(Path(os.environ[home]) / "bin" / "nvcc")
            if found:
                return found
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise Skipped("no nvcc: not on the path, no CUDA_HOME, not in /usr/local/cuda")
    return found


def nvcc_version(nvcc: str) -> tuple[int, int]:
    done = _run([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", done)
    if found is None:
        raise Skipped(f"{nvcc} --version names no release: {done.strip()[-200:]!r}")
    version = int(found[1]), int(found[2])
    if version < (12, 4):
        raise Skipped(f"{nvcc} is of CUDA {version[0]}.{version[1]}: 12.4 or newer is needed for sm_90a")
    return version


def build(output: Path = DEFAULT, *, force: bool = False) -> str:
    """Builds `output`, unless it is current. Returns what ptxas said ("" where nothing was built); Skipped if not."""
    if not force and is_current(output):
        return ""
    nvcc = find_nvcc()
    nvcc_version(nvcc)
    units = sorted(CSRC.glob("*.cu"))
    defines = (f'-DKUNBR_SOURCE_HASH="{source_hash()}"', f'-DKUNBR_TARGETS="{TARGETS}"')
    with tempfile.TemporaryDirectory(prefix="kunbr-build-") as folder:
        objects = [Path(folder) / f"{unit.stem}.o" for unit in units]

        def compile_one(unit: Path, into: Path) -> str:
            targets = HOPPER if unit.stem.endswith("_sm90") else PORTABLE
            return _run([nvcc, *FLAGS, *targets, *defines, "-c", str(unit), "-o", str(into)])

        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            said = list(pool.map(compile_one, units, objects))
        # libstdc++ and cudart are linked in: what is left are the C library and, once a GPU is used, the driver
        link = ["-shared", "-arch=sm_80", "-cudart", "static", "-Xlinker=--exclude-libs,ALL"]
        link += ["-Xcompiler=-static-libstdc++", "-Xcompiler=-static-libgcc", "-Xlinker=-soname," + LIBRARY]
        made = Path(folder) / LIBRARY
        _run([nvcc, *link, *map(str, objects), "-o", str(made)])
        output.parent.mkdir(parents=True, exist_ok=True)
        # in one step: a process that has the old one open keeps it, and nobody sees half a file
        moving = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(made, moving)
        os.replace(moving, output)
    return "\n".join(said)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except OSError as error:
        raise Skipped(f"{command[0]} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"{' '.join(command)} took more than {TIMEOUT} seconds") from error
    if done.returncode:
        raise Skipped(f"{' '.join(command)} failed with {done.returncode}:\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    parser.add_argument("--force", action="store_true", help="also where it is up to date")
    parser.add_argument("--ptxas", action="store_true", help="print registers, shared memory and spills")
    arguments = parser.parse_args()
    try:
        said = build(arguments.output, force=arguments.force)
    except Skipped as reason:
        print(f"kunbr-fast: the CUDA library is not built: {reason}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {'built' if said else 'up to date'}")
    if arguments.ptxas:
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
