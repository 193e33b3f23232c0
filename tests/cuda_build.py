"""csrc/ built once for the tests of a process."""

import functools
import importlib.util
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_module():
    spec = importlib.util.spec_from_file_location("kunbr_csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _built():
    build = build_module()
    try:
        build.nvcc_version(build.find_nvcc())
    except build.Skipped as reason:
        return str(reason)
    folder = Path(tempfile.mkdtemp(prefix="kunbr-cuda-"))
    return folder / build.LIBRARY, build.build(folder / build.LIBRARY, force=True)  # what nvcc refuses is an error


def built():
    """(the library's path, what ptxas said); skips, with the reason, where there is no nvcc."""
    found = _built()
    if isinstance(found, str):
        pytest.skip(f"csrc/ is not built: {found}")
    return found
