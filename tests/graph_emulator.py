"""What a CUDA graph does, on a CPU: every operator of a function is written down with the tensors that it read and
wrote, and a replay runs those operators again on those very tensors. Python does not run again, so a value that Python
took from a tensor, a tensor at another address, or an operation that waits for the device shows as in a real graph."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# On a GPU these make the host wait, which a capture does not allow.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "aten::unique",
}


def waits(func, args):
    name = func._schema.name
    indices = args[1] if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
    by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
    return by_mask or name in WAITS or f"{name}.{func._schema.overload_name}" in WAITS


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def tensors(value):
    return [t for t in (value if isinstance(value, tuple | list) else (value,)) if isinstance(t, torch.Tensor)]


def capture(function, pool=None):
    """As training.graphs.capture_cuda, but `function` runs twice: once before, and once while it is written down."""
    function()
    with Recorder() as recorder:
        out = function()

    @torch.no_grad()
    def replay():
        for func, args, kwargs, outs in recorder.calls:
            for old, new in zip(tensors(outs), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)

    return replay, out
