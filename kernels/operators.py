"""torch.library operators that run a function of an operation's triton_kernel.py."""

import importlib
from collections.abc import Callable

import torch


def define(package: str, name: str, schema: str, function: str, fake: Callable | None = None, mutates=()) -> None:
    """Defines torch.ops.kunbr_fast.NAME, opaque to torch.compile: `function` of the package's triton_kernel.py.

    The module, and with it triton, is imported when the operator first runs. fake: what tracing calls instead, where
    the operator returns something; mutates: the arguments that it writes to.
    """

    def run(*arguments):
        return getattr(importlib.import_module(f"{package}.triton_kernel"), function)(*arguments)

    operator = torch.library.custom_op(f"kunbr_fast::{name}", run, mutates_args=mutates, schema=schema)
    if fake is not None:
        operator.register_fake(fake)
