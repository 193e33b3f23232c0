"""Faults planted in csrc's Hopper kernel: which of them sentryward names, and why it does not name the others.

A fault that is named shows that the check can fail; one that is not named is either outside of sentryward's model or
synchronisation that the kernel could do without.
"""

from __future__ import annotations

import dataclasses

import hopper
from launches import Launch

KERNEL, INSTRUCTIONS = "grad_density_sm90.cuh", "instructions.cuh"
ROUND = ([64, 130, 0, 17], 256, 256)  # both rings go round
LIMIT, REDUNDANT = "sentryward's limit", "redundant"


@dataclasses.dataclass(frozen=True)
class Fault:
    """named: the check that must fail, "synchronization" or "memory"; "" where `why` says why none does."""

    label: str
    edits: tuple[hopper.Edit, ...]
    named: str
    why: str = ""

    def launch(self) -> Launch:
        return hopper.launch(self.label, *ROUND, edits=self.edits)


def fault(label: str, old: str, new: str, named: str, why: str = "", file: str = KERNEL) -> Fault:
    return Fault(label, ((file, old, new),), named, why)


SYNC, MEMORY = "synchronization", "memory"
PRODUCER_WAIT = "wait(ring.empty(), ring.parity ^ 1);  // the first round finds it empty"
WAIT_DY, WAIT_X = "wait(rings.dy.full(), rings.dy.parity);\n", "wait(rings.x.full(), rings.x.parity);\n"
WAIT_PRODUCTS = "                wait_products<0>();\n"
RELEASE = """                if (lane == 0) {
                    arrive(rings.x.empty());
                    if (drops_dy) arrive(rings.dy.empty());
                }
"""
LAST = "    if (consumer == 0) take_baton(consumer);  // consumer 1's last: a barrier is left as it was found\n"
FIRST = "    if (consumer == 1) pass_baton(consumer);  // the first turn is consumer 0's\n"
FENCE = '    asm volatile("{};" ::: "memory");\n'

FAULTS = (
    fault("a full barrier counts 2", "init_barrier(at.full(), 1)", "init_barrier(at.full(), 2)", SYNC),
    fault("an empty barrier counts 7 of 8 warps", "CONSUMERS * 4);\n", "CONSUMERS * 4 - 1);\n", SYNC),
    fault("half of the bytes are expected", "BOXES * BOX_BYTES);\n", "BOXES * BOX_BYTES / 2);\n", SYNC),
    fault("dy's barriers are not initialised", "        rings.dy.init();\n", "", SYNC),
    fault("the producer waits for the other parity", "ring.parity ^ 1);", "ring.parity);", SYNC),
    fault("x is waited for with the other parity", "rings.x.parity);\n", "rings.x.parity ^ 1);\n", SYNC),
    fault("the producer does not wait", PRODUCER_WAIT, "", SYNC),
    fault("x is not waited for", WAIT_X, "", SYNC),
    fault("dy is not waited for", WAIT_DY, "", SYNC),
    fault("x is not released", "arrive(rings.x.empty());", "", SYNC),
    fault("x is released by one consumer", "arrive(rings.x.empty());", "if (!consumer) arrive(rings.x.empty());", SYNC),
    fault("dy is released at each tile", "drops_dy = !job.keeps_dy() || tile + 1 == tiles", "drops_dy = true", SYNC),
    fault("dy is not released after the last tile", " || tile + 1 == tiles;", ";", SYNC),
    fault("released before the products end", WAIT_PRODUCTS + RELEASE, RELEASE + WAIT_PRODUCTS, MEMORY),
    fault("products are not waited for", WAIT_PRODUCTS, "", MEMORY),
    fault("no barrier between init and use", "    __syncthreads();\n", "", SYNC),
    fault("the baton is not passed on", "                pass_baton(consumer);\n", "", SYNC),
    fault("nobody passes the first baton", FIRST, "", SYNC),
    fault("the last baton is not taken", LAST, "", "", f"{REDUNDANT}: nobody waits for that barrier; once a launch"),
    Fault(
        "no baton at all",
        (
            (KERNEL, "                take_baton(consumer);\n", ""),
            (KERNEL, "                pass_baton(consumer);\n", ""),
            (KERNEL, FIRST, ""),
            (KERNEL, LAST, ""),
        ),
        "",
        f"{REDUNDANT} for the values: the baton orders the consumers' products for speed",
    ),
    fault(
        "no barrier of the warp after the release",
        "                __syncwarp();  // what follows is for whole warps\n",
        "",
        "",
        f"{REDUNDANT} for the order of accesses: it brings a warp together before its next wgmma",
    ),
    fault(
        "no proxy fence after the barriers' init",
        FENCE.format("fence.proxy.async.shared::cta"),
        "",
        "",
        f"{LIMIT}: it models no fences",
        INSTRUCTIONS,
    ),
    fault(
        "no fence of the barriers' init",
        FENCE.format("fence.mbarrier_init.release.cluster"),
        "",
        "",
        f"{LIMIT}: it models no fences",
        INSTRUCTIONS,
    ),
    fault(
        "a tensor map is used without its fence",
        "        if (map != acquired) acquire_map(map);\n",
        "",
        "",
        f"{LIMIT}: it models no fences",
    ),
)
