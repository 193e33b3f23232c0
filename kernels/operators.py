"""torch.library operators that run a function of an operation's triton_kernel.py."""

import importlib

import torch


def define(package: str, name: str, schema: str, function: str, mutates: tuple[str, ...] = ()):
    """torch.ops.kunbr_fast.NAME, opaque to torch.compile: `function` of the package's triton_kernel.py.

    The module, and with it triton, is imported when the operator first runs. mutates: the arguments that it writes to.
    Returns what `torch.library.custom_op` returns, for `register_fake`.
    """

    @torch.library.custom_op(f"kunbr_fast::{name}", mutates_args=mutates, schema=schema)
    def operator(*arguments):
        return getattr(importlib.import_module(f"{package}.triton_kernel"), function)(*arguments)

    return operator
