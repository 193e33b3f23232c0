"""Faults planted in the compiled density kernel: each wait, fence and barrier that runs is taken out, one at a time.

Run by test_ptx.py, under the plugin alone. What must be seen always is asserted; of barriers of the whole program
Triton sets more than are needed, so for those: seen as a race, or the same bits.
"""

import collections
import copy
import itertools

import numpy as np
import pytest
import torch
import triton

from kunbr_fast.kernels import tiles
from kunbr_fast.kernels.grad_density import triton_kernel
from ptxsim import Fault, Machine, driver

ARCHITECTURE = triton.runtime.driver.active.architecture
# what an instruction is called here -> whether taking it out must be seen, each time
MUST_BE_SEEN = {
    "cp.async.wait_group": True,
    "mbarrier.init": True,
    "mbarrier.arrive": True,
    "mbarrier.try_wait": True,
    "fence.proxy.async": True,
    "fence.proxy.tensormap": True,
    "wgmma.wait_group": False,  # one that another one follows
    "cp.async.commit_group": False,  # an empty group
    "bar.sync": False,
}


class Recorder(Machine):
    """Remembers its last launch and which instructions ran."""

    last = None

    def launch(self, grid, params, memory):
        self.ran = set()
        super().launch(grid, params, memory)
        memory.detach()
        Recorder.last = self, params, memory

    def _step(self, group, mask, ins):
        self.ran.add(group.at)
        return super()._step(group, mask, ins)


def name(ins):
    if ins.op == "cp" and "bulk" in ins.mods:
        return None
    parts = [ins.op, *(mod.split("::")[0] for mod in ins.mods)]
    return next((known for known in MUST_BE_SEEN if set(known.split(".")) <= set(parts)), None)


def without(kernel, at):
    """The kernel with nothing at `at`; a try that is waited for is at once successful."""
    changed = copy.copy(kernel)
    changed.code = list(kernel.code)
    ins = copy.copy(kernel.code[at])
    if "try_wait" in ins.mods:
        ins.op, ins.mods, ins.args = "setp", ["eq", "u32"], [ins.args[0], "0", "0"]
    else:
        ins.op, ins.mods, ins.args = "mov", ["b32"], ["_", "0"]
    changed.code[at] = ins
    return changed


@pytest.mark.parametrize("kind, tokens", [("short", 40), ("long", 150)])
def test_density(kind, tokens, monkeypatch):
    monkeypatch.setattr(driver, "Machine", Recorder)
    tile = tiles.TABLE[ARCHITECTURE, kind][0]
    x, dy = (torch.randn(tokens, n).bfloat16() for n in (2 * tile.BK, tile.BN))
    cu = torch.tensor([0, *itertools.accumulate([tokens])], dtype=torch.int32)
    triton_kernel.launch(x, [dy], cu, "grad_l1", None, tile)
    machine, params, memory = Recorder.last
    Machine(machine.kernel, machine.dynamic_shared).launch(1, params, memory)  # the first program alone
    right, found = memory.bytes.copy(), collections.defaultdict(collections.Counter)
    assert right.any()
    for at in sorted(machine.ran):
        what = name(machine.kernel.code[at])
        if what is None:
            continue
        try:
            Machine(without(machine.kernel, at), machine.dynamic_shared).launch(1, params, memory)
            seen = not np.array_equal(memory.bytes, right)
        except Fault:
            seen = True
        found[what][seen] += 1
        assert seen or not MUST_BE_SEEN[what], f"unseen: {machine.kernel.code[at].text}"
    print(f"sm_{ARCHITECTURE} {tile}:", {what: f"{n[True]} of {n.total()} seen" for what, n in found.items()})
    needed = {80: "cp.async.wait_group", 90: "mbarrier.try_wait"}[ARCHITECTURE]
    assert found[needed][True] and found["bar.sync"][True]
