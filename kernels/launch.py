"""One launch of a Triton kernel as a value: the same description is launched, or compiled where there is no GPU."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

# Whether kernels of this process are interpreted (TRITON_INTERPRET=1 when triton was imported), for use in kernels.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 sums: bf16 and fp16 products on the matrix units, fp32 ones in full fp32 (no TF32)."""
    if INTERPRETED:  # holds bf16 as integers and would multiply those; in fp32 their products are exact
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@dataclasses.dataclass(frozen=True)
class Call:
    """kernel[grid](**arguments, **constexprs). `arguments`: tensors, ints and floats; all tensors on one device."""

    kernel: Any  # what @triton.jit returned
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    scratch: bool = False  # the kernel makes tensor descriptors (TMA), which need room in device memory
    fma: bool = True  # the compiler may contract a product and a sum, with one rounding in place of two

    @property
    def options(self) -> dict[str, Any]:
        """Triton's own, of a launch and of a compilation."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=self.fma)

    def launch(self) -> None:
        """Enqueue on the current stream of the tensors' device."""
        if not all(self.grid):
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        if self.scratch:
            # Triton keeps its allocator in a context variable. Ours is set in a copy of the context: for this launch.
            contextvars.copy_context().run(self._launch_with_scratch, device)
        else:
            self._launch(device)

    def _launch_with_scratch(self, device: torch.device) -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        self._launch(device)

    def _launch(self, device: torch.device) -> None:
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constexprs, **self.options)
