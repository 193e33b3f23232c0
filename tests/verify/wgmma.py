"""Hopper's asynchronous products, which sentryward does not know, as accesses to shared memory.

A group of products reads its operands at some time between its first instruction and the wait that retires it. So the
copies that filled a chunk must come before the first, and what overwrites it after the wait: in the PTX that is
verified each thread of the warpgroup loads a part of what the group reads where the group is committed and again where
it is retired. It loads 16 bytes of each box of 64 columns: a copy fills a whole box, so the loads of any thread meet
each copy that the products meet. The instructions hold a warp together, as a barrier for the warp does.

What a group adds to its registers is not modelled: a sum taken before the wait goes unseen. ptxas warns of those.
"""

from __future__ import annotations

import re

# Where boxes of 64 tokens x 64 columns begin in an operand of m64n128k16 (grad_density_sm90.cuh). A group has products
# that differ in their tokens alone: up to four of 16.
BOXES = {"dy": (0,), "x": (0, 8192)}
STEPS = 4
_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.\w+\.\w+ \{[^}]*\}, (%rd\d+), (%rd\d+),.*;")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned (\d+);")
# A group that is pending: whether, and where its chunks of dy and x begin. `new` is the one committed last.
_REGISTERS = """
	.reg .pred %pending_new, %pending_old;
	.reg .b32 %new_dy, %new_x, %old_dy, %old_x, %group_thread, %group_at, %group_word<4>;
	.reg .b64 %group_wide;
	mov.u32 %new_dy, 0;
	mov.u32 %new_x, 0;
	mov.u32 %old_dy, 0;
	mov.u32 %old_x, 0;
	setp.ne.u32 %pending_new, %new_dy, 0;
	setp.ne.u32 %pending_old, %new_dy, 0;
	mov.u32 %group_thread, %tid.x;
	and.b32 %group_thread, %group_thread, 127;
	shl.b32 %group_thread, %group_thread, 4;
"""


def _read(which: str) -> list[str]:
    """Each thread loads 16 bytes of each box that the group reads, if the group is pending."""
    lines = []
    for operand, boxes in BOXES.items():
        lines.append(f"add.s32 %group_at, %{which}_{operand}, %group_thread;")
        for at in boxes:
            words = "{%group_word0, %group_word1, %group_word2, %group_word3}"
            lines.append(f"@%pending_{which} ld.shared.v4.u32 {words}, [%group_at+{at}];")
    return lines


def _address(descriptor: str, register: str) -> list[str]:
    """Bits 0 to 13 of a matrix descriptor are the address in units of 16 bytes."""
    return [
        f"and.b64 %group_wide, {descriptor}, 16383;",
        f"cvt.u32.u64 {register}, %group_wide;",
        f"shl.b32 {register}, {register}, 4;",
    ]


def _commit(descriptors: tuple[str, str]) -> list[str]:
    """The group before the last one that was never waited for still reads here."""
    lines = [
        *_read("old"),
        "mov.u32 %old_dy, %new_dy;",
        "mov.u32 %old_x, %new_x;",
        "mov.pred %pending_old, %pending_new;",
    ]
    lines += _address(descriptors[0], "%new_dy") + _address(descriptors[1], "%new_x")
    return [*lines, "setp.eq.u32 %pending_new, 0, 0;", *_read("new")]


def _wait(left: int) -> list[str]:
    lines = [*_read("old"), "setp.ne.u32 %pending_old, 0, 0;"]
    if left == 0:
        lines += [*_read("new"), "setp.ne.u32 %pending_new, 0, 0;"]
    return [*lines, "bar.warp.sync -1;"]


def as_accesses(ptx: str) -> str:
    """`ptx` with its groups of products as loads. ValueError where a product is not of the form that is known here."""
    out, group = [], []
    for line in ptx.splitlines():
        text = line.strip()
        product, wait = _PRODUCT.match(text), _WAIT.match(text)
        if line == "{" and out[-1].strip() != "// begin inline asm":  # the kernel's own, not one of inline assembly
            out += [line, _REGISTERS]
        elif product:
            group.append((product[1], product[2]))
        elif text == "wgmma.fence.sync.aligned;":
            out.append("bar.warp.sync -1;")
        elif text == "wgmma.commit_group.sync.aligned;":
            if not 1 <= len(group) <= STEPS:
                raise ValueError(f"a group of {len(group)} m64n128k16 products, 1 to {STEPS} are known: {__file__}")
            out += _commit(group[0])
            group = []
        elif wait and int(wait[1]) <= 1:
            out += _wait(int(wait[1]))
        elif "wgmma" in text:
            raise ValueError(f"{text[:80]}: tests/verify/wgmma.py does not know it")
        else:
            out.append(line)
    return "\n".join(out) + "\n"
