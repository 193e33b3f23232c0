"""Runs compiled PTX on the host with numpy: all threads of a program at once, one instruction at a time.

What it sees that Triton's interpreter cannot, since it is in the compiler's output or in what the hardware does later:
  - an access outside of a tensor, of shared memory, or not aligned (`memory.py`), also by one program to what another
    program wrote;
  - a value that nothing wrote: registers and shared memory begin as NaN, and shared memory knows which bytes were
    written;
  - a race: two accesses to a byte of shared memory by different warps, copies in the background or matrix products,
    with no barrier, wait or fence that orders them (`order.py`, vector clocks);
  - a copy or product in the background that is used too early: it comes as late as it may, and NaN stands there until
    then;
  - a deadlock: a barrier that never fills, a phase that never ends.

It knows the instructions that Triton emits for this project's kernels on sm_80 and sm_90; another one is a `Fault` that
names it. It does not know time, caches, order between the lanes of a warp, or what ptxas makes of the PTX: the machine
code is seen on a GPU alone (docs/verified.md).

parse.py       PTX text -> a Kernel
flow.py        where threads that went different ways meet again
values.py      bits <-> numbers
memory.py      device memory; shared.py: shared memory; order.py: what happened before what
machine.py     one program: its threads, operands, scheduling
arithmetic.py, access.py, warps.py, copies.py, tensors.py, products.py      the instructions
driver.py      Triton launches its kernels here instead of on a GPU; plugin.py does so for a pytest run
"""

from . import access, arithmetic, copies, products, tensors, warps  # noqa: F401  (they register their instructions)
from .machine import Machine, pack
from .memory import Global
from .parse import Kernel
from .values import Fault

__all__ = ["Fault", "Global", "Kernel", "Machine", "pack"]
