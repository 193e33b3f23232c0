"""Packages of kunbr_fast that lie beside it in a checkout.

A plain installation puts them inside: kunbr_fast/kernels/ and kunbr_fast/benchmarks/, where Python prefers them to the
files of these names. In a checkout (editable installation, or Python started in its root) those files load them from
where they are.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> None:
    """Makes ROOT/<last part of name>/ the package `name`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / name.rpartition(".")[2] / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
