"""Stands in for the package `kunbr_fast.kernels` in a checkout, where it lies in ../kernels.

A plain installation puts that package at kunbr_fast/kernels/, where Python prefers it to this file. In a
checkout (editable installation, or Python started in its root) this file loads it from where it is.
"""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    __name__, Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
)
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
