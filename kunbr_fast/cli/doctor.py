"""`kunbr-fast doctor`: versions, devices, which implementation of each operation runs, and why not the others.

Where the driver shows no device, all of that is known without torch, whose import takes a second.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import os
import platform
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from kunbr_fast.cli.terminal import show
from kunbr_fast.cli.verdict_table import table
from kunbr_fast.kernels import cuda_library, dispatch, verdicts
from kunbr_fast.kernels.verdicts import Verdict
from kunbr_fast.machine import cpu_name, usable_cpus
from kunbr_fast.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Host:
    """torch.device("cpu"), without torch."""

    type: str = "cpu"
    index: None = None

    def __str__(self) -> str:
        return self.type


HOST = Host()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = doctor()
    if not arguments.json:
        show(*format_doctor(found).splitlines())
    return found


def doctor() -> dict[str, Any]:
    """Describes this machine and installation; every value is a JSON type.

    Keys: `versions` (package -> version or None), `platform`, `cpu` (cores usable by this process, torch's threads),
    `memory_bytes` (total), `devices` (the CPU first, then each CUDA device), `no_cuda` (why there is no CUDA device, or
    None), `cuda_library` (what csrc/ was built with, or why it is not), `operations` (operation -> device -> {"auto":
    choice, "unavailable": {impl: reason}, "by_name": {impl: why "auto" passes by what can run}}; on a GPU the choice
    that it may make, by kind of launch and size: `proofs` has each), `proofs` (device -> verdicts), `problems`
    (requirements of pyproject.toml that are not met; empty when all is well).
    """
    torch = _torch_if_needed()
    count = torch.cuda.device_count() if torch else 0
    cuda = [_cuda_device(i, torch.cuda.get_device_properties(i)) for i in range(count)]
    devices = [{"device": "cpu", "name": cpu_name()}, *cuda]
    places = {device["device"]: torch.device(device["device"]) if torch else HOST for device in devices}
    return {
        "versions": {
            "kunbr_fast": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": {"cores": len(usable_cpus()), "torch_threads": torch.get_num_threads() if torch else _torch_threads()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": devices,
        "no_cuda": None if cuda else _why_no_cuda(),
        "cuda_library": cuda_library.description(),
        "operations": {
            operation: {name: _implementations(operation, place) for name, place in places.items()}
            for operation in dispatch.OPERATIONS
        },
        "proofs": {name: _verdicts(place) for name, place in places.items() if place.type == "cuda"},
        "problems": _problems(),
    }


def format_doctor(d: dict) -> str:
    """`doctor()`'s result as text for a terminal."""
    lines = [f"{name:<13} {version or 'not installed'}" for name, version in d["versions"].items()]
    lines += [
        "",
        f"{'platform':<13} {d['platform']}",
        f"{'CPU':<13} {d['cpu']['cores']} cores usable, torch uses {d['cpu']['torch_threads']} threads",
        f"{'memory':<13} {d['memory_bytes'] / GIB:.1f} GiB",
    ]
    for device in d["devices"]:
        text = device["name"]
        if "memory_bytes" in device:
            kind = device["capability"]  # an AMD GPU's has a name: gfx942
            kind = f"sm_{kind.replace('.', '')}" if kind[0].isdigit() else kind
            text += f", {kind}, {device['memory_bytes'] / GIB:.1f} GiB"
        lines.append(f"{device['device']:<13} {text}")
    if d["no_cuda"]:
        lines.append(f"{'cuda':<13} none: {d['no_cuda']}")
    lines.append(f"{'cuda library':<13} {d['cuda_library']}")
    lines += ["", 'operations (what impl="auto" takes, and why not the others)']
    for operation, by_device in d["operations"].items():
        for device, found in by_device.items():
            others = [f"{impl}: {reason}" for impl, reason in found["unavailable"].items()]
            others += [f'{impl}: runs with impl="{impl}", {reason}' for impl, reason in found["by_name"].items()]
            others = f"({'; '.join(others)})" if others else ""
            lines.append(f"  {operation:<13} {device:<8} {found['auto']:<7} {others}".rstrip())
    for device, found in d["proofs"].items():
        lines += ["", f'proofs on {device} (what impl="auto" goes by)']
        lines += [f"  {line}" for line in table([Verdict.from_json(one) for one in found]).splitlines()]
    if d["problems"]:
        lines += ["", *(f"PROBLEM: {problem}" for problem in d["problems"])]
    return "\n".join(lines)


# ---------------------------------------------------------------- operations


def _implementations(operation: str, device: torch.device | Host) -> dict:
    found = {"auto": dispatch.resolve(operation, "auto", device), "unavailable": {}, "by_name": {}}
    for impl in dispatch.IMPLEMENTATIONS:
        if (reason := dispatch.why_not(operation, impl, device)) is not None:
            found["unavailable"][impl] = reason
        elif (reason := dispatch.why_not_auto(operation, impl, device)) is not None:
            found["by_name"][impl] = reason
    return found


def _verdicts(device: torch.device) -> list[dict[str, Any]]:
    return [verdict.as_json() for verdict in verdicts.current(device)]


# ---------------------------------------------------------------- packages


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _problems() -> list[str]:
    """Each requirement in our own metadata (extras aside) that is missing or out of range."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("kunbr-fast") or ()]
    except metadata.PackageNotFoundError:
        return ["kunbr-fast is not installed, so its requirements are not known: run `pip install -e .`"]
    problems = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            problems.append(f"{requirement.name} is not installed: pip install '{wanted}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is not supported: pip install '{wanted}'")
    return problems


# ---------------------------------------------------------------- torch and its devices


def _torch_if_needed() -> ModuleType | None:
    """torch, where it is imported already or may see a device: NVIDIA's, or AMD's if it is built for those."""
    if "torch" not in sys.modules and not _driver_devices() and not getattr(_torch_build(), "hip", None):
        return None
    import torch

    return torch


def _driver_devices() -> int:
    """How many devices NVIDIA's driver shows to this process (CUDA_VISIBLE_DEVICES counts); 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def _torch_build() -> ModuleType:
    """torch/version.py: this torch's version, and what it was built for."""
    package = importlib.util.find_spec("torch")
    if package is None:
        raise ValueError("torch is not installed: pip install torch")
    spec = importlib.util.spec_from_file_location("torch_version", Path(package.origin).with_name("version.py"))
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def _torch_threads() -> int:
    """How many threads torch starts with: one for each physical core, or as many as the environment says (with MKL, so
    on x86, no more than there are physical cores)."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").partition(",")[0].strip()
        if first.isascii() and first.isdigit() and len(first) < 10 and int(first):
            most = _physical_cores(range(os.cpu_count() or 1))
            return min(int(first), most) if platform.machine() == "x86_64" else int(first)
    return _physical_cores(usable_cpus())


def _physical_cores(cpus: Collection[int]) -> int:
    """How many cores these CPUs are, of which one core may be two."""
    try:
        topology = Path("/sys/devices/system/cpu")
        return len({(topology / f"cpu{i}/topology/thread_siblings_list").read_text() for i in cpus})
    except OSError:  # not Linux
        return len(cpus)


def _cuda_device(number: int, of: Any) -> dict[str, Any]:
    """of: torch's properties of the device."""
    capability = (
        getattr(of, "gcnArchName", "").partition(":")[0]
        if getattr(_torch_build(), "hip", None)
        else f"{of.major}.{of.minor}"
    )
    return dict(device=f"cuda:{number}", name=of.name, capability=capability, memory_bytes=of.total_memory)


def _why_no_cuda() -> str:
    build = _torch_build()
    if getattr(build, "hip", None):
        return f"torch {build.__version__} is built for ROCm {build.hip} but sees no device"
    if build.cuda is None:
        return f"torch {build.__version__} is built without CUDA"
    return f"torch {build.__version__} is built for CUDA {build.cuda} but sees no device"
