"""Triton's driver for a GPU that is not there: kernels are compiled for it as ever, and their PTX runs in `Machine`.

Everything of a launch is Triton's own but the last step: how arguments specialise a kernel, the cache, the compiler's
passes down to PTX. In place of machine code the PTX itself is "loaded".
"""

import collections
import ctypes

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import _allocation

from . import Global, Kernel, Machine, pack

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
MOST_BYTES = 200 << 20  # of a launch's tensors: beyond, it would take minutes


class TooLarge(Exception):
    """A launch on more memory than is copied here."""


class Driver(DriverBase):
    """For triton.runtime.driver.set_active. `launches` counts them by kernel."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.launches, self.instructions = collections.Counter(), 0
        self.utils = self
        # the PTX goes in where ptxas would make machine code of it, so a cache folder of our own is needed
        CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, type_):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError("there is no time here")

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_MEMORY[self.architecture]}

    def load_binary(self, name, ptx, shared, device):
        """(module, function, registers, spills, most threads)"""
        kernel = Kernel(ptx.decode())
        return kernel, Machine(kernel, shared, seed=len(kernel.code)), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        constants = {path[0] if isinstance(path, tuple) else path for path in source.constants}
        names = source.fn.arg_names
        passed = [i for i, name in enumerate(names) if not {i, name} & constants]
        scratch = (metadata.global_scratch_size, metadata.global_scratch_align, _allocation._allocator)
        profile = (metadata.profile_scratch_size, metadata.profile_scratch_align, _allocation._profile_allocator)

        def launch(x, y, z, stream, machine, packed, launch_metadata, enter, leave, *arguments):
            if (y, z) != (1, 1):
                raise NotImplementedError(f"a grid of {(x, y, z)}: only one dimension is known here")
            memory = Global()
            values = _addresses(memory, [arguments[i] for i in passed])
            values += [_scratch(memory, x, *need) for need in (scratch, profile)]
            before = machine.executed
            machine.launch(x, pack(machine.kernel, values), memory)
            self.launches[source.fn.__name__] += 1
            self.instructions += machine.executed - before

        return launch


def _scratch(memory, programs, size, alignment, allocator):
    """Room for every program, from the allocator that was set for the launch."""
    if not size:
        return 0
    room = allocator.get()(programs * size, alignment, 0)
    return memory.add(room.numpy().view(np.uint8))


def _addresses(memory, arguments):
    """Tensors become addresses of copies in `memory`. Tensors of one storage stay together; of a storage only the bytes
    of their elements may be touched."""
    storages = {}
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    places = {start: _place(memory, start, tensors) for start, tensors in storages.items()}
    values = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            value = places[start] + value.data_ptr() if start in places else 0
        values.append(value)
    return values


def _place(memory, start, tensors):
    """What to add to a host address for the simulated one."""
    last = [sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) for t in tensors]
    low = min(t.data_ptr() for t in tensors)
    high = max(t.data_ptr() + t.element_size() * (1 + i) for t, i in zip(tensors, last))
    if high - low > MOST_BYTES:
        raise TooLarge(f"a launch on {high - low} bytes")
    elements = np.zeros(high - low, bool)
    for t in tensors:
        strides = [s * t.element_size() for s in t.stride()]
        first = elements[t.data_ptr() - low :]
        np.lib.stride_tricks.as_strided(first, (*t.shape, t.element_size()), (*strides, 1))[...] = True
    host = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8)
    return memory.add(host, elements, phase=low % 512) - low
